"""The plan as one self-contained page: charts, tables, provenance; no script, no network.

The page is also valid XML, so that a test can read it. All foreign text (names, paths, warnings) is
escaped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path

from moescale.errors import MoescaleError
from moescale.factors.evaluation import Evaluation
from moescale.factors.samples import Moments, Sample
from moescale.planning.comparison import BASES, Basis, Comparison
from moescale.planning.plan import Plan
from moescale.planning.plan_table import PlanTable
from moescale.planning.provenance import options_given
from moescale.report import chart, losses, terminal
from moescale.report.chart import LINE_STYLES, LineStyle, Series
from moescale.report.table import count_text, span
from moescale.version import __version__

_BASIS: Mapping[Basis, str] = {
    "measured": "Measured on the calibration text: the mean norm of the sum over the chosen"
    " experts, with the new number and with the trained one, on the same inputs. Scaling changes it"
    " by exactly the factor. The rule gates uses the gate weights of the same text here.",
    "noted": "Measured on the calibration text in an earlier run of this job, which only recorded"
    " the factors: one over the factor is the norm with the new number alone.",
    "sampled": "Predicted from the model's own gate weights, sampled layer by layer, for expert"
    " outputs of equal size and correlation rho.",
    "balanced": "Predicted by the closed form: a balanced gate, which gives all chosen experts the"
    " same weight, and expert outputs of equal size and correlation rho. Real gates are peaked: for"
    " factors from the user, such as measured ones, the prediction may be far off.",
    "unknown": "The norm cannot be predicted, because it is unknown how this router weighs the"
    " chosen experts.",
}

Count = int | tuple[int, ...]
"""Experts per token: one number for all layers, or one per layer."""

_FEW_ROWS = 14
"""A longer table is collapsed."""

_SHOWN_LAYERS = 4

_COLOURS = (
    "{0} {{ color-scheme: light dark; "
    + chart.variables(chart.LIGHT)
    + " }}\n@media (prefers-color-scheme: dark) {{ {0} {{ "
    + chart.variables(chart.DARK)
    + " }} }}\n"
)

_BODY = """* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
"""

_PARTS = (
    """h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead, .note, figcaption, footer { color: var(--muted); }
.note, figcaption, footer { font-size: .9rem; }
.charts { display: grid; gap: 1.25rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22.5rem), 1fr)); }
figure { margin: 0; padding: 1rem; border: 1px solid var(--rule); border-radius: 8px; }
figure h3 { margin: 0 0 .6rem; font-size: 1rem; }
figcaption { margin-top: .6rem; }
.chart { display: block; width: 100%; max-width: 32rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 500; color: var(--muted); white-space: nowrap; }
tr.taken td { font-weight: 650; }
.facts td { overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .6rem 0; }
.warning { border-left: 4px solid var(--orange); padding: .1rem 0 .1rem .8rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; }
"""
    + chart.STYLE
)

_MEDIA = """
@media (max-width: 30rem) { body { padding: 1.25rem .75rem; } figure { padding: .75rem .6rem; } }
@media print { body { max-width: none; padding: 0; } }
"""

_STYLE = _COLOURS.format(":root") + _BODY + _PARTS + _MEDIA

_CELL = "moescale"
"""The CSS class of the output in a notebook cell; its style does not affect the notebook."""

_CELL_STYLE = (
    _COLOURS.format(f".{_CELL}")
    + f".{_CELL} {{ background: var(--paper); color: var(--ink); padding: .5rem; }}\n"
    + re.sub(
        r"([^{}]+)\{",
        lambda rule: ", ".join(f".{_CELL} {one.strip()}" for one in rule[1].split(",")) + " {",
        _PARTS,
    )
)


def write(shown: Plan | PlanTable, path: Path) -> None:
    """Write the page of a plan, or of several, to a path that was checked before.

    Raises:
        MoescaleError: the file cannot be written after all.
    """
    try:
        text = page(shown) if isinstance(shown, Plan) else plan_table_page(shown)
        path.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise MoescaleError(f"--report {path}: {error.strerror}") from None


def page(plan: Plan) -> str:
    """The page of a plan, as HTML that is also well-formed XML."""
    title = f"{plan.source.repo or plan.source.name}, {_change(plan)}"
    compared = plan.comparison
    parts = [
        *_norms_and_factors(compared),
        *_gates(plan.samples),
        *_correlation(plan.samples),
        *_plan(plan, compared),
        *_provenance(plan),
    ]
    return _whole(plan, title, _lead(plan, compared), plan.warnings, parts)


def plan_table_page(plan_table: PlanTable) -> str:
    """The page of plans side by side, with their losses if evaluated."""
    first = plan_table.plans[0]
    counts = list(dict.fromkeys(count_text(plan.experts.after) for plan in plan_table.plans))
    title = f"{first.source.repo or first.source.name}, {', '.join(counts)} experts per token"
    parts = [
        "<h2>Plans</h2>",
        _table(losses.plan_table_rows(plan_table), losses.PLAN_TABLE_HEADER),
        f'<p class="note">{_text(losses.PLAN_TABLE_NOTE)}</p>',
    ]
    if plan_table.evaluation:
        parts += ["<h2>Losses</h2>", *_evaluation(plan_table.evaluation)]
    return _whole(first, title, losses.plan_table_lead(plan_table), plan_table.warnings, parts)


def _whole(plan: Plan, title: str, lead: str, warnings: Iterable[str], parts: Iterable[str]) -> str:
    """A whole page, with a heading about the source of the plan."""
    body = [
        f"<h1>{_text(plan.source.repo or plan.source.name)}</h1>",
        f'<p class="lead">{_text(lead)}</p>',
        *(f'<p class="warning">{_text(warning)}</p>' for warning in warnings),
        *parts,
        f"<footer>Made by moescale {_text(__version__)}. Keeping the norm says nothing about"
        " quality: evaluate the model on your own task.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def cell(plan: Plan) -> str:
    """Rules with factors and norms, and charts, for a notebook cell."""
    compared = plan.comparison
    key = hashlib.sha256(repr((plan.decisions(), plan.destination)).encode()).hexdigest()[:8]
    parts = [
        f"<style>{_CELL_STYLE}</style>",
        f"<p><b>{_text(plan.source.repo or plan.source.name)}</b><br/>",
        f"{_text(_lead(plan, compared))}</p>",
        *(f'<p class="warning">{_text(warning)}</p>' for warning in plan.warnings),
        _rules(compared),
        *_norms_and_factors(compared, f"m{key}-"),
        _facts(terminal.byte_rows(plan)),
    ]
    return f'<div class="{_CELL}">' + "\n".join(parts) + "</div>"


def _change(plan: Plan) -> str:
    counts = dict(terminal.fact_rows(plan))["experts per token"]
    return f"{counts} experts per token".replace("->", "to")


def _lead(plan: Plan, compared: Comparison) -> str:
    factor = span(compared.factors[compared.taken], ".4g")
    rule = f"--{plan.rule}" if compared.taken == "own" else f"rule {compared.taken}"
    layers = terminal.layers_text(plan)
    return f"{plan.model_type}, {layers}: {_change(plan)}, {rule}, factor {factor}"


# --- Charts ----------------------------------------------------------------------------------


def _norms_and_factors(compared: Comparison, key: str = "") -> Iterator[str]:
    """The charts and their numbers; `key` is a prefix for their ids."""
    yield "<h2>What each rule does, layer by layer</h2>"
    yield '<div class="charts">'
    positions = _positions(compared.layers)
    if compared.norms:
        whole_width = [(x, 1.0) for x in range(-1, int(positions[-1][0]) + 2)]
        trained = Series("as trained", LineStyle("ink", "1 3", "none"), whole_width)
        drawn = [trained, *_by_rule(compared, compared.norms)]
        title, label = "Norm of the routed output", f"relative to trained, {BASES[compared.basis]}"
        described = _described(compared, compared.norms, "norm")
        yield _figure(
            f"{key}norm", title, label, drawn, described, positions, _BASIS[compared.basis]
        )
    described = _described(compared, compared.factors, "factor")
    note = "" if compared.norms else _BASIS["unknown"]
    lines = _by_rule(compared, compared.factors)
    yield _figure(f"{key}factor", "Factors", "factor", lines, described, positions, note)
    yield "</div>"
    yield _folded("Factors and norms as numbers", _numbers(compared), _number_header(compared))


def _positions(layers: Sequence[str]) -> list[tuple[float, str]]:
    """The position of each layer on an axis, with a gap between prefixes."""
    positions: list[tuple[float, str]] = []
    for _, group in groupby(layers, key=lambda layer: layer.rpartition(".")[0]):
        start = positions[-1][0] + 2 if positions else 0
        positions += [(start + i, layer) for i, layer in enumerate(group)]
    return positions


def _by_rule(compared: Comparison, values: Mapping[str, Sequence[float]]) -> list[Series]:
    """A line for each rule; equal rules share one."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, numbers in values.items():
        lines.setdefault(tuple(f"{number:.5g}" for number in numbers), []).append(name)
    positions = _positions(compared.layers)
    result = []
    for names in lines.values():
        taken = compared.taken in names
        style = LINE_STYLES[compared.taken if taken else names[0]]
        points = [(x, y) for (x, _), y in zip(positions, values[names[0]], strict=True)]
        shown = ", ".join(compared.name(name) for name in names)
        result.append(
            Series(f"{shown} (this plan)" if taken else shown, style, points, taken=taken)
        )
    return result


def _described(compared: Comparison, values: Mapping[str, Sequence[float]], what: str) -> str:
    """A sentence for each rule, for screen readers."""
    return " ".join(
        f"{compared.name(name)}: {what} {min(numbers):.3f} to {max(numbers):.3f}."
        for name, numbers in values.items()
    )


def _figure(
    key: str,
    title: str,
    label: str,
    series: Sequence[Series],
    described: str,
    positions: Sequence[tuple[float, str]],
    note: str,
) -> str:
    heights = [y for one in series for _, y in one.points]
    x, y = chart.name_axis("layer", positions), chart.number_axis(label, heights)
    return _framed(title, chart.chart(key, title, described, x, y, series), note)


def _framed(title: str, svg: str, note: str = "") -> str:
    caption = f"<figcaption>{_text(note)}</figcaption>" if note else ""
    return f"<figure><h3>{_text(title)}</h3>\n{svg}\n{caption}</figure>"


def _gates(samples: Mapping[str, Sample]) -> Iterator[str]:
    shown = {layer: s for layer, s in samples.items() if s.before.ranks and s.after.ranks}
    if not shown:
        return
    yield "<h2>Weights of the chosen experts</h2>"
    yield (
        "<p>By rank, largest first: the median over tokens, and the range from the 10th to the 90th"
        " percentile. A balanced gate would be flat.</p>"
    )
    yield '<div class="charts">'
    for number, layer in enumerate(_spread(list(shown), _SHOWN_LAYERS)):
        yield _gate_figure(f"gate-{number}", layer, shown[layer])
    yield "</div>"
    if len(shown) > _SHOWN_LAYERS:
        yield f'<p class="note">{_SHOWN_LAYERS} of {len(shown)} layers are shown.</p>'


def _spread(layers: Sequence[str], count: int) -> list[str]:
    """At most `count` layers, evenly spaced, with the first and the last."""
    if len(layers) <= count:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def _gate_figure(key: str, layer: str, sample: Sample) -> str:
    before = _ranks(sample.before, "as trained", LineStyle("blue", "", "circle"), -0.14)
    after = _ranks(sample.after, "after", LineStyle("orange", "", "square"), 0.14)
    series = [before] if sample.before == sample.after else [before, after]
    most = max(len(one.points) for one in series)
    x = chart.name_axis("rank of the expert", [(i, str(i + 1)) for i in range(most)], 16)
    y = chart.number_axis("gate weight", [0, *(high for one in series for _, high in one.ranges)])
    described = " ".join(
        f"{one.name}: medians {', '.join(f'{y:.3f}' for _, y in one.points)}." for one in series
    )
    title = f"Layer {layer}"
    return _framed(
        title, chart.chart(key, f"Gate weights of layer {layer}", described, x, y, series)
    )


def _ranks(moments: Moments, when: str, style: LineStyle, shift: float) -> Series:
    points = [(rank + shift, middle) for rank, (_, middle, _) in enumerate(moments.ranks)]
    ranges = [(low, high) for low, _, high in moments.ranks]
    return Series(f"{moments.experts} experts, {when}", style, points, ranges)


def _correlation(samples: Mapping[str, Sample]) -> Iterator[str]:
    known = {layer: s.correlation for layer, s in samples.items() if s.correlation is not None}
    if not known:
        return
    positions = _positions(list(known))
    points = [(x, known[layer]) for x, layer in positions]
    series = [Series("as trained", LINE_STYLES["measured"], points, taken=True)]
    low, high = min(known.values()), max(known.values())
    x = chart.name_axis("layer", positions)
    y = chart.number_axis("mean cosine", [0, *known.values()])
    title = "Correlation of the chosen experts' outputs"
    described = f"Mean pairwise cosine by layer, {low:.3f} to {high:.3f}."
    yield f"<h2>{title}</h2>"
    yield '<div class="charts">'
    note = "The closed forms and the rule gates use a single number for it, rho."
    yield _framed("By layer", chart.chart("correlation", title, described, x, y, series), note)
    yield "</div>"


# --- Tables ----------------------------------------------------------------------------------


def _number_header(compared: Comparison) -> tuple[str, ...]:
    names = [compared.name(name) for name in compared.factors]
    norms = [f"norm, {compared.name(name)}" for name in compared.norms]
    return ("layer", *(f"factor, {name}" for name in names[1:]), *norms)


def _numbers(compared: Comparison) -> Iterator[tuple[str, ...]]:
    factors = [numbers for name, numbers in compared.factors.items() if name != "none"]
    for row in zip(compared.layers, *factors, *compared.norms.values(), strict=True):
        yield row[0], *(f"{number:.5g}" for number in row[1:])


def _plan(plan: Plan, compared: Comparison) -> Iterator[str]:
    yield "<h2>The plan</h2>"
    yield _facts(terminal.fact_rows(plan))
    yield "<h2>Rules</h2>"
    yield _rules(compared)
    yield from _losses(plan)
    if plan.tensors:
        yield "<h2>What is scaled</h2>"
        yield _folded(
            "Layers and tensors", terminal.layer_rows(plan.tensors), terminal.LAYER_HEADER
        )
    if plan.overrides:
        yield "<h2>The same without rewriting</h2>"
        yield _facts(plan.overrides.items())
    yield "<h2>Files</h2>"
    yield _facts(terminal.byte_rows(plan))
    files = [(f.name, f.action, f.why or "") for f in plan.files]
    yield _folded("Every file", files, ("file", "action", "why"))


def _losses(plan: Plan) -> Iterator[str]:
    """The trials that led to the rule, and the loss on a text."""
    if guard := plan.guard:
        yield "<h2>Rules tried</h2>"
        yield _table(losses.guard_rows(guard), losses.GUARD_HEADER)
        yield f"<p>{_text(losses.guard_note(guard))}</p>"
    if evaluation := plan.evaluation:
        yield "<h2>Loss</h2>"
        yield from _evaluation(evaluation)


def _evaluation(evaluation: Evaluation) -> Iterator[str]:
    """The losses on a text: a chart with a line for each rule, and a table."""
    yield '<div class="charts">'
    yield _framed("Loss", _loss_chart(evaluation), losses.evaluation_note(evaluation))
    yield "</div>"
    yield _table(losses.evaluation_rows(evaluation), losses.EVALUATION_HEADER)


def _loss_chart(evaluation: Evaluation) -> str:
    """The losses by number of experts; at the trained number, all rules have the same loss."""
    trained = evaluation.experts, evaluation.loss
    found: dict[str, dict[Count, float]] = {}
    for run in evaluation.runs:
        found.setdefault(run.rule, dict([trained]))[run.experts] = run.loss
    counts = sorted({trained[0], *(run.experts for run in evaluation.runs)}, key=_mean)
    series = [
        Series(
            losses.rule_name(rule),
            LINE_STYLES.get(rule, LINE_STYLES["own"]),
            [(float(x), line[count]) for x, count in enumerate(counts) if count in line],
        )
        for rule, line in found.items()
    ]
    point = [(float(counts.index(trained[0])), trained[1])]
    series.append(Series("as trained", LineStyle("ink", "", "circle"), point, taken=True))
    described = f"As trained, with {count_text(trained[0])} experts: {trained[1]:.4f}. " + " ".join(
        f"{losses.rule_name(run.rule)}, {count_text(run.experts)} experts: {run.loss:.4f}."
        for run in evaluation.runs
    )
    title = "Loss by number of experts"
    names = [(float(x), count_text(count)) for x, count in enumerate(counts)]
    x = chart.name_axis("experts per token", names)
    y = chart.number_axis("loss, nats per token", [y for one in series for _, y in one.points])
    return chart.chart("loss", title, described, x, y, series)


def _mean(count: Count) -> float:
    return float(count) if isinstance(count, int) else sum(count) / len(count)


def _rules(compared: Comparison) -> str:
    taken = [name == compared.taken for name in compared.factors]
    header = ("", "rule", "factor", f"norm, {BASES[compared.basis]}", "")
    return _table(_rule_rows(compared), header, taken)


def _rule_rows(compared: Comparison) -> Iterator[tuple[str, ...]]:
    for name, factors in compared.factors.items():
        yield (
            "this plan" if name == compared.taken else "",
            compared.name(name),
            span(factors, ".6g"),
            span(compared.norms.get(name, ()), ".3f"),
            terminal.RULE_NOTES.get(name, ""),
        )


def _provenance(plan: Plan) -> Iterator[str]:
    given = options_given(plan.options)
    yield "<h2>Provenance</h2>"
    yield _facts(
        [
            ("moescale", __version__),
            ("source", plan.source.name),
            ("commit", plan.source.revision or "none: a local source"),
            *((f"--{name.replace('_', '-')}", _option(value)) for name, value in given.items()),
        ]
    )


def _option(value: object) -> str:
    if isinstance(value, Mapping):
        return f"for {len(value)} layers"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folded(title: str, rows: Iterable[tuple[str, ...]], header: Sequence[str]) -> str:
    """A table under its title, collapsed if it is long."""
    known = list(rows)
    opened = ' open="open"' if len(known) <= _FEW_ROWS else ""
    return f"<details{opened}><summary>{_text(title)}</summary>{_table(known, header)}</details>"


def _table(rows: Iterable[Sequence[str]], header: Sequence[str], taken: Iterable[bool] = ()) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        ('<tr class="taken">' if mark else "<tr>") + "".join(map(_cell, row)) + "</tr>\n"
        for row, mark in zip_longest(rows, taken)
    )
    return _scrolled(f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>")


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{_cell(value)}</tr>\n' for name, value in rows
    )
    return _scrolled(f'<table class="facts"><tbody>\n{body}</tbody></table>')


def _scrolled(table: str) -> str:
    """A table that scrolls on a narrow screen, also with the keyboard."""
    return f'<div class="scroll" role="region" aria-label="Table" tabindex="0">{table}</div>'


def _cell(text: str) -> str:
    return f"<td>{_text(text)}</td>"


def _text(text: str) -> str:
    return chart.escaped(text)
