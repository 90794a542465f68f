"""Charts as SVG: axes contain all values, and lines can be distinguished."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moescale.report.chart import LINE_STYLES, Axis, Series, chart, name_axis, number_axis

POSITIVE = st.floats(1e-30, 1e30)


def drawn(series: list[Series], x: Axis, y: Axis) -> ET.Element:
    """A chart, parsed."""
    return ET.fromstring(chart("key", "Title", "Description.", x, y, series))


@example([1e-09])  # its lowest tick was less than its end, by one rounding
@given(st.lists(POSITIVE, min_size=1, max_size=8))
def test_an_axis_of_numbers_holds_every_value(values: list[float]) -> None:
    """All values and all ticks are on the axis, and tick labels are short."""
    axis = number_axis("factor", values)
    assert axis.low < axis.high
    assert all(axis.low <= value <= axis.high for value in values)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= place <= axis.high for place, _ in axis.ticks)
    assert all(len(text) <= 8 for _, text in axis.ticks)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0.5, 2], ["0.5", "1.0", "1.5", "2.0"]),
        ([1.0], ["0.90", "0.95", "1.00", "1.05", "1.10"]),
        ([0, 0.08], ["0.00", "0.02", "0.04", "0.06", "0.08"]),
        ([3, 47], ["10", "20", "30", "40"]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], texts: list[str]) -> None:
    """Ticks are multiples of 1, 2, 2.5 or 5, with no more digits than needed."""
    assert [text for _, text in number_axis("", values).ticks] == texts


@given(st.integers(1, 300), st.integers(2, 16))
def test_an_axis_of_names_shows_its_ends(count: int, most: int) -> None:
    """However many names there are, only a few are shown, evenly spaced, including both ends."""
    ticks = name_axis("layer", [(i, str(i)) for i in range(count)], most).ticks
    texts = [text for _, text in ticks]
    assert texts[0] == "0" and texts[-1] == str(count - 1)
    assert len(texts) == len(set(texts)) <= most
    steps = [int(b) - int(a) for a, b in pairwise(texts)]
    assert all(step == steps[0] for step in steps[:-1])
    assert not steps or steps[0] <= steps[-1] <= 2 * steps[0]
    assert len(texts) == count if count <= most else steps[0] > 1


def test_a_gap_breaks_the_line() -> None:
    """Points that are not adjacent, as in two stacks of layers, are not joined."""
    points = [(0, 1.0), (1, 2.0), (3, 1.0), (4, 2.0)]
    x, y = name_axis("layer", [(i, str(i)) for i, _ in points]), number_axis("", [1, 2])
    root = drawn([Series("one", LINE_STYLES["gates"], points)], x, y)
    (line,) = [p.get("d") or "" for p in root.findall("g[@clip-path]/g/path") if not p.get("class")]
    assert re.sub(r"[^ML]", "", line) == "MLML"


def test_the_taken_series_is_drawn_on_top_and_named_in_bold() -> None:
    """No other line hides the series that the plan uses."""
    names = ("measured", "none", "preserve")
    series = [
        Series(name, LINE_STYLES[name], [(0, 1.0), (1, 1.0)], taken=name == "none")
        for name in names
    ]
    x, y = name_axis("layer", [(0, "0"), (1, "1")]), number_axis("", [1])
    root = drawn(series, x, y)
    assert [group.get("class") for group in root.findall("g[@clip-path]/g")] == [
        None,
        None,
        "taken",
    ]
    bold = [text.text for text in root.iter("text") if text.get("class") == "heavy"]
    assert "none" in bold and "preserve" not in bold
