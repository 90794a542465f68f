"""Plans side by side: what their table shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gated_checkpoints import gated_mixtral

from moescale import compare, plan
from moescale.report.losses import plan_table_rows


def test_plans_with_the_same_experts_share_the_norms_of_one_that_sampled(tmp_path: Path) -> None:
    """A plan without `gates` samples no router, and alone it shows the norm of a balanced gate."""
    source = tmp_path / "source"
    gated_mixtral(source)
    table = compare(source, experts=[3, 4], rules=["none", "gates", "preserve"])
    for none, gates, preserve in (table.plans[:3], table.plans[3:]):
        sampled = gates.comparison.norms
        assert none.comparison.norms["none"] != pytest.approx(sampled["none"], rel=1e-4)
        assert table.norms(none) == sampled["none"]
        assert table.norms(gates) == sampled["gates"]
        assert table.norms(preserve) == sampled["preserve"]
    assert len({row[4] for row in plan_table_rows(table)}) > 3


def test_without_a_sampled_plan_each_shows_its_own_norm(tmp_path: Path) -> None:
    """The same as in a plan alone."""
    source = tmp_path / "source"
    gated_mixtral(source)
    table = compare(source, experts=[3], rules=["none"])
    (only,) = table.plans
    assert table.norms(only) == plan(source, experts=3, rule="none").comparison.norms["none"]
