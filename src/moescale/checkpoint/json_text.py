"""Parses JSON strictly, and finds the positions of values, so that one number can be replaced.

Python's `json` accepts more than the loaders of a checkpoint do (NaN, ``-0``, lone surrogates), and
does not report positions. Both matter: what safetensors rejects is rejected here, and every byte of
a ``config.json`` outside the edited number stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from moescale.checkpoint.json_faults import fault_in

Span = tuple[int, int]
Path = tuple[str | int, ...]

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"-?Infinity|NaN|true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def parse_strict(text: str) -> Any:
    """Parse JSON as serde_json does: no duplicate keys, no NaN, no lone surrogates, no ``-0``.

    Raises:
        ValueError: the text is invalid; the message is one line.
    """
    return _parse(
        text,
        object_pairs_hook=_unique,
        parse_constant=_no_constant,
        parse_int=_integer,
        check_surrogates=True,
    )


DEEPEST = 200
"""The maximum nesting depth of a config; walking through it needs one stack frame per level."""

MOST_DIGITS = 640
"""The maximum number of digits of an integer; Python's own limit is never lower."""


def parse_lenient(text: str) -> Any:
    """Parse JSON as `json.loads` does (a ``config.json`` may hold ``Infinity``).

    Raises:
        ValueError: the text is invalid; the message is one line.
    """
    value = _parse(text, parse_int=_whole)
    level, depth = [value], 0
    while level := [part for item in level for part in _parts(item)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
    return value


def _parts(value: Any) -> Iterable[Any]:
    """The objects and arrays directly inside a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in inner if isinstance(part, (dict, list)))


def _parse(text: str, *, check_surrogates: bool = False, **hooks: Any) -> Any:
    if check_surrogates and re.search(r"\\u[dD][89a-fA-F]", text):
        # A lone surrogate can only come from an escape; an escaped pair decodes to one character.
        try:
            json.dumps(json.loads(text, parse_int=_whole), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string contains a lone surrogate") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise fault_in(text, error) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is not an integer")
    return _whole(digits)


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def value_spans(text: str, wanted: Callable[[Path], bool]) -> Iterator[tuple[Path, Span]]:
    """Yield the path and the character span of every value for which `wanted` is true.

    `text` must be valid JSON: parse it first. A key that occurs twice is yielded twice.
    """
    stack: list[tuple[Path, str, int]] = []  # path, "{" or "[", items so far
    path: Path = ()
    position = _skip(text, 0)
    starts: list[int] = []
    while True:
        start = position
        opener = text[position]
        if opener in "{[":
            position = _skip(text, position + 1)
            if text[position] not in "}]":
                stack.append((path, opener, 0))
                starts.append(start)
                path, position = _enter(text, position, path, opener, 0)
                continue
            position += 1
        elif opener == '"':
            position = scanstring(text, position + 1)[1]
        else:
            match = _SCALAR.match(text, position)
            assert match is not None, "the text was parsed before"
            position = match.end()
        if wanted(path):
            yield path, (start, position)
        while stack:
            position = _skip(text, position)
            parent, kind, count = stack[-1]
            if text[position] == ",":
                stack[-1] = (parent, kind, count + 1)
                path, position = _enter(text, _skip(text, position + 1), parent, kind, count + 1)
                break
            stack.pop()
            start = starts.pop()
            position += 1
            path = parent
            if wanted(path):
                yield path, (start, position)
        else:
            return


def _enter(text: str, position: int, parent: Path, kind: str, index: int) -> tuple[Path, int]:
    """The path and the start of the next value inside an object or an array."""
    if kind == "[":
        return (*parent, index), position
    key, position = scanstring(text, position + 1)
    return (*parent, key), _skip(text, _skip(text, position) + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def replace_spans(text: str, edits: list[tuple[Span, str]]) -> str:
    """Replace character spans; everything outside them stays."""
    for (start, stop), new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text
