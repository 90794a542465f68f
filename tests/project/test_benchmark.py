"""The scripts that measure time, memory and traffic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize("script", ["benchmark.py", "hub_benchmark.py"])
def test_a_size_below_the_smallest_model_is_refused(script: str) -> None:
    """A figure is never measured on a larger model than requested."""
    command = [sys.executable, str(SCRIPTS / script), "--gigabytes", "0.5"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 2
    assert "is 0.5: the smallest model has 1.4" in child.stderr
