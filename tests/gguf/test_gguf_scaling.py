"""GGUF blocks: scales multiplied as defined, everything else bit-identical."""

from __future__ import annotations

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from moescale.checkpoint.gguf.scaling import Rounding, scale_blocks
from moescale.checkpoint.gguf.types import BY_NAME, ROWS, GgmlType

FACTOR = 1.2247448713915892
SCALED = {row.name: row for row in ROWS if row.refused is None}
BLOCKS = 300

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

NO_DEQUANTISER = {"Q1_0", "Q2_0"}
"""PyPI's gguf cannot read these; both are one F16 before the codes, as in Q4_0."""

DTYPES = {"F16": np.dtype("<f2"), "NIBBLES": np.dtype("<f2"), "F32": np.dtype("<f4")}


def random_blocks(row: GgmlType) -> Bytes:
    """Blocks with random codes, scales of usual size, and a few subnormal or zero scales."""
    generator = np.random.default_rng(row.number)
    blocks = generator.integers(0, 256, (BLOCKS, row.size), dtype=np.uint8)
    for at in row.scales:
        numbers = generator.normal(0, 0.02, BLOCKS)
        numbers[:20] *= 1e-4
        numbers[20:25] = 0
        put_scales(blocks, at, row, numbers)
    return blocks


def put_scales(blocks: Bytes, at: int, row: GgmlType, numbers: np.ndarray[Any, Any]) -> None:
    """Set the scales of all blocks."""
    if row.kind == "E8M0":
        blocks[:, at] = np.random.default_rng(1).integers(90, 150, len(blocks))
    elif row.kind == "NIBBLES":
        bits = numbers.astype("<f2").view("<u2")
        for i in range(4):  # ggml-common.h: scale.u16 = (sc[0] >> 12) | ((sc[1] >> 8) & 0x00f0) ...
            high = at + 2 * i + 1
            blocks[:, high] = (blocks[:, high] & 0x0F) | (((bits >> 4 * i) & 0xF) << 4)
    else:
        kind = ml_dtypes.bfloat16 if row.kind == "BF16" else DTYPES[row.kind]
        size = np.dtype(kind).itemsize
        blocks[:, at : at + size] = numbers.astype(kind).reshape(-1, 1).view(np.uint8)


def scaled(row: GgmlType, blocks: Bytes, factor: float) -> tuple[Bytes, Rounding]:
    """The blocks times a factor."""
    result, seen = np.empty(blocks.size, np.uint8), Rounding()
    scale_blocks(row, factor, blocks.reshape(-1), result, seen)
    return result.reshape(blocks.shape), seen


def weights(row: GgmlType, blocks: Bytes) -> np.ndarray[Any, Any]:
    """The values of blocks according to PyPI's gguf, ``[blocks, weights per block]``."""
    kind = gguf.GGMLQuantizationType(row.number)
    plain = {"F32": "<f4", "F16": "<f2"}.get(row.name)
    rows = blocks.reshape(-1).view(plain).reshape(len(blocks), -1) if plain else blocks
    return gguf.quants.dequantize(rows, kind).astype(np.float64)


@pytest.mark.parametrize("name", sorted(SCALED.keys() - NO_DEQUANTISER))
def test_weights_are_the_factor_times_what_they_were(name: str) -> None:
    """The format's own library reads the scaled values, up to the rounding of the scale."""
    row = SCALED[name]
    factor = 2.0 if row.kind == "E8M0" else FACTOR
    blocks = random_blocks(row)
    after, seen = scaled(row, blocks, factor)
    old, new = weights(row, blocks), weights(row, after)
    bound = {"F32": 1e-7, "BF16": 2**-8}.get(row.kind, 2**-11) * 2 * np.abs(old).max() + 1e-9
    half_step = 2.0**-25 * (np.abs(old).max() / 0.02 + 1) * 2  # of a subnormal scale
    assert np.abs(new - old * factor).max() <= bound + half_step
    assert np.abs(new - old * factor)[25:].max() > 0 or row.kind in ("E8M0", "F32")
    assert (seen.blocks, seen.lost) == (BLOCKS, 0)


@pytest.mark.parametrize("name", SCALED)
def test_everything_but_the_scales_is_bit_identical(name: str) -> None:
    """New scales are float16(float32(d) x float32(factor)), rounded by numpy."""
    row = SCALED[name]
    factor = 0.5 if row.kind == "E8M0" else FACTOR
    blocks = random_blocks(row)
    after, _ = scaled(row, blocks, factor)
    changed = np.zeros(row.size, bool)
    for at in row.scales:
        if row.kind == "NIBBLES":
            codes = [at + 2 * i + 1 for i in range(4)]
            assert np.array_equal(blocks[:, codes] & 0x0F, after[:, codes] & 0x0F)
            changed[codes] = True
            continue
        size = {"E8M0": 1, "F32": 4}.get(row.kind, 2)
        changed[at : at + size] = True
        if row.kind in ("F16", "F32"):
            old = np.ascontiguousarray(blocks[:, at : at + size]).view(DTYPES[row.kind])
            new = np.ascontiguousarray(after[:, at : at + size]).view(DTYPES[row.kind])
            product = old.astype(np.float32) * np.float32(factor)
            assert np.array_equal(new, product.astype(DTYPES[row.kind]))
        elif row.kind == "BF16":
            old = np.ascontiguousarray(blocks[:, at : at + 2]).view(ml_dtypes.bfloat16)
            new = np.ascontiguousarray(after[:, at : at + 2]).view(ml_dtypes.bfloat16)
            assert np.array_equal(
                new, (old.astype(np.float32) * np.float32(factor)).astype(new.dtype)
            )
        else:
            assert np.array_equal(blocks[:, at].astype(int) - 1, after[:, at])
    assert np.array_equal(blocks[:, ~changed], after[:, ~changed])


def test_the_rounding_is_measured() -> None:
    """The maximum and root mean square of the scales' errors, and the number of new zeros."""
    row = BY_NAME["Q8_0"]
    blocks = random_blocks(row)
    after, seen = scaled(row, blocks, FACTOR)
    old = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64).ravel()
    new = np.ascontiguousarray(after[:, :2]).view("<f2").astype(np.float64).ravel()
    error = np.abs(new[old != 0] / (old[old != 0] * np.float32(FACTOR)) - 1)
    assert seen.worst == pytest.approx(error.max())
    assert seen.rms == pytest.approx(np.sqrt(np.square(error).mean()))
    put_scales(blocks, 0, row, np.full(BLOCKS, 6e-8))
    assert scaled(row, blocks, 0.25)[1].zeroed == BLOCKS


@pytest.mark.parametrize("name", [n for n, r in SCALED.items() if r.kind in ("F16", "NIBBLES")])
def test_a_scale_that_would_overflow_is_counted(name: str) -> None:
    """60,000 times 1.22 exceeds F16; infinities and NaNs that were there before do not count."""
    row = SCALED[name]
    blocks = random_blocks(row)
    numbers = np.full(BLOCKS, 60_000.0)
    numbers[:2] = np.inf, np.nan
    put_scales(blocks, row.scales[0], row, numbers)
    assert scaled(row, blocks, FACTOR)[1].lost == BLOCKS - 2


def test_powers_of_two_end_where_the_exponent_does() -> None:
    """The exponent 255 is NaN and stays; a block of zeros keeps the lowest exponent."""
    row = BY_NAME["MXFP4"]
    blocks = np.full((4, row.size), 0x11, np.uint8)
    blocks[:, 0] = 255, 0, 254, 0
    blocks[1, 1:] = 0x80  # zeros of both signs
    after, seen = scaled(row, blocks, 0.5)
    assert after[:3, 0].tolist() == [255, 0, 253]
    assert seen.lost == 1
    after, seen = scaled(row, blocks, 2.0)
    assert (after[:, 0].tolist(), seen.lost) == ([255, 1, 255, 1], 1)
