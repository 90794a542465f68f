"""Streaming statistics of one MoE layer; their size does not grow with the text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moescale.factors.samples import Moments

WEIGHTS_KEPT = 4_096
"""Tokens of a text whose gate weights are kept for percentiles."""

_PERCENTILES = (0.1, 0.5, 0.9)


@dataclass(slots=True)
class RunningStatistics:
    """Sums over tokens, for one layer with `experts` experts per token.

    Attributes:
        experts: experts per token, k.
        every: the gate weights of one token in `every` are kept.
        gain: the factor that the block itself applies to the routed sum.
        tokens: tokens so far.
    """

    experts: int
    every: int = 1
    gain: float = 1.0
    tokens: int = 0
    _norm: float = 0.0
    _squares: float = 0.0
    _squared_sum: float = 0.0
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, routed: Tensor, weights: Tensor) -> None:
        """Add tokens: `routed` is [tokens, hidden], `weights` [tokens, k], of any dtype."""
        weights = weights.double()
        self._norm += float(routed.float().norm(dim=-1).double().sum())
        self._squares += float(weights.square().sum())
        self._squared_sum += float(weights.sum(-1).square().sum())
        first = -self.tokens % self.every
        self._kept.append(weights[first :: self.every].float().cpu())
        self.tokens += len(routed)

    def moments(self) -> Moments:
        """The averages."""
        kept = torch.cat(self._kept).sort(-1, descending=True).values
        ranks = torch.quantile(kept, torch.tensor(_PERCENTILES), dim=0).T.tolist()
        return Moments(
            self.experts,
            self._squares / self.tokens,
            self._squared_sum / self.tokens,
            tuple((low, middle, high) for low, middle, high in ranks),
            self.gain * self._norm / self.tokens,
        )


@dataclass(slots=True)
class Cosines:
    """Mean cosine between the outputs of the experts that a token chose."""

    _sum: float = 0.0
    _tokens: int = 0

    def add(self, outputs: Tensor) -> None:
        """Add tokens: `outputs` is [tokens, k, hidden], the output of each chosen expert."""
        k = outputs.shape[1]
        unit = torch.nn.functional.normalize(outputs.float(), dim=-1)
        # The squared norm of the sum is k plus the cosines of all ordered pairs.
        pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
        self._sum += float(pairs.double().sum()) / (k * (k - 1))
        self._tokens += len(outputs)

    def mean(self) -> float | None:
        """The mean; None without tokens, or with one expert per token."""
        return self._sum / self._tokens if self._tokens else None
