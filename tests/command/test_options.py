"""What a user may request: invalid values are refused before anything else."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.errors import UsageError
from moescale.options import RULES, Options, check_factor, factors_of, parse_factors

MEASURED = {"rule": "measured", "calibrate": "0" * 64}
FITTED = {"rule": "fitted", "calibrate": "0" * 64}
BOTH = factors_of({"factors": {"0": 1.0}, "router_scales": {"0": 1.5}}, "here")


@pytest.mark.parametrize(
    "given_",
    [
        {"experts": 1},
        {"experts": 4, "rule": "published"},
        {"experts": 4, "rule": "none"},
        {"experts": 4, "trained_experts": 1},
        {"experts": 4, "rho": 0.0},
        {"experts": 4, "rho": 1.0, "rule": "preserve"},
        {"experts": 4, "rho": 0.5, "rule": "gates"},
        {"factor": 1.5},
        {"factor": 1.0, "experts": 4},
        {"factors": {"0": 1.2}},
        {"gate_scale": 1.5},
        {"experts": 4, "gate_scale": 0.5, "fold": "residual"},
        {"experts": 3, "pattern": ".*", "experts_key": "k"},
        {"experts": 3, **MEASURED},
    ],
)
def test_what_is_right_by_itself_is_taken(given_: dict[str, Any]) -> None:
    """Options store the values as given; nothing is decided yet."""
    options = Options(**given_)
    assert {name: getattr(options, name) for name in given_} == given_


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        ({}, "--experts is missing"),
        ({"rule": "preserve"}, "--experts is missing"),
        ({"trained_experts": 2}, "--experts is missing"),
        ({"experts": 0}, "--experts is 0"),
        ({"experts": -1}, "--experts is -1"),
        ({"experts": 2, "trained_experts": 0}, "--trained-experts is 0"),
        ({"experts": 2, "rule": "best"}, "preserve, published"),
        ({"experts": 2, "rule": "preserve", "factor": 2.0}, "exclude each other"),
        ({"factors": {"0": 1.0}, "factor": 2.0}, "exclude each other"),
        ({"factors": {"0": 1.0}, "rule": "none"}, "exclude each other"),
        ({"experts": 2, "rho": 2.0}, "--rho is 2"),
        ({"experts": 2, "rho": -0.1}, "--rho is -0.1"),
        ({"experts": 2, "rho": math.nan}, "--rho is nan"),
        ({"experts": 2, "rho": 0.5, "rule": "published"}, "no meaning"),
        ({"factor": 2.0, "rho": 0.5}, "no meaning"),
        ({"gate_scale": math.nan}, "--gate-scale is nan"),
        ({"experts": 2, "gate_scale": 2.0, **MEASURED}, "--gate-scale does not go with"),
        ({"experts": 2, "fold": "residual", **FITTED}, "--fold residual needs one factor"),
        ({"experts": 2, "gate_scale": 2.0, **FITTED}, "--gate-scale does not go with"),
        ({"experts": 2, "gate_scale": 2.0, "factors": BOTH}, "contradicts the router_scales"),
        ({"experts": 2, "fold": "config", "factors": BOTH}, "--factors changes the routers"),
        ({"experts": 2, "calibrate": "0" * 64}, "--calibrate goes with --rule fitted or measured"),
        ({"experts": 2, "pattern": ".*"}, "--experts-key"),
        ({"experts": 2, "experts_key": "k"}, "--pattern"),
        ({"factors": {"0": 1.0, "1": 0.0}}, "0.0"),
    ],
)
def test_what_is_wrong_by_itself_is_refused(given_: dict[str, Any], why: str) -> None:
    """The error names the option and the fault, in one line."""
    with pytest.raises(UsageError) as caught:
        Options(**given_)
    assert why in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


BAD_FACTORS = [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e39, 1e-46, 5e-324]


@pytest.mark.parametrize("factor", BAD_FACTORS)
def test_a_factor_that_cannot_be_multiplied_by_is_refused(factor: float) -> None:
    """Zero, negative, infinite and out of float32's range: these are not factors."""
    with pytest.raises(UsageError, match="it must be above 0 and fit into float32"):
        check_factor(factor)
    with pytest.raises(UsageError):
        Options(factor=factor)


@given(st.floats(1e-38, 3e38))
def test_any_factor_of_float32_is_taken(factor: float) -> None:
    """Any positive float32 is a factor."""
    check_factor(factor)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "measured"])
def test_the_method_is_the_rule(rule: str) -> None:
    """Reports call the method by the rule's name."""
    assert Options(experts=2, rule=rule).method == rule


def test_the_method_without_a_rule() -> None:
    """Without a rule, the source decides; a factor or factors replace a rule."""
    assert Options(experts=2).method is None
    assert Options(factor=2.0).method == "factor"
    assert Options(factors={"0": 2.0}).method == "factors"


def test_options_are_frozen() -> None:
    """A user's request never changes."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options(experts=2).experts = 3  # type: ignore[misc]


# --factors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"0": 1.5, "mtp.0": 2},
        {"factors": {"0": 1.5, "mtp.0": 2}},
        {"moescale": "0.1.0", "factors": {"0": 1.5, "mtp.0": 2}, "files": []},
    ],
)
def test_factors_come_bare_or_in_a_provenance_file(content: Any) -> None:
    """The bare mapping, the mapping under its key, and an earlier output's file are accepted."""
    assert parse_factors(json.dumps(content), "f.json") == {"0": 1.5, "mtp.0": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[1.2]",
        "{}",
        '{"factors": {}}',
        '{"factors": [1.2]}',
        '{"0": "1.2"}',
        '{"0": null}',
        '{"0": true}',
        '{"0": [1.2]}',
        "[" * 100_000,
        "9" * 5000,
    ],
    ids=range(13),
)
def test_what_holds_no_factors_is_refused(text: str) -> None:
    """One line names the file."""
    with pytest.raises(UsageError) as caught:
        parse_factors(text, "f.json")
    assert caught.value.message.startswith("f.json: ")
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "NaN", "-Infinity"])
def test_a_number_that_is_no_factor_is_refused(number: str) -> None:
    """Numbers that no float can represent are a fault of the file, not a crash."""
    with pytest.raises(UsageError):
        Options(factors=parse_factors(f'{{"0": {number}}}', "f.json"))


def test_a_layer_that_stands_twice_is_refused() -> None:
    """Of two factors for one layer, none is guessed."""
    with pytest.raises(UsageError, match="twice"):
        parse_factors('{"factors": {"0": 1.2, "0": 1.3}}', "f.json")
