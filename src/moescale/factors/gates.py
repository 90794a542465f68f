"""The factor from the model's own gate weights, with independent or equally correlated experts.

The formula is that of `closed_form`, with ``A_k`` and ``B_k`` of the model's own router on random
inputs, which `moescale.routers.weights` computes.
"""

from __future__ import annotations

from moescale.factors.samples import Sample, rounded


def factor(sample: Sample, rho: float = 0.0) -> float:
    """``sqrt([(1-rho) A_n + rho B_n] / [(1-rho) A_m + rho B_m])`` of one layer."""
    return rounded(sample.before.expected_norm(rho) / sample.after.expected_norm(rho))
