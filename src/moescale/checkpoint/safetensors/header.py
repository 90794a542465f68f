"""Decodes the header of a shard: names, dtypes, shapes and offsets; as strict as safetensors.

Layout of a file: 8 bytes with the length N of the header (unsigned, little-endian), N bytes of
JSON, then the tensors without holes. Source: the format's description and the checks of
safetensors 0.8 (`SafeTensors::read_metadata`, `Metadata::validate`).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

from moescale.checkpoint.dtypes import BITS
from moescale.checkpoint.foreign import placeholder
from moescale.checkpoint.json_text import parse_strict
from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""A longer header is refused, as in safetensors."""

_U64 = 1 << 64
_OTHERS = (
    (b"PK\x03\x04", "a zip file, such as torch.save writes"),
    (b"GGUF", "a GGUF file"),
    (b"\x80\x02", "a pickle, such as torch.save writes"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\x89HDF", "an HDF5 file"),
)
"""First bytes of files in other formats that may be named like a shard."""
_CUT = "The file is truncated or has extra bytes at its end; fetch it again."
_WRONG = "Not a valid safetensors file; write it again with the program that made it."
_FIELDS = {"dtype", "shape", "data_offsets"}


def header_length(first: bytes, file_size: int, where: str) -> int:
    """The number of header bytes that follow the first eight, checked before they are read.

    Raises:
        CheckpointError: the file is too short, or the length is impossible.
    """
    if file_size < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise _bad(where, f"{file_size} bytes are too few for a safetensors file", _CUT)
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > min(file_size - LENGTH_BYTES, MAX_HEADER_BYTES):
        if (found := placeholder(first)) is not None:
            raise _bad(where, *found)
        kind = next((kind for start, kind in _OTHERS if first.startswith(start)), None)
        if kind is not None:
            raise _bad(where, f"is {kind}, despite its name", "Convert it to safetensors.")
    if length > file_size - LENGTH_BYTES:
        raise _bad(where, f"the header claims {length} bytes, but the file has {file_size}", _CUT)
    if length > MAX_HEADER_BYTES:
        raise _bad(
            where,
            f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that"
            " safetensors reads",
            "No loader accepts this file: save the model in more shards.",
        )
    return length


def parse_header(data: bytes, file_size: int, where: str) -> Header:
    """Decode and check the header.

    Args:
        data: the header's JSON, without the eight bytes of its length.
        file_size: size of the whole file in bytes.
        where: the file's name, for errors.

    Raises:
        CheckpointError: safetensors would reject the file; or a name is duplicated or a field is
            unknown, which safetensors accepts.
    """
    entries = _decode(data, where)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None:
        _check_metadata(metadata, where)
    data_start = LENGTH_BYTES + len(data)
    tensors = [_tensor(name, entry, data_start, where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_contiguous(tensors, data_start, file_size, where)
    return Header(tuple(tensors), data_start, file_size)


def _decode(data: bytes, where: str) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _bad(where, f"the header is not UTF-8 ({error.reason} at {error.start})") from None
    try:
        entries = parse_strict(text)
    except ValueError as error:
        raise _bad(where, f"the header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise _bad(where, "the header is not a JSON object")
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(where, "__metadata__ is not a mapping from strings to strings")


def _tensor(name: str, entry: Any, data_start: int, where: str) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(where, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        shown = repr(dtype) if isinstance(dtype, str) else "(not a string)"
        raise _bad(where, f"tensor {name!r} has the unknown dtype {shown}")
    if not _is_sizes(shape):
        raise _bad(where, f"tensor {name!r} has a shape that is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _bad(where, f"tensor {name!r} has data_offsets that are not two offsets")
    for size in shape:
        bits *= size
        if bits >= _U64:
            raise _bad(where, f"tensor {name!r} has a shape too large to address")
    start, stop = offsets
    if stop < start or (stop - start) * 8 != bits:
        raise _bad(
            where,
            f"tensor {name!r} of dtype {dtype} and shape {shape} needs {bits / 8:g} bytes,"
            f" but its data_offsets [{start}, {stop}] hold {stop - start}",
        )
    return Tensor(
        name, sys.intern(dtype), _same_shape(tuple(shape)), data_start + start, data_start + stop
    )


@functools.lru_cache(maxsize=1024)
def _same_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for all equal shapes: a checkpoint has many tensors but few shapes."""
    return shape


def _is_sizes(value: Any) -> bool:
    return type(value) is list and all(type(v) is int and 0 <= v < _U64 for v in value)


def _check_contiguous(tensors: list[Tensor], data_start: int, file_size: int, where: str) -> None:
    """Refuse tensors that do not fill the file: each must start where the previous one ends."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            fault = "overlaps the tensor before it" if tensor.start < position else "follows a hole"
            raise _bad(where, f"the data of tensor {tensor.name!r} {fault}")
        position = tensor.stop
    if position != file_size:
        raise _bad(
            where,
            f"the header describes {position} bytes, but the file has {file_size}",
            hint=_CUT,
        )


def _bad(where: str, why: str, hint: str = _WRONG) -> CheckpointError:
    return CheckpointError(f"{where}: {why}", hint=hint)


def relaid_header(data: bytes, promoted: Mapping[str, str]) -> bytes:
    """The header, with its length, of a shard that stores some tensors in another dtype.

    Entries keep their order; dtypes and offsets change. Spaces pad the text to a multiple of eight
    bytes, as in safetensors.

    Args:
        data: the old header's JSON.
        promoted: new dtypes, by tensor name.
    """
    entries: dict[str, Any] = json.loads(data)
    tensors = [(name, e) for name, e in entries.items() if name != "__metadata__"]
    position = 0
    for name, entry in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
        old, start = entry["dtype"], position
        first, last = entry["data_offsets"]
        entry["dtype"] = promoted.get(name, old)
        position += (last - first) * BITS[entry["dtype"]] // BITS[old]
        entry["data_offsets"] = [start, position]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
