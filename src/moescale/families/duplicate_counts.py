"""Copies of the number of experts per token, under other keys of the config and in other files.

DeepSeek's code reads ``inference/config_*.json``, Mistral's ``params.json``, and converters also
write the number under the key of another type. Equal numbers of the same model are changed, too;
any other number stays, with a warning that names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from moescale.checkpoint.json_text import Path, parse_lenient, replace_spans, value_spans
from moescale.families.architectures import ROWS, Architecture
from moescale.families.config import CONFIG, Config, ConfigKey

KEYS: Final = frozenset(
    key
    for row in ROWS
    if row.part is None
    for key in (*row.count_keys, "n_activated_experts")  # DeepSeek-V3, inference/model.py
    if re.search("expert|moe", key)
)
"""Config keys that some loader reads as a model's experts per token."""
_TOTALS: Final = frozenset(key for row in ROWS for key in row.total_keys)
_LEFT_ALONE: Final = frozenset({"quantization_config", "compression_config"})
"""Sections that describe how the model was made, not how it runs."""

_LIKELY: Final = re.compile(
    r"(?=.*(?:expert|moe|rout)).*(?:per_tok|top_?k|select|activated|chosen).*"
)
_UNLIKELY: Final = re.compile(r"group|limit|device|loss|coef|size|dim|shared|capacity|dspark|mova")
"""Unknown keys, with that of their section, that may hold the count: the first must match a key,
the second must not."""

MAX_BYTES: Final = 1 << 20
_CANDIDATE: Final = re.compile(r".*(?:params|config|args|settings|inference|model).*\.json")
_NOT_CANDIDATES: Final = re.compile(
    r".*\.index(?:\.[^./]+)?\.json|(?:.*/)?(?:model_index\.json|added_tokens\.json|(?:generation|tokenizer|(?:\w+_)?preprocessor|processor|adapter|quanti[sz]e|"
    r"quantization|hf_quant|quant)_config\.json)"
)


def duplicate_count_keys(
    config: Config, row: Architecture, count_keys: Sequence[ConfigKey]
) -> tuple[list[ConfigKey], list[str]]:
    """Find other config keys that hold the count; warn of those with another number.

    Args:
        config: the checkpoint's config.
        row: the row of its type.
        count_keys: the keys of that row; the first one decides.
    """
    if not count_keys:
        return [], []
    count = common_count(count_keys[0].value)
    known = {(key.section, key.key) for key in count_keys}
    part_sections = {s for r in ROWS if r.model_type == row.model_type for s in r.sections}
    other_parts = (r for r in ROWS if r.model_type == row.model_type and r.part != row.part)
    known |= {(s, key) for r in other_parts for s in r.sections for key in r.count_keys}
    found, warnings = [], []
    for path, value in _counts(config.parsed, count, ()):
        section, key = ".".join(path[:-1]), path[-1]
        if (section, key) in known or _LEFT_ALONE & set(path):
            continue
        if key in KEYS and _is_same(value, count) and section in row.sections:
            found.append(
                ConfigKey(section, key, tuple(value) if isinstance(value, list) else value)
            )
        elif section not in part_sections or section in row.sections:
            warnings.append(_unchanged_warning(CONFIG, path, value))
    return found, warnings


def common_count(count: int | Sequence[int]) -> int | None:
    """The experts per token of all layers; None if they differ."""
    numbers = {count} if isinstance(count, int) else set(count)
    return numbers.pop() if len(numbers) == 1 else None


def _is_same(value: Any, count: int | None) -> bool:
    """Whether a value is the count, or a list of copies of it."""
    values = value if isinstance(value, list) and value else [value]
    return all(type(number) is int and number == count for number in values)


def _unchanged_warning(name: str, path: Sequence[str], value: Any) -> str:
    return f"{name}: {'.'.join(path)} is {value!r}; it is left as it is"


def _counts(
    value: Any, count: int | None, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values at one of `KEYS`, and the count at keys that look like them, with their paths."""
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _counts(inner, count, (*path, key))
        elif _is_count(".".join((*path[-1:], key)), inner, count):
            yield (*path, key), inner


def _is_count(path: str, value: Any, count: int | None) -> bool:
    """Whether a value may be the experts per token, judged by the last two words of its path."""
    if path.rpartition(".")[2] in KEYS:
        return value is not None and not isinstance(value, bool)
    return _is_same(value, count) and _looks_like_count(path)


def _looks_like_count(path: str) -> bool:
    return _LIKELY.fullmatch(path) is not None and _UNLIKELY.search(path) is None


def candidate_files(sizes: Mapping[str, int]) -> list[str]:
    """Files that may hold the count: small configs in folders without other weights."""
    weights = {
        name.rpartition("/")[0]
        for name in sizes
        if "/" in name and name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".onnx"))
    }
    return [
        name
        for name, size in sizes.items()
        if name != CONFIG and size <= MAX_BYTES and name.rpartition("/")[0] not in weights
        if _CANDIDATE.fullmatch(name) and not _NOT_CANDIDATES.fullmatch(name)
    ]


def replace_count(
    name: str, data: bytes, before: int | None, after: int, total: int
) -> tuple[bytes | None, list[str]]:
    """The new content of a file, None if nothing changes; and warnings.

    Args:
        name: the file's name, for warnings.
        data: its content.
        before: the model's count, None if layers differ; another count belongs to another model.
        after: the new count.
        total: routed experts per layer; a count beside this number belongs to this model.
    """
    try:
        text = data.decode()
        value = parse_lenient(text)
    except ValueError:
        unread = f"{name}: is not valid JSON; the experts per token in it are left as they are"
        return None, [unread] if any(f'"{key}"'.encode() in data for key in KEYS) else []
    same, warnings = set(), []
    for path, found in _counts(value, before, ()):
        beside = value
        for key in path[:-1]:
            beside = beside[key]
        in_this_model = path[-1] in KEYS and any(beside.get(key) == total for key in _TOTALS)
        if in_this_model and _is_same(found, before):
            same.add(path)
        else:
            warnings.append(_unchanged_warning(name, path, found))
    return (_set_counts(text, same, after) if same and after != before else None), warnings


def _set_counts(text: str, paths: Collection[Path], new: int) -> bytes:
    spans = value_spans(text, lambda path: path in paths or path[:-1] in paths)
    edits = [(span, str(new)) for _, span in spans if text[span[0]] != "["]
    return replace_spans(text, edits).encode()
