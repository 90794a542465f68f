#!/usr/bin/env python3
"""Writes the tables of options, model types and formats into the README, from the code.

python scripts/tables.py          # writes
python scripts/tables.py --check  # only says whether the README is up to date
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from moescale.cli import app
from moescale.model import architectures, formats
from moescale.model.architectures import Architecture
from moescale.model.gating import GATINGS, Gating, Other

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- {}: made by scripts/tables.py -->\n", "<!-- end of {} -->\n"


def main() -> None:
    """Write or check."""
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if "--check" not in sys.argv:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("README.md is not up to date; run: python scripts/tables.py")


def with_tables(text: str) -> str:
    """The README with fresh tables."""
    for name, table in TABLES.items():
        start, end = START.format(name), END.format(name)
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text


def options_table() -> str:
    """Every option of the command, with its help text."""
    command = typer.main.get_command(app)
    lines = ["| option | meaning |", "|---|---|"]
    for parameter in command.params:
        if parameter.param_type_name == "option":
            lines.append(f"| {spelling(parameter)} | {parameter.help} |")
    return "\n".join(lines) + "\n"


def spelling(option: typer.core.TyperOption) -> str:
    """All names of an option, and what its value is called."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {option.metavar}"


def types_table() -> str:
    """Model types by what can be done with them."""
    groups: dict[str, list[str]] = {}
    for row in architectures.ROWS:
        groups.setdefault(group(row), []).append(name(row))
    lines = ["| model types | what happens |", "|---|---|"]
    lines += [f"| {', '.join(sorted(set(names)))} | {what} |" for what, names in groups.items()]
    return "\n".join(lines) + "\n"


def name(row: Architecture) -> str:
    """The model type, with its part, marked where `--fold config` can be used."""
    return f"`{row.model_type}`" + (f" ({row.part})" if row.part else "") + " ᶠ" * row.folds


def group(row: Architecture) -> str:
    """What happens to models of this type."""
    if row.fixed:
        return f"scaled, but the number of experts stays: {row.fixed}"
    if row.no_effect:
        return f"only `--rule none`: {row.no_effect}"
    if row.partly:
        return f"scaled, with a warning: {row.partly}"
    return "scaled (ᶠ: or folded into the config, `--fold config`)"


def routers_table() -> str:
    """Model types by what can be done with their routers."""
    groups: dict[tuple[str, str], set[str]] = {}
    for row in architectures.ROWS:
        part = f"/{row.part}" if row.part else ""
        what = router_group(row, GATINGS[row.model_type + part])
        groups.setdefault(what, set()).add(name(row).removesuffix(" ᶠ"))
    lines = ["| routers of | `--rule gates` | `--gate-scale` |", "|---|---|---|"]
    lines += [
        f"| {', '.join(sorted(names))} | {gates} | {scale} |"
        for (gates, scale), names in groups.items()
    ]
    return "\n".join(lines) + "\n"


def router_group(row: Architecture, gating: Gating | Other) -> tuple[str, str]:
    """Whether the rule `gates` can be used, and `--gate-scale`."""
    if isinstance(gating, Other):
        return f"no: {gating.why}", "no"
    gates = "no: scaling has no effect" if row.no_effect else "yes"
    if gating.bias:
        return gates, "no: a bias takes part in the choice of experts"
    if row.groups and gating.group_best > 1:
        return gates, "only without groups of experts"
    return gates, "yes"


def formats_table() -> str:
    """Tensor formats by how exact scaling is."""
    kinds: dict[str, list[str]] = {}
    for row in formats.ROWS:
        kinds.setdefault(kind(row), []).append(row.name)
    lines = ["| tensor formats | what happens |", "|---|---|"]
    lines += [f"| {', '.join(dict.fromkeys(names))} | {what} |" for what, names in kinds.items()]
    refused = ", ".join(dict.fromkeys(row.name for row in formats.REFUSED))
    return "\n".join([*lines, f"| {refused} | refused by name, with the reason |"]) + "\n"


def kind(row: formats.Format) -> str:
    """How the scale is changed, and what that rounds."""
    parts = [part for part in row.scaled.values() if part.role == "scale"]
    if not parts:
        return "the weight itself, in its own dtype"
    if any(part.operation == "shift" for part in parts):
        return "the scale is a power of two, so is the factor; anything else is refused"
    if any(part.promote for part in parts):
        return "the scale; in 16 bits it is widened to F32 (the shard's header changes)"
    return "the scale, in its own dtype; every code stays bit-identical"


TABLES: dict[str, Callable[[], str]] = {
    "types": types_table,
    "routers": routers_table,
    "formats": formats_table,
    "options": options_table,
}


if __name__ == "__main__":
    main()
