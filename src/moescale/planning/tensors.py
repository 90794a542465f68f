"""The edits of tensors, and the new headers of their shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.rewrite import Segment
from moescale.checkpoint.safetensors.header import LENGTH_BYTES, relaid_header
from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import LEAVE_FOLD_OUT, UnsupportedError
from moescale.families.find import Moe
from moescale.families.formats import scaled_tensors
from moescale.families.projections import Layer
from moescale.families.residual import WRITERS, residual_writers
from moescale.families.router_tensors import ScaledRouters, scaled_routers
from moescale.options import Options
from moescale.planning.factors import one_factor
from moescale.planning.plan import NewHeader
from moescale.storage.base import Source


def alternative(moe: Moe, factors: Mapping[Layer, float]) -> str | None:
    """An alternative to scaling the weights, as a sentence for the user."""
    row = moe.architecture
    if len(set(factors.values())) > 1:
        return None
    if row.can_fold and moe.config.has_scale:
        return f"--fold config multiplies {row.scale_key} by any factor, exactly."
    if row.model_type in WRITERS:
        return (
            "--fold residual takes any factor: it divides everything else that writes to the"
            " residual stream."
        )
    return None


def scaled_weights(
    moe: Moe, factors: Mapping[Layer, float], tensors: Sequence[Tensor], options: Options
) -> list[TensorEdit]:
    """The edit of every tensor that is scaled."""
    if options.fold == "config":
        return []
    if options.fold == "scale":
        raise UnsupportedError("--fold scale needs a GGUF file", hint=LEAVE_FOLD_OUT)
    if options.fold == "residual":
        divisor = one_factor(factors, options)
        layers = {projection.layer.number for projection in moe.projections}
        model_type = moe.architecture.model_type
        return residual_writers(
            model_type, moe.config.tied_embeddings, tensors, layers, 1 / divisor
        )
    hint = alternative(moe, factors)
    return [
        edit
        for p in moe.projections
        for edit in scaled_tensors(p.module, p.by_suffix, factors[p.layer], hint, p.layer)
    ]


def find_scaled_routers(moe: Moe, tensors: Sequence[Tensor]) -> ScaledRouters:
    """The router tensors to multiply, so that the logits are scaled; see `scaled_routers`."""
    return scaled_routers(moe.architecture, moe.config, moe.projections, tensors)


def in_shards(edits: Sequence[TensorEdit], headers: Mapping[str, Header]) -> tuple[TensorEdit, ...]:
    """The edits, each with the shard that holds its tensor."""
    shard_of = dict.fromkeys((edit.tensor.name for edit in edits), "")
    for shard, header in headers.items():
        shard_of.update((t.name, shard) for t in header.tensors if t.name in shard_of)
    return tuple(edit.with_(shard=shard_of[edit.tensor.name]) for edit in edits)


def new_headers(
    source: Source, headers: Mapping[str, Header], edits: Sequence[TensorEdit]
) -> dict[str, NewHeader]:
    """New headers of the shards in which a scale is promoted to a wider dtype."""
    promoted: dict[str, dict[str, str]] = defaultdict(dict)
    grown: dict[str, int] = defaultdict(int)
    for edit in edits:
        if edit.store_as is not None and edit.factor != 1.0:
            promoted[edit.shard][edit.tensor.name] = edit.store_as
            grown[edit.shard] += edit.nbytes - edit.tensor.nbytes
    result = {}
    for shard, names in promoted.items():
        old = headers[shard]
        data = relaid_header(source.read(shard, LENGTH_BYTES, old.data_start - LENGTH_BYTES), names)
        size = old.file_size - old.data_start + len(data) + grown[shard]
        result[shard] = NewHeader((Segment(0, old.data_start, data=data),), size)
    return result
