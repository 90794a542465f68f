#!/usr/bin/env python3
"""Writes the tables of supported model types and formats into the README.

python scripts/tables.py          # writes
python scripts/tables.py --check  # only says whether the README is up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from moescale.model import architectures, formats
from moescale.model.architectures import Architecture

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- tables: made by scripts/tables.py -->\n", "<!-- end of tables -->\n"


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
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{types_table()}\n{formats_table()}\n{END}{after}"


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


if __name__ == "__main__":
    main()
