"""Reads the number of experts per token in a ``config.json``, and sets it at every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moescale.checkpoint.json_faults import decoded, not_json
from moescale.checkpoint.json_text import (
    Path,
    parse_lenient,
    replace_spans,
    value_spans,
)
from moescale.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Config:
    """A ``config.json``.

    Attributes:
        text: the file's content.
        value: the parsed object.
    """

    text: str
    value: Mapping[str, Any]

    def section(self, dotted: str) -> Mapping[str, Any] | None:
        """The object at a dotted path; the whole config for an empty path, None if absent."""
        value: Any = self.value
        for key in dotted.split(".") if dotted else ():
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of the config that holds the experts per token.

    Attributes:
        section: dotted path of its section; "" for the top.
        key: its name.
        value: one number, or one per layer.
    """

    section: str
    key: str
    value: int | tuple[int, ...]

    @property
    def path(self) -> str:
        """The dotted path of the key."""
        return f"{self.section}.{self.key}" if self.section else self.key


def parse_config(data: bytes) -> Config:
    """Parse a ``config.json``.

    Raises:
        CheckpointError: the file is not a JSON object in UTF-8.
    """
    try:
        text = decoded(data)
        value = parse_lenient(text)
    except ValueError as error:
        raise not_json(CONFIG, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{CONFIG}: is not a JSON object")
    return Config(text, value)


def find_count_keys(
    config: Config, sections: Sequence[str], keys: Sequence[str]
) -> list[ConfigKey]:
    """Find every key of the experts per token; the first is the one that transformers reads.

    Raises:
        CheckpointError: a value is neither a whole number above 0 nor a list of such numbers.
    """
    return [
        ConfigKey(section, key, _count(value, f"{section}.{key}" if section else key))
        for section, key, value in _present(config, sections, keys)
    ]


def _present(
    config: Config, sections: Sequence[str], keys: Sequence[str]
) -> Iterator[tuple[str, str, Any]]:
    for section in sections:
        content = config.section(section)
        for key in keys if content is not None else ():
            if content is not None and content.get(key) is not None:
                yield section, key, content[key]


def _count(value: Any, path: str) -> int | tuple[int, ...]:
    if type(value) is int and value > 0:
        return value
    if isinstance(value, list) and value and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    raise CheckpointError(
        f"{CONFIG}: {path} is {value!r}, not a number of experts",
        hint="Write the number that the model was trained with, as a whole number.",
    )


def set_count(config: Config, count_keys: Sequence[ConfigKey], new: int) -> Config:
    """The config with `new` at all `count_keys`; all other bytes stay."""
    paths = {(*split_path(key.section), key.key) for key in count_keys}

    def wanted(path: Path) -> bool:
        return path in paths or path[:-1] in paths

    edits = [
        (span, str(new))
        for path, span in value_spans(config.text, wanted)
        if config.text[span[0]] not in "[{"
    ]
    return parse_config(replace_spans(config.text, edits).encode())


def split_path(dotted: str) -> tuple[str, ...]:
    """Split a dotted path into keys."""
    return tuple(dotted.split(".")) if dotted else ()


def read_integer(section: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number from 0 on; `default` if the key is missing or null.

    Raises:
        CheckpointError: the value is anything else.
    """
    value = section.get(key)
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise CheckpointError(f"{CONFIG}: {key} is {repr(value)[:40]}, not a whole number")
    return value


MAX_NUMBER = 100_000
"""The most layers, experts or groups of a believable model."""
