"""How this checkpoint's router weighs the experts that it chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moescale.errors import UnsupportedError
from moescale.families.architectures import Architecture, Flag, PowerNorm, SharedSum
from moescale.families.config import whole


@dataclass(frozen=True, slots=True)
class Router:
    """What the closed forms need to know.

    Attributes:
        renormalised: the weights of the chosen experts sum to a constant.
        shared: how many shared experts take part in that sum.
    """

    renormalised: bool
    shared: int = 0

    def balanced_weight(self, k: int) -> Fraction:
        """The weight of each of `k` chosen experts at a balanced gate, up to a constant.

        1/k where the weights are renormalised, constant (1/E, of which only ratios matter)
        where they are not.
        """
        return Fraction(1, k + self.shared) if self.renormalised else Fraction(1)


def router_of(architecture: Architecture, section: Mapping[str, Any]) -> Router:
    """The router that the config section describes.

    Raises:
        UnsupportedError: its normalisation is none that the closed forms know.
    """
    weights = architecture.weights
    if isinstance(weights, Flag):
        if weights.only_if is not None and section.get(weights.only_if[0]) != weights.only_if[1]:
            return Router(True)
        value = weights.value(section)
        return Router(weights.default if value is None else bool(value))
    if isinstance(weights, SharedSum):
        return Router(True, whole(section, weights.key, 0))
    if isinstance(weights, PowerNorm):
        power = section.get(weights.key, 1)
        if power not in (1, None):
            raise UnsupportedError(
                f"config.json: {weights.key} is {power!r}: only 1 and null are known",
                hint="Give the factor yourself (--factor).",
            )
        return Router(power == 1)
    return Router(weights)


def has_no_effect(architecture: Architecture, section: Mapping[str, Any]) -> bool:
    """Whether something after the experts removes every factor."""
    switch = architecture.no_effect_if
    return bool(architecture.no_effect and (switch is None or section.get(switch)))


def largest_count(architecture: Architecture, section: Mapping[str, Any], total: int) -> int:
    """The most experts per token that the router can choose in earnest.

    A group-limited router masks all experts outside ``topk_group`` of ``n_group`` groups; asked
    for more than those hold, it silently takes masked ones.
    """
    total += whole(section, "zero_expert_num", 0)  # experts without weights count as experts
    limit = group_limit(architecture, section)
    return total if limit is None else min(total, limit[1] * (total // limit[0]))


def group_limit(architecture: Architecture, section: Mapping[str, Any]) -> tuple[int, int] | None:
    """Groups of experts, and how many of them a token may choose from; None for no limit."""
    groups = whole(section, "n_group", whole(section, "num_expert_group", 0))
    chosen = whole(section, "topk_group", 0)
    limited = section.get("topk_method") != "greedy"
    if not architecture.groups or not chosen or groups <= 1 or not limited:
        return None
    return groups, chosen
