"""Edits a header: sets numbers in place, adds and drops keys, adds tensors; all else stays."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moescale.checkpoint.gguf.header import ARRAY, SCALARS, STRING, GgufHeader, Key
from moescale.checkpoint.rewrite import Segment
from moescale.errors import UnsupportedError

U32, F32, F64 = 4, 6, 12
"""The ids of the value types that are written."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A one-dimensional F32 tensor to add.

    Attributes:
        name: its name.
        values: its numbers.
    """

    name: str
    values: tuple[float, ...]

    @property
    def data(self) -> bytes:
        """The values as bytes."""
        return struct.pack(f"<{len(self.values)}f", *self.values)


@dataclass(frozen=True, slots=True)
class HeaderEdit:
    """What changes in the header of one file.

    Attributes:
        set: new values of existing keys, of the same type; for an array, a tuple of all its
            numbers.
        add: new keys, which follow the existing ones, each with type and value.
        drop: keys to remove.
        tensors: new tensors, which follow the existing ones.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    add: Mapping[str, tuple[int, Any]] = field(default_factory=dict)
    drop: Collection[str] = ()
    tensors: Sequence[NewTensor] = ()


def patches(header: GgufHeader, edit: HeaderEdit) -> tuple[Segment, ...]:
    """The replaced and inserted bytes, in file order.

    Raises:
        UnsupportedError: a key to set is not a number, or the new value does not fit its type.
    """
    keys, tensors = len(edit.add) - len(edit.drop), len(edit.tensors)
    counts = struct.pack("<QQ", len(header.tensors) + tensors, len(header.keys) + keys)
    found = [_in_place(header.keys[name], value) for name, value in edit.set.items()]
    found += [Segment(header.keys[n].start, header.keys[n].stop, data=b"") for n in edit.drop]
    at = header.infos_start
    added = b"".join(encode_key(name, *value) for name, value in edit.add.items())
    found.append(Segment(at, at, data=added))
    found.append(Segment(8, 24, data=counts))
    found.sort(key=lambda part: part.start)
    moved = sum(len(part.data or b"") - (part.stop - part.start) for part in found)
    infos, data = _new_tensors(header, edit.tensors)
    end = header.infos_stop + moved + len(infos)
    padding = b"\0" * (-end % header.alignment if header.tensors or infos else 0)
    found.append(Segment(header.infos_stop, header.data_start, data=infos + padding))
    if data:
        found.append(Segment(header.file_size, header.file_size, data=data))
    return tuple(found)


def _in_place(key: Key, value: Any) -> Segment:
    """The segment that replaces a key's value."""
    kind = key.kind if key.kind != ARRAY else key.element
    values = value if isinstance(value, tuple) else (value,)
    if kind is None or kind not in SCALARS or (key.kind == ARRAY and len(values) != key.count):
        raise UnsupportedError(f"key {key.name}: is not a number that can be set")
    try:
        data = struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
    except (struct.error, OverflowError):
        raise UnsupportedError(f"key {key.name}: {value} does not fit its type") from None
    return Segment(key.value_start, key.stop, data=data)


def _new_tensors(header: GgufHeader, tensors: Sequence[NewTensor]) -> tuple[bytes, bytes]:
    """The header entries of new tensors, and the bytes to append to the file."""
    if not tensors:
        return b"", b""
    infos, data = b"", b""
    end = header.tensors[-1].stop if header.tensors else header.data_start
    offset = end - header.data_start + -(end - header.data_start) % header.alignment
    missing = header.data_start + offset - max(header.file_size, header.data_start)
    data += b"\0" * max(0, missing)
    for tensor in tensors:
        infos += _text(tensor.name) + struct.pack("<IQIQ", 1, len(tensor.values), 0, offset)
        padding = -len(tensor.data) % header.alignment
        data += tensor.data + b"\0" * padding
        offset += len(tensor.data) + padding
    return infos, data


def encode_key(name: str, kind: int, value: Any) -> bytes:
    """The entry of one key; a tuple is an array of `kind`."""
    if isinstance(value, tuple):
        numbers = struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
        return _text(name) + struct.pack("<IIQ", ARRAY, kind, len(value)) + numbers
    if kind == STRING:
        return _text(name) + struct.pack("<I", kind) + _text(value)
    return _text(name) + struct.pack(f"<I{SCALARS[kind]}", kind, value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
