"""Checks that no routed down-projection is missing: config, routers and tensors must agree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError
from moescale.families.architectures import Architecture
from moescale.families.moe_config import MoeConfig
from moescale.families.names import plain_name
from moescale.families.projections import (
    Layer,
    Projection,
    StackFilter,
    stack_of,
)
from moescale.families.router_shapes import RouterShapes

_INCOMPLETE = "The checkpoint is incomplete, or its config belongs to another one."


def check_complete(
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
    architecture: Architecture,
    config: MoeConfig,
    others: Iterable[Architecture] = (),
) -> dict[Layer, int]:
    """Refuse a checkpoint with missing or surplus routed down-projections.

    A pruned model may have a different number of experts in each layer, whatever its config says.
    The number of a layer's tensors is taken if the config or the layer's router confirms it.

    Args:
        projections: the projections that were found.
        tensors: all tensors of the checkpoint.
        architecture: the row that was used to find them.
        config: the config's description of this MoE.
        others: the other parts of the same model type.

    Returns:
        The number of routed experts of each layer.

    Raises:
        CheckpointError: the first layer or expert at fault is named.
    """
    tensors = list(tensors)
    by_layer: dict[Layer, list[Projection]] = defaultdict(list)
    for projection in projections:
        by_layer[projection.layer].append(projection)
    routers = RouterShapes(tensors, architecture, config)
    stated = {layer: config.experts_in(layer.number) for layer in by_layer}
    counts = {
        layer: _count(layer, members, stated[layer], routers, architecture.moes_per_layer)
        for layer, members in by_layer.items()
    }
    _check_same_model(counts, stated, architecture.moes_per_layer)
    _check_layers(set(by_layer), config)
    names = [plain_name(tensor.name) for tensor in tensors]
    _check_routers(projections, names, StackFilter(architecture, others))
    return counts


def _check_same_model(counts: Mapping[Layer, int], stated: Mapping[Layer, int], moes: int) -> None:
    """Refuse the config of another model: all layers agree, and all differ from the config.

    A pruned model has layers of different sizes, or the new number in its config.
    """
    found, configured = set(counts.values()), set(stated.values())
    if len(found) == len(configured) == 1 and found != configured:
        layer, number = next(iter(counts.items()))
        raise _wrong_count(layer, range(number * moes), stated[layer] * moes)


def _count(
    layer: Layer, members: Sequence[Projection], stated: int, routers: RouterShapes, moes: int
) -> int:
    """Routed experts of one layer."""
    stacked = [p for p in members if p.expert is None]
    if stacked and len(stacked) < len(members):
        one = next(p for p in members if p.expert is not None)
        raise CheckpointError(
            f"layer {layer}: has its experts twice, one by one and all in one tensor"
            f" ({one.module} and {stacked[0].module})"
        )
    if stacked:
        return _count_stacked(layer, stacked, stated, routers, moes)
    return _count_single(layer, members, stated, routers, moes)


def _count_single(
    layer: Layer, members: Sequence[Projection], stated: int, routers: RouterShapes, moes: int
) -> int:
    by_number = {p.expert: p for p in members}
    if len(by_number) < len(members):
        duplicate = next(p for p in members if by_number[p.expert] is not p)
        raise CheckpointError(
            f"layer {layer}: has expert {duplicate.expert} twice"
            f" ({duplicate.module} and {by_number[duplicate.expert].module})",
            hint="Remove the one that the model does not use; the checkpoint does not tell which.",
        )
    numbers = sorted(number for number in by_number if number is not None)
    found, odd = divmod(len(numbers), moes)
    numbered = numbers == list(range(len(numbers))) and not odd
    if not numbered or (found != stated and not routers.matches(members[0], found)):
        raise _wrong_count(layer, numbers, stated * moes)
    routers.check(members[0], found)
    return found


def _wrong_count(layer: Layer, numbers: Collection[int], stated: int) -> CheckpointError:
    known = set(numbers)
    if layer.stack and known == set(range(len(known))):
        return CheckpointError(
            f"layer {layer}: has {len(known)} routed experts, but the config says {stated}",
            hint="If this is a draft with its own number of experts, for which the config has no"
            " key, describe the main layers with --pattern and --experts-key.",
        )
    last = max(stated, max(known) + 1)
    missing = next((i for i in range(last) if i not in known), None)
    what = "it has more" if missing is None else f"expert {missing} is missing"
    return CheckpointError(
        f"layer {layer}: the config says {stated} routed experts, but {what}"
        f" ({len(numbers)} found)",
        hint=_INCOMPLETE,
    )


def _count_stacked(
    layer: Layer, stacked: Sequence[Projection], stated: int, routers: RouterShapes, moes: int
) -> int:
    if len(stacked) != moes:
        raise CheckpointError(
            f"layer {layer}: has {len(stacked)} tensors with all experts"
            f" ({stacked[0].module}, {stacked[-1].module})"
        )
    found = _stacked_experts(stacked[0])
    if found is None or (found != stated and not routers.matches(stacked[0], found)):
        found = stated
    for projection in stacked:
        for suffix, tensor in projection.by_suffix.items():
            if suffix in _PER_EXPERT or len(tensor.shape) > 2:
                _check_stacked(tensor, found)
    routers.check(stacked[0], found)
    return found


_PER_EXPERT = frozenset({"weight", "bias", "blocks", "weight_packed", "qweight"})
"""Suffixes of tensors with one entry per expert; scales may be shared by experts or flattened."""


def _stacked_experts(projection: Projection) -> int | None:
    """The number of experts in a tensor of all experts; None if they are flattened."""
    shapes = (
        projection.by_suffix[suffix].shape
        for suffix in projection.by_suffix
        if suffix in _PER_EXPERT
    )
    return next((shape[0] for shape in shapes if len(shape) > 2), None)


def _check_stacked(tensor: Tensor, total: int) -> None:
    experts = tensor.shape[0] if tensor.shape else 0
    per_expert = experts == total or (len(tensor.shape) == 2 and experts and experts % total == 0)
    if not per_expert and 0 not in tensor.shape:  # `shapes` has a better message if it is empty
        raise CheckpointError(
            f"{tensor.name}: its shape {list(tensor.shape)} does not hold {total} experts",
            hint="The config belongs to another checkpoint, or the tensor has another layout.",
        )


def _check_layers(found: set[Layer], config: MoeConfig) -> None:
    if (expected := config.moe_layers) is None:
        return
    main = {layer.number for layer in found if layer.stack == _main_stack(found)}
    missing = sorted(expected - main)
    surplus = sorted(layer for layer in main - expected if layer < config.layers)
    if missing:
        raise CheckpointError(
            f"layer {missing[0]}: the config makes it an MoE layer, but it has no routed"
            f" down-projections ({len(missing)} of {len(expected)} MoE layers are missing)",
            hint=_INCOMPLETE,
        )
    if surplus:
        raise CheckpointError(
            f"layer {surplus[0]}: has routed experts, but the config makes it a dense layer"
        )


def _main_stack(found: set[Layer]) -> str:
    """The stack with the most layers; all others are MTP blocks."""
    stacks = [layer.stack for layer in found]
    return max(sorted(set(stacks)), key=stacks.count)


def _check_routers(
    projections: Sequence[Projection], names: Iterable[str], stacks: StackFilter
) -> None:
    """Require down-projections in every layer with a router, whatever the config says."""
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for projection in projections:
        start, stop = projection.number_span
        if projection.module[:start].endswith("."):
            layers[projection.module[:start], projection.block].add(projection.module[start:stop])
    if not layers:
        return
    blocks = "|".join(re.escape(block) for block in {block for _, block in layers})
    containers = "|".join({re.escape(head.split(".")[-2]) for head, _ in layers})
    router = re.compile(
        rf"((?:.*\.)?(?:{containers})\.)([0-9]+)({blocks}){_ROUTER_NAME}", re.DOTALL
    )
    for name in names:
        match = router.match(name)
        if match is None or stack_of(match[1]) not in stacks:
            continue
        if match[2] not in layers.get((match[1], match[3]), ()):
            raise CheckpointError(
                f"{name}: is the router of layer {match[2]}, which has no routed down-projections",
                hint="The checkpoint is incomplete; fetch the missing shard again.",
            )


_ROUTER_NAME = r"(?:gate|router)(?:\.|_weight|_gate)"
"""The part of a router tensor's name after its MoE block."""
