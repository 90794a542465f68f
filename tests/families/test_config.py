"""The experts per token in a config: every spelling is read and set, and nothing else changes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.errors import CheckpointError
from moescale.families import architectures
from moescale.families.architectures import TEXT_SECTIONS
from moescale.families.config import find_count_keys, parse_config, set_count

KEYS = ("num_experts_per_tok", "moe_topk")

ODD = (
    '{\r\n\t"num_experts_per_tok" :\t2 ,\r\n'
    '  "rope_theta": 1e6, "eps": 1.0E-05, "x":[ ],"note": "caf\u00e9 \\u00e9 \\/",\r\n'
    '\t"torch_dtype":"bfloat16"  }\n\n '
)


def edited(text: str, new: int, keys: tuple[str, ...] = KEYS) -> str:
    """The config with `new` experts per token."""
    config = parse_config(text.encode())
    return set_count(config.text, find_count_keys(config, TEXT_SECTIONS, keys), new)


def changes_only_numbers(before: str, after: str, old: str, new: str) -> None:
    """Assert that `after` is `before` with some of the numbers `old` replaced."""
    parts, position = re.split(rf"(?<![\d.])({old})(?![\d.])", before), 0
    for i, part in enumerate(parts):
        for choice in (part, new) if i % 2 else (part,):
            if after.startswith(choice, position):
                position += len(choice)
                break
        else:
            raise AssertionError(f"{after!r} differs at {position}")
    assert position == len(after)


# One number ---------------------------------------------------------------------------------------


def test_an_odd_layout_stays() -> None:
    """CRLF, tabs, spaces, escapes, number formats and trailing text stay unchanged."""
    assert edited(ODD, 13) == ODD.replace(":\t2 ,", ":\t13 ,")


@pytest.mark.parametrize("new", [1, 2, 64, 1000])
def test_the_new_number_may_be_longer_or_shorter(new: int) -> None:
    """The length of the number does not matter."""
    text = '{"num_experts_per_tok": 10}'
    assert edited(text, new) == f'{{"num_experts_per_tok": {new}}}'


def test_the_same_words_elsewhere_stay() -> None:
    """The key in other sections, in strings and in lists has another meaning and stays."""
    text = (
        '{"num_experts_per_tok": 2, "note": "\\"num_experts_per_tok\\": 2",'
        ' "vision_config": {"num_experts_per_tok": 2}, "l": [{"num_experts_per_tok": 2}],'
        ' "xnum_experts_per_tok": 2}'
    )
    assert edited(text, 3) == text.replace(
        '{"num_experts_per_tok": 2, "note"', '{"num_experts_per_tok": 3, "note"'
    )


def test_an_escaped_key_is_the_key() -> None:
    """JSON allows escapes in keys; an escaped key is still found."""
    assert edited('{"num_experts_per_\\u0074ok": 2}', 3) == '{"num_experts_per_\\u0074ok": 3}'


def test_infinity_elsewhere_is_no_obstacle() -> None:
    """Configs written by Python may hold Infinity and NaN, which loaders accept."""
    text = (
        '{"time_step_limit": [0.0, Infinity], "y": -Infinity, "x": NaN, "num_experts_per_tok": 2}'
    )
    assert edited(text, 3) == text.replace("2}", "3}")


# Every spelling, every section, every duplicate ---------------------------------------------------


def test_every_spelling_is_set() -> None:
    """Engines read different keys, so every key that is present gets the new number."""
    text = '{"moe_topk": 6, "num_experts_per_tok": 6}'
    assert json.loads(edited(text, 4)) == {"moe_topk": 4, "num_experts_per_tok": 4}


def test_every_section_is_set() -> None:
    """All duplicate sections of the text model are set."""
    text = (
        '{"text_config": {"num_experts_per_tok": 6}, "llm_config": {"num_experts_per_tok": 6},\n'
        ' "language_config": {"a": 1,\n"num_experts_per_tok":6}, "num_experts_per_tok": 6}'
    )
    assert edited(text, 4) == text.replace(": 6", ": 4").replace(":6", ":4")


def test_the_first_spelling_is_the_one_that_transformers_reads() -> None:
    """If keys or sections disagree, the order of the table decides."""
    config = parse_config(
        b'{"moe_topk": 1, "num_experts_per_tok": 2, "text_config": {"moe_topk": 3}}'
    )
    found = [(place.path, place.value) for place in find_count_keys(config, TEXT_SECTIONS, KEYS)]
    assert found == [("text_config.moe_topk", 3), ("num_experts_per_tok", 2), ("moe_topk", 1)]


def test_duplicate_keys_are_all_set() -> None:
    """A duplicate key or section is set in both places, since readers differ."""
    text = (
        '{"num_experts_per_tok": 2, "text_config": {"num_experts_per_tok": 2},'
        ' "text_config": {"num_experts_per_tok":2}, "num_experts_per_tok": 2}'
    )
    assert edited(text, 3) == text.replace(": 2", ": 3").replace(":2", ":3")


def test_null_is_no_spelling() -> None:
    """A null key gives no count and stays null."""
    text = '{"num_experts_per_tok": null, "moe_topk": 2}'
    assert edited(text, 3) == '{"num_experts_per_tok": null, "moe_topk": 3}'


def test_a_dotted_section_is_found() -> None:
    """Sections may be nested."""
    config = parse_config(b'{"thinker_config": {"text_config": {"num_experts_per_tok": 8}}}')
    [place] = find_count_keys(config, ("thinker_config.text_config",), KEYS)
    assert place.path == "thinker_config.text_config.num_experts_per_tok"
    assert '"num_experts_per_tok": 9}' in set_count(config.text, [place], 9)


def test_a_list_for_each_layer_is_set_number_by_number() -> None:
    """If every layer has its own count, all become the new one, in the same layout."""
    text = '{"moe_topk": [ 8,8,\n 4 ,2]}'
    config = parse_config(text.encode())
    [place] = find_count_keys(config, TEXT_SECTIONS, KEYS)
    assert place.value == (8, 8, 4, 2)
    assert edited(text, 16) == '{"moe_topk": [ 16,16,\n 16 ,16]}'


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["text_config", "llm_config", "a", "moe_topk", "num_experts_per_tok"]),
        st.recursive(
            st.just(2) | st.sampled_from(["2", 2.5, None, 22]),
            lambda inner: st.dictionaries(
                st.sampled_from(["text_config", "moe_topk", "b"]), inner, max_size=3
            ),
            max_leaves=5,
        ),
        max_size=4,
    ),
    st.sampled_from([None, 1, "\t"]),
)
def test_only_the_numbers_change(value: dict[str, Any], indent: Any) -> None:
    """In any config with a readable count, the edit changes only counts."""
    text = json.dumps(value, indent=indent)
    config = parse_config(text.encode())
    try:
        count_keys = find_count_keys(config, TEXT_SECTIONS, KEYS)
    except CheckpointError:
        return
    after = set_count(config.text, count_keys, 7)
    if all(key.value == 2 for key in count_keys):
        changes_only_numbers(text, after, "2", "7")
    again = parse_config(after.encode())
    assert [p.value for p in find_count_keys(again, TEXT_SECTIONS, KEYS)] == [7] * len(count_keys)


@pytest.mark.parametrize(
    "row", [r for r in architectures.ROWS if r.count_keys], ids=lambda r: f"{r.model_type}/{r.part}"
)
def test_every_row_of_the_table_can_be_set(row: architectures.Architecture) -> None:
    """Each spelling and section of each architecture is found, read and set."""
    for section in row.sections:
        for key in row.count_keys:
            value: dict[str, Any] = {key: 2}
            for name in reversed(section.split(".") if section else []):
                value = {name: value}
            config = parse_config(json.dumps(value).encode())
            count_keys = find_count_keys(config, row.sections, row.count_keys)
            assert [(p.section, p.key, p.value) for p in count_keys] == [(section, key, 2)]
            assert set_count(config.text, count_keys, 5) == json.dumps(value).replace("2}", "5}")


# Invalid counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, [], [2, 0], [2, "2"], {}, [[2]]])
def test_what_is_no_number_of_experts_is_refused(value: Any) -> None:
    """The error names the key and shows the value."""
    config = parse_config(json.dumps({"text_config": {"moe_topk": value}}).encode())
    with pytest.raises(CheckpointError, match=r"text_config\.moe_topk is"):
        find_count_keys(config, TEXT_SECTIONS, KEYS)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"1", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000]
)
def test_what_is_no_config_is_refused(data: bytes) -> None:
    """A config that is not a JSON object gives a one-line error that names the file."""
    with pytest.raises(CheckpointError, match=r"^config\.json: ") as caught:
        parse_config(data)
    assert len(caught.value.message.splitlines()) == 1


def test_a_section_that_is_no_object_is_absent() -> None:
    """``text_config: null`` counts as absent."""
    config = parse_config(b'{"text_config": null, "llm_config": 3, "moe_topk": 2}')
    assert [place.path for place in find_count_keys(config, TEXT_SECTIONS, KEYS)] == ["moe_topk"]
