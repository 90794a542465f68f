"""The number of experts per token in a ``config.json``: read it, and set every spelling of it."""

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
    """A ``config.json`` as text and as value."""

    text: str
    value: Mapping[str, Any]

    def section(self, dotted: str) -> Mapping[str, Any] | None:
        """The object at a dotted path; the whole config for an empty one, None if absent."""
        value: Any = self.value
        for key in dotted.split(".") if dotted else ():
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of the config that holds the experts per token: one number, or one for each layer."""

    section: str
    key: str
    value: int | tuple[int, ...]

    @property
    def path(self) -> str:
        """The dotted path, for people."""
        return f"{self.section}.{self.key}" if self.section else self.key


def parse_config(data: bytes) -> Config:
    """Decode a ``config.json``.

    Raises:
        CheckpointError: it is not a JSON object in UTF-8.
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
    """Every key that holds the experts per token; first the one that transformers reads.

    Raises:
        CheckpointError: one of them is not a whole number above 0, nor a list of such.
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
    """The config with `new` at all `count_keys`; every other byte stays."""
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
    """The keys of a dotted path."""
    return tuple(dotted.split(".")) if dotted else ()


def read_integer(section: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of the config, 0 or more; `default` where it is not there or null.

    Raises:
        CheckpointError: it is something else.
    """
    value = section.get(key)
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise CheckpointError(f"{CONFIG}: {key} is {repr(value)[:40]}, not a number of things")
    return value


MAX_NUMBER = 100_000
"""More layers, experts or groups than this are no model."""
