"""Decodes the header of a GGUF file: keys and tensors; as strict as llama.cpp.

Layout, little-endian: ``GGUF``, u32 version, u64 numbers of tensors and of keys; the keys; the
tensors' names, shapes, types and offsets; then, at the next multiple of the alignment, their data,
each padded to the alignment. Source: ``ggml/src/gguf.cpp`` (``gguf_init_from_reader``) of llama.cpp
0.5.0.

Large arrays, such as a vocabulary, are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moescale.checkpoint.foreign import placeholder
from moescale.checkpoint.gguf.types import BY_NUMBER, REMOVED, GgmlType
from moescale.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 30
"""A longer header is refused; the largest known one has 12 MB."""
ALIGNMENT = "general.alignment"

_MOST = 1 << 30
"""The maximum number of bytes of a string, and of elements of an array; as in llama.cpp."""
_NAME_BYTES = 64
_DIMENSIONS = 4
_AHEAD, _MOST_AHEAD = 1 << 18, 1 << 22
"""Bytes to read ahead, at first and at most: on the Hub, each read is a request."""

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    BOOL: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""The `struct` format of each value type except strings and arrays."""

Read = Callable[[int, int], bytes]
"""Reads bytes of a file, given the offset and their number; returns fewer at its end."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the header.

    Attributes:
        name: with its prefix, as in ``general.alignment``.
        kind: the type of the value; `ARRAY` for an array.
        value: a number, a bool or a string; for an array of at most `KEPT` numbers, a tuple; None
            for any other array.
        start: offset of the entry in the file.
        value_start: offset of the value; for an array, of its first element.
        stop: offset of the end of the entry.
        element: the type of an array's elements; None if the value is not an array.
        count: the number of an array's elements; None if the value is not an array.
    """

    name: str
    kind: int
    value: Any
    start: int
    value_start: int
    stop: int
    element: int | None = None
    count: int | None = None


KEPT = 4_096
"""Arrays of at most this many numbers are kept: some keys have one number per layer."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: as in the header.
        type: the type of its weights.
        shape: the fastest dimension first.
        start: offset of its data in the file.
        nbytes: size of its data in bytes, without padding.
        info: start and stop of its entry in the header, as offsets in the file.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    start: int
    nbytes: int
    info: tuple[int, int]

    @property
    def stop(self) -> int:
        """Offset of the end of its data."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A decoded header; keys and tensors are in file order.

    Attributes:
        version: the version of the format.
        keys: by name.
        tensors: all tensors of the file.
        alignment: the data of every tensor starts at a multiple of this, in bytes.
        infos_start: offset of the first tensor's entry, where the keys end.
        infos_stop: offset of the end of the last tensor's entry.
        data_start: offset of the first tensor's data; `infos_stop` without tensors.
        file_size: size of the whole file in bytes.
    """

    version: int
    keys: Mapping[str, Key]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    infos_start: int
    infos_stop: int
    data_start: int
    file_size: int

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; `default` if there is none."""
        key = self.keys.get(name)
        return default if key is None else key.value


def parse_header(read: Read, file_size: int, where: str) -> GgufHeader:
    """Read and check a header.

    Raises:
        CheckpointError: llama.cpp would reject the file, or its header is implausibly long.
    """
    cursor = _Cursor(read, file_size, where)
    version, tensor_count, key_count = _head(cursor)
    keys: dict[str, Key] = {}
    for _ in range(key_count):
        key = _key(cursor)
        if not key.name or key.name in keys:
            raise cursor.bad(f"has the key {key.name!r} twice" if key.name else "has an empty key")
        keys[key.name] = key
    alignment = _alignment(keys, cursor)
    infos_start = cursor.position
    infos = [_info(cursor) for _ in range(tensor_count)]
    infos_stop = cursor.position
    data_start = infos_stop + -infos_stop % alignment if infos else infos_stop
    tensors = _placed(infos, data_start, alignment, cursor)
    return GgufHeader(
        version, keys, tensors, alignment, infos_start, infos_stop, data_start, file_size
    )


class _Cursor:
    """Reads the header sequentially, and buffers what was read ahead."""

    def __init__(self, read: Read, file_size: int, where: str) -> None:
        self._read, self.file_size, self.where = read, file_size, where
        self.position = 0
        self._data, self._start = b"", 0
        self._ahead = _AHEAD

    def bad(self, why: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.where}: {why}", hint=hint)

    def peek(self, size: int) -> tuple[bytes, int]:
        """A buffer, and the position in it of the next `size` bytes."""
        at = self.position - self._start
        if at + size > len(self._data):
            self._fill(size)
            at = 0
        return self._data, at

    def _fill(self, size: int) -> None:
        if size > self.left:
            raise self.bad(
                "ends within its header", "The file is truncated or damaged; fetch it again."
            )
        if self.position + size > MAX_HEADER_BYTES:
            raise self.bad(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
        ahead = min(max(size, self._ahead), self.left)
        self._ahead = min(2 * self._ahead, _MOST_AHEAD)
        self._data, self._start = self._read(self.position, ahead), self.position
        if len(self._data) < size:
            raise self.bad(
                "ends within its header", "The file is truncated or damaged; fetch it again."
            )

    @property
    def left(self) -> int:
        return self.file_size - self.position

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        data, at = self.peek(form.size)
        self.position += form.size
        return form.unpack_from(data, at)

    def number(self, code: str) -> Any:
        return self.take(_STRUCTS[code])[0]

    def string(self) -> str:
        size = self.number("Q")
        if size > min(_MOST, self.left):
            raise self.bad(f"claims a string of {size:,} bytes")
        data, at = self.peek(size)
        self.position += size
        return data[at : at + size].decode("utf-8", "surrogateescape")

    def skip(self, size: int) -> None:
        """Move on without reading."""
        if size > self.left:
            raise self.bad(
                "ends within its header", "The file is truncated or damaged; fetch it again."
            )
        self.position += size
        if self.position > MAX_HEADER_BYTES:
            raise self.bad(f"its header has more than {MAX_HEADER_BYTES:,} bytes")

    def skip_strings(self, count: int) -> None:
        """Skip many strings, with little work for each."""
        unpack = _STRUCTS["Q"].unpack_from
        while count:
            data, at = self.peek(8)
            end, first = len(data) - 8, at
            while count and at <= end:
                at += 8 + unpack(data, at)[0]
                count -= 1
            self.skip(at - first)


_STRUCTS = {code: struct.Struct("<" + code) for code in SCALARS.values()}
_HEAD = struct.Struct("<4sIQQ")


def _head(cursor: _Cursor) -> tuple[int, int, int]:
    if cursor.file_size < _HEAD.size:
        raise cursor.bad(f"{cursor.file_size} bytes are too few for a GGUF file")
    head, at = cursor.peek(_HEAD.size)
    magic, version, tensors, keys = cursor.take(_HEAD)
    if magic != MAGIC:
        raise cursor.bad(*(placeholder(head[at : at + 64]) or ("is not a GGUF file", None)))
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise cursor.bad("is big-endian; only little-endian files are supported")
        raise cursor.bad(f"is GGUF version {version}; only 2 and 3 are supported")
    # The entry of a tensor has at least 24 bytes, that of a key at least 13.
    if tensors * 24 + keys * 13 > cursor.left:
        raise cursor.bad(f"claims {tensors:,} tensors and {keys:,} keys, more than it has room for")
    return version, tensors, keys


def _key(cursor: _Cursor) -> Key:
    start = cursor.position
    name, kind = cursor.string(), cursor.number("I")
    if kind == ARRAY:
        return _array(cursor, name, start)
    at = cursor.position
    if kind == STRING:
        value: Any = cursor.string()
    elif kind in SCALARS:
        value = cursor.number(SCALARS[kind])
    else:
        raise cursor.bad(f"key {name!r} has the unknown type {kind}")
    return Key(name, kind, value, start, at, cursor.position)


def _array(cursor: _Cursor, name: str, start: int) -> Key:
    element, count = cursor.number("I"), cursor.number("Q")
    at, value = cursor.position, None
    if element == STRING:
        if count > _MOST or count * 8 > cursor.left:
            raise cursor.bad(f"key {name!r} claims {count:,} strings")
        cursor.skip_strings(count)
    elif element in SCALARS:
        form = struct.Struct(f"<{SCALARS[element]}")
        if count > _MOST or count * form.size > cursor.left:
            raise cursor.bad(f"key {name!r} claims {count:,} numbers")
        if count <= KEPT:
            value = cursor.take(struct.Struct(f"<{count}{SCALARS[element]}"))
        else:
            cursor.skip(count * form.size)
    else:
        raise cursor.bad(f"key {name!r} is an array of the unknown type {element}")
    return Key(name, ARRAY, value, start, at, cursor.position, element, count)


def _alignment(keys: Mapping[str, Key], cursor: _Cursor) -> int:
    key = keys.get(ALIGNMENT)
    if key is None:
        return 32
    if key.kind != 4:
        raise cursor.bad(f"{ALIGNMENT} is not an unsigned 32-bit number")
    alignment = int(key.value)
    if not alignment or alignment & (alignment - 1):
        raise cursor.bad(f"{ALIGNMENT} is {alignment}, not a power of two")
    return alignment


_Info = tuple[str, GgmlType, tuple[int, ...], int, int, int]


def _info(cursor: _Cursor) -> _Info:
    start = cursor.position
    name = cursor.string()
    if len(name.encode("utf-8", "surrogateescape")) >= _NAME_BYTES:
        raise cursor.bad(f"tensor {name[:80]!r}: its name has {_NAME_BYTES} bytes or more")
    dimensions = cursor.number("I")
    if dimensions > _DIMENSIONS:
        raise cursor.bad(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.number("q") for _ in range(dimensions))
    number, offset = cursor.number("I"), cursor.number("Q")
    kind = _type(number, name, cursor)
    if any(size < 0 for size in shape) or (shape[0] if shape else 1) % kind.weights:
        raise cursor.bad(f"tensor {name!r}: the shape {list(shape)} is not possible in {kind.name}")
    return name, kind, shape, offset, start, cursor.position


def _type(number: int, name: str, cursor: _Cursor) -> GgmlType:
    if number in BY_NUMBER:
        return BY_NUMBER[number]
    if number in REMOVED:
        raise cursor.bad(f"tensor {name!r} has the type {REMOVED[number]}, which was removed")
    raise cursor.bad(
        f"tensor {name!r} has the type {number}, which llama.cpp does not have",
        "It may be a type of a fork (ik_llama.cpp).",
    )


def _placed(
    infos: list[_Info], data_start: int, alignment: int, cursor: _Cursor
) -> tuple[GgufTensor, ...]:
    """The tensors with their offsets; each must follow the one before it, without holes."""
    tensors, names, expected = [], set[str](), 0
    for name, kind, shape, offset, start, stop in infos:
        if name in names:
            raise cursor.bad(f"has the tensor {name!r} twice")
        names.add(name)
        if offset != expected:
            raise cursor.bad(f"tensor {name!r} has offset {offset:,}, expected {expected:,}")
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements // kind.weights * kind.size
        if data_start + offset + nbytes > cursor.file_size:
            raise cursor.bad(
                f"tensor {name!r} ends beyond the end of the file",
                "The file is truncated or damaged; fetch it again.",
            )
        tensors.append(GgufTensor(name, kind, shape, data_start + offset, nbytes, (start, stop)))
        expected += nbytes + -nbytes % alignment
    return tuple(tensors)
