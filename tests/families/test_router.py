"""How a router weights the experts, and how many it can choose, according to the config."""

from __future__ import annotations

from typing import Any

import pytest

from moescale.errors import UnsupportedError
from moescale.families import architectures
from moescale.families.moe_config import read_moe_config
from moescale.routers.normalisation import Normalisation


def renormalised(model_type: str, **section: Any) -> bool:
    """Whether this model type renormalises with these config keys."""
    return router(model_type, **section).renormalised


def router(model_type: str, **section: Any) -> Normalisation:
    """The router of this model type with these config keys."""
    row = architectures.find(model_type)
    found = read_moe_config({row.total_keys[0]: 8, **section}, row).normalisation
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", True),
        ("qwen3_vl_moe", True),
        ("qwen3_5_moe", True),
        ("gpt_oss", True),
        ("deepseek_v4", True),
        ("deepseek_v2", False),
        ("jamba", False),
        ("llama4", False),
    ],
)
def test_routers_without_a_flag(model_type: str, expected: bool) -> None:
    """If the class decides, a flag in the config has no effect."""
    for flag in ({}, {"norm_topk_prob": True}, {"norm_topk_prob": False}):
        assert renormalised(model_type, **flag) is expected


@pytest.mark.parametrize(
    ("model_type", "default"),
    [
        ("qwen2_moe", False),
        ("qwen3_moe", False),
        ("olmoe", False),
        ("qwen3_next", True),
        ("deepseek_v3", True),
        ("kimi_k2", True),
        ("glm4_moe", True),
    ],
)
def test_routers_with_a_flag(model_type: str, default: bool) -> None:
    """The flag decides; without it, or with null, the class default applies."""
    assert renormalised(model_type) is default
    assert renormalised(model_type, norm_topk_prob=None) is default
    assert renormalised(model_type, norm_topk_prob=True) is True
    assert renormalised(model_type, norm_topk_prob=False) is False


def test_a_flag_that_counts_for_one_score_only() -> None:
    """A softmax of the chosen logits sums to 1 whatever the flag says; sigmoids do not."""
    for score, flag, expected in (
        ("softmax", False, True),
        (None, False, True),
        ("sigmoid", False, False),
        ("sigmoid", True, True),
    ):
        section = {"expert_selection_fn": score, "norm_topk_prob": flag}
        assert renormalised("cohere2_moe", **section) is expected


def test_a_flag_of_another_name() -> None:
    """Some types have another name for the flag."""
    assert renormalised("kimi_linear", moe_renormalize=False) is False
    assert renormalised("kimi_linear", norm_topk_prob=False) is False  # an alias of it
    assert renormalised("kimi_linear", norm_expert_weight=False) is True


def test_shared_experts_in_the_normalisation_are_counted() -> None:
    """If routed and shared weights sum to 1 together, the number of shared experts is known."""
    found = router("inkling_mm_model", n_shared_experts=2)
    assert (found.renormalised, found.shared) == (True, 2)


@pytest.mark.parametrize(("power", "expected"), [(1, True), (1.0, True), (None, False)])
def test_dbrx_divides_by_a_norm(power: Any, expected: bool) -> None:
    """The p-norm of the weights: 1 is the usual sum, null turns normalisation off."""
    assert renormalised("dbrx", moe_normalize_expert_weights=power) is expected


def test_another_norm_is_refused() -> None:
    """A p-norm that the closed forms do not cover is refused."""
    with pytest.raises(UnsupportedError, match="moe_normalize_expert_weights is 2"):
        renormalised("dbrx", moe_normalize_expert_weights=2)


# How many it can choose ---------------------------------------------------------------------------


def largest(model_type: str, total: int, **section: Any) -> int:
    """The largest count of this model type with these config keys."""
    row = architectures.find(model_type)
    return read_moe_config({row.total_keys[0]: total, **section}, row).max_count(total)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"n_group": 8, "topk_group": 4}, 128),
        ({"n_group": 8, "topk_group": 1}, 32),
        ({"n_group": 8, "topk_group": 8}, 256),
        ({"n_group": 1, "topk_group": 1}, 256),
        ({"n_group": None, "topk_group": 4}, 256),
        ({"n_group": 8, "topk_group": None}, 256),
        ({"num_expert_group": 8, "topk_group": 4}, 128),
        ({}, 256),
    ],
)
def test_groups_limit_the_count(section: dict[str, Any], expected: int) -> None:
    """The chosen groups contain at most ``topk_group * E / n_group`` experts."""
    assert largest("deepseek_v3", 256, **section) == expected


def test_a_greedy_router_is_not_limited() -> None:
    """DeepSeek-V2-Lite has group keys in its config but does not use them."""
    groups = {"n_group": 8, "topk_group": 3}
    assert largest("deepseek_v2", 64, topk_method="greedy", **groups) == 64
    assert largest("deepseek_v2", 64, topk_method="group_limited_greedy", **groups) == 24


def test_types_without_groups_ignore_the_keys() -> None:
    """Keys that a class never reads have no effect."""
    assert largest("mixtral", 8, n_group=4, topk_group=1) == 8
