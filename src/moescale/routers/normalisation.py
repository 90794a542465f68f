"""How a router normalises the weights of the experts that it chose."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How the weights of the chosen experts are normalised.

    Attributes:
        renormalised: the weights of the chosen experts sum to a constant.
        shared: how many shared experts take part in that sum.
    """

    renormalised: bool
    shared: int = 0

    def balanced_weight(self, k: int) -> Fraction:
        """The weight of each of `k` chosen experts at a balanced gate, up to a constant.

        1/k if the weights are renormalised; else constant (1/E, but only ratios matter).
        """
        return Fraction(1, k + self.shared) if self.renormalised else Fraction(1)
