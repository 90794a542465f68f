"""Which tensors change, how, and what that makes of their shards' headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from moescale.checkpoint.edit import Edit
from moescale.checkpoint.header import LENGTH_BYTES, Header, Tensor
from moescale.checkpoint.rewrite import Segment, relaid_header
from moescale.errors import UnsupportedError
from moescale.model.experts import Layer
from moescale.model.formats import Scaled, scaled_tensors
from moescale.model.gating import ScaledRouters, scaled_routers
from moescale.model.lookup import Moe
from moescale.model.residual import WRITERS, residual_writers
from moescale.options import Options
from moescale.planning.factors import one_factor
from moescale.planning.plan import NewHeader, PlannedTensor
from moescale.repos.base import Source


def alternative(moe: Moe, factors: Mapping[Layer, float]) -> str | None:
    """What else than scaling the weights can be done, as a sentence for the user."""
    row = moe.architecture
    if len(set(factors.values())) > 1:
        return None
    if row.folds and row.scale_key in moe.section:
        return f"--fold config multiplies {row.scale_key} by any factor, exactly."
    if row.model_type in WRITERS:
        return "--fold residual takes any factor: it divides what else writes into the stream."
    return None


def chosen_tensors(
    moe: Moe, factors: Mapping[Layer, float], tensors: Sequence[Tensor], options: Options
) -> list[tuple[Scaled, Layer, float]]:
    """Every tensor to scale, with its layer and what it is multiplied by."""
    if options.fold == "config":
        return []
    if options.fold == "scale":
        raise UnsupportedError(
            "--fold scale goes with a GGUF file", hint="Leave --fold out; the weights are scaled."
        )
    if options.fold == "residual":
        divisor = one_factor(factors, options)
        layers = {projection.layer.number for projection in moe.projections}
        model_type = moe.architecture.model_type
        writers = residual_writers(model_type, moe.section, tensors, layers)
        return [(scaled, layer, 1 / divisor) for scaled, layer in writers]
    instead = alternative(moe, factors)
    return [
        (scaled, p.layer, factors[p.layer])
        for p in moe.projections
        for scaled in scaled_tensors(p.module, p.leaves, factors[p.layer], instead)
    ]


def find_scaled_routers(moe: Moe, tensors: Sequence[Tensor]) -> ScaledRouters:
    """The tensors of the routers, whose logits are to be multiplied; see `scaled_routers`."""
    return scaled_routers(moe.architecture, moe.section, moe.projections, tensors)


def planned_tensors(
    chosen: list[tuple[Scaled, Layer, float]], headers: Mapping[str, Header]
) -> tuple[PlannedTensor, ...]:
    """Each with its edit, and the shard that it is in; `chosen` is empty afterwards.

    A plan takes the most memory here, so what was chosen goes while what is planned comes.
    """
    home = dict.fromkeys((scaled.tensor.name for scaled, _, _ in chosen), "")
    for shard, header in headers.items():
        home.update((t.name, shard) for t in header.tensors if t.name in home)
    chosen.reverse()
    return tuple(
        PlannedTensor(
            Edit(_apart(s.tensor), factor, s.operation, s.promote, s.role == "scale"),
            home[s.tensor.name],
            s.role,
            layer,
        )
        for s, layer, factor in (chosen.pop() for _ in range(len(chosen)))
    )


def _apart(tensor: Tensor) -> Tensor:
    """A copy that shares no memory with the others.

    Few of the tensors stay for the run. Lying among those that go, they would keep all the memory
    of a plan: with 140,000 tensors 30 MB that the run needs itself.
    """
    name = tensor.name.encode().decode()
    return Tensor(name, tensor.dtype, tensor.shape, tensor.start + 0, tensor.stop + 0)


def new_headers(
    source: Source, headers: Mapping[str, Header], planned: Sequence[PlannedTensor]
) -> dict[str, NewHeader]:
    """The new beginnings of the shards in which a scale is promoted to a wider dtype."""
    promoted: dict[str, dict[str, str]] = defaultdict(dict)
    grown: dict[str, int] = defaultdict(int)
    for t in planned:
        if t.edit.promote is not None and t.edit.factor != 1.0:
            promoted[t.shard][t.edit.tensor.name] = t.edit.promote
            grown[t.shard] += t.edit.nbytes - t.edit.tensor.nbytes
    result = {}
    for shard, names in promoted.items():
        old = headers[shard]
        data = relaid_header(source.read(shard, LENGTH_BYTES, old.data_start - LENGTH_BYTES), names)
        size = old.file_size - old.data_start + len(data) + grown[shard]
        result[shard] = NewHeader((Segment(0, old.data_start, data=data),), size)
    return result
