"""JSON as text: strict parsing, the spans of values, and edits that change nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.checkpoint.json_text import (
    Path,
    parse_lenient,
    parse_strict,
    replace_spans,
    value_spans,
)

SPACE = st.text(" \t\r\n", max_size=3)
KEYS = st.sampled_from(["a", "b", "num_experts_per_tok", 'q"\\', "\u00e9\n", "", "\U0001f600"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def laid_out(draw: st.DrawFn, value: Any) -> str:
    """The JSON of a value, with white space wherever JSON allows it."""
    before, after = draw(SPACE), draw(SPACE)
    if isinstance(value, dict):
        items = [
            f"{draw(SPACE)}{json.dumps(key, ensure_ascii=draw(st.booleans()))}{draw(SPACE)}:"
            + draw(laid_out(item))
            for key, item in value.items()
        ]
        inside = "{" + (",".join(items) or draw(SPACE)) + "}"
    elif isinstance(value, list):
        inside = "[" + (",".join(draw(laid_out(item)) for item in value) or draw(SPACE)) + "]"
    else:
        inside = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return before + inside + after


TEXTS = VALUES.flatmap(laid_out)


def paths(value: Any, at: Path = ()) -> list[Path]:
    """Every path of a value, including the root."""
    children = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        children = enumerate(value)
    return [at, *(path for key, item in children for path in paths(item, (*at, key)))]


def at(value: Any, path: Path) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def everything(_: Path) -> bool:
    """Accept all paths."""
    return True


def same(one: Any, other: Any) -> bool:
    """Equality with NaN equal to itself and 1 not equal to 1.0."""
    return json.dumps(one) == json.dumps(other)


# Spans --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(TEXTS)
def test_a_span_holds_exactly_its_value(text: str) -> None:
    """The span of any path, parsed alone, is the value that a parser finds at that path."""
    value = json.loads(text)
    spans = dict(value_spans(text, everything))
    assert set(spans) == set(paths(value))
    for path, (start, stop) in spans.items():
        assert same(json.loads(text[start:stop]), at(value, path))
        assert text[start:stop] == text[start:stop].strip(" \t\r\n")


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.data())
def test_a_replaced_number_changes_nothing_else(text: str, data: st.DataObject) -> None:
    """After an edit that value is new; every other value and byte is unchanged."""
    value = json.loads(text)
    path = data.draw(st.sampled_from(paths(value)))
    [(_, (start, stop))] = list(value_spans(text, lambda p: p == path))
    edited = replace_spans(text, [((start, stop), "12345")])
    assert edited == text[:start] + "12345" + text[stop:]
    assert at(json.loads(edited), path) == 12345
    for other in paths(value):
        if other[: len(path)] != path and path[: len(other)] != other:
            assert same(at(json.loads(edited), other), at(value, other))


def test_only_wanted_paths_are_found() -> None:
    """Only the requested paths are found, not their parents or children."""
    text = '{"a": {"k": 1}, "k": 2, "b": [{"k": 3}]}'
    found = dict(value_spans(text, lambda path: path == ("a", "k")))
    assert [text[slice(*span)] for span in found.values()] == ["1"]


def test_a_key_that_stands_twice_is_found_twice() -> None:
    """Readers differ in which of two equal keys they use, so both spans are given."""
    text = '{"k": 1, "o": {}, "k": 2, "o": {"k": 3}}'
    found = [text[slice(*span)] for _, span in value_spans(text, lambda path: path[-1:] == ("k",))]
    assert found == ["1", "2", "3"]


def test_keys_are_compared_unescaped() -> None:
    """An escaped key equals the key that it spells."""
    text = '{"num_experts\\u005fper_tok": 8}'
    [(path, (start, stop))] = value_spans(text, lambda path: bool(path))
    assert path == ("num_experts_per_tok",)
    assert text[start:stop] == "8"


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1E+5", "-0", "0.5e-3", '"a]b"', " true "])
def test_a_lone_scalar_has_a_place(text: str) -> None:
    """Every scalar that the lenient parser accepts can be found."""
    [(path, (start, stop))] = value_spans(text, everything)
    assert path == ()
    assert text[start:stop] == text.strip()


@settings(deadline=None)
@given(st.text(max_size=30), st.data())
def test_replacing_keeps_what_is_outside(text: str, data: st.DataObject) -> None:
    """Several edits, in any order, only change their own spans."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4)))
    one, other = (cuts[0], cuts[1]), (cuts[2], cuts[3])
    expected = text[: cuts[0]] + "X" + text[cuts[1] : cuts[2]] + "YY" + text[cuts[3] :]
    if one != other:
        assert replace_spans(text, [(other, "YY"), (one, "X")]) == expected


def _seconds_for(items: int) -> float:
    """Processor time to find one value in an object of `items` keys."""
    text = json.dumps({str(i): {"value": [i, "text", None]} for i in range(items)}, indent=2)
    last = (str(items - 1), "value", 0)
    start = time.process_time()
    assert len(list(value_spans(text, lambda path: path == last))) == 1
    return time.process_time() - start


def test_time_grows_with_the_length_of_the_text() -> None:
    """Eight times the text takes about eight times as long, not 64 times."""
    small = min(_seconds_for(3_000) for _ in range(3))
    large = min(_seconds_for(24_000) for _ in range(2))
    assert large < 24 * small


# Parsing ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(VALUES.flatmap(laid_out))
def test_strict_parsing_means_the_same(text: str) -> None:
    """Strict parsing gives the value that `json` gives."""
    expected = json.loads(text)
    odd = "NaN" in text or "Infinity" in text or "-0" in text
    if not odd:
        assert same(parse_strict(text), expected)
    assert same(parse_lenient(text), expected)


STRICT_FAULTS = {
    '{"a": 1, "a": 2}': "'a' occurs twice",
    '{"x": {"a": 1, "b": 0, "a": 2}}': "'a' occurs twice",
    "[NaN]": "NaN",
    "[Infinity]": "Infinity",
    "[-Infinity]": "-Infinity",
    "[-0]": "-0",
    '"\\ud800"': "surrogate",
    '{"\\udfff": 1}': "surrogate",
    '"\\ud800\\u0041"': "surrogate",
    "[" * 100_000: "nested",
    "[1": "ends early",
    "": "empty",
    "[1] 2": "Extra data",
    "[01]": "Expecting",
    "9" * 5000: "digits",
}


@pytest.mark.parametrize(("text", "why"), STRICT_FAULTS.items(), ids=range(len(STRICT_FAULTS)))
def test_strict_parsing_refuses(text: str, why: str) -> None:
    """What other readers reject or read differently is refused, in one line."""
    with pytest.raises(ValueError, match=why) as caught:
        parse_strict(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ['"\\ud83d\\ude00"', "-1", "-0.0", "1e400", '"NaN"', '"\\\\ud800"']
)
def test_strict_parsing_takes_what_only_looks_wrong(text: str) -> None:
    """Surrogate pairs, escaped backslashes and negative numbers are accepted."""
    assert same(parse_strict(text), json.loads(text))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "\ufeff{}", "9" * 5000])
def test_lenient_parsing_refuses_what_is_no_json(text: str) -> None:
    """The lenient parser also has one kind of error, worded for the user of a model."""
    with pytest.raises(ValueError) as caught:
        parse_lenient(text)
    assert "sys." not in str(caught.value)
