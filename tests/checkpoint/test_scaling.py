"""The arithmetic: every 16-bit value, and properties of wider dtypes, against references."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import rounding

from moescale.checkpoint.arithmetic import table_16bit
from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.scaling import scaler
from moescale.checkpoint.tensor import Tensor

ALL_CODES = np.arange(1 << 16, dtype="<u2")

FACTORS = [
    math.sqrt(2 / 3),
    math.sqrt(3 / 2),
    math.sqrt(1 / 8),
    2.0,
    0.5,
    1.0 + 2.0**-24,  # halfway between two float32
    1.0 + 3 * 2.0**-24,
    1e-3,
    1e30,
    1e-30,
    3e-40,  # subnormal as float32
]

WIDTH = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def multiply(dtype: str, data: bytes, factor: float) -> tuple[bytes, int]:
    """The scaled bytes, and the number of values lost."""
    shape = (len(data) // WIDTH[dtype],)
    scale = scaler(TensorEdit(Tensor("x", dtype, shape, 0, len(data)), factor))
    result = np.empty(len(data), np.uint8)
    lost = scale(np.frombuffer(data, np.uint8), result)
    return result.tobytes(), lost


# 16 bits: all values ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16bit_value_is_rounded_once_to_nearest_even(dtype: str, factor: float) -> None:
    """All 65,536 results and the number of overflows match exact arithmetic."""
    data = ALL_CODES.tobytes()
    result, lost = multiply(dtype, data, factor)
    assert result == rounding.scaled(dtype, data, factor)
    assert lost == rounding.overflows(dtype, data, factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("dtype", "type_"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_16bit_results_are_those_of_numpy_and_ml_dtypes(
    dtype: str, type_: type, factor: float
) -> None:
    """Casts by `ml_dtypes` and numpy give the same numbers; NaN keeps its bits."""
    values = ALL_CODES.view(type_)
    with np.errstate(all="ignore"):
        expected = (values.astype(np.float32) * np.float32(factor)).astype(type_).view("<u2")
    nan = np.isnan(values.astype(np.float32))
    found = np.frombuffer(multiply(dtype, ALL_CODES.tobytes(), factor)[0], "<u2")
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    np.testing.assert_array_equal(found[nan], ALL_CODES[nan])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("dtype", "type_"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_16bit_results_are_those_of_torch(dtype: str, type_: torch.dtype, factor: float) -> None:
    """A model loaded by torch sees the numbers that torch itself would compute."""
    codes = torch.from_numpy(ALL_CODES.astype(np.uint16).view(np.int16))
    by = torch.tensor(factor, dtype=torch.float64).to(torch.float32)
    product = (codes.view(type_).to(torch.float32) * by).to(type_)
    found = np.frombuffer(multiply(dtype, ALL_CODES.tobytes(), factor)[0], "<i2").copy()
    finite = ~codes.view(type_).isnan()
    assert torch.equal(torch.from_numpy(found)[finite], product.view(torch.int16)[finite])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_table_by_one_is_the_identity(dtype: str) -> None:
    """A factor of 1 changes no bit, NaN payloads included."""
    np.testing.assert_array_equal(table_16bit(dtype, 1.0), ALL_CODES)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_table_is_odd(dtype: str) -> None:
    """The sign of a value never changes its magnitude."""
    table = table_16bit(dtype, 1.7)
    np.testing.assert_array_equal(table[:0x8000] | 0x8000, table[0x8000:])


def exactly_rounded(value: Fraction, precision: int, lowest: int) -> Fraction:
    """The nearest number with this many bits, ties to even: round-to-nearest-even by definition."""
    if not value:
        return value
    exponent = lowest
    while abs(value) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 0x7F7F), st.sampled_from(FACTORS))
def test_bfloat16_by_definition(code: int, factor: float) -> None:
    """Exact, with fractions: the product is rounded to float32, then to bfloat16."""
    value = Fraction(struct.unpack("<f", struct.pack("<I", code << 16))[0])
    product = exactly_rounded(value * Fraction(float(np.float32(factor))), 24, -149)
    expected = exactly_rounded(product, 8, -133)
    result, lost = multiply("BF16", struct.pack("<H", code), factor)
    if lost:
        assert expected >= 2**128
        return
    [found] = struct.unpack("<f", b"\0\0" + result)
    assert Fraction(found) == expected


# Pieces, counts and the ends of the range ---------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("count", [0, 1, 3, 65_535, 65_536, 65_537, 150_001])
def test_any_number_of_elements(dtype: str, count: int) -> None:
    """Lengths that are not a multiple of the kernel's pieces make no difference."""
    rng = np.random.default_rng(count)
    data = rng.integers(0, 256, count * WIDTH[dtype], dtype=np.uint8).tobytes()
    result, lost = multiply(dtype, data, 1.3)
    assert result == rounding.scaled(dtype, data, 1.3)
    assert lost == rounding.overflows(dtype, data, 1.3)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_overflows_are_counted_one_by_one(dtype: str) -> None:
    """Only finite values that become infinite count, not those that already were."""
    form = rounding.FORMATS[dtype]
    largest, infinity, sign = form.infinity - 1, form.infinity, form.sign
    codes = [largest, largest | sign, infinity, infinity | sign, infinity + 1, 0, sign, 1]
    data = np.array(codes, form.codes).tobytes()
    result, lost = multiply(dtype, data, 1.5)
    assert lost == 2
    found = np.frombuffer(result, form.codes).tolist()
    assert found[:2] == [infinity, infinity | sign]
    assert found[2:7] == codes[2:7]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_negative_overflow_alone_is_seen(dtype: str) -> None:
    """A finite value that becomes minus infinity is counted too."""
    form = rounding.FORMATS[dtype]
    data = np.array([(form.infinity - 1) | form.sign, 1], form.codes).tobytes()
    assert multiply(dtype, data, 2.0)[1] == 1


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_and_infinity_and_zero_stay(dtype: str) -> None:
    """NaN keeps its payload, sign and signalling bit; infinities and signed zeros stay."""
    form = rounding.FORMATS[dtype]
    nans = [form.infinity + 1, form.infinity + 5, form.sign - 1, form.sign - 2]
    codes = [0, form.infinity, *nans]
    codes += [code | form.sign for code in codes]
    data = np.array(codes, form.codes).tobytes()
    for factor in (0.3, 3.0):
        assert multiply(dtype, data, factor) == (data, 0)


def test_subnormals_are_scaled_and_not_flushed() -> None:
    """Subnormals of every dtype are scaled, whatever mode the processor is in."""
    for dtype in WIDTH:
        form = rounding.FORMATS[dtype]
        data = np.array([1, 2, 3, 1 | form.sign], form.codes).tobytes()
        found = np.frombuffer(multiply(dtype, data, 2.0)[0], form.codes).tolist()
        assert found == [2, 4, 6, 2 | form.sign]


# F32 and F64 --------------------------------------------------------------------------------------

FLOAT32_CODES = st.integers(0, (1 << 32) - 1)
GOOD_FACTORS = st.floats(1e-30, 1e30, exclude_min=True) | st.sampled_from(FACTORS)


@settings(deadline=None, max_examples=150)
@given(st.lists(FLOAT32_CODES, min_size=1, max_size=20), GOOD_FACTORS)
@example([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0x7FC12345, 0x7F800001, 0, 1 << 31], 2.0)
def test_float32_is_one_multiplication(codes: list[int], factor: float) -> None:
    """Every F32 result is the exact product with float32(factor), rounded once."""
    data = np.array(codes, "<u4").tobytes()
    assert multiply("F32", data, factor) == (
        rounding.scaled("F32", data, factor),
        rounding.overflows("F32", data, factor),
    )


@settings(deadline=None, max_examples=150)
@given(st.lists(FLOAT32_CODES, min_size=1, max_size=20), GOOD_FACTORS)
def test_float32_against_float64(codes: list[int], factor: float) -> None:
    """The product of two float32 numbers is exact in float64, so one cast gives the reference."""
    values = np.array(codes, "<u4").view("<f4")
    with np.errstate(all="ignore"):
        expected = (values.astype("<f8") * float(np.float32(factor))).astype("<f4")
    found = np.frombuffer(multiply("F32", values.tobytes(), factor)[0], "<f4")
    nan = np.isnan(values)
    assert found[~nan].tobytes() == expected[~nan].tobytes()
    assert found[nan].tobytes() == values[nan].tobytes()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), GOOD_FACTORS)
@example([1.7976931348623157e308, -1.7976931348623157e308, 5e-324, -0.0], 1.5)
def test_float64_is_scaled_by_the_factor_as_float64(values: list[float], factor: float) -> None:
    """F64 is multiplied by the unrounded factor: each result is the exact product, rounded once."""
    result, lost = multiply("F64", struct.pack(f"<{len(values)}d", *values), factor)
    found = struct.unpack(f"<{len(values)}d", result)
    infinite = 0
    for value, product in zip(values, found, strict=True):
        assert math.copysign(1, product) == math.copysign(1, value)
        try:
            assert product == float(Fraction(value) * Fraction(factor))
        except OverflowError:
            infinite += 1
            assert math.isinf(product)
    assert lost == infinite


def test_float64_does_not_lose_the_factor() -> None:
    """A factor that float32 cannot represent is not rounded for F64."""
    result, _ = multiply("F64", struct.pack("<d", 1.0), math.sqrt(2 / 3))
    assert struct.unpack("<d", result) == (math.sqrt(2 / 3),)
