"""The arithmetic: bytes of one dtype times a factor, rounded once and defined to the last bit.

``cast(float32(x) * float32(factor))`` with round to nearest even, in the tensor's own dtype; F64
in float64 with the factor as float64. NaN keeps its bits, signed zeros and infinities stay.
A 16-bit dtype has only 65,536 values, so all results are put into a table once and looked up:
as fast as arithmetic, and exact by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Scale = Callable[[Bytes, Bytes], int]
"""Reads the first array, fills the second of the same length, returns how many finite values
became infinite. Both are whole elements of the dtype, little-endian."""

_TABLE_PIECE = 64 * 1024
"""Elements looked up at once: source, result and table then stay in the second-level cache."""

_INFINITY_16 = {"F16": 0x7C00, "BF16": 0x7F80}


@lru_cache(maxsize=16)
def scaler(dtype: str, factor: float) -> Scale:
    """The function that multiplies values of `dtype` (F16, BF16, F32 or F64) by `factor`."""
    if dtype in _INFINITY_16:
        return _table_scaler(table_16bit(dtype, factor), _INFINITY_16[dtype])
    return _direct_scaler(np.dtype("<f4" if dtype == "F32" else "<f8"), factor)


def table_16bit(dtype: str, factor: float) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All 65,536 results for F16 or BF16: index and value are the bits of an element."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = codes.view(_float_16bit(dtype))
    with np.errstate(all="ignore"):
        scaled = values.astype(np.float32) * np.float32(factor)
        results = scaled.astype(values.dtype).view(np.uint16)
    is_nan = (codes & 0x7FFF) > _INFINITY_16[dtype]
    return np.where(is_nan, codes, results)


def _float_16bit(dtype: str) -> np.dtype[Any]:
    if dtype == "F16":
        return np.dtype(np.float16)
    import ml_dtypes  # here, since only BF16 needs it and it costs start-up time

    return np.dtype(ml_dtypes.bfloat16)


def _table_scaler(table: np.ndarray[Any, np.dtype[np.uint16]], infinity: int) -> Scale:
    table = table.astype("<u2")

    def scale(source: Bytes, result: Bytes) -> int:
        codes, scaled = source.view("<u2"), result.view("<u2")
        for start in range(0, codes.size, _TABLE_PIECE):
            piece = slice(start, start + _TABLE_PIECE)
            # "clip" is the mode without a bounds check of its own; every code is in bounds.
            np.take(table, codes[piece], out=scaled[piece], mode="clip")
        # Positive infinities and NaNs are the largest as int16, the negative ones as uint16.
        if scaled.size and (
            scaled.view("<i2").max() >= infinity or scaled.max() >= infinity | 0x8000
        ):
            infinite = (scaled & 0x7FFF) == infinity
            return int(np.count_nonzero(infinite & ((codes & 0x7FFF) != infinity)))
        return 0

    return scale


def _direct_scaler(dtype: np.dtype[Any], factor: float) -> Scale:
    multiplier = dtype.type(factor)

    def scale(source: Bytes, result: Bytes) -> int:
        values, scaled = source.view(dtype), result.view(dtype)
        with np.errstate(all="ignore"):
            np.multiply(values, multiplier, out=scaled)
        finite = np.isfinite(scaled)
        if finite.all():
            return 0
        is_nan = np.isnan(values)
        np.copyto(scaled, values, where=is_nan)  # not the processor's idea of a NaN's bits
        return int(np.count_nonzero(np.isinf(scaled) & np.isfinite(values)))

    return scale
