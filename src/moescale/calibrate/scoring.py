"""The loss of a running model: as trained, and with other numbers of experts, factors and scales.

Nothing is written: hooks multiply the routed outputs and the router weights. The result is that of
a conversion, except for the rounding of the down-projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moescale.calibrate.routers import RouterScale
from moescale.calibrate.runner import forward
from moescale.families.projections import Layer

LOGITS = 1 << 24
"""Logits converted to float32 at a time."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is run.

    Attributes:
        experts: experts per token, by layer.
        factors: multiplier of the routed output, by layer; 1 for a layer that is not in it.
        scales: multiplier of the router's logits, by layer; 1 for a layer that is not in it.
    """

    experts: Mapping[Layer, int]
    factors: Mapping[Layer, float] = field(default_factory=dict)
    scales: Mapping[Layer, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """The loss of a setting on each sequence, in nats per token.

    Attributes:
        losses: cross entropy of the next token, one number per sequence.
        divergences: KL divergence from the first setting, one number per sequence.
        tokens: predicted tokens of each sequence.
    """

    losses: tuple[float, ...]
    divergences: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean over all tokens."""
        return _mean(self.losses, self.tokens)

    @property
    def divergence(self) -> float:
        """Mean over all tokens."""
        return _mean(self.divergences, self.tokens)


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def paired(one: Sequence[float], other: Sequence[float], tokens: Sequence[int]) -> float:
    """Standard error of the mean difference between two settings over the same sequences."""
    mean = _mean(one, tokens) - _mean(other, tokens)
    total, count = sum(tokens), len(tokens)
    if count < 2:
        return math.inf
    squares = sum((w * (a - b - mean)) ** 2 for a, b, w in zip(one, other, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


@dataclass(slots=True)
class Block:
    """An MoE block that a setting acts on.

    Attributes:
        layer: the MoE layer.
        experts: the module that returns the routed sum.
        router: multiplies its router; None if that is impossible.
        count_attributes: objects and attributes that set the number of experts per token.
    """

    layer: Layer
    experts: nn.Module
    router: RouterScale | None
    count_attributes: Sequence[tuple[Any, str]]


@contextmanager
def applied(blocks: Iterable[Block], setting: Setting) -> Iterator[None]:
    """Apply a setting to the model within the context."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_applied(block, setting))
        yield


@contextmanager
def _applied(block: Block, setting: Setting) -> Iterator[None]:
    factor = setting.factors.get(block.layer, 1.0)
    old = [(holder, name, getattr(holder, name)) for holder, name in block.count_attributes]
    for holder, name, _ in old:
        setattr(holder, name, setting.experts[block.layer])
    if block.router is not None:
        block.router.scale = setting.scales.get(block.layer, 1.0)
    handle = block.experts.register_forward_hook(lambda _, __, out: _times(out, factor))
    try:
        yield
    finally:
        handle.remove()
        if block.router is not None:
            block.router.scale = 1.0
        for holder, name, value in old:
            setattr(holder, name, value)


def _times(out: Any, factor: float) -> Any:
    if factor == 1.0:
        return out
    if isinstance(out, Tensor):
        return out * factor
    return (out[0] * factor, *out[1:])


@torch.no_grad()
def score(
    model: nn.Module, blocks: Sequence[Block], settings: Sequence[Setting], ids: Iterable[Tensor]
) -> list[Score]:
    """Score settings on token ids, in batches of [sequences, length].

    Divergences are from the first setting, the model as trained.
    """
    losses: list[list[float]] = [[] for _ in settings]
    divergences: list[list[float]] = [[] for _ in settings]
    tokens: list[int] = []
    for batch in ids:
        tokens += [batch.shape[1] - 1] * batch.shape[0]
        reference: Tensor | None = None
        for at, setting in enumerate(settings):
            with applied(blocks, setting):
                logits = forward(model, batch).logits[:, :-1]
            reference = logits if reference is None else reference
            loss, divergence = _losses(logits, reference, batch[:, 1:].to(logits.device))
            losses[at] += loss
            divergences[at] += divergence
    return [
        Score(tuple(a), tuple(b), tuple(tokens)) for a, b in zip(losses, divergences, strict=True)
    ]


def _losses(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[list[float], list[float]]:
    """Cross entropy and divergence of each sequence, computed in pieces."""
    rows = max(1, LOGITS // (logits.shape[0] * logits.shape[-1]))
    loss = torch.zeros(logits.shape[0], dtype=torch.float64)
    divergence = torch.zeros_like(loss)
    for start in range(0, logits.shape[1], rows):
        part = slice(start, start + rows)
        own = logits[:, part].float().log_softmax(-1)
        picked = own.gather(-1, targets[:, part, None]).squeeze(-1)
        loss -= picked.sum(-1).double().cpu()
        if reference is not logits:
            theirs = reference[:, part].float().log_softmax(-1)
            divergence += (theirs.exp() * (theirs - own)).sum((1, 2)).double().cpu()
    length = logits.shape[1]
    return (loss / length).tolist(), (divergence / length).tolist()
