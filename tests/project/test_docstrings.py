"""Docstrings name all fields of records, and only arguments and attributes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(p for folder in ("src", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in FILES if path.is_relative_to(ROOT / "src")]

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


def fields(record: ast.ClassDef) -> set[str]:
    """The fields of a record that have no docstring of their own."""
    following = [*record.body[1:], ast.Pass()]
    return {
        field.target.id
        for field, after in zip(record.body, following, strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    }


def is_public_record(node: ast.AST) -> TypeGuard[ast.ClassDef]:
    """Whether a node defines a public dataclass or named tuple."""
    if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
        return False
    made = " ".join(map(ast.unparse, (*node.decorator_list, *node.bases)))
    return "dataclass" in made or "NamedTuple" in made


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_field_is_described(path: Path) -> None:
    """Each field of a public record is in its docstring, or has one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if is_public_record(node):
            public = {name for name in fields(node) if not name.startswith("_")}
            assert public <= listed(node, "Attributes"), (path, node.name)
