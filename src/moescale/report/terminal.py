"""Plans, records and results as text for the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.gguf.types import NOISE
from moescale.errors import bytes_text, printable
from moescale.families.listing import ModelType
from moescale.planning.comparison import BASES
from moescale.planning.files import Action
from moescale.planning.plan import Plan
from moescale.planning.provenance import measured_on
from moescale.report import losses
from moescale.report.table import count_text, span, table

if TYPE_CHECKING:
    from moescale.planning.active import Active
    from moescale.results import Record, Result

LAYER_HEADER = ("layers", "tensors", "of", "dtype", "factor")

RULE_NOTES = {"published": "mergekit issue 294"}

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "#"
"""Characters for the columns of a chart: in eighths of a line, or in whole lines."""

_CHART_ROWS, _CHART_WIDTH = 4, 64
_FEW_ROWS = 6


def blocks_for(stream: TextIO) -> str:
    """The characters for charts on this stream: `BLOCKS` if it can show them, otherwise `ASCII`."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "") == "dumb"
    try:
        BLOCKS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        plain = True
    return ASCII if plain else BLOCKS


def plan_text(plan: Plan, verbose: bool = False, blocks: str = ASCII) -> str:
    """The plan as a page of text, with a chart of `blocks`: `BLOCKS` or `ASCII`."""
    parts = [
        table(fact_rows(plan)),
        _rules(plan),
        losses.guard_text(plan.guard),
        _layers(plan.tensors, verbose),
        _factor_chart(plan.factors, blocks),
        table(byte_rows(plan)),
        table(("left out", f.name, f.why or "") for f in plan.files if f.action == "skip"),
        losses.evaluation_text(plan.evaluation),
    ]
    if verbose:
        parts.append(
            table(
                (
                    (
                        t.shard,
                        t.tensor.name,
                        t.tensor.dtype,
                        str(list(t.tensor.shape)),
                        f"{t.factor:.9g}",
                    )
                    for t in plan.tensors
                ),
                header=("shard", "tensor", "dtype", "shape", "factor"),
            )
        )
        parts.append(table((f.action, f.name, f.why or "") for f in plan.files))
    return "\n\n".join(part for part in parts if part)


def types_text(types: Iterable[ModelType]) -> str:
    """Every model type and its treatment, in two columns."""
    kinds = {"gguf": "GGUF"}
    named = ((row, row.part or kinds.get(row.format)) for row in types)
    return table(
        (f"{row.model_type} ({more})" if more else row.model_type, row.effect)
        for row, more in named
    )


def record_text(record: Record) -> str:
    """How an output was made, and the state of its files."""
    content = record.content
    source, experts, factors = (
        value if isinstance(value := content.get(key), dict) else {}
        for key in ("source", "experts", "factors")
    )
    commit = f", commit {source.get('revision')}" if source.get("revision") else ""
    numbers = [f for f in factors.values() if isinstance(f, int | float)]
    rows = [
        ("output", record.output),
        ("made by", f"moescale {content.get('moescale')}"),
        ("from", f"{source.get('id')}{commit}"),
        ("model", str(content.get("model_type"))),
        ("options", record.options or "not readable"),
        ("rule", f"{content.get('rule')}, factor {span(numbers, '.6g')} in {len(factors)} layers"),
        ("experts per token", f"{experts.get('from')} -> {experts.get('to')}"),
        ("files", _files_text(record)),
    ]
    verify = "To verify every byte against the source: moescale SRC {0} --verify"
    return f"{table(rows)}\n\n{verify.format(printable(record.output))}"


def _files_text(record: Record) -> str:
    if not record.read + record.sized:
        return "no sizes or digests recorded"
    compared = f"{record.read} compared by SHA-256, {record.sized} by size only"
    if record.differences:
        return f"{len(record.differences)} changed since they were written; {compared}"
    return f"unchanged since they were written; {compared}"


def fact_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Names and values that describe the plan."""
    yield "source", f"{plan.source.id} ({plan.source.where})"
    to = plan.location
    yield "destination", "none given" if to is None else f"{to.text} ({to.kind})"
    part = f", part {plan.part}" if plan.part else ""
    yield "model", f"{plan.model_type}{part}: {layers_text(plan)}"
    if plan.router is not None:
        sums = "sum to 1" if plan.router.renormalised else "are not renormalised"
        yield "router", f"the weights of the chosen experts {sums}"
    if plan.options.fold == "config":
        yield "fold", f"into the config: {_new_scales(plan)}; every weight is copied"
    elif plan.fold_key and plan.options.fold is None and plan.changed_tensors:
        yield "fold", f"--fold config multiplies {plan.fold_key} and changes no weight"
    elif plan.options.fold == "residual":
        yield "fold", "everything else that writes into the residual stream is divided"
    if scales := tuple(plan.router_scales.values()):
        yield (
            "gate",
            f"the routers' weights are multiplied by {span(scales, '.4g')}: {_sharpness(scales)}",
        )
    if plan.calibration:
        yield "calibrated", f"on {measured_on(plan.calibration)}"
    if plan.why:
        yield "rule", f"{plan.rule} ({plan.why})"
    if (error := plan.factor_error) is not None:
        yield "factors", f"from random inputs; standard error at most {error:.2%}"
    before, after = count_text(plan.experts.before), count_text(plan.experts.after)
    trained = (
        ""
        if plan.experts.trained == plan.experts.before
        else (f" (weights trained with {count_text(plan.experts.trained)})")
    )
    if plan.active is not None:
        yield "active", active_text(plan.active)
    yield "experts per token", f"{before} -> {after}{trained}"


def _new_scales(plan: Plan) -> str:
    scales = plan.config_overrides.scales if plan.config_overrides else ()
    return ", ".join(f"{s.path} {s.before:g} -> {s.after:.6g}" for s in scales) or "as it is"


_SCALES = {
    "parameters": (
        ("billion parameters", 1e9),
        ("million parameters", 1e6),
        ("thousand parameters", 1e3),
        ("parameters", 1),
    ),
    "bytes": (("GB of weights", 1e9), ("MB of weights", 1e6), ("bytes of weights", 1)),
}


def active_text(active: Active) -> str:
    """How much of the model a token uses, and roughly the change in time per token."""
    scales = _SCALES[active.unit]
    unit, each = next((scale for scale in scales if active.total >= scale[1]), scales[-1])
    ends = dict.fromkeys(f"{count / each:.3g}" for count in (active.before, active.after))
    text = f"{' -> '.join(ends)} of {active.total / each:.3g} {unit}"
    return text if len(ends) == 1 else f"{text} per token: x {active.ratio:.2g} the time"


def _sharpness(scales: Sequence[float]) -> str:
    low, high = min(scales), max(scales)
    if low == high == 1:
        return "as it was"
    return "sharper" if low >= 1 else "flatter" if high <= 1 else "sharper or flatter, by layer"


def layers_text(plan: Plan) -> str:
    """The number of MoE layers, and of experts in each."""
    plural = "s" * (len(plan.factors) > 1)
    return f"{len(plan.factors)} MoE layer{plural} of {plan.experts.total} routed experts"


def _rules(plan: Plan) -> str:
    """Every rule that can be computed, with its effect on the norm of the routed output."""
    compared = plan.comparison
    notes = {**RULE_NOTES, "none": compared.name("none")}
    head = f"norm, {BASES[compared.basis]}"
    if compared.basis == "balanced":
        head, notes["own"] = "expected norm", "norm if the gate is balanced"
        if plan.router is not None and not plan.router.renormalised:
            notes["preserve"] = "if the gate is balanced; --rule gates samples it"
    rows = []
    for name, factors in compared.factors.items():
        mark = "->" if name == compared.taken else ""
        shown = f"--{plan.rule}" if name == "own" else name
        norm = span(compared.norms.get(name, ()), ".3f")
        note = notes.get(name, "")
        rows.append((mark, shown, span(factors, ".6g"), norm and f"x {norm}", note))
    return table(rows, header=("", "rule", "factor", head, ""))


def layer_rows(tensors: Iterable[TensorEdit]) -> Iterator[tuple[str, ...]]:
    """One row for each sequence of equal layers."""
    layers: dict[tuple[str, int], Counter[tuple[str, str, float]]] = {}
    for t in tensors:
        kinds = layers.setdefault((t.layer.stack, t.layer.number), Counter())
        widened = f" -> {t.store_as}" if t.store_as and t.factor != 1.0 else ""
        kinds[t.role, t.tensor.dtype + widened, t.factor] += 1
    runs: list[tuple[str, int, int, Counter[tuple[str, str, float]]]] = []
    for (stack, number), kinds in layers.items():
        if runs and runs[-1][0] == stack and runs[-1][2] == number - 1 and runs[-1][3] == kinds:
            runs[-1] = (stack, runs[-1][1], number, kinds)
        else:
            runs.append((stack, number, number, kinds))
    for stack, first, last, kinds in runs:
        span = str(first) if first == last else f"{first}-{last}"
        name = f"{stack}.{span}" if stack else span
        for (role, dtype, scaled_by), count in kinds.items():
            yield name, str(count * (last - first + 1)), role, dtype, f"{scaled_by:.6g}"


def _layers(tensors: Sequence[TensorEdit], verbose: bool) -> str:
    """The scaled tensors: by layer if there are few rows or `verbose`, otherwise by kind.

    This keeps the rules on the first screen; the chart shows the layers.
    """
    rows = list(layer_rows(tensors))
    if verbose or len(rows) <= _FEW_ROWS:
        return table(rows, header=LAYER_HEADER)
    return table(_kind_rows(tensors), header=LAYER_HEADER) + "\n(-v lists the layers)"


def _kind_rows(tensors: Iterable[TensorEdit]) -> Iterator[tuple[str, ...]]:
    kinds: dict[tuple[str, str], list[TensorEdit]] = {}
    for t in tensors:
        kinds.setdefault((t.role, t.tensor.dtype), []).append(t)
    for (role, dtype), alike in kinds.items():
        layers = list(dict.fromkeys(str(t.layer) for t in alike))
        factors = span([t.factor for t in alike], ".6g")
        yield (
            " to ".join(dict.fromkeys((layers[0], layers[-1]))),
            str(len(alike)),
            role,
            dtype,
            factors,
        )


def _factor_chart(factors: Mapping[str, float], blocks: str) -> str:
    """One column per layer or group of layers, scaled from the smallest to the largest factor.

    Empty if all factors are equal.
    """
    columns, each = _columns(list(factors.values()))
    low, high = min(columns), max(columns)
    if f"{low:.4g}" == f"{high:.4g}":
        return ""
    most = _CHART_ROWS * len(blocks)
    levels = [1 + round((column - low) / (high - low) * (most - 1)) for column in columns]
    labels = [f"{high:.4g}", *[""] * (_CHART_ROWS - 2), f"{low:.4g}"]
    lines = [
        f"{label:>8} |" + "".join(_cell(level - floor * len(blocks), blocks) for level in levels)
        for label, floor in zip(labels, reversed(range(_CHART_ROWS)), strict=True)
    ]
    names = [printable(name) for name in factors]
    note = f", a column for each {each} layers" if each > 1 else ""
    title = f"factor by layer, {names[0]} to {names[-1]}{note}"
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _columns(values: Sequence[float]) -> tuple[list[float], int]:
    """At most `_CHART_WIDTH` means of neighbouring values, and the number of values in each."""
    each = -(-len(values) // _CHART_WIDTH)
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    return [sum(part) / len(part) for part in parts], each


def _cell(level: int, blocks: str) -> str:
    """The character of one line of a column, filled to `level` steps."""
    return blocks[min(level, len(blocks)) - 1] if level > 0 else " "


def byte_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """The numbers of files and bytes, read and written."""
    actions = Counter(f.action for f in plan.files)
    words: dict[Action, str] = {
        "rewrite": "rewritten",
        "edit": "edited",
        "copy": "copied",
        "create": "created",
        "skip": "left out",
    }
    yield "files", ", ".join(f"{actions[a]} {word}" for a, word in words.items() if actions[a])
    yield (
        "bytes",
        (
            f"{bytes_text(plan.bytes_read)} read, {bytes_text(plan.bytes_changed)} changed,"
            f" {bytes_text(plan.bytes_written)} written"
        ),
    )


def summary(result: Result, seconds: Mapping[str, float], resumed: int = 0) -> str:
    """A run in two lines, with its remarks between them.

    Args:
        result: the result of the run.
        seconds: the duration of each phase.
        resumed: bytes that an earlier run had written.
    """
    if result.status == "nothing":
        return "Nothing was written: the output would equal the source."
    url = [result.url] if result.url else []
    rounded = [_rounded(result)] if result.rounding else []
    lines = [_first_line(result, seconds, resumed), *rounded, *result.remarks, *url]
    return "\n".join(map(printable, [*lines, _proof(result, seconds)]))


def _first_line(result: Result, seconds: Mapping[str, float], resumed: int) -> str:
    plan, total = result.plan, result.plan.bytes_written
    if result.status == "repair":
        return f"{plan.destination} repaired: rewrote the files that differed."
    if result.status in ("done", "stale"):
        return f"{plan.destination} was already done; nothing was written."
    changed, took = len(plan.changed_tensors), seconds.get("writing", 0.0)
    scaled = f"{changed:,} tensors scaled." if changed else "no weight changed."
    if result.status == "resume":
        old = bytes_text(resumed)
        what = f"resumed and finished: {bytes_text(total)} in all, {old} existed, the rest"
    else:
        what = f"written: {bytes_text(total)}"
    return f"{plan.destination} {what} in {_took(total - resumed, took)}, {scaled}"


def rounding_json(result: Result) -> dict[str, dict[str, float]]:
    """The effect of rounding block scales, by tensor, with that of the type itself."""
    dtypes = {t.tensor.name: t.tensor.dtype for t in result.plan.changed_tensors}
    return {
        name: {**seen.as_json(), "type_rms": NOISE[dtypes[name]]}
        for name, seen in result.rounding.items()
    }


def _rounded(result: Result) -> str:
    """The effect of rounding block scales on the weights, compared with that of the type itself."""
    dtypes = {t.tensor.name: t.tensor.dtype for t in result.plan.changed_tensors}
    name, worst = max(result.rounding.items(), key=lambda item: item[1].worst)
    rms, kind = max((seen.rms, dtypes[n]) for n, seen in result.rounding.items())
    zeroed = sum(seen.zeroed for seen in result.rounding.values())
    return (
        f"Rounding of block scales: at most {rms:.2%} of the weights (rms), compared with"
        f" {NOISE[kind]:.1%} of {kind} itself; the worst block {worst.worst:.1%}, in {name}"
        + (f"; {zeroed:,} scales became 0" if zeroed else "")
        + "."
    )


def _proof(result: Result, seconds: Mapping[str, float]) -> str:
    if not result.verified:
        return "Run the same command with --verify to verify the output."
    took = seconds.get("verifying", 0.0)
    return f"Verified in {_took(result.plan.bytes_written, took)}: every byte matches the plan."


def _took(count: int, seconds: float) -> str:
    rate = f" ({bytes_text(count / seconds)}/s)" if seconds > 0 and count > 0 else ""
    return f"{seconds:.1f} s{rate}"
