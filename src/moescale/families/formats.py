"""The table of tensor formats: one row each, with the tensor that carries a projection's scale.

The tensors of one down-projection share its name and differ in the suffix: ``weight``, ``bias``,
``weight_scale_inv``, ``qweight`` and so on. Suffixes, dtypes and, in a few rows, shapes determine
the format, module by module, because checkpoints mix formats; the config only confirms it.

A quantised projection is scaled through its scale, and its codes stay. To add a format, add a row:
the required suffixes (codes first), the one that carries the scale and how it changes, optional
suffixes that stay unchanged, and the source of these facts. Of a product of scales, exactly one
tensor changes. A row never matches a suffix that it does not know: the tensor may be another scale.

Sources, by their version: compressed-tensors 0.20, bitsandbytes 0.50, gptqmodel 7.7,
nvidia-modelopt 0.47, amd-quark 0.13, hqq 0.2.8, mlx-lm 0.32, exllamav2 0.3, exllamav3 1.6,
humming-kernels 0.1, sglang 0.5.23, transformers 5.24.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from moescale.checkpoint.dtypes import BITS, SCALABLE
from moescale.checkpoint.edit import FIRST, Layer, Operation, Role, TensorEdit
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.config import Quantisation

BySuffix = Mapping[str, Tensor]
Shape = tuple[int, ...]


class ScaledTensor(NamedTuple):
    """A tensor of a format that changes when the projection is scaled.

    Attributes:
        role: its purpose in the module.
        operation: how the factor is applied.
        as_f32: store the result as F32, because the dtype's rounding would be the only error.
    """

    role: Role
    operation: Operation = "multiply"
    as_f32: bool = False


class Format(NamedTuple):
    """How one format stores a projection.

    Attributes:
        name: its usual name.
        dtypes: the required suffixes, codes first, each with its possible dtypes.
        scaled: the suffixes that change; those that are not in `dtypes` may be missing.
        unchanged: optional suffixes that do not change.
        shapes_match: whether the shapes fit, if the dtypes alone are ambiguous.
        weight_shape: the shape ``[..., out, in]`` of the weight; None if the shapes do not tell.
        mismatch: the suffix whose shape contradicts the others, if any.
        mixed_bits: tensors of one checkpoint differ in bits, and so in shape.
        source: of these facts.
    """

    name: str
    dtypes: Mapping[str, tuple[str, ...]]
    scaled: Mapping[str, ScaledTensor]
    unchanged: tuple[str, ...] = ()
    shapes_match: Callable[[BySuffix], bool] = lambda tensors: True
    weight_shape: Callable[[BySuffix], Shape | None] = lambda tensors: None
    mismatch: Callable[[BySuffix], str | None] = lambda tensors: None
    mixed_bits: bool = False
    source: str = ""


class UnsupportedFormat(NamedTuple):
    """A format that moescale recognises and cannot scale.

    Attributes:
        name: its usual name.
        dtypes: as in `Format`; () for any dtype.
        why: the reason.
    """

    name: str
    dtypes: Mapping[str, tuple[str, ...]]
    why: str


# Changes of a tensor ----------------------------------------------------------------------------

SCALE: Final = ScaledTensor("scale")
"""Multiplied in its own dtype: engines read it in 16 bits and would drop any more bits."""
WIDENED: Final = ScaledTensor("scale", as_f32=True)
"""Multiplied and stored as F32, which engines allocate for it anyway."""
DIVISOR: Final = ScaledTensor("scale", "divide")
EXPONENT: Final = ScaledTensor("scale", "shift")
"""A power of two: only another power of two can be multiplied into it."""
OFFSET: Final = ScaledTensor("bias")
"""An additive part of the weight, which is multiplied, too."""

# Dtypes -----------------------------------------------------------------------------------------

FLOAT: Final = ("F16", "BF16", "F32")
F32: Final = ("F32",)
FP8: Final = ("F8_E4M3", "F8_E5M2")
E8M0: Final = ("F8_E8M0", "U8")
BYTES: Final = ("U8",)
WORDS: Final = ("I32",)

INPUT_SUFFIXES: Final = frozenset(
    (
        *("input_scale", "input_scale_2", "input_global_scale", "input_zero_point"),
        *("input_scale_ub", "activation_scale", "act_scale", "qscale_act", "pre_quant_scale"),
    )
)
"""Suffixes of tensors that describe the projection's input, which scaling does not change."""

# Shapes -----------------------------------------------------------------------------------------


def _last(tensors: BySuffix, suffix: str) -> int:
    shape = tensors[suffix].shape
    return shape[-1] if shape else 1


def _groups(codes: str, scale: str, *sizes: int) -> Callable[[BySuffix], bool]:
    """Each scale belongs to one of these numbers of elements of the codes' last dimension."""
    return lambda tensors: any(
        _last(tensors, codes) == size * _last(tensors, scale) for size in sizes
    )


def _scale_per_row(scale: str, packed: int = 1) -> Callable[[BySuffix], bool]:
    """One row of scales per output channel; a row of codes packs `packed` channels."""

    def shapes_match(tensors: BySuffix) -> bool:
        codes, scales = tensors["weight"].shape, tensors[scale].shape
        return len(codes) > 1 and len(scales) > 1 and scales[-2] == packed * codes[-2]

    return shapes_match


def _as_stored(tensors: BySuffix) -> Shape:
    return tensors["weight"].shape


def _packed(codes: str, each: int) -> Callable[[BySuffix], Shape]:
    """Each element of the last dimension holds `each` codes."""

    def size(tensors: BySuffix) -> Shape:
        shape = tensors[codes].shape
        return (*shape[:-1], each * shape[-1]) if shape else shape

    return size


def _scaled_in_groups(scale: str, group: int) -> Callable[[BySuffix], Shape]:
    """Each scale belongs to `group` values of the last dimension."""
    return _packed(scale, group)


def _same_rows(*names: str) -> Callable[[BySuffix], str | None]:
    """Each tensor has as many rows as the first, or one number for all rows."""

    def mismatch(tensors: BySuffix) -> str | None:
        rows = tensors[names[0]].shape[:-1]
        others = (name for name in names[1:] if math.prod(tensors[name].shape) > 1)
        return next((name for name in others if tensors[name].shape[:-1] != rows), None)

    return mismatch


def _block_scales(scale: str) -> Callable[[BySuffix], str | None]:
    """One scale per tensor, expert, row, column, or block of values."""

    def mismatch(tensors: BySuffix) -> str | None:
        values, scales = tensors["weight"].shape, tensors[scale].shape
        count, experts = math.prod(scales), math.prod(values[:-2])
        if len(values) < 2 or count in (1, experts):
            return None
        if len(scales) != len(values):
            return None if count in {experts * size for size in values[-2:]} else scale
        ends = zip(values[-2:], scales[-2:], strict=True)
        fits = scales[:-2] == values[:-2] and all(_divides(*pair) for pair in ends)
        return None if fits else scale

    return mismatch


def _divides(size: int, blocks: int) -> bool:
    """Whether a dimension has this many blocks of a usual size; the last may be incomplete."""
    usual = (*(1 << i for i in range(size.bit_length() + 1)), *range(48, size + 1, 16))
    return blocks == 1 or any(-(-size // block) == blocks for block in usual)


def _blocks_of_absmax(tensors: BySuffix) -> str | None:
    """One number per block of codes, which are two per byte in any dtype."""
    weight = tensors["weight"]
    codes = 2 * math.prod(weight.shape) * BITS[weight.dtype] // 8
    blocks = math.prod(tensors["absmax"].shape)
    return None if any(-(-codes // (1 << i)) == blocks for i in range(4, 14)) else "absmax"


def _paired_codes(scale: str) -> Callable[[BySuffix], str | None]:
    """Two 4-bit codes per byte, and one scale per 16 or 32 codes."""

    def mismatch(tensors: BySuffix) -> str | None:
        codes, scales = tensors["weight"].shape, tensors[scale].shape
        groups = codes and scales and codes[-1] in (8 * scales[-1], 16 * scales[-1])
        return None if groups and codes[:-1] == scales[:-1] else scale

    return mismatch


# The rows ---------------------------------------------------------------------------------------

_FP8_SCALES = ("weight_scale_inv", "scale_inv", "weight_scale", "scale", "qscale_weight")
"""All of them multiply, despite their names; fused experts have ``scale_inv``."""
_MX_GROUPS = (16, 24)
"""Bytes for 32 codes of 4 or 6 bits."""
_BNB = ("U8", "I8", *FLOAT)
"""Dtypes into which bitsandbytes packs codes (``bnb_4bit_quant_storage``)."""
_HQQ_UNCHANGED = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)

ROWS: Final[tuple[Format, ...]] = (
    Format(
        "plain",
        {"weight": SCALABLE},
        {"weight": ScaledTensor("weight")},
        weight_shape=_as_stored,
        source="the values themselves",
    ),
    # 8 bits
    *(
        Format(
            "FP8",  # one scale per block, channel or tensor
            {"weight": FP8, scale: FLOAT},
            {scale: WIDENED},
            ("weight_zero_point",),
            weight_shape=_as_stored,
            mismatch=_block_scales(scale),
            source="DeepSeek-V3 README_WEIGHTS; transformers integrations/finegrained_fp8.py;"
            " compressed-tensors naive_quantized; modelopt quant_utils.py: W = weight * scale",
        )
        for scale in _FP8_SCALES
    ),
    *(
        Format(
            "MXFP8 or UE8M0 FP8",
            {"weight": FP8, scale: E8M0},
            {scale: EXPONENT},
            weight_shape=_as_stored,
            mismatch=_block_scales(scale),
            source="compressed-tensors mxfp8, mx_utils.py; modelopt MXFP8;"
            " transformers integrations/finegrained_fp8.py: W = weight * 2**(scale - 127)",
        )
        for scale in _FP8_SCALES
    ),
    Format(
        "INT8",  # compressed-tensors int-quantized, ModelOpt, Quark
        {"weight": ("I8",), "weight_scale": FLOAT},
        {"weight_scale": WIDENED},
        ("weight_zero_point",),
        weight_shape=_as_stored,
        mismatch=_block_scales("weight_scale"),
        source="compressed-tensors naive_quantized; modelopt quant_utils.py; Quark"
        " realquantizer.py: W = (weight - zero_point) * scale; vLLM and sglang allocate F32",
    ),
    Format(
        "block INT8",
        {"weight": ("I8",), "weight_scale_inv": FLOAT},
        {"weight_scale_inv": WIDENED},
        shapes_match=lambda tensors: not _scale_per_row("weight_scale_inv")(tensors),
        weight_shape=_as_stored,
        mismatch=_block_scales("weight_scale_inv"),
        source="sglang blockwise_int8.py: W = weight * scale",
    ),
    Format(
        "LLM.int8 (bitsandbytes)",
        {"weight": ("I8",), "SCB": F32},
        {"SCB": SCALE},
        ("weight_format",),
        weight_shape=_as_stored,
        mismatch=_block_scales("SCB"),
        source="bitsandbytes functional.py int8_vectorwise_dequant: W = weight * SCB / 127",
    ),
    # 4 and 6 bits, floating-point codes
    Format(
        "NVFP4 (ModelOpt, Quark)",
        {"weight": BYTES, "weight_scale": ("F8_E4M3",), "weight_scale_2": F32},
        {"weight_scale_2": SCALE, "svdquant_lora_b": ScaledTensor("weight")},
        ("svdquant_lora_a",),
        weight_shape=_packed("weight", 2),
        mismatch=_paired_codes("weight_scale"),
        source="modelopt unified_export_hf.py: W = fp4 * weight_scale * weight_scale_2;"
        " NVFP4_SVD adds (x lora_a^T) lora_b^T; Quark file2file_quantization.py",
    ),
    Format(
        "NVFP4 (Inkling)",
        {
            "weight": BYTES,
            "weight_scale": ("F8_E4M3",),
            "weight_amax": FLOAT,
            "weight_outer_scale_denominator": FLOAT,
        },
        {"weight_amax": SCALE},
        source="transformers core_model_loading.py Inkling2LoopDequantizeExperts:"
        " W = fp4 * weight_scale * (weight_amax / weight_outer_scale_denominator), one per expert",
    ),
    Format(
        "NVFP4 (compressed-tensors)",
        {"weight_packed": BYTES, "weight_scale": ("F8_E4M3",), "weight_global_scale": F32},
        {"weight_global_scale": DIVISOR},
        ("weight_zero_point", "weight_shape"),
        weight_shape=_packed("weight_packed", 2),
        mismatch=_same_rows("weight_packed", "weight_scale"),
        source="compressed-tensors forward_helpers.py _dequantize:"
        " W = fp4 * weight_scale / weight_global_scale",
    ),
    Format(
        "MXFP4 or MXFP6 (compressed-tensors)",
        {"weight_packed": BYTES, "weight_scale": E8M0},
        {"weight_scale": EXPONENT},
        ("weight_shape",),
        _groups("weight_packed", "weight_scale", *_MX_GROUPS),
        weight_shape=_scaled_in_groups("weight_scale", 32),
        mismatch=_same_rows("weight_packed", "weight_scale"),
        source="compressed-tensors mxfp4, mxfp6, mx_utils.py: W = fp * 2**(scale - 127)",
    ),
    Format(
        "MXFP4 or MXFP6 (Quark, ModelOpt)",
        {"weight": BYTES, "weight_scale": E8M0},
        {"weight_scale": EXPONENT},
        (),
        _groups("weight", "weight_scale", *_MX_GROUPS),
        weight_shape=_scaled_in_groups("weight_scale", 32),
        mismatch=_same_rows("weight", "weight_scale"),
        source="Quark export/utils.py, scale_format e8m0; humming schema/quark.py:"
        " W = fp * 2**(scale - 127)",
    ),
    Format(
        "MXFP4 (gpt-oss)",
        {"blocks": BYTES, "scales": BYTES},
        {"scales": EXPONENT},
        (),
        lambda tensors: tensors["blocks"].shape == (*tensors["scales"].shape, 16),
        weight_shape=_scaled_in_groups("scales", 32),
        source="transformers integrations/mxfp4.py: W = fp4 * 2**(scale - 127)",
    ),
    *(
        Format(
            "FP4 (DeepSeek-V4)",
            {"weight": ("I8",), scale: ("F8_E8M0",)},
            {scale: EXPONENT},
            weight_shape=_packed("weight", 2),
            mismatch=_paired_codes(scale),
            source="transformers integrations/finegrained_fp8.py Fp8Dequantize:"
            " W = fp4 * 2**(scale - 127)",
        )
        for scale in _FP8_SCALES[:4]
    ),
    # 2 to 8 bits, integer codes
    Format(
        "GPTQ or AWQ",  # also AutoRound; layouts differ, the formula is the same
        {"qweight": WORDS, "qzeros": WORDS, "scales": FLOAT},
        {"scales": SCALE},
        ("g_idx",),
        mismatch=_same_rows("scales", "qzeros"),
        source="gptqmodel qlinear/__init__.py _dequantize_from_codes;"
        " autoawq packing_utils.py: W = (q - zero) * scale",
    ),
    *(
        Format(
            "AWQ (gemv_fast, llm-awq)",
            {"qweight": ("I16",), "scales": FLOAT, zeros: FLOAT},
            {"scales": SCALE, zeros: OFFSET},
            mismatch=_same_rows("scales", zeros),
            source="gptqmodel qlinear/gemv_fast_awq.py, mlx_packing.py:"
            " W = q * scale + zeros, zeros = -scale * zero",
        )
        for zeros in ("qzeros", "scaled_zeros")
    ),
    Format(
        "packed INT (compressed-tensors pack-quantized)",
        {"weight_packed": WORDS, "weight_scale": FLOAT, "weight_shape": ("I32", "I64")},
        {"weight_scale": SCALE},
        ("weight_zero_point", "weight_g_idx"),
        mismatch=_same_rows("weight_packed", "weight_scale"),
        source="compressed-tensors pack_quantized: W = (q - zero_point) * scale",
    ),
    Format(
        "packed INT (Quark, humming)",
        {"weight": WORDS, "weight_scale": FLOAT},
        {"weight_scale": SCALE},
        ("weight_zero_point", "zero_point"),
        source="Quark export/nn/modules/realquantizer.py; humming utils/weight.py"
        " dequantize_weight: W = (q - zero_point) * scale",
    ),
    Format(
        "INT4-FP8 (Quark)",
        {"weight": WORDS, "weight_scale": F32, "weight_scale_2": F32},
        {"weight_scale": SCALE},  # the outer one: int4 * weight_scale_2 is an FP8 number
        source="Quark file2file_quantization.py _progressive_quantize_weight; vLLM quark_moe.py:"
        " W = int4 * weight_scale_2 * weight_scale",
    ),
    Format(
        "INT4 AWQ (ModelOpt)",
        {"weight": BYTES, "weight_scale": FLOAT},
        {"weight_scale": SCALE},
        (),
        _scale_per_row("weight_scale", 2),  # BitNet has only one scale, which may divide
        source="modelopt quant_utils.py pack_int4_in_uint8: W = int4 * scale",
    ),
    Format(
        "W4AFP8 (SGLang)",
        {"weight": ("I8",), "weight_scale_inv": FLOAT},
        {"weight_scale_inv": SCALE},
        (),
        _scale_per_row("weight_scale_inv"),
        weight_shape=_packed("weight", 2),
        source="sglang w4afp8.py: W = int4 * scale, cast to the model's dtype",
    ),
    *(
        Format(
            f"{kind.upper()} (bitsandbytes)",
            {"weight": _BNB, "absmax": F32, f"quant_state.bitsandbytes__{kind}": BYTES},
            {"absmax": SCALE},
            ("quant_map",),
            mismatch=_blocks_of_absmax,
            source="bitsandbytes functional.py QuantState: W = table[q] * absmax",
        )
        for kind in ("nf4", "fp4")
    ),
    *(
        Format(
            f"{kind.upper()} with double quantisation (bitsandbytes)",
            {
                "weight": _BNB,
                "absmax": BYTES,
                "nested_absmax": F32,
                f"quant_state.bitsandbytes__{kind}": BYTES,
            },
            {
                "nested_absmax": SCALE,
                f"quant_state.bitsandbytes__{kind}": ScaledTensor("scale", "nested_offset"),
            },
            ("quant_map", "nested_quant_map"),
            mismatch=_blocks_of_absmax,
            source="bitsandbytes functional.py QuantState:"
            " absmax = nested_quant_map[q] * nested_absmax + nested_offset",
        )
        for kind in ("nf4", "fp4")
    ),
    Format(
        "HQQ",
        {"W_q": ("U8", "I32", *FLOAT), "scale": FLOAT, "zero": FLOAT},
        {"scale": SCALE},
        _HQQ_UNCHANGED,
        source="hqq core/quantize.py Quantizer.dequantize: W = (W_q - zero) * scale",
    ),
    # Formats of one engine
    *(
        Format(
            f"{engine} affine",
            {"weight": ("U32",), "scales": FLOAT, offsets: FLOAT},
            {"scales": SCALE, offsets: OFFSET},
            mismatch=_same_rows("weight", "scales", offsets),
            source="mlx core quantize; transformers integrations/metal_quantization.py:"
            " W = q * scale + bias",
        )
        for engine, offsets in (("MLX", "biases"), ("Metal", "qbiases"))
    ),
    Format(
        "MLX MXFP4 or MXFP8",
        {"weight": ("U32",), "scales": BYTES},
        {"scales": EXPONENT},
        (),
        _groups("weight", "scales", 4, 8),  # words of 32 codes of 4 or 8 bits
        weight_shape=_scaled_in_groups("scales", 32),
        mismatch=_same_rows("weight", "scales"),
        source="mlx core quantize; mlx-lm convert.py: groups of 32",
    ),
    Format(
        "MLX NVFP4 with a global scale",
        {"weight": ("U32",), "scales": BYTES, "global_scale": F32},
        {"global_scale": SCALE},
        (),
        _groups("weight", "scales", 2),
        weight_shape=_scaled_in_groups("scales", 16),
        mismatch=_same_rows("weight", "scales"),
        source="mlx-lm models/switch_layers.py, muse_spark.py:"
        " global_scale = weight_scale_2 * constant",
    ),
    Format(
        "EXL2",
        {"q_weight": WORDS, "q_scale": WORDS, "q_scale_max": ("F16",)},
        {"q_scale_max": SCALE},
        ("q_groups", "q_group_map", "q_perm", "q_invperm"),
        mixed_bits=True,
        source="exllamav2 ext.py, qdq_util.cuh dq_scale:"
        " W = q * (q_scale + 1)**2 * q_scale_max / 256",
    ),
    Format(
        "EXL3",
        {"trellis": ("I16",), "svh": ("F16",)},
        {"svh": SCALE},
        ("suh", "su", "mcg", "mul1"),
        mixed_bits=True,
        source="exllamav3 modules/quant/exl3.py: svh multiplies the output channels",
    ),
)

_UNCONFIRMED = "no source confirms which of its tensors carries the scale"

UNSUPPORTED: Final[tuple[UnsupportedFormat, ...]] = (
    UnsupportedFormat("AQLM", {"codes": (), "codebooks": ()}, _UNCONFIRMED),
    UnsupportedFormat("VPTQ", {"centroids": ()}, _UNCONFIRMED),
    UnsupportedFormat("SpQR", {"dense_weights": ()}, _UNCONFIRMED),
    UnsupportedFormat("Quanto", {"_data": ()}, _UNCONFIRMED),
    UnsupportedFormat("torchao", {"weight_qdata": ()}, _UNCONFIRMED),
    UnsupportedFormat("SINQ", {"W_q": (), "meta": ()}, _UNCONFIRMED),
    UnsupportedFormat("FP-Quant", {"forward_hadamard_matrix": ()}, _UNCONFIRMED),
    UnsupportedFormat("FP-Quant", {"dqweight": ()}, _UNCONFIRMED),
    UnsupportedFormat("HIGGS", {"tables": ()}, _UNCONFIRMED),
    UnsupportedFormat("EETQ", {"weight_scales": ()}, _UNCONFIRMED),
    UnsupportedFormat("ParoQuant", {"theta": (), "pairs": ()}, _UNCONFIRMED),
    UnsupportedFormat("Marlin", {"B": ()}, "its scales are laid out for one kernel"),
    UnsupportedFormat("2:4 Marlin", {"scale_packed": ()}, "its scales are laid out for one kernel"),
    UnsupportedFormat("GGUF or BitBLAS", {"qweight": ("U8", "I8")}, _UNCONFIRMED),
    UnsupportedFormat(
        "EXL3 with packed signs", {"trellis": (), "sv": ()}, "its output has signs but no scale"
    ),
    UnsupportedFormat(
        "W4A8 AWQ (ModelOpt)",
        {"weight": BYTES, "weight_scale": FLOAT, "weight_scale_2": ()},
        _UNCONFIRMED,
    ),
    UnsupportedFormat(
        "BitNet",
        {"weight": BYTES, "weight_scale": FLOAT},
        "its scale multiplies in some variants and divides in others",
    ),
    UnsupportedFormat(
        "MLX NVFP4 without a global scale",
        {"weight": ("U32",), "scales": BYTES},
        "its only scales have a mantissa of 3 bits, so multiplication rounds them by up to 6 %",
    ),
    UnsupportedFormat(
        "quantised with a fixed output scale",
        {"output_scale": ()},
        "that scale would also have to change, but the next layer does not expect that",
    ),
)
"""Formats by their distinctive suffixes; the first match is named in the error."""


# From the suffixes of a projection to edits -------------------------------------------------------


_ROUNDING = {"F16": "0.049 %", "BF16": "0.39 %"}
"""Half a unit in the last place: the largest relative rounding error of a normal number."""


def _rounds(edit: TensorEdit) -> bool:
    """Whether a scale stays in 16 bits, so multiplication rounds it again."""
    return edit.role == "scale" and edit.tensor.dtype in _ROUNDING and edit.store_as is None


_STATE_BYTES = 1 << 20
"""The largest believable quantisation state, which is read as a whole."""


@lru_cache(maxsize=1024)
def plain_suffix(suffix: str) -> str:
    """The suffix without its separator; "weight" for a fused tensor without a suffix."""
    return suffix.lstrip("._").removeprefix("weight.") or "weight"


def split_name(name: str) -> tuple[str, str]:
    """Split a name into module and suffix; a name without a known suffix is all module.

    ``m.weight.absmax`` means ``m.absmax`` in bitsandbytes, and ``m_bias`` means ``m.bias`` in fused
    experts.
    """
    match = _SUFFIX.fullmatch(name)
    return (match["module"], match["suffix"]) if match else (name, "weight")


class ShapeInfo(NamedTuple):
    """What the shapes of a projection's tensors tell.

    Attributes:
        codes: suffix of the codes.
        weight_shape: the shape ``[..., out, in]`` of the weight; None if the shapes do not tell.
        mismatch: suffix of a tensor whose shape contradicts the others, if any.
        empty: suffix of an empty tensor, if any.
        comparable: suffix, dtype and shape of the tensors that have equal shapes in all projections
            of this format.
    """

    codes: str
    weight_shape: Shape | None = None
    mismatch: str | None = None
    empty: str | None = None
    comparable: tuple[tuple[str, str, Shape], ...] = ()


def shape_info(tensors: BySuffix) -> ShapeInfo:
    """Inspect the shapes of a projection by the row of its format; without one, only for 0."""
    row = _row_of(tensors)
    needed = {*row.dtypes, *row.scaled, "bias"} if row else tensors.keys()
    empty = next(
        (suffix for suffix, t in tensors.items() if 0 in t.shape and suffix in needed), None
    )
    if row is None or empty is not None:
        return ShapeInfo(next(iter(tensors)), empty=empty)
    codes, size = next(iter(row.dtypes)), row.weight_shape(tensors)
    equal = () if row.mixed_bits else (*row.dtypes, *row.scaled)
    return ShapeInfo(
        codes,
        size,
        row.mismatch(tensors) or _mismatched_bias(tensors, size),
        comparable=tuple(
            (suffix, t.dtype, t.shape)
            for suffix, t in sorted(tensors.items())
            if suffix in equal and not suffix.startswith("quant_state")  # its length varies
        ),
    )


def _mismatched_bias(tensors: BySuffix, size: Shape | None) -> str | None:
    """A bias has one number per output; outputs are columns if experts are transposed."""
    if size is None or len(size) < 2 or "bias" not in tensors:
        return None
    shape = tensors["bias"].shape
    outs = size[-2:] if len(size) > 2 else size[-2:-1]
    return None if any(math.prod(shape) == math.prod(size[:-2]) * out for out in outs) else "bias"


def _row_of(tensors: BySuffix) -> Format | None:
    """The first matching row; None if there is none."""
    dtypes = frozenset((suffix, tensor.dtype) for suffix, tensor in tensors.items())
    return next((row for row in _candidates(dtypes) if row.shapes_match(tensors)), None)


def takes_any_factor(tensors: BySuffix) -> bool:
    """Whether a down-projection can be multiplied by any number, not only by powers of two."""
    row = _row_of(tensors)
    return row is None or all(part.operation != "shift" for part in row.scaled.values())


def scaled_tensors(
    module: str,
    tensors: BySuffix,
    factor: float,
    alternative: str | None = None,
    layer: Layer = FIRST,
) -> list[TensorEdit]:
    """The edits that multiply a down-projection by `factor`.

    Args:
        module: the projection's name, for errors.
        tensors: its tensors by suffix.
        factor: the number to multiply by.
        alternative: an alternative for this model, as a sentence for the error.
        layer: its layer.

    Raises:
        UnsupportedError: no row matches, so scaling would be a guess; or the format cannot be
            multiplied by this factor.
        CheckpointError: a tensor that the format requires is missing.
    """
    row = _row_of(tensors)
    if row is None and factor == 1.0:
        return []  # nothing changes, so the format does not matter
    if row is None:
        raise _format_error(module, tensors)
    parts = {**row.scaled, "bias": ScaledTensor("bias")}
    if any(part.operation == "shift" for part in parts.values()):
        _check_power_of_two(module, row, factor, alternative)
    found = [(tensors[suffix], part) for suffix, part in parts.items() if suffix in tensors]
    return [_make_edit(tensor, part, row, factor, layer) for tensor, part in found]


@lru_cache(maxsize=64)  # a checkpoint has very few kinds of projections
def _candidates(dtypes: frozenset[tuple[str, str]]) -> tuple[Format, ...]:
    """The rows whose required tensors are present, without any unknown tensor."""
    found = dict(dtypes)
    return tuple(row for row in ROWS if _has_tensors(row, found))


def _has_tensors(row: Format, found: Mapping[str, str]) -> bool:
    values = {"bias", *row.scaled} - row.dtypes.keys()
    return (
        all(found.get(suffix) in dtypes for suffix, dtypes in row.dtypes.items())
        and found.keys() <= _known(row)
        and all(found.get(suffix, "F32") in SCALABLE for suffix in values)
    )


def _known(row: Format) -> set[str]:
    return {*row.dtypes, *row.scaled, *row.unchanged, *INPUT_SUFFIXES, "bias"}


_SUFFIXES = sorted(set[str]().union(*(_known(row) for row in ROWS)), key=len, reverse=True)
_SUFFIX = re.compile(
    r"(?P<module>.+?)(?:(?:\.weight)?\.|_)(?P<suffix>" + "|".join(map(re.escape, _SUFFIXES)) + ")"
)
"""A name that ends in a suffix of the table; the longest suffix wins."""


def _make_edit(
    tensor: Tensor, part: ScaledTensor, row: Format, factor: float, layer: Layer
) -> TensorEdit:
    if part.operation == "nested_offset" and tensor.nbytes > _STATE_BYTES:
        raise CheckpointError(
            f"{tensor.name}: has {tensor.nbytes} bytes, too many for a quantisation state"
        )
    store_as = "F32" if part.as_f32 and tensor.dtype in ("F16", "BF16") else None
    return TensorEdit(tensor, factor, part.operation, store_as, part.role, row.name, layer)


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(factor)[0] == 0.5


def _check_power_of_two(module: str, row: Format, factor: float, alternative: str | None) -> None:
    if _is_power_of_two(factor):
        return
    below = 2.0 ** (math.frexp(factor)[1] - 1)
    exact = f"Exact factors are --factor {below:.9g} and --factor {2 * below:.9g}."
    raise UnsupportedError(
        f"{module}: is stored as {row.name}, whose scales are powers of two: multiplying it by"
        f" {factor:.9g} would need new codes",
        hint=f"{alternative} {exact}" if alternative else exact,
    )


# Refusals -----------------------------------------------------------------------------------------


def _format_error(module: str, tensors: BySuffix) -> UnsupportedError | CheckpointError:
    """The error if no row matches: an unsupported format, a missing tensor, or unknown tensors."""
    hint = "Rescale the unquantised checkpoint and quantise the result."
    if any("parametrizations" in suffix for suffix in tensors):
        hint = "Remove it first: torch.nn.utils.parametrize.remove_parametrizations(...)."
    found = ", ".join(f"{suffix} ({tensor.dtype})" for suffix, tensor in sorted(tensors.items()))
    for refused in UNSUPPORTED:
        if all(_has(tensors, suffix, dtypes) for suffix, dtypes in refused.dtypes.items()):
            return UnsupportedError(
                f"{module}: is stored as {refused.name} ({found}), which cannot be scaled:"
                f" {refused.why}",
                hint=hint,
            )
    alone = tensors.keys() <= {"weight", "bias", *INPUT_SUFFIXES}
    if alone and "weight" not in tensors:
        return CheckpointError(
            f"{module}: has no weight, only {next(iter(sorted(tensors)))}",
            hint="The checkpoint is incomplete; fetch the missing shard again.",
        )
    if alone and "weight" in tensors and tensors["weight"].dtype not in SCALABLE:
        return UnsupportedError(
            f"{module}: its weight is {tensors['weight'].dtype} without a tensor that could be the"
            " scale, and codes cannot be multiplied",
            hint=hint,
        )
    if row := _most_similar(tensors):
        missing = ", ".join(suffix for suffix in row.dtypes if suffix not in tensors)
        return CheckpointError(
            f"{module}: looks like {row.name} ({found}), but has no {missing}",
            hint="The checkpoint is incomplete; fetch the missing shard again.",
        )
    return UnsupportedError(
        f"{module}: is stored as {found}, a format that moescale cannot scale", hint=hint
    )


def _has(tensors: BySuffix, marker: str, dtypes: tuple[str, ...]) -> bool:
    return any(
        (suffix == marker or suffix.startswith(marker + "."))
        and (not dtypes or tensor.dtype in dtypes)
        for suffix, tensor in tensors.items()
    )


def _most_similar(tensors: BySuffix) -> Format | None:
    """The row with the fewest missing tensors, among those that know all present ones."""

    def lacking(row: Format) -> int:
        return sum(suffix not in tensors for suffix in row.dtypes)

    rows = [
        row
        for row in ROWS
        if next(iter(row.dtypes)) in tensors
        and tensors.keys() <= _known(row)
        and all(
            tensors[suffix].dtype in row.dtypes[suffix]
            for suffix in row.dtypes
            if suffix in tensors
        )
        and lacking(row)
        and not ("weight" in row.dtypes and lacking(row) == len(row.dtypes) - 1)
    ]
    return min(rows, key=lacking, default=None)


# The config ---------------------------------------------------------------------------------------


def check_quantisation_config(
    edits: Iterable[TensorEdit], quantisation: Quantisation, alternative: str | None = None
) -> list[str]:
    """Check the config for facts that the tensors do not show, and warn of rounding.

    Args:
        edits: the tensors to scale.
        quantisation: what the config says.
        alternative: as in `scaled_tensors`.

    Returns:
        One remark per format.

    Raises:
        UnsupportedError: the config says that the scales have another format than the table's.
    """
    rounded: dict[str, None] = {}
    for edit in edits:
        if edit.operation == "shift" and quantisation.e5m3:
            raise UnsupportedError(
                f"{edit.tensor.name}: the config says E5M3, so its bytes are not powers of two",
                hint="Rescale the unquantised checkpoint and quantise the result.",
            )
        if _is_power_of_two(edit.factor):
            continue
        if _rounds(edit):
            rounded[_rounding_remark(edit)] = None
        elif edit.format == "FP8" and quantisation.ue8m0:
            rounded[_ue8m0_remark(alternative)] = None
    return list(rounded)


def _rounding_remark(edit: TensorEdit) -> str:
    most = f"by at most {_ROUNDING[edit.tensor.dtype]}"
    what = f"changes a weight {most}"
    if any(row.name == edit.format and OFFSET in row.scaled.values() for row in ROWS):
        what = f"changes both terms of a weight, code times scale and offset, {most} each"
    return (
        f"{edit.format}: its {edit.tensor.dtype} scales are rounded when multiplied, which {what};"
        " all codes stay"
    )


def _ue8m0_remark(alternative: str | None) -> str:
    return (
        "config.json says scale_fmt ue8m0, and the factor is not a power of two: transformers, and"
        " vLLM and SGLang with DeepGEMM, silently round such scales to powers of two"
        + (f". {alternative}" if alternative else "")
    )
