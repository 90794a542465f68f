"""Whatever a row does not know is reported: types, config keys, tensors of an MoE block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints
from support.checkpoints import HIDDEN, Raw, values, write_shards
from support.gated_checkpoints import gated_tensors
from transformers import CONFIG_MAPPING

from moescale import api
from moescale.errors import UnsupportedError
from moescale.families.architectures import ROWS, Flag, PowerNorm, SharedSum
from moescale.routers.kinds import RouterKind

CONFIG = json.loads(checkpoints.MIXTRAL_CONFIG)


def written(folder: Path, config: dict[str, Any], more: dict[str, Raw] | None = None) -> Path:
    """A small Mixtral with routers and norms, extra tensors and another config."""
    write_shards(folder, {**gated_tensors(), **(more or {})}, 1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def warnings(folder: Path, **options: Any) -> list[str]:
    """The warnings of a plan."""
    return list(api.plan(folder, **{"experts": 3, **options}).warnings)


# Types --------------------------------------------------------------------------------------------


def test_a_text_models_type_is_named_where_the_outer_one_is_not_known(tmp_path: Path) -> None:
    """A text model inside another model may be built differently."""
    config = {"model_type": "new_vl", "text_config": CONFIG}
    (warning,) = warnings(written(tmp_path / "m", config))
    assert "'new_vl' is not known, so it is treated as its text model, 'mixtral'" in warning
    assert not warnings(tmp_path / "m", arch="mixtral")


@pytest.mark.parametrize(
    ("outer", "inner", "factor"),
    [
        ("mistral3", "mistral4", 1.5**0.5),
        ("mistral3", "olmoe", 1.5**-0.5),
        ("kimi_k25", "kimi_k2", 1.5**0.5),
        ("nemotron_h_omni", "qwen2_moe", 1.5**-0.5),
        ("qwen3_vl_moe", "qwen3_moe", 1.5**0.5),
    ],
)
def test_a_type_that_holds_any_text_model_has_the_router_of_that(
    outer: str, inner: str, factor: float, tmp_path: Path
) -> None:
    """A warning names the inner type where it is used; other models ignore it."""
    more = {"first_k_dense_replace": 0, "n_routed_experts": 4}
    config = {"model_type": outer, "text_config": {**CONFIG, "model_type": inner, **more}}
    plan = api.plan(written(tmp_path / "m", config), experts=3, rule="preserve")
    assert plan.factors["0"] == pytest.approx(factor)
    assert (plan.model_type == inner) == any("may hold any text" in w for w in plan.warnings)


def kimi_k3(**more: Any) -> dict[str, Any]:
    """The config of a small Kimi-K3, whose text model has another type."""
    text = {**CONFIG, "model_type": "kimi_linear", "num_experts": 4, "num_experts_per_token": 2}
    return {"model_type": "kimi_k3", "text_config": {**text, **more}}


def test_a_norm_on_the_routed_sum_removes_every_factor(tmp_path: Path) -> None:
    """Kimi-K3 is refused, unless its config turns the norm off or no factor is requested."""
    folder = written(tmp_path / "m", kimi_k3(latent_moe_use_norm=True))
    with pytest.raises(UnsupportedError, match="routed_expert_norm"):
        api.plan(folder, experts=3)
    assert api.plan(folder, experts=3, rule="none").model_type == "kimi_k3"
    assert api.plan(written(tmp_path / "n", kimi_k3()), experts=3).factors["0"] > 1.2


OTHER_NAMES: dict[str, dict[str, Any]] = {
    "minimax_m1": {},
    "minimax_text_01": {},
    "minimax_m3": {},
    "hunyuan": {"num_experts_per_tok": None, "moe_topk": [2, 2]},
    "mimo_v2": {"n_routed_experts": 4},
    "sdar_moe": {"num_experts": 4, "norm_topk_prob": True},
    "bailing_moe_linear": {"num_experts": 4},
    "llada2_moe": {"num_experts": 4},
    "joyai_llm_flash": {"n_routed_experts": 4, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("model_type", OTHER_NAMES)
def test_types_that_keep_the_code_of_another(model_type: str, tmp_path: Path) -> None:
    """Their weights are renormalised, so going from two experts to three needs a factor above 1."""
    folder = written(
        tmp_path / "m", {**CONFIG, "model_type": model_type, **OTHER_NAMES[model_type]}
    )
    assert api.plan(folder, experts=3, rule="preserve").factors["0"] == pytest.approx(1.5**0.5)


@pytest.mark.parametrize(
    "spelled",
    [
        {"moe_top_k": 2, "moe_num_experts": 4},
        {"num_experts_per_tok": 2, "num_experts": 4},
        {"num_experts_per_tok": 2, "n_routed_experts": 4},
    ],
)
def test_step_is_read_in_every_spelling_of_its_config(
    spelled: dict[str, int], tmp_path: Path
) -> None:
    """The config may be flat or nested, with Step's keys or those of transformers."""
    own = {"model_type": "step3p7", "num_hidden_layers": 2, "hidden_size": HIDDEN, **spelled}
    for name, config in {
        "flat": own,
        "nested": {"model_type": "step3p7", "text_config": own},
    }.items():
        folder = written(tmp_path / name, config)
        assert api.plan(folder, experts=3, rule="preserve").factors["0"] == pytest.approx(1.5**0.5)


def test_a_draft_of_its_own_size_is_a_part_of_its_own(tmp_path: Path) -> None:
    """DeepSeek-V4.1 has two counts and two numbers of experts; the main model is the default."""
    tensors = {}
    for at, experts in (("layers.0", 4), ("layers.1", 4), ("mtp.0", 2)):
        for e in range(experts):
            for w in (1, 2, 3):
                shape = (HIDDEN, 6) if w == 2 else (6, HIDDEN)
                tensors[f"{at}.ffn.experts.{e}.w{w}.weight"] = values("BF16", shape, e)
    config = {
        "model_type": "deepseek_v41",
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "dspark_n_routed_experts": 2,
        "dspark_num_experts_per_tok": 1,
    }
    write_shards(tmp_path, tensors, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    main = api.plan(tmp_path, experts=3)
    assert list(main.factors) == ["0", "1"] and "'draft'" in main.warnings[0]
    assert b'"dspark_num_experts_per_tok": 1' in main.config
    draft = api.plan(tmp_path, experts=2, part="draft")
    assert len(draft.tensors) == 2 and draft.experts.total == 2
    assert b'"dspark_num_experts_per_tok": 2' in draft.config
    assert not any("num_experts_per_tok" in w for w in draft.warnings)
    for count in (1, 2):  # two counts with the same value remain two
        config |= dict.fromkeys(("num_experts_per_tok", "dspark_num_experts_per_tok"), count)
        (tmp_path / "config.json").write_text(json.dumps(config))
        after = json.loads(api.plan(tmp_path, experts=3 - count, part="draft").config)
        assert after["num_experts_per_tok"] == count
        assert after["dspark_num_experts_per_tok"] == 3 - count


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score_function", "sigmoid"),
        ("scoring_func", "sigmoid"),
        ("score_func", "sigmoid"),
        ("moe_router_activation_func", "sigmoid"),
        ("norm_topk_prob", False),
        ("route_norm", False),
        ("moe_router_enable_expert_bias", True),
        ("use_routing_bias", True),
        ("topk_method", "noaux_tc"),
        ("gate_temp", 0.5),
        ("router_temperature", 2),
        ("router_logit_softcapping", 30.0),
        ("latent_moe_use_norm", True),
        ("routed_expert_norm", True),
        ("apply_router_weight_on_input", True),
        ("routing_score_fn", "sigmoid"),
        ("gating_function", "sigmoid"),
        ("router_activation", "sigmoid"),
        ("renormalize", False),
        ("normalize_expert_weights", False),
        ("router_normalize_weights", False),
        ("zero_expert_num", 2),
    ],
)
def test_a_key_that_changes_the_routing_is_named_where_it_is_not_read(
    key: str, value: Any, tmp_path: Path
) -> None:
    """Mixtral reads none of these keys; a config that has one may need other code."""
    (warning,) = warnings(written(tmp_path / "m", {**CONFIG, key: value}))
    assert f"{key} is {value!r}, which moescale does not read for 'mixtral'" in warning


def test_a_limit_to_groups_is_named_where_it_is_not_read(tmp_path: Path) -> None:
    """Mixtral chooses from all experts, unless other code runs it."""
    for groups, limited in ((4, True), (1, False), (None, False)):
        config = {**CONFIG, "n_group": groups, "topk_group": 1}
        said = [w for w in warnings(written(tmp_path / str(groups), config)) if "topk_group" in w]
        assert bool(said) == limited


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score_function", "softmax"),
        ("norm_topk_prob", True),
        ("moe_router_enable_expert_bias", False),
        ("gate_temp", 1.0),
        ("latent_moe_use_norm", False),
        ("scoring_func", None),
        ("topk_method", "greedy"),
        ("final_logit_softcapping", 30.0),
        ("residual_gate_temperature", 0.3),
        ("routing_score_fn", "softmax"),
        ("shared_expert_gate_type", "sigmoid"),
        ("output_gate_type", "sigmoid"),
        ("router_activation", ["sigmoid"]),
        ("layer_normalize", False),
        ("zero_expert_num", 0),
        ("topk_group", 1),
    ],
)
def test_a_key_that_says_what_is_so_anyway_is_not(key: str, value: Any, tmp_path: Path) -> None:
    """Many configs have such keys with the default value."""
    assert warnings(written(tmp_path / "m", {**CONFIG, key: value})) == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("moe_renormalize", True, True), ("moe_renormalize", False, False)],
)
def test_another_types_key_is_held_against_what_the_row_reads(
    key: str, value: bool, named: bool, tmp_path: Path
) -> None:
    """Qwen3-MoE only reads ``norm_topk_prob``; a key that says the opposite may be right."""
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, key: value}
    assert any(f"{key} is" in w for w in warnings(written(tmp_path / "m", config))) is named


def test_a_softmax_of_the_chosen_sums_to_1_whatever_a_key_says(tmp_path: Path) -> None:
    """gpt-oss computes the gate weights from the chosen logits only."""
    config = {**CONFIG, "model_type": "gpt_oss", "norm_topk_prob": False}
    assert warnings(written(tmp_path / "m", config)) == []


def bailing(folder: Path, bias: float | None, **more: Any) -> Path:
    """A small Ling: gates by `score_function`, with or without a bias."""
    tensors = {n.replace("block_sparse_moe", "mlp"): raw for n, raw in gated_tensors("F32").items()}
    extra: dict[str, Raw] = {}
    for layer in range(2 if bias is not None else 0):
        name = f"model.layers.{layer}.mlp.gate.expert_bias"
        extra[name] = ("F32", (4,), np.array([bias, 0, 0, 0], "<f4").tobytes())
    config = {**CONFIG, "model_type": "bailing_moe", "num_experts": 4, "norm_topk_prob": True}
    write_shards(folder, {**tensors, **extra}, 1)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    return folder


def test_one_type_with_two_scores_is_read_as_the_config_says(tmp_path: Path) -> None:
    """Ling-2.0 has a sigmoid with a bias, under the type of the older Ling with a softmax."""
    how: dict[str, Any] = {"experts": 3, "rule": "gates"}
    softmax = api.plan(bailing(tmp_path / "a", None), **how).factors["0"]
    sigmoid = api.plan(bailing(tmp_path / "b", None, score_function="sigmoid"), **how).factors["0"]
    biased = bailing(tmp_path / "c", 5.0, score_function="sigmoid")
    assert len({softmax, sigmoid, api.plan(biased, **how).factors["0"]}) == 3
    plan = api.plan(biased, experts=3, gate_scale=1.5)
    assert any("a bias" in warning for warning in plan.warnings)
    assert api.plan(tmp_path / "b", experts=3, gate_scale=1.5).options.gate_scale == 1.5


def test_every_alias_of_transformers_is_honoured() -> None:
    """If an ``attribute_map`` renames a key to one that a row reads, the row reads both."""
    missed = [
        (row.model_type, alias, target)
        for row in ROWS
        if row.model_type in CONFIG_MAPPING
        for alias, target in aliases(CONFIG_MAPPING[row.model_type]).items()
        if target in read(row) and alias not in read(row)
    ]
    assert missed == []
    assert "norm_topk_prob" in aliases(CONFIG_MAPPING["kimi_linear"])


def aliases(config: Any) -> dict[str, str]:
    """The aliases of a config class and of its sections."""
    found = dict(getattr(config, "attribute_map", None) or {})
    for section in (getattr(config, "sub_configs", None) or {}).values():
        if isinstance(section, type):
            found |= getattr(section, "attribute_map", None) or {}
    return found


def read(row: Any) -> set[str]:
    """The config keys that a row reads."""
    kind = row.router
    keys = {*row.count_keys, *row.total_keys, *([row.scale_key] if row.can_fold else [])}
    keys |= {"n_group", "num_expert_group", "topk_group", "num_hidden_layers", "hidden_size"}
    keys |= {"first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers"}
    if isinstance(row.normalisation, Flag | PowerNorm | SharedSum):
        keys |= {row.normalisation.key, *getattr(row.normalisation, "aliases", ())}
    if isinstance(kind, RouterKind):
        keys |= {
            kind.score_key,
            kind.bias_key,
            kind.zero_experts_key,
            kind.cap_key,
        } - {None}
    return keys


def test_the_alias_of_a_key_turns_the_factor_round(tmp_path: Path) -> None:
    """Ling-3.0 with ``norm_topk_prob`` false: transformers reads it as ``moe_renormalize``."""
    config = {**CONFIG, "model_type": "bailing_hybrid", "num_experts": 4}
    for value, factor in ((True, 1.5**0.5), (False, 1.5**-0.5)):
        folder = written(tmp_path / str(value), {**config, "norm_topk_prob": value})
        assert api.plan(folder, experts=3, rule="preserve").factors["0"] == pytest.approx(factor)


# Tensors ------------------------------------------------------------------------------------------


IN_BLOCK = (
    *("out_norm.weight", "routed_expert_norm.weight", "shared_scale", "gate.scale"),
    *("gate.e_score_correction_bias", "expert_bias", "gate.bias", "router.per_expert_scale"),
    *("gate.norm.weight", "experts.norm.weight", "experts.0.norm.weight", "experts.1.down_norm"),
    "routed_expert_up_proj.weight",
)
BESIDE_BLOCK = ("post_feedforward_layernorm.weight", "post_moe_norm.weight", "ffn_post_norm.weight")


@pytest.mark.parametrize(
    "name", [*(f"block_sparse_moe.{name}" for name in IN_BLOCK), *BESIDE_BLOCK]
)
def test_a_tensor_that_the_row_does_not_know_is_named(name: str, tmp_path: Path) -> None:
    """A norm, bias or scale may follow the experts; what all layers have is reported once."""
    size = 4 if "bias" in name or name.endswith("expert_scale") else HIDDEN
    extra = {f"model.layers.{layer}.{name}": values("BF16", (size,), 9) for layer in range(2)}
    (warning,) = warnings(written(tmp_path / "m", CONFIG, extra))
    assert f"model.layers.0.{name} (2 in all)" in warning and "'mixtral'" in warning


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mixtral", "block_sparse_moe.shared_expert.down_proj.weight"),
        ("mixtral", "block_sparse_moe.gate.weight_scale"),
        ("mixtral", "self_attn.out_norm.weight"),
        ("minimax_m2", "block_sparse_moe.e_score_correction_bias"),
        ("gpt_oss", "block_sparse_moe.router.bias"),
        ("llama4", "block_sparse_moe.router.bias"),
        ("afmoe", "post_mlp_layernorm.weight"),
        ("flex_olmo", "post_feedforward_layernorm.weight"),
    ],
)
def test_what_the_row_knows_is_not(model_type: str, name: str, tmp_path: Path) -> None:
    """Many types have shared experts, and some have biases or norms; none of them are reported."""
    size = (4,) if name.endswith("bias") else (4, HIDDEN)
    extra = {f"model.layers.{layer}.{name}": values("BF16", size, 9) for layer in range(2)}
    folder = written(tmp_path / "m", {**CONFIG, "model_type": model_type}, extra)
    assert not any("does not know what" in w for w in warnings(folder, rule="none"))
