"""``moescale.json``: enough to repeat a run, and identical for two runs of the same job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from moescale.options import Options, parse_factors
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.factors import KnownFactors
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun
from moescale.storage.base import FileRecord
from moescale.storage.local.source import LocalSource
from moescale.storage.location import LocalPath
from moescale.version import __version__

WRITTEN = {"b": FileRecord(2, None), "a": FileRecord(1, "0" * 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral."""
    return checkpoints.mixtral(tmp_path_factory.mktemp("source") / "tiny-mixtral")


def plan_of(folder: Path, location: LocalPath | None = None, **options: Any) -> Plan:
    """A plan, from 2 to 3 experts unless the options say otherwise."""
    return make_plan(LocalSource(folder), Options(**{"experts": 3, **options}), location)


def decoded(content: Any) -> PreviousRun:
    """The record in the file of an output."""
    return provenance.decode(json.dumps(content).encode())


def difference(one: Any, other: Mapping[str, Any]) -> str:
    """The difference of an unfinished run from another job."""
    return provenance.job_difference(provenance.decode_job(one), other)


def test_it_says_what_was_done(folder: Path) -> None:
    """Version, source, options, rule, factors and counts are in the file."""
    plan = plan_of(folder, rho=0.25, trained_experts=1)
    content = provenance.provenance(plan, WRITTEN)
    assert content["moescale"] == __version__
    assert content["source"] == {"kind": "local", "id": "tiny-mixtral", "revision": None}
    assert content["options"] == {"experts": 3, "trained_experts": 1, "rho": 0.25}
    assert (content["rule"], content["rho"]) == ("preserve", 0.25)
    assert content["experts"] == {"trained": 1, "from": 2, "to": 3, "total": 4}
    assert set(content["factors"]) == {"0", "1"}
    assert content["counts"]["moe_layers"] == 2
    assert content["counts"]["tensors"] == 8
    assert content["counts"]["bytes_changed"] == 8 * 96


def test_it_lists_every_file_with_size_and_digest(folder: Path) -> None:
    """Files are sorted by name; an unknown digest is null."""
    content = provenance.provenance(plan_of(folder), WRITTEN)
    assert content["files"] == [
        {"name": "a", "size": 1, "sha256": "0" * 64},
        {"name": "b", "size": 2, "sha256": None},
    ]


def test_it_holds_nothing_of_this_machine(folder: Path) -> None:
    """It has no path, destination or time: the bytes do not depend on the machine."""
    text = provenance.encode(
        provenance.provenance(plan_of(folder, LocalPath("somewhere/out")), WRITTEN)
    )
    assert str(folder.parent).encode() not in text
    assert b"somewhere" not in text
    assert text == provenance.encode(provenance.provenance(plan_of(folder, None), WRITTEN))


@pytest.mark.parametrize("way", [".", "./", "../tiny-mixtral", "../tiny-mixtral/."])
def test_the_way_to_the_source_does_not_matter(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative and an absolute path to the source give the same name."""
    monkeypatch.chdir(folder)
    here = provenance.provenance(plan_of(Path(way)), WRITTEN)
    assert here == provenance.provenance(plan_of(folder), WRITTEN)


def test_it_is_json_of_a_readable_layout(folder: Path) -> None:
    """The file is UTF-8 text that ends with a newline, and contains no NaN."""
    data = provenance.encode({"name": "caf\u00e9", "sub": {"x": 1}})
    assert data.decode() == '{\n  "name": "caf\u00e9",\n  "sub": {\n    "x": 1\n  }\n}\n'
    text = provenance.encode(provenance.provenance(plan_of(folder), WRITTEN)).decode()
    json.loads(text, parse_constant=pytest.fail)


def test_its_factors_can_be_used_again(folder: Path) -> None:
    """--factors accepts the file of an earlier output, and reads its factors exactly."""
    plan = plan_of(folder)
    text = provenance.encode(provenance.provenance(plan, WRITTEN)).decode()
    again = plan_of(folder, experts=None, factors=parse_factors(text, "moescale.json"))
    assert dict(again.factors) == dict(plan.factors)


def test_factors_that_were_given_are_in_it(folder: Path) -> None:
    """Options given as a mapping are written as a mapping."""
    plan = plan_of(folder, experts=None, factors={"0": 1.5, "1": 2.0})
    content = json.loads(provenance.encode(provenance.provenance(plan, WRITTEN)))
    assert content["options"]["factors"] == content["factors"] == {"0": 1.5, "1": 2.0}


# Reading it ---------------------------------------------------------------------------------------


def test_it_is_read_as_it_was_written(folder: Path) -> None:
    """The record of an output, and that of an unfinished run, have the facts of the plan."""
    plan = plan_of(folder, rho=0.25)
    output = provenance.decode(provenance.encode(provenance.provenance(plan, WRITTEN)))
    begun = provenance.decode_job(provenance.job(plan))
    assert (output.finished, begun.finished) == (True, False)
    assert (output.rule, begun.rule) == ("preserve", None)
    assert output.files == {"a": (1, "0" * 64), "b": (2, None)}
    assert output.known == KnownFactors(dict(plan.factors), {})
    for found in (output, begun):
        assert (found.version, found.options) == (__version__, plan.options)
        assert provenance.same_decisions(found, plan)
        assert not provenance.same_decisions(found, plan_of(folder, rho=0.5))


@pytest.mark.parametrize("value", [None, 1, True, "x", [1], [{"name": [1]}], {"0": "x"}, {"0": -1}])
def test_a_malformed_value_is_not_read(folder: Path, value: Any) -> None:
    """Each attribute has its type, whatever its key holds."""
    content = provenance.provenance(plan_of(folder), WRITTEN)
    for key in (*content, "calibration", "router_scales"):
        found = decoded({**content, key: value})
        assert found.content[key] == value
        assert isinstance(found.options, Options) == (key != "options")
        assert (found.known is None) == (key in ("factors", "router_scales"))
        assert found.files == ({} if key == "files" else {"a": (1, "0" * 64), "b": (2, None)})
        assert found.calibration == {}
        for text in (found.version, found.plan, found.rule):
            assert text is None or isinstance(text, str)
        assert isinstance(found.source, dict)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"1", b"{", b"[" * 100_000])
def test_another_file_is_an_empty_record(folder: Path, data: bytes) -> None:
    """It has no content, and is no run of any plan."""
    found = provenance.decode(data)
    assert (found.content, found.options, found.version) == ({}, None, None)
    assert not provenance.same_source(found, plan_of(folder))


# The same job -------------------------------------------------------------------------------------


def test_digests_do_not_make_another_job(folder: Path) -> None:
    """A file with digests belongs to the same job as one without."""
    plan = plan_of(folder)
    with_digest = provenance.provenance(plan, {"a": FileRecord(1, "0" * 64)})
    without = provenance.provenance(plan, {"a": FileRecord(1, None)})
    assert provenance.same_job(decoded(with_digest), without)
    other = provenance.provenance(plan, {"a": FileRecord(2)})
    assert not provenance.same_job(decoded(other), without)


@pytest.mark.parametrize("found", [None, [], "text", 1, {}, {"files": 3}])
def test_something_else_is_another_job(folder: Path, found: Any) -> None:
    """A file of that name is compared, whatever it contains."""
    assert not provenance.same_job(decoded(found), provenance.provenance(plan_of(folder), WRITTEN))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"experts": 4}, "other options (experts=3)"),
        ({"rule": "published"}, "other options (experts=3)"),
        ({"rho": 0.5}, "other options (experts=3)"),
        ({"factor": 1.5}, "other options (experts=3)"),
    ],
)
def test_other_options_are_another_job(folder: Path, options: dict[str, Any], word: str) -> None:
    """An unfinished run is continued only with the options that started it."""
    one, other = provenance.job(plan_of(folder)), provenance.job(plan_of(folder, **options))
    assert one != other
    assert difference(one, other) == word


def test_a_changed_source_is_another_job(tmp_path: Path) -> None:
    """A file of the source that has changed since invalidates the finished part of the output."""
    folder = checkpoints.mixtral(tmp_path / "m")
    before = provenance.job(plan_of(folder))
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert "changed" in difference(before, provenance.job(plan_of(folder)))


def test_the_job_survives_a_journal(folder: Path) -> None:
    """A job that was written as JSON and read again is the same job."""
    job = provenance.job(plan_of(folder, experts=None, factors={"0": 1.1, "1": 0.1}))
    assert json.loads(json.dumps(job)) == job


def test_the_job_does_not_depend_on_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other names for source and destination, the run can still be resumed."""
    monkeypatch.chdir(folder.parent)
    assert provenance.job(plan_of(Path(folder.name), LocalPath("x"))) == provenance.job(
        plan_of(folder, LocalPath("y"))
    )


def test_another_version_is_another_job(folder: Path) -> None:
    """A newer version does not finish what an older one began."""
    job = provenance.job(plan_of(folder))
    assert difference({**job, "version": "0"}, job) == "another version"
    assert difference("text", job) == "another program"
    assert difference({**job, "plan": "0"}, job) == "other options (experts=3)"
    assert difference({**job, "options": 1}, job) == "other options"


# Names that are not UTF-8 -------------------------------------------------------------------------


def test_a_source_name_that_is_no_text_is_no_crash(folder: Path) -> None:
    """A directory whose name is not UTF-8 can be rescaled."""
    plan = plan_of(folder)
    plan = replace(plan, source=replace(plan.source, id="/x/caf\udce9"))
    provenance.encode(provenance.provenance(plan, WRITTEN))
