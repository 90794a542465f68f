"""The routed down-projections by an expression of the user's, matched in a child process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable

from moescale.checkpoint.header import Tensor
from moescale.errors import UsageError
from moescale.model.experts import (
    NUMBER,
    Layer,
    Projection,
    drop_single_stack,
    in_order,
    stack_of,
)
from moescale.model.formats import split_name


def find_by_pattern(tensors: Iterable[Tensor], pattern: str) -> list[Projection]:
    """Projections by a user's expression, which has to match the whole tensor name.

    The groups ``layer`` and ``expert`` name the numbers; without them, the first number between
    dots is the layer and the second the expert.

    Raises:
        UsageError: the expression is not valid, takes too long, or matches a name without number.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    found: dict[str, Projection] = {}
    for name, layer, expert in _search_in_child(pattern, list(by_name)):
        if layer is None:
            raise UsageError(f"--pattern matches {name!r}, in which no layer number can be found")
        module, _ = split_name(name)
        found.setdefault(module, _by_spans(name, module, layer, expert))
    for name, tensor in by_name.items():  # a bias or a scale belongs to it, matched or not
        module, leaf = split_name(name)
        if module in found:
            found[module].leaves[leaf] = tensor
    drop_single_stack(found.values())
    return in_order(found.values())


def _by_spans(name: str, module: str, layer: list[int], expert: list[int] | None) -> Projection:
    """The projection whose numbers stand at the given places of a name."""
    start, stop = layer
    numbers = [name[start:stop]] if expert is None else [name[start:stop], name[slice(*expert)]]
    for number in numbers:
        if not re.fullmatch(NUMBER, number):
            raise UsageError(f"--pattern: in {name!r} its group catches {number!r}, no number")
    before = name[:start]
    if expert is not None and expert[1] <= start:
        before = name[: expert[0]] + name[expert[1] : start]
    stack = stack_of(before)
    which = None if expert is None else int(numbers[1])
    return Projection(module, Layer(stack, int(numbers[0])), which, (start, stop))


_SEARCH = r"""
import json, re, signal, sys
pattern, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
try:
    pattern = re.compile(pattern)
except re.error as error:
    sys.exit(f"is not a valid expression: {error}")
found = []
for name in names:
    match = pattern.fullmatch(name)
    if match:
        spans = [m.span() for m in re.finditer(r"(?<![^.])\d+(?![^.])", name)] + [None, None]
        groups = {key: match.span(key) for key, value in match.groupdict().items() if value}
        layer = groups.get("layer", spans[0])
        expert = groups.get("expert", None if "layer" in groups else spans[1])
        found.append((name, layer, expert))
json.dump(found, sys.stdout)
"""

_SEARCH_SECONDS = 0.8
"""Processor time for a few names, so that a busy machine makes no difference."""
_NAMES_A_SECOND = 100_000
_PATIENCE = 10.0 if hasattr(signal, "setitimer") else 2.0
"""More seconds on the clock, for a machine that is busy; Windows has no timer of processor time."""


def _search_in_child(
    pattern: str, names: list[str]
) -> list[tuple[str, list[int] | None, list[int] | None]]:
    """Match in a child process, since an expression can backtrack without end.

    `re` cannot be stopped from within on every system and in every thread; a process can.
    """
    seconds = _SEARCH_SECONDS + len(names) / _NAMES_A_SECOND
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _SEARCH],
            input=json.dumps([pattern, names, seconds]),
            capture_output=True,
            text=True,
            timeout=seconds + _PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        child = None
    if child is None or child.returncode < 0:  # a signal: its timer went off
        raise UsageError(
            f"--pattern {pattern!r} took longer than {seconds:.1f} s for {len(names)} names",
            hint="It backtracks; write it without nested repetitions.",
        )
    if child.returncode:
        raise UsageError(f"--pattern {pattern!r} {child.stderr.strip().splitlines()[-1]}")
    result: list[tuple[str, list[int] | None, list[int] | None]] = json.loads(child.stdout)
    return result
