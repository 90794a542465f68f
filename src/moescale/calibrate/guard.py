"""Scores rules on held-back text, which none of them was fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from moescale.calibrate.measure import LoadedModel, evaluate
from moescale.calibrate.scoring import Score, Setting, paired
from moescale.calibrate.text import Text
from moescale.factors import measured
from moescale.factors.fitted import Guard, Trial
from moescale.factors.samples import Sample
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.experts import Experts
from moescale.storage.base import ignore


def candidates(samples: Mapping[Layer, Sample], scalable: bool) -> dict[str, Setting]:
    """Settings of the model for the config edit and for the rules that use samples.

    `scalable`: whether the format allows a factor of the down-projections.
    """
    experts = {layer: sample.after.experts for layer, sample in samples.items()}
    fits = {layer: sample.fit for layer, sample in samples.items()}
    scales = {layer: found.scale for layer, found in fits.items() if found}
    if not scalable:
        return {"none": Setting(experts), "fitted": Setting(experts, {}, scales)}
    norms = {layer: measured.factor(sample) for layer, sample in samples.items()}
    factors = norms | {layer: found.factor for layer, found in fits.items() if found}
    return {
        "none": Setting(experts),
        "measured": Setting(experts, norms),
        "fitted": Setting(experts, factors, scales),
    }


def run_trials(
    model: LoadedModel,
    text: Text,
    moe: Moe,
    experts: Experts,
    samples: Mapping[Layer, Sample],
    *,
    by: Literal["loss", "divergence"],
    biases: frozenset[str] | None,
    scalable: bool = True,
    progress: Callable[[int, int], None] = ignore,
) -> Guard:
    """Run the model with each rule, without writing anything.

    Args:
        model: the model.
        text: the held-back text; the samples did not use it.
        moe: the MoE of the checkpoint.
        experts: the numbers of experts per token.
        samples: samples from the rest of the text.
        by: the quantity that decides.
        biases: as for `moescale.calibrate.measure.measure`.
        scalable: whether the format allows a factor of the down-projections.
        progress: called with tokens done and total tokens.
    """
    settings = candidates(samples, scalable)
    trained = Setting({layer: sample.before.experts for layer, sample in samples.items()})
    first, *others = evaluate(
        model,
        text,
        moe,
        experts,
        [trained, *settings.values()],
        biases=biases,
        progress=progress,
    )
    edit = others[0]
    trials = tuple(_trial(rule, s, edit) for rule, s in zip(settings, others, strict=True))
    return Guard(first.loss, sum(first.tokens), by, trials)


def _trial(rule: str, score: Score, edit: Score) -> Trial:
    return Trial(
        rule,
        score.loss,
        score.loss - edit.loss,
        paired(score.losses, edit.losses, score.tokens),
        score.divergence,
        score.divergence - edit.divergence,
        paired(score.divergences, edit.divergences, score.tokens),
    )
