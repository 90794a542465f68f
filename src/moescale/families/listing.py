"""Describes the known model types in words, for ``--list-types`` and docs/models.md."""

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
    """One model type, or one part of it, and the options that it supports.

    Attributes:
        model_type: as in ``config.json``; for GGUF files, ``general.architecture``.
        part: the name of the MoE if the model has several.
        effect: of scaling, in words.
        fold_config: whether ``--fold config`` works.
        gates: ``yes``, or why ``--rule gates`` does not work.
        gate_scale: ``yes``, the warning of ``--gate-scale``, or ``no``.
        format: of the checkpoint.
        fold_scale: whether ``--fold scale`` works.
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
    """All known model types, by name, then those of GGUF files."""
    rows = sorted(architectures.ROWS, key=lambda row: (row.model_type, row.part or ""))
    return (*_types(rows), *_llama_types())


def _llama_types() -> Iterator[ModelType]:
    for row in sorted(llama_cpp.ROWS, key=lambda row: row.name):
        formed = isinstance(row.router, RouterKind)
        gates = "yes" if isinstance(row.router, RouterKind) else f"no: {row.router.why}"
        moves = isinstance(row.router, RouterKind) and row.router.bias
        scale = "yes, with a warning if there is a bias" if moves else "yes" if formed else "no"
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
    condition = f" if it has {row.no_effect_if}" if row.no_effect_if else ""
    condition = f" if it has no {row.no_effect_unless}" if row.no_effect_unless else condition
    texts = (
        row.refused and f"refused: {row.refused}",
        row.no_effect and f"only --rule none{condition}: {row.no_effect}",
        row.fixed_if and f"the number of experts stays if it has {row.fixed_if}",
        row.partial_effect and f"with a warning: {row.partial_effect}",
    )
    found = [text for text in texts if text]
    if not row.refused and (condition or not row.no_effect):
        found.insert(0, "scaled")
    return "; ".join(found)


def _types(rows: list[Architecture]) -> Iterator[ModelType]:
    for row in rows:
        gates, scale = _router_options(row, row.router)
        yield ModelType(row.model_type, row.part, _effect(row), row.can_fold, gates, scale)


def _effect(row: Architecture) -> str:
    if row.fixed:
        return f"scaled, but the number of experts stays: {row.fixed}"
    if row.no_effect:
        return f"only --rule none: {row.no_effect}"
    if row.partial_effect:
        condition = f" if a layer has {row.partial_effect_if}" if row.partial_effect_if else ""
        return f"scaled, with a warning{condition}: {row.partial_effect}"
    return "scaled"


def _router_options(row: Architecture, kind: RouterKind | OtherRouter) -> tuple[str, str]:
    """Whether the rule `gates` and the option `--gate-scale` work."""
    if isinstance(kind, OtherRouter):
        return f"no: {kind.why}", "no"
    gates = "no: scaling has no effect" if row.no_effect else "yes"
    if kind.cap_key:
        return gates, f"only if {kind.cap_key} is not set"
    if kind.bias and not (kind.bias_optional or kind.bias_key):
        return gates, f"yes, with a warning: {BIAS_WARNING}"
    if kind.bias:
        return gates, "yes, with a warning if there is a bias"
    if row.groups and kind.group_best > 1:
        return gates, "yes, with a warning if there are groups of experts"
    return gates, "yes"
