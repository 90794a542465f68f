"""Parses a ``config.json``; reads the experts per token in it, and sets them at every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from moescale.checkpoint.json_faults import decoded, not_json
from moescale.checkpoint.json_text import (
    Path,
    parse_lenient,
    replace_spans,
    value_spans,
)
from moescale.errors import CheckpointError
from moescale.families.architectures import TEXT_SECTIONS

CONFIG = "config.json"


Section = Mapping[str, Any]
"""An object of a parsed config."""


class Quantisation(NamedTuple):
    """Facts about quantised tensors that their dtypes do not show.

    Attributes:
        e5m3: bytes that look like powers of two are E5M3.
        ue8m0: FP8 scales are powers of two.
    """

    e5m3: bool = False
    ue8m0: bool = False


class Config(NamedTuple):
    """A ``config.json``.

    Attributes:
        text: the file's content.
        parsed: the parsed object; only the modules that read it into records use it.
        model_type: the type of the whole model, as text; None if missing.
        model_types: the types of the whole model and of its text sections.
        loader: the auto class of transformers for its first architecture.
        quantisation: what it says about quantised tensors.
    """

    text: str
    parsed: Section
    model_type: str | None
    model_types: Sequence[str]
    loader: str
    quantisation: Quantisation

    def section(self, path: str) -> Section | None:
        """The object at a dotted path; the whole config for an empty path, None if absent."""
        value: Any = self.parsed
        for key in split_path(path):
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else None


class ConfigKey(NamedTuple):
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
        return dotted(self.section, self.key)


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
    return Config(
        text,
        value,
        str(value["model_type"]) if "model_type" in value else None,
        _model_types(value),
        _loader(value),
        _quantisation(value),
    )


def _model_types(config: Section) -> tuple[str, ...]:
    sections = (config, *(config.get(name) for name in TEXT_SECTIONS if name))
    found = (s.get("model_type") for s in sections if isinstance(s, dict))
    return tuple(model_type for model_type in found if isinstance(model_type, str))


def _loader(config: Section) -> str:
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    images = name.endswith("ForConditionalGeneration")
    return "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"


def _quantisation(config: Section) -> Quantisation:
    sections = list(_quantisation_sections(config))
    return Quantisation(
        e5m3="e5m3" in json.dumps(sections).lower(),
        ue8m0=any(section.get("scale_fmt") == "ue8m0" for section in sections),
    )


_QUANTISATION: Final = frozenset({"quantization_config", "compression_config", "quantization"})


def _quantisation_sections(value: Section) -> Iterator[Section]:
    """All sections that describe a quantisation, at any depth."""
    for key, section in value.items():
        if isinstance(section, dict):
            yield from (section,) if key in _QUANTISATION else _quantisation_sections(section)


class NewValue(NamedTuple):
    """A config value to change.

    Attributes:
        path: its dotted path; for GGUF, the name of the key.
        before: the value in the source.
        after: the value for the output.
    """

    path: str
    before: Any
    after: Any


def find_count_keys(
    config: Config, sections: Sequence[str], keys: Sequence[str]
) -> list[ConfigKey]:
    """Find every key of the experts per token; the first is the one that transformers reads.

    Raises:
        CheckpointError: a value is neither a whole number above 0 nor a list of such numbers.
    """
    return [
        ConfigKey(section, key, _count(value, dotted(section, key)))
        for section, key, value in values_at(config, sections, keys)
        if value is not None
    ]


def values_at(
    config: Config, sections: Sequence[str], keys: Sequence[str]
) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value of each of these keys that is present."""
    for section in sections:
        content = config.section(section) or {}
        for key in keys:
            if key in content:
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


def set_count(text: str, count_keys: Sequence[ConfigKey], new: int) -> str:
    """The text of a config with `new` at all `count_keys`; all other bytes stay."""
    paths = {(*split_path(key.section), key.key) for key in count_keys}

    def wanted(path: Path) -> bool:
        return path in paths or path[:-1] in paths

    edits = [
        (span, str(new)) for path, span in value_spans(text, wanted) if text[span[0]] not in "[{"
    ]
    return replace_spans(text, edits)


def split_path(path: str) -> tuple[str, ...]:
    """Split a dotted path into keys."""
    return tuple(path.split(".")) if path else ()


def dotted(section: str, key: str) -> str:
    """The dotted path of a key in a section."""
    return f"{section}.{key}" if section else key


def read_integer(section: Section, key: str, default: int) -> int:
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
