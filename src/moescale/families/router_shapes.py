"""The routers of a checkpoint as witnesses of how many experts a layer has."""

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
"""What the matrix that makes the logits is called in its block, in one layout or another."""
CHOICE_BIASES: Final = (
    *("gate.e_score_correction_bias", "e_score_correction_bias", "gate.expert_bias"),
    "expert_bias",
)
"""What is called what is added to the scores for the choice alone."""
LOGIT_BIASES: Final = ("router.bias", "router.linear.bias", "gate.bias", "gate.linear.bias")
"""What is called what is added to the logits; `gate.bias` belongs to the scores in some types."""
_BIASES: Final = (*CHOICE_BIASES, *LOGIT_BIASES)
PACKED: Final = ("absmax", "quant_map", "qweight", "weight_packed", "W_q")


class RouterShapes:
    """The routers, by the names of their blocks; those that are quantised say nothing."""

    def __init__(
        self, tensors: Iterable[Tensor], architecture: Architecture, config: MoeConfig
    ) -> None:
        named = ((plain_name(t.name), t) for t in tensors if t.name.endswith(_ENDS))
        self._tensors = dict(named)
        self._moes = architecture.moes_per_layer
        shared = config.normalisation.shared if config.normalisation else 0
        self._more = config.experts_without_weights + shared  # the router has logits for them, too

    def weight(self, projection: Projection) -> Tensor | None:
        """The weight of the router of a projection's layer, where it is found and is plain."""
        at = plain_name(projection.prefix) + projection.block
        for name in WEIGHTS:
            tensor = self._tensors.get(at + name)
            if tensor is None or tensor.dtype not in SCALABLE:
                continue
            if not any(f"{at}{name}.{suffix}" in self._tensors for suffix in PACKED):
                return tensor
        return None

    def matches(self, projection: Projection, experts: int) -> bool:
        """Whether the router of the projection's layer chooses from so many experts."""
        router = self.weight(projection)
        return router is not None and self._fits(router, experts)

    def check(self, projection: Projection, experts: int) -> None:
        """Refuse a router of another number of experts, or a bias of another size.

        Raises:
            CheckpointError: it has.
        """
        router = self.weight(projection)
        if router is not None and not self._fits(router, experts):
            raise _wrong_shape(router, experts, projection)
        at = plain_name(projection.prefix) + projection.block
        for name in _BIASES:
            bias = self._tensors.get(at + name)
            if bias is not None and math.prod(bias.shape) not in self._sizes(experts):
                raise _wrong_shape(bias, experts, projection)

    def check_present(
        self, projections: Iterable[Projection], experts_by_layer: Mapping[Layer, int]
    ) -> None:
        """All layers of a stack have a router, alike where their experts are as many, or none has.

        Raises:
            CheckpointError: a layer lacks what others have.
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
                self._check_alike(p, other)

    def _has_router(self, projection: Projection) -> bool:
        at = plain_name(projection.prefix) + projection.block
        return any(f"{at}{name}" in self._tensors for name in _ENDS)

    def _check_alike(self, projection: Projection, other: Projection) -> None:
        mine, theirs = self.weight(projection), self.weight(other)
        if mine is not None and theirs is not None and mine.shape != theirs.shape:
            raise CheckpointError(
                f"{mine.name}: its shape {list(mine.shape)} is not that of {theirs.name}, which is"
                f" {list(theirs.shape)}",
                hint="One of them belongs to another checkpoint.",
            )

    def _sizes(self, experts: int) -> set[int]:
        return {experts + self._more, experts, experts * self._moes}

    def _fits(self, router: Tensor, experts: int) -> bool:
        """Paddle stores it transposed."""
        return len(router.shape) > 1 and not self._sizes(experts).isdisjoint(router.shape)


_ENDS: Final = (*WEIGHTS, *_BIASES, *PACKED)


def _wrong_shape(tensor: Tensor, experts: int, projection: Projection) -> CheckpointError:
    what = f"its shape {list(tensor.shape)} is not that of a router"
    return CheckpointError(
        f"{tensor.name}: {what} of {experts} experts, which layer {projection.layer} has",
        hint=ZERO3_HINT if 0 in tensor.shape else "One of them belongs to another checkpoint.",
    )


ZERO3_HINT: Final = (
    "It was saved by DeepSpeed ZeRO-3 without gathering; save it again with"
    " stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py."
)
"""Where a tensor is empty."""
