"""How Python shows a plan: as text, and as HTML in a notebook."""

from __future__ import annotations

from moescale.planning.plan import Plan


class _PlanView:
    """The view that the API attaches to every plan; modules that draw are imported late."""

    def text(self, plan: Plan) -> str:
        """The plan as a page of text."""
        from moescale.report import terminal

        return terminal.plan_text(plan)

    def html(self, plan: Plan) -> str:
        """The plan as HTML for a cell of a notebook."""
        from moescale.report import page

        return page.cell(plan)


PLAN_VIEW = _PlanView()
