"""The rule ``measured`` from outside: what it needs, and what an earlier run has noted already.

Nothing of torch is imported before a model has to be run.
"""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moescale.errors import UsageError
from moescale.measuring.text import digest, read_text
from moescale.model.experts import Layer
from moescale.model.lookup import Moe
from moescale.options import Options, is_calibration
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.plan import Experts, Plan
from moescale.repos.base import Sink, Source
from moescale.rules.samples import Moments, Sample
from moescale.running.conversion import status_of

_NEEDED = ("torch", "transformers", "accelerate")

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def check_installed() -> None:
    """Refuse early where the model cannot be run.

    Raises:
        UsageError: the extra is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--rule measured needs {', '.join(missing)} to run the model",
            hint="Install them with pip install '.[measure]' in the clone, or: pip install "
            + " ".join(_NEEDED),
        )


def parse_memory(text: str) -> int:
    """Bytes, from ``8GiB`` or ``8GB``.

    Raises:
        UsageError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not size:
        raise UsageError(f"--max-memory is {text!r}: it must be a size such as 8GiB")
    return size


@dataclass(frozen=True, slots=True)
class Noted:
    """What an earlier run of the same job has measured."""

    factors: Mapping[str, float]
    calibration: Mapping[str, Any]


def noted(sink: Sink, trial: Plan) -> Noted | None:
    """The factors of an unfinished or finished run of this job at the destination, if it is there.

    `trial` is a plan with any factors. Factors are measured to a few digits, but two machines may
    still differ in one; what a run has begun with it keeps.
    """
    found, wanted = sink.unfinished(), provenance.job(trial)
    if found is not None:
        alike = ("version", "source", "options")
    elif (said := sink.recorded()) is not None:
        found, wanted = provenance.decode(said), provenance.provenance(trial, {})
        alike = ("moescale", "source", "options")
    if not isinstance(found, dict) or any(found.get(key) != wanted[key] for key in alike):
        return None
    factors, calibration = found.get("factors"), found.get("calibration")
    if not isinstance(factors, dict) or factors.keys() != trial.factors.keys():
        return None
    if not all(_is_factor(factor) for factor in factors.values()):
        return None
    if not is_calibration(calibration):
        return None
    same = calibration["text_sha256"] == trial.options.calibrate
    return Noted(factors, calibration) if same else None


def _is_factor(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1e30


def _unmeasured(moe: Moe, experts: Experts) -> dict[Layer, Sample]:
    """Samples to plan with before anything is measured.

    The factor is a common one, so that a format that takes powers of two only is refused already.
    """
    some = Sample(Moments(1, 1.0, 1.0, norm=5.0), Moments(1, 1.0, 1.0, norm=4.0))
    return dict.fromkeys(moe.layers, some)


@dataclass(slots=True)
class Calibration:
    """Measures a model on a text; what `make_plan` calls to have it done.

    Attributes:
        text: the file.
        sha256: its digest.
        max_memory: bytes of main memory for weights; the rest lies on disk.
        progress: is told of tokens done and in all.
        folder: the checkpoint on disk, once it is there.
        facts: afterwards, what the provenance says of the text.
    """

    text: Path
    sha256: str
    max_memory: int | None
    progress: Callable[[int, int], None]
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, moe: Moe, experts: Experts) -> dict[Layer, Sample]:
        """A sample of each MoE layer.

        Blocks that predict a second token are not run by transformers; they get the sample of the
        last layer, and the facts say so.

        Raises:
            UsageError: the text is too short.
            SourceError: the model cannot be run here.
        """
        from moescale.measuring.measure import context_of, measure, opened
        from moescale.measuring.runner import read_config

        assert self.folder is not None, "there before it is planned for"
        config = read_config(self.folder)
        text = read_text(self.text, self.folder, config.get_text_config().vocab_size)
        with opened(self.folder, config, moe, self.max_memory) as model:
            samples = measure(model, text, moe, experts, progress=self.progress)
        gc.collect()  # the model is made of circles, and the conversion needs no memory of it
        rest = [layer for layer in moe.layers if layer not in samples]
        amount = {text.unit: len(text.tokens), "context": context_of(config)}
        self.facts = {"text_sha256": self.sha256, **amount}
        if text.cut:
            self.facts["cut"] = True
        if rest:
            self.facts["as_the_last_layer"] = [str(layer) for layer in rest]
        return {**samples, **dict.fromkeys(rest, samples[max(samples)])}


def open_calibration(
    text: str | Path,
    max_memory: str | int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """A text to measure on, not read yet but for its digest.

    Raises:
        UsageError: it cannot be read, or the size is none.
    """
    memory = parse_memory(str(max_memory)) if max_memory is not None else None
    return Calibration(Path(text), digest(Path(text)), memory, progress)


def measured_plan(
    source: Source,
    options: Options,
    destination: str | None,
    calibration: Calibration,
    sink: Sink | None = None,
    overwrite: bool | None = None,
) -> Plan:
    """A plan with measured factors, or with those that the destination has of the same job.

    Args:
        source: the checkpoint; one on the Hub is downloaded into the Hub's cache.
        options: what the user asked for.
        destination: as the user calls it.
        calibration: the text.
        sink: where an earlier run may have left what it measured.
        overwrite: of a run that is to follow: one that would be refused is refused before anything
            is measured, and one that starts anew measures anew. None: no run follows.

    Raises:
        MoescaleError: see `make_plan`, `status_of` and `moescale.measuring.measure`.
    """
    plan = trial = make_plan(source, options, destination, _unmeasured)
    earlier = noted(sink, trial) if sink is not None else None
    if earlier is not None:
        plan = make_plan(source, options, destination, noted=earlier.factors)
        plan = replace(plan, calibration=earlier.calibration)
    status = ""
    if sink is not None and overwrite is not None:
        status = status_of(plan, source, sink, overwrite)
    if earlier is not None and status not in ("new", "replace"):
        return plan
    check_installed()
    names = [file.name for file in trial.files if file.action in ("rewrite", "copy", "edit")]
    calibration.folder = source.on_disk(names)
    plan = make_plan(source, options, destination, calibration)
    return replace(plan, calibration=calibration.facts)
