"""The effect of rounding scales on the weights that they scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Rounding:
    """The effect of rounding a tensor's scales, relative to exact products.

    Attributes:
        blocks: number of scaled blocks.
        squares: sum of the squared relative errors of the scales.
        counted: number of scales in `squares`, which are the nonzero ones.
        worst: the largest relative error of a scale.
        zeroed: number of scales that became zero.
        lost: number of finite scales without a finite result.
        empty: the tensor consists of scales, and all of them are 0.
    """

    blocks: int = 0
    squares: float = 0.0
    counted: int = 0
    worst: float = 0.0
    zeroed: int = 0
    lost: int = 0
    empty: bool = False

    def add(self, other: Rounding) -> None:
        """Add the numbers of another part of the same tensor."""
        self.blocks += other.blocks
        self.squares += other.squares
        self.counted += other.counted
        self.worst = max(self.worst, other.worst)
        self.zeroed += other.zeroed
        self.lost += other.lost

    @property
    def rms(self) -> float:
        """Root mean square of the relative errors."""
        return float((self.squares / self.counted) ** 0.5) if self.counted else 0.0

    def as_json(self) -> dict[str, float]:
        """The numbers as JSON."""
        return {"rms": self.rms, "worst": self.worst, "zeroed": self.zeroed}


EditedPiece = tuple[memoryview, int, Rounding]
"""New bytes, the number of results among them that are out of range, and their rounding."""
