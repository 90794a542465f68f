"""The guard of the rule ``fitted``, as a record."""

from __future__ import annotations

from moescale.factors.fitted import Guard, Trial


def test_losses_that_differ_after_the_last_digit_kept_are_equal() -> None:
    """The JSON names the rule that its numbers imply, and can be read back."""
    losses = {"none": 3.86034059, "measured": 3.86034051, "fitted": 3.9}
    trials = tuple(Trial(rule, loss, 0.0, 0.0, 0.1, 0.0, 0.0) for rule, loss in losses.items())
    guard = Guard(3.8, 100, "loss", trials)
    written = guard.as_json()
    assert written["taken"] == guard.taken == "none"
    again = Guard.from_json(written)
    assert again is not None
    assert again.taken == "none"
