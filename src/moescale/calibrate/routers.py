"""Multiplies the logits of a running model's routers, and finds their choices at many scales.

A router's weight is multiplied exactly as a conversion writes it: by one number, rounded to the
weight's own dtype. Weights that accelerate keeps on disk are only loaded within the module's inner
forward, so they are replaced there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RouterScale:
    """A router whose weight, and whose logit bias if it has one, are multiplied by `scale`.

    A scale of 1 changes nothing.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[str]) -> None:
        """`parameters` are the names of the module's parameters that produce its logits."""
        self.module = module
        self.scale = 1.0
        self._parameters = parameters
        self._inner = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        self._forward: Callable[..., Any] = getattr(module, self._inner)
        setattr(module, self._inner, self._run)

    def remove(self) -> None:
        """Restore the module."""
        setattr(self.module, self._inner, self._forward)

    def _run(self, *args: Any, **named: Any) -> Any:
        if self.scale == 1.0:
            return self._forward(*args, **named)
        parameters = self.module._parameters
        before = {name: parameters[name] for name in self._parameters}
        for name, parameter in before.items():
            assert parameter is not None
            parameters[name] = nn.Parameter(
                scaled(parameter.detach(), self.scale), requires_grad=False
            )
        try:
            return self._forward(*args, **named)
        finally:
            parameters.update(before)


def scaled(weight: Tensor, scale: float) -> Tensor:
    """Multiply as a conversion does: in float32, rounded once to the weight's dtype."""
    return (weight.float() * torch.tensor(scale, dtype=torch.float32)).to(weight.dtype)


def find_router(
    block: nn.Module, experts: nn.Module, total: int, biases: frozenset[str]
) -> tuple[nn.Module, list[str]] | None:
    """The module of a block that computes the router's logits, and the parameters it uses.

    The module has a matrix with one row for each expert, and is not part of the experts. None
    unless exactly one module qualifies.

    Args:
        block: the MoE block.
        experts: its experts.
        total: number of routed experts.
        biases: names of biases of the logits.
    """
    inside = set(map(id, experts.modules()))
    found = [
        (module, name)
        for module in block.modules()
        if id(module) not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and parameter.shape[0] == total
    ]
    if len(found) != 1:
        return None
    ((module, weight),) = found
    own_biases = [name for name, p in module.named_parameters(recurse=False) if name in biases]
    return module, [weight, *own_biases]


class _Chosen(BaseException):
    """Ends the run of a block before its experts."""

    def __init__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self.hidden, self.index, self.weights = hidden, index, weights


def _stop(hidden: Tensor, *rest: Any, **named: Any) -> None:
    others = [a for a in (*rest, *named.values()) if isinstance(a, Tensor)]
    index = next((a for a in others if not a.is_floating_point()), None)
    weights = next((a for a in others if a.is_floating_point()), None)
    if index is None or weights is None or index.ndim != 2 or index.shape != weights.shape:
        raise NotImplementedError
    raise _Chosen(hidden, index, weights)


def choices(
    block: nn.Module,
    run: Callable[[], Any],
    experts: nn.Module,
    router: RouterScale | None,
    scales: Sequence[float],
) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """The inputs of a block's experts, with the router's logits multiplied by each scale.

    The experts are not computed. Other parts of the block (a shared expert) are computed once.

    Args:
        block: the MoE block.
        run: runs the block on the inputs in question.
        experts: the module that receives the choice.
        router: None if the logits cannot be multiplied; every scale then gives the same.
        scales: what to multiply the logits by.

    Returns:
        for each scale the hidden states [tokens, hidden], the chosen experts and their weights
        [tokens, k]; None if the experts do not receive the choice in this form.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = experts.forward
    experts.forward = _stop
    try:
        with _once(block, experts, router.module if router else None):
            for scale in scales:
                if router is None and found:
                    found.append(found[0])
                    continue
                if router is not None:
                    router.scale = scale
                try:
                    run()
                except _Chosen as chosen:
                    hidden = chosen.hidden.reshape(-1, chosen.hidden.shape[-1])
                    found.append((hidden, chosen.index, chosen.weights))
                except NotImplementedError:
                    return None
                else:
                    return None
    finally:
        experts.forward = forward
        if router is not None:
            router.scale = 1.0
    return found


@contextmanager
def _once(block: nn.Module, experts: nn.Module, router: nn.Module | None) -> Iterator[None]:
    """Within the context, cache the outputs of the block's other parts by their inputs."""
    others = [
        child
        for child in block.children()
        if child is not experts and (router is None or router not in set(child.modules()))
    ]
    old = [child.forward for child in others]
    for child in others:
        child.forward = _remembering(child.forward)
    try:
        yield
    finally:
        for child, forward in zip(others, old, strict=True):
            child.forward = forward


def _remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any], Any]] = []

    def run(*args: Any, **named: Any) -> Any:
        for then, names, result in calls:
            alike = names.keys() == named.keys() and _same([*names.values()], [*named.values()])
            if alike and _same(then, args):
                return result
        result = forward(*args, **named)
        calls.append((args, named, result))
        return result

    return run


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return bool(one is other)
