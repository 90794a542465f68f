"""The gate weights that a router computes for random inputs, for the rule ``gates``.

The inputs are normally distributed, normalised to a root mean square of 1, and multiplied by the
weight of the norm before the router. Everything is float64, from random bits that never change, so
that machines agree in far more digits than a factor keeps (`samples.DIGITS`): in float32, a close
choice between groups could differ between machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from moescale.factors.samples import Moments, Sample

Array = np.ndarray[Any, np.dtype[np.float64]]
Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

DRAWS: Final = 4096
"""Random inputs per layer."""

_PIECE = 1 << 17
"""Numbers drawn at a time: 1 MiB, and temporarily a few times that."""

_FEW, _COLUMNS = 64, 1024
"""An input is drawn itself if its dimensions exceed the logits by at most `_FEW`; `_COLUMNS` of a
router are multiplied at a time."""


class RouterSpec(NamedTuple):
    """How a router turns logits into the gate weights of the chosen experts.

    Constants that multiply all weights are left out: they cancel.

    Attributes:
        score: the function from logits to scores.
        chosen_by_logits: experts are chosen by logits; only those chosen have scores.
        normalised: the weights of the chosen experts are divided by their sum.
        groups: number of groups of experts, and of those that a token may choose from; None for
            no limit.
        group_best: a group is chosen by the sum of this many of its best scores.
        shared: number of shared experts, which have the last logits and are included in the sum.
        zero_experts: number of experts without weights, which come last; their gate weights
            count as 0.
        product_keys: the logits are two halves; an expert's logit is the sum of one from each.
        cap: soft cap of the logits (``tanh(x / cap) * cap``); None for none.
    """

    score: Score = "softmax"
    chosen_by_logits: bool = False
    normalised: bool = False
    groups: tuple[int, int] | None = None
    group_best: int = 1
    shared: int = 0
    zero_experts: int = 0
    product_keys: bool = False
    cap: float | None = None


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _sigmoid(logits: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _sqrtsoftplus(logits: Array) -> Array:
    return np.sqrt(np.logaddexp(0.0, logits))


_SCORES: Final[Mapping[Score, Callable[[Array], Array]]] = MappingProxyType(
    {"softmax": _softmax, "sigmoid": _sigmoid, "sqrtsoftplus": _sqrtsoftplus}
)


def gate_weights(logits: Array, k: int, spec: RouterSpec, bias: Array | None = None) -> Array:
    """The gate weights of the `k` experts chosen for each token.

    Args:
        logits: output of the router's matrix, ``[tokens, experts]``, the shared experts last; of a
            grid, ``[tokens, 2 sqrt(experts)]``.
        k: experts per token.
        spec: how this router works.
        bias: ``[experts]``, added for the choice only: to the scores, or to the logits if
            `spec.chosen_by_logits`.

    Returns:
        ``[tokens, k]``, the largest weight of a token first.
    """
    score = _SCORES[spec.score]
    logits = _prepared(logits, spec)
    routed = logits[:, : logits.shape[1] - spec.shared]
    scores = routed if spec.chosen_by_logits else score(routed)
    chosen = _best(_limited(scores if bias is None else scores + bias, spec), k)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if spec.chosen_by_logits:
        weights = score(weights)
    if spec.normalised:
        total = weights.sum(axis=1, keepdims=True)
        if spec.shared:
            total = total + score(logits[:, -spec.shared :]).sum(axis=1, keepdims=True)
        weights = weights / total
    weights = np.where(chosen < routed.shape[1] - spec.zero_experts, weights, 0.0)
    return -np.sort(-weights, axis=1)


def _prepared(logits: Array, spec: RouterSpec) -> Array:
    if spec.cap is not None:
        logits = np.tanh(logits / spec.cap) * spec.cap
    if not spec.product_keys:
        return logits
    first, second = np.split(logits, 2, axis=1)
    return (first[:, :, None] + second[:, None, :]).reshape(len(logits), -1)


def _best(scores: Array, k: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Indices of the `k` largest of each row, in any order; ties are broken arbitrarily."""
    if k >= scores.shape[1]:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]


def _limited(scores: Array, spec: RouterSpec) -> Array:
    """The scores with minus infinity for every expert outside the best groups of its token."""
    if spec.groups is None:
        return scores
    groups, allowed = spec.groups
    by_group = scores.reshape(len(scores), groups, -1)
    best = -np.sort(-by_group, axis=2)[:, :, : spec.group_best].sum(axis=2)
    open_groups = np.zeros((len(scores), groups), bool)
    np.put_along_axis(open_groups, _best(best, allowed), True, axis=1)
    return np.where(open_groups[:, :, None], by_group, -np.inf).reshape(scores.shape)


class RouterArrays(NamedTuple):
    """The tensors of one layer's router, as float64.

    Attributes:
        weight: ``[logits, hidden]``.
        norm: what a normalised input is multiplied by, ``[hidden]``.
        bias: the bias for `gate_weights`, ``[experts]``; None for none.
        logit_bias: added to the logits, ``[logits]``; None for none.
    """

    weight: Array
    norm: Array
    bias: Array | None = None
    logit_bias: Array | None = None


def sample_layer(
    router: RouterArrays,
    spec: RouterSpec,
    counts: tuple[int, int],
    seed: Sequence[int],
    router_scale: float = 1.0,
    rho: float = 0.0,
) -> Sample:
    """The moments of one layer's gate weights, over `DRAWS` inputs.

    Args:
        router: its tensors.
        spec: how it works.
        counts: experts per token, as trained and new.
        seed: integers that are different for each layer.
        router_scale: what the logits are multiplied by for the new count.
        rho: correlation of the experts' outputs, for the standard error.
    """
    weights: tuple[list[Array], list[Array]] = ([], [])
    for logits in drawn_logits(router, seed):
        for pieces, k, scale in zip(weights, counts, (1.0, router_scale), strict=True):
            pieces.append(gate_weights(logits * scale, k, spec, router.bias))
    before, after = (np.concatenate(pieces) for pieces in weights)
    error = _factor_error(_expected_squares(before, rho), _expected_squares(after, rho))
    return Sample(moments(before), moments(after), error=error)


def _expected_squares(weights: Array, rho: float) -> Array:
    """``(1-rho) sum g_i^2 + rho (sum g_i)^2`` of each token."""
    result: Array = (1 - rho) * (weights**2).sum(axis=1) + rho * weights.sum(axis=1) ** 2
    return result


def _factor_error(before: Array, after: Array) -> float:
    """Relative standard error of ``sqrt(mean before / mean after)`` over the same tokens.

    By the delta method, it is half that of the ratio of the two means.
    """
    ratio = before / before.mean() - after / after.mean()
    return 0.5 * float(ratio.std(ddof=1)) / math.sqrt(len(ratio))


def moments(weights: Array) -> Moments:
    """``A_k``, ``B_k`` and the percentiles of each rank, of weights from `gate_weights`."""
    ranks = np.percentile(weights, (10, 50, 90), axis=0).T
    return Moments(
        weights.shape[1],
        float((weights**2).sum(axis=1).mean()),
        float((weights.sum(axis=1) ** 2).mean()),
        tuple((float(low), float(middle), float(high)) for low, middle, high in ranks),
    )


def drawn_logits(router: RouterArrays, seed: Sequence[int]) -> Iterator[Array]:
    """The logits of `DRAWS` inputs, piece by piece, each ``[tokens, logits]``.

    Two things matter in an input: its part in the span of the router's rows, and the length of the
    rest. So a wide input is not drawn itself: before it is normalised, its logits are normally
    distributed with the covariance ``W W^T``, and the rest adds a chi-square number to its squared
    length.
    """
    hidden = router.weight.shape[1]
    basis, rest = _basis(router)
    width = basis.shape[1]
    bits = np.random.PCG64(list(seed))
    at_once = max(1, _PIECE // width)
    for start in range(0, DRAWS, at_once):
        tokens = min(at_once, DRAWS - start)
        inputs = _normal(bits, tokens * width).reshape(-1, width)
        squares = (inputs**2).sum(axis=1)
        if rest:
            squares += _chi_squares(_normal(bits, tokens), rest)
        logits: Array = (inputs @ basis.T) / np.sqrt(squares / hidden)[:, None]
        yield logits if router.logit_bias is None else logits + router.logit_bias


def _basis(router: RouterArrays) -> tuple[Array, int]:
    """The matrix from normal numbers to logits, ``[logits, numbers]``; how many it leaves out."""
    rows, hidden = router.weight.shape
    if hidden <= rows + _FEW:
        return router.weight * router.norm, 0
    covariance = np.zeros((rows, rows))
    for start in range(0, hidden, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns = router.weight[:, part] * router.norm[part]
        covariance += columns @ columns.T
    # Linearly dependent rows need it for the decomposition; logits change by 1e-5 of their size.
    covariance.flat[:: rows + 1] += 1e-10 * np.trace(covariance) / rows or 1.0e-300
    if not np.isfinite(covariance).all():  # the logits are not finite either
        return covariance, hidden - rows
    return np.linalg.cholesky(covariance), hidden - rows


def _chi_squares(normal: Array, degrees: int) -> Array:
    """Chi-square numbers, each from one normal number, after Wilson and Hilferty (1931).

    With `_FEW` or more degrees of freedom, their distribution is accurate to 1e-4.
    """
    spread = 2 / (9 * degrees)
    result: Array = degrees * (1 - spread + normal * np.sqrt(spread)) ** 3
    return result


def _normal(bits: np.random.PCG64, count: int) -> Array:
    """Normal numbers, by the Box-Muller transform of the raw words of a generator.

    numpy promises that the raw words never change; its own normal numbers may (NEP 19).
    """
    words = bits.random_raw(count + count % 2)
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    normal = np.empty(len(words))
    normal[::2], normal[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return normal[:count]
