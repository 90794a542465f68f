"""The plan: everything that a run will do, as one frozen object.

The dry run prints it, the run executes it, and the card and the verification read it. None of them
makes a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.rewrite import Segment, segments
from moescale.errors import bytes_text, printable
from moescale.factors.evaluation import Evaluation
from moescale.factors.fitted import Guard
from moescale.factors.samples import Sample
from moescale.families.config import CONFIG
from moescale.options import Options
from moescale.planning.comparison import ByLayer, Comparison, compare
from moescale.planning.experts import Experts
from moescale.planning.files import CARD, PROVENANCE, PlannedFile
from moescale.planning.overrides import ConfigOverrides, by_engine
from moescale.routers.normalisation import Normalisation
from moescale.storage.base import SourceId
from moescale.storage.location import Location

if TYPE_CHECKING:
    from moescale.planning.active import Active

_CARD_AND_PROVENANCE = frozenset({CARD, PROVENANCE})
_MAKES = frozenset({"rewrite", "edit", "create"})
_SHOWN_WARNINGS = 5


@dataclass(frozen=True, slots=True)
class NewHeader:
    """The changes of a shard's header.

    Attributes:
        patches: replacements and insertions, in file order; for GGUF, also tensors to append.
        file_size: size of the new shard in bytes.
    """

    patches: tuple[Segment, ...]
    file_size: int


class View(Protocol):
    """Renders a plan for people; planning uses nothing else from the reports."""

    def text(self, plan: Plan) -> str:
        """The plan as a page of text."""

    def html(self, plan: Plan) -> str:
        """The plan for a cell of a notebook."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Everything that a run will do, and why; the run itself decides nothing.

    A notebook shows it with tables and charts; `summary` is the text that the command prints.
    Mappings by layer are keyed by layer name.

    Attributes:
        source: identity of the source.
        location: location of the output; None without a destination.
        options: the options as the user gave them.
        model_type: the model type of the MoE.
        part: name of the MoE in a model with several; None for a model with one.
        experts: experts per token, and routed experts per layer.
        router: how the router normalises its gate weights; None if unknown.
        rule: name of the rule, or ``factor`` or ``factors``.
        why: reason for the rule; None if the user asked for it.
        rho: correlation of expert outputs.
        factors: multiplier of the routed output, by layer.
        router_scales: multiplier of the router's logits, by layer; empty if none changes.
        alternatives: factors of the closed forms, by rule.
        tensors: edits of tensors.
        files: all files of source and output, with their actions.
        config: content of the new config; None for GGUF.
        loader: class of transformers that loads the output; None for GGUF.
        index: name of the index, and its content if it is new; None without an index.
        new_headers: replacements in headers of shards, by file.
        edited_files: new content of other small files, by file.
        keys: values to set in the header of a shard, by key.
        provenance_file: name of the file that holds the provenance.
        last_file: name of the file without which the output does not load; it is written last.
        samples: gate and expert statistics, by layer; empty if the rule needs none.
        calibration: facts of the calibration text; empty without one.
        factors_rule: the rule that made the factors in the user's file; None if unknown.
        evaluation: losses on a text; None if not requested.
        warnings: warnings for the user.
        states: fingerprint of each source file, to notice changes during a run.
        active: weights that a token uses; None if unknown.
        config_overrides: the alternative without rewriting; None if there is none.
        fold_key: the config key that ``--fold config`` multiplies; None if there is none.
        view: renders the plan for people.
    """

    source: SourceId
    location: Location | None
    options: Options
    model_type: str
    part: str | None
    experts: Experts
    router: Normalisation | None
    rule: str
    why: str | None
    rho: float
    factors: Mapping[str, float]
    router_scales: Mapping[str, float]
    alternatives: Mapping[str, ByLayer]
    tensors: tuple[TensorEdit, ...]
    files: tuple[PlannedFile, ...]
    config: bytes | None
    loader: str | None
    index: tuple[str, bytes | None] | None
    new_headers: Mapping[str, NewHeader]
    edited_files: Mapping[str, bytes] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    provenance_file: str = PROVENANCE
    last_file: str = CONFIG
    samples: Mapping[str, Sample] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    factors_rule: str | None = None
    evaluation: Evaluation | None = None
    warnings: tuple[str, ...] = ()
    states: Mapping[str, Any] = field(default_factory=dict)
    active: Active | None = None
    config_overrides: ConfigOverrides | None = None
    fold_key: str | None = None
    view: View | None = field(default=None, compare=False)

    @property
    def destination(self) -> str | None:
        """The output's location as the user gave it."""
        return None if self.location is None else self.location.text

    def __repr__(self) -> str:
        """The plan in a few lines, whatever the number of layers and tensors."""
        counts = f"{self.experts.before} -> {self.experts.after}"
        written = bytes_text(self.bytes_written)
        factors = sorted({f"{f:.6g}": f for f in self.factors.values()}.values())
        ends = dict.fromkeys(f"{end:.6g}" for end in (factors[:1] + factors[-1:]))
        lines = [
            f"{self.source.id} -> {self.destination or 'no destination'}",
            f"  {self.model_type}, {len(self.factors)} MoE layers of {self.experts.total} experts:"
            f" {printable(counts, 60)} experts per token",
            f"  {self.rule}, factor {' to '.join(ends)}:"
            f" {len(self.changed_tensors):,} tensors scaled, {written} written",
            *(f"  warning: {warning}" for warning in self.warnings[:_SHOWN_WARNINGS]),
        ]
        return "\n".join(["<Plan", *(f"  {printable(line, 150)}" for line in lines)]) + ">"

    def _repr_html_(self) -> str | None:
        """The plan for a notebook."""
        return self.view.html(self) if self.view else None

    def summary(self) -> str:
        """The text that the command prints."""
        return self.view.text(self) if self.view else repr(self)

    @property
    def guard(self) -> Guard | None:
        """The trials of rules from which ``fitted`` chose one; None for other rules."""
        return Guard.from_json(self.calibration.get("guard"))

    @property
    def changes_nothing(self) -> bool:
        """Whether the output would equal the source, except for card and provenance."""
        made = any(f.action in _MAKES for f in self.files if f.name not in _CARD_AND_PROVENANCE)
        return not made and not self.changed_tensors

    @property
    def changed_tensors(self) -> tuple[TensorEdit, ...]:
        """The tensors whose bytes change; a factor of exactly 1 copies."""
        return tuple(t for t in self.tensors if t.factor != 1.0)

    def segments(self, file: PlannedFile) -> list[Segment]:
        """The segments of a large file to copy and to edit."""
        edits = [t for t in self.tensors if t.shard == file.name and t.factor != 1.0]
        new = self.new_headers.get(file.name)
        return segments(edits, file.size or 0, new.patches if new else ())

    def output_size(self, file: PlannedFile) -> int:
        """Size of a large file in the output, in bytes."""
        new = self.new_headers.get(file.name)
        return (file.size or 0) if new is None else new.file_size

    @property
    def large_files(self) -> tuple[PlannedFile, ...]:
        """The streamed files: shards and copied files; config and index are written last."""
        last = {CONFIG, self.index[0] if self.index else CONFIG}
        return tuple(
            f for f in self.files if f.action in ("rewrite", "copy") and f.name not in last
        )

    @property
    def large_sizes(self) -> dict[str, int]:
        """The size of each large file in the output, in bytes."""
        return {f.name: self.output_size(f) for f in self.large_files}

    @property
    def bytes_streamed(self) -> int:
        """Bytes of the large files of the output."""
        return sum(self.large_sizes.values())

    @property
    def bytes_changed(self) -> int:
        """Bytes of the tensors that are multiplied."""
        return sum(t.nbytes for t in self.changed_tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that a run reads."""
        return sum(f.size or 0 for f in self.files if f.action != "skip")

    @property
    def bytes_written(self) -> int:
        """Bytes of the output without card and provenance, whose sizes are not known yet."""
        name, made = self.index or ("", b"")
        sizes = {f.name: f.size or 0 for f in self.files}
        index = len(made) if made is not None else sizes[name]
        edited = len(self.config or b"") + sum(map(len, self.edited_files.values()))
        return self.bytes_streamed + edited + index

    @property
    def comparison(self) -> Comparison:
        """Factor and norm of the routed output, by rule and layer, where known."""
        sharper = self.options.gate_scale is not None
        return compare(
            self.rule,
            self.factors,
            self.alternatives,
            self.samples,
            self.rho,
            "config edit and gate" if sharper else "config edit alone",
            bool(self.router_scales) and not sharper,
        )

    @property
    def overrides(self) -> dict[str, str]:
        """By engine, a command that has the same effect without rewriting; may be empty."""
        if self.config_overrides is None:
            return {}
        return by_engine(self.config_overrides, self.loader, self.source)

    @property
    def predicted_norm(self) -> dict[str, ByLayer]:
        """By rule, the norm of the routed output relative to that of the trained model.

        One number if it is the same in all layers, else one for each layer. Factors that the user
        gave are listed as ``factor`` or ``factors``. Empty if the router is unknown.
        """
        found = self.comparison
        named = {"own": self.rule}
        return {named.get(rule, rule): found.norm(rule) for rule in found.norms}

    def as_json(self) -> dict[str, Any]:
        """The plan as in ``--dry-run --json``."""
        return {
            "source": self.source_json(),
            "destination": self.destination,
            **self.decisions(),
            "predicted_norm": self.predicted_norm,
            "norm_basis": self.comparison.basis,
            **({"factor_error": error} if (error := self.factor_error) is not None else {}),
            **({"keys": dict(self.keys)} if self.keys else {}),
            "tensors": [t.as_json() for t in self.tensors],
            "files": [f.as_json() for f in self.files],
            "bytes": {
                "read": self.bytes_read,
                "changed": self.bytes_changed,
                "written": self.bytes_written,
            },
            "active": self.active.as_json() if self.active else None,
            "overrides": self.overrides,
            **({"evaluation": self.evaluation.as_json()} if self.evaluation else {}),
            "warnings": list(self.warnings),
        }

    @property
    def factor_error(self) -> float | None:
        """The largest relative standard error of a sampled factor; None for other rules."""
        if self.rule != "gates":
            return None
        errors = [s.error for s in self.samples.values() if s.error is not None]
        return float(f"{max(errors):.2g}") if errors else None

    def source_json(self) -> dict[str, Any]:
        """The source as JSON."""
        source = self.source
        return {"kind": source.kind, "id": source.id, "revision": source.revision}

    def decisions(self) -> dict[str, Any]:
        """The decisions, without locations and files."""
        return {
            "model_type": self.model_type,
            **({"part": self.part} if self.part else {}),
            "experts": {
                "trained": self.experts.trained,
                "from": self.experts.before,
                "to": self.experts.after,
                "total": self.experts.total,
            },
            "router": {"renormalised": self.router.renormalised if self.router else None},
            "rule": self.rule,
            **({"rule_why": self.why} if self.why else {}),
            **({"factors_rule": self.factors_rule} if self.factors_rule else {}),
            **({"fold": self.options.fold} if self.options.fold else {}),
            **({"gate_scale": scale} if (scale := self.options.gate_scale) is not None else {}),
            "rho": self.rho,
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            "factors": dict(self.factors),
            **({"router_scales": dict(self.router_scales)} if self.router_scales else {}),
            "alternatives": dict(self.alternatives),
        }
