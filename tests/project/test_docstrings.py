"""Docstrings name only arguments and attributes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(p for folder in ("src", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))

Documented = ast.FunctionDef | ast.ClassDef


def listed(node: Documented, section: str) -> set[str]:
    """The names in a section of a docstring."""
    text = ast.get_docstring(node) or ""
    match = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return set(re.findall(r"^    (\w+): ", match[1], re.MULTILINE)) if match else set()


def present(node: Documented) -> set[str]:
    """Arguments of a function; fields, methods and attributes of a class."""
    arguments = {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
    if isinstance(node, ast.FunctionDef):
        return arguments
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and n.target}
    methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    return fields | methods | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_lists_what_there_is(path: Path) -> None:
    """Every argument and attribute that a docstring describes exists."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Documented):
            assert listed(node, "Args") <= present(node), (path, node.name)
            assert listed(node, "Attributes") <= present(node), (path, node.name)
