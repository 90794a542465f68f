"""Config keys that change the routing of some model types and that a row does not read.

Their names are those that transformers 5.24, sglang 0.5.23, mlx-lm 0.32.2 and the code in published
repos read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from moescale.families.architectures import Architecture, Flag, PowerNorm
from moescale.families.config import read_integer
from moescale.routers.kinds import RouterKind
from moescale.routers.normalisation import Normalisation

SCORES: Final = frozenset(
    (
        *("score_function", "scoring_func", "score_func", "expert_selection_fn"),
        *("router_score_func", "router_scoring_func"),
        *("moe_router_score_func", "moe_router_activation_func"),
    )
)
"""Keys that name how scores are made of logits."""
_SCORING: Final = re.compile(
    r"(?!.*share)(?:.*(?:scor|rout|expert|moe|top_?k).*|gat(?:e|ing))"
    r"_(?:fn|func|function|act|activation|type)"
)
"""Keys that may do so under other names, where their value is the name of a score."""
_SCORE_NAMES: Final = ("softmax", "sigmoid", "sqrtsoftplus")
NORMALISED: Final = frozenset(
    ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm")
)
"""Keys that say whether the weights of the chosen experts sum to 1."""
_NORMALISING: Final = re.compile(
    r"(?:re)?normali[sz]e|(?:re)?norm(?:ali[sz]e)?_(?:top_?k|expert|rout\w*|gat\w*|moe)\w*"
    r"|(?:top_?k|expert|rout\w*|gat\w*|moe)\w*_(?:renorm|normali[sz]e)\w*"
)
"""Keys that may say so under other names."""
BIASED: Final = frozenset(
    (
        *("moe_router_enable_expert_bias", "use_expert_bias", "use_moe_router_bias"),
        *("use_routing_bias", "use_gate_bias", "moe_gate_bias"),
    )
)
"""Keys that say whether a bias takes part in the choice of experts."""
ON_INPUT: Final = frozenset(("moe_apply_router_weight_on_input", "apply_router_weight_on_input"))
"""Keys that say that the weight of an expert multiplies its input, not its output."""
_BOUND: Final = re.compile(
    r"(?:moe_)?(?:gate|gating|router?|routing)_(?:logits?_)?(?:temp|temperature|softcap\w*)"
)
"""Keys of numbers that divide or bound the logits; 0, 1 and null change nothing."""
_NORM: Final = re.compile(r".*(?:rout|moe|expert).*norm.*|.*norm.*(?:rout|moe|expert).*")
"""Keys that turn on a norm inside the MoE block, by true."""


def unread_keys(
    row: Architecture, section: Mapping[str, Any], router: Normalisation | None
) -> Iterator[tuple[str, Any]]:
    """Config keys that change the routing in some model types and that this row does not read.

    Args:
        row: the row of the model type.
        section: the section of the config that describes the MoE.
        router: how the row normalises the weights, where that is known.
    """
    kind = row.router if isinstance(row.router, RouterKind) else None
    read = _read_by(row, kind)
    groups, chosen = group_keys(section)
    limits = not row.groups and 0 < chosen < groups
    for key, value in section.items():
        limit = limits and key == "topk_group"
        if limit or (key not in read and _is_unusual(key, value, kind, router)):
            yield key, value


def group_keys(section: Mapping[str, Any]) -> tuple[int, int]:
    """How many groups of experts the config names, and how many of them a token may choose from."""
    groups = read_integer(section, "n_group", read_integer(section, "num_expert_group", 0))
    return groups, read_integer(section, "topk_group", 0)


def _read_by(row: Architecture, kind: RouterKind | None) -> set[str | None]:
    keys: set[str | None] = {row.no_effect_if}
    if isinstance(row.normalisation, Flag):
        keys |= {row.normalisation.key, *row.normalisation.aliases}
    if isinstance(row.normalisation, PowerNorm):
        keys.add(row.normalisation.key)
    if row.model_type == "deepseek_v2":  # which has a warning of its own
        keys.add("norm_topk_prob")
    if kind is not None:
        keys |= {
            kind.score_key,
            kind.bias_key,
            kind.cap_key,
            kind.idle_key,
        }
    return keys


def _is_unusual(
    key: str, value: Any, kind: RouterKind | None, router: Normalisation | None
) -> bool:
    """Whether a key changes the routing from what the row takes it for."""
    if key in SCORES:
        return kind is not None and isinstance(value, str) and value != kind.score
    if _SCORING.fullmatch(key) and value in _SCORE_NAMES:
        return kind is not None and value != kind.score
    if key in NORMALISED or (value is False and _NORMALISING.fullmatch(key)):
        anyway = kind is not None and kind.late and kind.score == "softmax"
        contradicts = router is not None and value is not router.renormalised
        return isinstance(value, bool) and contradicts and not anyway
    if key in BIASED or (key, value) == ("topk_method", "noaux_tc"):
        return bool(value) and kind is not None and not (kind.bias or kind.logit_bias)
    if key == "zero_expert_num":
        return type(value) is int and value > 0 and kind is not None
    if _BOUND.fullmatch(key):
        return type(value) in (int, float) and value not in (0, 1)
    return value is True and (key in ON_INPUT or _NORM.fullmatch(key) is not None)
