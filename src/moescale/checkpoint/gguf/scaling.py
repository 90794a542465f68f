"""The arithmetic of GGUF: multiplies the scales of every block by a factor, rounded once.

``new = f16(f32(d) * f32(factor))``, ties to even, subnormal numbers included; codes and quantised
sub-scales keep their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moescale.checkpoint.arithmetic import Bytes, ScaleFunction, exponent, look_up, table_16bit
from moescale.checkpoint.gguf.types import GgmlType
from moescale.checkpoint.rounding import Rounding as Rounding


def scale_blocks(
    kind: GgmlType, factor: float, source: Bytes, result: Bytes, seen: Rounding
) -> None:
    """Multiply whole blocks of one type.

    Args:
        kind: a type that can be scaled.
        factor: what the weights are multiplied by.
        source: bytes of the blocks.
        result: is filled with the new blocks; as large as `source`.
        seen: the effect of rounding is added to it.
    """
    result[:] = source
    blocks, new = source.reshape(-1, kind.size), result.reshape(-1, kind.size)
    seen.blocks += len(blocks)
    if kind.kind == "E8M0":
        _shift(blocks, new, kind, exponent(factor), seen)
    elif kind.kind == "F32":
        _multiply(blocks, new, factor, seen)
    else:
        for at in kind.scales:
            codes = _codes(blocks, at, kind)
            _put_codes(new, at, kind, look_up(_table(kind.kind, factor).new, codes))
            _count(_table(kind.kind, factor), codes, seen)


def block_scaler(kind: GgmlType, factor: float, seen: Rounding) -> ScaleFunction:
    """The function that multiplies blocks, piece by piece, and counts infinite results."""

    def scale(source: Bytes, result: Bytes) -> int:
        before = seen.lost
        scale_blocks(kind, factor, source, result, seen)
        return seen.lost - before

    return scale


@dataclass(frozen=True, slots=True)
class _Table:
    """The results of all 65,536 16-bit scales, and the effect of rounding on each."""

    new: np.ndarray[Any, np.dtype[np.uint16]]
    error: np.ndarray[Any, np.dtype[np.float64]]  # relative; 0 if not `counted`
    counted: np.ndarray[Any, np.dtype[np.bool_]]
    zeroed: np.ndarray[Any, np.dtype[np.bool_]]
    lost: np.ndarray[Any, np.dtype[np.bool_]]


@lru_cache(maxsize=16)
def _table(kind: str, factor: float) -> _Table:
    name = "BF16" if kind == "BF16" else "F16"
    new = table_16bit(name, factor)
    codes = np.arange(1 << 16, dtype=np.uint16)
    before, after = _values(codes, name), _values(new, name)
    with np.errstate(all="ignore"):
        exact = before * float(np.float32(factor))
        finite = np.isfinite(before) & np.isfinite(after)
        counted = finite & (before != 0)
        error = np.where(counted, np.abs(after / exact - 1), 0.0)
    lost = np.isfinite(before) & ~np.isfinite(after)
    return _Table(new.astype("<u2"), error, counted, counted & (after == 0), lost)


def _values(codes: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if name == "F16":
        return codes.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _count(table: _Table, codes: np.ndarray[Any, Any], seen: Rounding) -> None:
    error = look_up(table.error, codes)
    seen.squares += float(np.square(error).sum())
    seen.counted += int(np.count_nonzero(look_up(table.counted, codes)))
    seen.worst = max(seen.worst, float(error.max(initial=0.0)))
    seen.zeroed += int(np.count_nonzero(look_up(table.zeroed, codes)))
    seen.lost += int(np.count_nonzero(look_up(table.lost, codes)))


def _codes(blocks: Bytes, at: int, kind: GgmlType) -> np.ndarray[Any, Any]:
    """The bits of the 16-bit scale at byte `at` of each block."""
    if kind.kind != "NIBBLES":
        return np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2")[:, 0]
    words = np.ascontiguousarray(blocks[:, at : at + 8]).view("<u2")
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    codes: np.ndarray[Any, Any] = np.bitwise_or.reduce((words >> 12) << shifts, axis=1)
    return codes


def _put_codes(
    blocks: Bytes, at: int, kind: GgmlType, codes: np.ndarray[Any, np.dtype[np.uint16]]
) -> None:
    if kind.kind != "NIBBLES":
        blocks[:, at : at + 2] = codes.astype("<u2")[:, None].view(np.uint8)
        return
    words = np.ascontiguousarray(blocks[:, at : at + 8]).view("<u2")
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    new = (words & 0x0FFF) | (((codes[:, None] >> shifts) & 0xF) << 12)
    blocks[:, at : at + 8] = new.astype("<u2").view(np.uint8)


def _multiply(blocks: Bytes, new: Bytes, factor: float, seen: Rounding) -> None:
    values, results = blocks.reshape(-1).view("<f4"), new.reshape(-1).view("<f4")
    with np.errstate(all="ignore"):
        np.multiply(values, np.float32(factor), out=results)
    np.copyto(results, values, where=np.isnan(values))
    seen.lost += int(np.count_nonzero(np.isinf(results) & np.isfinite(values)))
    seen.zeroed += int(np.count_nonzero((results == 0) & (values != 0)))


def _shift(blocks: Bytes, new: Bytes, kind: GgmlType, k: int, seen: Rounding) -> None:
    """E8M0: the byte b means 2**(b - 127). 255 (NaN) stays, and a block of zeros never underflows.

    The codes are in the other bytes, two in each; the codes 0 and 8 are zeros.
    """
    (at,) = kind.scales
    codes = blocks[:, at].astype(np.int16)
    zeros = ~np.delete(blocks & 0x77, at, axis=1).any(axis=1)
    stays = (codes == 255) | (zeros & (codes + k < 0))
    shifted = np.where(stays, codes, codes + k)
    seen.lost += int(np.count_nonzero((shifted < 0) | ((shifted > 254) & ~stays)))
    new[:, at] = np.clip(shifted, 0, 255).astype(np.uint8)
