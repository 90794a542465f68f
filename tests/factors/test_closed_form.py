"""The factor from a formula: the contract's table, its limits, and exact values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.factors.closed_form import expected_square, preserve, published
from moescale.routers.normalisation import Normalisation

RENORMALISED = Normalisation(True).balanced_weight
PLAIN = Normalisation(False).balanced_weight

COUNTS = st.integers(1, 512)
RHO = st.floats(0, 1)


@settings(max_examples=200)
@given(COUNTS, COUNTS)
def test_renormalised_weights_give_sqrt_m_over_n(n: int, m: int) -> None:
    """If the weights sum to 1, more experts make the output smaller, so the factor grows."""
    assert preserve(n, m, RENORMALISED) == pytest.approx(math.sqrt(m / n), rel=1e-14)


@settings(max_examples=200)
@given(COUNTS, COUNTS)
def test_other_weights_give_sqrt_n_over_m(n: int, m: int) -> None:
    """If they do not, more experts make the output larger; both closed forms are then equal."""
    assert preserve(n, m, PLAIN) == pytest.approx(math.sqrt(n / m), rel=1e-14)
    assert preserve(n, m, PLAIN) == pytest.approx(published(n, m), rel=1e-14)


def test_known_factors() -> None:
    """Mixtral from 2 to 3, as printed by the plan."""
    assert preserve(2, 3, RENORMALISED) == pytest.approx(1.2247448713915892, rel=1e-15)
    assert published(2, 3) == 0.816496580927726
    assert published(2, 3) / preserve(2, 3, RENORMALISED) == pytest.approx(2 / 3, rel=1e-15)


@settings(max_examples=200)
@given(COUNTS, COUNTS, RHO)
def test_the_factor_restores_the_expected_square(n: int, m: int, rho: float) -> None:
    """The factor squared times the expected square at m equals that at n, for every router."""
    for weight in (RENORMALISED, PLAIN, Normalisation(True, shared=2).balanced_weight):
        factor = preserve(n, m, weight, rho)
        assert factor**2 * expected_square(m, weight, rho) == pytest.approx(
            expected_square(n, weight, rho), rel=1e-12
        )


@settings(max_examples=200)
@given(COUNTS, COUNTS, RHO)
def test_the_way_there_and_back_is_one(n: int, m: int, rho: float) -> None:
    """Going to m and back to n changes nothing, up to rounding."""
    product = preserve(n, m, RENORMALISED, rho) * preserve(m, n, RENORMALISED, rho)
    assert product == pytest.approx(1, rel=1e-12)


@settings(max_examples=200)
@given(COUNTS, RHO)
def test_no_change_of_count_is_exactly_one(n: int, rho: float) -> None:
    """The same number of experts gives a factor of exactly 1, so tensors are copied."""
    for weight in (RENORMALISED, PLAIN):
        assert preserve(n, n, weight, rho) == 1.0
    assert published(n, n) == 1.0


@pytest.mark.parametrize("power", [1, 2, 3])
def test_powers_of_four_are_exact(power: int) -> None:
    """Four times the experts gives exactly twice the factor: no rounding in any dtype."""
    for n in range(1, 65):
        m = n * 4**power
        assert preserve(n, m, RENORMALISED) == 2.0**power
        assert preserve(m, n, RENORMALISED) == 2.0**-power
        assert preserve(n, m, PLAIN) == 2.0**-power
        assert published(n, m) == 2.0**-power


def test_full_correlation_and_renormalised_weights_need_no_factor() -> None:
    """With rho = 1 a renormalised sum is as large as one expert, for any k: exactly 1."""
    for n in range(1, 129):
        for m in (1, 2, 49, 98, 107):
            assert preserve(n, m, RENORMALISED, rho=1.0) == 1.0


def test_full_correlation_and_other_weights_give_n_over_m() -> None:
    """With rho = 1 plain weights add up, so the factor is the ratio of the counts."""
    assert preserve(2, 8, PLAIN, rho=1.0) == pytest.approx(0.25)
    assert preserve(6, 4, PLAIN, rho=1.0) == pytest.approx(1.5)


def test_correlation_between_moves_the_factor_towards_the_limit() -> None:
    """For rho between 0 and 1 the factor is between the limits and monotonic."""
    steps = [preserve(2, 8, RENORMALISED, rho / 10) for rho in range(11)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 2.0
    assert steps[-1] == pytest.approx(1.0)


def test_shared_experts_in_the_sum_count() -> None:
    """If shared experts are part of the normalisation, they count in each expert's weight."""
    assert Normalisation(True, shared=2).balanced_weight(6) == 1 / 8
    weight = Normalisation(True, shared=2).balanced_weight
    assert preserve(2, 6, weight) == pytest.approx(math.sqrt((2 / 16) / (6 / 64)))
