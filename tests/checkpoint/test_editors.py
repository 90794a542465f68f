"""Editing in several threads gives what one thread gives, in the same order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from test_rewrite import MemoryReader, MemoryWriter

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.editors import Editors
from moescale.checkpoint.gguf.types import BLOCKS
from moescale.checkpoint.rewrite import EDIT_PIECE, Segment, rewrite
from moescale.checkpoint.rounding import Rounding
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, RewriteError
from moescale.storage.base import ignore


def edit(dtype: str, size: int, **fields: Any) -> TensorEdit:
    """The edit of a tensor that is a whole file of about `size` bytes."""
    unit = BLOCKS[dtype].size if dtype in BLOCKS else {"BF16": 2, "F8_E8M0": 1}.get(dtype, 4)
    nbytes = size // unit * unit
    return TensorEdit(Tensor("x", dtype, (nbytes // unit,), 0, nbytes), **fields)


def rewritten(
    change: TensorEdit, data: bytes, threads: int
) -> tuple[bytes, list[int], dict[str, Rounding]]:
    """The new bytes, the size of each piece, and the rounding."""
    writer, sizes = MemoryWriter(), list[int]()
    parts = [Segment(0, change.tensor.stop, change)]
    rounding = rewrite(MemoryReader(data), writer, parts, "x", sizes.append, threads)
    return bytes(writer.data), sizes, rounding


@pytest.mark.parametrize(
    "change",
    [
        edit("BF16", 11 * EDIT_PIECE + 40, factor=1.25),
        edit("BF16", 9 * EDIT_PIECE, factor=1.25, store_as="F32"),
        edit("F32", 8 * EDIT_PIECE, factor=0.3),
        edit("F32", 8 * EDIT_PIECE + 4, factor=0.3),
        edit("F32", 100, factor=0.3),
        edit("Q4_0", 9 * EDIT_PIECE, factor=1.25),
        edit("Q4_K", 9 * EDIT_PIECE, factor=1.25),
        edit("MXFP4", 12 * EDIT_PIECE, factor=2.0),
        edit("F32", 10 * EDIT_PIECE, factor=0.3, role="scale"),
        edit("F8_E8M0", 10 * EDIT_PIECE, factor=2.0, role="scale", operation="shift"),
    ],
    ids=lambda change: f"{change.tensor.dtype}-{change.tensor.nbytes}",
)
def test_threads_change_nothing(change: TensorEdit) -> None:
    """Bytes, pieces, and every digit of the rounding are those of one thread."""
    generator = np.random.default_rng(1)
    # Exponents that are neither large nor small, so that no result is out of range.
    data = (generator.integers(0, 256, change.tensor.nbytes, np.uint8) & 0x1B | 0x20).tobytes()
    alone = rewritten(change, data, 1)
    assert alone[0] != data
    for threads in (2, 3, 5):
        assert rewritten(change, data, threads) == alone


def test_pieces_are_edited_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of a tensor are edited at the same time, and never by the thread that writes."""
    from moescale.checkpoint import scaling

    meeting, names = threading.Barrier(2, timeout=20), set[str]()
    part_editor = scaling.part_editor

    def met(*arguments: Any) -> Any:
        edit_part = part_editor(*arguments)

        def edit(*memory: memoryview) -> Any:
            names.add(threading.current_thread().name)
            meeting.wait()
            return edit_part(*memory)

        return edit

    monkeypatch.setattr(scaling, "part_editor", met)
    change = edit("BF16", 16 * EDIT_PIECE, factor=1.25)  # an even number of batches
    rewritten(change, bytes(change.tensor.nbytes), 2)
    assert len(names) == 2
    assert threading.current_thread().name not in names


@pytest.mark.parametrize("threads", [1, 3])
def test_an_overflow_late_in_a_tensor_is_found(threads: int) -> None:
    """All results out of range are counted, whichever thread finds them."""
    change = edit("BF16", 9 * EDIT_PIECE, factor=2.0)
    data = bytearray(change.tensor.nbytes)
    data[EDIT_PIECE : EDIT_PIECE + 2] = data[-2:] = b"\x7f\x7f"
    with pytest.raises(RewriteError, match="2 values"):
        rewritten(change, bytes(data), threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_scale_is_refused(threads: int) -> None:
    """The error of an editing thread is that of the run, and the threads end."""
    change = edit("F32", 9 * EDIT_PIECE, factor=2.0, role="scale")
    data = np.ones(change.tensor.nbytes // 4, np.float32)
    data[-1] = np.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        rewritten(change, data.tobytes(), threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("moescale-edit")]


def test_results_come_in_order_and_calls_when_they_are_due() -> None:
    """At most `ahead` calls run beyond the one whose result is in use."""
    taken, first = list[int](), threading.Event()

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(6):
            taken.append(number)
            yield partial(call, number)

    def call(number: int) -> int:
        if number == 0:
            assert first.wait(20)  # the others finish earlier
        elif number == 1:
            first.set()
        return number

    with Editors(2) as editors:
        for number in editors.run(calls()):
            assert taken == list(range(min(number + editors.ahead + 1, 6)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("last", [0.0, 1.0])
def test_only_scales_that_are_all_zero_are_reported(threads: int, last: float) -> None:
    """One scale in the last piece makes the difference."""
    change = edit("F32", 9 * EDIT_PIECE, factor=2.0, role="scale")
    data = np.zeros(change.tensor.nbytes // 4, np.float32)
    data[-1] = last
    rounding = rewritten(change, data.tobytes(), threads)[2]
    assert [one.empty for one in rounding.values()] == [True] * (last == 0)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_first_error_in_the_file_is_reported(threads: int) -> None:
    """Reading runs ahead of editing; a file that ends early does not hide an earlier bad scale."""
    change = edit("F32", 32 * EDIT_PIECE, factor=2.0, role="scale")
    data = np.ones(change.tensor.nbytes // 4, np.float32)
    data[0] = np.inf

    class Short(MemoryReader):
        def read_into(self, buffer: memoryview, offset: int) -> None:
            if offset >= 5 * EDIT_PIECE:
                raise OSError("ended early")
            super().read_into(buffer, offset)

    parts = [Segment(0, change.tensor.stop, change)]
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        rewrite(Short(data.tobytes()), MemoryWriter(), parts, "x", ignore, threads)
    data[0] = 1
    with pytest.raises(OSError, match="ended early"):
        rewrite(Short(data.tobytes()), MemoryWriter(), parts, "x", ignore, threads)


@pytest.mark.parametrize("piece", [1, 6, 30])
def test_a_run_that_is_stopped_leaves_no_thread(piece: int) -> None:
    """Ctrl-C ends a run between two pieces of a tensor."""
    change, sizes = edit("BF16", 32 * EDIT_PIECE, factor=1.25), list[int]()

    def stop(size: int) -> None:
        sizes.append(size)
        if len(sizes) == piece:
            raise KeyboardInterrupt

    reader = MemoryReader(bytes(change.tensor.nbytes))
    parts = [Segment(0, change.tensor.stop, change)]
    with pytest.raises(KeyboardInterrupt):
        rewrite(reader, MemoryWriter(), parts, "x", stop, 3)
    assert not [t for t in threading.enumerate() if t.name.startswith("moescale-edit")]
