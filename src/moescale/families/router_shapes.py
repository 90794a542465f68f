"""The shapes of a checkpoint's routers: they show how many experts each layer has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError
from moescale.families.architectures import Architecture
from moescale.families.moe_config import MoeConfig
from moescale.families.names import plain_name
from moescale.families.projections import Layer, Projection

WEIGHTS: Final = (
    *("gate.weight", "router.weight", "router.layer.weight", "router.linear.weight"),
    *("gate.linear.weight", "router.gate.weight", "router.proj.weight", "gate_weight"),
    *("router.classifier.weight", "gate.wg.weight"),
)
"""Names, within the MoE block, of the matrix that makes the logits, in all layouts."""
CHOICE_BIASES: Final = (
    *("gate.e_score_correction_bias", "e_score_correction_bias", "gate.expert_bias"),
    "expert_bias",
)
"""Names of the bias that is added to the scores for the choice only."""
LOGIT_BIASES: Final = ("router.bias", "router.linear.bias", "gate.bias", "gate.linear.bias")
"""Names of the bias on the logits; in some types `gate.bias` belongs to the scores."""
_BIASES: Final = (*CHOICE_BIASES, *LOGIT_BIASES)
PACKED: Final = ("absmax", "quant_map", "qweight", "weight_packed", "W_q")
"""Suffixes that only quantised routers have."""


class RouterShapes:
    """The routers' tensors by name; the shapes of quantised ones are not checked."""

    def __init__(
        self, tensors: Iterable[Tensor], architecture: Architecture, config: MoeConfig
    ) -> None:
        """Find the tensors of all routers.

        Args:
            tensors: all tensors of the checkpoint.
            architecture: the row of the model type.
            config: the config's description of the MoE.
        """
        named = ((plain_name(t.name), t) for t in tensors if t.name.endswith(_ALL_NAMES))
        self._tensors = dict(named)
        self._moes = architecture.moes_per_layer
        shared = config.normalisation.shared if config.normalisation else 0
        self._extra = config.experts_without_weights + shared  # these have logits, too

    def weight(self, projection: Projection) -> Tensor | None:
        """The router weight of a projection's layer; None if it is missing or quantised."""
        at = plain_name(projection.prefix) + projection.block
        for name in WEIGHTS:
            tensor = self._tensors.get(at + name)
            if tensor is None or tensor.dtype not in SCALABLE:
                continue
            if not any(f"{at}{name}.{suffix}" in self._tensors for suffix in PACKED):
                return tensor
        return None

    def matches(self, projection: Projection, experts: int) -> bool:
        """Whether the router of the projection's layer chooses from this many experts."""
        router = self.weight(projection)
        return router is not None and self._has_size(router, experts)

    def check(self, projection: Projection, experts: int) -> None:
        """Refuse a router whose weight or bias is for another number of experts.

        Raises:
            CheckpointError: a shape does not fit.
        """
        router = self.weight(projection)
        if router is not None and not self._has_size(router, experts):
            raise _wrong_shape(router, experts, projection)
        at = plain_name(projection.prefix) + projection.block
        for name in _BIASES:
            bias = self._tensors.get(at + name)
            if bias is not None and math.prod(bias.shape) not in self._allowed_sizes(experts):
                raise _wrong_shape(bias, experts, projection)

    def check_present(
        self, projections: Iterable[Projection], experts_by_layer: Mapping[Layer, int]
    ) -> None:
        """Require a router in all layers of a stack or in none.

        Routers of layers with the same number of experts must have the same shape.

        Raises:
            CheckpointError: a router is missing or its shape differs.
        """
        first: dict[tuple[str, str], Projection] = {}
        one_each = {(p.layer, p.block): p for p in projections}.values()
        for p in one_each:
            if self._has_router(p):
                first.setdefault((p.layer.stack, p.block), p)
        for p in one_each:
            other = first.get((p.layer.stack, p.block))
            if other is not None and not self._has_router(p):
                raise CheckpointError(
                    f"{p.prefix}: has routed experts, but no router, unlike {other.prefix}",
                    hint="The checkpoint is incomplete; fetch the missing shard again.",
                )
            if other is not None and experts_by_layer[p.layer] == experts_by_layer[other.layer]:
                self._check_same_shape(p, other)

    def _has_router(self, projection: Projection) -> bool:
        at = plain_name(projection.prefix) + projection.block
        return any(f"{at}{name}" in self._tensors for name in _ALL_NAMES)

    def _check_same_shape(self, projection: Projection, other: Projection) -> None:
        mine, theirs = self.weight(projection), self.weight(other)
        if mine is not None and theirs is not None and mine.shape != theirs.shape:
            raise CheckpointError(
                f"{mine.name}: its shape is {list(mine.shape)}, but that of {theirs.name} is"
                f" {list(theirs.shape)}",
                hint="One of them belongs to another checkpoint.",
            )

    def _allowed_sizes(self, experts: int) -> set[int]:
        return {experts + self._extra, experts, experts * self._moes}

    def _has_size(self, router: Tensor, experts: int) -> bool:
        """Whether either dimension fits: Paddle stores the weight transposed."""
        return len(router.shape) > 1 and not self._allowed_sizes(experts).isdisjoint(router.shape)


_ALL_NAMES: Final = (*WEIGHTS, *_BIASES, *PACKED)


def _wrong_shape(tensor: Tensor, experts: int, projection: Projection) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name}: its shape {list(tensor.shape)} does not fit the {experts} experts of layer"
        f" {projection.layer}",
        hint=ZERO3_HINT if 0 in tensor.shape else "One of them belongs to another checkpoint.",
    )


ZERO3_HINT: Final = (
    "It was saved by DeepSpeed ZeRO-3 without gathering; save it again with"
    " stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py."
)
"""The hint for an empty tensor."""
