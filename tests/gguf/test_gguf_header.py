"""GGUF headers: read as the gguf library writes them, refused as llama.cpp does."""

from __future__ import annotations

import itertools
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gguf_models import finish

from moescale.checkpoint.gguf import types
from moescale.checkpoint.gguf.header import GgufHeader, parse_header
from moescale.errors import CheckpointError


def parse(data: bytes) -> GgufHeader:
    """Parse a file in memory."""
    return parse_header(lambda start, size: data[start : start + size], len(data), "m.gguf")


def written(path: Path, fill: Callable[[gguf.GGUFWriter], None]) -> bytes:
    """A file of the architecture ``llama``, written by PyPI's gguf."""
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    finish(writer)
    return path.read_bytes()


def usual(writer: gguf.GGUFWriter) -> None:
    """Add keys of every kind, and tensors of three types."""
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("llama.expert_used_count", 2)
    writer.add_int32("a.i32", -70_000)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve")
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 60))
    writer.add_float64("a.f64", 0.1)
    writer.add_array("a.words", ["one", "", "three"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.many", list(range(5_000)))
    writer.add_tensor("x", np.arange(10, dtype=np.float32).reshape(2, 5))
    writer.add_tensor("y", np.arange(6, dtype=np.float16).reshape(1, 2, 3))
    blocks = np.zeros((2, 3 * 18), np.uint8)
    writer.add_tensor("z", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def test_keys_and_tensors_are_those_that_the_library_wrote(tmp_path: Path) -> None:
    """Values of every type are read, and every tensor's bytes are where its entry says."""
    data = written(tmp_path / "m.gguf", usual)
    header = parse(data)
    assert header.version == 3
    assert header.get("general.architecture") == "llama"
    expected = {
        "a.u8": 200,
        "a.i8": -3,
        "a.u16": 60_000,
        "a.i16": -300,
        "llama.expert_used_count": 2,
        "a.i32": -70_000,
        "a.f32": 0.5,
        "a.bool": True,
        "a.string": "naïve",
        "a.u64": 1 << 63,
        "a.i64": -(1 << 60),
        "a.f64": 0.1,
        "a.numbers": (1, 2, 3),
    }
    assert {name: header.get(name) for name in expected} == expected
    assert (header.keys["a.words"].count, header.keys["a.words"].value) == (3, None)
    assert (header.keys["a.many"].count, header.keys["a.many"].value) == (5_000, None)
    x, y, z = header.tensors
    assert (x.name, x.type.name, x.shape) == ("x", "F32", (5, 2))
    assert np.array_equal(np.frombuffer(data[x.start : x.stop], "<f4"), np.arange(10))
    assert (y.type.name, y.shape, y.nbytes) == ("F16", (3, 2, 1), 12)
    assert (z.type.name, z.shape, z.nbytes) == ("Q4_0", (96, 2), 108)


def test_the_file_is_the_header_and_what_it_says(tmp_path: Path) -> None:
    """Keys, tensor entries and data follow each other, with only padding between them."""
    data = written(tmp_path / "m.gguf", usual)
    header = parse(data)
    keys = list(header.keys.values())
    assert keys[0].start == 24
    assert all(one.stop == other.start for one, other in itertools.pairwise(keys))
    assert keys[-1].stop == header.infos_start == header.tensors[0].info[0]
    assert header.tensors[-1].info[1] == header.infos_stop
    assert header.data_start == header.tensors[0].start
    assert not any(data[header.infos_stop : header.data_start])


def test_a_key_for_the_alignment_counts(tmp_path: Path) -> None:
    """The data and each tensor start at a multiple of the alignment."""

    def aligned(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(256)
        writer.add_tensor("x", np.ones(3, np.float32))
        writer.add_tensor("y", np.ones(3, np.float32))

    header = parse(written(tmp_path / "m.gguf", aligned))
    assert header.alignment == 256
    assert [t.start % 256 for t in header.tensors] == [0, 0]


def test_every_type_of_the_library_is_in_the_table() -> None:
    """Numbers, names and block sizes are those of PyPI's gguf."""
    for number, (weights, size) in gguf.GGML_QUANT_SIZES.items():
        row = types.BY_NUMBER[int(number)]
        if row.name == "Q8_1":  # the library has an outdated structure; no file uses the type
            continue
        assert (row.name, row.weights, row.size) == (number.name, weights, size)


# Hostile ------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    """A string as the format stores it."""
    return struct.pack("<Q", len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    """The entry of a key."""
    return string(name) + struct.pack("<I", kind) + value


def info(
    name: bytes = b"x", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    """The entry of a tensor."""
    sizes = struct.pack(f"<I{len(shape)}q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def file(
    keys: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file with these entries and this number of data bytes."""
    tensors, count = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, count)
    whole = head + b"".join(keys) + b"".join(infos)
    return whole + bytes(-len(whole) % 32) + bytes(data)


NUMBER = struct.pack("<I", 1)
BROKEN: dict[str, tuple[bytes, str]] = {
    "another file": (b"\x80\x02ckpt" + bytes(40), "is not a GGUF file"),
    "too short": (b"GGUF", "too few"),
    "a pointer": (b"version https://git-lfs" + bytes(40), "is a Git LFS pointer"),
    "version 1": (file(version=1), "version 1"),
    "version 4": (file(version=4), "version 4"),
    "big-endian": (file(version=0x03000000), "big-endian"),
    "counts": (file(counts=(1 << 60, 0)), "more than it has room for"),
    "counts of keys": (file(counts=(0, 1 << 62)), "more than it has room for"),
    "an empty key": (file((key(b"", 4, NUMBER),)), "empty key"),
    "a key twice": (file((key(b"a", 4, NUMBER),) * 2), "'a' twice"),
    "an unknown type": (file((key(b"a", 13, NUMBER),)), "unknown type 13"),
    "an array of arrays": (
        file((key(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(16)),)),
        "unknown type 9",
    ),
    "a long string": (file((key(b"a", 8, struct.pack("<Q", 1 << 40)),)), "claims a string"),
    "a long array": (
        file((key(b"a", 9, struct.pack("<IQ", 0, 1 << 40)),)),
        "claims 1,099,511,627,776 numbers",
    ),
    "many strings": (
        file((key(b"a", 9, struct.pack("<IQ", 8, 1 << 29)),)),
        "claims 536,870,912 strings",
    ),
    "strings that end": (
        file((key(b"a", 9, struct.pack("<IQQ", 8, 2, 1 << 50)),), data=64),
        "ends within its header",
    ),
    "alignment as u64": (
        file((key(b"general.alignment", 10, struct.pack("<Q", 32)),)),
        "not an unsigned 32-bit number",
    ),
    "alignment 0": (file((key(b"general.alignment", 4, struct.pack("<I", 0)),)), "power of two"),
    "alignment 48": (file((key(b"general.alignment", 4, struct.pack("<I", 48)),)), "power of two"),
    "a long name": (file(infos=(info(b"x" * 64),), data=32), "64 bytes or more"),
    "five dimensions": (file(infos=(info(shape=(1,) * 5),), data=32), "5 dimensions"),
    "a negative size": (file(infos=(info(shape=(-4,)),), data=32), "not possible"),
    "half a block": (file(infos=(info(shape=(16,), kind=2),), data=64), "not possible in Q4_0"),
    "a removed type": (file(infos=(info(kind=31),), data=64), "Q4_0_4_4, which was removed"),
    "a fork's type": (file(infos=(info(kind=144),), data=64), "144, which llama.cpp does not have"),
    "a hole": (file(infos=(info(offset=32),), data=96), "offset 32, expected 0"),
    "an overlap": (file(infos=(info(), info(b"y", offset=0)), data=64), "expected 32"),
    "a tensor twice": (file(infos=(info(), info(offset=32)), data=64), "'x' twice"),
    "data that end": (
        file(infos=(info(shape=(1 << 40,)),), data=64),
        "ends beyond the end of the file",
    ),
    "a size beyond 64 bits": (
        file(infos=(info(shape=(1 << 62, 1 << 62, 4)),), data=64),
        "ends beyond the end of the file",
    ),
    "a header that ends": (file((key(b"a", 4, b""),))[:40], "ends within its header"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_llama_cpp_rejects_is_refused_in_one_line(name: str) -> None:
    """The error names the file and the defect."""
    data, why = BROKEN[name]
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    assert caught.value.message.startswith("m.gguf: ")
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_the_builder_of_broken_files_builds_good_ones(tmp_path: Path) -> None:
    """Both readers accept its files if they have no defect."""
    data = file((key(b"general.architecture", 8, string(b"llama")),), (info(),), data=32)
    header = parse(data)
    assert [t.name for t in header.tensors] == ["x"]
    (tmp_path / "m.gguf").write_bytes(data)
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].name == "x"


@given(st.data())
def test_damage_gives_a_header_or_one_line(data: Any) -> None:
    """Whatever bytes change, no other exception is raised."""
    keys = (
        key(b"general.architecture", 8, string(b"llama")),
        key(b"words", 9, struct.pack("<IQ", 8, 2) + string(b"a") + string(b"bc")),
        key(b"numbers", 9, struct.pack("<IQ2I", 4, 2, 1, 2)),
        key(b"general.alignment", 4, struct.pack("<I", 64)),
    )
    whole = bytearray(file(keys, (info(), info(b"y", (32, 2), 2, 64)), data=256))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 257))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for damaged in (bytes(whole), bytes(whole[:cut])):
            try:
                parse(damaged)
            except CheckpointError as error:
                assert "\n" not in error.message
