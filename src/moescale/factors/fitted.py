"""The rule ``fitted``: one router scale and one factor per layer, in closed form.

If a model runs with another number of experts than in training, a factor restores the norm of the
routed output, and a scale of the router's logits restores its direction. Let ``y_n`` be the routed
output as trained, and ``y_m(t)`` that with ``m`` experts and the logits times ``t``; over tokens:

    e(t) = 1 - <y_n, y_m(t)>^2 / (|y_n|^2 |y_m(t)|^2)        the part that no factor can restore
    t    = argmin e(t)
    f    = mean |y_n| / mean |y_m(t)|                        keeps the mean norm

The sums behind ``e`` and ``f`` are streamed: one number for each scale of `GRID`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moescale.factors import measured
from moescale.factors.samples import Fit, Sample, rounded

GRID: tuple[float, ...] = tuple(
    sorted({1.0, *(math.exp(math.log(0.4) + i * math.log(15) / 22) for i in range(23))})
)
"""24 scales from 0.4 to 6: 23 that are evenly spaced in their logarithm, and 1."""

WORTH = 0.01
"""The scale stays 1 unless the error falls by more than this fraction."""


@dataclass(slots=True)
class FitSums:
    """Sums over the tokens, for one layer; sequences have one number for each scale of `GRID`.

    Attributes:
        dots: sums of ``<y_n, y_m(t)>``.
        squares: sums of ``|y_m(t)|^2``.
        norms: sums of ``|y_m(t)|``.
        trained_squares: sum of ``|y_n|^2``.
        trained_norms: sum of ``|y_n|``.
    """

    dots: Sequence[float]
    squares: Sequence[float]
    norms: Sequence[float]
    trained_squares: float
    trained_norms: float

    def errors(self) -> list[float]:
        """``e(t)`` for each scale of the grid."""
        return [
            1 - dot * dot / (self.trained_squares * square) if square else 1.0
            for dot, square in zip(self.dots, self.squares, strict=True)
        ]


def fit(sums: FitSums, *, scalable: bool = True) -> Fit:
    """The router scale and the factor of one layer.

    Args:
        sums: sums over the tokens of a text.
        scalable: whether the router's logits can be multiplied; if not, the scale is 1.
    """
    errors = sums.errors()
    one = GRID.index(1.0)
    best = min(range(len(GRID)), key=errors.__getitem__)
    position, error = _vertex(errors, best)
    if not scalable or not error < errors[one] * (1 - WORTH):
        position, error = float(one), errors[one]
    scale = rounded(_scale_at(position)) if position != one else 1.0
    norm = _interpolated(sums.norms, position)
    return Fit(scale, rounded(sums.trained_norms / norm), errors[one], error)


def _vertex(errors: Sequence[float], best: int) -> tuple[float, float]:
    """Position and value of the minimum of the parabola through the best point and its neighbours.

    Positions are indices of the grid; between them the logarithm of the scale is interpolated.
    """
    if not 0 < best < len(errors) - 1:
        return float(best), errors[best]
    x = [math.log(GRID[i]) for i in (best - 1, best, best + 1)]
    y = [errors[i] for i in (best - 1, best, best + 1)]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature <= 0:
        return float(best), errors[best]
    lowest = (x[0] + x[1]) / 2 - left / (2 * curvature)
    value = y[0] + left * (lowest - x[0]) + curvature * (lowest - x[0]) * (lowest - x[1])
    step = lowest - x[1]
    width = x[2] - x[1] if step > 0 else x[1] - x[0]
    return best + step / width, value


def _scale_at(position: float) -> float:
    below = min(math.floor(position), len(GRID) - 2)
    part = position - below
    return math.exp(math.log(GRID[below]) * (1 - part) + math.log(GRID[below + 1]) * part)


def _interpolated(values: Sequence[float], position: float) -> float:
    """The value at a position, by the parabola through the nearest three points in log scale."""
    middle = min(max(round(position), 1), len(values) - 2)
    points = range(middle - 1, middle + 2)
    x = math.log(_scale_at(position)) if position % 1 else math.log(GRID[int(position)])
    total = 0.0
    for i in points:
        weight = 1.0
        for j in points:
            if j != i:
                weight *= (x - math.log(GRID[j])) / (math.log(GRID[i]) - math.log(GRID[j]))
        total += weight * values[i]
    return total


def factor(sample: Sample) -> float:
    """The factor of one layer; the ``measured`` factor if nothing was fitted."""
    return sample.fit.factor if sample.fit else measured.factor(sample)


def scale(sample: Sample) -> float:
    """The router scale of one layer; 1 if nothing was fitted."""
    return sample.fit.scale if sample.fit else 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """The loss of one rule on text that it was not fitted on, in nats per token.

    Attributes:
        rule: ``none``, ``measured`` or ``fitted``.
        loss: cross entropy.
        difference: `loss` minus that of the config edit, on the same sequences.
        standard_error: of `difference`.
        divergence: KL divergence from the model as trained.
        divergence_difference: `divergence` minus that of the config edit.
        divergence_error: standard error of `divergence_difference`.
    """

    rule: str
    loss: float
    difference: float
    standard_error: float
    divergence: float
    divergence_difference: float
    divergence_error: float


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules tried on a text that none of them was fitted on, and the one chosen.

    Attributes:
        trained: cross entropy of the model as trained, in nats per token.
        tokens: number of tokens of the text.
        by: what the choice compares: ``loss`` on the user's text; ``divergence`` on text that the
            model wrote itself, which shows how close a rule is to the trained model, but not its
            loss.
        trials: one for each rule.
    """

    trained: float
    tokens: int
    by: Literal["loss", "divergence"]
    trials: tuple[Trial, ...]

    @property
    def taken(self) -> str:
        """The rule with the lowest loss or divergence as rounded; the first of equal ones."""
        return min(self.trials, key=lambda trial: rounded(getattr(trial, self.by))).rule

    @classmethod
    def from_json(cls, content: Any) -> Guard | None:
        """The inverse of `as_json`; None for any other value, since a file may hold anything."""
        try:
            trials = tuple(Trial(**run) for run in content["runs"])
            guard = cls(content["trained_loss"], content["tokens"], content["by"], trials)
            return guard if guard.as_json() == content else None
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def as_json(self) -> dict[str, Any]:
        """For the plan and the provenance, to `DIGITS` significant digits."""
        return {
            "by": self.by,
            "tokens": self.tokens,
            "trained_loss": rounded(self.trained),
            "taken": self.taken,
            "runs": [
                {
                    name: rounded(value) if isinstance(value, float) else value
                    for name, value in asdict(trial).items()
                }
                for trial in self.trials
            ],
        }
