"""Finds the routed down-projections by the user's regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moescale.checkpoint.tensor import Tensor
from moescale.errors import UsageError
from moescale.families.formats import split_name
from moescale.families.projections import (
    NUMBER,
    Layer,
    Projection,
    drop_single_stack,
    in_order,
    stack_of,
)

Span = tuple[int, int]


def find_by_pattern(tensors: Iterable[Tensor], pattern: str) -> list[Projection]:
    """Find the projections whose tensor names match a regular expression as a whole.

    The groups ``layer`` and ``expert`` capture the numbers; without them, the first number between
    dots is the layer and the second the expert. Ctrl-C interrupts an expression that backtracks
    without end.

    Raises:
        UsageError: the expression is invalid, or matches a name without a layer number.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--pattern {pattern!r} is not a valid expression: {error}") from None
    by_name = {tensor.name: tensor for tensor in tensors}
    found: dict[str, Projection] = {}
    for name in by_name:
        if match := expression.fullmatch(name):
            module, _ = split_name(name)
            found.setdefault(module, _by_spans(name, module, *_spans(match)))
    for name, tensor in by_name.items():  # biases and scales, even if they do not match
        module, suffix = split_name(name)
        if module in found:
            found[module].by_suffix[suffix] = tensor
    drop_single_stack(found.values())
    return in_order(found.values())


def _spans(match: re.Match[str]) -> tuple[Span, Span | None]:
    """The positions of the layer and expert numbers in a name."""
    groups = {key: match.span(key) for key, value in match.groupdict().items() if value}
    numbers = [m.span() for m in re.finditer(r"(?<![^.])\d+(?![^.])", match.string)]
    if "layer" in groups:
        return groups["layer"], groups.get("expert")
    if not numbers:
        raise UsageError(
            f"--pattern matches {match.string!r}, in which no layer number can be found"
        )
    return numbers[0], groups.get("expert", numbers[1] if len(numbers) > 1 else None)


def _by_spans(name: str, module: str, layer: Span, expert: Span | None) -> Projection:
    """The projection whose layer and expert numbers are at the given positions of its name."""
    start, stop = layer
    numbers = [name[start:stop]] if expert is None else [name[start:stop], name[slice(*expert)]]
    for number in numbers:
        if not re.fullmatch(NUMBER, number):
            raise UsageError(f"--pattern: a group captures {number!r} in {name!r}, not a number")
    before = name[:start]
    if expert is not None and expert[1] <= start:
        before = name[: expert[0]] + name[expert[1] : start]
    stack = stack_of(before)
    which = None if expert is None else int(numbers[1])
    return Projection(module, Layer(stack, int(numbers[0])), which, (start, stop))
