"""Config keys that change the routing of some model types and that a row does not read.

The names come from transformers 5.24, sglang 0.5.23, mlx-lm 0.32.2 and the code in published repos.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from moescale.families.architectures import Architecture, Flag, PowerNorm
from moescale.families.config import Section, read_integer
from moescale.routers.kinds import RouterKind
from moescale.routers.normalisation import Normalisation

SCORES: Final = frozenset(
    (
        *("score_function", "scoring_func", "score_func", "expert_selection_fn"),
        *("router_score_func", "router_scoring_func"),
        *("moe_router_score_func", "moe_router_activation_func"),
    )
)
"""Keys that name the score function."""
_SCORE_LIKE: Final = re.compile(
    r"(?!.*share)(?:.*(?:scor|rout|expert|moe|top_?k).*|gat(?:e|ing))"
    r"_(?:fn|func|function|act|activation|type)"
)
"""Other keys that may name it, if their value is one of `_SCORE_NAMES`."""
_SCORE_NAMES: Final = ("softmax", "sigmoid", "sqrtsoftplus")
NORMALISED: Final = frozenset(
    ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm")
)
"""Keys that switch renormalisation on or off."""
_NORMALISED_LIKE: Final = re.compile(
    r"(?:re)?normali[sz]e|(?:re)?norm(?:ali[sz]e)?_(?:top_?k|expert|rout\w*|gat\w*|moe)\w*"
    r"|(?:top_?k|expert|rout\w*|gat\w*|moe)\w*_(?:renorm|normali[sz]e)\w*"
)
"""Other keys that may do so."""
BIASED: Final = frozenset(
    (
        *("moe_router_enable_expert_bias", "use_expert_bias", "use_moe_router_bias"),
        *("use_routing_bias", "use_gate_bias", "moe_gate_bias"),
    )
)
"""Keys that switch a bias in the choice of experts on or off."""
ON_INPUT: Final = frozenset(("moe_apply_router_weight_on_input", "apply_router_weight_on_input"))
"""Keys that make an expert's weight multiply its input, not its output."""
_BOUND: Final = re.compile(
    r"(?:moe_)?(?:gate|gating|router?|routing)_(?:logits?_)?(?:temp|temperature|softcap\w*)"
)
"""Keys of numbers that divide or bound the logits; 0, 1 and null have no effect."""
_NORM: Final = re.compile(r".*(?:rout|moe|expert).*norm.*|.*norm.*(?:rout|moe|expert).*")
"""Keys that add a norm inside the MoE block if they are true."""


def unread_keys(
    row: Architecture, section: Section, normalisation: Normalisation | None
) -> Iterator[tuple[str, Any]]:
    """Find config keys that change the routing of some model types and that this row does not read.

    Args:
        row: the row of the model type.
        section: the section of the config that describes the MoE.
        normalisation: of the weights, by the row; None if unknown.
    """
    kind = row.router if isinstance(row.router, RouterKind) else None
    read = _read_by(row, kind)
    groups, chosen = group_keys(section)
    limits = not row.groups and 0 < chosen < groups
    for key, value in section.items():
        limit = limits and key == "topk_group"
        if limit or (key not in read and _is_unusual(key, value, kind, normalisation)):
            yield key, value


def group_keys(section: Section) -> tuple[int, int]:
    """Number of groups of experts, and of groups that a token may use; 0 without a key."""
    groups = read_integer(section, "n_group", read_integer(section, "num_expert_group", 0))
    return groups, read_integer(section, "topk_group", 0)


def _read_by(row: Architecture, kind: RouterKind | None) -> set[str | None]:
    keys: set[str | None] = {row.no_effect_if}
    if isinstance(row.normalisation, Flag):
        keys |= {row.normalisation.key, *row.normalisation.aliases}
    if isinstance(row.normalisation, PowerNorm):
        keys.add(row.normalisation.key)
    if row.model_type == "deepseek_v2":  # it has a separate warning
        keys.add("norm_topk_prob")
    if kind is not None:
        keys |= {kind.score_key, kind.bias_key, kind.cap_key, kind.zero_experts_key}
    return keys


def _is_unusual(
    key: str, value: Any, kind: RouterKind | None, normalisation: Normalisation | None
) -> bool:
    """Whether a key makes the routing differ from the row."""
    if key in SCORES:
        return kind is not None and isinstance(value, str) and value != kind.score
    if _SCORE_LIKE.fullmatch(key) and value in _SCORE_NAMES:
        return kind is not None and value != kind.score
    if key in NORMALISED or (value is False and _NORMALISED_LIKE.fullmatch(key)):
        anyway = kind is not None and kind.chosen_by_logits and kind.score == "softmax"
        contradicts = normalisation is not None and value is not normalisation.renormalised
        return isinstance(value, bool) and contradicts and not anyway
    if key in BIASED or (key, value) == ("topk_method", "noaux_tc"):
        return bool(value) and kind is not None and not (kind.bias or kind.logit_bias)
    if key == "zero_expert_num":
        return type(value) is int and value > 0 and kind is not None
    if _BOUND.fullmatch(key):
        return type(value) in (int, float) and value not in (0, 1)
    return value is True and (key in ON_INPUT or _NORM.fullmatch(key) is not None)
