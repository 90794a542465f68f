"""The header codec, compared with the safetensors library."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.properties import NAME, header_holds, parse, with_header

from moescale.checkpoint.dtypes import BITS
from moescale.checkpoint.safetensors.header import header_length
from moescale.errors import CheckpointError


def entry(**changes: Any) -> dict[str, Any]:
    """A four-byte tensor with some fields changed."""
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}


def refused(file: bytes) -> str:
    """The one-line error with which a file is refused; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        parse(file)
    message = caught.value.message
    assert message.startswith(f"{NAME}: ")
    assert len(message.splitlines()) == 1
    return message


# Valid headers ------------------------------------------------------------------------------------


def test_reads_what_safetensors_wrote() -> None:
    """Names, dtypes, shapes and offsets are those of the library."""
    a = np.frombuffer(bytes(range(6)), ml_dtypes.bfloat16)
    arrays = {
        "b": np.ones((2, 3), np.float32),
        "a": a,
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 7), np.uint8),
    }
    file = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    header = parse(file)
    assert header.file_size == len(file)
    assert header.by_name["a"].shape == (3,)
    assert header.by_name["a"].dtype == "BF16"
    assert file[header.by_name["a"].start : header.by_name["a"].stop] == a.tobytes()
    header_holds(file)


def test_refuses_what_safe_open_cannot_open(tmp_path: Path) -> None:
    """The library's file reader is as strict as its bytes reader, and ours is too."""
    whole = checkpoints.shard({"x": ("U8", (4,), b"abcd")})
    for file in (whole[:-1], whole + b"x", whole[:5], b"\xff" * 20):
        (tmp_path / NAME).write_bytes(file)
        with pytest.raises((safetensors.SafetensorError, OSError)):
            safetensors.safe_open(tmp_path / NAME, "np")
        refused(file)


def test_tensors_come_in_the_order_of_their_data() -> None:
    """The order of the entries in the JSON does not matter."""
    entries = {"late": entry(data_offsets=[4, 8]), "early": entry()}
    assert list(parse(with_header(json.dumps(entries), bytes(8))).by_name) == ["early", "late"]


def test_data_starts_after_the_header() -> None:
    """Offsets are positions in the file, and sizes are those of the data."""
    file = checkpoints.shard({"x": ("U8", (4,), b"abcd")})
    tensor = parse(file).by_name["x"]
    assert file[tensor.start : tensor.stop] == b"abcd"
    assert tensor.nbytes == 4


@pytest.mark.parametrize("dtype", BITS)
def test_takes_every_dtype_of_safetensors(dtype: str) -> None:
    """The table of dtypes has the library's sizes."""
    size = BITS[dtype]
    file = with_header(json.dumps({"x": entry(dtype=dtype, shape=[8], data_offsets=[0, size])}))
    file += bytes(size)
    assert [name for name, _ in safetensors.deserialize(file)] == ["x"]
    assert parse(file).by_name["x"].nbytes == size


@pytest.mark.parametrize("text", ["{}", " {}\n", '{"__metadata__":null}', '{"__metadata__":{}}'])
def test_takes_a_file_without_tensors(text: str) -> None:
    """A file without tensors is valid, for the library too."""
    safetensors.deserialize(with_header(text))
    assert not parse(with_header(text)).tensors


# One error for each kind of fault -----------------------------------------------------------------


@pytest.mark.parametrize("file", [b"", b"\0" * 7])
def test_refuses_a_file_without_a_length(file: bytes) -> None:
    """A file of fewer than eight bytes is not a safetensors file."""
    assert "too few" in refused(file)


@pytest.mark.parametrize("length", [3, 1 << 20, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_refuses_a_length_that_cannot_be_true(length: int) -> None:
    """A header longer than the file, or than any header may be, is refused before it is read."""
    assert "claims" in refused(struct.pack("<Q", length) + b"{}")


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"PK\x03\x04\x14\0\x08\x08", "a zip file"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x80\x02\x8a\nl\xfc\x9c\x46", "a pickle"),
    ],
)
def test_a_file_of_another_kind_is_called_so(begin: bytes, kind: str) -> None:
    """The error does not suggest a new download: the file was only renamed."""
    with pytest.raises(CheckpointError, match=f"is {kind}.*despite its name") as caught:
        header_length(begin, 1 << 20, "file")
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("length", [0x280, 0x04034B50, 0x213C, 0x213C20])
def test_a_length_may_look_like_another_kind(length: int) -> None:
    """Lengths may begin like a pickle, a zip or a web page; the file's size tells them apart."""
    assert header_length(struct.pack("<Q", length), 1 << 30, "file") == length


def test_refuses_a_header_over_the_limit_of_the_format() -> None:
    """The file is not damaged: the error gives the limit, since a new download would not help."""
    with pytest.raises(CheckpointError, match=r"100,000,001 .* 100,000,000 that") as caught:
        header_length(struct.pack("<Q", 100_000_001), 1 << 30, "x.safetensors")
    assert "in more shards" in str(caught.value)
    assert "fetch" not in str(caught.value)


JSON_FAULTS = {
    "": "not valid JSON",
    "{": "not valid JSON",
    "{}x": "not valid JSON",
    "{'a':1}": "not valid JSON",
    "\ufeff{}": "not valid JSON",
    "{}\0": "not valid JSON",
    '{"a":NaN}': "NaN",
    '{"a":Infinity}': "Infinity",
    '{"a":-Infinity}': "-Infinity",
    '{"\\ud800":1}': "surrogate",
    '{"\\udc00\\ud800":1}': "surrogate",
    '{"a\nb":1}': "not valid JSON",
    "[]": "not a JSON object",
    "1": "not a JSON object",
    "null": "not a JSON object",
    '{"__metadata__":{"a":1}}': "__metadata__",
    '{"__metadata__":["a"]}': "__metadata__",
    '{"__metadata__":{"a":null}}': "__metadata__",
    '{"a":null}': "needs exactly",
    '{"a":[]}': "needs exactly",
    '{"a":{"dtype":"U8","shape":[0]}}': "needs exactly",
    '{"a":' + "9" * 5000 + "}": "not valid JSON",
}


@pytest.mark.parametrize(("text", "why"), JSON_FAULTS.items())
def test_refuses_broken_json(text: str, why: str) -> None:
    """A header that is not valid JSON is refused with the reason, by the library too."""
    file = with_header(text)
    assert why in refused(file)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)


def test_refuses_bytes_that_are_no_text() -> None:
    """A header that is not UTF-8 is refused."""
    assert "UTF-8" in refused(with_header(b'{"a\xff":1}'))


@pytest.mark.parametrize("depth", [200, 900, 5_000, 100_000])
@pytest.mark.parametrize("opener", ["[", '{"a":'])
def test_refuses_deep_nesting(opener: str, depth: int) -> None:
    """Nesting of any depth is a fault of the file, not a crash."""
    refused(with_header('{"x":' + opener * depth))


def test_refuses_a_deeply_nested_dtype() -> None:
    """A value that is just shallow enough to parse can also be reported."""
    for depth in range(100, 1100, 7):
        nested = "[" * depth + "]" * depth
        refused(with_header(f'{{"x":{{"dtype":{nested},"shape":[0],"data_offsets":[0,0]}}}}'))


def test_refuses_duplicate_names() -> None:
    """A tensor described twice is refused, since readers differ in which entry they use."""
    one = json.dumps(entry(shape=[0], data_offsets=[0, 0]))
    assert "'a' occurs twice" in refused(with_header(f'{{"a":{one},"a":{one}}}'))


def test_refuses_unknown_fields() -> None:
    """An unknown field may change what the data mean."""
    assert "needs exactly" in refused(with_header(json.dumps({"a": entry(quant="x")}), bytes(4)))


ENTRY_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "F7"}, "unknown dtype 'F7'"),
    ({"dtype": "u8"}, "unknown dtype"),
    ({"dtype": None}, "unknown dtype"),
    ({"dtype": ["U8"]}, "unknown dtype"),
    ({"shape": 4}, "shape"),
    ({"shape": [4.0]}, "shape"),
    ({"shape": [-4]}, "shape"),
    ({"shape": [True]}, "shape"),
    ({"shape": ["4"]}, "shape"),
    ({"shape": None}, "shape"),
    ({"shape": [1 << 64]}, "shape"),
    ({"shape": [1 << 63, 4]}, "too large"),
    ({"shape": [1 << 32, 1 << 32]}, "too large"),
    ({"shape": [5]}, "needs 5 bytes"),
    ({"shape": []}, "needs 1 bytes"),
    ({"data_offsets": [0]}, "data_offsets"),
    ({"data_offsets": [0, 4, 4]}, "data_offsets"),
    ({"data_offsets": [0, 4.0]}, "data_offsets"),
    ({"data_offsets": [-4, 0]}, "data_offsets"),
    ({"data_offsets": [4, 0]}, "data_offsets"),
    ({"data_offsets": [0, 1 << 64]}, "data_offsets"),
    ({"data_offsets": None}, "data_offsets"),
    ({"data_offsets": [0, 5]}, "hold 5"),
    ({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}, "needs 0.5 bytes"),
    ({"dtype": "F6_E2M3", "shape": [2], "data_offsets": [0, 2]}, "needs 1.5 bytes"),
]


@pytest.mark.parametrize(("changes", "why"), ENTRY_FAULTS)
def test_refuses_an_entry_that_makes_no_sense(changes: dict[str, Any], why: str) -> None:
    """Each field is checked alone and against the others; the error names the tensor."""
    file = with_header(json.dumps({"x": entry(**changes)}), bytes(4))
    message = refused(file)
    assert why in message
    assert "'x'" in message
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)


@pytest.mark.parametrize("number", ["-0", "4.0", "4e0", "0x4", "04", "+4", "4."])
def test_refuses_numbers_that_are_no_sizes(number: str) -> None:
    """Only plain integers are sizes; -0 is refused, though Python reads it as 0."""
    file = with_header(
        f'{{"x":{{"dtype":"U8","shape":[{number}],"data_offsets":[0,4]}}}}', bytes(4)
    )
    refused(file)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)


@pytest.mark.parametrize(
    ("offsets", "size", "why"),
    [
        ([[0, 4], [5, 9]], 9, "follows a hole"),
        ([[1, 5], [5, 9]], 9, "follows a hole"),
        ([[0, 4], [3, 7]], 7, "overlaps"),
        ([[0, 4], [0, 4]], 4, "overlaps"),
        ([[0, 4], [4, 8]], 7, "describes"),
        ([[0, 4], [4, 8]], 9, "describes"),
        ([[0, 4], [4, 8]], 0, "describes"),
    ],
)
def test_refuses_data_that_do_not_fill_the_file(
    offsets: list[list[int]], size: int, why: str
) -> None:
    """Gaps, overlaps, and files that are too short or too long each have their own error."""
    entries = {name: entry(data_offsets=o) for name, o in zip("ab", offsets, strict=True)}
    file = with_header(json.dumps(entries), bytes(size))
    assert why in refused(file)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)


def test_a_line_end_in_a_name_does_not_break_the_line() -> None:
    """Names are shown escaped, so that an error is one line whatever is in the file."""
    assert "x\\ny" in refused(with_header(json.dumps({"x\ny": entry(shape=[5])}), bytes(4)))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 8000,
        '{"a":' * 1600,
        "{" + '"a":{},' * 1000,
        '{"a":' + "9" * 8000 + "}",
        '{"a":1' + "e9" * 4000,
        '{"a":"' + "\\ud800" * 1300 + '"}',
        " " * 8000,
        '{"a":{"dtype":"U8","shape":['
        + "18446744073709551615," * 300
        + '0],"data_offsets":[0,0]}}',
        "{" + ",".join(f'"{i}":{json.dumps(entry())}' for i in range(100)) + "}",
    ],
)
def test_a_few_kilobytes_never_take_a_second(text: str) -> None:
    """No small header takes much time, however it is built."""
    start = time.process_time()
    refused(with_header(text))
    assert time.process_time() - start < 1


# Compared with the library ------------------------------------------------------------------------

SIZES = st.integers(0, 4)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def described(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """The entries of a valid header in any order, and the size of the data."""
    position, entries = 0, {}
    for name in draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(SIZES, max_size=3))
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [8, *shape], bits * 8
        stop = position + bits // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    items = draw(st.permutations(list(entries.items())))
    metadata = draw(st.none() | st.dictionaries(NAMES, NAMES, max_size=2))
    return dict(items) | ({} if metadata is None else {"__metadata__": metadata}), position


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file, with its header in any layout."""
    entries, size = draw(described())
    text = json.dumps(
        entries,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1, "\t"])),
    )
    return with_header(text + draw(st.sampled_from(["", " ", "\n\t "])), bytes(size))


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10),
    st.sampled_from([1 << 63, 1 << 64, -(1 << 63), 1 << 100]),
    st.floats(),
    NAMES,
    st.sampled_from(["F32", "F4", "f32", "FLOAT"]),
    st.lists(st.integers(-1, 6), max_size=3),
    st.dictionaries(NAMES, st.integers(), max_size=1),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with one field or a few bytes changed."""
    entries, size = draw(described())
    if entries and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(entries)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        if isinstance(entries[name], dict):
            entries[name] = {**entries[name], field: draw(STRANGE)}
        else:
            entries[name] = draw(STRANGE)
    file = bytearray(with_header(json.dumps(entries), bytes(size)))
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(file)))
        stop = position + draw(st.integers(0, 3))
        file[position:stop] = draw(
            st.binary(max_size=2) | st.sampled_from([b"0", b"-", b'"', b"]"])
        )
    return bytes(file)


@settings(deadline=None, max_examples=150)
@given(files())
def test_takes_every_valid_file(file: bytes) -> None:
    """In any layout, a header has the meaning that the library gives it."""
    parse(file)
    header_holds(file)


@settings(deadline=None, max_examples=400)
@given(mutated())
@example(with_header('{"x":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
@example(with_header('{"__metadata__":{},"__metadata__":{}}'))
def test_refuses_whatever_safetensors_rejects(file: bytes) -> None:
    """A damaged file is refused whenever the library rejects it, in one line that names it."""
    header_holds(file)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_no_crash(noise: bytes) -> None:
    """Random bytes are refused, unless by chance the library accepts them too."""
    header_holds(noise)
    header_holds(with_header(noise))
