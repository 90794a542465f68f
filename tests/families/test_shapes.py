"""A checkpoint is checked for consistency: shapes of experts, scales, biases and routers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import checkpoints
from support.checkpoints import HIDDEN, INNER, Raw, values

from moescale import api
from moescale.errors import CheckpointError

CONFIG = json.loads(checkpoints.MIXTRAL_CONFIG)
AT = "model.layers.1.block_sparse_moe."
DOWN, UP, ROUTER = (f"{AT}{name}.weight" for name in ("experts.2.w2", "experts.2.w3", "gate"))
EVERY = (0, 1, 2, 3)


def written(folder: Path, tensors: Mapping[str, Raw], **config: Any) -> Path:
    """Write the tensors as one shard, with a config."""
    checkpoints.write_shards(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def mixtral(changes: Mapping[str, Raw | None], **rest: Any) -> dict[str, Raw]:
    """A small Mixtral with some tensors changed or omitted."""
    found = {**checkpoints.mixtral_tensors(**rest), **changes}
    return {name: raw for name, raw in found.items() if raw is not None}


def bf16(*shape: int) -> Raw:
    """BF16 values of a shape."""
    return values("BF16", shape)


def refused(source: Path, *says: str) -> None:
    """The plan is refused, even if nothing would be scaled, and the error has all these parts."""
    for rule in ("preserve", "none"):
        with pytest.raises(CheckpointError) as caught:
            api.plan(source, experts=3, rule=rule)
        for part in says:
            assert part in str(caught.value)


# Experts ------------------------------------------------------------------------------------------


def experts_(*shape: int, of: str = "w2") -> dict[str, Raw]:
    """One matrix of every expert, with another shape."""
    at = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    return {at.format(layer, e, of): bf16(*shape) for layer in range(2) for e in EVERY}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({DOWN: bf16(0)}, (DOWN, "[0]", "without gathering")),
        (experts_(0), ("is empty", "without gathering")),
        ({UP: bf16(0)}, (UP, "without gathering")),
        ({ROUTER: bf16(0)}, (ROUTER, "[0]", "without gathering")),
        ({DOWN: bf16(HIDDEN * INNER)}, (DOWN, f"[{HIDDEN * INNER}]", f"[{HIDDEN}, {INNER}]")),
        (experts_(HIDDEN * INNER), ("not the transpose",)),
        ({DOWN: bf16(INNER, HIDDEN)}, (DOWN, f"[{INNER}, {HIDDEN}]", f"[{HIDDEN}, {INNER}]")),
        (experts_(INNER, HIDDEN), ("not the transpose", "w1.weight")),
        ({DOWN: bf16(HIDDEN, INNER // 2)}, (DOWN, f"[{HIDDEN}, {INNER // 2}]")),
        (experts_(HIDDEN, INNER // 2), ("not the transpose",)),
        ({UP: bf16(INNER // 2, HIDDEN)}, (DOWN, UP, "not the transpose")),
        ({ROUTER: bf16(3, HIDDEN)}, (ROUTER, f"[3, {HIDDEN}]", "4 experts")),
        ({ROUTER: bf16(4, INNER)}, (ROUTER, f"[4, {INNER}]", f"[4, {HIDDEN}]")),
        ({ROUTER: bf16(HIDDEN, 4)}, (ROUTER, f"[{HIDDEN}, 4]", f"[4, {HIDDEN}]")),
        ({ROUTER: None}, ("model.layers.1: has routed experts, but no router",)),
        ({UP: None}, (UP.removesuffix(".weight"), "is missing")),
        ({f"{AT}gate.e_score_correction_bias": bf16(3)}, ("correction_bias", "[3]", "4 experts")),
    ],
)
def test_experts_that_cannot_be_are_refused(
    changes: Mapping[str, Raw], says: tuple[str, ...], tmp_path: Path
) -> None:
    """Empty, flat, transposed and smaller tensors are named, with both shapes."""
    refused(written(tmp_path / "m", mixtral(changes)), *says)


def test_an_empty_tensor_elsewhere_is_named(tmp_path: Path) -> None:
    """Attention that was not gathered does not concern the experts, but the model is broken."""
    name = "model.layers.0.self_attn.o_proj.weight"
    (warning,) = api.plan(written(tmp_path, mixtral({name: bf16(0)})), experts=3).warnings
    assert name in warning and "without gathering" in warning


@pytest.mark.parametrize("shape", [(12, INNER), (INNER, HIDDEN), (HIDDEN * INNER,)])
def test_without_gate_and_up_the_config_tells(shape: tuple[int, ...], tmp_path: Path) -> None:
    """The config gives the size of the hidden states."""
    alone: dict[str, Raw | None] = dict.fromkeys((*experts_(1, of="w1"), *experts_(1, of="w3")))
    tensors = mixtral({**alone, **experts_(*shape)})
    refused(written(tmp_path / "m", tensors), "w2.weight", str(list(shape)))


def test_a_part_of_every_expert_is_refused(tmp_path: Path) -> None:
    """On one rank of a split model, gate and up may be missing, but the config gives the size."""
    alone: dict[str, Raw | None] = dict.fromkeys((*experts_(1, of="w1"), *experts_(1, of="w3")))
    tensors = mixtral({**alone, **experts_(HIDDEN, INNER // 2)})
    source = written(tmp_path / "m", tensors, moe_intermediate_size=INNER)
    refused(source, "w2.weight", f"{INNER} wide")


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    """Config and weights of two models are refused, however consistent the weights are."""
    refused(written(tmp_path / "m", checkpoints.mixtral_tensors(), hidden_size=16), "16 numbers")


@pytest.mark.parametrize("router", [None, bf16(4, HIDDEN), bf16(HIDDEN, 4)])
def test_experts_that_all_lie_transposed_are_refused(router: Raw | None, tmp_path: Path) -> None:
    """The tensors match each other but not the config; a transposed router shows a Paddle file."""
    turned = {**experts_(INNER, HIDDEN), **experts_(HIDDEN, INNER, of="w1")}
    turned |= experts_(HIDDEN, INNER, of="w3")
    routers = {n: router for n in mixtral({}) if n.endswith(".gate.weight")}
    tensors = {n: raw for n, raw in {**mixtral(turned), **routers}.items() if raw is not None}
    source = written(tmp_path / "m", tensors)
    if router == bf16(HIDDEN, 4):
        assert len(api.plan(source, experts=3, rule="preserve").tensors) == 8
    else:
        refused(source, "w2.weight", f"[{INNER}, {HIDDEN}]", f"have {HIDDEN} numbers", "transposed")


def test_experts_may_be_narrower_than_the_model(tmp_path: Path) -> None:
    """A latent MoE is known by a config key, or by its router if the key is unknown."""
    narrow = {**experts_(5, INNER), **experts_(INNER, 5, of="w1"), **experts_(INNER, 5, of="w3")}
    for more in ({"moe_latent_size": 5}, {"routed_expert_hidden_size": 5}, {}):
        source = written(tmp_path / f"m{len(more)}", mixtral(narrow), **more)
        assert len(api.plan(source, experts=3).tensors) == 8


def test_where_the_config_is_silent_the_tensors_are_compared(tmp_path: Path) -> None:
    """A config without a hidden size is accepted."""
    source = written(tmp_path / "m", checkpoints.mixtral_tensors(), hidden_size=None)
    assert len(api.plan(source, experts=3).tensors) == 8


@pytest.mark.parametrize(
    ("joined", "down", "fits"),
    [
        ((2 * INNER, HIDDEN), (HIDDEN, INNER), True),
        ((HIDDEN, 2 * INNER), (INNER, HIDDEN), True),  # as stored by Llama 4 and gpt-oss
        ((INNER, HIDDEN), (HIDDEN, INNER), False),
        ((2 * INNER, HIDDEN), (HIDDEN, 2 * INNER), False),
        ((2 * INNER, HIDDEN), (INNER, HIDDEN), False),
        ((2 * INNER, HIDDEN), (HIDDEN + 2, INNER), False),
    ],
)
def test_stacked_experts_fit_in_either_orientation(
    joined: tuple[int, ...], down: tuple[int, ...], fits: bool, tmp_path: Path
) -> None:
    """Gate and up in one tensor have twice the rows or twice the columns."""
    tensors = checkpoints.fused_mixtral_tensors()
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = bf16(4, *joined)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = bf16(4, *down)
    source = written(tmp_path / "m", tensors)
    if fits:
        assert len(api.plan(source, experts=3).tensors) == 2
    else:
        refused(source, "model.layers.0.mlp.experts.down_proj", "not the transpose")


# Biases -------------------------------------------------------------------------------------------


def biased(**changes: Raw | None) -> dict[str, Raw]:
    """A fused Mixtral with biases like gpt-oss."""
    tensors: dict[str, Raw | None] = dict(checkpoints.fused_mixtral_tensors())
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        tensors |= {
            at + "gate_up_proj_bias": bf16(4, 2 * INNER),
            at + "down_proj_bias": bf16(4, HIDDEN),
        }
    tensors |= {f"model.layers.1.mlp.experts.{name}": raw for name, raw in changes.items()}
    return {name: raw for name, raw in tensors.items() if raw is not None}


def test_a_layer_without_its_bias_is_refused(tmp_path: Path) -> None:
    """Either all layers have biases or none."""
    assert len(api.plan(written(tmp_path / "a", biased()), experts=3).tensors) == 4
    source = written(tmp_path / "b", biased(down_proj_bias=None))
    refused(source, "model.layers.1.mlp.experts.down_proj: has no bias")


def test_a_bias_before_means_a_bias_behind(tmp_path: Path) -> None:
    """If gate and up have biases, the down-projections must have them too."""
    tensors = {n: raw for n, raw in biased().items() if not n.endswith("down_proj_bias")}
    refused(written(tmp_path / "m", tensors), "has no bias", "gate_up_proj_bias")


def test_a_bias_of_another_size_is_refused(tmp_path: Path) -> None:
    """A bias has a number for each output of each expert."""
    source = written(tmp_path / "m", biased(down_proj_bias=bf16(4, INNER + 3)))
    refused(source, "down_proj_bias", f"[4, {INNER + 3}]")


# Scales -------------------------------------------------------------------------------------------

QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "norm_topk_prob": True}
ROWS, COLUMNS = 256, 192
SCALE = "model.layers.1.mlp.experts.2.down_proj.weight_scale"


def fp8(scale: tuple[int, ...], odd: Raw | None = None) -> dict[str, Raw]:
    """A Qwen3-MoE in FP8 with scales of one shape, except one that is `odd`."""
    tensors: dict[str, Raw] = {}
    for layer in range(2):
        for expert in EVERY:
            at = f"model.layers.{layer}.mlp.experts.{expert}.down_proj."
            codes = np.ones((ROWS, COLUMNS), ml_dtypes.float8_e4m3fn)
            tensors[at + "weight"] = ("F8_E4M3", codes.shape, codes.tobytes())
            tensors[at + "weight_scale"] = values("F32", scale, special=False)
    return {**tensors, SCALE: odd} if odd else tensors


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1), (ROWS,), (ROWS, 1), (1, COLUMNS), (2, 2), (ROWS, 6), (4, 3), (6, 4)]
)
def test_scales_of_usual_blocks_pass(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One scale per tensor, per row or column, or per block, the last of which may be partial."""
    source = written(tmp_path / "m", fp8(shape), **QWEN, hidden_size=ROWS)
    assert len(api.plan(source, experts=3, rule="preserve").tensors) == 8


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((0,), "is empty"),
        ((7, 1), "does not fit"),
        ((5,), "does not fit"),
        ((2, 5), "does not fit"),
    ],
)
def test_scales_that_fit_nothing_are_refused(
    shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    """The shape of a scale must match its weight, even if all scales are wrong alike."""
    odd = values("F32", shape, special=False)
    source = written(tmp_path / "a", fp8((ROWS, 1), odd), **QWEN, hidden_size=ROWS)
    refused(source, SCALE, str(list(shape)), says)
    refused(written(tmp_path / "b", fp8(shape), **QWEN, hidden_size=ROWS), "weight_scale", says)


def test_a_scale_unlike_its_siblings_is_refused(tmp_path: Path) -> None:
    """Both shapes are possible, but not in one layer."""
    odd = values("F32", (1,), special=False)
    source = written(tmp_path / "m", fp8((ROWS, 1), odd), **QWEN, hidden_size=ROWS)
    refused(source, SCALE, "[1]", f"[{ROWS}, 1]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_scale_that_is_no_number_is_refused_before_anything_is_written(
    dtype: str, value: float, tmp_path: Path
) -> None:
    """Every weight with that scale would be NaN or infinite."""
    codes = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}[dtype]
    odd = np.ones((ROWS, 1), codes)
    odd[-1] = value
    tensors = fp8((ROWS, 1), (dtype, odd.shape, odd.tobytes()))
    for name in [n for n in tensors if n.endswith("scale") and n != SCALE]:
        tensors[name] = values(dtype, (ROWS, 1), special=False)
    source = written(tmp_path / "m", tensors, **QWEN, hidden_size=ROWS)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        api.convert(source, tmp_path / "out", experts=3, rule="preserve")
    assert SCALE in caught.value.message
    assert not list((tmp_path / "out").glob("*.safetensors"))
