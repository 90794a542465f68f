"""How a router normalises the weights of the experts that it chose."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Normalisation:
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
