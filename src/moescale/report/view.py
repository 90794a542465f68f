"""How a plan shows itself from Python: as text, and in a notebook."""

from __future__ import annotations

from moescale.planning.plan import Plan


class _Report:
    """The view that the API gives every plan; what draws is imported where it is wanted."""

    def text(self, plan: Plan) -> str:
        """The plan as a page of text."""
        from moescale.report import terminal

        return terminal.plan_text(plan)

    def html(self, plan: Plan) -> str:
        """The plan for a cell of a notebook."""
        from moescale.report import page

        return page.cell(plan)


REPORT = _Report()
