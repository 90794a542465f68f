"""A GGUF file, or all files of a split set, as llama.cpp reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import frexp
from types import MappingProxyType
from typing import Any, Final

from moescale.checkpoint.edit import Role, TensorEdit
from moescale.checkpoint.gguf.edit import F32, F64, U32, HeaderEdit, NewTensor, patches
from moescale.checkpoint.gguf.header import STRING, GgufHeader, parse_header
from moescale.checkpoint.gguf.names import part_name, parts_of
from moescale.checkpoint.gguf.types import BY_NAME, GgmlType
from moescale.checkpoint.stored_provenance import KEY
from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import LEAVE_FOLD_OUT, CheckpointError, SourceError, UnsupportedError
from moescale.families import llama_cpp
from moescale.families.config import NewValue
from moescale.families.gguf import find_gguf_moe
from moescale.families.llama_cpp import Row
from moescale.families.llama_graph import GRAPHS, max_experts_per_token
from moescale.families.projections import Layer
from moescale.options import Options
from moescale.planning import provenance
from moescale.planning.experts import Experts
from moescale.planning.factors import one_factor
from moescale.planning.files import CARD, PlannedFile
from moescale.planning.formats.base import Output
from moescale.planning.overrides import ConfigOverrides
from moescale.planning.plan import NewHeader, Plan
from moescale.storage.base import FileRecord, Source
from moescale.version import __version__

_OWN: Final = "moescale."
"""The prefix of the keys that hold the provenance."""

_SPLIT: Final = "split.tensors.count"

SCALE: Final = "ffn_down_exps.scale"


class GgufCheckpoint:
    """See `moescale.planning.formats.base.Checkpoint`."""

    def __init__(self, source: Source, options: Options, published: bool) -> None:
        """Read the headers; if `published`, the output gets a card.

        Raises:
            SourceError: the file is damaged, incomplete or not a model.
        """
        _check_options(options)
        self._source, self._options, self._published = source, options, published
        self._files = source.files()
        self._parts = parts_of(next(iter(self._files)), self._files)
        self._gguf = {name: self._parse(name) for name in self._parts}
        self._first = self._gguf[self._parts[0]]
        self.loader: str | None = None
        _check_set(self._gguf)
        self.headers: Mapping[str, Header] = {
            name: _plain(header) for name, header in self._gguf.items()
        }
        self.tensors: Sequence[Tensor] = [
            t for header in self.headers.values() for t in header.tensors
        ]
        given = options.arch, options.pattern, options.experts_key
        self.moe = find_gguf_moe(self._first, self.tensors, *given)
        self._row = llama_cpp.BY_NAME.get(options.arch or self.moe.model_type, Row("", "never"))
        again = f"the source is itself an output of moescale ({KEY}); its factors remain"
        rescaled = any(name.startswith(_OWN) for name in self._first.keys)
        self.warnings: Sequence[str] = [*self.moe.warnings, *([again] * rescaled)]

    def _parse(self, name: str) -> GgufHeader:
        def read(start: int, size: int) -> bytes:
            return self._source.read(name, start, size)

        return parse_header(read, self._files[name].size, name)

    # Which tensors --------------------------------------------------------------------------

    def edits(self, factors: Mapping[Layer, float]) -> list[TensorEdit]:
        """The edit of every tensor that is scaled.

        Raises:
            UnsupportedError: a tensor type cannot hold the product.
        """
        fold = self._options.fold
        if fold == "config":
            return []
        if fold == "residual":
            return self._residual(factors)
        return [
            self._edit(tensor, suffix, factors[p.layer], p.layer)
            for p in self.moe.projections
            for suffix, tensor in sorted(p.by_suffix.items(), reverse=True)
            if suffix.lstrip("._") in (("scale", "bias") if fold == "scale" else ("weight", "bias"))
        ]

    def _edit(self, tensor: Tensor, suffix: str, factor: float, layer: Layer) -> TensorEdit:
        kind = BY_NAME[tensor.dtype]
        if factor != 1.0 and kind.refused is not None:
            raise UnsupportedError(
                f"{tensor.name}: is {kind.name}: {kind.refused}", hint=self._instead(factor)
            )
        if kind.kind == "E8M0" and frexp(factor)[0] != 0.5:
            raise UnsupportedError(
                f"{tensor.name}: is {kind.name}, whose scales are powers of two; {factor:.6g} is"
                " not one",
                hint=self._instead(factor),
            )
        role: Role = "bias" if suffix.endswith("bias") else "weight"
        return TensorEdit(tensor, factor, role=role, format=kind.name, layer=layer)

    def _instead(self, factor: float) -> str:
        """Alternatives for weights that cannot hold the factor, as sentences for the user."""
        ways = []
        if self._row.scale_tensor:
            ways.append("--fold scale multiplies by any factor, in a separate tensor.")
        if self._row.scale_key:
            ways.append("--fold config multiplies by any factor, in one key.")
        if self._row.name in _WRITERS:
            ways.append(
                "--fold residual divides everything else that writes to the residual stream."
            )
        return " ".join(ways) or "--factor takes a power of two, such as 2 or 0.5, if one fits."

    def _residual(self, factors: Mapping[Layer, float]) -> list[TensorEdit]:
        """The tensors to divide: all that write to the residual stream, except routed experts.

        Raises:
            UnsupportedError: they are unknown, or one cannot be divided.
        """
        writers = _WRITERS.get(self._row.name)
        names = {tensor.name for tensor in self.tensors}
        if writers is None or "output.weight" not in names:
            why = "the modules that write into its residual stream are not known"
            if writers is not None:
                why = "its embedding is also its output head"
            raise UnsupportedError(
                f"--fold residual cannot be used with {self.moe.model_type!r}: {why}",
                hint=LEAVE_FOLD_OUT,
            )
        divisor = 1 / one_factor(factors, self._options)
        wanted = {"token_embd.weight": Layer("token_embd", 0)}
        for layer in self.moe.layers:
            wanted |= {f"blk.{layer}.{writer}": layer for writer in writers}
        if missing := sorted(n for n in wanted.keys() - names if n.endswith(".weight")):
            raise CheckpointError(f"--fold residual: {missing[0]} is missing")
        found = [(tensor, wanted[tensor.name]) for tensor in self.tensors if tensor.name in wanted]
        return [
            self._edit(tensor, tensor.name.rpartition(".")[2], divisor, layer)
            for tensor, layer in found
        ]

    # Warnings ---------------------------------------------------------------------

    def remarks(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Iterator[str]:
        """Warnings about the planned changes."""
        self._check_folds(factors)
        rounded: dict[str, str] = {}
        for edit in edits:
            kind = BY_NAME[edit.tensor.dtype]
            if kind.weights > 1 and frexp(edit.factor)[0] != 0.5:
                rounded.setdefault(kind.name, _rounding(kind))
        yield from rounded.values()
        if self._options.fold == "scale":
            name = self._row.name
            yield (
                f"--fold scale: the oldest llama.cpp known to use the tensor with {name!r} is"
                f" {llama_cpp.tensor_since(name)}; do not run the output in an older one"
            )
        if experts.after != experts.before:
            yield (
                f"remove --override-kv {self._count_key}=... from start scripts: it overrides the"
                " number of experts that the factors are made for"
            )
        yield from self._room(experts, factors)

    def _check_folds(self, factors: Mapping[Layer, float]) -> None:
        fold, row = self._options.fold, self._row
        known = {"config": row.scale_key, "scale": row.scale_tensor}
        if fold is not None and not known.get(fold, True):
            what = {
                "config": f"multiply by {self.moe.model_type}.expert_weights_scale",
                "scale": f"use blk.N.{SCALE}",
            }
            raise UnsupportedError(
                f"--fold {fold} cannot be used with {self.moe.model_type!r}: llama.cpp does not"
                f" {what[fold]} for it, so the file would load and nothing would change",
                hint=LEAVE_FOLD_OUT,
            )
        if fold == "config":
            one_factor(factors, self._options)

    def _room(self, experts: Experts, factors: Mapping[Layer, float]) -> Iterator[str]:
        """A warning if llama.cpp has no room in its graph for this number of experts."""
        added = {tensor.name for tensor in self._added(factors)}
        names = added.union(tensor.name for tensor in self.tensors)
        most = max_experts_per_token(self._row, self._first, names)
        after = max(experts.after) if isinstance(experts.after, tuple) else experts.after
        if most is not None and after > most:
            counted = self._row.name in GRAPHS
            yield (
                f"the graph that llama.cpp {llama_cpp.RELEASE} builds of this model has room for"
                f" {'' if counted else 'about '}{most} experts per token; with {after} it"
                f" {'aborts' if counted else 'is likely to abort'} with a failed GGML_ASSERT"
            )

    # Files --------------------------------------------------------------

    @property
    def _count_key(self) -> str:
        return self.moe.count_keys[0].key

    def output(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Output:
        """The files of the output."""
        keys = self._keys(factors, experts)
        added = self._added(factors)
        changed = {edit.shard for edit in edits if edit.factor != 1.0}
        if keys or added or changed:
            changed.add(self._parts[0])
        if added:
            changed.update(self._parts)
        rows = [
            PlannedFile(name, self._files[name].size, "rewrite" if name in changed else "copy")
            for name in self._parts
        ]
        if self._published:
            rows.append(PlannedFile(CARD, None, "create"))
        return Output(
            files=tuple(rows),
            keys={**keys, **{tensor.name: tensor.values[0] for tensor in added}},
            provenance_file=self._parts[0],
            last_file=self._parts[0],
            config_overrides=self._in_keys(factors, experts),
            fold_key=self._scale_name if self._row.scale_key else None,
        )

    @property
    def _scale_name(self) -> str:
        return f"{self.moe.model_type}.expert_weights_scale"

    def _in_keys(self, factors: Mapping[Layer, float], experts: Experts) -> ConfigOverrides | None:
        """The alternative: new values for keys of the file instead of its tensors."""
        before, after = experts.before, experts.after
        factor, *others = set(factors.values())
        known = factor == 1.0 or self._row.scale_key
        folded = self._options.fold in ("residual", "scale")
        if others or folded or not known or not isinstance(before, int):
            return None
        counts = [NewValue(self._count_key, before, after)] if after != before else []
        scales = []
        if factor != 1.0:
            scale = self._weights_scale(self._scale_name)
            scales = [NewValue(self._scale_name, scale, scale * factor)]
        return ConfigOverrides(counts, scales, self.moe.model_type) if counts or scales else None

    def _keys(self, factors: Mapping[Layer, float], experts: Experts) -> dict[str, Any]:
        """The keys of the model that change, with their new values."""
        keys: dict[str, Any] = {}
        new = self._options.experts
        if new is not None:
            before = experts.before
            count = tuple(new if n else 0 for n in before) if isinstance(before, tuple) else new
            if count != before:
                keys[self._count_key] = count
        if self._options.fold == "config" and one_factor(factors, self._options) != 1.0:
            scale = self._weights_scale(self._scale_name)
            keys[self._scale_name] = scale * one_factor(factors, self._options)
        return keys

    def _weights_scale(self, name: str) -> float:
        """The model's multiplier of the routed output; 0 means 1."""
        value = self._first.get(name, 1.0)
        if type(value) is not float or not abs(value) < float("inf"):
            raise CheckpointError(f"key {name} is {value!r}, which cannot be multiplied")
        return value or 1.0

    def _added(self, factors: Mapping[Layer, float]) -> list[NewTensor]:
        """The ``.scale`` tensors to add."""
        if self._options.fold != "scale":
            return []
        without = [p for p in self.moe.projections if "scale" not in p.by_suffix]
        return [
            NewTensor(f"{p.module}.scale", (factors[p.layer],) * self.moe.experts_by_layer[p.layer])
            for p in sorted(without, key=lambda p: p.layer)
            if factors[p.layer] != 1.0
        ]

    def completed(self, plan: Plan) -> Plan:
        """The plan with the new headers; that of the first part holds the provenance."""
        if plan.changes_nothing:
            return plan
        new = {t.name for t in self._added(_factors(plan))}
        others = {
            name: self._grown(name, HeaderEdit(set=self._split(name, len(new))))
            for name in self._parts[1:]
            if new
        }
        partly = replace(plan, new_headers=MappingProxyType(others))
        sizes = {f.name: FileRecord(partly.output_size(f)) for f in partly.large_files}
        record = provenance.provenance(partly, sizes)
        name = self._parts[0]
        first = {name: self._grown(name, self._first_edit(plan, record))}
        return replace(plan, new_headers=MappingProxyType({**others, **first}))

    def _first_edit(self, plan: Plan, record: Mapping[str, Any]) -> HeaderEdit:
        """The changes in the header of the first part."""
        added = self._added(_factors(plan))
        names = {tensor.name for tensor in added}
        keys = {name: value for name, value in plan.keys.items() if name not in names}
        existing = self._first.keys
        in_place = {name: value for name, value in keys.items() if name in existing}
        new = {name: (F32, value) for name, value in keys.items() if name not in existing}
        blocks = max(layer.number for layer in self.moe.experts_by_layer) + 1
        return HeaderEdit(
            set={**in_place, **self._split(self._parts[0], len(added))},
            add={**new, **_own_keys(plan, record, blocks)},
            drop=[name for name in existing if name.startswith(_OWN)],
            tensors=added,
        )

    def _split(self, name: str, added: int) -> dict[str, int]:
        """The number of tensors in the whole set, which every part states."""
        keys = self._gguf[name].keys
        return {_SPLIT: keys[_SPLIT].value + added} if added and _SPLIT in keys else {}

    def _grown(self, name: str, edit: HeaderEdit) -> NewHeader:
        header = self._gguf[name]
        found = patches(header, edit)
        more = sum(len(part.data or b"") - (part.stop - part.start) for part in found)
        return NewHeader(found, header.file_size + more)


_WRITERS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {"gpt-oss": ("attn_output.weight", "attn_output.bias")}
)
"""What writes to the residual stream in each layer, except the experts.

Source: ``src/models/openai-moe.cpp`` of llama.cpp.
"""


def _check_options(options: Options) -> None:
    if options.part is not None:
        raise UnsupportedError("--part: a GGUF file has only one MoE", hint="Leave --part out.")
    if options.calibrate is not None or options.rule in ("measured", "fitted"):
        raise UnsupportedError(
            f"--rule {options.rule} runs the model in transformers, so it needs safetensors",
            hint="Run it on the safetensors model, then pass the new moescale.json with --factors.",
        )


def _check_set(headers: Mapping[str, GgufHeader]) -> None:
    """Check a split set.

    Raises:
        SourceError: a file is missing or misnumbered, or a tensor is in two files.
    """
    first, *_ = headers
    stated = headers[first].get("split.count", 0) or 1
    named = part_name(first).count or 1
    if stated != named:
        raise CheckpointError(
            f"{first}: its header says that the set has {stated} files, its name says {named}",
            hint="Restore the original names of the files: NAME-00001-of-00003.gguf.",
        )
    if len(headers) != stated:
        numbers = {part_name(name).number for name in headers}
        missing = min(set(range(1, stated + 1)) - numbers)
        raise SourceError(
            f"{part_name(first).stem}: file {missing} of {stated} is missing",
            hint="Fetch it: every file of a split set is needed.",
        )
    seen: dict[str, str] = {}
    for number, (name, header) in enumerate(headers.items()):
        if stated > 1 and header.get("split.no") != number:
            raise CheckpointError(
                f"{name}: its header says that it is file {header.get('split.no')}, counted from 0"
            )
        for tensor in header.tensors:
            if tensor.name in seen:
                raise CheckpointError(
                    f"{name}: has the tensor {tensor.name!r}, which is also in {seen[tensor.name]}"
                )
            seen[tensor.name] = name
    total = headers[first].get(_SPLIT)
    if stated > 1 and total != len(seen):
        raise CheckpointError(
            f"{first}: its header says that the set has {total} tensors; there are {len(seen)}",
            hint="The files belong to different models.",
        )


def _plain(header: GgufHeader) -> Header:
    """The header with shapes as in other formats: the slowest dimension first."""
    tensors = tuple(
        Tensor(t.name, t.type.name, tuple(reversed(t.shape)), t.start, t.stop)
        for t in header.tensors
    )
    return Header(tensors, header.data_start, header.file_size)


def _rounding(kind: GgmlType) -> str:
    what = {"F16": "F16", "NIBBLES": "F16"}.get(kind.kind, kind.kind)
    return (
        f"the scale of each block of {kind.name} is {what}: multiplying rounds it again, by at"
        f" most {kind.rounding:.2%} (below {_SMALLEST[what]}, where steps are 6e-08, by more)"
    )


_SMALLEST: Final = {"F16": "6.1e-05"}


def _factors(plan: Plan) -> dict[Layer, float]:
    return {Layer("", int(name)): factor for name, factor in plan.factors.items()}


def _own_keys(plan: Plan, record: Mapping[str, Any], blocks: int) -> dict[str, tuple[int, Any]]:
    """The provenance keys of the header; arrays have one number for each block."""

    def by_block(values: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(values.get(str(number), 1.0) for number in range(blocks))

    scales = {f"{_OWN}router_scales": (F64, by_block(plan.router_scales))}
    trained, after = plan.experts.trained, plan.experts.after
    return {
        f"{_OWN}version": (STRING, __version__),
        f"{_OWN}source": (STRING, plan.source.name),
        f"{_OWN}rule": (STRING, plan.rule),
        f"{_OWN}experts": (U32, after),
        f"{_OWN}trained_experts": (U32, trained),
        f"{_OWN}factors": (F64, by_block(plan.factors)),
        **(scales if plan.router_scales else {}),
        KEY: (STRING, json.dumps(record, ensure_ascii=False)),
    }
