"""Multiplies a tensor by a factor; every result is rounded once, and defined to the last bit.

The result is ``cast(float32(x) * float32(factor))``, rounded to nearest even, in the tensor's own
dtype; F64 is multiplied in float64. NaNs keep their bits; signed zeros and infinities stay.
A 16-bit dtype has only 65,536 values, so a table of all results is computed once and indexed: it
is as fast as arithmetic, and exact by construction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from moescale.checkpoint.arithmetic import (
    INFINITY_16,
    Bytes,
    ScaleFunction,
    exponent,
    float_16bit,
    look_up,
    table_16bit,
)
from moescale.checkpoint.edit import Operation, TensorEdit
from moescale.checkpoint.gguf.types import BLOCKS
from moescale.checkpoint.json_text import parse_strict, replace_spans, value_spans
from moescale.checkpoint.rounding import EditedPiece, Rounding
from moescale.errors import CheckpointError, RewriteError


def part_editor(
    edit: TensorEdit, length: int
) -> Callable[[memoryview, memoryview], list[EditedPiece]]:
    """The function that edits a part of a tensor, in pieces of `length` bytes; for any thread.

    It gets the bytes of the part, and room for the result, which has `edit.widening` times as many.
    It raises a `CheckpointError` if a scale is NaN or infinite.
    """
    # The function for GGUF blocks also counts, for one piece.
    of_all = None if edit.tensor.dtype in BLOCKS else scaler(edit)

    def edit_part(source: memoryview, result: memoryview) -> list[EditedPiece]:
        done = []
        for start in range(0, len(source), length):
            old, seen = np.frombuffer(source[start : start + length], np.uint8), Rounding()
            if edit.role == "scale":
                _check_finite(edit, old)
                seen.empty = not old.any()
            at = start * edit.widening
            piece = result[at : at + len(old) * edit.widening]
            lost = (of_all or scaler(edit, seen))(old, np.frombuffer(piece, np.uint8))
            done.append((piece, lost, seen))
        return done

    return edit_part


def scaler(edit: TensorEdit, seen: Rounding | None = None) -> ScaleFunction:
    """The function that applies an edit piece by piece; only GGUF blocks are counted in `seen`."""
    if edit.operation == "nested_offset":
        return _nested_offset_scaler(edit.tensor.name, edit.factor)
    if (kind := BLOCKS.get(edit.tensor.dtype)) is not None:
        from moescale.checkpoint.gguf.scaling import block_scaler

        return block_scaler(kind, edit.factor, seen or Rounding())
    scale = edit.role == "scale"
    return _scaler(edit.tensor.dtype, edit.factor, edit.operation, edit.store_as, scale)


@lru_cache(maxsize=16)
def _scaler(
    dtype: str, factor: float, operation: Operation, store_as: str | None, scale: bool
) -> ScaleFunction:
    if operation == "shift":
        return _shift_scaler(exponent(factor))
    if store_as is not None:
        return _promoting_scaler(dtype, factor, scale)
    if dtype in INFINITY_16:
        table = table_16bit(dtype, factor)
        return (_scale_table_scaler if scale else _table_scaler)(table, INFINITY_16[dtype])
    return _direct_scaler(np.dtype("<f4" if dtype == "F32" else "<f8"), factor, operation, scale)


def _table_scaler(table: np.ndarray[Any, np.dtype[np.uint16]], infinity: int) -> ScaleFunction:
    table = table.astype("<u2")

    def scale(source: Bytes, result: Bytes) -> int:
        codes, scaled = source.view("<u2"), result.view("<u2")
        look_up(table, codes, scaled)
        # Positive infinities and NaNs are the largest values as int16, negative ones as uint16.
        if scaled.size and (
            scaled.view("<i2").max() >= infinity or scaled.max() >= infinity | 0x8000
        ):
            infinite = (scaled & 0x7FFF) == infinity
            return int(np.count_nonzero(infinite & ((codes & 0x7FFF) != infinity)))
        return 0

    return scale


def _scale_table_scaler(
    table: np.ndarray[Any, np.dtype[np.uint16]], infinity: int
) -> ScaleFunction:
    """Like `_table_scaler`, for scales: normal ones must stay normal, and nonzero ones nonzero."""
    table = table.astype("<u2")
    before, after = np.arange(1 << 16) & 0x7FFF, table & 0x7FFF
    below_normal = (after < (infinity & -infinity)) & (before >= (infinity & -infinity))
    lost = (
        below_normal | ((after == 0) & (before > 0)) | ((after == infinity) & (before < infinity))
    )

    def scale(source: Bytes, result: Bytes) -> int:
        codes = source.view("<u2")
        look_up(table, codes, result.view("<u2"))
        return int(np.count_nonzero(look_up(lost, codes)))

    return scale


def _direct_scaler(
    dtype: np.dtype[Any], factor: float, operation: Operation, scales: bool
) -> ScaleFunction:
    operand = dtype.type(factor)
    compute = np.divide if operation == "divide" else np.multiply

    def scale(source: Bytes, result: Bytes) -> int:
        values, scaled = source.view(dtype), result.view(dtype)
        with np.errstate(all="ignore"):
            compute(values, operand, out=scaled)
        return _restore_nans_count_infinities(values, scaled) + (
            _underflowed(values, scaled) if scales else 0
        )

    return scale


def _promoting_scaler(dtype: str, factor: float, scales: bool) -> ScaleFunction:
    """Multiplies 16-bit values and stores F32; the product is rounded once, to float32."""
    narrow = float_16bit(dtype)

    def scale(source: Bytes, result: Bytes) -> int:
        values, scaled = source.view(narrow).astype(np.float32), result.view("<f4")
        with np.errstate(all="ignore"):
            np.multiply(values, np.float32(factor), out=scaled)
        return _restore_nans_count_infinities(values, scaled) + (
            _underflowed(values, scaled) if scales else 0
        )

    return scale


def _check_finite(edit: TensorEdit, data: Bytes) -> None:
    """Refuse a scale that is NaN or infinite."""
    if _has_non_finite(edit, data):
        raise CheckpointError(
            f"tensor {edit.tensor.name!r}: holds a scale that is NaN or infinite, and so is every"
            " weight that it scales",
            hint="The tensor is damaged; quantise the model again, or fetch the file again.",
        )


def _has_non_finite(edit: TensorEdit, data: Bytes) -> bool:
    dtype = edit.tensor.dtype
    if edit.operation == "shift":
        return bool((data == 255).any())
    if dtype in INFINITY_16:
        return bool(((data.view("<u2") & 0x7FFF) >= INFINITY_16[dtype]).any())
    return dtype == "F32" and not np.isfinite(data.view("<f4")).all()


def _restore_nans_count_infinities(
    values: np.ndarray[Any, Any], scaled: np.ndarray[Any, Any]
) -> int:
    """Restore the bits of NaNs, which the processor may have changed; count new infinities."""
    if np.isfinite(scaled).all():
        return 0
    np.copyto(scaled, values, where=np.isnan(values))
    return int(np.count_nonzero(np.isinf(scaled) & np.isfinite(values)))


def _underflowed(values: np.ndarray[Any, Any], scaled: np.ndarray[Any, Any]) -> int:
    """The number of values that are no longer normal, or became zero."""
    smallest = np.finfo(scaled.dtype).smallest_normal
    below = np.abs(scaled) < smallest
    if not below.any():
        return 0
    was_normal = np.abs(values) >= smallest
    return int(np.count_nonzero(below & (was_normal | ((scaled == 0) & (values != 0)))))


def _shift_scaler(k: int) -> ScaleFunction:
    """E8M0: the byte b means 2**(b - 127). 0 (a block of zeros) and 255 (NaN) stay."""
    codes = np.arange(256)
    shifted = np.where((codes == 0) | (codes == 255), codes, codes + k)
    lost = (codes > 0) & (codes < 255) & ((shifted < 1) | (shifted > 254))
    table = np.clip(shifted, 0, 255).astype(np.uint8)

    def scale(source: Bytes, result: Bytes) -> int:
        look_up(table, source, result)
        return int(np.count_nonzero(look_up(lost, source)))

    return scale


def _nested_offset_scaler(name: str, factor: float) -> ScaleFunction:
    """Scales ``nested_offset`` in the JSON text of a whole tensor, and pads to the old length."""

    def scale(source: Bytes, result: Bytes) -> int:
        try:
            text = source.tobytes().decode()
            old = parse_strict(text)["nested_offset"] + 0.0
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            why = f"{type(error).__name__}: {error}"
            raise RewriteError(f"{name}: is not a bitsandbytes quantisation state: {why}") from None
        with np.errstate(all="ignore"):
            before = np.array([old]).astype(np.float32)
            new = before * np.float32(factor)
        if not np.isfinite(new).all() or _underflowed(before, new):
            return 1
        data = _with_offset(text, new[0])
        if len(data) > len(result):
            raise RewriteError(f"{name}: has no room for its new nested_offset {new[0]}")
        result[:] = np.frombuffer(data.ljust(len(result)), np.uint8)
        return 0

    return scale


def _with_offset(text: str, offset: np.float32) -> bytes:
    """The text with a new ``nested_offset``, without spaces if it would become longer.

    It fits: bitsandbytes writes the offset as a double with up to 17 digits, and a space after
    every comma and colon, while the shortest decimal of a float32 has at most 9 digits.
    """
    decimal = str(offset)
    if np.float32(float(decimal)) != offset:  # readers may round twice: to double, then to float
        decimal = repr(float(offset))
    spans = [span for path, span in value_spans(text, lambda path: path == ("nested_offset",))]
    new = replace_spans(text, [(span, decimal) for span in spans])
    if len(new) > len(text):
        new = json.dumps(json.loads(new), separators=(",", ":"), ensure_ascii=False)
    return new.encode()
