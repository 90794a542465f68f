"""Charts as SVG text: axes, lines and ranges, without a plotting library, script or network.

Every series has its own dash and marker, so that colour is never the only distinction. Colours are
CSS variables, and the page that contains the chart may switch to dark ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
"""The width of a chart in its own units; it scales with the page."""

_LEFT, _RIGHT, _TOP, _PLOT, _BOTTOM, _ROW = 56, 14, 30, 190, 42, 20
_FORBIDDEN = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SAME, _DIGITS = 1e-6, 5
_MARKS, _RANGE_MARKS = 12, 40
"""How many points of a line, and of a series of ranges, get a marker at most."""

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f6f8fa",
    "ink": "#1f2328",
    "muted": "#59636e",
    "rule": "#d1d9e0",
    "grey": "#59636e",
    "blue": "#0969da",
    "orange": "#bc4c00",
    "green": "#1a7f37",
    "purple": "#8250df",
    "red": "#cf222e",
    "teal": "#0e7490",
}
DARK: Mapping[str, str] = {
    "paper": "#0d1117",
    "panel": "#151b23",
    "ink": "#e6edf3",
    "muted": "#9198a1",
    "rule": "#3d444d",
    "grey": "#9198a1",
    "blue": "#58a6ff",
    "orange": "#f0883e",
    "green": "#3fb950",
    "purple": "#bc8cff",
    "red": "#ff7b72",
    "teal": "#39c5cf",
}
STYLE = """
.chart text { font: 13px/1 system-ui, sans-serif; fill: var(--ink); }
.chart .tick { fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .heavy { font-weight: 600; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart path { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.chart .taken path { stroke-width: 3; }
.chart .mark { fill: var(--paper); stroke-width: 1.75; }
"""


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a series is drawn.

    Attributes:
        colour: a name of the palette.
        dash: an SVG dash pattern; empty for a solid line.
        marker: the shape at the points.
    """

    colour: str
    dash: str
    marker: str


LINE_STYLES: Mapping[str, LineStyle] = {
    "none": LineStyle("grey", "2 4", "cross"),
    "preserve": LineStyle("blue", "", "circle"),
    "published": LineStyle("orange", "7 4", "square"),
    "gates": LineStyle("green", "11 4 2 4", "up"),
    "measured": LineStyle("purple", "", "diamond"),
    "fitted": LineStyle("teal", "1 3", "plus"),
    "own": LineStyle("red", "4 3", "down"),
}
"""By rule; ``own`` is a factor that the user gave."""

_MARKERS: Mapping[str, str] = {
    "circle": "M-3.5 0A3.5 3.5 0 1 0 3.5 0A3.5 3.5 0 1 0 -3.5 0Z",
    "square": "M-3.2 -3.2H3.2V3.2H-3.2Z",
    "diamond": "M0 -4.5L4.5 0L0 4.5L-4.5 0Z",
    "up": "M0 -4.2L4.2 3.4H-4.2Z",
    "down": "M0 4.2L4.2 -3.4H-4.2Z",
    "plus": "M-4 0H4M0 -4V4",
    "none": "",
    "cross": "M-3.2 -3.2L3.2 3.2M-3.2 3.2L3.2 -3.2",
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or a series of ranges.

    Attributes:
        name: the name in the legend.
        style: colour, dash and marker.
        points: x and y; a step of more than 1 in x breaks the line.
        ranges: lower and upper end for each point; with ranges there is no line.
        taken: whether this is the plan's own series, which is emphasised.
    """

    name: str
    style: LineStyle
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    taken: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: its title.
        low: the lower end.
        high: the upper end.
        ticks: positions with their text.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def number_axis(label: str, values: Iterable[float], margin: float = 0.06) -> Axis:
    """An axis that covers all values, with about five round numbers."""
    known = list(values)
    low, high = min(known), max(known)
    alike = high - low <= _SAME * max(abs(high), abs(low))
    room = (abs(high) * 0.1 or 1.0) if alike else (high - low) * margin
    low, high = (0.0 if low == 0 else low - room), high + room
    step = _round_step((high - low) / 5)
    multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
    positions = [min(max(i * step, low), high) for i in multiples]  # a product may round outwards
    return Axis(label, low, high, [(position, _number(position, step)) for position in positions])


def _number(position: float, step: float) -> str:
    """A multiple of a round step, with as many digits as the step has."""
    digits = max(0, 1 - math.floor(math.log10(step) + 1e-9))
    if digits > _DIGITS or abs(position) >= 10**_DIGITS:
        return f"{position:.1e}"
    if digits and f"{step:.{digits}f}".endswith("0"):
        digits -= 1
    return f"{position + 0.0:.{digits}f}"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def name_axis(label: str, names: Sequence[tuple[float, str]], most: int = 7) -> Axis:
    """An axis with at most `most` names, at regular positions and at the last one."""
    last = len(names) - 1
    step = max(1, math.ceil(last / (most - 1)))
    shown = [*names[: last - step + 1 : step], names[last]]
    return Axis(label, names[0][0] - 0.5, names[-1][0] + 0.5, shown)


def chart(
    key: str, title: str, description: str, x: Axis, y: Axis, series: Sequence[Series]
) -> str:
    """A whole chart as an ``svg`` element.

    Args:
        key: an id that is unique in the page.
        title: the title, for screen readers.
        description: the content, for screen readers.
        x: the horizontal axis.
        y: the vertical axis; points outside are clipped.
        series: drawn in this order, the taken one last.
    """
    across, up = _scale(x, _LEFT, WIDTH - _RIGHT), _scale(y, _TOP + _PLOT, _TOP)
    drawn = sorted(series, key=lambda one: one.taken)
    rows = list(_legend(series))
    height = _TOP + _PLOT + _BOTTOM + _ROW * (rows[-1][1] + 1 if rows else 0)
    body = [
        f'<clipPath id="{key}-clip"><rect x="{_LEFT - 6}" y="{_TOP - 6}"'
        f' width="{WIDTH - _LEFT - _RIGHT + 12}" height="{_PLOT + 12}"/></clipPath>',
        *_axes(x, y, across, up),
        f'<g clip-path="url(#{key}-clip)">',
        *(_series(one, across, up) for one in drawn),
        "</g>",
        *(_entry(one, column, row) for one, row, column in rows),
    ]
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height}"'
        f' aria-labelledby="{key}-title {key}-desc">\n'
        f'<title id="{key}-title">{escaped(title)}</title>\n'
        f'<desc id="{key}-desc">{escaped(description)}</desc>\n' + "\n".join(body) + "\n</svg>"
    )


def _scale(axis: Axis, first: float, last: float) -> Callable[[float], float]:
    scale = (last - first) / (axis.high - axis.low)
    return lambda value: first + (value - axis.low) * scale


def _axes(
    x: Axis, y: Axis, across: Callable[[float], float], up: Callable[[float], float]
) -> Iterator[str]:
    right, bottom = WIDTH - _RIGHT, _TOP + _PLOT
    yield _text(0, 14, y.label, "heavy")
    for value, name in y.ticks:
        at = up(value)
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>'
        yield _text(_LEFT - 8, at + 4, name, "tick", "end")
    for value, name in x.ticks:
        at = min(across(value), WIDTH - 4.2 * len(name))  # a long name stays inside
        yield _text(at, bottom + 18, name, "tick", "middle")
    yield _text((_LEFT + right) / 2, bottom + 36, x.label, "", "middle")


def _series(one: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    points = [(across(px), up(py)) for px, py in one.points]
    parts = [_group(one)]
    if one.ranges:
        ends = zip(points, one.ranges, strict=True)
        d = "".join(f"M{px:.1f} {up(low):.1f}V{up(high):.1f}" for (px, _), (low, high) in ends)
    else:
        xs = [px for px, _ in one.points]
        d = "".join(
            f"{'L' if i and xs[i] - xs[i - 1] <= 1 else 'M'}{px:.1f} {py:.1f}"
            for i, (px, py) in enumerate(points)
        )
    parts.append(f'<path d="{d}"{_dash(one)}/>')
    step = math.ceil(len(points) / (_RANGE_MARKS if one.ranges else _MARKS))
    parts += [_mark(one.style, px, py) for px, py in points[::step]]
    return "".join([*parts, "</g>"])


def _dash(one: Series) -> str:
    return f' stroke-dasharray="{one.style.dash}"' if one.style.dash and not one.ranges else ""


def _mark(style: LineStyle, x: float, y: float) -> str:
    shape = _MARKERS[style.marker]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _legend(series: Sequence[Series]) -> Iterator[tuple[Series, int, int]]:
    """Each series with its row and column in the legend; two columns if all names are short."""
    columns = 2 if all(len(one.name) <= 22 for one in series) else 1
    for i, one in enumerate(series):
        yield one, i // columns, i % columns


def _entry(one: Series, column: int, row: int) -> str:
    x, y = 4 + column * 196, _TOP + _PLOT + _BOTTOM + _ROW * row + 12
    line = f"M{x + 15} {y - 8}V{y + 8}" if one.ranges else f"M{x} {y}H{x + 30}"
    sample = f'{_group(one)}<path d="{line}"{_dash(one)}/>{_mark(one.style, x + 15, y)}</g>'
    return sample + _text(x + 38, y + 4, one.name, "heavy" if one.taken else "")


def _group(one: Series) -> str:
    kind = ' class="taken"' if one.taken else ""
    return f'<g{kind} style="stroke:var(--{one.style.colour})">'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}>{escaped(text)}</text>'


def escaped(text: str) -> str:
    """Text for XML and HTML, with markup escaped and forbidden characters replaced."""
    return escape(_FORBIDDEN.sub("\ufffd", text))


def variables(palette: Mapping[str, str]) -> str:
    """A palette as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
