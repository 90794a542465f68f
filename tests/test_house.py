"""The house: imports point downwards, and the rooms below the plan know nothing of each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "moescale"

BELOW = {"errors", "version", "checkpoint", "rules", "model", "repos"}
"""What the plan and all that reads it stand on."""

MAY_USE = {
    "errors": set(),
    "checkpoint": {"errors"},
    "rules": {"errors"},
    "options": {"errors", "checkpoint"},
    "model": {"errors", "checkpoint"},
    "repos": {"errors", "checkpoint", "version"},
    "planning": {*BELOW, "options"},
    "running": {*BELOW, "options", "planning"},
    "measuring": {*BELOW, "options", "planning", "running"},
    "report": {*BELOW, "planning", "running", "api"},
}
"""What each room may import of the package besides itself."""


def imports(path: Path) -> set[str]:
    """The rooms and modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "moescale":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moescale."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moescale.")}
    return found


def files_of(room: str) -> list[Path]:
    """The modules of a room, or the one that has no room."""
    file = PACKAGE / f"{room}.py"
    return [file] if file.exists() else sorted((PACKAGE / room).glob("*.py"))


@pytest.mark.parametrize("room", MAY_USE)
def test_a_room_knows_only_what_is_below(room: str) -> None:
    """A room imports itself and what lies below it, nothing else of the package."""
    files = files_of(room)
    assert files
    for path in files:
        assert imports(path) <= MAY_USE[room] | {room}, path


def test_nothing_imports_the_command() -> None:
    """Only the start of the program knows the command line."""
    users = {p.name for p in PACKAGE.rglob("*.py") if "cli" in imports(p)}
    assert users == {"__main__.py"}


def test_a_plan_needs_no_numpy() -> None:
    """Numpy is 15 MB and half of the start-up time; only rules that sample, and runs, load it."""
    code = "import sys; from moescale import api; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
