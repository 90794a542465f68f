"""The rewriting of one shard as a stream: scaled where planned, copied everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moescale.checkpoint.header import Tensor
from moescale.checkpoint.scaling import Scale, scaler
from moescale.errors import RewriteError

PIECE = 1 << 20
"""Bytes that are in memory at once, for each shard that is being rewritten."""


class Reader(Protocol):
    """Random access to the bytes of one file."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer with the bytes from `offset` on, or raise."""


class Writer(Protocol):
    """A file that is written from its first byte to its last."""

    def write(self, data: memoryview) -> None:
        """Append the bytes."""

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append bytes `start` to `stop` of `reader`; yield the size of each piece when done."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `start` to `stop` of a shard; `factor` is None where they are copied."""

    start: int
    stop: int
    tensor: Tensor | None = None
    factor: float | None = None


def segments(
    tensors: Iterable[Tensor], factors: Mapping[str, float], file_size: int
) -> list[Segment]:
    """Cut a shard into stretches to copy and tensors to scale; together they are the file.

    Args:
        tensors: the tensors of the shard, in any order.
        factors: name to factor; a factor of exactly 1 copies.
        file_size: size of the shard in bytes.
    """
    scaled = sorted(
        (t for t in tensors if t.nbytes and factors.get(t.name, 1.0) != 1.0),
        key=lambda tensor: tensor.start,
    )
    result, position = [], 0
    for tensor in scaled:
        if tensor.start > position:
            result.append(Segment(position, tensor.start))
        result.append(Segment(tensor.start, tensor.stop, tensor, factors[tensor.name]))
        position = tensor.stop
    if file_size > position:
        result.append(Segment(position, file_size))
    return result


def rewrite(
    reader: Reader,
    writer: Writer,
    parts: Iterable[Segment],
    where: str,
    advance: Callable[[int], None],
) -> None:
    """Send every segment from `reader` to `writer`, in pieces of at most 1 MiB.

    `advance` is called with the size of each piece; what it raises ends the run.

    Raises:
        RewriteError: a finite value became infinite.
    """
    source, result = bytearray(PIECE), bytearray(PIECE)
    for part in parts:
        if part.tensor is None or part.factor is None:
            for size in writer.copy_from(reader, part.start, part.stop):
                advance(size)
            continue
        scale = scaler(part.tensor.dtype, part.factor)
        overflows = 0
        for start in range(part.start, part.stop, PIECE):
            size = min(PIECE, part.stop - start)
            reader.read_into(memoryview(source)[:size], start)
            overflows += scale_into(scale, memoryview(source)[:size], memoryview(result)[:size])
            if not overflows:
                writer.write(memoryview(result)[:size])
            advance(size)
        if overflows:
            raise overflow_error(where, part.tensor, part.factor, overflows)


def scale_into(scale: Scale, source: memoryview, result: memoryview) -> int:
    """Scale whole elements from one buffer into another; returns the number of overflows."""
    return scale(np.frombuffer(source, np.uint8), np.frombuffer(result, np.uint8))


def overflow_error(where: str, tensor: Tensor, factor: float, count: int) -> RewriteError:
    """The error for values that have no finite result in the tensor's dtype."""
    values = "1 value" if count == 1 else f"{count} values"
    return RewriteError(
        f"{where}: tensor {tensor.name!r}: {values} would overflow {tensor.dtype}"
        f" when multiplied by {factor:.9g}",
        hint="Use a smaller factor (--factor), another rule, or a checkpoint in a wider dtype.",
    )
