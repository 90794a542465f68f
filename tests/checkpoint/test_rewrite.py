"""Rewriting a byte stream: segments that make up the file, and bytes computed naively."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoints

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.rewrite import PIECE, Segment, expected, rewrite, segments
from moescale.checkpoint.safetensors.header import header_length, parse_header
from moescale.checkpoint.tensor import Header
from moescale.errors import RewriteError


class MemoryReader:
    """A file in memory that records the largest read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.largest = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        assert offset + len(buffer) <= len(self.data)
        self.largest = max(self.largest, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]


class MemoryWriter:
    """Collects what is written and what is copied."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.copied: list[tuple[int, int]] = []

    def write(self, data: memoryview) -> None:
        self.data += data

    def copy_from(self, reader: MemoryReader, start: int, stop: int) -> Iterator[int]:
        self.data += reader.data[start:stop]
        self.copied.append((start, stop))
        yield stop - start


def parsed(file: bytes) -> Header:
    """The header of a file in memory."""
    length = header_length(file[:8], len(file), "x")
    return parse_header(file[8 : 8 + length], len(file), "x")


def edits_for(file: bytes, factors: dict[str, float]) -> list[TensorEdit]:
    """One edit for each named tensor, as in a plan."""
    tensors = parsed(file).by_name
    return [TensorEdit(tensors[name], factor) for name, factor in factors.items()]


def run(file: bytes, factors: dict[str, float]) -> tuple[MemoryWriter, int]:
    """Rewrite a file in memory; returns the writer and the reported bytes."""
    reader, writer, sizes = MemoryReader(file), MemoryWriter(), []
    parts = segments(edits_for(file, factors), len(file))
    rewrite(reader, writer, parts, "shard", sizes.append)
    assert reader.largest <= PIECE
    return writer, sum(sizes)


@st.composite
def shards(draw: st.DrawFn) -> tuple[bytes, dict[str, float]]:
    """A shard, and factors for some of its tensors."""
    tensors, factors = {}, {}
    for i in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(["BF16", "F16", "F32", "F64"]))
        tensors[f"t{i}"] = checkpoints.values(dtype, (draw(st.integers(0, 12)),), seed=i)
        if draw(st.booleans()):
            factors[f"t{i}"] = draw(st.floats(0.1, 3.0))
    return checkpoints.shard(tensors), factors


# Segments -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(shards(), st.randoms(use_true_random=False))
def test_segments_partition_the_file(case: tuple[bytes, dict[str, float]], random) -> None:
    """Every byte is in exactly one segment, in order; every tensor to scale is a segment."""
    file, factors = case
    edits = edits_for(file, factors)
    random.shuffle(edits)
    parts = segments(edits, len(file))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, len(file))
    assert all(part.start < part.stop for part in parts)
    scaled = {part.edit.tensor.name for part in parts if part.edit}
    assert scaled == {edit.tensor.name for edit in edits if edit.tensor.nbytes}
    for part in parts:
        if part.edit:
            assert (part.start, part.stop) == (part.edit.tensor.start, part.edit.tensor.stop)


def test_a_file_without_edits_is_one_copy() -> None:
    """Without tensors to scale there is one segment, which is copied."""
    assert segments([], 10) == [Segment(0, 10)]


def test_an_empty_file_has_no_segments() -> None:
    """An empty file needs no work."""
    assert segments([], 0) == []


def test_an_empty_tensor_beside_another_does_not_double_bytes() -> None:
    """Tensors without elements have no bytes, whatever the order of the edits."""
    raw = checkpoints.values("BF16", (4,))
    file = checkpoints.shard({"empty": ("BF16", (0,), b""), "full": raw})
    writer, _ = run(file, {"full": 2.0, "empty": 2.0})
    assert bytes(writer.data) == checkpoints.rescaled(file, {"full": 2.0})


def test_neighbours_have_nothing_between_them() -> None:
    """Adjacent tensors are scaled one after the other."""
    raw = checkpoints.values("BF16", (4,))
    file = checkpoints.shard({"a": raw, "b": raw})
    kinds = [
        part.edit is not None for part in segments(edits_for(file, {"a": 2.0, "b": 3.0}), len(file))
    ]
    assert kinds == [False, True, True]


# Bytes --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(shards())
def test_the_result_is_the_whole_file_computed_naively(
    case: tuple[bytes, dict[str, float]],
) -> None:
    """Planned tensors are scaled, all other bytes are unchanged, and all bytes are reported."""
    file, factors = case
    writer, reported = run(file, factors)
    assert bytes(writer.data) == checkpoints.rescaled(file, factors)
    assert reported == len(file)


def test_what_is_not_planned_is_copied_and_never_read() -> None:
    """Bytes outside the planned tensors are copied by the writer."""
    raw = checkpoints.values("BF16", (40,))
    file = checkpoints.shard({"a": raw, "b": raw, "c": raw})
    writer, _ = run(file, {"b": 1.5})
    b = parsed(file).by_name["b"]
    assert writer.copied == [(0, b.start), (b.stop, len(file))]


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_a_tensor_larger_than_a_piece(dtype: str) -> None:
    """A tensor is scaled in pieces, which need not divide it, and is never read whole."""
    form_bytes = {"BF16": 2, "F32": 4, "F64": 8}[dtype]
    count = (2 * PIECE) // form_bytes + 5
    file = checkpoints.shard(
        {
            "odd": ("U8", (3,), b"abc"),
            "big": checkpoints.values(dtype, (count,)),
            "end": ("U8", (1,), b"x"),
        }
    )
    writer, reported = run(file, {"big": 0.8})
    assert bytes(writer.data) == checkpoints.rescaled(file, {"big": 0.8})
    assert reported == len(file)


@settings(deadline=None, max_examples=30)
@given(shards())
def test_expected_bytes_are_those_that_are_written(case: tuple[bytes, dict[str, float]]) -> None:
    """Verification compares with the stream that a run writes."""
    file, factors = case
    parts = segments(edits_for(file, factors), len(file))
    stream = b"".join(bytes(piece) for _, piece in expected(MemoryReader(file), parts))
    assert stream == checkpoints.rescaled(file, factors)


# Overflow and stop --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_overflow_names_tensor_and_count(count: int) -> None:
    """If a finite value would become infinite, the run ends and says where and how many."""
    codes = b"\x7f\x7f" * count + b"\x80\x7f" + b"\x00\x00"
    file = checkpoints.shard({"model.w2": ("BF16", (count + 2,), codes)})
    with pytest.raises(RewriteError) as caught:
        run(file, {"model.w2": 1.25})
    assert "'model.w2'" in caught.value.message
    assert f"{count} value" in caught.value.message
    assert "shard" in caught.value.message
    assert caught.value.hint


def test_overflows_are_counted_over_all_pieces() -> None:
    """The count covers the whole tensor, and nothing is written after the first bad piece."""
    data = bytearray(2 * PIECE + 4)
    data[:2] = data[PIECE : PIECE + 2] = data[-2:] = b"\x7f\x7f"
    file = checkpoints.shard({"w": ("BF16", (len(data) // 2,), bytes(data))})
    with pytest.raises(RewriteError, match="3 values"):
        run(file, {"w": 2.0})


def test_what_progress_raises_ends_the_run() -> None:
    """The caller can stop the stream between two pieces."""
    file = checkpoints.shard({"w": checkpoints.values("BF16", (PIECE,))})
    writer, calls = MemoryWriter(), []

    def stop(size: int) -> None:
        calls.append(size)
        raise KeyboardInterrupt

    parts = segments(edits_for(file, {"w": 0.5}), len(file))
    with pytest.raises(KeyboardInterrupt):
        rewrite(MemoryReader(file), writer, parts, "x", stop)
    assert len(calls) == 1
    assert len(writer.data) < len(file)
