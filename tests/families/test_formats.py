"""The table of formats: which row matches which tensors, and what is refused or remarked on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import quantised_checkpoints as q
from support.checkpoints import write_shards
from support.quantised_checkpoints import Case

from moescale import api
from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.scaling import scaler
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, SourceError, UnsupportedError
from moescale.families import formats
from moescale.families.config import Quantisation, parse_config
from moescale.families.formats import (
    ROWS,
    UNSUPPORTED,
    Format,
    check_quantisation_config,
    plain_suffix,
    scaled_tensors,
    split_name,
)
from moescale.families.pattern import find_by_pattern

CASES = (*q.EXACT, *q.POWER_OF_TWO)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def tensor(name: str, dtype: str, shape: tuple[int, ...] = (8, 8)) -> Tensor:
    """A tensor of a header."""
    return Tensor(name, dtype, shape, 0, 0)


def by_suffix(**dtypes: str) -> dict[str, Tensor]:
    """Tensors of a projection by leaf, with ``__`` for a dot."""
    return {n.replace("__", "."): tensor(f"m.{n}", dtype) for n, dtype in dtypes.items()}


def leaves_of(case: Case) -> dict[str, Tensor]:
    """The tensors of a projection of a test checkpoint, by leaf."""
    made = case.make(np.random.default_rng(0))
    return {plain_suffix(n): tensor("m" + n, dtype, shape) for n, (dtype, shape, _) in made.items()}


def rows_of(by_suffix: Mapping[str, Tensor]) -> list[Format]:
    """The rows that match."""
    dtypes = {suffix: tensor.dtype for suffix, tensor in by_suffix.items()}
    return [
        row for row in ROWS if formats._has_tensors(row, dtypes) and row.shapes_match(by_suffix)
    ]


# The table ----------------------------------------------------------------------------------------


@every_case
def test_exactly_one_row_fits(case: Case) -> None:
    """A projection has exactly one format, so the order of the rows does not matter."""
    assert len(rows_of(leaves_of(case))) == 1


def test_every_row_is_converted_in_a_test() -> None:
    """Each row of the table has a checkpoint that is converted in a test."""
    plain = {"weight": tensor("m.weight", "BF16")}
    tested = [row for found in (plain, *map(leaves_of, CASES)) for row in rows_of(found)]
    names = {row.name for row in tested}  # rows of the same name differ only in the scale's name
    assert {row.name for row in ROWS} == names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name} {next(iter(row.scaled))}")
def test_a_row_is_whole(row: Format) -> None:
    """A row has a source, scales a tensor, and its parts are consistent."""
    assert row.source
    assert row.scaled
    assert not set(row.unchanged) & (row.dtypes.keys() | row.scaled.keys())
    shifts = [part for part in row.scaled.values() if part.operation == "shift"]
    for part in row.scaled.values():
        assert part.operation != "shift" or not part.as_f32
    assert not shifts or len(row.scaled) == 1


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "suffix"),
    [
        ("", "weight"),
        (".weight", "weight"),
        ("_bias", "bias"),
        (".bias", "bias"),
        ("_scale_inv", "scale_inv"),
        (".weight_scale_inv", "weight_scale_inv"),
        (".weight.absmax", "absmax"),
        (".absmax", "absmax"),
        (".weight.quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__nf4"),
        ("_blocks", "blocks"),
        ("_weight_scale_2", "weight_scale_2"),
    ],
)
def test_a_leaf_is_what_follows_the_module(ending: str, suffix: str) -> None:
    """Separators do not matter, nor whether bitsandbytes packed a module or a parameter."""
    assert plain_suffix(ending) == suffix
    assert split_name("a.0.experts.1.down_proj" + ending) == ("a.0.experts.1.down_proj", suffix)


def test_a_pattern_for_weights_finds_what_belongs_to_them() -> None:
    """A user's pattern for the weights alone also finds their scales and biases."""
    names = [
        f"h.0.moe.{e}.out.{suffix}" for e in (0, 1) for suffix in ("weight", "weight_scale", "bias")
    ]
    names += ["h.0.moe.0.out_norm.weight", "h.0.moe.0.up.weight_scale"]
    found = find_by_pattern([tensor(n, "F32") for n in names], r"h\.\d+\.moe\.\d+\.out\.weight")
    assert [p.module for p in found] == ["h.0.moe.0.out", "h.0.moe.1.out"]
    assert [set(p.by_suffix) for p in found] == [{"weight", "weight_scale", "bias"}] * 2


# Refusals -----------------------------------------------------------------------------------------

UNKNOWN = {
    "AQLM": by_suffix(codes="I16", codebooks="F16", scales="F16"),
    "VPTQ": by_suffix(centroids__weight="F16", indices="I16"),
    "SpQR": by_suffix(dense_weights="I64", row_offsets="I32", in_perm="I64"),
    "Quanto": by_suffix(_data="I8", _scale="BF16"),
    "torchao": by_suffix(weight_qdata="F8_E4M3", weight_scale="F32"),
    "SINQ": by_suffix(W_q="U8", meta__scale="F16"),
    "FP-Quant": by_suffix(qweight="U8", scales="U8", forward_hadamard_matrix="BF16"),
    "HIGGS": by_suffix(weight="I16", scales="F16", tables="F16", tables2="F16"),
    "EETQ": by_suffix(weight="I8", weight_scales="F16"),
    "ParoQuant": by_suffix(qweight="I32", qzeros="I32", scales="F16", theta="F16", pairs="I16"),
    "Marlin": by_suffix(B="I32", s="F16", workspace="I32"),
    "2:4 Marlin": by_suffix(weight_packed="I32", scale_packed="F16", meta="I16"),
    "BitBLAS": by_suffix(qweight="I8", scales="F16", qzeros="I8"),
    "EXL3 with packed signs": by_suffix(trellis="I16", su="I16", sv="I16"),
    "W4A8 AWQ": by_suffix(weight="U8", weight_scale="F32", weight_scale_2="F32"),
    "BitNet": {"weight": tensor("m", "U8", (2, 8)), "weight_scale": tensor("m", "BF16", (1,))},
    "MLX NVFP4 without": {
        "weight": tensor("m", "U32", (4, 8, 8)),
        "scales": tensor("m", "U8", (4, 8, 4)),
    },
    "fixed output scale": by_suffix(weight="F8_E4M3", weight_scale="F32", output_scale="F32"),
    "F8_E4M3 without a tensor": by_suffix(weight="F8_E4M3", input_scale="F32"),
    "U8 without a tensor": by_suffix(weight="U8"),
    "a format that moescale cannot scale": by_suffix(weight="BF16", weight_scale="F32"),
    "bias (I8)": by_suffix(weight="F8_E4M3", weight_scale="F32", bias="I8"),
    "weight (I64)": by_suffix(weight="I64", weight_scale="F32"),
    "lora_A.default (BF16)": by_suffix(weight="BF16", lora_A__default="BF16"),
    "weight_scale (F64)": by_suffix(weight="F8_E4M3", weight_scale="F64"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_in_the_table_is_refused_by_name(name: str) -> None:
    """The error names format and tensors, gives the reason, and suggests an alternative."""
    with pytest.raises(UnsupportedError) as caught:
        scaled_tensors("model.m", UNKNOWN[name], 1.5)
    assert caught.value.message.startswith("model.m: ") and name in caught.value.message
    assert caught.value.hint


def test_every_refused_format_has_a_test() -> None:
    """The refusals tested above are all of the table's."""
    names = {row.name for row in UNSUPPORTED}
    assert {n for n in names if not any(key in n or n in key for key in UNKNOWN)} == set()


def partners() -> list[Any]:
    """Every tensor that a row needs, of every test checkpoint."""
    return [
        pytest.param(case, suffix, id=f"{case.id}: {suffix}")
        for case in CASES
        for row in rows_of(leaves_of(case))
        for suffix in row.dtypes
    ]


@pytest.mark.parametrize(("case", "suffix"), partners())
def test_a_missing_partner_is_refused(case: Case, suffix: str) -> None:
    """A projection that lacks a tensor required by its format is never scaled on a guess."""
    left = leaves_of(case)
    del left[suffix]
    if case.id == "INT4-FP8, Quark" and suffix == "weight_scale_2":
        assert [s.tensor.name for s in scaled_tensors("m", left, 2.0)] == ["m.weight_scale"]
        return  # the rest is a packed INT4, whose scaled tensor is the same
    with pytest.raises(SourceError):
        scaled_tensors("m", left, 2.0)


@pytest.mark.parametrize(
    ("found", "name", "missing"),
    [
        (by_suffix(qweight="I32", qzeros="I32", g_idx="I32"), "GPTQ", "scales"),
        (by_suffix(qweight="I32", scales="F16"), "GPTQ", "qzeros"),
        (by_suffix(weight_packed="U8", weight_scale="F8_E4M3"), "NVFP4", "weight_global_scale"),
        (by_suffix(weight="U8", weight_scale="F8_E4M3"), "NVFP4", "weight_scale_2"),
        (by_suffix(weight_packed="I32", weight_scale="BF16"), "pack-quantized", "weight_shape"),
        (by_suffix(blocks="U8", bias="BF16"), "gpt-oss", "scales"),
        (by_suffix(W_q="U8", scale="F16", nbits="I32"), "HQQ", "zero"),
        (by_suffix(weight="U32", scales="BF16"), "affine", "biases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_partner_is_named(found: dict[str, Tensor], name: str, missing: str) -> None:
    """The error names the likely format and the missing tensor."""
    with pytest.raises(CheckpointError, match=f"looks like .*{name}.* has no {missing}"):
        scaled_tensors("m", found, 1.5)


def test_a_state_that_is_no_state_is_refused() -> None:
    """A quantisation state is read whole, so a huge tensor of that name is refused."""
    case = next(c for c in q.EXACT if c.id == "bitsandbytes nf4 double")
    found = leaves_of(case)
    name = "quant_state.bitsandbytes__nf4"
    found[name] = Tensor("m.state", "U8", (1 << 21,), 0, 1 << 21)
    with pytest.raises(CheckpointError, match=r"m\.state"):
        scaled_tensors("m", found, 1.5)


def test_a_factor_of_one_needs_no_format(tmp_path: Path) -> None:
    """If nothing is scaled, the storage format of the weights does not matter."""
    tensors = {
        f"model.layers.0.mlp.experts.{e}.down_proj.{suffix}": q.raw("I16", [1, 2])
        for e in range(2)
        for suffix in ("codes", "codebooks")
    }
    write_shards(tmp_path, tensors, 1)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 2})
    )
    assert api.plan(tmp_path, experts=1, rule="none").tensors == ()
    with pytest.raises(UnsupportedError, match="AQLM"):
        api.plan(tmp_path, experts=1)


# Layouts ------------------------------------------------------------------------------------------


def test_the_format_is_decided_module_by_module(tmp_path: Path) -> None:
    """Layers of different formats in one checkpoint are each scaled by their own rule."""
    names = ("block FP8, BF16 scales", "NVFP4, compressed-tensors", "GPTQ")
    cases = [next(case for case in q.EXACT if case.id == name) for name in names]
    tensors = {
        f"model.layers.{layer}.mlp.experts.{e}.down_proj{ending}": part
        for layer, case in enumerate(cases)
        for e in range(2)
        for ending, part in case.make(np.random.default_rng(e)).items()
    }
    write_shards(tmp_path, tensors, 1)
    (tmp_path / "config.json").write_text(json.dumps(q.config(cases[0])))
    plan = api.plan(tmp_path, factor=1.5)
    found = {t.tensor.name.rpartition(".")[2]: t for t in plan.tensors}
    assert {name: (e.operation, e.store_as) for name, e in found.items()} == {
        "weight_scale_inv": ("multiply", "F32"),
        "weight_global_scale": ("divide", None),
        "scales": ("multiply", None),
        "bias": ("multiply", None),
    }


FUSED = [case for case in CASES if case.fused and "bitsandbytes" not in case.id]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_fused_codes_hold_as_many_experts_as_the_config(case: Case, tmp_path: Path) -> None:
    """A fused tensor with another number of experts is refused, whatever its scales are."""
    q.write(case, tmp_path)
    config = q.config(case)
    key = "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: q.EXPERTS + 1}))
    with pytest.raises(CheckpointError, match="does not hold 3 experts"):
        api.plan(tmp_path, factor=2.0)


def test_a_router_of_mlx_needs_its_experts(tmp_path: Path) -> None:
    """The names of mlx-lm are checked for completeness too."""
    case = next(case for case in q.EXACT if case.id == "MLX affine")
    tensors = {n: t for n, t in q.tensors(case).items() if "layers.1" not in n}
    tensors["model.layers.1.mlp.gate.weight"] = q.raw("F32", [[1.0]])
    write_shards(tmp_path, tensors, 1)
    config = {k: v for k, v in q.config(case).items() if k != "num_hidden_layers"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layer 1"):
        api.plan(tmp_path, factor=1.5)


# What the config adds -----------------------------------------------------------------------------

FP8 = TensorEdit(tensor("m.weight_scale_inv", "F32"), 1.5, role="scale", format="FP8")
MXFP4 = TensorEdit(tensor("m.weight_scale", "U8"), 2.0, "shift", role="scale", format="MXFP4")


def quantisation(config: Mapping[str, Any]) -> Quantisation:
    """What a config says about quantised tensors."""
    return parse_config(json.dumps(config).encode()).quantisation


def ue8m0(section: str = "") -> Mapping[str, Any]:
    """A config that declares UE8M0, in a section or at the top level."""
    inner = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}
    return {section: inner} if section else inner


@pytest.mark.parametrize("section", ["", "text_config"])
def test_ue8m0_in_the_config_is_said_once(section: str) -> None:
    """Some engines round such scales again, so one remark suggests a fold into the config."""
    found = quantisation(ue8m0(section))
    remarks = check_quantisation_config([FP8] * 3, found, "--fold config is better.")
    assert len(remarks) == 1
    assert "ue8m0" in remarks[0] and "--fold config is better." in remarks[0]
    (without,) = check_quantisation_config([FP8], found)
    assert "--fold" not in without


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.125])
def test_ue8m0_takes_powers_of_two_in_silence(factor: float) -> None:
    """A power of two keeps every scale a power of two."""
    assert check_quantisation_config([FP8.with_(factor=factor)], quantisation(ue8m0())) == []


def test_no_ue8m0_no_remark() -> None:
    """Without that key in the config, F32 scales may have any value."""
    found = quantisation({"quantization_config": {"quant_method": "fp8"}})
    assert check_quantisation_config([FP8], found) == []


def test_the_remark_reaches_the_plan(tmp_path: Path) -> None:
    """The plan of a DeepSeek-V3.1 warns before any writing, and names the config key."""
    case = next(case for case in q.EXACT if case.id == "block FP8")
    q.write(case, tmp_path)
    config = {**q.config(case), **ue8m0()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    warnings = [w for w in api.plan(tmp_path, factor=1.5).warnings if "ue8m0" in w]
    assert len(warnings) == 1 and "--fold config multiplies routed_scaling_factor" in warnings[0]


def test_e5m3_scales_are_no_powers_of_two() -> None:
    """Bytes that the config calls E5M3 are not shifted, although they look like E8M0."""
    config = {"quantization_config": {"global_quant_config": {"weight": {"scale_format": "e5m3"}}}}
    with pytest.raises(UnsupportedError, match="E5M3"):
        check_quantisation_config([MXFP4], quantisation(config))


# Arithmetic of quantised formats ------------------------------------------------------------------


@given(
    offset=st.floats(width=32, min_value=2.0**-60, max_value=2.0**60),
    factor=st.floats(1e-3, 1e3),
    ascii_only=st.booleans(),
)
def test_every_offset_fits_and_reads_back(offset: float, factor: float, ascii_only: bool) -> None:
    """The state of bitsandbytes keeps its length, and its loader reads the exact product."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16" if ascii_only else "é",
        "shape": [1, 2],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    text = json.dumps(state, ensure_ascii=False).encode()
    whole = Tensor("s", "U8", (len(text),), 0, len(text))
    edit = TensorEdit(whole, factor, "nested_offset", role="scale")
    result = np.empty(len(text), np.uint8)
    assert scaler(edit)(np.frombuffer(text, np.uint8), result) == 0
    loaded = json.loads(result.tobytes())
    product = np.float32(offset) * np.float32(factor)
    assert np.float32(float(loaded.pop("nested_offset"))) == product
    assert loaded == {key: value for key, value in state.items() if key != "nested_offset"}


@given(k=st.integers(-260, 260))
def test_exponents_are_shifted_or_counted_as_lost(k: int) -> None:
    """All 256 bytes: 0 and NaN stay, others shift by k, and those out of range are counted."""
    edit = TensorEdit(Tensor("s", "F8_E8M0", (256,), 0, 256), 2.0**k, "shift", role="scale")
    codes, result = np.arange(256, dtype=np.uint8), np.empty(256, np.uint8)
    lost = scaler(edit)(codes, result)
    inside = [c for c in range(1, 255) if 1 <= c + k <= 254]
    assert lost == 254 - len(inside)
    assert result[0] == 0 and result[255] == 255
    assert all(result[c] == c + k for c in inside)
