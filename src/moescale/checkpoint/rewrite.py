"""Rewrites one shard as a stream: planned tensors are scaled, everything else is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, cycle
from math import ceil
from typing import NamedTuple, Protocol

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.editors import Editors
from moescale.checkpoint.rounding import EditedPiece, Rounding
from moescale.errors import RewriteError

PIECE = 1 << 20
"""Bytes read at a time, for each shard in progress."""

EDIT_PIECE = 1 << 18
"""Bytes edited at a time: source, result and table then fit into the L2 cache."""

_BATCH = 4
"""Pieces that an editing thread takes at a time; handing over takes as long as half a piece.
Tensors of up to two times this are edited by the thread that reads them."""


class Reader(Protocol):
    """Random access to the bytes of one file."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer with the bytes that start at `offset`, or raise."""


class Writer(Protocol):
    """A file that is written sequentially."""

    def write(self, data: memoryview) -> None:
        """Append the bytes."""

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append bytes `start` to `stop` of `reader`; yield the size of each finished piece."""


class Segment(NamedTuple):
    """Consecutive bytes of a shard: copied, edited or replaced.

    Attributes:
        start: offset in the source's file.
        stop: offset of the end; equal to `start` if `data` is inserted.
        edit: the edit of the tensor that has these bytes; None if they are not edited.
        data: the bytes to write instead; None if they are copied or edited.
    """

    start: int
    stop: int
    edit: TensorEdit | None = None
    data: bytes | None = None

    @property
    def new_size(self) -> int:
        """Size in the output, in bytes."""
        if self.data is not None:
            return len(self.data)
        return self.stop - self.start if self.edit is None else self.edit.nbytes


def segments(
    edits: Sequence[TensorEdit], file_size: int, patches: Sequence[Segment] = ()
) -> list[Segment]:
    """Split a shard into segments to copy, edit and replace; together they cover the file.

    Args:
        edits: edits of the shard's tensors, in any order.
        file_size: size of the shard in bytes.
        patches: replacements and insertions outside the edited tensors, in file order.
    """
    result, position = [], 0
    changed = [
        Segment(edit.tensor.start, edit.tensor.stop, edit) for edit in edits if edit.tensor.nbytes
    ]
    for segment in sorted((*patches, *changed), key=lambda segment: segment.start):
        if segment.start > position:
            result.append(Segment(position, segment.start))
        result.append(segment)
        position = segment.stop
    if file_size > position:
        result.append(Segment(position, file_size))
    return result


def rewrite(
    reader: Reader,
    writer: Writer,
    segments_: Iterable[Segment],
    where: str,
    advance: Callable[[int], None],
    threads: int = 1,
) -> dict[str, Rounding]:
    """Send every segment from `reader` to `writer`, in pieces.

    `advance` is called with the size of each piece; an exception from it ends the run. Several
    `threads` edit large tensors, while the caller's thread reads and writes.

    Returns:
        The rounding of scales, by tensor name.

    Raises:
        CheckpointError: a scale is NaN or infinite.
        RewriteError: a result is out of range.
    """
    rounding: dict[str, Rounding] = {}
    with Editors(threads) if threads > 1 else nullcontext() as editors:
        for segment in segments_:
            if segment.data is not None:
                _read_replaced(reader, segment)
                writer.write(memoryview(segment.data))
                advance(len(segment.data))
            elif segment.edit is None:
                for size in writer.copy_from(reader, segment.start, segment.stop):
                    advance(size)
            else:
                total, seen = 0, Rounding()
                for piece, lost in edited(reader, segment.edit, seen, editors):
                    total += lost
                    if not total:
                        writer.write(piece)
                    advance(len(piece))
                if total:
                    raise _lost_values(where, segment.edit, total)
                if seen.blocks or seen.empty:
                    rounding[segment.edit.tensor.name] = seen
    return rounding


def check_scales(reader: Reader, edits: Iterable[TensorEdit], where: str) -> None:
    """Edit tensors without writing them, to find results that are out of range before a run.

    Raises:
        CheckpointError: a scale is NaN or infinite.
        RewriteError: a result is out of range.
    """
    for edit in edits:
        if total := sum(lost for _, lost in edited(reader, edit)):
            raise _lost_values(where, edit, total)


def expected(reader: Reader, segments_: Iterable[Segment]) -> Iterator[tuple[Segment, memoryview]]:
    """The bytes that the output must have, piece by piece, each with its segment."""
    for segment in segments_:
        if segment.data is not None:
            _read_replaced(reader, segment)
            yield segment, memoryview(segment.data)
        elif segment.edit is None:
            for piece in pieces(reader, segment.start, segment.stop):
                yield segment, piece
        else:
            for piece, _ in edited(reader, segment.edit):
                yield segment, piece


def _read_replaced(reader: Reader, segment: Segment) -> None:
    """Replaced bytes are read too, because the source may be hashing."""
    for _ in pieces(reader, segment.start, segment.stop):
        pass


def pieces(reader: Reader, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` to `stop` in pieces of at most 1 MiB, each valid until the next is read."""
    buffer = memoryview(bytearray(min(PIECE, stop - start)))
    while start < stop:
        piece = buffer[: stop - start]
        reader.read_into(piece, start)
        yield piece
        start += len(piece)


def edited(
    reader: Reader, edit: TensorEdit, seen: Rounding | None = None, editors: Editors | None = None
) -> Iterator[tuple[memoryview, int]]:
    """Yield the edited bytes of a tensor in pieces, each with its number of results out of range.

    `seen` collects the rounding of block scales, and whether all scales are 0. `editors` edit
    the pieces of a large tensor, and this thread all others; each is valid until the next one.

    Raises:
        CheckpointError: a scale is NaN or infinite.
        RewriteError: the tensor is malformed.
    """
    from moescale.checkpoint.scaling import part_editor  # a plan needs no arithmetic

    tensor, empty = edit.tensor, edit.role == "scale"
    whole = tensor.nbytes if edit.operation == "nested_offset" else EDIT_PIECE
    length = min(whole - whole % edit.unit, tensor.nbytes)
    edit_part = part_editor(edit, length)

    def batches(ahead: int, size: int) -> Iterator[Callable[[], list[EditedPiece]]]:
        count = min(ahead + 1, ceil(tensor.nbytes / size))
        sources = [memoryview(bytearray(size)) for _ in range(count)]
        results = [memoryview(bytearray(size * edit.widening)) for _ in range(count)]
        buffers = cycle(zip(sources, results, strict=True))
        for start in range(tensor.start, tensor.stop, size):
            source, result = next(buffers)
            old = source[: tensor.stop - start]
            reader.read_into(old, start)
            yield partial(edit_part, old, result)

    done: Iterator[list[EditedPiece]]
    if editors is None or tensor.nbytes <= 2 * _BATCH * length:
        done = (edit_batch() for edit_batch in batches(0, length))
    else:
        done = editors.run(batches(editors.ahead, _BATCH * length))
    for piece, lost, rounding in chain.from_iterable(done):
        empty = empty and rounding.empty
        if seen is not None:
            seen.add(rounding)
        yield piece, lost
    if seen is not None:
        seen.empty = empty


def _lost_values(where: str, edit: TensorEdit, count: int) -> RewriteError:
    values = "1 value" if count == 1 else f"{count} values"
    range_ = "normal range" if edit.role == "scale" else "range"
    return RewriteError(
        f"{where}: tensor {edit.tensor.name!r}: {values} would leave the {range_} of"
        f" {edit.store_as or edit.tensor.dtype} when scaled by {edit.factor:.9g}",
        hint="Use a smaller factor (--factor), another rule, or a checkpoint in a wider dtype.",
    )
