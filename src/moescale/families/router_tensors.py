"""Finds the routers' tensors for the rule ``gates``, and scales them for ``--gate-scale``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.architectures import Architecture
from moescale.families.moe_config import MoeConfig
from moescale.families.names import plain_name
from moescale.families.projections import Layer, Projection
from moescale.families.router_shapes import CHOICE_BIASES, LOGIT_BIASES, PACKED, WEIGHTS
from moescale.routers.kinds import LLAMA_NORM, OtherRouter, RouterKind

RULE: Final = "--rule gates"
SCALE: Final = "--gate-scale"
_INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {RULE: "--rule preserve needs the config alone.", SCALE: f"Leave {SCALE} out."}
)
"""What to do instead, by the option that needs the router."""


def router_kind_of(
    architecture: Architecture, tensors: Sequence[Tensor], option: str
) -> RouterKind:
    """The kind of router of a model type.

    Args:
        architecture: the row of the model type.
        tensors: all tensors of the checkpoint.
        option: `RULE` or `SCALE`, for errors.

    Raises:
        UnsupportedError: the router has no `RouterKind`.
    """
    row = architecture.router
    if (
        isinstance(row, RouterKind)
        and row.not_if
        and any(t.name.endswith(row.not_if[0]) for t in tensors)
    ):
        row = OtherRouter(row.not_if[1])
    if isinstance(row, OtherRouter):
        raise UnsupportedError(
            f"{option} cannot be used with the router of"
            f" {architecture.model_type or 'an unknown type'!r}: {row.why}",
            hint=_INSTEAD[option],
        )
    return row


class RouterTensors(NamedTuple):
    """The tensors of one layer's router; see `RouterKind`.

    Attributes:
        layer: its layer.
        weight: makes the logits.
        norm: weight of the norm before the router.
        bias: added to the scores for the choice only.
        logit_bias: added to the logits.
    """

    layer: Layer
    weight: Tensor
    norm: Tensor | None
    bias: Tensor | None
    logit_bias: Tensor | None

    @property
    def present(self) -> list[Tensor]:
        """All tensors that exist."""
        return [t for t in (self.weight, self.norm, self.bias, self.logit_bias) if t is not None]


def find_routers(
    kind: RouterKind,
    config: MoeConfig,
    projections: Sequence[Projection],
    tensors: Sequence[Tensor],
    option: str,
) -> list[RouterTensors]:
    """The routers of all layers with routed experts, one per layer.

    Args:
        kind: the kind of router.
        config: the config's description of this MoE.
        projections: the routed down-projections.
        tensors: all tensors of the checkpoint.
        option: `RULE` or `SCALE`, for errors.

    Raises:
        CheckpointError: a layer lacks one of the tensors.
        UnsupportedError: a tensor is quantised.
    """
    ends = (*kind.weight, *kind.norm, *kind.bias, *kind.logit_bias)
    ends = (*ends, *WEIGHTS, *CHOICE_BIASES, *LOGIT_BIASES, *PACKED, LLAMA_NORM)
    by_name = {plain_name(t.name): t for t in tensors if t.name.endswith(ends)}
    by_layer = {p.layer: p for p in projections}
    biased = config.choice_bias
    if kind.bias_optional:
        biased = any(name.endswith((*kind.bias, *CHOICE_BIASES)) for name in by_name)
    normed = kind.norm and option == RULE

    def one(beside: Projection, names: Sequence[str], known: Sequence[str]) -> Tensor:
        """Find a tensor by the kind's names, or by those of another layout in the MoE block."""
        prefix = plain_name(beside.prefix)
        looked_for = (*(f".{name}" for name in names), *(beside.block + name for name in known))
        at = next((prefix + name for name in looked_for if prefix + name in by_name), None)
        if at is None:
            raise CheckpointError(
                f"{prefix}: has routed experts, but no {' or '.join(names)}",
                hint="The checkpoint is incomplete or quantised, or has another layout."
                f" {_INSTEAD[option]}",
            )
        found = by_name[at]
        if found.dtype not in SCALABLE or any(f"{at}.{suffix}" in by_name for suffix in PACKED):
            raise UnsupportedError(
                f"{found.name}: is {found.dtype}; {option} needs an unquantised router",
                hint=_INSTEAD[option],
            )
        return found

    return [
        RouterTensors(
            layer,
            one(beside, kind.weight, WEIGHTS),
            one(beside, (*kind.norm, LLAMA_NORM), ()) if normed else None,
            one(beside, kind.bias, CHOICE_BIASES) if kind.bias and biased else None,
            one(beside, kind.logit_bias, LOGIT_BIASES) if kind.logit_bias else None,
        )
        for layer, beside in sorted(by_layer.items())
    ]


class ScaledRouters(NamedTuple):
    """The edits that multiply the logits of all routers.

    Attributes:
        edits: of the tensors that make the logits, without a factor yet.
        biases: names of the logits' biases in their modules.
        choice_warning: why the choice of experts may change; None if it cannot.
    """

    edits: Sequence[TensorEdit]
    biases: frozenset[str]
    choice_warning: str | None


BIAS_WARNING: Final = "a bias that was fitted to the present scores takes part in the choice"


def scaled_routers(
    architecture: Architecture,
    config: MoeConfig,
    projections: Sequence[Projection],
    tensors: Sequence[Tensor],
) -> ScaledRouters:
    """The edits that multiply the logits of all routers by one number.

    Args:
        architecture: the row of the model type.
        config: the config's description of this MoE.
        projections: the routed down-projections.
        tensors: all tensors of the checkpoint.

    Raises:
        UnsupportedError: the router has no `RouterKind`, or its logits are bounded.
        CheckpointError: a router is missing.
    """
    kind = router_kind_of(architecture, tensors, SCALE)
    found = find_routers(kind, config, projections, tensors, SCALE)
    if config.logit_cap:
        raise UnsupportedError(
            f"{SCALE} cannot be used with the router of {architecture.model_type!r}: a tanh bounds"
            " its logits",
            hint=_INSTEAD[SCALE],
        )
    grouped = config.groups is not None
    choice_warning = None
    if any(router.bias for router in found):
        choice_warning = BIAS_WARNING
    elif grouped and kind.group_best > 1:
        choice_warning = "sums of scores choose groups of experts, and their order may change"
    edits = [
        TensorEdit(tensor, role="router", layer=router.layer)
        for router in found
        for tensor in (router.weight, router.logit_bias)
        if tensor is not None
    ]
    biases = {r.logit_bias.name.rpartition(".")[2] for r in found if r.logit_bias is not None}
    return ScaledRouters(edits, frozenset(biases), choice_warning)
