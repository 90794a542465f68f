"""In a notebook, plans and results show a few lines, a table and charts."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import checkpoints

import moescale
from moescale.report.progress import CellProgress
from moescale.report.terminal import plan_text


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete small Mixtral repo."""
    return checkpoints.mixtral(tmp_path / "source")


def elements(plan: moescale.Plan) -> ET.Element:
    """The notebook output, parsed as XML."""
    shown = plan._repr_html_()
    assert shown is not None
    return ET.fromstring(shown)


def test_a_plan_of_any_size_has_a_short_repr(source: Path) -> None:
    """Its length does not depend on the number of layers, tensors and warnings or on names."""
    small = moescale.plan(source, "out", experts=3)
    assert repr(small).splitlines()[1:] == [
        f"  {source} -> out",
        "    mixtral, 2 MoE layers of 4 experts: 2 -> 3 experts per token",
        f"    preserve, factor 1.22474: 8 tensors scaled, {small.bytes_written / 1000:.1f} kB"
        " written>",
    ]
    large = replace(
        small,
        factors={str(i): 1 + i / 1000 for i in range(1000)},
        tensors=small.tensors * 10_000,
        experts=replace(small.experts, before=(2,) * 1000),
        warnings=("one\nof many\x1b[2J " * 1000,) * 100,
    )
    assert len(repr(large).splitlines()) < 20
    assert len(repr(large)) < 2000
    assert "factor 1 to 1.999" in repr(large)
    assert "\x1b" not in repr(large)
    assert len(repr(large.tensors[0])) < 200


def test_a_result_has_a_short_repr(source: Path, tmp_path: Path) -> None:
    """The status and the plan."""
    result = moescale.convert(source, tmp_path / "out", experts=3, verify=True)
    assert repr(result).startswith("<Result new, verified\n<Plan\n")
    assert len(repr(result).splitlines()) < 20
    assert "<b>new, verified</b>" in (result._repr_html_() or "")


def test_a_notebook_shows_the_table_and_the_charts_of_the_page(source: Path) -> None:
    """It lists every rule with its factor, and two charts with a description each."""
    (source / "moescale.json").write_bytes(b"{}")  # causes a warning
    plan = moescale.plan(source, experts=3)
    root = elements(plan)
    text = " ".join(root.itertext())
    for word in ("preserve", "published", "1.22474", "x 0.667"[2:], *plan.warnings):
        assert word in text
    charts = [svg for svg in root.iter("svg") if "chart" in svg.get("class", "")]
    assert len(charts) == 2
    assert all(svg.find("desc") is not None for svg in charts)


def test_what_a_notebook_shows_leaves_its_other_cells_alone(source: Path) -> None:
    """Its CSS rules apply only to its own cell, and its ids differ from those of another plan."""
    plans = [moescale.plan(source, experts=count) for count in (1, 3)]
    ids = [{e.get("id") for e in elements(plan).iter()} - {None} for plan in plans]
    assert ids[0] and not ids[0] & ids[1]
    style = elements(plans[0]).findtext("style") or ""
    for selectors in re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*\{", "", style)):
        assert all(one.strip().startswith(".moescale") for one in selectors.split(","))


@pytest.mark.parametrize(
    ("progress", "notebook", "shown"),
    [
        (None, False, False),
        (None, True, True),
        (True, False, True),
        (False, True, False),
    ],
)
def test_who_is_shown_a_bar(
    progress: bool | None,
    notebook: bool,
    shown: bool,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default a notebook shows one; `progress` overrides that."""
    begun: list[str] = []

    class Bar(CellProgress):
        def begin(self, phase: str, sizes: Mapping[str, int]) -> None:
            begun.append(phase)
            super().begin(phase, sizes)

    monkeypatch.setattr("moescale.report.progress.CellProgress", Bar)
    if notebook:
        shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
        monkeypatch.setitem(sys.modules, "IPython", shell)
    out = source.parent / "out"
    told: list[str] = []
    moescale.convert(
        source,
        out,
        experts=3,
        verify=True,
        progress=progress,
        phase=lambda phase, sizes: told.append(phase),
    )
    moescale.verify(source, out, progress=progress)
    assert begun == (["writing", "verifying", "verifying"] if shown else [])
    assert told == ["writing", "verifying"]


def test_the_summary_is_what_the_command_prints(source: Path) -> None:
    """`Plan.summary` is the text of a dry run."""
    plan = moescale.plan(source, experts=3)
    assert plan.summary() == plan_text(plan)


def test_tensors_are_rows(source: Path) -> None:
    """Data frames accept them: mappings with the keys of the JSON, not dataclasses."""
    plan = moescale.plan(source, experts=3)
    rows = [dict(row) for row in plan.tensors]
    assert rows == plan.as_json()["tensors"] == json.loads(json.dumps(rows))
    assert [*rows[0]] == ["name", "shard", "dtype", "shape", "role", "layer", "factor"]
    assert isinstance(plan.tensors[0], Mapping)
    assert not dataclasses.is_dataclass(plan.tensors[0])
    assert dataclasses.is_dataclass(plan.files[0])  # data frames accept flat dataclasses too
