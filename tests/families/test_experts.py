"""The routed down-projections: all of them are found, or the source is refused."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import pytest
from support import checkpoints

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, MoescaleError, UnsupportedError, UsageError
from moescale.families import architectures
from moescale.families.complete import check_complete
from moescale.families.formats import scaled_tensors
from moescale.families.likely_experts import likely_down_projection
from moescale.families.moe_config import read_moe_config
from moescale.families.pattern import find_by_pattern
from moescale.families.projections import (
    Layer,
    Projection,
    find_projections,
)


def tensor(name: str, shape: tuple[int, ...] = (8, 6), dtype: str = "BF16") -> Tensor:
    """A tensor with only a name, a shape and a dtype."""
    return Tensor(name, dtype, shape, 0, 0)


def tensors_of(raw: dict[str, checkpoints.Raw]) -> list[Tensor]:
    """The header entries of a checkpoint in memory."""
    return [tensor(name, shape, dtype) for name, (dtype, shape, _) in raw.items()]


def find(model_type: str, tensors: Iterable[Tensor], section: dict[str, Any]) -> list[Projection]:
    """Find and check the projections as a plan does."""
    row, tensors = architectures.find(model_type), list(tensors)
    found = find_projections(tensors, row)
    check_complete(found, tensors, row, read_moe_config(section, row))
    return found


def names(projections: Iterable[Projection]) -> list[str]:
    """The names of all tensors of the projections."""
    return sorted(t.name for p in projections for t in p.by_suffix.values())


MIXTRAL = {"num_local_experts": 4, "num_hidden_layers": 2}


def without(tensors: list[Tensor], *parts: str) -> list[Tensor]:
    """The tensors whose names contain none of these parts."""
    return [t for t in tensors if not any(part in t.name for part in parts)]


REMOTE = {
    "deepseek": ("model.layers.1.mlp.experts.{}.down_proj.weight", "n_routed_experts"),
    "bailing_moe": ("model.layers.0.mlp.experts.{}.down_proj.weight", "num_experts"),
    "bailing_moe_v2": ("model.layers.1.mlp.experts.{}.down_proj.weight", "num_experts"),
    "kimi_k2": ("model.layers.1.mlp.experts.{}.down_proj.weight", "n_routed_experts"),
    "arctic": ("model.layers.0.block_sparse_moe.experts.{}.w2.weight", "num_local_experts"),
    "minicpm": ("model.layers.0.mlp.experts.{}.w2.weight", "num_experts"),
    "xverse": ("model.layers.0.mlp.experts.{}.down_proj.weight", "num_experts"),
    "grok-1": ("model.layers.0.moe_block.experts.{}.linear_1.weight", "num_experts"),
}
"""Names from published checkpoints with remote code, and the key that counts their experts."""


@pytest.mark.parametrize("model_type", REMOTE)
def test_names_of_remote_code_are_found(model_type: str) -> None:
    """All experts of a layer are found by their published names; one too few is refused."""
    name, key = REMOTE[model_type]
    shared = name.replace("experts.{}", "shared_experts")
    tensors = [tensor(shared), *(tensor(name.format(expert)) for expert in range(4))]
    assert names(find(model_type, tensors, {key: 4})) == [t.name for t in tensors[1:]]
    with pytest.raises(CheckpointError, match="expert 3 is missing"):
        find(model_type, tensors[:-1], {key: 4})


def test_experts_by_layer_may_be_a_list() -> None:
    """If the config counts the experts of each layer, the largest count is the total."""
    config = read_moe_config({"num_experts": [4, 2, 4]}, architectures.find("hunyuan_v1_moe"))
    assert config.experts == 4
    vision = {"moe_num_experts": [64, 64]}  # as in ERNIE-4.5-VL: one count for text, one for vision
    assert read_moe_config(vision, architectures.find("ernie4_5_vl_moe")).experts == 64
    assert [config.experts_in(layer) for layer in range(4)] == [4, 2, 4, 4]


@pytest.mark.parametrize("layer", ["9" * 5000, "\u0663", "03", "-1", "all"])
def test_a_layer_that_is_not_a_number_has_no_experts_of_its_own(layer: str) -> None:
    """Layers are looked up by their JSON spelling; any other key is ignored."""
    row = architectures.find("mixtral")
    for section in (
        {"num_local_experts": 4, "per_layer_config": {layer: {"num_local_experts": 2}}},
        {"num_local_experts": 4, "num_experts_per_layer": {layer: 2}},
    ):
        config = read_moe_config(section, row)
        assert [config.experts_in(number) for number in range(5)] == [4] * 5


def test_a_count_for_some_layers_is_noticed_under_any_key() -> None:
    """A count for some layers cannot be set, whatever key says which layers are meant."""
    overrides = {"num_local_experts": 4, "per_layer_config": {"all": {"num_experts_per_tok": 1}}}
    assert read_moe_config(overrides, architectures.find("mixtral")).has_layer_counts


# What is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "raw", "section"),
    [
        ("mixtral", checkpoints.mixtral_tensors(), MIXTRAL),
        ("mixtral", checkpoints.fused_mixtral_tensors(), MIXTRAL),
        ("qwen2_moe", checkpoints.qwen2_tensors(), checkpoints.QWEN2_CONFIG),
        ("deepseek_v3", checkpoints.deepseek_tensors(), checkpoints.DEEPSEEK_CONFIG),
    ],
    ids=["mixtral", "fused", "qwen2", "deepseek"],
)
def test_exactly_the_routed_projections_are_found(
    model_type: str, raw: dict[str, checkpoints.Raw], section: dict[str, Any]
) -> None:
    """Routers, shared experts, dense layers, gate and up projections and attention are left out."""
    found = names(find(model_type, tensors_of(raw), section))
    assert found == sorted(checkpoints.routed(raw))
    assert not any("shared" in name or "gate" in name or "attn" in name for name in found)


def test_mtp_blocks_are_matched() -> None:
    """The block after the last layer shares the count, so it is scaled too."""
    found = find(
        "deepseek_v3", tensors_of(checkpoints.deepseek_tensors()), dict(checkpoints.DEEPSEEK_CONFIG)
    )
    assert {str(p.layer) for p in found} == {"1", "2", "3"}


def test_mtp_blocks_under_a_name_of_their_own_are_a_stack() -> None:
    """``mtp.layers.0`` is layer ``mtp.0`` next to the layers of the model."""
    raw = checkpoints.qwen2_tensors(layers=4)
    moved = [
        tensor(name.replace("model.layers.3.", "mtp.layers.0."), shape)
        for name, (_, shape, _) in raw.items()
    ]
    section = {**checkpoints.QWEN2_CONFIG, "num_hidden_layers": 3}
    found = find("qwen2_moe", moved, section)
    assert sorted(map(str, {p.layer for p in found})) == ["1", "2", "mtp.0"]


def test_prefixes_are_allowed() -> None:
    """Wrappers add a prefix to the names; the layers keep their names."""
    for prefix in ("language_model.", "model.language_model.", "base_model.model."):
        raw = {prefix + name: raw for name, raw in checkpoints.mixtral_tensors().items()}
        assert {str(p.layer) for p in find("mixtral", tensors_of(raw), MIXTRAL)} == {"0", "1"}


def test_a_single_stack_has_plain_numbers() -> None:
    """The stack precedes the number only if a checkpoint has several stacks."""
    raw = {"vlm.decoder." + name: raw for name, raw in checkpoints.mixtral_tensors().items()}
    assert {str(p.layer) for p in find("mixtral", tensors_of(raw), MIXTRAL)} == {"0", "1"}


def test_layers_come_in_the_order_of_their_numbers() -> None:
    """Layer 10 follows layer 9, whatever their order in the shards."""
    raw = checkpoints.mixtral_tensors(layers=12)
    found = find("mixtral", reversed(tensors_of(raw)), {**MIXTRAL, "num_hidden_layers": 12})
    assert [p.layer.number for p in found] == [n for n in range(12) for _ in range(4)]
    assert [p.expert for p in found[:4]] == [0, 1, 2, 3]


def test_layers_are_written_with_their_stack() -> None:
    """Keys of factors are numbers, prefixed with the stack if there are several."""
    assert [str(Layer("", 3)), str(Layer("decoder", 3))] == ["3", "decoder.3"]


def test_parts_do_not_mix() -> None:
    """The thinker's experts are found for the thinker, the talker's for the talker."""
    names_ = [
        f"{part}.model.layers.0.mlp.experts.{e}.down_proj.weight"
        for part in ("thinker", "talker")
        for e in range(2)
    ]
    rows = architectures.parts("qwen3_omni_moe")
    for row, other in (rows, rows[::-1]):
        found = find_projections([tensor(name) for name in names_], row, [other])
        assert [p.module.split(".")[0] for p in found] == [row.part] * 2


def test_biases_belong_to_their_projection() -> None:
    """A bias of an expert is scaled with its weight."""
    tensors = [
        tensor("model.layers.0.mlp.experts.down_proj", (4, 8, 6)),
        tensor("model.layers.0.mlp.experts.down_proj_bias", (4, 6)),
        tensor("model.layers.0.mlp.router.weight", (4, 8)),
        tensor("model.layers.0.mlp.router.bias", (4,)),
    ]
    [found] = find("gpt_oss", tensors, {"num_local_experts": 4})
    assert sorted(found.by_suffix) == ["bias", "weight"]
    parts = {s.role: s.tensor.name for s in scaled_tensors(found.module, found.by_suffix, 2.0)}
    assert parts == {"weight": tensors[0].name, "bias": tensors[1].name}


# What is refused ----------------------------------------------------------------------------------

FAULTS = {
    "an expert": ("layers.1.block_sparse_moe.experts.3.w2.", "layer 1.*expert 3 is missing"),
    "the first expert": ("layers.0.block_sparse_moe.experts.0.w2.", "layer 0.*expert 0 is missing"),
    "a layer of experts": ("layers.1.block_sparse_moe.experts.", "layer 1"),
    "a whole layer": ("layers.1.", "layer 1"),
}


@pytest.mark.parametrize(("part", "why"), FAULTS.values(), ids=FAULTS)
def test_a_missing_part_is_refused(part: str, why: str) -> None:
    """The error names the missing expert or layer; nothing is scaled in part."""
    tensors = without(tensors_of(checkpoints.mixtral_tensors()), part)
    with pytest.raises(CheckpointError, match=why):
        find("mixtral", tensors, MIXTRAL)


def test_the_same_expert_missing_everywhere_is_refused() -> None:
    """An expert that is missing in all layers is a gap too."""
    tensors = without(tensors_of(checkpoints.mixtral_tensors()), "experts.2.")
    with pytest.raises(CheckpointError, match="expert 2 is missing"):
        find("mixtral", tensors, MIXTRAL)


def test_more_experts_than_the_config_says_are_refused() -> None:
    """The config and weights of different checkpoints are refused."""
    tensors = tensors_of(checkpoints.mixtral_tensors(experts=5))
    with pytest.raises(CheckpointError, match="4 routed experts, but it has more"):
        find("mixtral", tensors, MIXTRAL)


def test_a_layer_where_the_config_has_a_dense_one_is_refused() -> None:
    """A layer with experts that the config calls dense is refused."""
    section = {**checkpoints.QWEN2_CONFIG, "mlp_only_layers": [0, 2]}
    with pytest.raises(CheckpointError, match=r"layer 2.*dense"):
        find("qwen2_moe", tensors_of(checkpoints.qwen2_tensors()), section)


def test_a_fused_tensor_of_other_experts_is_refused() -> None:
    """A stacked tensor must have the number of experts in the config."""
    tensors = tensors_of(checkpoints.fused_mixtral_tensors(experts=3))
    with pytest.raises(CheckpointError, match="says 4 routed experts, but expert 3 is missing"):
        find("mixtral", tensors, MIXTRAL)


def test_both_layouts_in_one_layer_are_refused() -> None:
    """One layer cannot have both separate and fused experts."""
    both = {**checkpoints.mixtral_tensors(), **checkpoints.fused_mixtral_tensors()}
    with pytest.raises(CheckpointError, match=r"layer 0.*twice"):
        find("mixtral", tensors_of(both), MIXTRAL)


def test_layouts_may_differ_between_stacks() -> None:
    """Real checkpoints have fused main layers and an MTP block with separate experts."""
    fused = {f"model.layers.{n}.mlp.experts.down_proj": ("BF16", (4, 8, 6), b"") for n in range(2)}
    mtp = {
        f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": ("BF16", (8, 6), b"") for e in range(4)
    }
    section = {"num_experts": 4, "num_hidden_layers": 2}
    found = find("qwen3_5_moe", tensors_of({**fused, **mtp}), section)
    assert len(found) == 6


def test_a_tensor_under_two_prefixes_is_refused() -> None:
    """A second copy of a layer under another name would be an unscaled twin."""
    raw = checkpoints.mixtral_tensors()
    twice = {**raw, **{name.removeprefix("model."): value for name, value in raw.items()}}
    with pytest.raises(CheckpointError, match="layer 0"):
        find("mixtral", tensors_of(twice), MIXTRAL)


def test_a_router_without_experts_is_refused() -> None:
    """If the config does not list the MoE layers, a router shows which they are."""
    tensors = tensors_of(checkpoints.deepseek_tensors())
    section = {"n_routed_experts": 4}
    for layer in (2, 3):
        left = without(tensors, f"layers.{layer}.mlp.experts.")
        with pytest.raises(CheckpointError, match=rf"layers\.{layer}\.mlp\.gate.*layer {layer}"):
            find("deepseek_v3", left, section)


def test_an_expert_without_its_projection_is_refused() -> None:
    """The other two matrices of an expert show that the third is missing."""
    tensors = without(
        tensors_of(checkpoints.deepseek_tensors()), "layers.3.mlp.experts.1.down_proj"
    )
    with pytest.raises(CheckpointError, match=r"layer 3.*expert 1"):
        find("deepseek_v3", tensors, dict(checkpoints.DEEPSEEK_CONFIG))


def test_a_stack_without_any_projection_is_refused() -> None:
    """An MTP block that has a router but no down-projections is not silently left out."""
    mtp = [
        tensor("mtp.layers.0.mlp.gate.weight"),
        tensor("mtp.layers.0.mlp.experts.0.up_proj.weight"),
    ]
    tensors = tensors_of(checkpoints.qwen2_tensors()) + mtp
    with pytest.raises(CheckpointError, match="mtp"):
        find("qwen2_moe", tensors, dict(checkpoints.QWEN2_CONFIG))


@pytest.mark.parametrize("stack", ["mtp", "a", "z"])
def test_a_model_is_distinguished_from_its_mtp_block(stack: str) -> None:
    """A model with as many MoE layers as MTP blocks is planned correctly, whatever their names."""
    raw = checkpoints.qwen2_tensors(layers=2)
    mtp = {
        name.replace("model.layers.1.", f"{stack}.layers.0."): value
        for name, value in raw.items()
        if "layers.1.mlp" in name
    }
    section = {**checkpoints.QWEN2_CONFIG, "num_hidden_layers": 2}
    found = find("qwen2_moe", tensors_of({**raw, **mtp}), section)
    assert {str(p.layer) for p in found} == {"1", f"{stack}.0"}


def test_a_missing_number_of_experts_is_refused() -> None:
    """Without a number of experts in the config, the experts cannot be checked."""
    with pytest.raises(UnsupportedError, match="num_local_experts"):
        read_moe_config({"num_local_experts": "8"}, architectures.find("mixtral"))


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32", "F8_E8M0", "C64"])
def test_a_weight_that_cannot_be_multiplied_is_refused(dtype: str) -> None:
    """Codes of a quantised format are not values, so they must not be multiplied."""
    with pytest.raises(UnsupportedError, match=dtype):
        scaled_tensors("m", {"weight": tensor("m.weight", dtype=dtype)}, 1.5)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "I64", "U8"])
def test_a_bias_that_cannot_be_multiplied_is_refused(dtype: str) -> None:
    """A bias is checked like a weight: another dtype is never read as float64."""
    by_suffix = {"weight": tensor("m.weight"), "bias": tensor("m.bias", dtype=dtype)}
    with pytest.raises(UnsupportedError, match=dtype):
        scaled_tensors("m", by_suffix, 1.5)


def test_an_unknown_companion_is_refused() -> None:
    """An unknown tensor next to the weight may be its scale."""
    by_suffix = {"weight": tensor("m.weight"), "zero_point": tensor("m.zero_point")}
    with pytest.raises(UnsupportedError, match="zero_point"):
        scaled_tensors("m", by_suffix, 1.5)


# Patterns -----------------------------------------------------------------------------------------

NAMES = [f"net.{n}.moe.{e}.out.weight" for n in range(2) for e in range(3)]
PATTERN = r"net\.\d+\.moe\.\d+\.out\.weight"


def by_pattern(pattern: str, names_: Iterable[str] = NAMES) -> list[Projection]:
    """The projections that match a user's pattern."""
    return find_by_pattern([tensor(name) for name in names_], pattern)


def test_a_pattern_takes_the_first_number_as_layer_and_the_second_as_expert() -> None:
    """Numbers between dots are enough for the usual names."""
    found = by_pattern(PATTERN)
    assert [(p.layer.number, p.expert) for p in found] == [(n, e) for n in (0, 1) for e in range(3)]
    assert names(found) == sorted(NAMES)


def test_a_pattern_may_name_its_groups() -> None:
    """``layer`` and ``expert`` say which number is which, in any order."""
    swapped = [f"moe.{e}.net.{n}.weight" for n in range(2) for e in range(3)]
    found = by_pattern(r"moe\.(?P<expert>\d+)\.net\.(?P<layer>\d+)\.weight", swapped)
    assert [(p.layer.number, p.expert) for p in found] == [(n, e) for n in (0, 1) for e in range(3)]


def test_a_pattern_has_to_match_the_whole_name() -> None:
    """A pattern for a part of the name does not match scales and other neighbours."""
    assert by_pattern(PATTERN, ["net.0.moe.0.out.weight_scale", "x.net.0.moe.0.out.weight"]) == []


def test_a_pattern_without_numbers_is_refused() -> None:
    """Factors are given by layer, so a layer needs a number."""
    with pytest.raises(UsageError, match="no layer number"):
        by_pattern(".*", ["model.out.weight"])


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<layer>", "a{99999999999}", "\\"])
def test_a_broken_pattern_is_one_line(pattern: str) -> None:
    """An invalid pattern gives a one-line error."""
    with pytest.raises(UsageError, match="--pattern") as caught:
        by_pattern(pattern)
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer sends a signal here")
def test_a_pattern_without_end_is_interrupted() -> None:
    """Ctrl-C ends a pattern that backtracks forever."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):  # or it would never end
            by_pattern("(a+)+b", ["a" * 60 + ".0"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "pattern",
    [r"(?P<layer>net)\..*", r"net\.(?P<layer>[^.]*\.moe)\..*", r"net\.\d+\.(?P<expert>moe).*"],
)
def test_a_group_that_is_no_number_is_refused(pattern: str) -> None:
    """A group that matches words instead of a number is a usage error, not a crash."""
    with pytest.raises(MoescaleError):
        by_pattern(pattern)


# Hints --------------------------------------------------------------------------------------------


def test_a_likely_name_is_shown_for_an_unknown_type() -> None:
    """A name that looks like a routed down-projection helps the user write a pattern."""
    others = ["h.0.moe.shared_experts.down.weight", "h.0.attn.o.weight"]
    likely = [f"h.0.moe.experts.{i}.down.weight" for i in range(9)]
    assert likely_down_projection([*others, *reversed(likely)]) == likely[0]
    assert likely_down_projection(others) is None


def test_an_expert_with_a_number_is_likely_where_one_name_is_left() -> None:
    """Without a known word, the one matrix that is not a gate, up or norm is suggested."""
    experts = [f"model.layers.{i}.moe.{e}" for i in range(2) for e in range(4)]
    names = [f"{expert}.{suffix}" for expert in experts for suffix in ("gate.weight", "up.weight")]
    names += ["model.layers.0.attn.0.out.weight", "a.0.shared_experts.0.out.weight"]
    names += ["model.layers.0.moe.9.norm.weight", *(f"{expert}.out.bias" for expert in experts)]
    assert likely_down_projection(names) is None
    names += [f"{expert}.out.weight" for expert in experts]
    assert likely_down_projection(names[::-1]) == "model.layers.0.moe.0.out.weight"
    assert (
        likely_down_projection([*names, *(f"{expert}.other.weight" for expert in experts)]) is None
    )
