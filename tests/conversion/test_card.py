"""The card of the output: the source's metadata, except for what is no longer true."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import checkpoints

from moescale.conversion.card import render
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.storage.base import SourceId
from moescale.storage.local.source import LocalSource


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for a local Mixtral, 2 to 3."""
    folder = checkpoints.mixtral(tmp_path_factory.mktemp("source") / "tiny-mixtral")
    return make_plan(LocalSource(folder), Options(experts=3))


@pytest.fixture(scope="module")
def hub_plan(plan: Plan) -> Plan:
    """A plan for the same model in a Hub repo."""
    return replace(plan, source=SourceId("org/tiny", None, "c" * 40, "org/tiny"))


def split(card: bytes) -> tuple[str, str]:
    """Metadata and body, as the Hub's reader separates them."""
    text = card.decode()
    assert text.startswith("---")
    metadata, _, body = text.removeprefix("---").partition("\n---")
    return metadata.lstrip("\r\n"), body


def metadata(card: bytes) -> dict[str, Any]:
    """The metadata as a value."""
    value = yaml.safe_load(split(card)[0])
    assert isinstance(value, dict)
    return value


def card(front: str, body: str = "# Tiny\n") -> bytes:
    """A card with this metadata."""
    return f"---\n{front}---\n{body}".encode()


# Metadata -----------------------------------------------------------------------------------------


def test_metadata_is_kept_verbatim(hub_plan: Plan) -> None:
    """Every line that is still true is unchanged, including comments and quotes."""
    front, _ = split(render(hub_plan, checkpoints.CARD.encode()))
    for line in (
        "license: apache-2.0   # as upstream\n",
        "language:\n- en\n- fr\n",
        "library_name: transformers\npipeline_tag: text-generation\n",
    ):
        assert line in front


def test_evaluation_results_are_dropped(hub_plan: Plan) -> None:
    """The results belong to another model."""
    assert "model-index" in checkpoints.CARD
    front, _ = split(render(hub_plan, checkpoints.CARD.encode()))
    assert "model-index" not in front
    assert "results" not in front


def test_base_model_and_tag_are_set(hub_plan: Plan) -> None:
    """The source becomes the base model, and the old tags come before the new one."""
    found = metadata(render(hub_plan, checkpoints.CARD.encode()))
    assert found["base_model"] in ("org/tiny", ["org/tiny"])
    assert found["tags"] == ["moe", "a: b", "moescale"]


def test_a_tag_is_not_doubled(hub_plan: Plan) -> None:
    """Rescaling an output again adds no second tag."""
    once = render(hub_plan, card("tags: [moescale, x]\n"))
    assert metadata(once)["tags"] == ["moescale", "x"]


@pytest.mark.parametrize(
    ("tags", "expected"), [("moe", ["moe", "moescale"]), ("", ["moescale"]), ("[]", ["moescale"])]
)
def test_tags_of_any_form_are_taken(hub_plan: Plan, tags: str, expected: list[str]) -> None:
    """The source may have a single tag, none, or an empty list."""
    assert metadata(render(hub_plan, card(f"tags: {tags}\n")))["tags"] == expected


def test_tags_that_yaml_takes_for_something_else_stay_words(hub_plan: Plan) -> None:
    """Norwegian is ``no`` and a version ``1.0``: as tags they stay words."""
    new = render(hub_plan, card("tags: [no, on, 1.0, 0x10, 2024-01-01, null]\nlicense: mit\n"))
    found = yaml.load(split(new)[0], Loader=yaml.BaseLoader)
    assert found["tags"] == ["no", "on", "1.0", "0x10", "2024-01-01", "null", "moescale"]


@pytest.mark.parametrize(
    "front", ["  license: mit\n  language: no\n", "{license: mit, language: no}\n"]
)
def test_a_language_that_yaml_takes_for_something_else_stays_a_word(
    hub_plan: Plan, front: str
) -> None:
    """If the metadata must be rewritten, Norwegian does not become false either."""
    found = yaml.load(split(render(hub_plan, card(front)))[0], Loader=yaml.BaseLoader)
    assert found["language"] == "no"


def test_a_local_source_has_no_repo_to_name(plan: Plan) -> None:
    """A directory name is not a base model; a base model named by the card stays."""
    found = metadata(render(plan, checkpoints.CARD.encode()))
    assert found["base_model"] == "someone/older"
    assert found["tags"][-1] == "moescale"


YAML_KEYS = st.sampled_from(
    ["license", "language", "tags", "model-index", "base_model", "x y", "a"]
)
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab :-#'\"\n\t{[é&*!|>%@`", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=6,
)


@st.composite
def yaml_texts(draw: st.DrawFn) -> str:
    """Metadata, key by key, each value in block or flow style."""
    value = draw(st.dictionaries(YAML_KEYS, YAML_VALUES, min_size=1))
    return "".join(
        yaml.safe_dump({key: item}, default_flow_style=False, indent=draw(st.sampled_from([2, 4])))
        if draw(st.booleans())
        else yaml.safe_dump({key: item}, default_flow_style=True, width=9999)[1:-2] + "\n"
        for key, item in value.items()
    )


@settings(deadline=None, max_examples=100)
@given(yaml_texts())
def test_any_metadata_means_the_same_afterwards(hub_plan: Plan, text: str) -> None:
    """The output of any YAML dumper stays YAML, and only the promised keys differ."""
    value = yaml.safe_load(text)
    assume(not isinstance(value.get("tags"), dict))
    found = metadata(render(hub_plan, card(text)))
    expected = {k: v for k, v in value.items() if k not in ("model-index", "base_model", "tags")}
    assert {k: v for k, v in found.items() if k not in ("base_model", "tags")} == expected
    assert found["base_model"] in ("org/tiny", ["org/tiny"])


KEPT = {
    "indented": "  license: mit\n  language: en\n",
    "flow": "{license: mit, language: en}\n",
    "document end": "license: mit\nlanguage: en\n...\n",
    "comment last": "license: mit\nlanguage: en\n# the end\n",
    "no line end": "license: mit\nlanguage: en",
    "alias": "tags: &t [a]\nlicense: mit\nlanguage: en\nother: *t\n",
    "anchor in results": "model-index: &m [a]\nlicense: mit\nlanguage: en\nother: *m\n",
}


@pytest.mark.parametrize("front", KEPT.values(), ids=KEPT)
def test_unusual_metadata_stays_valid(hub_plan: Plan, front: str) -> None:
    """Valid YAML stays valid YAML, and the licence is still there."""
    found = metadata(render(hub_plan, f"---\n{front}\n---\nbody\n".encode()))
    assert (found["license"], found["language"]) == ("mit", "en")


INVALID = {
    "no yaml": "license: [mit\n",
    "a list": "- license\n",
    "a word": "license\n",
    "tabs": "license:\tmit\n\tlanguage: en\n",
    "a date that is none": "date: 2024-13-45\nlicense: mit\n",
    "an object": "x: !!python/object:os.system {}\nlicense: mit\n",
    "a bad boolean": "x: !!bool maybe\nlicense: mit\n",
    "an empty number": "x: !!int ''\nlicense: mit\n",
    "a bad timestamp": "x: !!timestamp soon\nlicense: mit\n",
}


@pytest.mark.parametrize("front", INVALID.values(), ids=INVALID)
def test_invalid_metadata_is_left_alone(hub_plan: Plan, front: str) -> None:
    """Metadata that no reader can parse stay as they are, and do not end the run."""
    old = card(front)
    assert split(render(hub_plan, old))[0] == front.rstrip("\n")


# Layouts of the file ------------------------------------------------------------------------------


def test_windows_line_ends_stay(hub_plan: Plan) -> None:
    """A card with CRLF keeps CRLF throughout, with the same metadata."""
    old = checkpoints.CARD.replace("\n", "\r\n").encode()
    new = render(hub_plan, old)
    assert new.count(b"\n") == new.count(b"\r\n")
    assert new.replace(b"\r\n", b"\n") == render(hub_plan, checkpoints.CARD.encode())


def test_no_readme_makes_a_card(hub_plan: Plan) -> None:
    """A source without a card gets one that says what was done."""
    new = render(hub_plan, None)
    assert metadata(new) == {"base_model": ["org/tiny"], "tags": ["moescale"]}
    assert b"3 experts per token" in new


@pytest.mark.parametrize(
    "old", [b"", b"# Title\n\nText\n", b"--- not front matter\n", b"text ---\n"]
)
def test_a_card_without_metadata_keeps_its_text(hub_plan: Plan, old: bytes) -> None:
    """The text follows after the new section."""
    new = render(hub_plan, old)
    assert metadata(new)["tags"] == ["moescale"]
    assert new.endswith(old)


@pytest.mark.parametrize("before", ["\n", "\n\n", " "])
def test_metadata_after_blank_space_is_metadata(hub_plan: Plan, before: str) -> None:
    """The Hub's reader allows white space before the first line, so a licence there counts."""
    new = render(hub_plan, before.encode() + card("license: mit\n"))
    assert metadata(new)["license"] == "mit"


def test_empty_metadata_leaves_no_dashes_behind(hub_plan: Plan) -> None:
    """An empty metadata block is replaced by the new one."""
    _, body = split(render(hub_plan, b"---\n---\nText\n"))
    assert "---\n---" not in body
    assert body.endswith("Text\n")


def test_a_rule_in_the_text_is_no_end_of_metadata(hub_plan: Plan) -> None:
    """Dashes further down are part of the text, which stays byte for byte."""
    body = "# Tiny\n\n---\nlicense: other\n---\n\n| a |\n|---|\n"
    new = render(hub_plan, card("license: mit\n", body))
    assert metadata(new)["license"] == "mit"
    assert new.endswith(body.encode())


def test_bytes_that_are_no_text_are_no_crash(hub_plan: Plan) -> None:
    """A card in another encoding still becomes a card."""
    assert metadata(render(hub_plan, b"---\nlicense: mit\n---\ncaf\xe9\n"))["license"] == "mit"


# The section --------------------------------------------------------------------------------------


def test_the_section_says_what_was_done(hub_plan: Plan) -> None:
    """The section has source, commit, counts, rule and factor; the old text follows."""
    text = render(hub_plan, checkpoints.CARD.encode()).decode()
    for fact in ("org/tiny", "c" * 40, "3 experts per token", "`preserve`", "1.22474", "| 4 |"):
        assert fact in text
    assert text.index("Rescaled") < text.index("# Tiny")
    assert text.endswith("# Tiny\n\nText with a table.\n")


def test_the_section_promises_no_quality(hub_plan: Plan) -> None:
    """The card says that an equal norm does not imply quality, and claims no quality."""
    text = render(hub_plan, None).decode().lower()
    assert "says nothing about quality" in text
    for claim in ("better", "improve", "state of the art", "outperform"):
        assert claim not in text


def test_a_config_edit_says_so(hub_plan: Plan) -> None:
    """If no weight was scaled, the card does not say that weights were."""
    unscaled = replace(hub_plan, tensors=())
    assert "no weight was scaled" in render(unscaled, None).decode()


def test_the_same_plan_gives_the_same_card(plan: Plan) -> None:
    """The card contains no time and no path of this machine."""
    new = render(plan, checkpoints.CARD.encode())
    assert new == render(plan, checkpoints.CARD.encode())
    assert plan.source.id.encode() not in new


# Hostile cards ------------------------------------------------------------------------------------


def test_a_long_model_index_is_fast(hub_plan: Plan) -> None:
    """Half a megabyte of evaluation results costs less than a second."""
    row = "  - task: {type: text-generation}\n    metrics: [{type: acc, value: 0.5, name: a}]\n"
    front = "license: mit\nmodel-index:\n- name: x\n  results:\n" + row * (500_000 // len(row))
    start = time.process_time()
    new = render(hub_plan, card(front))
    assert time.process_time() - start < 1
    assert len(new) < 5000
    assert metadata(new)["license"] == "mit"


@pytest.mark.parametrize("nested", ["[", "- "], ids=["lists", "dashes"])
def test_deep_nesting_is_no_crash(plan: Plan, nested: str) -> None:
    """Metadata that are nested too deep are invalid metadata, which stay, and not a crash."""
    front = f"a: {nested * 50_000}\n"
    assert split(rendered_by_child(plan, card(front)))[0] == front.rstrip("\n")


HOSTILE = {
    "aliases of aliases": "a0: &a0 [x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "a number in base 60": "x: 1" + ":1" * 20_000 + "\n",
    "many digits": "x: " + "9" * 100_000 + "\n",
    "dashes": "x: |\n" + "  ---\n" * 20_000,
    "line ends": "\n" * 100_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(5_000)),
}


@pytest.mark.parametrize("front", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_card_is_fast(plan: Plan, front: str) -> None:
    """Metadata designed to be slow take at most a second."""
    start = seconds_of_children()
    rendered_by_child(plan, card("license: mit\n" + front))
    assert seconds_of_children() - start < 1.5


RENDER = """
import pathlib, sys
from moescale.conversion.card import render
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.storage.local.source import LocalSource
plan = make_plan(LocalSource(pathlib.Path(sys.argv[1])), Options(experts=3))
sys.stdout.buffer.write(render(plan, sys.stdin.buffer.read()))
"""


def rendered_by_child(plan: Plan, old: bytes) -> bytes:
    """The card of a plan, made by another process, which may crash."""
    child = subprocess.run(
        [sys.executable, "-c", RENDER, str(plan.source.path)],
        input=old,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()[-300:]
    return child.stdout


def seconds_of_children() -> float:
    """Processor time of child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_path_in_the_card_is_never_followed(hub_plan: Plan, tmp_path: Path) -> None:
    """YAML tags for Python objects create nothing."""
    marker = tmp_path / "made"
    front = f"x: !!python/object/apply:os.mkdir ['{marker}']\n"
    render(hub_plan, card(front))
    assert not marker.exists()
