"""The arithmetic of the output, computed on integers, as an independent reference.

Every float is an integer times a power of two; products are exact, and the integers are rounded to
nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Float:
    """A binary format: total bits, bits of the significand, exponent of its smallest value."""

    bits: int
    precision: int
    lowest: int

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return self.sign - (1 << (self.precision - 1))

    @property
    def codes(self) -> np.dtype:
        return np.dtype(f"<u{self.bits // 8}")


F16 = Float(16, 11, -24)
BF16 = Float(16, 8, -133)
F32 = Float(32, 24, -149)
F64 = Float(64, 53, -1074)
FORMATS = {"F16": F16, "BF16": BF16, "F32": F32, "F64": F64}


def take_apart(codes: Array, form: Float) -> tuple[Array, Array]:
    """The integer and the exponent of each magnitude, for finite codes."""
    magnitude = codes.astype(np.int64) & (form.sign - 1)
    field = magnitude >> (form.precision - 1)
    fraction = magnitude & ((1 << (form.precision - 1)) - 1)
    significand = np.where(field == 0, fraction, fraction | (1 << (form.precision - 1)))
    return significand, np.maximum(field, 1) - 1 + form.lowest


def nearest_even(significand: Array, exponent: Array, form: Float) -> Array:
    """The code of the nearest magnitude in `form`: ties to even, infinity above the largest."""
    length = np.frexp(significand.astype(np.float64))[1]  # exact: all are below 2**53
    shift = np.maximum(length - form.precision, form.lowest - exponent)
    right, left = np.clip(shift, 0, 62), np.clip(-shift, 0, 62)
    kept = significand >> right
    rest, half = significand - (kept << right), (np.int64(1) << right) >> 1
    up = (right > 0) & ((rest > half) | ((rest == half) & (kept % 2 == 1)))
    rounded = (kept << left) + up
    code = ((exponent + shift - form.lowest) << (form.precision - 1)) + rounded
    return np.where(rounded == 0, 0, np.minimum(code, form.infinity))


def _product(codes: Array, factor: float, form: Float) -> Array:
    """Codes of the magnitudes of float32(x) * float32(factor), rounded to `form`."""
    significand, exponent = take_apart(codes, form)
    by = np.array([np.float32(factor)]).view("<u4")
    multiplier, power = take_apart(by, F32)
    product = nearest_even(significand * multiplier, exponent + power, F32)
    infinite = product == F32.infinity
    again = nearest_even(*take_apart(np.where(infinite, 0, product), F32), form)
    return np.where(infinite, form.infinity, again)


def _finite(codes: Array, form: Float) -> Array:
    return (codes.astype(np.uint64) & np.uint64(form.sign - 1)) < form.infinity


def scaled(dtype: str, data: bytes, factor: float) -> bytes:
    """The bytes of a tensor after multiplication by `factor`."""
    if dtype == "F64":
        with np.errstate(all="ignore"):
            return _keep_special(data, (np.frombuffer(data, "<f8") * factor).tobytes(), F64)
    form = FORMATS[dtype]
    codes = np.frombuffer(data, form.codes)
    finite = _finite(codes, form)
    magnitude = _product(np.where(finite, codes, 0), factor, form)
    result = (codes & form.sign) | magnitude.astype(form.codes)
    return np.where(finite, result, codes).astype(form.codes).tobytes()


def _keep_special(old: bytes, new: bytes, form: Float) -> bytes:
    codes = np.frombuffer(old, form.codes)
    return np.where(_finite(codes, form), np.frombuffer(new, form.codes), codes).tobytes()


def overflows(dtype: str, data: bytes, factor: float) -> int:
    """The number of finite values that become infinite."""
    form = FORMATS[dtype]
    before = np.frombuffer(data, form.codes)
    after = np.frombuffer(scaled(dtype, data, factor), form.codes)
    return int(np.count_nonzero(_finite(before, form) & ~_finite(after, form)))
