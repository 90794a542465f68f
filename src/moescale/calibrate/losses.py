"""Computes losses on a text: of plans, without writing anything, and of a finished output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moescale.calibrate import runner
from moescale.calibrate.calibration import needed_files
from moescale.calibrate.loading import Loader
from moescale.calibrate.measure import batches_of, evaluate
from moescale.calibrate.scoring import Score, Setting, paired, score
from moescale.calibrate.text import Text, digest, overlap, read_text
from moescale.factors.evaluation import Evaluation, Run
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.formats import open_checkpoint
from moescale.planning.plan import Plan
from moescale.planning.tensors import find_scaled_routers
from moescale.storage.base import Source, ignore

OPTION = "--evaluate"


def evaluate_plans(
    source: Source,
    plans: Sequence[Plan],
    file: Path,
    loader: Loader,
    *,
    calibrated: Path | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] = ignore,
) -> Evaluation:
    """Run a model as trained, with the config edit of each number of experts, and as planned.

    Args:
        source: the checkpoint; one on the Hub is downloaded into the Hub's cache.
        plans: plans of this checkpoint; at least one.
        file: the text.
        loader: loads the model.
        calibrated: the text that the plans were calibrated on.
        output: the finished output of the only plan, to be loaded; None: plans run in memory.
        progress: called with tokens done and total tokens.

    Raises:
        UsageError: the file is not text, or too short.
        UnsupportedError: transformers cannot run the model.
    """
    sha256 = digest(file, OPTION)
    checkpoint = open_checkpoint(source, plans[0].options, plans[0].location)
    moe, experts, biases = checkpoint.moe, plans[0].experts, None
    if any(plan.router_scales for plan in plans):
        biases = find_scaled_routers(moe, checkpoint.tensors).biases
    folder = source.local_folder(needed_files(plans[0]))
    config = runner.read_config(folder)
    vocabulary = config.get_text_config().vocab_size
    text = read_text(file, folder, vocabulary, OPTION)
    settings = _settings(moe, plans, hooks=output is None)
    model = loader.model(folder, config, moe)
    scores = evaluate(
        model, text, moe, experts, list(settings.values()), biases=biases, progress=progress
    )
    del model  # before the output's is loaded
    found = dict(zip(settings, scores, strict=True))
    if output is not None:
        found[experts.after, plans[0].rule] = _of_output(output, moe, text, loader, progress)
    trained = found.pop(_TRAINED)
    runs = [
        _run(key, one, found[key[0], "none"], written=output is not None and key[1] != "none")
        for key, one in found.items()
    ]
    warnings = []
    # For a finished output, and for factors from a file, only the digest of the text is known.
    same = any(plan.calibration.get("text_sha256") == sha256 for plan in plans)
    if same or (
        calibrated is not None and overlap(read_text(calibrated, folder, vocabulary), text)
    ):
        warnings.append(
            f"{file} shares passages with the calibration text: rules that were fitted on that text"
            " look better here than they are"
        )
    return Evaluation(
        str(file),
        sha256,
        sum(trained.tokens),
        text.cut,
        experts.trained,
        trained.loss,
        tuple(runs),
        tuple(warnings),
    )


_Key = tuple[int | tuple[int, ...], str]
_TRAINED: _Key = (0, "")


def _settings(moe: Moe, plans: Sequence[Plan], hooks: bool) -> dict[_Key, Setting]:
    """Settings by number of experts and rule; the model as trained comes first."""
    experts = plans[0].experts
    found = {_TRAINED: Setting({layer: experts.at(layer).trained for layer in moe.layers})}
    for plan in plans:
        after = plan.experts.after
        counts = {layer: plan.experts.at(layer).after for layer in moe.layers}
        found.setdefault((after, "none"), Setting(counts))
        if hooks:
            factors, scales = _by_layer(moe, plan.factors), _by_layer(moe, plan.router_scales)
            found.setdefault((after, plan.rule), Setting(counts, factors, scales))
    return found


def _by_layer(moe: Moe, values: Mapping[str, float]) -> dict[Layer, float]:
    return {layer: values[str(layer)] for layer in moe.layers if values}


def _of_output(
    folder: Path, moe: Moe, text: Text, loader: Loader, progress: Callable[[int, int], None]
) -> Score:
    """The loss of a checkpoint as a user would load it."""
    config = runner.read_config(folder)
    model = loader.model(folder, config, moe).model
    return score(model, (), [Setting({})], batches_of(text, config, progress))[0]


def _run(key: _Key, one: Score, edit: Score, written: bool) -> Run:
    error = paired(one.losses, edit.losses, one.tokens) if one is not edit else 0.0
    return Run(*key, one.loss, one.loss - edit.loss, error, written)
