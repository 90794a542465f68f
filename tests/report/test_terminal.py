"""The plan as text: tables, the chart of factors by layer, warnings and the summary."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints
from support.sampled_plans import sampled

from moescale.checkpoint.edit import Layer, TensorEdit
from moescale.errors import bytes_text
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.report import colour
from moescale.report.terminal import ASCII, BLOCKS, blocks_for, plan_text, summary
from moescale.results import Result, Status
from moescale.storage.local.source import LocalSource
from moescale.storage.location import LocalPath


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for a local Mixtral, from 2 to 3 experts."""
    folder = checkpoints.mixtral(tmp_path_factory.mktemp("source") / "tiny-mixtral")
    return make_plan(LocalSource(folder), Options(experts=3))


def chart(plan: Plan, factors: dict[str, float], blocks: str) -> list[str]:
    """The lines of the chart of these factors; empty if there is no chart."""
    text = plan_text(replace(plan, factors=factors), blocks=blocks)
    found = [part for part in text.split("\n\n") if part.startswith("factor by layer")]
    return found[0].splitlines() if found else []


def test_factors_that_are_alike_have_no_chart(plan: Plan) -> None:
    """One factor for all layers is shown as a number."""
    assert chart(plan, dict.fromkeys("0123", 1.2247), BLOCKS) == []
    assert chart(plan, {"0": 1.2247}, ASCII) == []


def test_the_chart_rises_from_the_smallest_factor_to_the_largest(plan: Plan) -> None:
    """The smallest factor is one step high, the largest fills the chart; both are labelled."""
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
    """Blocks are drawn only if the encoding has them and no setting asks for plain text."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert blocks_for(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == blocks


def test_a_chart_goes_to_a_terminal_that_can_only_show_ascii(plan: Plan, tmp_path: Path) -> None:
    """A stream of this encoding accepts the chart."""
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        text = plan_text(replace(plan, factors={"0": 1.0, "1": 2.0}), blocks=blocks_for(stream))
        stream.write(text)
    assert "factor by layer" in (tmp_path / "out").read_text(encoding="ascii")


def test_the_summary_steers_no_terminal(plan: Plan) -> None:
    """The destination is printed on one line, with control characters escaped."""
    went = replace(plan, location=LocalPath("out\x1b[2J\nput"))
    statuses: tuple[Status, ...] = ("new", "resume", "done")
    for status in statuses:
        text = summary(Result(went, status, False), {"writing": 1.0})
        assert text.startswith(r"out\x1b[2J\nput ")
        assert len(text.splitlines()) == 2


def test_a_rule_that_does_not_help_is_a_warning(plan: Plan, tmp_path: Path) -> None:
    """The plan's own numbers decide, and a rule that helps gives no warning."""
    source = LocalSource(Path(plan.source.id))
    (warning,) = make_plan(source, Options(experts=3, rule="published")).warnings
    assert warning == (
        "--rule published does not help: it moves the norm of the routed output further from the"
        " trained one (x 0.667) than the config edit alone (x 0.816)"
    )
    assert make_plan(source, Options(experts=2, rule="published")).warnings == (
        "nothing to do: experts per token do not change, and every factor is 1",
    )
    qwen2 = LocalSource(checkpoints.qwen2(tmp_path / "qwen2"))
    for one in (plan, make_plan(qwen2, Options(experts=3, rule="published"))):
        assert not any("does not help" in warning for warning in one.warnings)
    worse = replace(sampled(plan, ["0", "1"], 2, 3, run=True).comparison, taken="published")
    assert "--rule published does not help" in (worse.warning or "")


def test_many_layers_leave_the_rules_on_the_first_screen(plan: Plan) -> None:
    """Factors by layer become a range and a chart; -v lists them in rows."""
    one = plan.tensors[0]

    def tensor(layer: int) -> TensorEdit:
        return one.with_(factor=1 + layer / 100, layer=Layer("", layer))

    many = replace(
        plan,
        tensors=tuple(tensor(layer) for layer in range(48)),
        factors={str(layer): 1 + layer / 100 for layer in range(48)},
    )
    text = plan_text(many)
    assert "0 to 47  48       weight  BF16   1 to 1.47\n(-v lists the layers)" in text
    assert "factor by layer, 0 to 47" in text
    assert len(text.splitlines()) < 30
    assert re.search(r"^17 +1 +weight +BF16 +1\.17$", plan_text(many, verbose=True), re.M)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    plan: Plan,
    stream: io.StringIO,
    environment: dict[str, str],
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chosen rule and the numbers are highlighted; the text is the same without colour."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = plan_text(plan)
    painted = colour.plan_painted(text, stream)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == text
    marked = re.findall(r"\x1b\[[\d;]+m(.*)\x1b\[0m", painted)
    assert [line.split()[0] for line in marked] == (["experts", "->"] if coloured else [])
    done = summary(Result(plan, "done", True), {})
    assert ("\x1b" in colour.summary_painted(done, stream)) == coloured


def test_writing_and_verifying_have_their_own_times(plan: Plan) -> None:
    """Each has its own time and rate; bytes of an earlier run do not count in the rate."""
    done = Result(replace(plan, location=LocalPath("out")), "new", True)
    seconds = {"writing": 2.0, "verifying": 4.0}
    first, last = summary(done, seconds).splitlines()
    total = plan.bytes_written
    assert f" in 2.0 s ({bytes_text(total / 2)}/s), 8 tensors scaled." in first
    assert last == f"Verified in 4.0 s ({bytes_text(total / 4)}/s): every byte matches the plan."
    first = summary(replace(done, status="resume"), seconds, 1000).splitlines()[0]
    assert f"1.0 kB existed, the rest in 2.0 s ({bytes_text((total - 1000) / 2)}/s)" in first


def rules(plan: Plan) -> list[list[str]]:
    """The cells of the table of rules."""
    table = plan_text(plan).split("\n\n")[1]
    return [re.split(r"  +", line.removeprefix("->").strip()) for line in table.splitlines()]


def test_the_norms_are_those_of_the_page(plan: Plan) -> None:
    """If gates were sampled or a run measured, the column says so and agrees with the page."""
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
        assert norms[one.rule] == "x 1.000"


def test_own_factors_have_a_norm_by_layer(plan: Plan) -> None:
    """The column says that it assumes a balanced gate."""
    options = Options(experts=3, factors={"0": 1.0, "1": 1.5})
    one = make_plan(LocalSource(Path(plan.source.id)), options)
    wanted = ["--factors", "1 to 1.5", "x 0.816 to 1.225", "norm if the gate is balanced"]
    assert rules(one)[-1] == wanted


def test_an_assumption_is_pointed_out_where_it_is_strong(plan: Plan, tmp_path: Path) -> None:
    """If weights are not renormalised, the plan says what `preserve` assumes."""
    qwen2 = make_plan(LocalSource(checkpoints.qwen2(tmp_path / "qwen2")), Options(experts=3))
    assert "if the gate is balanced; --rule gates samples it" in plan_text(qwen2)
    assert "balanced" not in plan_text(plan)
