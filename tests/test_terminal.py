"""The plan as text: the chart of the factors by layer."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
from sampled_plans import sampled

from moescale.errors import size
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.report.terminal import ASCII, BLOCKS, blocks_for, plan_text, summary
from moescale.repos.local_source import LocalSource
from moescale.running.conversion import Result, Status


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for a local Mixtral, 2 to 3."""
    folder = checkpoints.mixtral(tmp_path_factory.mktemp("source") / "tiny-mixtral")
    return make_plan(LocalSource(folder), Options(experts=3))


def chart(plan: Plan, factors: dict[str, float], blocks: str) -> list[str]:
    """The lines of the chart of these factors; none if there is no chart."""
    text = plan_text(replace(plan, factors=factors), blocks=blocks)
    found = [part for part in text.split("\n\n") if part.startswith("factor by layer")]
    return found[0].splitlines() if found else []


def test_factors_that_are_alike_have_no_chart(plan: Plan) -> None:
    """One factor for all layers is a number, not a chart."""
    assert chart(plan, dict.fromkeys("0123", 1.2247), BLOCKS) == []
    assert chart(plan, {"0": 1.2247}, ASCII) == []


def test_the_chart_rises_from_the_smallest_factor_to_the_largest(plan: Plan) -> None:
    """The smallest factor is one step high, the largest fills the chart; both are named."""
    factors = {"0": 1.6, "1": 1.2, "2": 1.45}
    assert chart(plan, factors, BLOCKS) == [
        "factor by layer, 0 to 2",
        "     1.6 |█",
        "         |█ ▄",
        "         |█ █",
        "     1.2 |█▁█",
    ]
    assert chart(plan, factors, ASCII) == [
        "factor by layer, 0 to 2",
        "     1.6 |#",
        "         |# #",
        "         |# #",
        "     1.2 |###",
    ]


@pytest.mark.parametrize("layers", [2, 61, 64, 65, 1000])
def test_the_chart_is_bounded(plan: Plan, layers: int) -> None:
    """However many layers there are, the chart has 5 lines of at most 80 characters."""
    lines = chart(plan, {str(i): 1 + i / layers for i in range(layers)}, BLOCKS)
    assert len(lines) == 5
    assert max(map(len, lines)) <= 80
    assert ("a column for each" in lines[0]) == (layers > 64)


@pytest.mark.parametrize(
    ("encoding", "environment", "blocks"),
    [
        ("utf-8", {}, BLOCKS),
        ("cp437", {}, ASCII),
        ("ascii", {}, ASCII),
        ("utf-8", {"NO_COLOR": "1"}, ASCII),
        ("utf-8", {"TERM": "dumb"}, ASCII),
    ],
)
def test_a_plain_terminal_gets_plain_characters(
    encoding: str, environment: dict[str, str], blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are drawn only where the encoding has them and nobody asked for plain text."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert blocks_for(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == blocks


def test_a_chart_goes_to_a_terminal_that_can_only_show_ascii(plan: Plan, tmp_path: Path) -> None:
    """What is drawn for such a stream can be written to it."""
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        text = plan_text(replace(plan, factors={"0": 1.0, "1": 2.0}), blocks=blocks_for(stream))
        stream.write(text)
    assert "factor by layer" in (tmp_path / "out").read_text(encoding="ascii")


def test_the_summary_steers_no_terminal(plan: Plan) -> None:
    """Where the output went is shown on one line, whatever its name holds."""
    went = replace(plan, destination="out\x1b[2J\nput")
    statuses: tuple[Status, ...] = ("new", "resume", "done")
    for status in statuses:
        text = summary(Result(went, status, False), {"writing": 1.0})
        assert text.startswith(r"out\x1b[2J\nput ")
        assert len(text.splitlines()) == 2


def test_writing_and_proving_are_told_apart(plan: Plan) -> None:
    """Each has its own time and rate; what an earlier run wrote is no part of the rate."""
    done = Result(replace(plan, destination="out"), "new", True)
    seconds = {"writing": 2.0, "verifying": 4.0}
    first, last = summary(done, seconds).splitlines()
    total = plan.bytes_written
    assert f" in 2.0 s ({size(total / 2)}/s), 8 tensors scaled." in first
    assert last == f"Verified in 4.0 s ({size(total / 4)}/s): every byte is what the plan says."
    first = summary(replace(done, status="resume"), seconds, 1000).splitlines()[0]
    assert f"1.0 kB were there, the rest in 2.0 s ({size((total - 1000) / 2)}/s)" in first


def rules(plan: Plan) -> list[list[str]]:
    """The table of rules, its cells."""
    table = plan_text(plan).split("\n\n")[1]
    return [re.split(r"  +", line.removeprefix("->").strip()) for line in table.splitlines()]


def test_the_norms_are_those_of_the_page(plan: Plan) -> None:
    """Where something was sampled or measured, the column says so and holds what the page draws."""
    noted = replace(sampled(plan, ["0", "1"], 2, 3, run=True), samples={})
    heads = {
        "norm, measured": sampled(plan, ["0", "1"], 2, 3, run=True),
        "norm, measured earlier": noted,
        "norm, from sampled gates": sampled(plan, ["0", "1"], 2, 3),
        "expected norm": plan,
    }
    for head, one in heads.items():
        header, *rows = rules(one)
        assert header == ["rule", "factor", head]
        norms = {row[0]: row[2] for row in rows}
        for name, numbers in one.comparison.norms.items():
            low, high = f"{min(numbers):.3f}", f"{max(numbers):.3f}"
            assert norms[name] == (f"x {low}" if low == high else f"x {low} to {high}")
        assert norms[one.options.method] == "x 1.000"


def test_own_factors_have_a_norm_by_layer(plan: Plan) -> None:
    """It says that it assumes a balanced gate."""
    options = Options(experts=3, factors={"0": 1.0, "1": 1.5})
    one = make_plan(LocalSource(Path(plan.source.id)), options)
    wanted = ["--factors", "1 to 1.5", "x 0.816 to 1.225", "norm if the gate is balanced"]
    assert rules(one)[-1] == wanted


def test_an_assumption_is_pointed_out_where_it_is_strong(plan: Plan, tmp_path: Path) -> None:
    """Where weights are not renormalised, the plan says what `preserve` assumes."""
    qwen2 = make_plan(LocalSource(checkpoints.qwen2(tmp_path / "qwen2")), Options(experts=3))
    assert "if the gate is balanced; --rule gates looks at it" in plan_text(qwen2)
    assert "balanced" not in plan_text(plan)
