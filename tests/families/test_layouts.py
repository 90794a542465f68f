"""Names and routers vary separately: layouts, wrappers and pruned layers are inspected."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints, gated_checkpoints
from support.checkpoints import HIDDEN, INNER, Raw, values

from moescale import api
from moescale.errors import CheckpointError, UnsupportedError
from moescale.planning.plan import Plan

CONFIG = json.loads(checkpoints.MIXTRAL_CONFIG)
PRESERVED = 1.224744871391589
"""The factor of a renormalising router, from 2 experts to 3."""


def written(folder: Path, tensors: Mapping[str, Raw], **config: Any) -> Path:
    """Write the tensors as one shard, with a config."""
    checkpoints.write_shards(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def renamed(
    change: Callable[[str], str], tensors: Mapping[str, Raw] | None = None
) -> dict[str, Raw]:
    """The tensors of a small Mixtral under other names."""
    tensors = tensors or checkpoints.mixtral_tensors()
    return {change(name): raw for name, raw in tensors.items()}


def scaled(plan: Plan) -> set[str]:
    """The names of the tensors that change, all by one factor."""
    assert [t.factor for t in plan.tensors] == [pytest.approx(PRESERVED)] * len(plan.tensors)
    return {t.tensor.name for t in plan.tensors}


# Layouts ------------------------------------------------------------------------------------------

ONE_BY_ONE = {
    "transformers 5": ("mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "LFM2": ("feed_forward.experts.{}.", ("w1", "w3", "w2")),
    "DeepSeek-V4": ("ffn.experts.{}.", ("w1", "w3", "w2")),
    "Gemma 4": ("experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "module lists": ("mlp.experts.", ("gate_projs.{}", "up_projs.{}", "down_projs.{}")),
    "NLLB": ("ffn.experts.expert_{}.", ("fc1", "fc3", "fc2")),
}


@pytest.mark.parametrize("layout", ONE_BY_ONE)
def test_experts_one_by_one_are_found_in_every_spelling(layout: str, tmp_path: Path) -> None:
    """A Mixtral that a tool wrote with the names of another type is still a Mixtral."""
    before, matrices = ONE_BY_ONE[layout]
    block = before.partition("experts")[0]
    number = {"w1": 0, "w3": 1, "w2": 2}

    def change(name: str) -> str:
        found = re.fullmatch(r"(.+\.)block_sparse_moe\.(?:experts\.(\d)\.(w\d)|gate)\.weight", name)
        if not found:
            return name
        if found[2] is None:
            return f"{found[1]}{block}gate.weight"
        return f"{found[1]}{before}{matrices[number[found[3]]]}.weight".format(found[2])

    plan = api.plan(written(tmp_path / "m", renamed(change)), experts=3, rule="preserve")
    names = map(change, checkpoints.routed(checkpoints.mixtral_tensors()))
    assert scaled(plan) == set(names)
    assert plan.model_type == "mixtral"


STACKED = ["mlp.experts.down_proj", "block_sparse_moe.output_linear", "moe.down_proj"]
STACKED += ["mlp.switch_mlp.down_proj", "feed_forward.experts.w2", "mlp.experts.fc2"]


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_are_found_in_every_spelling(name: str, tmp_path: Path) -> None:
    """All experts of a layer may be in one tensor, with the names of any type."""
    tensors = {
        f"model.layers.{layer}.{name}.weight": values("BF16", (4, HIDDEN, INNER))
        for layer in range(2)
    }
    plan = api.plan(written(tmp_path / "m", tensors), experts=3, rule="preserve")
    assert scaled(plan) == set(tensors)


def test_a_dense_down_projection_is_in_no_layout(tmp_path: Path) -> None:
    """A dense layer's tensors are not mistaken for the experts of another type."""
    tensors = checkpoints.mixtral_tensors()
    tensors["model.layers.2.mlp.down_proj.weight"] = values("BF16", (HIDDEN, INNER))
    tensors["model.layers.2.mlp.output_linear.weight"] = values("BF16", (HIDDEN, INNER))
    plan = api.plan(written(tmp_path / "m", tensors), experts=3, rule="preserve")
    assert scaled(plan) == set(checkpoints.routed(checkpoints.mixtral_tensors()))


def test_an_expert_in_two_layouts_is_refused_by_both_names(tmp_path: Path) -> None:
    """The loader decides which of the two it loads."""
    tensors = checkpoints.mixtral_tensors()
    twin = "model.layers.1.mlp.experts.2.down_proj"
    tensors[f"{twin}.weight"] = values("BF16", (HIDDEN, INNER))
    with pytest.raises(CheckpointError, match="has expert 2 twice") as caught:
        api.plan(written(tmp_path / "m", tensors), experts=3)
    assert twin in caught.value.message and "experts.2.w2" in caught.value.message


def test_a_part_in_a_layout_is_refused(tmp_path: Path) -> None:
    """A missing expert is found in every layout."""
    tensors = renamed(lambda name: name.replace("block_sparse_moe", "feed_forward"))
    del tensors["model.layers.1.feed_forward.experts.3.w2.weight"]
    with pytest.raises(CheckpointError, match=r"layer 1.*expert 3 is missing"):
        api.plan(written(tmp_path / "m", tensors), experts=3)


def test_an_arch_that_contradicts_the_config_is_a_loud_warning(tmp_path: Path) -> None:
    """The names need no --arch, and another type's router inverts the factor."""
    source = written(tmp_path / "m", checkpoints.mixtral_tensors())
    plan = api.plan(source, experts=3, rule="preserve", arch="qwen3_moe")
    (warning,) = (w for w in plan.warnings if "contradicts" in w)
    assert all(word in warning for word in ("'qwen3_moe'", "'mixtral'", "0.8165", "1.2247"))
    assert not api.plan(source, experts=3, rule="preserve", arch="mixtral").warnings


@pytest.mark.parametrize("names", ["mlp.router.linear", "feed_forward.router", "mlp.gate.linear"])
def test_a_router_is_found_beside_its_experts(names: str, tmp_path: Path) -> None:
    """The rule gates and --gate-scale find the router by inspection."""
    tensors = gated_checkpoints.gated_tensors()
    block = names.partition(".")[0]

    def change(name: str) -> str:
        name = name.replace("block_sparse_moe.gate.", f"{names}.")
        return name.replace("block_sparse_moe", block)

    usual = api.plan(written(tmp_path / "a", tensors), experts=3, rule="gates")
    source = written(tmp_path / "b", renamed(change, tensors))
    assert api.plan(source, experts=3, rule="gates").factors == usual.factors
    planned = api.plan(source, experts=3, rule="preserve", gate_scale=2.0).tensors
    assert {t.tensor.name for t in planned if t.role == "router"} == {
        f"model.layers.{layer}.{names}.weight" for layer in range(2)
    }


def test_a_dense_model_is_called_one(tmp_path: Path) -> None:
    """A model without experts gets no advice on rescaling."""
    tensors = {"model.layers.0.mlp.down_proj.weight": values("BF16", (HIDDEN, INNER))}
    with pytest.raises(UnsupportedError, match=r"dense model.*nothing to rescale") as caught:
        api.plan(written(tmp_path / "a", tensors, model_type="llama"), experts=3)
    assert "arch" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no experts.*although.*'mixtral'"):
        api.plan(written(tmp_path / "b", tensors), experts=3)


# Wrappers -----------------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[str], str]] = {
    "DataParallel": lambda name: "module." + name,
    "torch.compile": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda name: name.replace(".block", "._fsdp_wrapped_module.block"),
    "checkpointing": lambda name: name.replace(".experts", "._checkpoint_wrapped_module.experts"),
    "several": lambda name: "_orig_mod.module." + name.replace(".w2.", ".w2._orig_mod."),
    "PEFT": lambda name: "base_model.model." + name.replace(".w2.", ".w2.base_layer."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_words_of_wrappers_are_seen_through(wrapper: str, tmp_path: Path) -> None:
    """The tensors keep their names, and the plan is that of the inner model."""
    change = WRAPPED[wrapper]
    plan = api.plan(written(tmp_path / "m", renamed(change)), experts=3, rule="preserve")
    assert scaled(plan) == set(map(change, checkpoints.routed(checkpoints.mixtral_tensors())))
    assert list(plan.factors) == ["0", "1"]


def test_a_wrapped_router_is_sampled(tmp_path: Path) -> None:
    """The rule gates ignores the same prefixes."""
    tensors = gated_checkpoints.gated_tensors()
    wrapped = renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod."), tensors)
    plans = [
        api.plan(written(tmp_path / name, found), experts=3, rule="gates")
        for name, found in (("a", tensors), ("b", wrapped))
    ]
    assert plans[0].factors == plans[1].factors


def test_twins_of_a_running_average_are_scaled_too(tmp_path: Path) -> None:
    """Weights below ``ema.`` are a separate stack."""
    tensors = checkpoints.mixtral_tensors()
    both = {**tensors, **renamed("ema.{}".format)}
    plan = api.plan(written(tmp_path / "m", both), experts=3, rule="preserve")
    names = checkpoints.routed(tensors)
    assert scaled(plan) == {*names, *map("ema.{}".format, names)}


def test_a_tensor_under_two_wrapped_names_is_refused(tmp_path: Path) -> None:
    """Nothing shows which of the two is the model's."""
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors = checkpoints.mixtral_tensors()
    tensors[f"_orig_mod.{name}"] = tensors[name]
    with pytest.raises(CheckpointError, match="two tensors for its weight"):
        api.plan(written(tmp_path / "m", tensors), experts=3)


AT = "model.layers.1.block_sparse_moe."


@pytest.mark.parametrize(
    "name",
    [
        f"{AT}experts.1.w2.lora_A.default.weight",
        f"{AT}experts.lora_B.weight",
        f"{AT}gate.modules_to_save.default.weight",
        f"{AT}experts.1.w1.lora_magnitude_vector",
    ],
)
def test_an_unmerged_adapter_of_the_experts_is_named(name: str, tmp_path: Path) -> None:
    """The adapter's part of the output would not be scaled."""
    tensors = {**checkpoints.mixtral_tensors(), name: values("BF16", (2, 8))}
    with pytest.raises(UnsupportedError, match="unmerged adapter") as caught:
        api.plan(written(tmp_path / "m", tensors), experts=3)
    assert "Merge it" in str(caught.value) and name in caught.value.message


def test_an_adapter_elsewhere_is_a_warning(tmp_path: Path) -> None:
    """An adapter on the attention does not affect the factor."""
    name = "model.layers.1.self_attn.o_proj.lora_A.default.weight"
    tensors = {**checkpoints.mixtral_tensors(), name: values("BF16", (2, 8))}
    (warning,) = api.plan(written(tmp_path / "m", tensors), experts=3, rule="preserve").warnings
    assert name in warning and "adapter" in warning


@pytest.mark.parametrize(
    ("change", "said", "advice"),
    [
        (lambda n: None, "has no weight, only bias", "fetch the missing shard"),
        (
            lambda n: n.replace("w2.weight", "w2.parametrizations.weight.original"),
            "cannot scale",
            "remove_parametrizations",
        ),
    ],
)
def test_what_is_wrong_with_a_weight_is_said_as_it_is(
    change: Callable[[str], str | None], said: str, advice: str, tmp_path: Path
) -> None:
    """The weights are not quantised, so the hint does not suggest another quantisation."""
    tensors = checkpoints.mixtral_tensors()
    for name in checkpoints.routed(tensors):
        tensors[name.replace("weight", "bias")] = values("BF16", (HIDDEN,))
        new, raw = change(name), tensors.pop(name)
        tensors |= {new: raw} if new else {}
    with pytest.raises((CheckpointError, UnsupportedError), match=said) as caught:
        api.plan(written(tmp_path / "m", tensors), experts=3, rule="preserve")
    assert advice in (caught.value.hint or "")


# Pruned models ------------------------------------------------------------------------------------

KEPT = (4, 3)
"""Experts that pruning left in each layer."""


def pruned(*kept: int, rows: tuple[int, ...] = (), fused: bool = False) -> dict[str, Raw]:
    """A Mixtral with these numbers of experts in its layers, and routers of as many rows."""
    make = checkpoints.fused_mixtral_tensors if fused else checkpoints.mixtral_tensors
    return {
        name: raw
        for layer, experts in enumerate(kept)
        for name, raw in make(2, experts).items()
        if f"layers.{layer}." in name and ".gate." not in name
    } | {
        f"model.layers.{layer}.{'mlp' if fused else 'block_sparse_moe'}.gate.weight": values(
            "BF16", (count, HIDDEN)
        )
        for layer, count in enumerate(rows or kept)
    }


@pytest.mark.parametrize(
    "numbers", [[0, 4, 3, 4], [None, 4, 3, 4], {"1": 4, "2": 3, "3": 4}, {"0": None, "2": 3}, 4]
)
def test_dense_layers_have_no_number(numbers: Any, tmp_path: Path) -> None:
    """A list of numbers per layer has 0 or null for layers without experts."""
    tensors = {
        name: raw
        for name, raw in checkpoints.deepseek_tensors(3, 4).items()
        if "layers.2.mlp.experts.3." not in name
    }
    for suffix, shape in (("weight", (3, HIDDEN)), ("e_score_correction_bias", (3,))):
        tensors[f"model.layers.2.mlp.gate.{suffix}"] = values("BF16", shape, special=False)
    key = "n_routed_experts_per_layer" if isinstance(numbers, dict) else "n_routed_experts"
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_routed_experts": 4}
    config |= {"num_hidden_layers": 3, "num_local_experts": None, key: numbers}
    plan = api.plan(written(tmp_path / "m", tensors, **config), experts=3, rule="preserve")
    assert len(plan.tensors) == 4 + 3 + 4
    assert sum("layer 2 has 3" in w for w in plan.warnings) == (numbers == 4)


def test_a_count_of_the_config_that_cannot_be_is_its_own(tmp_path: Path) -> None:
    """The error does not blame an option that was not given, but suggests one that helps."""
    source = written(tmp_path / "m", checkpoints.mixtral_tensors(), num_experts_per_tok=9)
    with pytest.raises(UnsupportedError, match="own number of experts per token is 9") as caught:
        api.plan(source, experts=3)
    assert "--trained-experts" in (caught.value.hint or "")
    assert api.plan(source, experts=3, trained_experts=2, rule="preserve").experts.trained == 2


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_local_experts": [4, 3]},
        {"num_local_experts": {"0": 4, "1": 3}},
        {"num_experts_per_layer": [4, 3]},
        {"num_experts_per_layer": {"0": 4, "1": 3}},
    ],
)
def test_layers_have_what_their_tensors_hold(
    config: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    """After pruning, layers have different numbers of experts, whatever the config says."""
    tensors = pruned(*KEPT, fused=fused)
    source = written(tmp_path / "m", tensors, **config)
    plan = api.plan(source, experts=3, rule="preserve")
    assert scaled(plan) == set(checkpoints.routed(tensors))
    said = "".join(plan.warnings)
    assert "3 to 4 routed experts" in said and ("layer 1 has 3" in said) is (not config)
    with pytest.raises(UnsupportedError, match="a layer has 3 routed experts"):
        api.plan(source, experts=4)


def test_a_pattern_finds_pruned_layers(tmp_path: Path) -> None:
    """A pattern also takes the numbers from the tensors."""
    source = written(tmp_path / "m", pruned(*KEPT))
    pattern = r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w2\.weight"
    options = {"pattern": pattern, "experts_key": "num_experts_per_tok", "rule": "preserve"}
    assert len(api.plan(source, experts=3, arch="mixtral", **options).tensors) == sum(KEPT)


@pytest.mark.parametrize(
    ("kept", "rows", "says"),
    [
        ((4, 3), (4, 4), "expert 3 is missing"),
        ((4, 4), (4, 3), r"gate\.weight.*\[3, 8\].*4 experts"),
        ((3, 3), (3, 3), "says 4 routed experts, but expert 3 is missing"),
        ((5, 5), (5, 5), "says 4 routed experts, but it has more"),
    ],
)
def test_a_router_has_to_agree(
    kept: tuple[int, ...], rows: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    """Missing experts are not pruning, and neither is the config of another model."""
    with pytest.raises(CheckpointError, match=says):
        api.plan(written(tmp_path / "m", pruned(*kept, rows=rows)), experts=3)


def test_pruned_layers_are_sampled_with_their_own_routers(tmp_path: Path) -> None:
    """The rule gates uses each layer's router."""
    tensors = pruned(*KEPT)
    for layer, experts in enumerate(KEPT):
        name, norm = (
            form.format(layer) for form in (gated_checkpoints.GATE, gated_checkpoints.NORM)
        )
        tensors[name] = values("BF16", (experts, HIDDEN), 50 + layer, special=False)
        tensors[norm] = values("BF16", (HIDDEN,), 60 + layer, special=False)
    factors = api.plan(written(tmp_path / "m", tensors), experts=3, rule="gates").factors
    assert np.isfinite(list(factors.values())).all() and factors["0"] != factors["1"]


@pytest.mark.parametrize(("groups", "warned"), [(3, True), (2, False)])
def test_groups_that_do_not_divide_the_experts_are_a_warning(
    groups: int, warned: bool, tmp_path: Path
) -> None:
    """A pruned model may keep the expert groups of the original."""
    source = checkpoints.deepseek(tmp_path / "m", n_group=groups, topk_group=2)
    warnings = api.plan(source, experts=1, rule="preserve").warnings
    assert any("cannot be divided into the 3 groups" in warning for warning in warnings) is warned
