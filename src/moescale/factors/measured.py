"""The factor from the measured norm of the routed experts' output on a text."""

from __future__ import annotations

from moescale.factors.samples import Sample, rounded


def factor(sample: Sample) -> float:
    """Mean norm as trained, divided by that on the same inputs with the new number of experts."""
    before, after = sample.before.norm, sample.after.norm
    assert before is not None and after is not None, "samples of a run have norms"
    return rounded(before / after)
