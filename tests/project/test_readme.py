"""README and docs/ agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from support import checkpoints

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_code() -> None:
    """Model types, formats and options on the pages are generated from the tables in the code."""
    command = [sys.executable, str(ROOT / "scripts" / "tables.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_the_file_map_is_true() -> None:
    """Every file of the map exists, and every module is listed below its package."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {
        f"{folder}/{file}"
        for folder, _, rows in (part.partition("\n") for part in text.split("\n### ")[1:])
        for file in re.findall(r"^\| `(\w+\.py)` \|", rows, re.MULTILINE)
    }
    modules = (ROOT / "src" / "moescale").rglob("*.py")
    found = {path.relative_to(ROOT / "src").as_posix() for path in modules}
    assert named == {name for name in found if not name.endswith("/__init__.py")}


def run_example(page: str, folder: Path) -> list[str]:
    """The output of the first Python example of a page, run beside a small Mixtral."""
    text = (ROOT / page).read_text(encoding="utf-8").partition("# From Python")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    assert {"plan", "convert", "verify"} == set(re.findall(r"moescale\.(\w+)\(", code))
    checkpoints.mixtral(folder / "Mixtral-8x7B")
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return child.stdout.splitlines()


def test_the_example_from_python_runs(tmp_path: Path) -> None:
    """The code in docs/python.md runs."""
    first, *between, last = run_example("docs/python.md", tmp_path)
    assert first.startswith("1.2247")
    assert any(line.endswith(": 100%") for line in between)
    assert last == "new None"


def test_the_short_example_from_python_runs(tmp_path: Path) -> None:
    """The ten lines in the README run."""
    assert run_example("README.md", tmp_path) == [
        "preserve 1.224744871391589 0.8164965809277261",
        "new",
    ]


def test_the_readme_is_a_front_page() -> None:
    """It has at most 150 lines, and every page that it and docs/index.md link to exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
        assert all((page.parent / link).exists() for link in links), page
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([^)]+)\)", index))


def test_the_figure_of_the_study_is_whole_in_itself() -> None:
    """It is an SVG with a background and a title, and loads nothing."""
    text = (ROOT / "docs" / "study.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{svg}title") is not None
    background = root.find(f"{svg}rect")
    assert background is not None and background.get("width") == root.get("width")
    assert not re.search(r"href|<script|@import|url\((?!#)", text)
    assert "docs/study.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
