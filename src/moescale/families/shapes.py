"""A checkpoint checked against itself: the shapes of its experts, of their scales and biases."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError
from moescale.families.formats import ShapeInfo, shape_info
from moescale.families.moe_config import MoeConfig
from moescale.families.names import plain_name
from moescale.families.projections import Layer, Projection
from moescale.families.router_shapes import ZERO3_HINT, RouterShapes

_SIBLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "down_projs": ("gate_projs", "up_projs", "gate_up_projs"),
    "w2": ("w1", "w3", "v1", "w13"),
    "fc2": ("fc1",),
    "proj": ("fc",),
    "wo": ("wi", "wi_0", "wi_1"),
    "output_linear": ("input_linear",),
    "linear_1": ("linear", "linear_v"),
}
"""What the matrices before a down-projection are called beside it."""
_MATRICES: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(("gate_up_proj", "gate_up_projs", "w13", "input_linear", "fc"), (2,)),
    "fc1": (1, 2),  # Aria's is gate and up, Nemotron's is up alone
}
"""How many matrices are joined in one tensor, where it is not one."""
_DAMAGED: Final = "The tensor is damaged, or belongs to another checkpoint."

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Leaf, dtype and shape of each tensor of a projection."""


def check_shapes(
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
    config: MoeConfig,
    experts_by_layer: Mapping[Layer, int],
    routers: RouterShapes,
) -> None:
    """Refuse experts that cannot be those of one model.

    Where the config does not say a size, the tensors are judged against each other alone; where
    a format does not tell a size by its shapes, against those of their kind.

    Raises:
        CheckpointError: with the tensor, the shape it has and the one that it should have.
    """
    by_moe: dict[tuple[Layer, str, int], list[Projection]] = defaultdict(list)
    for projection in projections:
        _check_one(projection)
        layer, which = (
            projection.layer,
            (projection.expert or 0) // experts_by_layer[projection.layer],
        )
        by_moe[layer, projection.block, which].append(projection)
    for members in by_moe.values():
        _check_alike(members)
    before = _Before(projections, tensors)
    before.check_present(projections)
    routers.check_present(projections, experts_by_layer)
    for members in by_moe.values():
        paired = [before.check(projection) for projection in members]
        _check_width(members[0], config, all(paired), routers)
    _check_biases(projections, before)


# One projection -----------------------------------------------------------------------------------


def _signature(projection: Projection) -> Signature:
    return tuple((suffix, t.dtype, t.shape) for suffix, t in projection.by_suffix.items())


@lru_cache(maxsize=1024)  # the projections of a checkpoint are of very few kinds
def _shape_info(signature: Signature) -> ShapeInfo:
    return shape_info(
        {suffix: Tensor(suffix, dtype, shape, 0, 0) for suffix, dtype, shape in signature}
    )


def _check_one(projection: Projection) -> None:
    found = _shape_info(_signature(projection))
    _refuse_empty(projection.by_suffix, found)
    if found.mismatch is not None:
        tensor = projection.by_suffix[found.mismatch]
        codes = projection.by_suffix[found.codes]
        raise CheckpointError(
            f"{tensor.name}: its shape {list(tensor.shape)} does not fit {codes.name},"
            f" which is {list(codes.shape)}",
            hint=_DAMAGED,
        )


def _refuse_empty(by_suffix: Mapping[str, Tensor], found: ShapeInfo) -> None:
    if found.empty is not None:
        tensor = by_suffix[found.empty]
        raise CheckpointError(
            f"{tensor.name}: is empty, its shape is {list(tensor.shape)}", hint=ZERO3_HINT
        )


def empty_weights(tensors: Iterable[Tensor]) -> Iterator[str]:
    """What the user should know of empty tensors that are none of the experts'."""
    found = [t.name for t in tensors if t.shape == (0,) and t.name.endswith(".weight")]
    if found:
        yield f"{found[0]} is empty, its shape is [0] ({len(found)} such). {ZERO3_HINT}"


# The experts of a layer ---------------------------------------------------------------------------


def _check_alike(members: Sequence[Projection]) -> None:
    """All that can be measured have one size, and all that are stored alike the same shapes."""
    signatures = [_signature(projection) for projection in members]
    if len(set(signatures)) == 1:
        return
    found = [_shape_info(signature) for signature in signatures]
    kinds: dict[Any, list[int]] = defaultdict(list)
    for i, one in enumerate(found):
        if one.weight_shape is not None:
            kinds["size"].append(i)
        kinds[tuple((suffix, dtype) for suffix, dtype, _ in one.comparable)].append(i)
    for kind, places in kinds.items():
        what = [found[i].weight_shape if kind == "size" else found[i].comparable for i in places]
        usual = Counter(what).most_common(1)[0][0]
        odd = next((i for i, one in zip(places, what, strict=True) if one != usual), None)
        if odd is not None:
            raise _unlike(members[odd], signatures[places[what.index(usual)]])


def _unlike(projection: Projection, wanted: Signature) -> CheckpointError:
    """Name the first tensor whose shape is not that of its siblings."""
    shapes = {suffix: shape for suffix, _, shape in wanted}
    suffix, found = next(
        ((n, t) for n, t in projection.by_suffix.items() if shapes.get(n, t.shape) != t.shape),
        next(iter(projection.by_suffix.items())),
    )
    others = list(shapes.get(suffix, next(iter(shapes.values()))))
    return CheckpointError(
        f"{found.name}: its shape is {list(found.shape)}, that of the other experts of layer"
        f" {projection.layer} is {others}",
        hint=_DAMAGED,
    )


# What stands before a down-projection -------------------------------------------------------------


class _Before:
    """The gate- and up-projections of a checkpoint, by the names of the down-projections."""

    def __init__(self, projections: Sequence[Projection], tensors: Iterable[Tensor]) -> None:
        """`projections` are those that the others are looked for."""
        words = {_parts(projection.module)[1] for projection in projections}
        siblings = {sibling for word in words for sibling in _SIBLINGS.get(word, ())}
        self._by_name = {
            name: tensor
            for tensor in tensors
            for name in (plain_name(tensor.name),)
            if siblings and any(sibling in name for sibling in siblings)
        }

    def check_present(self, projections: Iterable[Projection]) -> None:
        """All experts of a layer that stand one by one have the same matrices before theirs.

        Raises:
            CheckpointError: one lacks a matrix that others have.
        """
        modules = {name.rpartition(".")[0] for name in self._by_name}
        first: dict[tuple[Layer, str, str], Projection] = {}
        for p in projections:
            head, word, tail = _parts(p.module)
            for sibling in _SIBLINGS.get(word, ()) if p.expert is not None else ():
                if head + sibling + tail in modules:
                    first.setdefault((p.layer, p.block, sibling), p)
        for p in projections if first else ():
            head, word, tail = _parts(p.module)
            for sibling in _SIBLINGS.get(word, ()) if p.expert is not None else ():
                other = first.get((p.layer, p.block, sibling))
                if other is not None and head + sibling + tail not in modules:
                    raise CheckpointError(
                        f"{head}{sibling}{tail}: is missing, although {other.module} has its own",
                        hint="The checkpoint is incomplete; fetch the missing shard again.",
                    )

    def of(self, projection: Projection) -> dict[str, dict[str, Tensor]]:
        """The tensors of each that is there, by its module."""
        head, word, tail = _parts(projection.module)
        found: dict[str, dict[str, Tensor]] = {}
        for sibling in _SIBLINGS.get(word, ()):
            module = head + sibling + tail
            for suffix, tensor in projection.by_suffix.items():
                rest = plain_name(tensor.name)[len(projection.module) :]
                if (other := self._by_name.get(module + rest)) is not None:
                    found.setdefault(module, {})[suffix] = other
        return found

    def biased(self, projection: Projection) -> str | None:
        """The name of a bias before the projection."""
        head, word, tail = _parts(projection.module)
        for sibling in _SIBLINGS.get(word, ()):
            for end in (".bias", "_bias"):
                if (name := head + sibling + tail + end) in self._by_name:
                    return name
        return None

    def check(self, projection: Projection) -> bool:
        """Whether any is there and is the transpose of the projection.

        Raises:
            CheckpointError: one is another.
        """
        own = _shape_info(_signature(projection))
        paired = False
        for module, by_suffix in self.of(projection).items():
            other = _shape_info(
                tuple((suffix, t.dtype, t.shape) for suffix, t in by_suffix.items())
            )
            _refuse_empty(by_suffix, other)
            if own.weight_shape is None or other.weight_shape is None:
                continue
            joined = _MATRICES.get(_parts(module)[1], (1,))
            if not _is_transpose(
                own.weight_shape, other.weight_shape, joined, projection.expert is None
            ):
                raise _not_transposed(projection, own, by_suffix, other)
            paired = True
        return paired


def _parts(module: str) -> tuple[str, str, str]:
    """The module around its last word that is no number: ``down_projs`` of ``down_projs.3``."""
    head, _, word = module.rpartition(".")
    if not word.isdecimal():
        return head + ".", word, ""
    head, _, named = head.rpartition(".")
    return head + ".", named, "." + word


def _is_transpose(
    down: tuple[int, ...], up: tuple[int, ...], joined: tuple[int, ...], stacked: bool
) -> bool:
    """``[..., hidden, inner]`` beside ``[..., inner, hidden]``, whose `inner` may count twice.

    Of stacked experts both may be stored the other way round, and they may lie flat (DBRX).
    The up-projection may be that of more experts, where some have no weights (LongCat).
    """
    if stacked and len(down) == len(up) == 2:
        return down == up
    if len(down) != len(up) or len(down) < 2 or down[:-2] > up[:-2]:
        return False
    (x, y), shape = up[-2:], down[-2:]
    return any(shape in ((y, x / many), (y / many, x)) for many in joined)


def _not_transposed(
    projection: Projection, own: ShapeInfo, by_suffix: Mapping[str, Tensor], other: ShapeInfo
) -> CheckpointError:
    tensor = projection.by_suffix[own.codes]
    beside = by_suffix[other.codes]
    return CheckpointError(
        f"{tensor.name}: its shape {list(tensor.shape)} is not the transpose of {beside.name},"
        f" which is {list(beside.shape)}",
        hint=_DAMAGED,
    )


# Hidden size and biases ---------------------------------------------------------------------------


def _check_width(
    projection: Projection, config: MoeConfig, paired: bool, routers: RouterShapes
) -> None:
    """Experts write hidden states, or those of a narrower stream that the config may name."""
    size = _shape_info(_signature(projection)).weight_shape
    hidden = config.hidden_size
    if size is None or hidden is None:
        return
    widths = {hidden, *config.narrow_sizes}
    one = projection.expert is not None
    if paired and one and _is_turned(size, widths, routers.weight(projection), hidden):
        raise _wrong_width(projection, hidden)
    either = paired or not one
    if len(size) > 1 and not widths.isdisjoint(size[-2:] if either else size[-2:-1]):
        if not either:
            _check_inner(projection, size, config.intermediate_size)
        return
    router = routers.weight(projection)
    if paired and router is not None and hidden in router.shape:
        return  # the model has this size, so its experts are narrower by a key of another name
    raise _wrong_width(projection, hidden)


def _is_turned(
    size: tuple[int, ...], widths: Collection[int], router: Tensor | None, hidden: int
) -> bool:
    """Whether an expert that stands alone lies transposed, though the router does not (Paddle)."""
    turned = len(size) > 1 and size[-1] == hidden and size[-2] not in widths
    return turned and (router is None or router.shape[-1] == hidden)


def _wrong_width(projection: Projection, hidden: int) -> CheckpointError:
    tensor = projection.by_suffix[_shape_info(_signature(projection)).codes]
    return CheckpointError(
        f"{tensor.name}: its shape is {list(tensor.shape)}, but the config says that hidden states"
        f" have {hidden} numbers",
        hint="The config belongs to another checkpoint, or the tensor is damaged or transposed.",
    )


def _check_inner(projection: Projection, size: tuple[int, ...], stated: int | None) -> None:
    """Where no gate and up are beside, only the config can tell a part of an expert."""
    if stated is not None and stated not in size:
        tensor = projection.by_suffix[_shape_info(_signature(projection)).codes]
        raise CheckpointError(
            f"{tensor.name}: its shape is {list(tensor.shape)}, but the config says that an expert"
            f" is {stated} wide (moe_intermediate_size)",
            hint="The config belongs to another checkpoint, or the tensor is a part of one.",
        )


def _check_biases(projections: Sequence[Projection], before: _Before) -> None:
    """All that are stored alike have a bias, or none; none where gate and up have theirs."""
    with_bias: dict[Any, Projection] = {}
    without: dict[Any, Projection] = {}
    for p in projections:
        by_suffix = frozenset(
            (suffix, t.dtype) for suffix, t in p.by_suffix.items() if suffix != "bias"
        )
        (with_bias if "bias" in p.by_suffix else without).setdefault((p.layer.stack, by_suffix), p)
    for kind, lacking in without.items():
        biased = with_bias.get(kind)
        beside = biased.by_suffix["bias"].name if biased else before.biased(lacking)
        if beside is not None:
            raise CheckpointError(
                f"{lacking.module}: has no bias, unlike {beside}",
                hint="The checkpoint is incomplete; fetch the missing shard again.",
            )
