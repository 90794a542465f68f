"""The one place where everything is decided, before a weight is read.

`make_plan` reads config, index and shard headers, and returns a frozen `Plan`. The dry run prints
it, the run executes it, the card and the verification read it; none of them decides anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from moescale.checkpoint.edit import Edit
from moescale.checkpoint.header import LENGTH_BYTES, Header, Tensor, header_length, parse_header
from moescale.checkpoint.index import (
    INDEX,
    Shards,
    by_shard,
    check_against_headers,
    index_name,
    make_index,
    parse_index,
    shards_without_index,
)
from moescale.checkpoint.rewrite import Segment, relaid_header, segments
from moescale.errors import CheckpointError, SourceError, UnsupportedError, UsageError
from moescale.files import PROVENANCE, PlannedFile, plan_files
from moescale.model.count import CONFIG, parse_config, set_count
from moescale.model.experts import Layer, experts_of_layer
from moescale.model.formats import Role, Scaled, confirm, scaled_tensors
from moescale.model.gating import scaled_routers
from moescale.model.lookup import Moe, find_moe
from moescale.model.residual import WRITERS, residual_writers
from moescale.model.router import Router, largest_count
from moescale.model.scale_key import fold_factor
from moescale.options import Options
from moescale.repos.base import FileInfo, Source, SourceId, check_name
from moescale.rules import closed_form, gates, measured
from moescale.rules.samples import Sample
from moescale.sampling import sample_gates

ByLayer = float | dict[str, float]
"""One number for all layers, or one for each where they differ."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts per token that the weights were trained for, before, after; and in total."""

    trained: int | tuple[int, ...]
    before: int | tuple[int, ...]
    after: int | tuple[int, ...]
    total: int

    def at(self, layer: Layer) -> tuple[int, int, int]:
        """The first three, of one layer."""
        return _at(self.trained, layer), _at(self.before, layer), _at(self.after, layer)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to scale, and what it is."""

    edit: Edit
    shard: str
    role: Role
    layer: Layer

    def as_json(self) -> dict[str, Any]:
        """The tensor as ``--dry-run --json`` prints it; `operation` only where it is another."""
        edit, tensor = self.edit, self.edit.tensor
        return {
            "name": tensor.name,
            "shard": self.shard,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "role": self.role,
            "layer": str(self.layer) if self.layer.stack else self.layer.number,
            "factor": edit.factor,
            **({"operation": edit.operation} if edit.operation != "multiply" else {}),
            **({"promoted_to": edit.promote} if edit.promote else {}),
        }


@dataclass(frozen=True, slots=True)
class NewHeader:
    """The first bytes of a re-laid shard, where the old data start, and the new size."""

    data: bytes
    data_start: int
    file_size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do, and why. Nothing is decided after it."""

    source: SourceId
    destination: str | None
    options: Options
    model_type: str
    part: str | None
    experts: Experts
    router: Router | None
    rho: float
    factors: Mapping[str, float]
    alternatives: Mapping[str, ByLayer]
    predicted_norm: Mapping[str, ByLayer]
    tensors: tuple[PlannedTensor, ...]
    files: tuple[PlannedFile, ...]
    config: bytes
    index: tuple[str, bytes | None] | None  # its name; its content where it has to be made
    new_headers: Mapping[str, NewHeader]  # of the shards in which tensors change their size
    samples: Mapping[str, Sample] = field(default_factory=dict)  # by layer, where a rule has any
    calibration: Mapping[str, Any] = field(default_factory=dict)  # the text of a measured plan
    warnings: tuple[str, ...] = ()
    states: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed_tensors(self) -> tuple[PlannedTensor, ...]:
        """The tensors whose bytes change; a factor of exactly 1 copies."""
        return tuple(t for t in self.tensors if t.edit.factor != 1.0)

    def segments(self, file: PlannedFile) -> list[Segment]:
        """How a large file is written: what is copied, and what is edited."""
        edits = [t.edit for t in self.tensors if t.shard == file.name and t.edit.factor != 1.0]
        new = self.new_headers.get(file.name)
        if new is None:
            return segments(edits, file.size or 0)
        return segments(edits, file.size or 0, new.data, new.data_start)

    def output_size(self, file: PlannedFile) -> int:
        """Size in bytes that a large file has in the output."""
        new = self.new_headers.get(file.name)
        return (file.size or 0) if new is None else new.file_size

    @property
    def large_files(self) -> tuple[PlannedFile, ...]:
        """The files that are streamed: shards, and what is copied; config and index come last."""
        last = {CONFIG, self.index[0] if self.index else CONFIG}
        return tuple(
            f for f in self.files if f.action in ("rewrite", "copy") and f.name not in last
        )

    @property
    def bytes_streamed(self) -> int:
        """Bytes of the large files of the output."""
        return sum(self.output_size(f) for f in self.large_files)

    @property
    def bytes_changed(self) -> int:
        """Bytes of the tensors that are multiplied."""
        return sum(t.edit.nbytes for t in self.changed_tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that a run reads."""
        return sum(f.size or 0 for f in self.files if f.action != "skip")

    @property
    def bytes_written(self) -> int:
        """Bytes of the output, without the card and the provenance, which are made at the end."""
        name, made = self.index or (CONFIG, None)
        actions = {f.name: f for f in self.files}
        index = len(made) if made is not None else (actions[name].size or 0)
        return self.bytes_streamed + len(self.config) + (index if self.index else 0)

    def as_json(self) -> dict[str, Any]:
        """The plan as ``--dry-run --json`` prints it."""
        return {
            "source": {
                "kind": self.source.kind,
                "id": self.source.id,
                "revision": self.source.revision,
            },
            "destination": self.destination,
            **self.decisions(),
            "tensors": [t.as_json() for t in self.tensors],
            "files": [f.as_json() for f in self.files],
            "bytes": {
                "read": self.bytes_read,
                "changed": self.bytes_changed,
                "written": self.bytes_written,
            },
            "warnings": list(self.warnings),
        }

    def decisions(self) -> dict[str, Any]:
        """What was decided, without places and files."""
        return {
            "model_type": self.model_type,
            **({"part": self.part} if self.part else {}),
            "experts": {
                "trained": self.experts.trained,
                "from": self.experts.before,
                "to": self.experts.after,
                "total": self.experts.total,
            },
            "router": {"renormalised": self.router.renormalised if self.router else None},
            "rule": self.options.method,
            **({"fold": self.options.fold} if self.options.fold else {}),
            **({"gate_scale": scale} if (scale := self.options.gate_scale) is not None else {}),
            "rho": self.rho,
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            "factors": dict(self.factors),
            "alternatives": dict(self.alternatives),
            "predicted_norm": dict(self.predicted_norm),
        }


Sampler = Callable[[Moe, Experts], Mapping[Layer, Sample]]
"""Finds out what a rule wants to know of every MoE layer."""


def make_plan(
    source: Source,
    options: Options,
    destination: str | None = None,
    sampler: Sampler | None = None,
    noted: Mapping[str, float] | None = None,
) -> Plan:
    """Decide everything.

    Args:
        source: where the checkpoint is; its config, index and shard headers are read.
        options: what the user asked for.
        destination: what the user calls the place of the output, for the record.
        sampler: samples the layers for the rule ``measured``; ``gates`` needs none.
        noted: the factors of ``measured``, where an earlier run of the same job has them.

    Raises:
        SourceError: the checkpoint is malformed, incomplete or cannot be rescaled so.
        UsageError: the factors do not cover the checkpoint's MoE layers.
    """
    files = source.files()
    if CONFIG not in files:
        raise SourceError(
            f"{source.identity.id}: has no {CONFIG}",
            hint="Give the folder or the repo that holds a model in the Hugging Face layout.",
        )
    config = parse_config(source.read(CONFIG))
    shards, listed = _find_shards(source, files)
    headers, warnings = check_against_headers(
        shards, listed, _read_headers(source, files, shards.names)
    )
    tensors = [tensor for header in headers.values() for tensor in header.tensors]
    moe = find_moe(
        config, tensors, options.arch, options.part, options.pattern, options.experts_key
    )
    warnings += moe.warnings
    if PROVENANCE in files:
        warnings.append(
            f"the source is itself an output of moescale ({PROVENANCE}); its factors stay in it"
        )
    experts = _experts(moe, options)
    forms = _closed_forms(moe, experts, options)
    if sampler is None and options.method == "gates":
        samples = _sampled_gates(source, moe, experts, options, headers)
    else:
        samples = sampler(moe, experts) if sampler is not None else {}
    factors = _factors(moe, experts, options, samples, noted)
    scaled = _scaled_tensors(moe, factors, tensors, options)
    warnings += confirm(
        ((s, factor) for s, _, factor in scaled), config.value, _instead(moe, factors)
    )
    warnings += _remarks(options)
    scaled += _sharpened_routers(moe, tensors, options)
    moe = replace(moe, projections=())  # large, and not needed any more
    planned = _planned_tensors(scaled, headers)
    index = _index(shards, headers)
    new_config = config
    if options.fold == "config":
        new_config = fold_factor(new_config, moe.architecture, _one_factor(factors, options))
    if options.experts is not None:
        new_config = set_count(new_config, moe.places, options.experts)
    return Plan(
        source=source.identity,
        destination=destination,
        options=options,
        model_type=moe.model_type,
        part=moe.architecture.part,
        experts=experts,
        router=moe.router,
        rho=options.rho or 0.0,
        factors=MappingProxyType({str(layer): factor for layer, factor in factors.items()}),
        alternatives=MappingProxyType(
            {name: _joined(form) for name, form in forms.items() if name != "none"}
        ),
        predicted_norm=MappingProxyType(_predicted_norm(forms)),
        tensors=planned,
        files=plan_files(
            files,
            shards.names,
            {t.shard for t in planned if t.edit.factor != 1.0},
            index and index[0],
            new_config.text != config.text,
        ),
        config=new_config.text.encode(),
        index=index,
        new_headers=MappingProxyType(_new_headers(source, headers, planned)),
        samples=MappingProxyType({str(layer): sample for layer, sample in samples.items()}),
        warnings=tuple(warnings),
        states=MappingProxyType({name: source.state(name) for name in files}),
    )


def _remarks(options: Options) -> list[str]:
    """What the user should know of the options."""
    remarks = []
    if options.fold == "residual":
        remarks.append(
            "--fold residual is the same as scaling the experts but for the rounding of the divided"
            " weights and the epsilon of the norms, which stays while the stream shrinks"
        )
    if options.gate_scale is not None and options.method in ("preserve", "published"):
        remarks.append(
            f"--gate-scale changes the gate weights, which --rule {options.method} does not see,"
            " since it assumes a balanced gate; --rule gates does"
        )
    return remarks


def _find_shards(
    source: Source, files: Mapping[str, FileInfo]
) -> tuple[Shards, dict[str, list[str]] | None]:
    """The shards, and what the index lists of each."""
    index = index_name(files)
    if index is None:
        return shards_without_index(files), None
    listed = by_shard(parse_index(source.read(index), index))
    names = tuple(sorted(listed))
    for name in names:
        check_name(name, index)
        if name not in files:
            raise CheckpointError(
                f"{index}: lists {name}, which is not there",
                hint="The download is incomplete; fetch the missing file.",
            )
    return Shards(names, index), listed


def _read_headers(
    source: Source, files: Mapping[str, FileInfo], names: Sequence[str]
) -> Iterator[tuple[str, Header]]:
    """The headers of all shards; several at once where each is a request."""

    def read(name: str) -> Header:
        size = files[name].size
        length = header_length(source.read(name, 0, LENGTH_BYTES), size, name)
        return parse_header(source.read(name, LENGTH_BYTES, length), size, name)

    if source.identity.kind == "local":
        yield from ((name, read(name)) for name in names)
        return
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from zip(names, pool.map(read, names), strict=True)


def _index(shards: Shards, headers: Mapping[str, Header]) -> tuple[str, bytes | None] | None:
    if shards.index is not None:
        return shards.index, None
    return (INDEX, make_index(headers)) if len(shards.names) > 1 else None


def _experts(moe: Moe, options: Options) -> Experts:
    before: int | tuple[int, ...] = moe.count
    after = before if options.experts is None else options.experts
    trained = options.trained_experts or before
    row = moe.architecture
    if row.fixed and after != before:
        raise UnsupportedError(
            f"model type {moe.model_type!r} cannot run with {after} experts per token: {row.fixed}",
            hint="--factor scales the experts and leaves their number as it is.",
        )
    own = moe.section.get("per_layer_config")
    overrides = own.values() if isinstance(own, dict) else ()
    if after != before and any(isinstance(o, dict) and row.count[0] in o for o in overrides):
        raise UnsupportedError(
            f"config.json: per_layer_config gives single layers their own {row.count[0]}",
            hint="Set those numbers yourself, then use --factors without --experts.",
        )
    fewest = min(experts_of_layer(moe.section, p.layer.number, moe.total) for p in moe.projections)
    largest = largest_count(row, moe.section, fewest)
    for name, count in (("--experts", after), ("--trained-experts", trained)):
        if max(_as_tuple(count)) > largest:
            limit = f"a layer has {fewest} routed experts"
            if largest < fewest:
                limit += f", of which its group-limited router can choose {largest}"
            raise UnsupportedError(
                f"{name} is {count}, but {limit}", hint=f"Choose from 1 to {largest}."
            )
    if row.no_effect and options.method != "none":
        raise UnsupportedError(
            f"scaling has no effect on model type {moe.model_type!r}: {row.no_effect}",
            hint="--rule none changes the number of experts alone.",
        )
    return Experts(trained, before, after, moe.total)


def _as_tuple(count: int | tuple[int, ...]) -> tuple[int, ...]:
    return count if isinstance(count, tuple) else (count,)


def _at(count: int | tuple[int, ...], layer: Layer) -> int:
    """The count of one layer; a layer after the last of a list is an MTP block."""
    if isinstance(count, int):
        return count
    return count[min(layer.number, len(count) - 1)]


def _factors(
    moe: Moe,
    experts: Experts,
    options: Options,
    samples: Mapping[Layer, Sample],
    noted: Mapping[str, float] | None,
) -> dict[Layer, float]:
    layers = sorted({projection.layer for projection in moe.projections})
    if (given := options.factors if noted is None else noted) is not None:
        return _given_factors(layers, given)
    match options.method:
        case "gates":
            return {layer: gates.factor(samples[layer], options.rho or 0.0) for layer in layers}
        case "measured":
            return {layer: measured.factor(samples[layer]) for layer in layers}
    return {layer: _factor(moe, experts, options, layer) for layer in layers}


def _sampled_gates(
    source: Source, moe: Moe, experts: Experts, options: Options, headers: Mapping[str, Header]
) -> Mapping[Layer, Sample]:
    layers = {projection.layer for projection in moe.projections}
    counts = {at: (_at(experts.trained, at), _at(experts.after, at)) for at in layers}
    return sample_gates(source, moe, headers, counts, options.gate_scale or 1.0)


def _given_factors(layers: Sequence[Layer], given: Mapping[str, float]) -> dict[Layer, float]:
    names = {str(layer) for layer in layers}
    if missing := [str(layer) for layer in layers if str(layer) not in given]:
        raise UsageError(
            f"--factors has no factor for layer {missing[0]} ({len(missing)} of {len(layers)}"
            " MoE layers are missing)"
        )
    if surplus := sorted(given.keys() - names):
        raise UsageError(f"--factors has a factor for layer {surplus[0]}, which is no MoE layer")
    return {layer: given[str(layer)] for layer in layers}


def _factor(moe: Moe, experts: Experts, options: Options, layer: Layer) -> float:
    n, m = _at(experts.trained, layer), _at(experts.after, layer)
    match options.method:
        case "factor":
            assert options.factor is not None
            return options.factor
        case "published":
            return closed_form.published(n, m)
        case "preserve":
            if moe.router is None:
                raise UnsupportedError(
                    f"model type {moe.model_type!r}: how its router weighs experts is not known",
                    hint="Use --arch with a type that routes alike, --factor, or --rule published.",
                )
            return closed_form.preserve(n, m, moe.router.balanced_weight, options.rho or 0.0)
        case _:
            return 1.0


def _one_factor(factors: Mapping[Layer, float], options: Options) -> float:
    """The factor of all layers; a config and a residual stream have one for them."""
    if len(set(factors.values())) > 1:
        raise UsageError(
            f"--fold {options.fold} takes one factor for all layers, these differ by layer"
        )
    return next(iter(factors.values()))


def _closed_forms(moe: Moe, experts: Experts, options: Options) -> dict[str, dict[str, float]]:
    """What each rule would multiply each layer by; nothing where the router is not known."""
    if moe.router is None:
        return {}
    weight, rho = moe.router.balanced_weight, options.rho or 0.0
    layers = sorted({projection.layer for projection in moe.projections})
    counts = {str(at): (_at(experts.trained, at), _at(experts.after, at)) for at in layers}
    return {
        "none": dict.fromkeys(counts, 1.0),
        "preserve": {at: closed_form.preserve(n, m, weight, rho) for at, (n, m) in counts.items()},
        "published": {at: closed_form.published(n, m) for at, (n, m) in counts.items()},
    }


def _predicted_norm(forms: Mapping[str, Mapping[str, float]]) -> dict[str, ByLayer]:
    """What each rule would do to the expected norm at a balanced gate."""
    return {
        name: _joined({at: factor / forms["preserve"][at] for at, factor in form.items()})
        for name, form in forms.items()
    }


def _joined(by_layer: dict[str, float]) -> ByLayer:
    """The one value of all layers, where they have the same."""
    values = set(by_layer.values())
    return values.pop() if len(values) == 1 else by_layer


def _instead(moe: Moe, factors: Mapping[Layer, float]) -> str | None:
    """What else than scaling the weights can be done, as a sentence for the user."""
    row = moe.architecture
    if len(set(factors.values())) > 1:
        return None
    if row.folds and row.scale_key in moe.section:
        return f"--fold config multiplies {row.scale_key} by any factor, exactly."
    if row.model_type in WRITERS:
        return "--fold residual takes any factor: it divides what else writes into the stream."
    return None


def _scaled_tensors(
    moe: Moe, factors: Mapping[Layer, float], tensors: Sequence[Tensor], options: Options
) -> list[tuple[Scaled, Layer, float]]:
    """Every tensor to scale, with its layer and what it is multiplied by."""
    if options.fold == "config":
        return []
    if options.fold == "residual":
        divisor = _one_factor(factors, options)
        layers = {projection.layer.number for projection in moe.projections}
        model_type = moe.architecture.model_type
        writers = residual_writers(model_type, moe.section, tensors, layers)
        return [(scaled, layer, 1 / divisor) for scaled, layer in writers]
    instead = _instead(moe, factors)
    return [
        (scaled, p.layer, factors[p.layer])
        for p in moe.projections
        for scaled in scaled_tensors(p.module, p.leaves, factors[p.layer], instead)
    ]


def _sharpened_routers(
    moe: Moe, tensors: Sequence[Tensor], options: Options
) -> list[tuple[Scaled, Layer, float]]:
    """The tensors of the routers, where their logits are to be multiplied."""
    if (scale := options.gate_scale) is None:
        return []
    routers = scaled_routers(moe.architecture, moe.section, moe.projections, tensors)
    return [(scaled, layer, scale) for scaled, layer in routers]


def _planned_tensors(
    chosen: Sequence[tuple[Scaled, Layer, float]], headers: Mapping[str, Header]
) -> tuple[PlannedTensor, ...]:
    names = {scaled.tensor.name for scaled, _, _ in chosen}
    home = {t.name: shard for shard, h in headers.items() for t in h.tensors if t.name in names}
    return tuple(
        PlannedTensor(
            Edit(_apart(s.tensor), factor, s.operation, s.promote, s.role == "scale"),
            home[s.tensor.name],
            s.role,
            layer,
        )
        for s, layer, factor in chosen
    )


def _apart(tensor: Tensor) -> Tensor:
    """A copy that shares no memory with the others.

    Few of the tensors stay for the run. Lying among those that go, they would keep all the memory
    of a plan: with 140,000 tensors 30 MB that the run needs itself.
    """
    name = tensor.name.encode().decode()
    return Tensor(name, tensor.dtype, tensor.shape, tensor.start + 0, tensor.stop + 0)


def _new_headers(
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
        result[shard] = NewHeader(data, old.data_start, size)
    return result
