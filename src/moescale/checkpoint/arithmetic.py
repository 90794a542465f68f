"""Arithmetic that safetensors and GGUF share."""

from __future__ import annotations

from collections.abc import Callable
from math import frexp
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
ScaleFunction = Callable[[Bytes, Bytes], int]
"""Reads the first array, fills the second, and returns the number of unusable results: infinities
from finite values; for scales, also values that are no longer normal or became zero. Both arrays
hold whole little-endian elements."""

INFINITY_16 = {"F16": 0x7C00, "BF16": 0x7F80}


def exponent(factor: float) -> int:
    """The exponent k of a factor 2**k.

    Raises:
        ValueError: the factor is not a power of two.
    """
    mantissa, k = frexp(factor)
    if mantissa != 0.5:
        raise ValueError(f"{factor!r} is not a power of two")
    return k - 1


def table_16bit(dtype: str, factor: float) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The products of all 65,536 F16 or BF16 values, as bits, indexed by the bits of the value."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = codes.view(float_16bit(dtype))
    with np.errstate(all="ignore"):
        scaled = values.astype(np.float32) * np.float32(factor)
        results = scaled.astype(values.dtype).view(np.uint16)
    is_nan = (codes & 0x7FFF) > INFINITY_16[dtype]
    return np.where(is_nan, codes, results)


def look_up(
    table: np.ndarray[Any, Any], codes: np.ndarray[Any, Any], out: Any = None
) -> np.ndarray[Any, Any]:
    """``table[codes]``; the table has an entry for every code.

    So no mode of `numpy.take` changes a result, and "wrap" is the fastest.
    """
    return np.take(table, codes, out=out, mode="wrap")


def float_16bit(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of F16 or BF16."""
    if dtype == "F16":
        return np.dtype(np.float16)
    import ml_dtypes  # imported here: only BF16 needs it, and it slows start-up

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
