"""Finds the MoE blocks of a running model, and runs them with two numbers of experts.

A block of transformers has a router and a module ``experts`` that returns the routed sum,
without the shared experts: ``experts(hidden, top_k_index, top_k_weights)``. The block is run twice
on the same inputs, and a hook on ``experts`` records its inputs and outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moescale.calibrate.fitting import Fitting
from moescale.calibrate.routers import RouterScale, find_router
from moescale.calibrate.scoring import Block
from moescale.calibrate.statistics import Cosines, RunningStatistics
from moescale.checkpoint.tensor import Tensor as Entry
from moescale.errors import UnsupportedError
from moescale.factors.fitted import fit
from moescale.factors.samples import Sample
from moescale.families import architectures
from moescale.families.architectures import ROWS, Architecture
from moescale.families.projections import Layer, find_projections
from moescale.planning.experts import LayerExperts

COUNT_NAMES = frozenset({"top_k", "topk", "k", *(key for row in ROWS for key in row.count_keys)})
"""Names of the number of experts per token in modules and configs."""

_PROPORTIONAL, _SAME = 0.005, 0.02
"""Tolerances: a block's output counts as a multiple of the routed sum if its relative difference is
below the first; the multiple counts as 1 if it differs from 1 by at most the second."""

_EXPERTS = "experts"


def find_blocks(model: nn.Module, row: Architecture) -> dict[Layer, list[str]]:
    """The paths of the modules that return the routed sum, by layer.

    A layer with several MoEs that share one count has several.
    """
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    found: defaultdict[Layer, list[str]] = defaultdict(list)
    for layer, modules in find_modules(names, row).items():
        for path in filter(None, map(_routed_module, modules)):
            if path not in found[layer]:
                found[layer].append(path)
    return dict(found)


def find_modules(names: Iterable[str], row: Architecture) -> dict[Layer, list[str]]:
    """The modules that the table lists as routed down-projections, by layer."""
    entries = [Entry(name, "F32", (), 0, 0) for name in names]
    others = [other for other in architectures.parts(row.model_type) if other.part != row.part]
    found: defaultdict[Layer, list[str]] = defaultdict(list)
    for projection in find_projections(entries, row, others):
        found[projection.layer].append(projection.module)
    return dict(found)


def _routed_module(parameter: str) -> str | None:
    """The path down to ``experts``; None if a down-projection is outside such a module."""
    words = parameter.split(".")
    return ".".join(words[: words.index(_EXPERTS) + 1]) if _EXPERTS in words else None


class BlockProbe:
    """A block that runs twice for each run of the model, and collects its experts' statistics.

    Attributes:
        path: the path of its experts in the model.
        router: the multiplier of its router's logits; None if they cannot be multiplied.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        numbers: LayerExperts,
        total: int,
        every: int,
        biases: frozenset[str] | None = None,
    ) -> None:
        """`path` is the path of the `total` experts; `every` as in `RunningStatistics`.

        `biases` are names of biases of the router's logits; None if the logits must not be
        multiplied.
        """
        self.path, self._numbers = path, numbers
        self._experts = model.get_submodule(path)
        self._block = model.get_submodule(path.rpartition(".")[0])
        self._attributes = _count_attributes(self._block, numbers.before, total)
        self._before = RunningStatistics(numbers.trained, every)
        self._after = RunningStatistics(numbers.after, every)
        self._cosines = Cosines()
        self._current: RunningStatistics | None = None
        self._sum: Tensor | None = None
        self._routed: Tensor | None = None  # of the last run
        self._shape, self._compared = (1, 1), 0
        self._scores: Tensor | None = None
        self._handles = [self._experts.register_forward_hook(self._hook, with_kwargs=True)]
        router = getattr(self._block, "router", None)
        if isinstance(router, nn.Module):
            self._handles.append(router.register_forward_hook(self._record_scores))
        self.router = _router_scale(self._block, self._experts, total, biases)
        self._fitting: Fitting | None = None
        self._forward = self._block.forward
        self._block.forward = self._run_twice

    def fit_router(self) -> None:
        """From now on also collect what the rule ``fitted`` needs."""
        if self._numbers.trained != self._numbers.after:
            self._fitting = Fitting(self._block, self._experts, self.router)

    def remove(self) -> None:
        """Restore the block, with the trained number of experts."""
        self._block.forward = self._forward
        if self.router is not None:
            self.router.remove()
        for handle in self._handles:
            handle.remove()

    def set_batch(self, shape: Sequence[int], compared: int) -> None:
        """Announce a batch of token ids of this shape; compare experts on `compared` tokens."""
        self._shape, self._compared = (shape[0], shape[1]), compared

    @property
    def reached(self) -> bool:
        """Whether any token reached this block."""
        return self._before.tokens > 0

    def sample(self) -> Sample:
        """The sample; the block must be `reached`."""
        before = self._before.moments()
        same = self._numbers.trained == self._numbers.after
        after = before if same else self._after.moments()
        fitted = None
        if self._fitting is not None:
            fitted = fit(self._fitting.sums(), scalable=self.router is not None)
        return Sample(before, after, self._cosines.mean(), fit=fitted)

    def _run_twice(self, *args: Any, **named: Any) -> Any:
        """Run the block with the new number on copies, then as trained."""
        if self._numbers.trained != self._numbers.after:
            self._run(self._after, *_copies(args, named))
        kept = _copies(args, named) if self._fitting is not None else None
        output = self._run(self._before, args, named)
        if kept is not None:
            self._fit(*kept)
        return output

    def _fit(self, args: Sequence[Any], named: dict[str, Any]) -> None:
        """Collect one batch for ``fitted``; stop if the experts do not receive the choice."""
        routed = self._routed
        assert self._fitting is not None and routed is not None, "the experts have just been run"

        def run() -> None:
            copies, named_copies = _copies(args, named)
            with _counts(self._attributes, self._numbers.after):
                self._forward(*copies, **named_copies)

        if not self._fitting.add(run, routed, self._context(len(routed))):
            self._fitting = None

    def _run(self, stats: RunningStatistics, args: Sequence[Any], named: dict[str, Any]) -> Any:
        first = not stats.tokens
        self._current = stats
        try:
            with _counts(self._attributes, stats.experts):
                output = self._forward(*args, **named)
        finally:
            self._current = None
        self._routed = self._sum
        if first and self._sum is not None:
            stats.gain = _gain(output if isinstance(output, Tensor) else output[0], self._sum)
        self._sum = None
        return output

    def _hook(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        """Collect the statistics of one call of the experts."""
        stats = self._current
        if stats is None:
            return
        hidden, *rest = (a for a in (*args, *named.values()) if isinstance(a, Tensor))
        index = next((a for a in rest if not a.is_floating_point()), None)
        weights = next((a for a in rest if a.is_floating_point()), self._scores)
        if weights is None:
            raise self._refusal("its experts do not receive the gate weights")
        tokens = weights.shape[0]
        weights = self._chosen(weights, stats.experts)
        result = out if isinstance(out, Tensor) else out[0]
        # Some modules return each expert's contribution to every token, before the sum.
        routed = result.reshape(-1, tokens, result.shape[-1]).sum(0)
        self._sum = routed
        keep = self._context(tokens)
        stats.add(routed[keep], weights[keep])
        if stats is self._before and self._compared and index is not None and index.ndim == 2:
            self._compare(hidden.reshape(tokens, -1), index, weights)

    def _record_scores(self, _: nn.Module, __: Any, out: Any) -> None:
        """Keep the router's gate weights, one row per token.

        Some blocks multiply the experts' inputs by them and do not pass them on.
        """
        scores = out if isinstance(out, Tensor) else out[0]
        self._scores = scores if scores.ndim == 2 and scores.is_floating_point() else None

    def _chosen(self, weights: Tensor, k: int) -> Tensor:
        """The weights of the k chosen experts; a row may also have zeros for all others.

        Raises:
            UnsupportedError: the router chose another number of experts.
        """
        if weights.shape[-1] == k:
            return weights
        width = int((weights != 0).sum(-1).max())
        if width != k:
            raise self._refusal(f"its router sends a token to {width} experts when asked for {k}")
        return weights.topk(k, dim=-1).values

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.path}: {why}",
            hint="--rule measured cannot be used for this model; try --rule gates or preserve.",
        )

    def _context(self, tokens: int) -> Tensor:
        """A mask of all tokens except the first of each sequence.

        The first token has no context. In many models it is an attention sink: its norm is hundreds
        of times the norm of other tokens and would dominate the mean.
        """
        keep = torch.ones(tokens, dtype=torch.bool)
        if tokens == self._shape[0] * self._shape[1]:
            keep[:: self._shape[1]] = False
        return keep

    def _compare(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Run each chosen expert of a few tokens alone, all in one call."""
        k = index.shape[-1]
        if k < 2 or k != weights.shape[-1]:
            return
        some = torch.linspace(0, len(hidden) - 1, min(self._compared, len(hidden))).long()
        rows = hidden[some].repeat_interleave(k, dim=0)
        # Two columns, the second of weight 0: some modules ignore a single column.
        chosen = index[some].reshape(-1, 1).expand(-1, 2)
        alone = weights.new_tensor([1.0, 0.0]).expand(len(rows), 2)
        stats, self._current = self._current, None  # this call is not counted
        out = self._experts(rows, chosen, alone)
        self._current = stats
        self._cosines.add(out.reshape(len(some), k, -1))


def scored_blocks(
    model: nn.Module,
    paths: Iterable[str],
    layer: Layer,
    count: int,
    total: int,
    biases: frozenset[str] | None,
) -> Iterator[Block]:
    """The blocks of a layer, for `moescale.calibrate.scoring`.

    The model was loaded with `count` of `total` experts per token; the rest is as in `BlockProbe`.
    """
    for path in paths:
        block, experts = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
        router = _router_scale(block, experts, total, biases)
        yield Block(layer, experts, router, _count_attributes(block, count, total))


def _router_scale(
    block: nn.Module, experts: nn.Module, total: int, biases: frozenset[str] | None
) -> RouterScale | None:
    """The multiplier of the router's logits; None if they cannot be multiplied."""
    found = None if biases is None else find_router(block, experts, total, biases)
    return RouterScale(*found) if found else None


def _copies(args: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with copied tensors: a block may work in place."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return [copy(a) for a in args], {n: copy(a) for n, a in named.items()}


def _gain(block: Tensor, routed: Tensor) -> float:
    """The constant by which the block multiplies the routed sum; 1 if it does anything else."""
    if block.numel() != routed.numel():  # the experts work in a space of another size
        return 1.0
    block, routed = block.reshape(routed.shape).float(), routed.float()
    gain = float((block * routed).sum() / routed.square().sum().clamp_min(1e-30))
    difference = float((block - gain * routed).norm() / block.norm().clamp_min(1e-30))
    return gain if difference < _PROPORTIONAL and abs(gain - 1) > _SAME else 1.0


def _count_attributes(block: nn.Module, count: int, total: int) -> list[tuple[Any, str]]:
    """The attributes of the block's modules and their configs that set the experts per token.

    Attributes are found by name and value. ``num_experts`` is a count unless it equals the number
    of all experts (openai_privacy_filter).
    """
    holders: dict[int, Any] = {}
    for module in block.modules():
        holders[id(module)] = module
        config = getattr(module, "config", None)
        holders[id(config)] = config
    names = COUNT_NAMES if count == total else COUNT_NAMES | {"num_experts"}
    return [
        (holder, name)
        for holder in holders.values()
        if holder is not None
        for name, value in vars(holder).items()
        if name in names and type(value) is int and value == count
    ]


@contextmanager
def _counts(attributes: Sequence[tuple[Any, str]], k: int) -> Iterator[None]:
    """Run with `k` experts per token."""
    old = [(holder, name, vars(holder)[name]) for holder, name in attributes]
    for holder, name in attributes:
        setattr(holder, name, k)
    try:
        yield
    finally:
        for holder, name, value in old:
            setattr(holder, name, value)
