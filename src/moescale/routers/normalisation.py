"""How a router normalises the gate weights of the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How the gate weights of the chosen experts are normalised.

    Attributes:
        renormalised: whether the weights of the chosen experts sum to a constant.
        shared: number of shared experts that are included in that sum.
    """

    renormalised: bool
    shared: int = 0

    def balanced_weight(self, k: int) -> Fraction:
        """The weight of each of `k` chosen experts at a balanced gate, up to a constant.

        1 / (k + shared) if the weights are renormalised; else 1 (only ratios matter).
        """
        return Fraction(1, k + self.shared) if self.renormalised else Fraction(1)
