#!/usr/bin/env python3
"""Writes the tables of options, model types, formats and files into README and docs/.

python scripts/tables.py          # writes
python scripts/tables.py --check  # fails if they are not up to date
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from moescale.cli import OutputOptions, app
from moescale.families import architectures, formats, llama_cpp
from moescale.families.listing import ModelType, model_types
from moescale.options import ConvertOptions, option_rows

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "moescale"
START, END = "<!-- {}: made by scripts/tables.py -->\n", "<!-- end of {} -->\n"


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page is not up to date")
    check = parser.parse_args().check
    for name, tables in PAGES.items():
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = with_tables(old, tables)
        if not check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{name} is not up to date; run: python scripts/tables.py")


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with fresh tables."""
    for name, table in tables.items():
        start, end = START.format(name), END.format(name)
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text


def counts() -> str:
    """How many model types and tensor formats the tables know."""
    types = len({row.model_type for row in architectures.ROWS})
    kinds = len({row.name for row in formats.ROWS})
    refused = len({row.name for row in formats.UNSUPPORTED})
    return (
        f"[The tables](docs/models.md) list {types} model types and {kinds} tensor formats;"
        f" {refused} more formats are refused by name.\n"
    )


def options_table() -> str:
    """Every option of the command, with its help text."""
    command = typer.main.get_command(app)
    rows = option_rows(OutputOptions) | option_rows(ConvertOptions)
    lines = ["| option | meaning |", "|---|---|"]
    for parameter in command.get_params(typer.Context(command)):  # with the texts of --help
        if parameter.param_type_name == "option":
            row = rows.get(parameter.name)
            lines.append(f"| {spelling(parameter)} | {row.text if row else parameter.help} |")
    return "\n".join(lines) + "\n"


def spelling(option: typer.core.TyperOption) -> str:
    """All names of an option, and what its value is called."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {option.metavar}"


def types_table() -> str:
    """Every model type: what happens to its experts, and what its router allows."""
    lines = [
        "| model type | what happens | `--fold config` | `--rule gates` | `--gate-scale` |",
        "|---|---|---|---|---|",
    ]
    rows = [types_row(row) for row in model_types() if row.format == "safetensors"]
    return "\n".join([*lines, *rows]) + "\n"


def types_row(row: ModelType) -> str:
    """One model type, or one part of it."""
    name = f"`{row.model_type}`" + (f" ({row.part})" if row.part else "")
    effect = row.effect.replace("--rule none", "`--rule none`")
    folds = "yes" if row.fold_config else "no"
    return f"| {name} | {effect} | {folds} | {row.gates} | {row.gate_scale} |"


def llama_table() -> str:
    """Every architecture of llama.cpp: its router, what can be done, and whether it was run."""
    run = json.loads((ROOT / "tests" / "support" / "llama_models.json").read_text(encoding="utf-8"))
    lines = [
        "| architecture | weights of the chosen | what happens | `--rule gates` | `--fold config`"
        " | `--fold scale` | run |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in model_types() if row.format == "gguf"]
    return "\n".join([*lines, *(llama_row(row, row.model_type in run) for row in rows)]) + "\n"


def llama_row(row: ModelType, run: bool) -> str:
    """One architecture."""
    weighs = {"always": "sum to 1", "never": "not renormalised", "key": "`expert_weights_norm`"}
    own = weighs[llama_cpp.BY_NAME[row.model_type].renormalises]
    effect = row.effect.replace("--rule none", "`--rule none`")
    yes = {True: "yes", False: "no"}
    cells = (effect, row.gates, yes[row.fold_config], yes[row.fold_scale], yes[run])
    return f"| `{row.model_type}` | {own} | {' | '.join(cells)} |"


def formats_table() -> str:
    """Tensor formats by how exact scaling is."""
    kinds: dict[str, list[str]] = {}
    for row in formats.ROWS:
        kinds.setdefault(kind(row), []).append(row.name)
    lines = ["| tensor formats | what happens |", "|---|---|"]
    lines += [f"| {', '.join(dict.fromkeys(names))} | {what} |" for what, names in kinds.items()]
    refused = ", ".join(dict.fromkeys(row.name for row in formats.UNSUPPORTED))
    return "\n".join([*lines, f"| {refused} | refused by name, with the reason |"]) + "\n"


def kind(row: formats.Format) -> str:
    """What is scaled, and how."""
    parts = [part for part in row.scaled.values() if part.role == "scale"]
    if not parts:
        return "the weight itself, in its own dtype"
    if any(part.operation == "shift" for part in parts):
        return "the scale is a power of two, so is the factor; anything else is refused"
    if any(part.as_f32 for part in parts):
        return "the scale; in 16 bits it is widened to F32 (the shard's header changes)"
    return "the scale, in its own dtype; every code stays bit-identical"


PACKAGES = (
    *("", "report", "conversion", "calibrate", "planning", "planning/formats", "families"),
    *("routers", "factors", "storage", "storage/local", "storage/hub", "checkpoint"),
    *("checkpoint/safetensors", "checkpoint/gguf"),
)
"""The packages, from the top layer to the lowest."""


def files_map() -> str:
    """Every module, and what it says it is."""
    blocks = []
    for name in PACKAGES:
        folder = PACKAGE / name
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        title = f"moescale/{name}".rstrip("/")
        blocks.append(
            f"### {title}\n\n{summary(folder / '__init__.py')}\n\n| file | |\n|---|---|\n"
            + "".join(f"| `{path.name}` | {summary(path)} |\n" for path in modules)
        )
    return "\n".join(blocks)


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, for Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"counts": counts},
    "docs/models.md": {"types": types_table, "formats": formats_table},
    "docs/options.md": {"options": options_table},
    "docs/architecture.md": {"files": files_map},
    "docs/gguf.md": {"architectures": llama_table},
}


if __name__ == "__main__":
    main()
