"""The tensor types of GGUF, one row each: the size of a block, and where its scales are.

The weights of a block are linear in its scales: to multiply the weights, the scales are multiplied;
codes and quantised sub-scales stay.

Source: llama.cpp 0.5.0, ``ggml/src/ggml.c`` (``type_traits``), ``ggml/src/ggml-common.h`` (the
block structures) and ``ggml/src/ggml-quants.c`` (how a block is dequantised).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

ScaleKind = Literal["F32", "F16", "BF16", "E8M0", "NIBBLES"]
"""How a scale is stored. ``NIBBLES``: an F16 whose nibbles, the lowest first, are the top nibbles
of four 16-bit words. ``E8M0``: the exponent of a power of two."""


class GgmlType(NamedTuple):
    """One tensor type.

    Attributes:
        number: its id in a file.
        name: as llama.cpp prints it, in capitals.
        weights: weights per block.
        size: bytes per block.
        scales: byte offsets of the scales in a block; () if the type cannot be scaled.
        kind: how the scales are stored.
        refused: why the type cannot be scaled; None if it can.
    """

    number: int
    name: str
    weights: int
    size: int
    scales: tuple[int, ...] = (0,)
    kind: ScaleKind = "F16"
    refused: str | None = None

    @property
    def rounding(self) -> float:
        """Upper bound of the relative rounding error of a scale that stays a normal number."""
        return {"F32": 2**-24, "F16": 2**-11, "NIBBLES": 2**-11, "BF16": 2**-8, "E8M0": 0.0}[
            self.kind
        ]


_NOT_FOR_EXPERTS = "llama.cpp does not use this type for expert weights"
_NOT_IN_FILES = "llama.cpp uses this type only while it computes, not in files"
_NVFP4 = (
    "its block scales (FP8 E4M3) cannot be multiplied without loss; blk.N.ffn_down_exps.scale can"
)


def _none(number: int, name: str, weights: int, size: int, why: str) -> GgmlType:
    return GgmlType(number, name, weights, size, (), "F32", why)


ROWS: Final[tuple[GgmlType, ...]] = (
    GgmlType(0, "F32", 1, 4, kind="F32"),
    GgmlType(1, "F16", 1, 2),
    GgmlType(2, "Q4_0", 32, 18),
    GgmlType(3, "Q4_1", 32, 20, (0, 2)),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24, (0, 2)),
    GgmlType(8, "Q8_0", 32, 34),
    _none(9, "Q8_1", 32, 36, _NOT_IN_FILES),
    GgmlType(10, "Q2_K", 256, 84, (80, 82)),
    GgmlType(11, "Q3_K", 256, 110, (108,)),
    GgmlType(12, "Q4_K", 256, 144, (0, 2)),
    GgmlType(13, "Q5_K", 256, 176, (0, 2)),
    GgmlType(14, "Q6_K", 256, 210, (208,)),
    _none(15, "Q8_K", 256, 292, _NOT_IN_FILES),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    _none(24, "I8", 1, 1, _NOT_FOR_EXPERTS),
    _none(25, "I16", 1, 2, _NOT_FOR_EXPERTS),
    _none(26, "I32", 1, 4, _NOT_FOR_EXPERTS),
    _none(27, "I64", 1, 8, _NOT_FOR_EXPERTS),
    _none(28, "F64", 1, 8, _NOT_FOR_EXPERTS),
    GgmlType(29, "IQ1_M", 256, 56, (48,), "NIBBLES"),
    GgmlType(30, "BF16", 1, 2, kind="BF16"),
    GgmlType(34, "TQ1_0", 256, 54, (52,)),
    GgmlType(35, "TQ2_0", 256, 66, (64,)),
    GgmlType(39, "MXFP4", 32, 17, kind="E8M0"),
    _none(40, "NVFP4", 64, 36, _NVFP4),
    GgmlType(41, "Q1_0", 128, 18),
    GgmlType(42, "Q2_0", 64, 18),
)

BY_NUMBER: Final[Mapping[int, GgmlType]] = {row.number: row for row in ROWS}
BY_NAME: Final[Mapping[str, GgmlType]] = {row.name: row for row in ROWS}

BLOCKS: Final[Mapping[str, GgmlType]] = {row.name: row for row in ROWS if row.weights > 1}
"""The types with several weights per block; only GGUF has them."""

NOISE: Final[Mapping[str, float]] = {
    "Q4_0": 0.082,
    "Q4_1": 0.07,
    "Q5_0": 0.041,
    "Q5_1": 0.034,
    "Q8_0": 0.0054,
    "Q2_K": 0.27,
    "Q3_K": 0.15,
    "Q4_K": 0.071,
    "Q5_K": 0.036,
    "Q6_K": 0.017,
    "IQ2_XXS": 0.34,
    "IQ2_XS": 0.3,
    "IQ3_XXS": 0.18,
    "IQ1_S": 0.49,
    "IQ4_NL": 0.075,
    "IQ3_S": 0.14,
    "IQ2_S": 0.25,
    "IQ4_XS": 0.076,
    "IQ1_M": 0.45,
    "TQ1_0": 0.81,
    "TQ2_0": 0.81,
    "MXFP4": 0.11,
    "Q1_0": 0.6,
    "Q2_0": 0.72,
}
"""Relative error (rms) of the type itself: of llama.cpp's quantiser on normally distributed
weights."""

REMOVED: Final[Mapping[int, str]] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that llama.cpp no longer reads."""
