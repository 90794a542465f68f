"""Model types that transformers lacks: each with the names and keys that its engine reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import HIDDEN, INNER, Raw, values, write_shards

from moescale import api
from moescale.errors import UnsupportedError
from moescale.planning.plan import Plan

EXPERTS, LAYERS = 4, 2
UP, DOWN = 1.5**0.5, 1.5**-0.5
"""The factors from 2 experts to 3: for renormalised gate weights, and for others."""


@dataclass(frozen=True)
class Type:
    """One model type as its engine reads it.

    Attributes:
        config: keys besides those that all types have.
        down: name of a layer's down-projections, with `{E}` if each expert has one.
        up: names of the matrices before them, likewise.
        beside: other tensors of an MoE layer, with their shapes.
        section: the section of the config with the keys.
        count: key of the experts per token.
        factor: of ``--rule preserve`` from 2 to 3.
        gates: whether ``--rule gates`` can be used.
        prefix: the part of a name before the layer's number.
        biased: whether down-projections have a bias.
    """

    config: Mapping[str, Any]
    down: str = "mlp.experts.{E}.down_proj.weight"
    up: tuple[str, ...] = ("mlp.experts.{E}.gate_proj.weight", "mlp.experts.{E}.up_proj.weight")
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    section: str = ""
    count: str = "num_experts_per_tok"
    factor: float = UP
    gates: bool = True
    prefix: str = "model.layers."
    biased: bool = False


GATE = {"mlp.gate.weight": (EXPERTS, HIDDEN), "post_attention_layernorm.weight": (HIDDEN,)}
V3_BIAS = {**GATE, "mlp.gate.e_score_correction_bias": (EXPERTS,)}
LING = {**GATE, "mlp.gate.expert_bias": (EXPERTS,)}
XLLM = {**GATE, "mlp.gate.bias": (EXPERTS,)}
ROUTED = {"n_routed_experts": EXPERTS}
LONGCAT = Type(
    {**ROUTED, "zero_expert_num": 2, "routed_scaling_factor": 6.0},
    beside={
        "mlp.router.classifier.weight": (EXPERTS + 2, HIDDEN),
        "mlp.router.e_score_correction_bias": (EXPERTS + 2,),
        "post_attention_layernorm.0.weight": (HIDDEN,),
    },
    count="moe_topk",
    factor=DOWN,
)
KLEAR = Type(
    {"num_experts": EXPERTS, "norm_topk_prob": True},
    beside={
        **GATE,
        "mlp.expert_bias": (EXPERTS,),
        "mlp.coefficient.weight": (2, HIDDEN),
        "mlp.coefficient.bias": (2,),
        "mlp.shared_experts.down_proj.weight": (HIDDEN, INNER),
    },
)
MOBIUS = Type(
    {"num_experts": EXPERTS, "num_blocks": LAYERS},
    down="experts.down_proj",
    up=("experts.gate_up_proj",),
    beside={"gate.weight": (EXPERTS, HIDDEN)},
    gates=False,
    prefix="model.language_model.meta_mlp.",
)
TYPES: dict[str, Type] = {
    "kimi_vl": Type(
        {**ROUTED, "norm_topk_prob": True},
        beside=V3_BIAS,
        section="text_config",
        prefix="language_model.model.layers.",
    ),
    "dots_vlm": Type(
        {**ROUTED, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        beside=V3_BIAS,
    ),
    "youtu_vl": Type({**ROUTED, "routed_scaling_factor": 2.5}, beside=V3_BIAS),
    "bailing_moe_v3_vl": Type(
        {"num_experts": EXPERTS, "norm_topk_prob": True}, beside=LING, section="text_config"
    ),
    "bailingmm_moe_v2_lite": Type({"num_experts": EXPERTS}, beside=LING, section="llm_config"),
    "gigachat3_5": Type(ROUTED, beside=V3_BIAS, gates=False),
    "longcat_flash_ngram": LONGCAT,
    "longcat_flash_sparse": LONGCAT,
    "xllm": Type({"num_experts": EXPERTS, "router_score_func": "softmax"}, beside=XLLM),
    "k2_horizon": Type(
        {"num_experts": EXPERTS, "mova_num_experts": 8, "mova_num_experts_per_tok": 2},
        beside={**XLLM, "self_attn.v_experts.0.weight": (8, HIDDEN)},
    ),
    "iquest_q1": Type(
        {"num_experts": EXPERTS, "mlp_only_layers": [0]},
        down="mlp.experts.proj",
        up=("mlp.experts.fc",),
        beside={"mlp.router.weight": (EXPERTS, HIDDEN), "feed_forward_norm.weight": (HIDDEN,)},
    ),
    "Klear": KLEAR,
    "klear": KLEAR,
    "phixtral": Type(
        {"num_local_experts": EXPERTS},
        down="moe.mlp.{E}.fc2.weight",
        up=("moe.mlp.{E}.fc1.weight",),
        beside={"moe.gate.weight": (EXPERTS, HIDDEN), "ln.weight": (HIDDEN,), "ln.bias": (HIDDEN,)},
        gates=False,
        prefix="transformer.h.",
        biased=True,
    ),
    "intern_s2_preview": Type({"num_experts": EXPERTS}, beside=GATE, section="text_config"),
    "interns2_mobius": MOBIUS,
    "interns2_mobius_text": MOBIUS,
}


def tensors_of(kind: Type) -> dict[str, Raw]:
    """The tensors of two layers."""
    tensors: dict[str, Raw] = {}
    for layer in range(LAYERS):
        at = f"{kind.prefix}{layer}."
        for number in range(EXPERTS) if "{E}" in kind.down else [None]:
            many = () if number is not None else (EXPERTS,)
            rows = INNER * (2 if number is None else 1)
            tensors[at + kind.down.format(E=number)] = values("BF16", (*many, HIDDEN, INNER))
            if kind.biased:
                bias = kind.down.replace("weight", "bias").format(E=number)
                tensors[at + bias] = values("BF16", (HIDDEN,), special=False)
            for name in kind.up:
                tensors[at + name.format(E=number)] = values("BF16", (*many, rows, HIDDEN))
        for seed, (name, shape) in enumerate(kind.beside.items()):
            tensors[at + name] = values("BF16", shape, seed, special=False)
    return tensors


def written(
    folder: Path, model_type: str, more: Mapping[str, Raw] | None = None, **keys: Any
) -> Path:
    """Write a small checkpoint of a type, with other tensors and keys."""
    kind = TYPES[model_type]
    write_shards(folder, {**tensors_of(kind), **(more or {})}, 1)
    inner = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, kind.count: 2}
    inner |= {**kind.config, **keys}
    if model_type == "iquest_q1":  # its first layer is dense by default
        inner["num_hidden_layers"] = LAYERS + 1
    config = {"model_type": model_type, **({kind.section: inner} if kind.section else inner)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(folder: Path, **options: Any) -> Plan:
    return api.plan(folder, **{"experts": 3, "rule": "preserve", **options})


@pytest.mark.parametrize("model_type", TYPES)
def test_all_down_projections_are_scaled_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    """They get the factor of their router, the plan has no warnings, and the count is set."""
    kind = TYPES[model_type]
    plan = planned(written(tmp_path / "m", model_type))
    assert plan.model_type == model_type
    end = kind.down.partition("{E}")[2] or kind.down
    ends = (end, end.replace("weight", "bias"))
    routed = {name for name in tensors_of(kind) if name.endswith(ends) and "shared" not in name}
    assert {t.tensor.name for t in plan.tensors} == routed
    assert plan.factors == {layer: pytest.approx(kind.factor) for layer in ("0", "1")}
    known = ("its identity experts", "--rule preserve assumes") if kind is LONGCAT else ()
    assert [w for w in plan.warnings if not any(word in w for word in known)] == []
    section = json.loads(plan.config)
    section = section[kind.section] if kind.section else section
    assert section[kind.count] == 3
    assert section.get("mova_num_experts_per_tok") == kind.config.get("mova_num_experts_per_tok")


@pytest.mark.parametrize("model_type", TYPES)
def test_its_router_is_formed_or_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    """If the table knows the engine's router, the rule gates is the default."""
    folder = written(tmp_path / "m", model_type)
    if TYPES[model_type].gates:
        assert api.plan(folder, experts=3).rule == "gates"
        return
    with pytest.raises(UnsupportedError, match=f"cannot be used with the router of '{model_type}'"):
        planned(folder, rule="gates")
    assert api.plan(folder, experts=3).rule == "preserve"


@pytest.mark.parametrize(
    ("model_type", "tensor", "said"),
    [
        ("gigachat3_5", "post_feedforward_layernorm.weight", "a norm follows the sum of routed"),
        ("iquest_q1", "ffn_out_norm.weight", "a norm follows the experts of layer 0"),
    ],
)
def test_a_norm_after_the_sum_is_told_where_a_moe_layer_has_it(
    model_type: str, tensor: str, said: str, tmp_path: Path
) -> None:
    """Other layouts of the type have no such norm, and one in a dense layer does not matter."""
    norm = values("BF16", (HIDDEN,))
    moe, dense = (f"model.layers.{layer}.{tensor}" for layer in (0, 7))
    (warning,) = planned(written(tmp_path / "moe", model_type, {moe: norm})).warnings
    assert said in warning
    assert not planned(written(tmp_path / "dense", model_type, {dense: norm})).warnings


@pytest.mark.parametrize(
    ("model_type", "tensor", "why"),
    [
        (
            "bailing_moe_v3_vl",
            "mlp.image_gate.weight",
            "it has separate routers for images and audio",
        ),
        ("bailingmm_moe_v2_lite", "mlp.image_gate.weight", "separate routers for images"),
        ("xllm", "self_attn.v_experts.0.weight", "its norms are stored as differences from 1"),
    ],
)
def test_a_router_that_some_models_of_a_type_have_is_refused_by_its_tensors(
    model_type: str, tensor: str, why: str, tmp_path: Path
) -> None:
    """The closed form gives the same factor for all."""
    more = {f"model.layers.0.{tensor}": values("BF16", (EXPERTS, HIDDEN))}
    folder = written(tmp_path / "m", model_type, more)
    with pytest.raises(UnsupportedError, match=why):
        planned(folder, rule="gates")
    assert planned(folder).factors["0"] == pytest.approx(UP)
    assert planned(folder).warnings == ()


@pytest.mark.parametrize(
    ("keys", "left_out", "sigmoid"),
    [
        ({}, (), True),
        ({}, ("mlp.gate.expert_bias",), False),
        ({"score_function": "softmax"}, (), False),
        ({"score_function": "sigmoid"}, ("mlp.gate.expert_bias",), True),
    ],
)
def test_ling_has_sigmoid_scores_if_it_has_a_bias(
    keys: dict[str, str], left_out: tuple[str, ...], sigmoid: bool, tmp_path: Path
) -> None:
    """Sigmoid if there is a bias, unless a key of the config says otherwise."""

    def factor(name: str, **config: Any) -> float:
        folder = written(tmp_path / name, "bailingmm_moe_v2_lite", **config)
        tensors = tensors_of(TYPES["bailingmm_moe_v2_lite"])
        kept = {n: raw for n, raw in tensors.items() if not n.endswith(left_out or "\0")}
        write_shards(folder, kept, 1)
        return float(planned(folder, rule="gates").factors["0"])

    score = "sigmoid" if sigmoid else "softmax"
    assert factor("m", **keys) == factor("named", score_function=score)
    other = "softmax" if sigmoid else "sigmoid"
    assert factor("m", **keys) != factor("other", score_function=other)


def test_baidus_vision_model_has_two_moes_in_one_numbering(tmp_path: Path) -> None:
    """Text and image experts share one numbering, and the config lists the number of each."""
    tensors = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp."
        for e in range(2 * EXPERTS):
            tensors[f"{at}experts.{e}.gate_proj.weight"] = values("BF16", (INNER, HIDDEN))
            tensors[f"{at}experts.{e}.up_proj.weight"] = values("BF16", (INNER, HIDDEN))
            tensors[f"{at}experts.{e}.down_proj.weight"] = values("BF16", (HIDDEN, INNER))
        tensors[f"{at}gate.weight"] = values("BF16", (HIDDEN, EXPERTS))
        tensors[f"{at}gate.weight_1"] = values("BF16", (HIDDEN, EXPERTS))
        tensors[f"{at}moe_statics.e_score_correction_bias"] = values("F32", (2, EXPERTS))
    write_shards(tmp_path, tensors, 1)
    config = {"model_type": "ernie4_5_moe_vl", "moe_k": 2, "moe_num_experts": [EXPERTS] * 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": HIDDEN}))
    plan = planned(tmp_path)
    assert len(plan.tensors) == LAYERS * 2 * EXPERTS
    assert plan.factors == {layer: pytest.approx(UP) for layer in ("0", "1")}
    assert plan.warnings == () and plan.experts.total == EXPERTS
