"""Computes the sums for the rule ``fitted``, for one MoE block of a running model.

For a few tokens at a time, each expert that a token chooses at any router scale is computed once.
The routed output at each scale is then a weighted sum of these outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moescale.calibrate.routers import RouterScale, choices
from moescale.factors.fitted import GRID, FitSums

PIECE_BYTES = 64 << 20
"""Memory for the outputs of single experts."""


class Fitting:
    """Sums over tokens of one block; memory use does not grow with the text."""

    def __init__(self, block: nn.Module, experts: nn.Module, router: RouterScale | None) -> None:
        self._block, self._experts, self._router = block, experts, router
        self._columns: int | None = None
        self._sums = torch.zeros(3, len(GRID), dtype=torch.float64)  # dots, squares, norms
        self._trained = torch.zeros(2, dtype=torch.float64)  # squares, norms

    def add(self, run: Callable[[], Any], trained: Tensor, keep: Tensor) -> bool:
        """Add the tokens that `keep` marks; False if the experts do not receive the choice.

        Args:
            run: runs the block on its inputs with the new number of experts.
            trained: the routed output as trained, [tokens, hidden].
            keep: [tokens], true for tokens to add.
        """
        found = choices(self._block, run, self._experts, self._router, GRID)
        if found is None:
            return False
        hidden = found[0][0][keep]
        index = torch.stack([index[keep] for _, index, _ in found])
        weights = torch.stack([weights[keep].float() for _, _, weights in found])
        y = trained[keep].float()
        total = int(index.max()) + 1
        for rows in self._pieces(index, hidden):
            self._add(hidden[rows], index[:, rows], weights[:, rows], y[rows], total)
        self._trained += torch.stack([y.square().sum(), y.norm(dim=-1).sum()]).double().cpu()
        return True

    def sums(self) -> FitSums:
        """The sums over all tokens so far."""
        dots, squares, norms = self._sums.tolist()
        return FitSums(dots, squares, norms, *self._trained.tolist())

    def _pieces(self, index: Tensor, hidden: Tensor) -> Iterator[slice]:
        # float32; a token's experts may change with the scale: room for 2 k of them
        widest = index.shape[-1] * 4 * hidden.shape[-1] * 2
        size = max(1, PIECE_BYTES // widest)
        for start in range(0, len(hidden), size):
            yield slice(start, start + size)

    def _add(self, hidden: Tensor, index: Tensor, weights: Tensor, y: Tensor, total: int) -> None:
        by_expert = weights.new_zeros(*weights.shape[:2], total).scatter_add_(-1, index, weights)
        used = torch.zeros_like(by_expert[0], dtype=torch.bool)
        used.scatter_(-1, index.transpose(0, 1).flatten(1), True)
        union = used.float().topk(int(used.sum(-1).max()), dim=-1).indices  # [tokens, union]
        outputs = self._outputs(hidden, union).float()  # [tokens, union, hidden]
        w = by_expert.gather(-1, union.expand(len(GRID), -1, -1))
        p = torch.einsum("tuh,th->tu", outputs, y)
        gram = torch.einsum("tuh,tvh->tuv", outputs, outputs)
        squares = torch.einsum("gtu,tuv,gtv->gt", w, gram, w).clamp_min(0)
        dots = torch.einsum("gtu,tu->g", w, p)
        found = torch.stack([dots, squares.sum(-1), squares.sqrt().sum(-1)])
        self._sums += found.double().cpu()

    def _outputs(self, hidden: Tensor, index: Tensor) -> Tensor:
        """The output of each of these experts for a token, [tokens, experts, hidden]."""
        tokens, width = index.shape
        rows, chosen = hidden.repeat_interleave(width, dim=0), index.reshape(-1, 1)
        if self._columns is None:
            self._columns = self._needed_columns(rows[:64], chosen[:64])
        return self._alone(rows, chosen, self._columns).reshape(tokens, width, -1)

    def _needed_columns(self, rows: Tensor, chosen: Tensor) -> int:
        """1, or 2 for modules that ignore a single column: the second then has weight 0."""
        try:
            one = self._alone(rows, chosen, 1)
        except (RuntimeError, IndexError, ValueError):
            return 2
        return 1 if torch.allclose(one, self._alone(rows, chosen, 2), atol=1e-3, rtol=1e-2) else 2

    def _alone(self, rows: Tensor, chosen: Tensor, columns: int) -> Tensor:
        alone = torch.zeros(len(rows), columns, dtype=rows.dtype, device=rows.device)
        alone[:, 0] = 1
        out = self._experts(rows, chosen.expand(-1, columns), alone)
        result = out if isinstance(out, Tensor) else out[0]
        return result.reshape(-1, len(rows), result.shape[-1]).sum(0)
