"""The weights of a checkpoint: its shards, the MoE in them, and the files beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError
from moescale.families.config import Config
from moescale.families.find import Moe, find_moe
from moescale.families.foreign_names import expert_names, layer_from_name
from moescale.options import Options
from moescale.planning.extra_files import classify_extra_files, unlisted_shard_name
from moescale.planning.shards import ShardSet, read_shards
from moescale.storage.base import Source


class Weights(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
        found: the shards and their headers, including shards that the index does not list.
        tensors: all tensors.
        moe: the MoE in the weights.
        left_out: files that do not belong in the output, each with the reason.
        warnings: warnings for the user.
    """

    found: ShardSet
    tensors: Sequence[Tensor]
    moe: Moe
    left_out: Mapping[str, str]
    warnings: Sequence[str]


def find_weights(source: Source, config: Config, options: Options) -> Weights:
    """Find the shards and the MoE, and decide about the files beside them.

    Raises:
        UnsupportedError: the model type is not known.
        CheckpointError: a file is damaged, or files, index and config do not match.
    """
    found = read_shards(source, source.files())
    moe = _moe(source, config, options, found)
    warnings = found.faults.check(expert_names(found.faults.names, moe.projections))
    beside = classify_extra_files(source, found, moe)
    if beside.unlisted_shards:
        found = replace(found, headers={**found.headers, **beside.unlisted_shards})
        moe = _with_unlisted(config, options, found, beside.unlisted_shards)
        warnings += _unlisted_warnings(found.shards.index, beside.unlisted_shards)
    return Weights(
        found,
        _tensors(found.headers),
        moe,
        beside.left_out,
        [*warnings, *beside.warnings, *moe.warnings],
    )


def _tensors(headers: Mapping[str, Header]) -> list[Tensor]:
    return [tensor for header in headers.values() for tensor in header.tensors]


def _find(config: Config, options: Options, headers: Mapping[str, Header]) -> Moe:
    given = options.arch, options.part, options.pattern, options.experts_key
    return find_moe(config, _tensors(headers), *given)


def _moe(source: Source, config: Config, options: Options, found: ShardSet) -> Moe:
    """The MoE; if it is incomplete, the index may be the cause."""
    try:
        return _find(config, options, found.headers)
    except CheckpointError as error:
        found.faults.check(
            {name for name in found.faults.names if layer_from_name(name) is not None}
        )
        if (name := unlisted_shard_name(source, found)) is None:
            raise
        raise CheckpointError(
            f"{error.message}; {name} holds routed experts, but is not among the shards of the"
            " model",
            hint="The index is stale or missing: write one that lists all shards of the model.",
        ) from None


def _with_unlisted(
    config: Config, options: Options, found: ShardSet, unlisted_shards: Mapping[str, Header]
) -> Moe:
    """The MoE with unlisted shards, each of which holds a part of it."""
    first = min(unlisted_shards)
    try:
        moe = _find(config, options, found.headers)
    except CheckpointError as error:
        raise CheckpointError(
            f"{first}: holds routed experts that no index lists: {error.message}", hint=error.hint
        ) from None
    taken = {tensor.name for p in moe.projections for tensor in p.by_suffix.values()}
    for shard, header in unlisted_shards.items():
        if taken.isdisjoint(tensor.name for tensor in header.tensors):
            raise CheckpointError(
                f"{shard}: holds routed experts under names that the other shards do not use",
                hint="Move it out of the folder if it is not part of the model.",
            )
    return moe


def _unlisted_warnings(index: str | None, names: Iterable[str]) -> list[str]:
    why = f"{index} does not list it" if index else "loaders may read only model.safetensors"
    return [
        f"{name}: its routed experts are scaled with the others, although {why}" for name in names
    ]
