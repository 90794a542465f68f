"""The numbers of the rule gates: limits, random inputs, and reproducibility."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from moescale.factors import gates
from moescale.factors.samples import Moments, Sample
from moescale.routers import weights as routing
from moescale.routers.weights import (
    RouterArrays,
    RouterSpec,
    drawn_logits,
    gate_weights,
    sample_layer,
)

HIDDEN, EXPERTS = 24, 8
NORMALISED, PLAIN = RouterSpec(normalised=True), RouterSpec()


def router(size: float, seed: int = 0, hidden: int = HIDDEN) -> RouterArrays:
    """A random router whose weights have this size."""
    draw = np.random.RandomState(seed)
    norm = 1 + 0.1 * draw.standard_normal(hidden)
    return RouterArrays(size * draw.standard_normal((EXPERTS, hidden)), norm)


def factor(size: float, gate: RouterSpec, counts: tuple[int, int], rho: float = 0.0) -> float:
    """The factor of a random router."""
    return gates.factor(sample_layer(router(size), gate, counts, [0]), rho)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (4, 1), (8, 2)])
def test_a_gate_without_opinion_gives_the_closed_form(n: int, m: int) -> None:
    """Equal logits are the balanced gate that `preserve` assumes, to the last digit kept."""
    assert factor(0.0, NORMALISED, (n, m)) == float(f"{math.sqrt(m / n):.6g}")
    assert factor(0.0, PLAIN, (n, m)) == float(f"{math.sqrt(n / m):.6g}")


@pytest.mark.parametrize("gate", [NORMALISED, PLAIN])
def test_a_gate_that_knows_only_one_expert_needs_no_factor(gate: RouterSpec) -> None:
    """If the first expert has all the weight, further experts change nothing."""
    assert factor(1e4, gate, (1, 4)) == pytest.approx(1, abs=2e-3)


def test_a_sharper_gate_needs_less() -> None:
    """From the balanced gate to a gate with one dominant expert, the factor falls to 1."""
    found = [factor(size, NORMALISED, (2, 6)) for size in (0, 0.1, 0.3, 1, 10)]
    assert all(one > other for one, other in pairwise(found))
    assert found[0] == pytest.approx(math.sqrt(3), abs=1e-5)


def test_rho_takes_part() -> None:
    """Weights that sum to 1 need no factor if all experts return the same output."""
    assert factor(0.3, NORMALISED, (2, 6), rho=1.0) == 1.0
    assert factor(0.3, NORMALISED, (2, 6), rho=0.0) > factor(0.3, NORMALISED, (2, 6), rho=0.5) > 1


def test_the_moments_and_their_mix() -> None:
    """A is the mean sum of squares, B the mean square of the sum; the factor mixes them by rho."""
    weights = np.array([[0.5, 0.25], [0.75, 0.25]])
    found = routing.moments(weights)
    assert found.squares == pytest.approx((0.3125 + 0.625) / 2)
    assert found.squared_sum == pytest.approx((0.5625 + 1) / 2)
    assert found.experts == 2
    before, after = Moments(2, 0.5, 1.0), Moments(3, 0.25, 1.21)
    wanted = math.sqrt((0.75 * 0.5 + 0.25 * 1.0) / (0.75 * 0.25 + 0.25 * 1.21))
    assert gates.factor(Sample(before, after), 0.25) == pytest.approx(wanted, rel=1e-5)


def test_ranks_are_percentiles_from_the_largest_weight_on() -> None:
    """Each rank has three ordered percentiles, and no rank exceeds the one before it."""
    ranks = sample_layer(router(0.3), NORMALISED, (4, 4), [0]).before.ranks
    assert len(ranks) == 4
    assert all(low <= middle <= high for low, middle, high in ranks)
    assert all(one[i] >= other[i] for one, other in pairwise(ranks) for i in range(3))


# Random inputs ------------------------------------------------------------------------------------


def test_inputs_have_size_one_before_the_norm() -> None:
    """Every input is normalised to a root mean square of 1 and multiplied by the norm's weight."""
    norm = np.linspace(0.5, 2, HIDDEN)
    logits = np.concatenate(list(drawn_logits(RouterArrays(np.eye(HIDDEN), norm), [3])))
    assert logits.shape == (routing.DRAWS, HIDDEN)
    assert np.sqrt(((logits / norm) ** 2).mean(axis=1)) == pytest.approx(1, rel=1e-12)
    assert logits.mean(axis=0) == pytest.approx(0, abs=0.2)


def test_the_numbers_are_normal() -> None:
    """Mean, variance, third and fourth moment are those of the normal distribution."""
    numbers = routing._normal(np.random.PCG64([1]), 400_001)
    assert len(numbers) == 400_001
    found = [np.mean(numbers**power) for power in (1, 2, 3, 4)]
    assert found == pytest.approx([0, 1, 0, 3], abs=0.03)
    assert abs(np.mean(numbers[::2][:-1] * numbers[1::2])) < 0.01


def test_the_same_numbers_everywhere() -> None:
    """The first numbers of a layer do not depend on the version of numpy."""
    numbers = routing._normal(np.random.PCG64([5]), 4)
    assert numbers == pytest.approx(FIRST, rel=1e-12)
    assert factor(0.3, NORMALISED, (2, 6)) == FACTOR


FIRST = [0.23452142974952583, -0.615482280951206, -0.2568433367853726, 1.1224724235871397]
FACTOR = 1.30194


SCRIPT = """
import numpy as np
from moescale.factors.gates import factor
from moescale.routers.weights import RouterArrays, RouterSpec, sample_layer
draw = np.random.RandomState(0)
for experts, hidden in ((8, 24), (64, 300)):
    router = RouterArrays(0.3 * draw.standard_normal((experts, hidden)), np.ones(hidden))
    for gate in (RouterSpec(normalised=True), RouterSpec("sigmoid", groups=(4, 2), group_best=2)):
        print(repr(factor(sample_layer(router, gate, (2, 4), [3]))))
"""


@pytest.mark.parametrize(
    "machine",
    [{"OPENBLAS_CORETYPE": "Prescott"}, {"OPENBLAS_NUM_THREADS": "1"}],
    ids=lambda machine: next(iter(machine)),
)
def test_another_machine_gives_the_same_digits(machine: dict[str, str]) -> None:
    """Another order of summation changes only digits that a factor does not keep."""
    found = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in ({}, machine)
    ]
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 4


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs do not depend on the number drawn at once."""
    whole = sample_layer(router(0.3), NORMALISED, (2, 4), [7])
    monkeypatch.setattr(routing, "_PIECE", 1000)
    pieces = sample_layer(router(0.3), NORMALISED, (2, 4), [7])
    assert gates.factor(whole) == gates.factor(pieces)
    assert whole.before.squares == pytest.approx(pieces.before.squares, rel=1e-12)


def test_each_layer_draws_its_own() -> None:
    """Another seed gives other inputs, and almost the same factor."""
    one, other = (
        gates.factor(sample_layer(router(0.3), NORMALISED, (2, 6), seed)) for seed in ([1], [2])
    )
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_the_stated_error_is_how_far_other_draws_lie(rho: float) -> None:
    """Over many seeds, the factors vary as much as each of them states."""
    found = [sample_layer(router(0.3), PLAIN, (2, 6), [seed], rho=rho) for seed in range(100)]
    factors = [gates.factor(sample, rho) for sample in found]
    scatter = float(np.std(factors, ddof=1) / np.mean(factors))
    stated = [sample.error for sample in found]
    assert scatter == pytest.approx(np.mean([e for e in stated if e is not None]), rel=0.25)


def test_sharpness_is_that_of_the_gate_after() -> None:
    """Only the logits of the new gate are multiplied."""
    plain = sample_layer(router(0.6), NORMALISED, (2, 4), [0])
    sharp = sample_layer(router(0.3), NORMALISED, (2, 4), [0], router_scale=2.0)
    assert sharp.after == plain.after
    assert sharp.before == sample_layer(router(0.3), NORMALISED, (2, 4), [0]).before


# Gate weights that no model of transformers covers ------------------------------------------------


def test_logits_far_from_zero_do_not_overflow() -> None:
    """Scores of very large and very small logits are finite, without a warning."""
    logits = np.array([[1e6, -1e6, 0.0, 1.0]])
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for late in (False, True):
            weights = gate_weights(logits, 3, RouterSpec(score=score, chosen_by_logits=late))
            assert np.isfinite(weights).all()
            assert weights[0, 0] >= weights[0, 1] >= weights[0, 2] >= 0


def test_groups_shut_out_the_best_expert() -> None:
    """Two good experts in one group beat the single best expert in another."""
    logits = np.array([[3.0, -9, -9, 2.5, 2.4, -9]])
    two = RouterSpec(score="sigmoid", groups=(2, 1), group_best=2)
    one = RouterSpec(score="sigmoid", groups=(2, 1), group_best=1)
    assert gate_weights(logits, 1, two)[0, 0] == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert gate_weights(logits, 1, one)[0, 0] == pytest.approx(1 / (1 + math.exp(-3.0)))
