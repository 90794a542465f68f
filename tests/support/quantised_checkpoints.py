"""Tiny checkpoints in every quantised format, and independent formulas for their weights.

Names, dtypes and shapes are those of real files. Nothing here uses moescale. A projection is a
mapping from suffixes of its name to tensors; its weight is a sum of terms (one in most formats),
computed in float64 from the published formula of the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from support.checkpoints import Raw, values, write_shards

Array = np.ndarray
Parts = dict[str, Raw]
Terms = list[Array]

OUT, IN = 64, 64
"""The shape of a down-projection, in multiples of what the packings need."""
EXPERTS, LAYERS = 2, 2

NUMPY = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U32": np.uint32,
}

# Tensors ----------------------------------------------------------------------------------------


def raw(dtype: str, array: Any) -> Raw:
    """A tensor of this dtype; floats are rounded to it."""
    data = np.asarray(array).astype(NUMPY[dtype])
    return dtype, data.shape, data.tobytes()


def array(tensor: Raw) -> Array:
    """The elements of a tensor; floats as float64."""
    dtype, shape, data = tensor
    result = np.frombuffer(data, NUMPY[dtype]).reshape(shape)
    return result.astype(np.float64) if result.dtype.kind not in "iu" else result


def scales(rng: np.random.Generator, *shape: int) -> Array:
    """Random scales: positive, around 0.01."""
    return np.exp(rng.uniform(np.log(2e-3), np.log(5e-2), shape))


def exponents(rng: np.random.Generator, *shape: int) -> Array:
    """E8M0 bytes of such scales, including the one for blocks of zeros."""
    result = rng.integers(117, 124, shape)
    result.flat[0] = 0
    return result


def fp8_codes(rng: np.random.Generator, *shape: int) -> Array:
    """Random E4M3 numbers without NaN."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(ml_dtypes.float8_e4m3fn)


def integers(rng: np.random.Generator, dtype: str, *shape: int) -> Raw:
    """Codes with random bits."""
    info = np.iinfo(NUMPY[dtype])
    return raw(dtype, rng.integers(info.min, info.max, shape, NUMPY[dtype], endpoint=True))


# Codes to numbers -------------------------------------------------------------------------------

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = np.linspace(-1, 1, 16)
"""In place of the table of bitsandbytes, which does not affect scaling."""


def unpack(words: Array, bits: int) -> Array:
    """Unsigned codes of this number of bits, from the low bits of each word to the high ones."""
    width = words.dtype.itemsize * 8
    shifts = np.arange(0, width, bits, dtype=np.uint64)
    wide = words.astype(np.uint64) & np.uint64(2**width - 1)
    codes = (wide[..., None] >> shifts) & np.uint64(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.int64)


def spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """Scales, repeated over their blocks."""
    for axis in (-2, -1):
        scale = np.repeat(scale, shape[axis] // scale.shape[axis], axis)
    return scale


def power(exponent: Array) -> Array:
    """The values of E8M0 bytes; writers use 0 for blocks of zeros."""
    return np.ldexp(1.0, exponent.astype(np.int64) - 127)


def every_code(scale: Array, count: int) -> Array:
    """Each scale times each code: all values that a weight can have."""
    return scale[..., None] * np.arange(count)


# Cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One format in a checkpoint of some model type.

    Attributes:
        id: for the test's name.
        make: makes a projection with random content.
        terms: the terms that its weight is the sum of.
        changed: the operation for each suffix that changes.
        family: names and config around the experts.
        config: the entries of ``config.json`` for the format.
        fused: all experts of a layer are in one tensor.
        note: a word in the remark on rounding; None if all is exact.
    """

    id: str
    make: Callable[[np.random.Generator], Parts]
    terms: Callable[[Parts], Terms]
    changed: Mapping[str, str]
    family: str = "qwen3_moe"
    config: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    note: str | None = None


def _fp8(
    scale: str, dtype: str, shape: tuple[int, ...], separator: str = ".", *more: str
) -> Callable[[np.random.Generator], Parts]:
    weight = separator + "weight" if separator == "." else ""

    def make(rng: np.random.Generator) -> Parts:
        lead = shape[:-2] if len(shape) > 2 else ()
        size = exponents(rng, *shape) if dtype in ("U8", "F8_E8M0") else scales(rng, *shape)
        return {
            weight: raw("F8_E4M3", fp8_codes(rng, *lead, OUT, IN)),
            separator + scale: raw(dtype, size),
            **{separator + name: raw("F32", scales(rng, 1)) for name in more},
        }

    return make


def _product(parts: Parts) -> Terms:
    """The weight times its scale, which is per block, per channel or for the whole tensor."""
    (weight, *_), (scale, *_) = _codes_and_scale(parts)
    scale = scale.reshape((1, 1)) if scale.size == 1 else scale
    scale = scale[:, None] if scale.ndim == 1 else scale
    return [weight * spread(scale, weight.shape)]


def _codes_and_scale(parts: Parts) -> tuple[list[Array], list[Array]]:
    names = [name for name in parts if "scale" in name and "input" not in name]
    names = [name for name in names if "activation" not in name and "act" not in name]
    codes = [array(parts[name]) for name in ("", ".weight", "_weight") if name in parts]
    sizes = [
        power(array(parts[name])) if parts[name][0] in ("U8", "F8_E8M0") else array(parts[name])
        for name in names
    ]
    return codes, sizes


def _int8(scale: str, dtype: str, shape: tuple[int, ...], **zero: int) -> Callable[..., Parts]:
    def make(rng: np.random.Generator) -> Parts:
        parts = {
            ".weight": integers(rng, "I8", OUT, IN),
            "." + scale: raw(dtype, scales(rng, *shape)),
        }
        if zero:
            parts[".weight_zero_point"] = raw("I8", rng.integers(-9, 9, shape))
        return parts

    return make


def _int8_terms(parts: Parts) -> Terms:
    scale = next(array(parts[name]) for name in parts if "scale" in name)
    codes = array(parts[".weight"]).astype(np.float64)
    if ".weight_zero_point" in parts:
        codes = codes - spread(array(parts[".weight_zero_point"]), codes.shape)
    scale = scale[:, None] if scale.ndim == 1 else scale
    return [codes * spread(scale, codes.shape)]


def _ct_nvfp4(rng: np.random.Generator) -> Parts:
    return {
        ".weight_packed": integers(rng, "U8", OUT, IN // 2),
        ".weight_scale": raw("F8_E4M3", scales(rng, OUT, IN // 16) * 5000),
        ".weight_global_scale": raw("F32", scales(rng, 1) * 1e6),
        ".input_global_scale": raw("F32", scales(rng, 1) * 1e5),
    }


def _ct_nvfp4_terms(parts: Parts) -> Terms:
    codes = FP4[unpack(array(parts[".weight_packed"]), 4)]
    scale = array(parts[".weight_scale"]) / array(parts[".weight_global_scale"])
    return [codes * spread(scale, codes.shape)]


def _modelopt_nvfp4(rng: np.random.Generator, lead: tuple[int, ...] = (), sep: str = ".") -> Parts:
    return {
        sep + "weight" if sep == "." else "": integers(rng, "U8", *lead, OUT, IN // 2),
        sep + "weight_scale": raw("F8_E4M3", scales(rng, *lead, OUT, IN // 16) * 5000),
        sep + "weight_scale_2": raw("F32", scales(rng, *lead) * 1e-2),
        sep + "input_scale": raw("F32", scales(rng, *lead)),
    }


def _modelopt_nvfp4_terms(parts: Parts) -> Terms:
    sep = "." if ".weight" in parts else "_"
    codes = FP4[unpack(array(parts[".weight" if sep == "." else ""]), 4)]
    second = array(parts[sep + "weight_scale_2"])
    second = second.reshape(*second.shape, *(1,) * (codes.ndim - second.ndim))
    result = [codes * spread(array(parts[sep + "weight_scale"]), codes.shape) * second]
    if ".svdquant_lora_b" in parts:
        result.append(array(parts[".svdquant_lora_b"]) @ array(parts[".svdquant_lora_a"]))
    return result


def _inkling_nvfp4(rng: np.random.Generator) -> Parts:
    return {
        "_weight": integers(rng, "U8", EXPERTS, OUT, IN // 2),
        "_weight_scale": raw("F8_E4M3", scales(rng, EXPERTS, OUT, IN // 16) * 5000),
        "_weight_amax": raw("F32", scales(rng, EXPERTS) * 100),
        "_weight_outer_scale_denominator": raw("F32", np.full(EXPERTS, 2688.0)),
    }


def _inkling_nvfp4_terms(parts: Parts) -> Terms:
    codes = FP4[unpack(array(parts["_weight"]), 4)]
    outer = array(parts["_weight_amax"]) / array(parts["_weight_outer_scale_denominator"])
    return [codes * spread(array(parts["_weight_scale"]), codes.shape) * outer[:, None, None]]


def _inkling_mxfp8(rng: np.random.Generator) -> Parts:
    sizes = exponents(rng, EXPERTS, OUT, IN // 32)
    codes = np.where(np.repeat(sizes, 32, -1) == 0, 0, fp8_codes(rng, EXPERTS, OUT, IN))
    return {"_weight": raw("F8_E4M3", codes), "_weight_scale": raw("U8", sizes)}


def _svd(rng: np.random.Generator) -> Parts:
    return {
        **_modelopt_nvfp4(rng),
        ".pre_quant_scale": raw("BF16", scales(rng, IN)),
        ".svdquant_lora_a": raw("BF16", rng.standard_normal((4, IN))),
        ".svdquant_lora_b": raw("BF16", rng.standard_normal((OUT, 4))),
    }


def _mx(codes: str, bits: int, dtype: str = "U8", scale: str = ".weight_scale", of: str = "U8"):
    def make(rng: np.random.Generator) -> Parts:
        return {
            codes: integers(rng, of, OUT, IN * bits // 8),
            scale: raw(dtype, exponents(rng, OUT, IN // 32)),
        }

    def terms(parts: Parts) -> Terms:
        sizes = power(array(parts[scale]))
        if bits != 4:
            return [every_code(sizes, 1 << bits)]
        found = FP4[unpack(array(parts[codes]).view(np.uint8), 4)]
        return [found * spread(sizes, found.shape)]

    return make, terms


def _gpt_oss(rng: np.random.Generator) -> Parts:
    return {
        "_blocks": integers(rng, "U8", EXPERTS, OUT, IN // 32, 16),
        "_scales": raw("U8", exponents(rng, EXPERTS, OUT, IN // 32)),
        "_bias": raw("BF16", rng.standard_normal((EXPERTS, OUT))),
    }


def _gpt_oss_terms(parts: Parts) -> Terms:
    codes = FP4[unpack(array(parts["_blocks"]), 4)]
    return [codes * power(array(parts["_scales"]))[..., None]]


def _gptq(dtype: str) -> Callable[[np.random.Generator], Parts]:
    def make(rng: np.random.Generator) -> Parts:
        return {
            ".qweight": integers(rng, "I32", IN // 8, OUT),
            ".qzeros": integers(rng, "I32", IN // 32, OUT // 8),
            ".scales": raw(dtype, scales(rng, IN // 32, OUT)),
            ".g_idx": raw("I32", rng.permutation(IN) // 32),
            ".bias": raw("F16", rng.standard_normal(OUT)),
        }

    return make


def _gptq_terms(parts: Parts) -> Terms:
    codes = unpack(array(parts[".qweight"]).T.copy(), 4).T
    zeros = unpack(array(parts[".qzeros"]), 4) + 1
    group = array(parts[".g_idx"])
    return [array(parts[".scales"])[group] * (codes - zeros[group])]


_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Positions of the eight codes in a word, from the first column to the last."""


def _awq_gemm(rng: np.random.Generator) -> Parts:
    return {
        ".qweight": integers(rng, "I32", IN, OUT // 8),
        ".qzeros": integers(rng, "I32", IN // 32, OUT // 8),
        ".scales": raw("F16", scales(rng, IN // 32, OUT)),
    }


def _awq_gemm_terms(parts: Parts) -> Terms:
    def codes(name: str) -> Array:
        found = unpack(array(parts[name]), 4)
        return found.reshape(len(found), -1, 8)[:, :, _AWQ_ORDER].reshape(len(found), -1)

    scale = np.repeat(array(parts[".scales"]), 32, 0)
    return [(codes(".qweight") - np.repeat(codes(".qzeros"), 32, 0)) * scale]


def _awq_gemv(rng: np.random.Generator) -> Parts:
    return {
        ".qweight": integers(rng, "I32", OUT, IN // 8),
        ".qzeros": integers(rng, "I32", OUT, 1),
        ".scales": raw("F16", scales(rng, OUT, 8)),  # padded to eight groups
    }


def _awq_gemv_terms(parts: Parts) -> Terms:
    codes, zeros = unpack(array(parts[".qweight"]), 4), unpack(array(parts[".qzeros"]), 4)
    groups = IN // 32
    scale = array(parts[".scales"])[:, :groups]
    return [(codes - spread(zeros[:, :groups], codes.shape)) * spread(scale, codes.shape)]


def _awq_fast(zeros: str) -> Callable[[np.random.Generator], Parts]:
    def make(rng: np.random.Generator) -> Parts:
        scale = scales(rng, 8, OUT)
        return {
            ".qweight": integers(rng, "I16", OUT // 4, IN),
            zeros: raw("F16", -scale * rng.integers(1, 15, scale.shape)),
            ".scales": raw("F16", scale),
        }

    return make


def _awq_fast_terms(zeros: str) -> Callable[[Parts], Terms]:
    def terms(parts: Parts) -> Terms:
        of_codes = every_code(array(parts[".scales"]), 16)
        return [of_codes, array(parts[zeros])[..., None] + 0 * of_codes]

    return terms


def _pack_quantized(rng: np.random.Generator, zero: bool = False) -> Parts:
    parts = {
        ".weight_packed": integers(rng, "I32", OUT, IN // 8),
        ".weight_scale": raw("BF16", scales(rng, OUT, IN // 32)),
        ".weight_shape": raw("I32" if zero else "I64", [OUT, IN]),
    }
    if zero:
        parts[".weight_zero_point"] = integers(rng, "I32", OUT // 8, IN // 32)
        parts[".weight_g_idx"] = raw("I32", np.arange(IN) // 32)
    return parts


def _pack_terms(parts: Parts) -> Terms:
    codes = unpack(array(parts[".weight_packed"]), 4)
    zeros = np.full((OUT, IN // 32), 8)
    if ".weight_zero_point" in parts:
        zeros = unpack(array(parts[".weight_zero_point"]).T.copy(), 4).T
    scale = array(parts[".weight_scale"])
    return [(codes - spread(zeros, codes.shape)) * spread(scale, codes.shape)]


def _quark_int4(rng: np.random.Generator) -> Parts:
    return {
        ".weight": integers(rng, "I32", IN, OUT // 8),
        ".weight_scale": raw("F32", scales(rng, IN // 32, OUT)),
        ".weight_zero_point": integers(rng, "I32", IN // 32, OUT // 8),
    }


def _quark_int4_terms(parts: Parts) -> Terms:
    codes, zeros = unpack(array(parts[".weight"]), 4), unpack(array(parts[".weight_zero_point"]), 4)
    return [(codes - np.repeat(zeros, 32, 0)) * np.repeat(array(parts[".weight_scale"]), 32, 0)]


def _int4_fp8(rng: np.random.Generator) -> Parts:
    return {
        ".weight": integers(rng, "I32", OUT, IN // 8),
        ".weight_scale": raw("F32", scales(rng, 1)[0]),
        ".weight_scale_2": raw("F32", scales(rng, OUT) * 1000),
    }


def _int4_fp8_terms(parts: Parts) -> Terms:
    codes = unpack(array(parts[".weight"]), 4) - 8
    return [codes * array(parts[".weight_scale_2"])[:, None] * array(parts[".weight_scale"])]


def _modelopt_awq(rng: np.random.Generator) -> Parts:
    return {
        ".weight": integers(rng, "U8", OUT // 2, IN),
        ".weight_scale": raw("BF16", scales(rng, OUT, IN // 32)),
        ".pre_quant_scale": raw("BF16", scales(rng, IN)),
    }


def _modelopt_awq_terms(parts: Parts) -> Terms:
    packed = array(parts[".weight"])
    codes = np.empty((OUT, IN))
    codes[0::2], codes[1::2] = ((packed & 15) ^ 8) - 8.0, ((packed >> 4) ^ 8) - 8.0
    return [codes * spread(array(parts[".weight_scale"]), codes.shape)]


def _w4afp8(rng: np.random.Generator) -> Parts:
    return {
        ".weight": integers(rng, "I8", OUT, IN // 2),
        ".weight_scale_inv": raw("F32", scales(rng, OUT, IN // 32)),
        ".input_scale": raw("F32", scales(rng, 1)),
    }


def _w4afp8_terms(parts: Parts) -> Terms:
    codes = (unpack(array(parts[".weight"]).view(np.uint8), 4) ^ 8) - 8
    return [codes * spread(array(parts[".weight_scale_inv"]), codes.shape)]


def _bnb4(kind: str, nested: bool, fused: bool = False) -> Callable[[np.random.Generator], Parts]:
    at = "." if fused else ".weight."

    def make(rng: np.random.Generator) -> Parts:
        count = OUT * IN * (EXPERTS if fused else 1)
        blocks = count // 64
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]}
        parts = {
            "" if fused else ".weight": integers(rng, "U8", count // 2, 1),
            at + "absmax": raw("F32", scales(rng, blocks)),
            at + "quant_map": raw("F32", NF4),
        }
        if nested:
            parts[at + "absmax"] = integers(rng, "U8", blocks)
            parts[at + "nested_absmax"] = raw("F32", scales(rng, -(-blocks // 256)))
            parts[at + "nested_quant_map"] = raw("F32", np.linspace(-1, 1, 256))
            offset = float(np.float32(scales(rng, 1)[0]))
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        text = json.dumps(state).encode()
        name = at + f"quant_state.bitsandbytes__{kind}"
        parts[name] = raw("U8", np.frombuffer(text, np.uint8))
        return parts

    return make


def _bnb4_terms(parts: Parts) -> Terms:
    at = "." if ".absmax" in parts else ".weight."
    packed = array(parts["" if at == "." else ".weight"]).reshape(-1)
    codes = NF4[np.stack([packed >> 4, packed & 15], -1)].reshape(-1, 64)
    absmax = array(parts[at + "absmax"])
    if at + "nested_absmax" not in parts:
        return [codes * absmax[:, None]]
    table, largest = array(parts[at + "nested_quant_map"]), array(parts[at + "nested_absmax"])
    state = next(raw_ for name, raw_ in parts.items() if "quant_state" in name)
    offset = np.float32(json.loads(state[2])["nested_offset"])
    nested = table[absmax] * np.repeat(largest, 256)[: len(absmax)]
    return [codes * nested[:, None], codes * np.float64(offset)]


def _llm_int8(rng: np.random.Generator) -> Parts:
    return {
        ".weight": integers(rng, "I8", OUT, IN),
        ".SCB": raw("F32", scales(rng, OUT)),
        ".weight_format": raw("U8", 0),
    }


def _hqq(rng: np.random.Generator) -> Parts:
    groups = OUT * IN // 64
    return {
        ".W_q": integers(rng, "U8", groups // 2, 64),
        ".scale": raw("BF16", scales(rng, groups, 1)),
        ".zero": raw("BF16", rng.uniform(4, 12, (groups, 1))),
        ".nbits": raw("I32", 4),
        ".group_size": raw("I32", 64),
        ".axis": raw("I32", 1),
        ".shape": raw("I64", [OUT, IN]),
        ".packing": raw("U8", np.frombuffer(b"4bit_u8", np.uint8)),
        ".compute_dtype": raw("U8", np.frombuffer(b"torch.bfloat16", np.uint8)),
        ".view_as_float": raw("U8", 0),
        ".stores_quant_config": raw("U8", 1),
        ".encoded_state_dict": raw("U8", 1),
    }


def _hqq_terms(parts: Parts) -> Terms:
    packed = array(parts[".W_q"])
    codes = np.concatenate([packed >> 4, packed & 15])
    return [(codes - array(parts[".zero"])) * array(parts[".scale"])]


def _mlx_affine(offsets: str) -> Callable[[np.random.Generator], Parts]:
    def make(rng: np.random.Generator) -> Parts:
        scale = scales(rng, EXPERTS, OUT, IN // 32)
        return {
            ".weight": integers(rng, "U32", EXPERTS, OUT, IN // 8),
            ".scales": raw("BF16", scale),
            offsets: raw("BF16", -8 * scale),
            ".bias": raw("BF16", rng.standard_normal((EXPERTS, OUT))),
        }

    return make


def _mlx_affine_terms(offsets: str) -> Callable[[Parts], Terms]:
    def terms(parts: Parts) -> Terms:
        codes = unpack(array(parts[".weight"]), 4)
        sizes, zeros = (spread(array(parts[name]), codes.shape) for name in (".scales", offsets))
        return [codes * sizes, zeros]

    return terms


def _mlx_mx(bits: int) -> Callable[[np.random.Generator], Parts]:
    def make(rng: np.random.Generator) -> Parts:
        return {
            ".weight": integers(rng, "U32", EXPERTS, OUT, IN * bits // 32),
            ".scales": raw("U8", exponents(rng, EXPERTS, OUT, IN // 32)),
        }

    return make


def _mlx_mx_terms(parts: Parts) -> Terms:
    packed, sizes = array(parts[".weight"]), power(array(parts[".scales"]))
    if packed.shape[-1] == IN // 8:
        codes = FP4[unpack(packed, 4)]
    else:
        codes = unpack(packed, 8).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        codes = np.nan_to_num(codes.astype(np.float64))
    return [codes * spread(sizes, codes.shape)]


def _mlx_nvfp4(rng: np.random.Generator) -> Parts:
    block = fp8_codes(rng, EXPERTS, OUT, IN // 16).view(np.uint8) & 0x7F
    return {
        ".weight": integers(rng, "U32", EXPERTS, OUT, IN // 8),
        ".scales": raw("U8", block),
        ".global_scale": raw("F32", scales(rng, EXPERTS)),
    }


def _mlx_nvfp4_terms(parts: Parts) -> Terms:
    codes = FP4[unpack(array(parts[".weight"]), 4)]
    block = array(parts[".scales"]).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return [codes * spread(block, codes.shape) * array(parts[".global_scale"])[:, None, None]]


def _exl2(rng: np.random.Generator) -> Parts:
    return {
        ".q_weight": integers(rng, "I32", IN // 8, OUT),
        ".q_scale": integers(rng, "I32", 2, OUT // 8),
        ".q_scale_max": raw("F16", scales(rng, 2) * 10),
        ".q_groups": raw("I16", [4, 0, 4, IN // 16]),
        ".q_invperm": raw("I32", rng.permutation(IN)),
    }


def _exl2_terms(parts: Parts) -> Terms:
    scale = unpack(array(parts[".q_scale"]), 4) + 1
    return [every_code(scale**2 * array(parts[".q_scale_max"])[:, None] / 256, 16)]


def _exl3(rng: np.random.Generator) -> Parts:
    return {
        ".trellis": integers(rng, "I16", IN // 16, OUT // 16, 64),
        ".suh": raw("F16", rng.standard_normal(IN)),
        ".svh": raw("F16", rng.standard_normal(OUT)),
        ".mcg": raw("I32", -876543),
    }


def _exl3_terms(parts: Parts) -> Terms:
    inner = np.random.default_rng(0).standard_normal((IN, OUT))  # whatever the trellis holds
    return [inner * array(parts[".svh"])]


_MXFP4 = _mx(".weight_packed", 4)
_MXFP6 = _mx(".weight_packed", 6)
_QUARK_MXFP4 = _mx(".weight", 4)
_DEEPSEEK_FP4 = _mx(".weight", 4, "F8_E8M0", ".scale", "I8")

_CT = "compressed-tensors"


def _ct(format: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": _CT, "format": format, **more}}


def _method(name: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **more}}


EXACT: tuple[Case, ...] = (
    Case(
        "block FP8",
        _fp8("weight_scale_inv", "F32", (2, 2)),
        _product,
        {".weight_scale_inv": "multiply"},
        "deepseek_v3",
        _method("fp8", weight_block_size=[32, 32], fmt="e4m3"),
    ),
    Case(
        "block FP8, BF16 scales",
        _fp8("weight_scale_inv", "BF16", (2, 2)),
        _product,
        {".weight_scale_inv": "promote"},
        config=_method("fp8", weight_block_size=[32, 32]),
    ),
    Case(
        "block FP8, F16 scales",
        _fp8("weight_scale_inv", "F16", (2, 2)),
        _product,
        {".weight_scale_inv": "promote"},
        config=_method("fp8", weight_block_size=[32, 32]),
    ),
    Case(
        "tensor FP8, Ministral",
        _fp8("weight_scale_inv", "BF16", (), ".", "activation_scale"),
        _product,
        {".weight_scale_inv": "promote"},
        config=_method("fp8", activation_scheme="static"),
    ),
    Case(
        "tensor FP8, static",
        _fp8("weight_scale", "F32", (1,), ".", "input_scale"),
        _product,
        {".weight_scale": "multiply"},
        "mixtral",
        _method("fp8", activation_scheme="static"),
    ),
    Case(
        "tensor FP8, static, old names",
        _fp8("weight_scale", "F32", (1,), ".", "act_scale"),
        _product,
        {".weight_scale": "multiply"},
        "mixtral",
        _method("fp8", activation_scheme="static"),
    ),
    Case(
        "channel FP8",
        _fp8("weight_scale", "BF16", (OUT, 1)),
        _product,
        {".weight_scale": "promote"},
        config=_ct("float-quantized"),
    ),
    Case(
        "FP8, ModelOpt",
        _fp8("weight_scale", "F32", (), ".", "input_scale"),
        _product,
        {".weight_scale": "multiply"},
        config=_method("modelopt", quant_algo="FP8"),
    ),
    Case(
        "FP8, scale",
        _fp8("scale", "F32", (2, 2)),
        _product,
        {".scale": "multiply"},
        config=_method("fp8"),
    ),
    Case(
        "FP8, Mistral",
        _fp8("qscale_weight", "BF16", (), ".", "qscale_act"),
        _product,
        {".qscale_weight": "promote"},
        "mistral_large4",
        _method("fp8"),
    ),
    Case(
        "fused block FP8",
        _fp8("scale_inv", "F32", (EXPERTS, 2, 2), "_", "activation_scale"),
        _product,
        {"_scale_inv": "multiply"},
        config=_method("fp8"),
        fused=True,
    ),
    Case(
        "fused channel FP8, fbgemm",
        _fp8("scale", "F32", (EXPERTS, 1, IN), "_"),
        _product,
        {"_scale": "multiply"},
        "llama4",
        _method("fbgemm_fp8"),
        fused=True,
    ),
    Case(
        "INT8, compressed-tensors",
        _int8("weight_scale", "BF16", (OUT, 1), zero=1),
        _int8_terms,
        {".weight_scale": "promote"},
        config=_ct("int-quantized"),
    ),
    Case(
        "INT8, ModelOpt",
        _int8("weight_scale", "F32", (OUT,)),
        _int8_terms,
        {".weight_scale": "multiply"},
        config=_method("modelopt", quant_algo="W8A8_SQ_PER_CHANNEL"),
    ),
    Case(
        "block INT8",
        _int8("weight_scale_inv", "F32", (2, 2)),
        _int8_terms,
        {".weight_scale_inv": "multiply"},
        "deepseek_v3",
        _method("blockwise_int8"),
    ),
    Case(
        "NVFP4, compressed-tensors",
        _ct_nvfp4,
        _ct_nvfp4_terms,
        {".weight_global_scale": "divide"},
        config=_ct("nvfp4-pack-quantized"),
    ),
    Case(
        "NVFP4, ModelOpt",
        _modelopt_nvfp4,
        _modelopt_nvfp4_terms,
        {".weight_scale_2": "multiply"},
        "deepseek_v3",
        _method("modelopt", quant_algo="NVFP4"),
    ),
    Case(
        "NVFP4_SVD, ModelOpt",
        _svd,
        _modelopt_nvfp4_terms,
        {".weight_scale_2": "multiply", ".svdquant_lora_b": "multiply"},
        config=_method("modelopt", quant_algo="NVFP4_SVD"),
    ),
    Case(
        "fused NVFP4, ModelOpt",
        lambda rng: _modelopt_nvfp4(rng, (EXPERTS,), "_"),
        _modelopt_nvfp4_terms,
        {"_weight_scale_2": "multiply"},
        "llama4",
        _method("modelopt", quant_algo="NVFP4"),
        fused=True,
    ),
    Case(
        "NVFP4, Inkling",
        _inkling_nvfp4,
        _inkling_nvfp4_terms,
        {"_weight_amax": "multiply"},
        "inkling",
        fused=True,
    ),
    Case(
        "GPTQ",
        _gptq("F16"),
        _gptq_terms,
        {".scales": "multiply", ".bias": "multiply"},
        config=_method("gptq", bits=4, group_size=32, desc_act=True),
        note="0.049 %",
    ),
    Case(
        "GPTQ, BF16 scales",
        _gptq("BF16"),
        _gptq_terms,
        {".scales": "multiply", ".bias": "multiply"},
        config=_method("auto-round", packing_format="auto_round:auto_gptq"),
        note="0.39 %",
    ),
    Case(
        "AWQ gemm",
        _awq_gemm,
        _awq_gemm_terms,
        {".scales": "multiply"},
        "mixtral",
        _method("awq", bits=4, version="gemm"),
        note="0.049 %",
    ),
    Case(
        "AWQ gemv",
        _awq_gemv,
        _awq_gemv_terms,
        {".scales": "multiply"},
        "mixtral",
        _method("awq", bits=4, version="gemv"),
        note="0.049 %",
    ),
    Case(
        "AWQ gemv_fast",
        _awq_fast(".qzeros"),
        _awq_fast_terms(".qzeros"),
        {".scales": "multiply", ".qzeros": "multiply"},
        "mixtral",
        _method("awq", bits=4, version="gemv_fast"),
        note="0.049 %",
    ),
    Case(
        "llm-awq",
        _awq_fast(".scaled_zeros"),
        _awq_fast_terms(".scaled_zeros"),
        {".scales": "multiply", ".scaled_zeros": "multiply"},
        "mixtral",
        _method("awq", bits=4, version="llm-awq"),
        note="0.049 %",
    ),
    Case(
        "packed INT4, compressed-tensors",
        _pack_quantized,
        _pack_terms,
        {".weight_scale": "multiply"},
        "kimi_k2",
        _ct("pack-quantized"),
        note="0.39 %",
    ),
    Case(
        "packed INT4 with zero points, compressed-tensors",
        lambda rng: _pack_quantized(rng, True),
        _pack_terms,
        {".weight_scale": "multiply"},
        config=_ct("pack-quantized"),
        note="0.39 %",
    ),
    Case(
        "INT4, Quark",
        _quark_int4,
        _quark_int4_terms,
        {".weight_scale": "multiply"},
        config=_method("quark"),
    ),
    Case(
        "INT4-FP8, Quark",
        _int4_fp8,
        _int4_fp8_terms,
        {".weight_scale": "multiply"},
        config=_method("quark"),
    ),
    Case(
        "INT4 AWQ, ModelOpt",
        _modelopt_awq,
        _modelopt_awq_terms,
        {".weight_scale": "multiply"},
        config=_method("modelopt", quant_algo="W4A16_AWQ"),
        note="0.39 %",
    ),
    Case(
        "W4AFP8",
        _w4afp8,
        _w4afp8_terms,
        {".weight_scale_inv": "multiply"},
        "deepseek_v3",
        _method("w4afp8"),
    ),
    *(
        Case(
            f"bitsandbytes {kind}",
            _bnb4(kind, False),
            _bnb4_terms,
            {".weight.absmax": "multiply"},
            "mixtral",
            _method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type=kind),
        )
        for kind in ("nf4", "fp4")
    ),
    *(
        Case(
            f"bitsandbytes {kind} double",
            _bnb4(kind, True),
            _bnb4_terms,
            {
                ".weight.nested_absmax": "multiply",
                f".weight.quant_state.bitsandbytes__{kind}": "json",
            },
            "mixtral",
            _method("bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True),
        )
        for kind in ("nf4", "fp4")
    ),
    Case(
        "bitsandbytes fused nf4 double",
        _bnb4("nf4", True, fused=True),
        _bnb4_terms,
        {".nested_absmax": "multiply", ".quant_state.bitsandbytes__nf4": "json"},
        config=_method("bitsandbytes", load_in_4bit=True),
        fused=True,
    ),
    Case(
        "LLM.int8",
        _llm_int8,
        lambda parts: [array(parts[".weight"]) * array(parts[".SCB"])[:, None] / 127],
        {".SCB": "multiply"},
        "mixtral",
        _method("bitsandbytes", load_in_8bit=True),
    ),
    Case(
        "HQQ",
        _hqq,
        _hqq_terms,
        {".scale": "multiply"},
        "mixtral",
        _method("hqq"),
        note="0.39 %",
    ),
    Case(
        "MLX affine",
        _mlx_affine(".biases"),
        _mlx_affine_terms(".biases"),
        {".scales": "multiply", ".biases": "multiply", ".bias": "multiply"},
        "mlx",
        {"quantization": {"group_size": 32, "bits": 4}},
        fused=True,
        note="0.39 %",
    ),
    Case(
        "Metal affine",
        _mlx_affine(".qbiases"),
        _mlx_affine_terms(".qbiases"),
        {".scales": "multiply", ".qbiases": "multiply", ".bias": "multiply"},
        config=_method("metal"),
        fused=True,
        note="0.39 %",
    ),
    Case(
        "MLX NVFP4 with a global scale",
        _mlx_nvfp4,
        _mlx_nvfp4_terms,
        {".global_scale": "multiply"},
        "mlx",
        {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}},
        fused=True,
    ),
    Case(
        "EXL2",
        _exl2,
        _exl2_terms,
        {".q_scale_max": "multiply"},
        "mixtral",
        _method("exl2"),
        note="0.049 %",
    ),
    Case(
        "EXL3",
        _exl3,
        _exl3_terms,
        {".svh": "multiply"},
        config=_method("exl3"),
        note="0.049 %",
    ),
)
"""Formats that take any factor."""

POWER_OF_TWO: tuple[Case, ...] = (
    Case(
        "MXFP8, ModelOpt",
        _fp8("weight_scale", "U8", (OUT, IN // 32)),
        _product,
        {".weight_scale": "shift"},
        config=_method("modelopt", quant_algo="MXFP8"),
    ),
    Case(
        "MXFP8, MiniMax",
        _fp8("weight_scale_inv", "U8", (OUT, IN // 32)),
        _product,
        {".weight_scale_inv": "shift"},
        "minimax_m2",
        _method("mxfp8"),
    ),
    Case(
        "UE8M0 block FP8",
        _fp8("scale", "F8_E8M0", (2, 2)),
        _product,
        {".scale": "shift"},
        "deepseek_v4",
        _method("fp8", scale_fmt="ue8m0"),
    ),
    Case(
        "fused UE8M0 block FP8",
        _fp8("scale_inv", "F8_E8M0", (EXPERTS, 2, 2), "_"),
        _product,
        {"_scale_inv": "shift"},
        config=_method("fp8", scale_fmt="ue8m0"),
        fused=True,
    ),
    Case(
        "FP4, DeepSeek-V4",
        *_DEEPSEEK_FP4,
        {".scale": "shift"},
        "deepseek_v4",
        {"expert_dtype": "fp4", **_method("fp8", scale_fmt="ue8m0")},
    ),
    Case(
        "MXFP4, compressed-tensors",
        *_MXFP4,
        {".weight_scale": "shift"},
        config=_ct("mxfp4-pack-quantized"),
    ),
    Case(
        "MXFP6, compressed-tensors",
        *_MXFP6,
        {".weight_scale": "shift"},
        config=_ct("mxfp6-pack-quantized"),
    ),
    Case(
        "MXFP4, Quark",
        *_QUARK_MXFP4,
        {".weight_scale": "shift"},
        "deepseek_v3",
        _method("quark", global_quant_config={"weight": {"scale_format": "e8m0"}}),
    ),
    Case(
        "MXFP8, Inkling",
        _inkling_mxfp8,
        _product,
        {"_weight_scale": "shift"},
        "inkling",
        fused=True,
    ),
    Case(
        "MXFP4, gpt-oss",
        _gpt_oss,
        _gpt_oss_terms,
        {"_scales": "shift", "_bias": "multiply"},
        "gpt_oss",
        _method("mxfp4"),
        fused=True,
    ),
    *(
        Case(
            f"MLX MXFP{bits}",
            _mlx_mx(bits),
            _mlx_mx_terms,
            {".scales": "shift"},
            "mlx",
            {"quantization": {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}},
            fused=True,
        )
        for bits in (4, 8)
    ),
)
"""Formats that take only powers of two."""

# Checkpoints ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Names and config around the experts of a model type; ``{L}`` and ``{E}`` are numbers.

    `plain` is what follows the name of a fused projection that is not quantised.
    """

    model_type: str
    expert: str
    fused: str = ""
    shared: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    plain: str = ""


_DEEPSEEK = {"n_routed_experts": EXPERTS, "norm_topk_prob": True, "first_k_dense_replace": 0}

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family("mixtral", "model.layers.{L}.block_sparse_moe.experts.{E}.w2"),
    "qwen3_moe": Family(
        "qwen3_moe",
        "model.layers.{L}.mlp.experts.{E}.down_proj",
        "model.layers.{L}.mlp.experts.down_proj",
    ),
    "minimax_m2": Family("minimax_m2", "model.layers.{L}.block_sparse_moe.experts.{E}.w2"),
    "deepseek_v3": Family(
        "deepseek_v3",
        "model.layers.{L}.mlp.experts.{E}.down_proj",
        shared="model.layers.{L}.mlp.shared_experts.down_proj",
        config={**_DEEPSEEK, "routed_scaling_factor": 2.5},
    ),
    "kimi_k2": Family(
        "kimi_k2",
        "model.layers.{L}.mlp.experts.{E}.down_proj",
        shared="model.layers.{L}.mlp.shared_experts.down_proj",
        config={**_DEEPSEEK, "routed_scaling_factor": 2.827},
    ),
    "deepseek_v4": Family(
        "deepseek_v4",
        "layers.{L}.ffn.experts.{E}.w2",
        shared="layers.{L}.ffn.shared_experts.w2",
        config={"n_routed_experts": EXPERTS, "routed_scaling_factor": 1.5},
    ),
    "mistral_large4": Family(
        "mistral_large4",
        "layers.{L}.experts.{E}.w2",
        config={"n_routed_experts": EXPERTS},
    ),
    "llama4": Family(
        "llama4_text",
        "",
        "language_model.model.layers.{L}.feed_forward.experts.down_proj",
        "language_model.model.layers.{L}.feed_forward.shared_expert.down_proj",
    ),
    "gpt_oss": Family("gpt_oss", "", "model.layers.{L}.mlp.experts.down_proj"),
    "mlx": Family("qwen3_moe", "", "model.layers.{L}.mlp.switch_mlp.down_proj", plain=".weight"),
    "inkling": Family(
        "inkling2_loop_text",
        "",
        "model.llm.layers.{L}.mlp.experts.w2",
        config={"n_routed_experts": EXPERTS},
        plain="_weight",
    ),
}


def modules(case: Case, layers: int = LAYERS) -> list[str]:
    """The names of the routed down-projections."""
    family = FAMILIES[case.family]
    if case.fused:
        return [family.fused.format(L=layer) for layer in range(layers)]
    experts = [(layer, expert) for layer in range(layers) for expert in range(EXPERTS)]
    return [family.expert.format(L=layer, E=expert) for layer, expert in experts]


def tensors(case: Case) -> dict[str, Raw]:
    """The tensors of a checkpoint: other projections in the same format, and a plain last layer."""
    family, rng = FAMILIES[case.family], np.random.default_rng(len(case.id))
    result = {"model.embed_tokens.weight": values("BF16", (6, OUT), 1)}
    for module in modules(case):
        up = module.replace("down_proj", "up_proj").replace("w2", "w3")
        for place in (up, module):
            result |= {place + ending: part for ending, part in case.make(rng).items()}
    if family.shared:
        made = case.make(rng)
        result |= {family.shared.format(L=0) + ending: part for ending, part in made.items()}
    for module in modules(case, LAYERS + 1)[len(modules(case)) :]:
        name = module + (family.plain if case.fused else ".weight")
        shape = (EXPERTS, OUT, IN) if case.fused else (OUT, IN)
        result[name] = values("BF16", shape, 2, special=False)
    result["lm_head.weight"] = values("BF16", (6, OUT), 3)
    return result


def config(case: Case) -> dict[str, Any]:
    """The ``config.json`` of this checkpoint."""
    family = FAMILIES[case.family]
    return {
        "model_type": family.model_type,
        "num_hidden_layers": LAYERS + 1,
        "num_experts_per_tok": 1,
        **(family.config or {"num_local_experts": EXPERTS, "num_experts": EXPERTS}),
        **case.config,
    }


def write(case: Case, folder: Path, shards: int = 3) -> dict[str, Raw]:
    """Write the checkpoint and return its tensors."""
    made = tensors(case)
    write_shards(folder, made, shards)
    (folder / "config.json").write_text(json.dumps(config(case), indent=2))
    return made


def read(folder: Path) -> dict[str, Raw]:
    """All tensors of a checkpoint."""
    result: dict[str, Raw] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = (8 + length + offset for offset in entry["data_offsets"])
                result[name] = entry["dtype"], tuple(entry["shape"]), data[first:last]
    return result
