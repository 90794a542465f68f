"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moescale.errors import printable


def table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """Rows in aligned columns, under a header if given; empty without rows."""
    shown = (tuple(map(printable, row)) for row in rows)  # tensor names may contain anything
    lines = [*([header] if header else []), *shown]
    if len(lines) <= bool(header):
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def span(numbers: Sequence[float], form: str) -> str:
    """The smallest and the largest number, or one of them if they look the same."""
    ends = [f"{end:{form}}" for end in (min(numbers), max(numbers))] if numbers else []
    return " to ".join(dict.fromkeys(ends))


def count_text(count: int | tuple[int, ...]) -> str:
    """A number of experts, or one number per layer."""
    return str(count) if isinstance(count, int) else ",".join(map(str, count))
