"""The faults of other projects that tests meet still exist, and are not in moescale."""

from __future__ import annotations

import re

import pytest
from support import TESTS
from support.known_faults import FAULTS, HERE, Fault


@pytest.mark.parametrize("fault", HERE, ids=str)
def test_a_fault_shows_without_anything_of_ours(fault: Fault) -> None:
    """The reproductions in the table fail as stated; if one passes, its fault has been fixed."""
    assert "moescale" not in fault.reproduction
    with pytest.raises(fault.raises):
        exec(fault.reproduction, {})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.package)
def test_a_fault_is_met_by_a_test(fault: Fault) -> None:
    """A row is removed with its last test."""
    name = re.match(r"\w+", fault.tests)[0]
    files = TESTS.rglob("test_*.py")
    assert any(f"def {name}(" in file.read_text(encoding="utf-8") for file in files)
