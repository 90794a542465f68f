"""Formats whose library runs on a CPU: it quantises, moescale scales, and it dequantises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from support import quantised_checkpoints as q
from support.checkpoints import Raw
from support.quantised_checkpoints import Case, Parts, Terms
from test_quantised import check_bytes, convert, parts
from transformers.core_model_loading import Inkling2LoopDequantizeExperts

FACTOR = 1.37
SHAPE = (256, 256)
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_raw(tensor: torch.Tensor) -> Raw:
    """The bytes of a tensor as a shard holds them."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return NAMES[tensor.dtype], tuple(tensor.shape), data


def to_torch(raw: Raw) -> torch.Tensor:
    """The bytes of a shard as a tensor."""
    dtype, shape, data = raw
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


# compressed-tensors -------------------------------------------------------------------------------


def compressor(preset: str) -> tuple[type[BaseCompressor], object]:
    """The class that compresses a scheme, and the scheme."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    name = infer_module_format(torch.nn.Linear, scheme).value
    return BaseCompressor.get_value_from_registry(name), scheme


def fill(name: str, like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Content for one parameter of a module before its compression."""
    if name == "weight":
        value = torch.randn(like.shape, generator=draw)
    elif "global" in name:
        value = torch.full(like.shape, 900.0)
    elif "zero_point" in name:
        value = torch.randint(0, 5, like.shape, generator=draw)
    else:
        value = torch.rand(like.shape, generator=draw) * 0.4 + 0.02
    return value.to(like.dtype)


def compressed(preset: str) -> Callable[[np.random.Generator], Parts]:
    """Return a function that makes projections, compressed by the library as in its checkpoints."""

    def make(rng: np.random.Generator) -> Parts:
        draw = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
        kind, scheme = compressor(preset)
        module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
        initialize_module_for_quantization(module, scheme)
        state = {name: fill(name, p, draw) for name, p in module.state_dict().items()}
        if "NVFP4" in preset:
            state["weight_scale"] *= 900.0
        return {"." + n: to_raw(t) for n, t in kind.compress(state, scheme).items()}

    return make


def decompressed(preset: str) -> Callable[[Parts], Terms]:
    """The projection as the library decompresses it; 16-bit scales are widened for it, exactly."""

    def terms(projection: Parts) -> Terms:
        kind, scheme = compressor(preset)
        state = {name[1:]: to_torch(raw) for name, raw in projection.items()}
        if state["weight_scale"].dtype == torch.bfloat16:
            state["weight_scale"] = state["weight_scale"].float()
        return [kind.decompress(state, scheme)["weight"].double().numpy()]

    return terms


# bitsandbytes -------------------------------------------------------------------------------------


def bnb4(kind: str, double: bool) -> Callable[[np.random.Generator], Parts]:
    """Return a function that makes 4-bit projections with the library's own quantisation state."""

    def make(rng: np.random.Generator) -> Parts:
        weight = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))
        packed, state = bitsandbytes.quantize_4bit(
            weight, quant_type=kind, compress_statistics=double
        )
        found = {".weight": to_raw(packed)}
        return found | {".weight." + n: to_raw(t) for n, t in state.as_dict(packed=True).items()}

    return make


def bnb4_terms(projection: Parts) -> Terms:
    """The 4-bit projection as the library dequantises it."""
    state = {n.removeprefix(".weight."): to_torch(raw) for n, raw in projection.items()}
    packed = state.pop(".weight")
    quantised = bitsandbytes.QuantState.from_dict(state, torch.device("cpu"))
    return [bitsandbytes.dequantize_4bit(packed, quantised).double().numpy()]


def bnb8(rng: np.random.Generator) -> Parts:
    """A projection in LLM.int8."""
    weight = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float16))
    codes, rows, _ = bitsandbytes.int8_vectorwise_quant(weight)
    return {
        ".weight": to_raw(codes),
        ".SCB": to_raw(rows),
        ".weight_format": to_raw(torch.tensor(0, dtype=torch.uint8)),
    }


def bnb8_terms(projection: Parts) -> Terms:
    """The projection as the library dequantises it."""
    codes, rows = to_torch(projection[".weight"]), to_torch(projection[".SCB"])
    return [bitsandbytes.int8_vectorwise_dequant(codes, rows).double().numpy()]


# transformers -------------------------------------------------------------------------------------


class Float32:
    """A model whose parameters are all float32."""

    def get_parameter(self, _: str) -> torch.Tensor:
        """Return any of them."""
        return torch.empty(0)


def inkling_terms(projection: Parts) -> Terms:
    """Inkling's own formats as transformers dequantises them on loading."""
    by_suffix = ("_weight", "_weight_scale", "_weight_amax", "_weight_outer_scale_denominator")
    found = {suffix: to_torch(projection[suffix]) for suffix in by_suffix if suffix in projection}
    made = Inkling2LoopDequantizeExperts().convert(found, by_suffix, ["w"], Float32(), "w")
    return [made["w"].double().numpy()]


def inkling(cases: Iterable[Case]) -> list[Case]:
    """The cases of Inkling's formats, dequantised by transformers."""
    return [replace(case, terms=inkling_terms) for case in cases if case.family == "inkling"]


# The cases ----------------------------------------------------------------------------------------

PROMOTED = {".weight_scale": "promote"}
KEPT = {".weight_scale": "multiply"}
DIVIDED = {".weight_global_scale": "divide"}
SHIFTED = {".weight_scale": "shift"}

PRESETS = {
    "FP8": PROMOTED,
    "FP8_DYNAMIC": PROMOTED,
    "FP8_BLOCK": PROMOTED,
    "INT8": PROMOTED,
    "W4AFP8": PROMOTED,
    "W4A16": KEPT,
    "W4A16_ASYM": KEPT,
    "W3A16": KEPT,
    "W8A16": KEPT,
    "NVFP4": DIVIDED,
    "NVFP4A16": DIVIDED,
}
POWER_OF_TWO_PRESETS = ("MXFP4", "MXFP6A16", "MXFP8")

NESTED = {".weight.nested_absmax": "multiply"}

CASES = [
    *(Case(p, compressed(p), decompressed(p), changed) for p, changed in PRESETS.items()),
    *(
        Case(kind, bnb4(kind, False), bnb4_terms, {".weight.absmax": "multiply"})
        for kind in ("nf4", "fp4")
    ),
    *(
        Case(
            f"{kind}, double",
            bnb4(kind, True),
            bnb4_terms,
            {**NESTED, f".weight.quant_state.bitsandbytes__{kind}": "json"},
        )
        for kind in ("nf4", "fp4")
    ),
    Case("LLM.int8", bnb8, bnb8_terms, {".SCB": "multiply"}),
    *inkling(q.EXACT),
]
SHIFTS = [
    *(Case(p, compressed(p), decompressed(p), SHIFTED) for p in POWER_OF_TWO_PRESETS),
    *inkling(q.POWER_OF_TWO),
]


def tolerance(case: Case) -> float:
    """The error allowed for one value: larger if a scale, or the library's result, has 16 bits."""
    if "NVFP4" in case.id:
        return 3 * 2.0**-8
    return 2.0**-8 if case.changed == KEPT else 5e-7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_library_finds_its_weights_multiplied(case: Case, tmp_path: Path) -> None:
    """Codes stay bit-identical, and the library dequantises the factor times the old values."""
    before, after = convert(case, tmp_path, FACTOR)
    check_bytes(case, before, after, FACTOR)
    for module in q.modules(case):
        (old,), (new,) = (case.terms(parts(some, module)) for some in (before, after))
        assert np.abs(old).max() > 0
        np.testing.assert_allclose(new, old * FACTOR, rtol=tolerance(case), atol=0)
        ratio = np.vdot(new, old) / np.vdot(old, old)
        assert ratio == pytest.approx(FACTOR, rel=1.5e-3)


@pytest.mark.parametrize("case", SHIFTS, ids=lambda case: case.id)
def test_the_library_finds_powers_of_two_multiplied(case: Case, tmp_path: Path) -> None:
    """If scales are powers of two, the library dequantises exactly twice the values."""
    before, after = convert(case, tmp_path, 2.0)
    check_bytes(case, before, after, 2.0)
    for module in q.modules(case):
        (old,), (new,) = (case.terms(parts(some, module)) for some in (before, after))
        assert np.abs(old).max() > 0
        np.testing.assert_array_equal(new, 2 * old)
