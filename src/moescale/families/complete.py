"""Complete: every routed down-projection is there, as config, routers and tensors agree."""

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
    """Refuse a checkpoint in which any routed down-projection is missing or surplus.

    A pruned model may have another number of experts in each layer, whatever its config says.
    A layer has the number that its tensors hold, where the config or its router has it too.

    Args:
        projections: what was found.
        tensors: all tensors of the checkpoint.
        architecture: the row that they were found with.
        config: what the config says of this MoE.
        others: the other parts of the same model type.

    Returns:
        The routed experts of each layer.

    Raises:
        CheckpointError: with the first layer or expert that is not as it should be.
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
    _check_not_of_another(counts, stated, architecture.moes_per_layer)
    _check_layers(set(by_layer), config)
    names = [plain_name(tensor.name) for tensor in tensors]
    _check_routers(projections, names, StackFilter(architecture, others))
    return counts


def _check_not_of_another(
    counts: Mapping[Layer, int], stated: Mapping[Layer, int], moes: int
) -> None:
    """Pruning leaves some layer as it was, or the config with the new number."""
    found, said = set(counts.values()), set(stated.values())
    if len(found) == len(said) == 1 and found != said:
        layer, number = next(iter(counts.items()))
        raise _not_as_stated(layer, range(number * moes), stated[layer] * moes)


def _count(
    layer: Layer, members: Sequence[Projection], stated: int, routers: RouterShapes, moes: int
) -> int:
    """Routed experts of one layer."""
    stacked = [p for p in members if p.expert is None]
    if stacked and len(stacked) < len(members):
        one = next(p for p in members if p.expert is not None)
        raise CheckpointError(
            f"layer {layer}: its experts are there twice, one by one and all in one tensor"
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
        twin = next(p for p in members if by_number[p.expert] is not p)
        raise CheckpointError(
            f"layer {layer}: expert {twin.expert} is there twice"
            f" ({twin.module} and {by_number[twin.expert].module})",
            hint="Which of them the model uses cannot be seen; remove the other.",
        )
    numbers = sorted(number for number in by_number if number is not None)
    found, odd = divmod(len(numbers), moes)
    whole_ = numbers == list(range(len(numbers))) and not odd
    if not whole_ or (found != stated and not routers.matches(members[0], found)):
        raise _not_as_stated(layer, numbers, stated * moes)
    routers.check(members[0], found)
    return found


def _not_as_stated(layer: Layer, numbers: Collection[int], stated: int) -> CheckpointError:
    known = set(numbers)
    if layer.stack and known == set(range(len(known))):
        return CheckpointError(
            f"layer {layer}: has {len(known)} routed experts, where the config says {stated}",
            hint="If this is a draft with experts of its own: no key of the config tells how many;"
            " describe the main layers with --pattern and --experts-key.",
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
    found = _held(stacked[0])
    if found is None or (found != stated and not routers.matches(stacked[0], found)):
        found = stated
    for projection in stacked:
        for suffix, tensor in projection.by_suffix.items():
            if suffix in _ONE_EACH or len(tensor.shape) > 2:
                _check_stacked(tensor, found)
    routers.check(stacked[0], found)
    return found


_ONE_EACH = frozenset({"weight", "bias", "blocks", "weight_packed", "qweight"})
"""Leaves with something of every expert; scales may be numbers for all of them or lie flat."""


def _held(projection: Projection) -> int | None:
    """The experts in a tensor with all of them; None where they lie flat."""
    shapes = (
        projection.by_suffix[suffix].shape for suffix in projection.by_suffix if suffix in _ONE_EACH
    )
    return next((shape[0] for shape in shapes if len(shape) > 2), None)


def _check_stacked(tensor: Tensor, total: int) -> None:
    experts = tensor.shape[0] if tensor.shape else 0
    one_each = experts == total or (len(tensor.shape) == 2 and experts and experts % total == 0)
    if not one_each and 0 not in tensor.shape:  # an empty one is named for what it is
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
            f"layer {missing[0]}: the config makes it a MoE layer, but it has no routed"
            f" down-projections ({len(missing)} of {len(expected)} MoE layers are missing)",
            hint=_INCOMPLETE,
        )
    if surplus:
        raise CheckpointError(
            f"layer {surplus[0]}: has routed experts, but the config makes it a dense layer"
        )


def _main_stack(found: set[Layer]) -> str:
    """The stack with the most layers; beside it there are only MTP blocks."""
    stacks = [layer.stack for layer in found]
    return max(sorted(set(stacks)), key=stacks.count)


def _check_routers(
    projections: Sequence[Projection], names: Iterable[str], stacks: StackFilter
) -> None:
    """Every layer that has a router needs down-projections, whatever the config says."""
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for projection in projections:
        start, stop = projection.number_span
        if projection.module[:start].endswith("."):
            layers[projection.module[:start], projection.block].add(projection.module[start:stop])
    if not layers:
        return
    blocks = "|".join(re.escape(block) for block in {block for _, block in layers})
    containers = "|".join({re.escape(head.split(".")[-2]) for head, _ in layers})
    router = re.compile(rf"((?:.*\.)?(?:{containers})\.)([0-9]+)({blocks}){_ROUTER}", re.DOTALL)
    for name in names:
        match = router.match(name)
        if match is None or stack_of(match[1]) not in stacks:
            continue
        if match[2] not in layers.get((match[1], match[3]), ()):
            raise CheckpointError(
                f"{name}: is the router of layer {match[2]}, which has no routed down-projections",
                hint="The checkpoint is incomplete; fetch the missing shard again.",
            )


_ROUTER = r"(?:gate|router)(?:\.|_weight|_gate)"
"""What follows the name of a MoE block in the names of its router."""
