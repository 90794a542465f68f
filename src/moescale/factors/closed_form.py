"""The factor from a formula that keeps the expected norm of the routed output.

``S_k`` is the sum of ``g_i v_i`` over the top ``k`` experts, with expert outputs ``v_i`` of norm
``r`` and pairwise correlation ``rho``. Then ``E|S_k|^2 = r^2 [(1-rho) A_k + rho B_k]`` with
``A_k = E[sum g_i^2]`` and ``B_k = E[(sum g_i)^2]``. A balanced gate gives all k experts the same
weight g, so ``A_k = k g^2`` and ``B_k = (k g)^2``. Everything is computed in fractions and rounded
once, so that a factor that is exact on paper (1 or 2) is exact here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

WeightFunction = Callable[[int], Fraction]
"""Returns the gate weight of each expert, up to a constant, given the experts per token."""


def expected_square(k: int, weight: WeightFunction, rho: float) -> Fraction:
    """``E|S_k|^2 / r^2`` for `k` experts with equal gate weights."""
    g, correlation = weight(k), Fraction(rho)
    return (1 - correlation) * k * g**2 + correlation * (k * g) ** 2


def preserve(n: int, m: int, weight: WeightFunction, rho: float = 0.0) -> float:
    """The factor that keeps the expected norm when `n` experts per token become `m`.

    At ``rho = 0`` it is ``sqrt(m/n)`` if the gate weights are renormalised, else ``sqrt(n/m)``.
    """
    return math.sqrt(expected_square(n, weight, rho) / expected_square(m, weight, rho))


def published(n: int, m: int) -> float:
    """``sqrt(n/m)``, as printed in mergekit issue 294 for every router."""
    return math.sqrt(n / m)
