"""Samples of the routers and the experts of a model, layer by layer.

Samples come from the model's own router (rule ``gates``) or from running the model over a text
(rules ``measured`` and ``fitted``). The rules turn them into factors; the report draws them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

DIGITS = 6
"""Significant digits of a sampled factor. The last bits of matrix products differ between machines;
the factor, and with it every byte of the output, must not."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Statistics of one MoE layer with one number of experts, averaged over tokens.

    Attributes:
        experts: experts per token, k.
        squares: ``A_k = E[sum g_i^2]`` of the gate weights.
        squared_sum: ``B_k = E[(sum g_i)^2]``.
        ranks: the 10th, 50th and 90th percentile of the gate weight of each of the k chosen
            experts, the largest weight first.
        norm: mean Euclidean norm of the routed experts' output, in the units of the hidden state;
            None if no expert was run.
    """

    experts: int
    squares: float
    squared_sum: float
    ranks: tuple[tuple[float, float, float], ...] = ()
    norm: float | None = None

    def expected_norm(self, rho: float) -> float:
        """``sqrt((1-rho) A_k + rho B_k)``: the expected norm for expert outputs of norm 1."""
        return math.sqrt((1 - rho) * self.squares + rho * self.squared_sum)


@dataclass(frozen=True, slots=True)
class Sample:
    """Statistics of one MoE layer, as trained and as it will run.

    Attributes:
        before: with the trained number of experts.
        after: with the new number, and unscaled experts.
        correlation: mean pairwise cosine of the chosen experts' outputs, as trained; None if no
            expert was run.
        fit: router scale and factor of the rule ``fitted``; None for other rules.
        error: relative standard error of the factor of ``gates`` on random inputs; None for other
            rules.
    """

    before: Moments
    after: Moments
    correlation: float | None = None
    fit: Fit | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """The multipliers of one layer's router and down-projections.

    Attributes:
        scale: of the router's weight and logit bias.
        factor: of the routed experts' down-projections.
        error_before: ``e(1)``, from 0 to 1; see `moescale.factors.fitted`.
        error_after: ``e(scale)``.
    """

    scale: float
    factor: float
    error_before: float
    error_after: float


def geometric_mean(values: Collection[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def rounded(factor: float) -> float:
    """A sampled factor to `DIGITS` significant digits."""
    return float(f"{factor:.{DIGITS}g}")
