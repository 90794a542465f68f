"""Runs the model for the rules that need it, when planning asks for samples.

Torch is imported only when a model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescale.calibrate.loading import Loader
from moescale.calibrate.text import Text, digest, read_text, tokeniser_of
from moescale.factors.fitted import Guard
from moescale.factors.samples import Sample
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.experts import Experts
from moescale.planning.factors import Findings
from moescale.planning.plan import Plan
from moescale.planning.rule import ScalableParts
from moescale.storage.base import ignore

if TYPE_CHECKING:
    from moescale.calibrate.measure import LoadedModel


@dataclass(slots=True)
class Calibration:
    """Runs a model on a text; `make_plan` calls it.

    Attributes:
        text: the file; None: the model writes its own.
        sha256: SHA-256 of the file; None without one.
        loader: loads the model.
        keep: where to save the model's own text; None: it is not saved.
        progress: called with tokens done and total tokens.
        folder: the checkpoint on disk; set before the model is run.
        own: the model's own text, which is the same every time; set when it is generated.
        facts: the text's entry in the provenance; set after a run.
    """

    text: Path | None
    sha256: str | None
    loader: Loader
    keep: Path | None
    progress: Callable[[int, int], None]
    folder: Path | None = None
    own: Text | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, moe: Moe, experts: Experts, scalable: ScalableParts | None) -> Findings:
        """A sample of each MoE layer, and the rule that the guard of ``fitted`` chooses.

        Transformers does not run MTP layers; they get the sample of the last layer, and the facts
        say so.

        Raises:
            UsageError: the text is too short.
            SourceError: the model cannot be run here.
        """
        from moescale.calibrate.measure import SEQUENCE, context_of, measure
        from moescale.calibrate.runner import read_config

        assert self.folder is not None, "set before planning"
        config = read_config(self.folder)
        text = self._given(config)
        model = self.loader.model(self.folder, config, moe)
        text = text or self._written(model)
        if scalable is not None and text.length is None:
            text = replace(text, length=min(SEQUENCE, context_of(config)))
        some, held_back, guard = text, None, None
        if scalable is not None and experts.trained != experts.after:
            some, held_back = text.split(context_of(config), HELD_BACK)
        samples = measure(
            model,
            some,
            moe,
            experts,
            fitted=scalable is not None,
            biases=scalable.biases if scalable else None,
            progress=self.progress,
        )
        if scalable is not None and held_back is not None:
            guard = self._guarded(model, held_back, moe, experts, samples, scalable)
        rest = [layer for layer in moe.layers if layer not in samples]
        self.facts = {
            "text_sha256": self.sha256,
            text.unit: len(text.tokens),
            "context": text.length or context_of(config),
            **({"own": True} if self.text is None else {}),
            **({"cut": True} if text.cut else {}),
            **({"as_the_last_layer": [str(layer) for layer in rest]} if rest else {}),
            **({"guard": guard.as_json()} if guard else {}),
        }
        samples |= dict.fromkeys(rest, samples[max(samples)])
        return Findings(samples, guard.taken) if guard else Findings(samples)

    def use(self, own: Text | None) -> None:
        """Reuse the text that the same model generated before; it would generate the same."""
        if own is not None and self.text is None:
            from moescale.calibrate.generated_text import digest_of

            self.own, self.sha256 = own, digest_of(own)

    def _given(self, config: Any) -> Text | None:
        if self.text is None:
            return self.own
        assert self.folder is not None
        return read_text(self.text, self.folder, config.get_text_config().vocab_size)

    def _written(self, model: LoadedModel) -> Text:
        """The model's own text, saved if requested."""
        from moescale.calibrate.generated_text import digest_of, keep_text, write_text
        from moescale.calibrate.measure import context_of

        assert self.folder is not None
        vocabulary = model.config.get_text_config().vocab_size
        tokeniser = tokeniser_of(self.folder, vocabulary)
        self.own = text = write_text(
            model.model, tokeniser, vocabulary, context_of(model.config), self.progress
        )
        self.sha256 = digest_of(text)
        if self.keep is not None:
            keep_text(text, tokeniser, self.keep)
        return text

    def _guarded(
        self,
        model: LoadedModel,
        text: Text,
        moe: Moe,
        experts: Experts,
        samples: Mapping[Layer, Sample],
        scalable: ScalableParts,
    ) -> Guard:
        from moescale.calibrate.guard import run_trials

        return run_trials(
            model,
            text,
            moe,
            experts,
            samples,
            by="loss" if self.text is not None else "divergence",
            biases=scalable.biases,
            scalable=scalable.experts,
            progress=self.progress,
        )


HELD_BACK = 0.25
"""The fraction of a text reserved for the guard: 20 of 80 sequences of a model's own text."""


def open_calibration(
    text: str | Path | None,
    loader: Loader,
    keep: Path | None = None,
    progress: Callable[[int, int], None] = ignore,
) -> Calibration:
    """Open a calibration text; only its digest is computed now.

    Raises:
        UsageError: the file cannot be read.
    """
    if text is None:
        return Calibration(None, None, loader, keep, progress)
    return Calibration(Path(text), digest(Path(text)), loader, keep, progress)


def needed_files(plan: Plan) -> list[str]:
    """The files needed to load the model."""
    return [file.name for file in plan.files if file.action in ("rewrite", "copy", "edit")]
