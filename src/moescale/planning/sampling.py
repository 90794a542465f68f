"""Samples the routers of a checkpoint for the rule ``gates``: a few megabytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import numpy as np

from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.factors.samples import Sample
from moescale.families.config import CONFIG
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.families.router_tensors import RULE, RouterTensors, find_routers, router_kind_of
from moescale.routers.kinds import RouterKind
from moescale.routers.weights import Array, RouterArrays, RouterSpec, Score, sample_layer
from moescale.storage.base import SMALL_FILE_BYTES, Source, ignore

HUB_READS = 4
"""Layers read at a time from the Hub; from a disk, one."""


def gate_of(moe: Moe, kind: RouterKind, biased: bool) -> RouterSpec:
    """How the router of this checkpoint turns logits into gate weights.

    Args:
        moe: the MoE.
        kind: the kind of its router.
        biased: whether a bias affects the choice of experts.

    Raises:
        UnsupportedError: the config names an unknown score function.
        CheckpointError: the bound of the logits is not a number of at least 0.
    """
    config, router = moe.config, moe.config.normalisation
    assert router is not None, "a model type with a router kind has its normalisation"
    cap = config.logit_cap
    if cap is not None and (type(cap) not in (int, float) or not 0 <= cap < math.inf):
        raise CheckpointError(f"{CONFIG}: {kind.cap_key} is {cap!r}, not a number of at least 0")
    return RouterSpec(
        score=_score(kind, config.score, biased),
        chosen_by_logits=kind.chosen_by_logits,
        normalised=router.renormalised,
        groups=config.groups,
        group_best=kind.group_best,
        shared=router.shared,
        zero_experts=config.experts_without_weights if kind.zero_experts_key else 0,
        product_keys=kind.product_keys,
        cap=cap or None,
    )


def _score(kind: RouterKind, stated: Any, biased: bool) -> Score:
    named = stated or (kind.biased_score if biased else None) or kind.score
    for score in get_args(Score):
        if named == score:
            known: Score = score
            return known
    raise UnsupportedError(
        f"{CONFIG}: {kind.score_key} is {named!r}, a score that --rule gates cannot compute",
        hint="--rule preserve does not compute scores.",
    )


class Routers(NamedTuple):
    """The routers of a checkpoint: their kind, and their tensors with shards.

    Attributes:
        moe: their MoE.
        gate: how they turn logits into gate weights.
        zero_centred: the norms before them multiply by 1 + weight.
        tensors: the tensors of each router, one item for each layer.
        shards: the shard that holds each of these tensors, by name of the tensor.
    """

    moe: Moe
    gate: RouterSpec
    zero_centred: bool
    tensors: Sequence[RouterTensors]
    shards: Mapping[str, str]


def sample_gates(
    source: Source,
    routers: Routers,
    counts: Mapping[Layer, tuple[int, int]],
    router_scale: float = 1.0,
    rho: float = 0.0,
    progress: Callable[[int, int], None] = ignore,
) -> dict[Layer, Sample]:
    """Statistics of the gate weights of every layer.

    Args:
        source: the checkpoint; its routers and the norms before them are read.
        routers: the routers of all layers.
        counts: experts per token in training and in the output, by layer.
        router_scale: multiplier of the router's logits in the output.
        rho: correlation of the experts' outputs.
        progress: called with the number of layers done and of all layers.

    Raises:
        CheckpointError: a router's shape does not match the config, or a value is not finite.
    """
    result = {}
    for tensors, weights in read_gates(source, routers):
        layer = tensors.layer
        seed = (layer.number, *layer.stack.encode(errors="surrogatepass"))
        with np.errstate(all="ignore"):  # NaN and infinity are refused below
            sample = sample_layer(weights, routers.gate, counts[layer], seed, router_scale, rho)
        del weights  # frees them before the next layer is read
        sizes = (sample.before.expected_norm(0), sample.after.expected_norm(0))
        if not all(math.isfinite(size) and size > 0 for size in sizes):
            raise CheckpointError(
                f"{tensors.weight.name}: gives gate weights that are zero or not finite",
                hint="The tensor is damaged, or belongs to another model type.",
            )
        result[layer] = sample
        progress(len(result), len(routers.tensors))
    return result


def find_gates(moe: Moe, headers: Mapping[str, Header]) -> Routers:
    """The routers of all layers.

    Raises:
        UnsupportedError: the router of this model type cannot be computed, or is quantised.
        CheckpointError: a router is missing.
    """
    tensors = [t for header in headers.values() for t in header.tensors]
    kind = router_kind_of(moe.architecture, tensors, RULE)
    if kind.zero_centred and any(".switch_mlp." in p.module for p in moe.projections):
        raise UnsupportedError(
            f"--rule gates: mlx-lm may have added 1 to the norms of this {moe.model_type!r} model",
            hint="--rule preserve needs only the config.",
        )
    found = find_routers(kind, moe.config, moe.projections, tensors, RULE)
    names = {tensor.name for router in found for tensor in router.present}
    shards = {t.name: shard for shard, h in headers.items() for t in h.tensors if t.name in names}
    spec = gate_of(moe, kind, any(router.bias for router in found))
    return Routers(moe, spec, kind.zero_centred, found, shards)


def read_gates(source: Source, routers: Routers) -> Iterator[tuple[RouterTensors, RouterArrays]]:
    """Yield every layer's router.

    Several are fetched at a time from the Hub, where each read is a request. Only one at a time is
    converted to float64: all routers of a large model would exceed the memory limit.
    """

    def fetch(tensors: RouterTensors) -> list[bytes]:
        for tensor in tensors.present:
            if tensor.nbytes > SMALL_FILE_BYTES:
                raise CheckpointError(f"{tensor.name}: is too large for a router")
        return [source.read(routers.shards[t.name], t.start, t.nbytes) for t in tensors.present]

    at_once = min(HUB_READS, source.parallel_reads)
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        for start in range(0, len(routers.tensors), at_once):
            batch = routers.tensors[start : start + at_once]
            fetched = list(pool.map(fetch, batch))[::-1]
            for tensors in batch:
                yield tensors, _weights(routers, tensors, fetched.pop())


def _weights(routers: Routers, tensors: RouterTensors, data: list[bytes]) -> RouterArrays:
    """The arrays of one layer's router, in the shapes that the config implies."""
    found = {t: decode(data.pop(0), t.dtype) for t in tensors.present}

    def values(tensor: Tensor, *shape: int) -> Array:
        flat = len(shape) == 1 and math.prod(tensor.shape) == shape[0]
        if 0 in shape or not (flat or tensor.shape == shape):
            raise CheckpointError(
                f"{tensor.name}: its shape is {list(tensor.shape)}, not {list(shape)}",
                hint="The config belongs to another checkpoint, or the tensor has another layout.",
            )
        if not np.isfinite(found[tensor]).all():
            raise CheckpointError(
                f"{tensor.name}: holds values that are not finite", hint="The tensor is damaged."
            )
        return found[tensor].reshape(shape)

    assert tensors.norm is not None, "scaling has no effect without this norm, and is refused"
    moe, spec = routers.moe, routers.gate
    experts = moe.experts_by_layer[tensors.layer] + spec.zero_experts
    logits = 2 * math.isqrt(experts) if spec.product_keys else experts + spec.shared
    hidden = math.prod(tensors.norm.shape)
    if spec.groups is not None and experts % spec.groups[0]:
        raise CheckpointError(
            f"{CONFIG}: {experts} experts do not form {spec.groups[0]} equal groups"
        )
    norm = values(tensors.norm, hidden)
    return RouterArrays(
        values(tensors.weight, logits, hidden),
        norm + 1 if routers.zero_centred else norm,
        None if tensors.bias is None else values(tensors.bias, experts),
        None if tensors.logit_bias is None else values(tensors.logit_bias, logits),
    )


_NUMPY = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_PIECE = 1 << 16


def decode(data: bytes, dtype: str) -> Array:
    """Convert little-endian F16, BF16, F32 or F64 to float64, in pieces to save memory."""
    codes = np.frombuffer(data, _NUMPY[dtype])
    numbers = np.empty(codes.size)
    for start in range(0, codes.size, _PIECE):
        piece: Any = codes[start : start + _PIECE]
        if dtype == "BF16":  # the upper half of a float32
            piece = (piece.astype("<u4") << 16).view("<f4")
        with np.errstate(invalid="ignore"):  # a signalling NaN
            numbers[start : start + _PIECE] = piece
    return numbers
