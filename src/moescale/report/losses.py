"""Losses as text: the trials of a guard, losses on a text, and plans side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moescale.errors import printable
from moescale.factors.evaluation import Evaluation
from moescale.factors.fitted import Guard
from moescale.planning.plan_table import PlanTable
from moescale.report.table import count_text, span, table

GUARD_HEADER = ("", "tried", "loss", "vs. config edit", "KL", "vs. config edit")


def guard_rows(guard: Guard) -> Iterator[tuple[str, ...]]:
    """A row for each rule, tried on held-out text."""
    yield "", "as trained", f"{guard.trained:.4f}", "", "", ""
    for trial in guard.trials:
        more, nearer = (
            f"{difference:+.4f} ± {error:.4f}" if trial.rule != "none" else ""
            for difference, error in (
                (trial.difference, trial.standard_error),
                (trial.divergence_difference, trial.divergence_error),
            )
        )
        name = rule_name(trial.rule)
        mark = "->" if trial.rule == guard.taken else ""
        yield mark, name, f"{trial.loss:.4f}", more, f"{trial.divergence:.4f}", nearer


def rule_name(rule: str) -> str:
    """The name of a rule in a comparison."""
    return "config edit alone" if rule == "none" else rule


def guard_note(guard: Guard) -> str:
    """A note on the unit of the numbers, and on the deciding one."""
    decides = {"loss": "loss", "divergence": "KL to the model as trained, not the loss,"}[guard.by]
    return f"nats per token, on {guard.tokens:,} held-out tokens; the lowest {decides} is taken"


def guard_text(guard: Guard | None) -> str:
    """The trials as a table; empty without a guard."""
    if guard is None:
        return ""
    return f"{table(guard_rows(guard), header=GUARD_HEADER)}\n{guard_note(guard)}"


EVALUATION_HEADER = ("experts", "rule", "loss", "perplexity", "vs. config edit")


def evaluation_rows(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """A row for the model as trained, and one for every run."""
    loss = evaluation.loss
    yield count_text(evaluation.experts), "as trained", f"{loss:.4f}", f"{math.exp(loss):.3f}", ""
    for run in evaluation.runs:
        name = rule_name(run.rule)
        more = "" if run.rule == "none" else f"{run.difference:+.4f} ± {run.standard_error:.4f}"
        yield count_text(run.experts), name, f"{run.loss:.4f}", f"{run.perplexity:.3f}", more


def evaluation_note(evaluation: Evaluation) -> str:
    """A note on the unit of the numbers, and on the text."""
    first = "the first " if evaluation.cut else ""
    return f"nats per token, on {first}{evaluation.tokens:,} tokens of {printable(evaluation.text)}"


def evaluation_text(evaluation: Evaluation | None) -> str:
    """The losses as a table; empty without an evaluation."""
    if evaluation is None:
        return ""
    rows = evaluation_rows(evaluation)
    return f"{table(rows, header=EVALUATION_HEADER)}\n{evaluation_note(evaluation)}"


PLAN_TABLE_HEADER = ("experts", "rule", "factor", "router scale", "norm", "active")


def plan_table_rows(plan_table: PlanTable) -> Iterator[tuple[str, ...]]:
    """A row for each plan."""
    for plan in plan_table.plans:
        norm = span(plan_table.norms(plan), ".3f")
        active = plan.active
        yield (
            f"{count_text(plan.experts.before)} -> {count_text(plan.experts.after)}",
            plan.rule,
            span(tuple(plan.factors.values()), ".6g"),
            span(tuple(plan.router_scales.values()), ".4g"),
            norm and f"x {norm}",
            f"x {active.ratio:.3g}" if active else "",
        )


PLAN_TABLE_NOTE = (
    "norm: of the routed output, relative to the model as trained; active: weights that a token"
    " uses"
)


def plan_table_lead(plan_table: PlanTable) -> str:
    """The model of the plans, in one line."""
    first = plan_table.plans[0]
    return (
        f"{printable(first.source.id)}: {first.model_type}, {len(first.factors)} MoE layers of"
        f" {first.experts.total} routed experts"
    )


def plan_table_text(plan_table: PlanTable) -> str:
    """Plans side by side, with their losses if evaluated."""
    parts = [
        plan_table_lead(plan_table),
        table(plan_table_rows(plan_table), header=PLAN_TABLE_HEADER),
        PLAN_TABLE_NOTE,
        evaluation_text(plan_table.evaluation),
    ]
    return "\n\n".join(part for part in parts if part)
