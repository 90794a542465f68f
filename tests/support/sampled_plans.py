"""Plans with samples of made-up gates, for the rules ``gates`` and ``measured``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moescale.factors import gates, measured
from moescale.factors.samples import Moments, Sample
from moescale.planning.plan import Plan


def moments(seed: int, k: int, experts: int, size: float | None) -> Moments:
    """The moments of renormalised softmax weights; `size` is the size of one expert's output."""
    logits = np.random.default_rng(seed).standard_normal((200, experts))
    weights = -np.sort(-np.exp(logits), axis=1)[:, :k]
    weights /= weights.sum(axis=1, keepdims=True)
    squares = float((weights**2).sum(axis=1).mean())
    ranks = tuple((float(a), float(b), float(c)) for a, b, c in _percentiles(weights))
    norm = None if size is None else size * float(np.sqrt(0.7 * squares + 0.3))
    return Moments(k, squares, 1.0, ranks, norm)


def _percentiles(weights: np.ndarray) -> np.ndarray:
    return np.percentile(weights, (10, 50, 90), axis=0).T


def sampled(plan: Plan, layers: Sequence[str], n: int, m: int, run: bool = False) -> Plan:
    """The plan with a sample for each of these layers, with or without a run of its experts."""
    experts = 2 * max(n, m)
    samples = {
        layer: Sample(
            moments(seed, n, experts, 2.0 + seed if run else None),
            moments(seed, m, experts, 2.1 + seed if run else None),
            0.3 / (1 + seed) if run else None,
        )
        for seed, layer in enumerate(layers)
    }
    rule = measured.factor if run else gates.factor
    options = replace(plan.options, experts=m)
    object.__setattr__(options, "rule", "measured" if run else "gates")
    return replace(
        plan,
        options=options,
        rule="measured" if run else "gates",
        samples=samples,
        factors={layer: rule(sample) for layer, sample in samples.items()},
        experts=replace(plan.experts, trained=n, before=n, after=m, total=experts),
    )
