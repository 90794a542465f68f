"""The README says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_those_of_the_code() -> None:
    """Model types and formats in the README are made from the tables in the code."""
    command = [sys.executable, str(ROOT / "scripts" / "tables.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_the_file_map_is_true() -> None:
    """Every file and folder of the map exists, and every module is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## File map")[2].splitlines()
    named = {
        word.rstrip("/")
        for line in lines
        if line.startswith("      ")
        for word in line.split("  ")[3].split()
    }
    package = ROOT / "src" / "moescale"
    found = {
        path.name
        for path in package.iterdir()
        if not path.name.startswith(("_", "version")) and path.suffix in ("", ".py")
    }
    assert named == found
