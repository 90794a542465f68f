"""The tables and the figure of the study."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from models import BATCH, LAYERS, STUDIES
from texts import CALIBRATED, CONTEXT, WINDOW
from trials import OTHERWISE, RULES, Results

from moescale.report import chart

GAP = 24
EQUAL = 0.0005
"""Losses that differ by less are called equal."""


def page(everything: Sequence[Results], steps: int, pieces: int) -> str:
    """The page, in Markdown."""
    version = ".".join(map(str, sys.version_info[:2]))
    intro = f"""# What each rule does to a trained model

Made by `scripts/study/study.py`.
Four language models with {LAYERS} MoE layers, one for each kind of router, are trained for {steps}
steps of {BATCH * CONTEXT:,} bytes on the source code of Python {version}'s standard library.
Then moescale gives each of them other numbers of experts per token, by every rule, and
transformers runs the output.

{in_short(everything)}
Four small models prove nothing about a large one: `--evaluate` shows what yours loses on your text.

All figures are the loss minus the loss as trained, in nats per byte, on {pieces * CONTEXT:,}
bytes of files that were held back; lower is better.
No sequence of {WINDOW} bytes in them is part of a text that a model was trained on or a rule
was calibrated on.
`measured` and `fitted` were calibrated on {CALIBRATED * CONTEXT:,} bytes of other files, which
share no such sequence with the training text either.

## Summary

{together(everything)}
Differences up to {EQUAL} count as equal.

![Rise of the loss by number of experts, for each router and rule](study.svg)

In the figure, {outside(everything)}.

## Router by router

Values that are at most {EQUAL} above the best are bold.
In brackets is the norm of the routed experts' output, relative to the norm as trained on the same
inputs, as the mean over layers.
"""
    return "\n".join([intro, *map(table, everything), otherwise(everything)])


def in_short(everything: Sequence[Results]) -> str:
    """The main results, in words."""
    more = [(r, m) for r in everything for m in r.trials if m > STUDIES[r.name].trained]
    fewer = [(r, m) for r in everything for m in r.trials if m < STUDIES[r.name].trained]
    won = [(r, m, rule) for r, m in more for rule in RULES if r.rise(rule, m) < -EQUAL]
    lines = [
        f"- With more experts than trained ({len(more)} settings), the rise with `fitted` is"
        f" {share(more):.0%} of that with the config edit; with fewer ({len(fewer)}),"
        f" {share(fewer):.0%}.",
        f"- `fitted` is worse than the config edit, by more than {EQUAL}, at"
        f" {sum(r.rise('fitted', m) > r.rise('none', m) + EQUAL for r, m in more + fewer)} of"
        f" {len(more) + len(fewer)} settings.",
    ]
    if not won:
        lines.append(
            "- **No rule beat the trained number at any setting with more experts.** Rescaling"
            " makes another number cost less; it does not make more experts better."
        )
    else:
        places = ", ".join(f"{r.name} with {m} by {rule}" for r, m, rule in won)
        lines.append(f"- Below the loss as trained: {places}.")
    return "\n".join(lines) + "\n"


def share(cases: Sequence[tuple[Results, int]]) -> float:
    """The rise of the loss with `fitted`, as a share of that with the config edit."""
    return sum(r.rise("fitted", m) for r, m in cases) / sum(r.rise("none", m) for r, m in cases)


def otherwise(everything: Sequence[Results]) -> str:
    """A table of `fitted` on each text, and of the rules that its guard took."""
    lines = [
        "## Another text, or none",
        "",
        "Here `fitted` is calibrated on Python, on English (the descriptions of installed"
        " packages), and on what the model writes itself. In brackets is the rule that its guard"
        " took, if it is another one.",
        "",
        "| | k | config edit alone | Python | " + " | ".join(OTHERWISE.values()) + " |",
        "|---" * (4 + len(OTHERWISE)) + "|",
    ]
    for results in everything:
        for m, taken in results.taken.items():
            cells = [
                f"{results.rise(name, m):.4f}{guarded(taken[name])}"
                for name in ("fitted", *OTHERWISE)
            ]
            edit = f"{results.rise('none', m):.4f}"
            lines.append(f"| {' | '.join((f'`{results.name}`', str(m), edit, *cells))} |")
    return "\n".join(lines) + "\n"


def guarded(taken: str) -> str:
    """The rule that the guard took, in brackets, if it is not `fitted`."""
    return "" if taken == "fitted" else f" ({RULES[taken]})"


def outside(everything: Sequence[Results]) -> str:
    """A sentence that says where `published` leaves the frame of its panel."""
    names = [
        f"`{r.name}`"
        for r in everything
        if max(r.rise("published", m) for m in r.trials) > height(r).high
    ]
    return f"`published` leaves the frame for {' and '.join(names) or 'no router'}"


def table(results: Results) -> str:
    """A table of the rise of the loss and, in brackets, the norm, for every rule and count."""
    title = STUDIES[results.name].title
    lines = [
        f"**`{results.name}`**: {title}. Loss as trained: {results.trained.loss:.4f}.",
        "",
        "| k | " + " | ".join(RULES.values()) + " |",
        "|---" * (len(RULES) + 1) + "|",
    ]
    for m in results.trials:
        best = min(results.rise(rule, m) for rule in RULES)
        cells = [str(m)]
        for rule in RULES:
            rise, norm = results.rise(rule, m), results.norm(rule, m)
            mark = "**" if rise <= best + EQUAL else ""
            cells.append(f"{mark}{rise:.4f}{mark} ({norm:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def together(everything: Sequence[Results]) -> str:
    """A table of how each rule compares with the config edit, over all settings."""
    cases = [(results, m) for results in everything for m in results.trials]
    lines = [
        "| rule | mean rise, more experts | fewer | better than the config edit | worse | largest"
        " loss against it |",
        "|---|---|---|---|---|---|",
    ]
    for rule, heading in RULES.items():
        gains = {f"{r.name}, k={m}": r.rise("none", m) - r.rise(rule, m) for r, m in cases}
        where = min(gains, key=gains.__getitem__)
        lost = f"{-gains[where]:.4f} ({where})" if gains[where] < -EQUAL else "nothing"
        better = sum(gain > EQUAL for gain in gains.values())
        worse = sum(gain < -EQUAL for gain in gains.values())
        means = [
            mean([r.rise(rule, m) for r, m in cases if (m > STUDIES[r.name].trained) == more])
            for more in (True, False)
        ]
        cells = [heading, *means, f"{better} of {len(cases)}", str(worse), lost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean(values: Sequence[float]) -> str:
    """The mean of some rises, as text; empty if there are none."""
    return f"{sum(values) / len(values):.4f}" if values else ""


def figure(everything: Sequence[Results]) -> str:
    """One panel per router, on a light background, as SVG."""
    panels = [panel(results) for results in everything]
    sizes = [re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0] for svg in panels]
    width, height = chart.WIDTH + GAP, max(int(high) for _, high in sizes) + GAP
    placed = [
        svg.replace(
            "<svg ",
            f'<svg x="{GAP + i % 2 * width}" y="{GAP + i // 2 * height}" width="{chart.WIDTH}"'
            f' height="{high}" ',
            1,
        )
        for i, (svg, (_, high)) in enumerate(zip(panels, sizes, strict=True))
    ]
    across, down = 2 * width + GAP, -(-len(panels) // 2) * height + GAP
    whole = f'width="{across}" height="{down}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" {whole}>',
            "<title>What the factor does to four small trained models</title>",
            f"<style>svg {{ {chart.variables(chart.LIGHT)} }}{chart.STYLE}</style>",
            f'<rect {whole} rx="8" fill="var(--paper)"/>',
            *placed,
            "</svg>\n",
        ]
    )


def panel(results: Results) -> str:
    """A chart of the rise of the loss by experts per token."""
    counts = sorted({*results.trials, STUDIES[results.name].trained})
    lines = {
        rule: [results.rise(rule, k) if k in results.trials else 0.0 for k in counts]
        for rule in RULES
    }
    names: dict[tuple[float, ...], list[str]] = {}
    for rule in ("preserve", *RULES):  # a rule with the same values shares its line
        names.setdefault(tuple(lines[rule]), []).append(rule)
    series = [
        chart.Series(
            ", ".join(dict.fromkeys(RULES[rule] for rule in rules)),
            chart.LINE_STYLES[rules[0]],
            list(enumerate(line)),
        )
        for line, rules in names.items()
    ]
    described = " ".join(
        f"{RULES[rule]}: {', '.join(f'{rise:.3f}' for rise in line)}."
        for rule, line in lines.items()
    )
    return chart.chart(
        results.name,
        f"{results.name}: rise of the loss by experts per token",
        described,
        chart.name_axis("experts per token", [(i, str(k)) for i, k in enumerate(counts)]),
        height(results),
        series,
    )


def height(results: Results) -> chart.Axis:
    """The vertical axis of a panel, with room for every rule but `published`."""
    shown = [results.rise(r, m) for r in RULES if r != "published" for m in results.trials]
    return chart.number_axis(f"{results.name}: rise of the loss, nats a byte", [0, *shown])
