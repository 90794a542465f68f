"""Files beside the shards: twins are left out, unlisted shards scaled, all others copied.

A twin holds tensors that the plan scales, under the same names or those of another layout. A file
that can be read is judged by its contents, any other file by its name, folder and size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from moescale.checkpoint.foreign import (
    GGUF_HEAD,
    HEAD,
    TORCH,
    TORCH_HEAD,
    gguf_has_experts,
    torch_names,
    weights_suffix,
)
from moescale.checkpoint.safetensors.index import SINGLE, SUFFIX, check_parts, set_of
from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError, SourceError
from moescale.families.config import CONFIG, parse_config
from moescale.families.find import Moe
from moescale.families.foreign_names import layers_from_names, layers_of
from moescale.families.moe_config import sizes
from moescale.families.projections import Layer
from moescale.planning.shards import ShardSet, read_header, same_weights, two_sets
from moescale.storage.base import SMALL_FILE_BYTES, Source

WHOLE = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot")
"""Suffixes of weights that hold a whole model."""
WEIGHTS = (SUFFIX, *TORCH, *WHOLE)

TWIN_FOLDERS = frozenset({"original", "metal", "onnx", "openvino", "gguf", "coreml"})
"""Folders in which publishers put the same model in another format."""

_MODEL = re.compile(
    r"consolidated.*|ggml-.*|(?:pytorch_|tf_|flax_|rust_|openvino_)?model(?:[-.].*)?\.[a-z0-9]+"
    r"|(?:.*_)?model(?:[-_.].*)?\.onnx(?:_data)?"
)
"""File names of a whole model in another format; contents take precedence if they can be read."""
_CONSOLIDATED = re.compile("consolidated.*")
_NO_TWIN = re.compile(
    r"adapter_model\b|non_lora|mmproj|imatrix|training_args|optim|scheduler|rng_state|random_states"
    r"|scaler",
    re.IGNORECASE,
)
"""Adapters, projectors and leftovers of a training run."""
_STAYS = re.compile(r"\.(?:py|ipynb|sh|md)$|(?:^|/)(?:LICEN[CS]E|NOTICE)[^/]*$", re.IGNORECASE)
"""Code and texts; they are kept even if the weights beside them are left out."""
_RENAMED = re.compile(rf".*(?:{'|'.join(map(re.escape, WEIGHTS))})(?!\.index)[-.~_].*", re.DOTALL)
"""Weights with another suffix appended: ``model.safetensors.bak``."""
_NO_WEIGHTS = re.compile(
    r"\.(?:jsonl?|txt|py|ipynb|sh|md|jinja|model|tiktoken|spm|csv|parquet|html|pdf|png|jpe?g|gif|svg"
    r"|webp|wav|mp[34])$",
    re.IGNORECASE,
)
_LARGE = 1 << 20
"""A file of this size may hold weights, whatever its suffix."""
_INDEX = re.compile(r"(?P<stem>.+)\.(?P<suffix>[a-z0-9]+)\.index(?:\.[^.]+)?\.json")

FORM = "weights in another format, not rescaled"
TWIN = "an unscaled twin: it holds the routed experts too"
LAYOUT = "an unscaled twin: it holds the routed experts under other names"
INDEX = "an index of files that are left out"
EVALUATION = "evaluation results of the source model"
_SIZE_DIVISOR = 32
"""A twin has at least the size of the scaled tensors divided by this: 16 bits in half a bit."""


class FileContents(NamedTuple):
    """The contents of a file that is not among the shards.

    Attributes:
        layers: the layers whose routed experts it holds, by tensor names; None if unreadable.
        same: whether it has scaled tensors, by name and shape.
        other: whether it has those names only with other shapes, as another model would.
        header: the header of a safetensors file with routed experts of further layers.
    """

    layers: frozenset[Layer] | None
    same: bool = False
    other: bool = False
    header: Header | None = None


@dataclass(slots=True)
class ExtraFiles:
    """The decisions on the files beside the shards.

    Attributes:
        unlisted_shards: headers of shards with routed experts that the index does not list.
        left_out: files that do not belong in the output, each with the reason.
        warnings: warnings about files that are copied.
    """

    unlisted_shards: dict[str, Header] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def classify_extra_files(source: Source, found: ShardSet, moe: Moe) -> ExtraFiles:
    """Decide about every file that is not a shard.

    Raises:
        CheckpointError: a file holds routed experts of the model but can neither be scaled with
            the others nor left out, or is part of a second set of weights.
    """
    known = {*found.headers, *found.left_out, found.shards.index, CONFIG}
    names = [name for name in source.files() if name not in known]
    result = ExtraFiles(left_out=dict(found.left_out))
    sizes = {name: file.size for name, file in source.files().items()}
    if weights := [name for name in names if _may_be_weights(name, sizes[name])]:
        _Inspector(source, found, moe, result).decide_all(weights)
    _leave_out_companions(names, result.left_out)
    result.left_out |= {n: EVALUATION for n in names if n.startswith(".eval_results/")}
    result.warnings += _adapters(names)
    return result


def unlisted_shard_name(source: Source, found: ShardSet) -> str | None:
    """A file in the top folder that holds routed experts, but is not among the shards.

    None if there is none. It explains why experts are missing.
    """
    files = source.files()
    names = [n for n in files if n.endswith(SUFFIX) and "/" not in n and n not in found.headers]
    for name in names:
        if _is_no_twin(name) or _is_model(name):
            continue
        try:
            header = read_header(source, files[name])
        except CheckpointError:
            continue
        if layers_from_names(t.name for t in header.tensors):
            return name
    return None


class _Inspector:
    """Inspects sets of files, and adds its decisions to a result."""

    def __init__(self, source: Source, found: ShardSet, moe: Moe, result: ExtraFiles) -> None:
        self._source = source
        self._files = source.files()
        self._found = found
        self._moe = moe
        self._result = result
        self._layers = layers_of(moe.projections)
        self._scaled = {t.name: t for p in moe.projections for t in p.by_suffix.values()}
        self._least = sum(t.nbytes for t in self._scaled.values()) // _SIZE_DIVISOR

    def decide_all(self, names: Iterable[str]) -> None:
        """Inspect all files, several at a time if each read is a request; decide set by set."""
        sets: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            if not _is_no_twin(name):
                sets[set_of(name)].append(name)
        unclear = [n for members in sets.values() if not _is_named(members) for n in members]
        with ThreadPoolExecutor(self._source.parallel_reads) as pool:
            looks = dict(zip(unclear, pool.map(self._look, unclear), strict=True))
        for members in sets.values():
            self._decide({name: looks.get(name, FileContents(None)) for name in members})

    def _decide(self, looks: Mapping[str, FileContents]) -> None:
        if all(look.layers is None for look in looks.values()):
            self._unread(list(looks))
            return
        held = {layer for look in looks.values() for layer in look.layers or ()}
        layers = {layer for layer in held if self._moe.owns(layer)}
        if layers or any(look.same for look in looks.values()):
            self._routed(looks, layers)

    def _unread(self, names: Sequence[str]) -> None:
        """Decide about unreadable files by their names, folders and sizes."""
        first, size = names[0], sum(self._files[name].size for name in names)
        if not first.endswith(WEIGHTS):
            if _RENAMED.fullmatch(first) and size >= self._least:
                self._warn(first, "its tensors cannot be read")
        elif _is_model(first) or (
            _is_placed(first) and size >= self._least and not _is_shard(first)
        ):
            self._result.left_out |= dict.fromkeys(names, FORM)
        elif _is_shard(first) or size >= self._least:
            self._warn(first, "its tensors cannot be read")

    def _routed(self, looks: Mapping[str, FileContents], layers: set[Layer]) -> None:
        """Decide about a set with routed experts: a twin, another model, or unlisted shards."""
        first = next(name for name, look in looks.items() if look.layers or look.same)
        same = any(look.same for look in looks.values())
        shared = layers & self._layers
        whole = self._layers <= layers or (shared and not _is_shard(first))
        other = not same and any(look.other for look in looks.values())
        if other or self._is_other_model(first, same or bool(shared)):
            self._warn(first, "has experts of another model")
        elif whole or (same and shared == layers):
            self._check_single(list(looks))
            self._result.left_out |= dict.fromkeys(looks, TWIN if same else LAYOUT)
        elif not _is_shard(first):
            self._warn(first, f"has routed experts of layer {min(layers)} that are not rescaled")
        elif shared or "/" in first:
            raise _undecided(first, layers - shared or layers)
        else:
            self._join(looks)

    def _warn(self, name: str, why: str) -> None:
        self._result.warnings.append(f"{name}: {why}; it is copied unchanged")

    def _look(self, name: str) -> FileContents:
        try:
            kind = name if name.endswith(WEIGHTS) else weights_suffix(self._head(name, HEAD))
            if kind.endswith(SUFFIX):
                return self._look_at_header(read_header(self._source, self._files[name]))
            if kind.endswith(TORCH):
                texts = torch_names(self._head(name, TORCH_HEAD))
                if texts is None:
                    return FileContents(None)
                return FileContents(
                    frozenset(layers_from_names(texts)), not texts.isdisjoint(self._scaled)
                )
            experts = None
            if kind.endswith(".gguf"):
                experts = gguf_has_experts(self._head(name, GGUF_HEAD))
        except SourceError:  # damaged, or not in the cache, offline
            return FileContents(None)
        return FileContents(None if experts is None else frozenset(self._layers if experts else ()))

    def _head(self, name: str, size: int) -> bytes:
        return self._source.read(name, 0, min(size, self._files[name].size))

    def _look_at_header(self, header: Header) -> FileContents:
        layers = layers_from_names(t.name for t in header.tensors)
        pairs = [(t, self._scaled[t.name]) for t in header.tensors if t.name in self._scaled]
        same = any(_alike(t, mine) for t, mine in pairs)
        joins = header if layers - self._layers else None
        return FileContents(frozenset(layers), same, bool(pairs) and not same, joins)

    def _check_single(self, names: Sequence[str]) -> None:
        """Refuse another complete set beside ``model.safetensors``: loaders choose differently.

        Without an index, some of them read every file.
        """
        counted = _is_shard(names[0]) and set_of(names[0]) != names[0] and "/" not in names[0]
        if not counted or self._found.shards.names != (SINGLE,):
            return
        try:
            check_parts(names)
        except CheckpointError:  # an incomplete set
            return
        headers = {name: read_header(self._source, self._files[name]) for name in names}
        if not same_weights(self._source, self._found.headers, headers):
            raise two_sets(self._source, f"{names[0]} and its set")

    def _join(self, looks: Mapping[str, FileContents]) -> None:
        """Add unlisted shards, without the tensors that other shards have."""
        names = {t.name for header in self._found.headers.values() for t in header.tensors}
        for shard, look in looks.items():
            if (header := look.header) is not None:
                new = tuple(t for t in header.tensors if t.name not in names)
                self._result.unlisted_shards[shard] = header._replace(tensors=new)

    def _is_other_model(self, name: str, alike: bool) -> bool:
        """Whether the folder of a file has its own config; if `alike`, one with other sizes."""
        folder = name.rpartition("/")[0]
        at = f"{folder}/{CONFIG}"
        if not folder or at not in self._files or self._files[at].size > SMALL_FILE_BYTES:
            return False
        if not alike:
            return True
        data = self._source.read(at)
        try:
            other_config = parse_config(data)
        except CheckpointError:
            return False
        expected = self._moe.config.hidden_size, self._moe.config.layers
        return any(
            other not in (None, size) and bool(size)
            for others in sizes(other_config)
            for other, size in zip(others, expected, strict=True)
        )


def _may_be_weights(name: str, size: int) -> bool:
    """Whether a file must be inspected: by its suffix, an earlier suffix, or its size."""
    if name.endswith(WEIGHTS) or _RENAMED.fullmatch(name):
        return True
    return size >= _LARGE and not _NO_WEIGHTS.search(name)


def _is_shard(name: str) -> bool:
    return name.endswith(SUFFIX)


def _is_no_twin(name: str) -> bool:
    return _NO_TWIN.search(name.rpartition("/")[2]) is not None


def _is_placed(name: str) -> bool:
    """Whether the file is in the top folder, or in one for the same model in another format."""
    return "/" not in name or name.partition("/")[0] in TWIN_FOLDERS


def _is_model(name: str) -> bool:
    """Whether folder and name are those of a whole model in another format."""
    file = name.rpartition("/")[2]
    pattern = _CONSOLIDATED if _is_shard(name) else _MODEL
    if name.endswith(".gguf"):
        return _is_placed(name)
    return _is_placed(name) and pattern.fullmatch(file) is not None


def _is_named(names: Sequence[str]) -> bool:
    """Whether its names alone show that a set is a twin, so that it is not read."""
    first = names[0]
    known = _is_shard(first) or first.startswith("consolidated") or set_of(first) != first
    return _is_model(first) and known and first.endswith(WEIGHTS) and not first.endswith(".gguf")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may hold the same values; codes of another format differ in shape."""
    return one.shape == other.shape or one.dtype != other.dtype


def _undecided(name: str, layers: Collection[Layer]) -> CheckpointError:
    return CheckpointError(
        f"{name}: holds routed experts (layer {min(layers)}), but is not among the shards of"
        " the model",
        hint="List it in the index to have it scaled, or move it out of the folder.",
    )


def _leave_out_companions(names: Iterable[str], left_out: dict[str, str]) -> None:
    """Leave out what goes with files that are left out: indexes, and other files in folders."""
    kept = [name for name in names if name not in left_out]
    twins = sorted(left_out)
    weights = [name for name in kept if name.endswith(WEIGHTS) and not _is_no_twin(name)]
    for name in kept:
        if (match := _INDEX.fullmatch(name)) and any(_is_listed(match, twin) for twin in twins):
            left_out[name] = INDEX
        elif not _STAYS.search(name) and (folder := _folder_left_out(name, twins, weights)):
            twin = next(twin for twin in twins if twin.startswith(folder))
            left_out[name] = f"belongs to {twin}, which is left out"


def _is_listed(index: re.Match[str], name: str) -> bool:
    """Whether a file is named like the files of an index."""
    return name.startswith(index["stem"]) and name.endswith("." + index["suffix"])


def _folder_left_out(name: str, twins: Collection[str], weights: Collection[str]) -> str | None:
    """The outermost folder of a file in which all weights are left out; None if there is none."""
    for slash in re.finditer("/", name):
        folder = name[: slash.end()]
        lost = any(twin.startswith(folder) for twin in twins)
        if lost and not any(other.startswith(folder) for other in weights):
            return folder
    return None


def _adapters(names: Collection[str]) -> Iterator[str]:
    config, weights = "adapter_config.json", [n for n in names if n.startswith("adapter_model.")]
    if config in names and weights:
        yield (
            f"{weights[0]}: is an adapter beside the model; it is copied with {config}, but not"
            " rescaled"
        )
