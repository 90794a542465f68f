"""The effect of rounding scales on the weights that they belong to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Rounding:
    """The effect of rounding a tensor's scales, relative to exact products.

    Attributes:
        blocks: blocks seen.
        squares: sum over scales of their squared relative error.
        counted: the number of nonzero scales in `squares`.
        worst: the largest relative error of a scale.
        zeroed: scales that became zero.
        lost: finite scales without a finite result.
        empty: the tensor holds scales, and all of them are 0.
    """

    blocks: int = 0
    squares: float = 0.0
    counted: int = 0
    worst: float = 0.0
    zeroed: int = 0
    lost: int = 0
    empty: bool = False

    @property
    def rms(self) -> float:
        """Root mean square of the relative errors."""
        return float((self.squares / self.counted) ** 0.5) if self.counted else 0.0

    def as_json(self) -> dict[str, float]:
        """The numbers as JSON."""
        return {"rms": self.rms, "worst": self.worst, "zeroed": self.zeroed}
