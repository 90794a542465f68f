"""The experts per token in second places: under other keys of the config, and in other files.

DeepSeek's own code reads ``inference/config_*.json``, Mistral's ``params.json``; converters write
the number under the key of another type beside the one that counts. What is the same number of
the same model is set; any other number is left alone, with a warning that names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from moescale.checkpoint.json_text import Path, parse_lenient, replace_spans, value_spans
from moescale.model.architectures import ROWS, Architecture
from moescale.model.count import CONFIG, Config, Spelling

KEYS: Final = frozenset(
    key
    for row in ROWS
    if row.part is None
    for key in (*row.count, "n_activated_experts")  # the last: inference/model.py of DeepSeek-V3
    if re.search("expert|moe", key)
)
"""Config keys that some loader reads as the experts per token of a model."""
_TOTALS: Final = frozenset(key for row in ROWS for key in row.total)
_LEFT_ALONE: Final = frozenset({"quantization_config", "compression_config"})
"""Sections that say how the model was made, not how it runs."""

MOST_BYTES: Final = 1 << 20
_CANDIDATE: Final = re.compile(r"(?:.*/)?(?:params|config[^/]*|[^/]*_config)\.json")
_OTHERS: Final = re.compile(
    r"(?:.*/)?(?:generation|tokenizer|(?:\w+_)?preprocessor|processor|adapter|quanti[sz]e|"
    r"quantization|hf_quant|quant)_config\.json"
)


def second_spellings(
    config: Config, row: Architecture, places: Sequence[Spelling]
) -> tuple[list[Spelling], list[str]]:
    """Other keys of the config that hold the count, and warnings of those that hold another.

    Args:
        config: the checkpoint's config.
        row: the row of its type.
        places: where the count stands by that row; the first is what counts.
    """
    if not places or not isinstance(places[0].value, int):
        return [], []
    count, known = places[0].value, {(place.section, place.key) for place in places}
    own_parts = {s for r in ROWS if r.model_type == row.model_type for s in r.sections}
    found, warnings = [], []
    for path, value in _counts(config.value, ()):
        section, key = ".".join(path[:-1]), path[-1]
        if (section, key) in known or _LEFT_ALONE & set(path):
            continue
        if value == count and section in row.sections:
            found.append(Spelling(section, key, value))
        elif section not in own_parts or section in row.sections:
            warnings.append(f"{CONFIG}: {'.'.join(path)} is {value}; it is left as it is")
    return found, warnings


def _counts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every whole number under one of `KEYS`, with its path."""
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        if key in KEYS and type(inner) is int:
            yield (*path, key), inner
        else:
            yield from _counts(inner, (*path, key))


def candidates(sizes: Mapping[str, int]) -> list[str]:
    """Files that may hold the count: small configs that lie beside no weights of their own."""
    weights = {
        name.rpartition("/")[0]
        for name in sizes
        if "/" in name and name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".onnx"))
    }
    return [
        name
        for name, size in sizes.items()
        if name != CONFIG and size <= MOST_BYTES and name.rpartition("/")[0] not in weights
        if _CANDIDATE.fullmatch(name) and not _OTHERS.fullmatch(name)
    ]


def with_count(
    name: str, data: bytes, before: int, after: int, total: int
) -> tuple[bytes | None, list[str]]:
    """A file with the new count, None where nothing in it changes; and what the user should know.

    Args:
        name: of the file, for warnings.
        data: its content.
        before: the count of the model; another number is of another model.
        after: the new count.
        total: routed experts of a layer: a count is of this model where this number is beside it.
    """
    try:
        text = data.decode()
        value = parse_lenient(text)
    except ValueError:
        return None, []
    same, warnings = set(), []
    for path, number in _counts(value, ()):
        beside = value
        for key in path[:-1]:
            beside = beside[key]
        if number == before and any(beside.get(key) == total for key in _TOTALS):
            same.add(path)
        else:
            warnings.append(f"{name}: {'.'.join(path)} is {number}; it is left as it is")
    return (_set(text, same, after) if same and after != before else None), warnings


def _set(text: str, paths: Collection[Path], new: int) -> bytes:
    spans = value_spans(text, lambda path: path in paths)
    return replace_spans(text, [(span, str(new)) for _, span in spans]).encode()
