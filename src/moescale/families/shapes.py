"""Checks that the shapes of experts, scales and biases fit one another and the config."""

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

_GATE_UP_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "down_projs": ("gate_projs", "up_projs", "gate_up_projs"),
    "w2": ("w1", "w3", "v1", "w13"),
    "fc2": ("fc1",),
    "proj": ("fc",),
    "wo": ("wi", "wi_0", "wi_1"),
    "output_linear": ("input_linear",),
    "linear_1": ("linear", "linear_v"),
}
"""Names of the gate- and up-projections, by the name of the down-projection."""
_MATRIX_COUNTS: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(("gate_up_proj", "gate_up_projs", "w13", "input_linear", "fc"), (2,)),
    "fc1": (1, 2),  # Aria's is gate and up, Nemotron's is up alone
}
"""Number of matrices in one tensor, if not 1."""
_DAMAGED: Final = "The tensor is damaged, or belongs to another checkpoint."

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Suffix, dtype and shape of each tensor of a projection."""


def check_shapes(
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
    config: MoeConfig,
    experts_by_layer: Mapping[Layer, int],
    routers: RouterShapes,
) -> None:
    """Refuse experts that cannot belong to one model.

    Without a size in the config, tensors are compared only with each other. Those of a format whose
    shapes do not tell the size are compared only with tensors of the same kind.

    Raises:
        CheckpointError: the tensor, its shape and the expected shape are named.
    """
    by_moe: dict[tuple[Layer, str, int], list[Projection]] = defaultdict(list)
    for projection in projections:
        _check_one(projection)
        layer = projection.layer
        which = (projection.expert or 0) // experts_by_layer[layer]
        by_moe[layer, projection.block, which].append(projection)
    for members in by_moe.values():
        _check_same_shapes(members)
    gate_up = _GateUp(projections, tensors)
    gate_up.check_present(projections)
    routers.check_present(projections, experts_by_layer)
    for members in by_moe.values():
        paired = [gate_up.check(projection) for projection in members]
        _check_width(members[0], config, all(paired), routers)
    _check_biases(projections, gate_up)


# One projection -----------------------------------------------------------------------------------


def _signature(projection: Projection) -> Signature:
    return tuple((suffix, t.dtype, t.shape) for suffix, t in projection.by_suffix.items())


@lru_cache(maxsize=1024)  # a checkpoint has very few kinds of projections
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
            f"{tensor.name}: is empty; its shape is {list(tensor.shape)}", hint=ZERO3_HINT
        )


def empty_weights(tensors: Iterable[Tensor]) -> Iterator[str]:
    """A warning if weights outside the experts are empty."""
    found = [t.name for t in tensors if t.shape == (0,) and t.name.endswith(".weight")]
    if found:
        yield f"{found[0]} is empty; its shape is [0] ({len(found)} in all). {ZERO3_HINT}"


# The experts of a layer ---------------------------------------------------------------------------


def _check_same_shapes(members: Sequence[Projection]) -> None:
    """Require one size of all experts, and equal shapes of experts in the same format."""
    signatures = [_signature(projection) for projection in members]
    if len(set(signatures)) == 1:
        return
    found = [_shape_info(signature) for signature in signatures]
    kinds: dict[Any, list[int]] = defaultdict(list)
    for i, one in enumerate(found):
        if one.weight_shape is not None:
            kinds["size"].append(i)
        kinds[tuple((suffix, dtype) for suffix, dtype, _ in one.comparable)].append(i)
    for kind, indices in kinds.items():
        what = [found[i].weight_shape if kind == "size" else found[i].comparable for i in indices]
        usual = Counter(what).most_common(1)[0][0]
        odd = next((i for i, one in zip(indices, what, strict=True) if one != usual), None)
        if odd is not None:
            raise _odd_shape(members[odd], signatures[indices[what.index(usual)]])


def _odd_shape(projection: Projection, wanted: Signature) -> CheckpointError:
    """Name the first tensor whose shape differs from the other experts'."""
    shapes = {suffix: shape for suffix, _, shape in wanted}
    suffix, found = next(
        ((n, t) for n, t in projection.by_suffix.items() if shapes.get(n, t.shape) != t.shape),
        next(iter(projection.by_suffix.items())),
    )
    others = list(shapes.get(suffix, next(iter(shapes.values()))))
    return CheckpointError(
        f"{found.name}: its shape is {list(found.shape)}, but that of the other experts of layer"
        f" {projection.layer} is {others}",
        hint=_DAMAGED,
    )


# Gate- and up-projections -------------------------------------------------------------------------


class _GateUp:
    """The gate- and up-projections that belong to given down-projections."""

    def __init__(self, projections: Sequence[Projection], tensors: Iterable[Tensor]) -> None:
        words = {_split_module(projection.module)[1] for projection in projections}
        siblings = {sibling for word in words for sibling in _GATE_UP_WORDS.get(word, ())}
        self._by_name = {
            name: tensor
            for tensor in tensors
            for name in (plain_name(tensor.name),)
            if siblings and any(sibling in name for sibling in siblings)
        }

    def check_present(self, projections: Iterable[Projection]) -> None:
        """Require the same matrices of all separately stored experts of a layer.

        Raises:
            CheckpointError: an expert lacks a matrix that others have.
        """
        modules = {name.rpartition(".")[0] for name in self._by_name}
        first: dict[tuple[Layer, str, str], Projection] = {}
        for p in projections:
            head, word, tail = _split_module(p.module)
            for sibling in _GATE_UP_WORDS.get(word, ()) if p.expert is not None else ():
                if head + sibling + tail in modules:
                    first.setdefault((p.layer, p.block, sibling), p)
        for p in projections if first else ():
            head, word, tail = _split_module(p.module)
            for sibling in _GATE_UP_WORDS.get(word, ()) if p.expert is not None else ():
                other = first.get((p.layer, p.block, sibling))
                if other is not None and head + sibling + tail not in modules:
                    raise CheckpointError(
                        f"{head}{sibling}{tail}: is missing, although {other.module} has one",
                        hint="The checkpoint is incomplete; fetch the missing shard again.",
                    )

    def find(self, projection: Projection) -> dict[str, dict[str, Tensor]]:
        """The tensors of each gate- or up-projection, by module."""
        head, word, tail = _split_module(projection.module)
        found: dict[str, dict[str, Tensor]] = {}
        for sibling in _GATE_UP_WORDS.get(word, ()):
            module = head + sibling + tail
            for suffix, tensor in projection.by_suffix.items():
                rest = plain_name(tensor.name)[len(projection.module) :]
                if (other := self._by_name.get(module + rest)) is not None:
                    found.setdefault(module, {})[suffix] = other
        return found

    def bias_name(self, projection: Projection) -> str | None:
        """The name of a bias of the gate- or up-projection; None if there is none."""
        head, word, tail = _split_module(projection.module)
        for sibling in _GATE_UP_WORDS.get(word, ()):
            for end in (".bias", "_bias"):
                if (name := head + sibling + tail + end) in self._by_name:
                    return name
        return None

    def check(self, projection: Projection) -> bool:
        """Whether the projection has a gate- or up-projection of known size.

        Raises:
            CheckpointError: its shape is not the transpose of the projection's.
        """
        down = _shape_info(_signature(projection))
        paired = False
        for module, by_suffix in self.find(projection).items():
            other = _shape_info(
                tuple((suffix, t.dtype, t.shape) for suffix, t in by_suffix.items())
            )
            _refuse_empty(by_suffix, other)
            if down.weight_shape is None or other.weight_shape is None:
                continue
            matrix_counts = _MATRIX_COUNTS.get(_split_module(module)[1], (1,))
            if not _is_transpose(
                down.weight_shape, other.weight_shape, matrix_counts, projection.expert is None
            ):
                raise _not_transposed(projection, down, by_suffix, other)
            paired = True
        return paired


def _split_module(module: str) -> tuple[str, str, str]:
    """Split a module at its last word that is not a number: ``down_projs`` of ``down_projs.3``."""
    head, _, word = module.rpartition(".")
    if not word.isdecimal():
        return head + ".", word, ""
    head, _, named = head.rpartition(".")
    return head + ".", named, "." + word


def _is_transpose(
    down: tuple[int, ...], up: tuple[int, ...], matrix_counts: tuple[int, ...], stacked: bool
) -> bool:
    """Whether the shapes are ``[..., hidden, inner]`` and ``[..., inner, hidden]``.

    `inner` counts twice if gate and up are joined. Stacked experts may both be stored the other way
    round, or flattened (DBRX). The up-projection may have more experts: some of LongCat's have no
    weights.
    """
    if stacked and len(down) == len(up) == 2:
        return down == up
    if len(down) != len(up) or len(down) < 2 or down[:-2] > up[:-2]:
        return False
    (x, y), shape = up[-2:], down[-2:]
    return any(shape in ((y, x / matrices), (y / matrices, x)) for matrices in matrix_counts)


def _not_transposed(
    projection: Projection, down: ShapeInfo, by_suffix: Mapping[str, Tensor], other: ShapeInfo
) -> CheckpointError:
    tensor = projection.by_suffix[down.codes]
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
    """Require an output as wide as the hidden states, or as a narrower stream of the config."""
    size = _shape_info(_signature(projection)).weight_shape
    hidden = config.hidden_size
    if size is None or hidden is None:
        return
    widths = {hidden, *config.narrow_sizes}
    one = projection.expert is not None
    if paired and one and _is_transposed(size, widths, routers.weight(projection), hidden):
        raise _wrong_width(projection, hidden)
    either = paired or not one
    if len(size) > 1 and not widths.isdisjoint(size[-2:] if either else size[-2:-1]):
        if not either:
            _check_inner(projection, size, config.intermediate_size)
        return
    router = routers.weight(projection)
    if paired and router is not None and hidden in router.shape:
        return  # the router has the hidden size, so some unknown key makes the experts narrower
    raise _wrong_width(projection, hidden)


def _is_transposed(
    size: tuple[int, ...], widths: Collection[int], router: Tensor | None, hidden: int
) -> bool:
    """Whether a separate expert is transposed, but the router is not; Paddle transposes both."""
    transposed = len(size) > 1 and size[-1] == hidden and size[-2] not in widths
    return transposed and (router is None or router.shape[-1] == hidden)


def _wrong_width(projection: Projection, hidden: int) -> CheckpointError:
    tensor = projection.by_suffix[_shape_info(_signature(projection)).codes]
    return CheckpointError(
        f"{tensor.name}: its shape is {list(tensor.shape)}, but the config says that hidden states"
        f" have {hidden} numbers",
        hint="The config belongs to another checkpoint, or the tensor is damaged or transposed.",
    )


def _check_inner(projection: Projection, size: tuple[int, ...], stated: int | None) -> None:
    """Refuse a slice of an expert: without gate and up, only the config tells its width."""
    if stated is not None and stated not in size:
        tensor = projection.by_suffix[_shape_info(_signature(projection)).codes]
        raise CheckpointError(
            f"{tensor.name}: its shape is {list(tensor.shape)}, but the config says that an expert"
            f" is {stated} wide (moe_intermediate_size)",
            hint="The config belongs to another checkpoint, or the tensor is only a slice.",
        )


def _check_biases(projections: Sequence[Projection], gate_up: _GateUp) -> None:
    """Require a bias of each projection if another of its format, or its gate or up, has one."""
    with_bias: dict[Any, Projection] = {}
    without: dict[Any, Projection] = {}
    for p in projections:
        by_suffix = frozenset(
            (suffix, t.dtype) for suffix, t in p.by_suffix.items() if suffix != "bias"
        )
        (with_bias if "bias" in p.by_suffix else without).setdefault((p.layer.stack, by_suffix), p)
    for kind, lacking in without.items():
        other = with_bias.get(kind)
        bias = other.by_suffix["bias"].name if other else gate_up.bias_name(lacking)
        if bias is not None:
            raise CheckpointError(
                f"{lacking.module}: has no bias, unlike {bias}",
                hint="The checkpoint is incomplete; fetch the missing shard again.",
            )
