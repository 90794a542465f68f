"""The README says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import checkpoints

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


def test_the_example_from_python_runs(tmp_path: Path) -> None:
    """The code under "From Python" does what it says, on a small Mixtral of its name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From Python")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    assert {"plan", "convert", "verify"} == set(re.findall(r"moescale\.(\w+)\(", code))
    checkpoints.mixtral(tmp_path / "Mixtral-8x7B")
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    first, *between, last = child.stdout.splitlines()
    assert first.startswith("1.2247")
    assert any(line.endswith(": 100%") for line in between)
    assert last == "new None"
    assert child.stderr == ""


def test_the_figure_of_the_study_is_whole_in_itself() -> None:
    """It is an SVG with a background and a title, and fetches nothing."""
    text = (ROOT / "docs" / "study.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{svg}title") is not None
    background = root.find(f"{svg}rect")
    assert background is not None and background.get("width") == root.get("width")
    assert not re.search(r"href|<script|@import|url\((?!#)", text)
    assert "docs/study.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
