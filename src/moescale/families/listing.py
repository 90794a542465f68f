"""What the tables of model types say, in words: for ``--list-types`` and docs/models.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moescale.families import architectures, llama_cpp
from moescale.families.architectures import Architecture
from moescale.families.router_tensors import BIAS_WARNING
from moescale.routers.kinds import OtherRouter, RouterKind


@dataclass(frozen=True, slots=True)
class ModelType:
    """One model type, or one part of it, and what can be done with it.

    Attributes:
        model_type: as in ``config.json``; of a GGUF file its ``general.architecture``.
        part: which MoE of a model that has several.
        effect: what happens to its experts, in words.
        fold_config: whether ``--fold config`` can be used.
        gates: ``yes``, or why ``--rule gates`` cannot be used.
        gate_scale: ``yes``, what ``--gate-scale`` warns of, or ``no``.
        format: of the checkpoint.
        fold_scale: whether ``--fold scale`` can be used.
    """

    model_type: str
    part: str | None
    effect: str
    fold_config: bool
    gates: str
    gate_scale: str
    format: Literal["safetensors", "gguf"] = "safetensors"
    fold_scale: bool = False


def model_types() -> tuple[ModelType, ...]:
    """Every model type that is known, by name; after them those of GGUF files."""
    rows = sorted(architectures.ROWS, key=lambda row: (row.model_type, row.part or ""))
    return (*_types(rows), *_llama_types())


def _llama_types() -> Iterator[ModelType]:
    for row in sorted(llama_cpp.ROWS, key=lambda row: row.name):
        formed = isinstance(row.router, RouterKind)
        gates = "yes" if isinstance(row.router, RouterKind) else f"no: {row.router.why}"
        moves = isinstance(row.router, RouterKind) and row.router.bias
        scale = "yes, with a warning where there is a bias" if moves else "yes" if formed else "no"
        yield ModelType(
            row.name,
            None,
            _llama_effect(row),
            row.scale_key,
            gates,
            scale,
            "gguf",
            row.scale_tensor,
        )


def _llama_effect(row: llama_cpp.Row) -> str:
    where = f" where it has {row.no_effect_if}" if row.no_effect_if else ""
    where = f" where it has no {row.no_effect_unless}" if row.no_effect_unless else where
    said = (
        row.refused and f"refused: {row.refused}",
        row.no_effect and f"only --rule none{where}: {row.no_effect}",
        row.fixed_if and f"the number of experts stays where it has {row.fixed_if}",
        row.partial_effect and f"with a warning: {row.partial_effect}",
    )
    found = [text for text in said if text]
    return "; ".join(found if row.refused or (row.no_effect and not where) else ["scaled", *found])


def _types(rows: list[Architecture]) -> Iterator[ModelType]:
    for row in rows:
        gates, scale = _router(row, row.router)
        yield ModelType(row.model_type, row.part, _effect(row), row.can_fold, gates, scale)


def _effect(row: Architecture) -> str:
    if row.fixed:
        return f"scaled, but the number of experts stays: {row.fixed}"
    if row.no_effect:
        return f"only --rule none: {row.no_effect}"
    if row.partial_effect:
        where = f" where a layer has {row.partial_effect_if}" if row.partial_effect_if else ""
        return f"scaled, with a warning{where}: {row.partial_effect}"
    return "scaled"


def _router(row: Architecture, kind: RouterKind | OtherRouter) -> tuple[str, str]:
    """Whether the rule `gates` can be used, and `--gate-scale`."""
    if isinstance(kind, OtherRouter):
        return f"no: {kind.why}", "no"
    gates = "no: scaling has no effect" if row.no_effect else "yes"
    if kind.cap_key:
        return gates, f"only where {kind.cap_key} is not set"
    if kind.bias and not (kind.bias_optional or kind.bias_key):
        return gates, f"yes, with a warning: {BIAS_WARNING}"
    if kind.bias:
        return gates, "yes, with a warning where there is a bias"
    if row.groups and kind.group_best > 1:
        return gates, "yes, with a warning where there are groups of experts"
    return gates, "yes"
