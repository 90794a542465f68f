"""The part of a model that a token uses: some routed experts, and everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.tensor import Tensor
from moescale.families.names import plain_name
from moescale.families.projections import Layer, Projection
from moescale.planning.experts import Experts


@dataclass(frozen=True, slots=True)
class Active:
    """The weights that a token uses, before and after, and all weights.

    Attributes:
        before: used with the source's number of experts per token.
        after: used with the output's number.
        total: all weights of the checkpoint.
        unit: ``parameters``; ``bytes`` for quantised weights, whose codes may have any width.
    """

    before: int
    after: int
    total: int
    unit: str

    @property
    def ratio(self) -> float:
        """Weights read per token, after over before: roughly the ratio of decoding times."""
        return self.after / self.before if self.before else 1.0

    def as_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return asdict(self)


def active(
    tensors: Sequence[Tensor],
    projections: Iterable[Projection],
    experts_by_layer: Mapping[Layer, int],
    experts: Experts,
) -> Active:
    """Count the weights that a token uses: routed experts in part, everything else in full.

    Args:
        tensors: all tensors of the checkpoint.
        projections: the routed down-projections.
        experts_by_layer: number of routed experts in each layer.
        experts: experts per token.
    """
    parents = {p.module.rpartition(".")[0]: (p.layer, p.expert is None) for p in projections}
    plain = all(tensor.dtype in SCALABLE for tensor in tensors)
    routed: dict[Layer, int] = defaultdict(int)
    total = 0
    for tensor in tensors:
        amount = math.prod(tensor.shape) if plain else tensor.nbytes
        total += amount
        if (layer := _layer_of(tensor, parents, experts_by_layer)) is not None:
            routed[layer] += amount
    rest = total - sum(routed.values())
    shares = [(size, experts.at(at), experts_by_layer[at]) for at, size in routed.items()]
    before = sum(size * of_layer.before / count for size, of_layer, count in shares)
    after = sum(size * of_layer.after / count for size, of_layer, count in shares)
    unit = "parameters" if plain else "bytes"
    return Active(round(rest + before), round(rest + after), total, unit)


def _layer_of(
    tensor: Tensor, parents: Mapping[str, tuple[Layer, bool]], experts_by_layer: Mapping[Layer, int]
) -> Layer | None:
    """The layer whose routed experts a tensor belongs to; None if it belongs to none."""
    at = plain_name(tensor.name)
    while at:
        at = at.rpartition(".")[0]
        if at in parents:
            layer, fused = parents[at]
            only_experts = not fused or "expert" in at
            stacked = len(tensor.shape) > 2 and tensor.shape[0] == experts_by_layer[layer]
            return layer if only_experts or stacked else None
    return None
