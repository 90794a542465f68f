"""Columns of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moescale.errors import printable


def table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """Rows in columns, under a header if there is one; nothing of none."""
    shown = (tuple(map(printable, row)) for row in rows)  # names of tensors may hold anything
    lines = [*([header] if header else []), *shown]
    if len(lines) <= bool(header):
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def span(numbers: Sequence[float], form: str) -> str:
    """The smallest and the largest, or one where they look alike; nothing of none."""
    ends = [f"{end:{form}}" for end in (min(numbers), max(numbers))] if numbers else []
    return " to ".join(dict.fromkeys(ends))


def count_text(count: int | tuple[int, ...]) -> str:
    """A number of experts, or those of each layer."""
    return str(count) if isinstance(count, int) else ",".join(map(str, count))
