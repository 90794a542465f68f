"""Plans of one source side by side, for several numbers of experts or several rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moescale.factors.evaluation import Evaluation
from moescale.planning.comparison import BASES
from moescale.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class PlanTable:
    """Plans to compare; nothing is written.

    Attributes:
        plans: at least one; each number of experts with each rule.
        evaluation: their losses on a text; None if not requested.
        remarks: remarks for the user.
    """

    plans: tuple[Plan, ...]
    evaluation: Evaluation | None = None
    remarks: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all plans and of the evaluation, each once."""
        found = [warning for plan in self.plans for warning in plan.warnings]
        cost = self.evaluation.warnings if self.evaluation else ()
        return tuple(dict.fromkeys([*found, *cost, *self.remarks]))

    def norms(self, plan: Plan) -> tuple[float, ...]:
        """The relative norm in each layer with the rule of one of the plans; empty if unknown.

        Plans with the same number of experts share the best origin that one of them has: a plan
        without a rule samples no router.
        """
        taken, factors = plan.comparison.taken, plan.comparison.factors
        alike = (p.comparison for p in self.plans if p.experts.after == plan.experts.after)
        known = [c for c in alike if taken in c.norms and c.factors[taken] == factors[taken]]
        best = min(known, key=lambda c: [*BASES].index(c.basis), default=plan.comparison)
        return best.norms.get(taken, ())

    def as_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        first = self.plans[0]
        return {
            "source": first.source_json(),
            "plans": [_decided(plan) for plan in self.plans],
            **({"evaluation": self.evaluation.as_json()} if self.evaluation else {}),
            "warnings": list(self.warnings),
        }


def _decided(plan: Plan) -> dict[str, Any]:
    return {
        **plan.decisions(),
        "predicted_norm": plan.predicted_norm,
        "norm_basis": plan.comparison.basis,
        "active": plan.active.as_json() if plan.active else None,
        "overrides": plan.overrides,
    }
