"""The weights that a router gives to random inputs, for the rule ``gates``.

The inputs are normal, brought to a root mean square of 1, times the weight of the norm before the
router. Everything is float64 from bits that never change, so that machines agree in far more digits
than a factor keeps (`samples.DIGITS`): with float32, one close choice of a group could tell them
apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np

from moescale.factors.samples import Moments, Sample

Array = np.ndarray[Any, np.dtype[np.float64]]
Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

DRAWS: Final = 4096
"""Inputs of a layer."""

_PIECE = 1 << 17
"""Numbers drawn at a time: 2 MiB, and temporarily a few times that."""

_FEW, _COLUMNS = 64, 1024
"""An input with so few numbers more than logits is drawn itself; columns of a router at once."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a router turns logits into the weights of the chosen experts.

    Constants that multiply all weights are left out: they cancel.

    Attributes:
        score: the function from logits to scores.
        late: experts are chosen by logits, and only their scores are computed.
        normalised: the weights of the chosen experts are divided by their sum.
        groups: groups of experts, and how many of them a token may choose from; None for no limit.
        group_best: a group is chosen by the sum of this many of its best scores.
        shared: number of shared experts, which have the last logits and take part in the sum.
        idle: number of experts without weights, which come last; their weights count as 0.
        grid: the logits are two halves; an expert's logit is the sum of one from each.
        cap: a tanh squeezes logits into -cap to cap; None for no bound.
    """

    score: Score = "softmax"
    late: bool = False
    normalised: bool = False
    groups: tuple[int, int] | None = None
    group_best: int = 1
    shared: int = 0
    idle: int = 0
    grid: bool = False
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


def gate_weights(logits: Array, k: int, gate: RouterSpec, bias: Array | None = None) -> Array:
    """The weights of the `k` experts that each token chooses.

    Args:
        logits: what the router's matrix gives, ``[tokens, experts]``, the shared experts last;
            of a grid, ``[tokens, 2 sqrt(experts)]``.
        k: experts per token.
        gate: how this router works.
        bias: what is added to the scores (or the logits, if `gate.late`) for the choice alone.

    Returns:
        ``[tokens, k]``, the largest weight of a token first.
    """
    score = _SCORES[gate.score]
    logits = _prepared(logits, gate)
    routed = logits[:, : logits.shape[1] - gate.shared]
    scores = routed if gate.late else score(routed)
    chosen = _best(_limited(scores if bias is None else scores + bias, gate), k)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if gate.late:
        weights = score(weights)
    if gate.normalised:
        total = weights.sum(axis=1, keepdims=True)
        if gate.shared:
            total = total + score(logits[:, -gate.shared :]).sum(axis=1, keepdims=True)
        weights = weights / total
    weights = np.where(chosen < routed.shape[1] - gate.idle, weights, 0.0)
    return -np.sort(-weights, axis=1)


def _prepared(logits: Array, gate: RouterSpec) -> Array:
    if gate.cap is not None:
        logits = np.tanh(logits / gate.cap) * gate.cap
    if not gate.grid:
        return logits
    first, second = np.split(logits, 2, axis=1)
    return (first[:, :, None] + second[:, None, :]).reshape(len(logits), -1)


def _best(scores: Array, k: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Indices of the `k` largest of each row, in any order; ties are broken arbitrarily."""
    if k >= scores.shape[1]:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]


def _limited(scores: Array, gate: RouterSpec) -> Array:
    """The scores with minus infinity for every expert outside the best groups of its token."""
    if gate.groups is None:
        return scores
    groups, allowed = gate.groups
    by_group = scores.reshape(len(scores), groups, -1)
    best = -np.sort(-by_group, axis=2)[:, :, : gate.group_best].sum(axis=2)
    open_groups = np.zeros((len(scores), groups), bool)
    np.put_along_axis(open_groups, _best(best, allowed), True, axis=1)
    return np.where(open_groups[:, :, None], by_group, -np.inf).reshape(scores.shape)


@dataclass(frozen=True, slots=True)
class RouterArrays:
    """The tensors of one layer's router, as float64.

    Attributes:
        weight: ``[logits, hidden]``.
        norm: what a normalised input is multiplied by, ``[hidden]``.
        bias: `gate_weights`' bias, ``[experts]``.
        logit_bias: added to the logits, ``[logits]``.
    """

    weight: Array
    norm: Array
    bias: Array | None = None
    logit_bias: Array | None = None


def sample_layer(
    router: RouterArrays,
    gate: RouterSpec,
    counts: tuple[int, int],
    seed: Sequence[int],
    sharpness: float = 1.0,
    rho: float = 0.0,
) -> Sample:
    """The moments of one layer's gate, over `DRAWS` inputs.

    Args:
        router: its tensors.
        gate: how it works.
        counts: experts per token before and after.
        seed: whole numbers of its own for each layer.
        sharpness: what the logits are multiplied by after.
        rho: correlation of the experts' outputs, for the error.
    """
    weights: tuple[list[Array], list[Array]] = ([], [])
    for logits in drawn_logits(router, seed):
        for pieces, k, scale in zip(weights, counts, (1.0, sharpness), strict=True):
            pieces.append(gate_weights(logits * scale, k, gate, router.bias))
    before, after = (np.concatenate(pieces) for pieces in weights)
    error = _factor_error(_expected_squares(before, rho), _expected_squares(after, rho))
    return Sample(moments(before), moments(after), error=error)


def _expected_squares(weights: Array, rho: float) -> Array:
    """``(1-rho) sum g_i^2 + rho (sum g_i)^2`` of each token."""
    result: Array = (1 - rho) * (weights**2).sum(axis=1) + rho * weights.sum(axis=1) ** 2
    return result


def _factor_error(before: Array, after: Array) -> float:
    """Relative standard error of ``sqrt(mean before / mean after)`` over the same tokens.

    By the delta method: half of that of the ratio of the two means.
    """
    ratio = before / before.mean() - after / after.mean()
    return 0.5 * float(ratio.std(ddof=1)) / math.sqrt(len(ratio))


def moments(weights: Array) -> Moments:
    """``A_k``, ``B_k`` and the percentiles of each rank, of weights as `gate_weights` gives."""
    ranks = np.percentile(weights, (10, 50, 90), axis=0).T
    return Moments(
        weights.shape[1],
        float((weights**2).sum(axis=1).mean()),
        float((weights.sum(axis=1) ** 2).mean()),
        tuple((float(low), float(middle), float(high)) for low, middle, high in ranks),
    )


def drawn_logits(router: RouterArrays, seed: Sequence[int]) -> Iterator[Array]:
    """The logits of `DRAWS` inputs, piece by piece, each ``[tokens, logits]``.

    Only what lies in the span of the router's rows matters of an input, and of the rest its
    length. So a wide input is not drawn itself: its logits before it is brought to a root mean
    square of 1 are normal with the covariance ``W W^T``, and its rest adds a chi-square to its
    square.
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
    """What turns normal numbers into logits, ``[logits, numbers]``, and how many it leaves out."""
    rows, hidden = router.weight.shape
    if hidden <= rows + _FEW:
        return router.weight * router.norm, 0
    covariance = np.zeros((rows, rows))
    for start in range(0, hidden, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns = router.weight[:, part] * router.norm[part]
        covariance += columns @ columns.T
    # So that rows that depend on each other have a root too; logits move by 1e-5 of their size.
    covariance.flat[:: rows + 1] += 1e-10 * np.trace(covariance) / rows or 1.0e-300
    if not np.isfinite(covariance).all():  # the logits are no numbers either
        return covariance, hidden - rows
    return np.linalg.cholesky(covariance), hidden - rows


def _chi_squares(normal: Array, degrees: int) -> Array:
    """Sums of so many squares of normal numbers, from one each, after Wilson and Hilferty (1931).

    With `_FEW` degrees or more their distribution is right to 1e-4.
    """
    spread = 2 / (9 * degrees)
    result: Array = degrees * (1 - spread + normal * np.sqrt(spread)) ** 3
    return result


def _normal(bits: np.random.PCG64, count: int) -> Array:
    """Normal numbers by Box and Muller from the raw words of a generator.

    numpy promises that those never change; its own normal numbers may (NEP 19).
    """
    words = bits.random_raw(count + count % 2)
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    normal = np.empty(len(words))
    normal[::2], normal[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return normal[:count]
