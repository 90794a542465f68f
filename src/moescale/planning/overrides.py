"""Alternatives to rewriting: new values for the config, and how to give them to each engine.

They exist if only the number of experts changes, or if all layers have the same factor and the
config has a routed scaling key that can take it.

Each form was looked up in the engine's code:

- vLLM: ``--hf-overrides`` is JSON, nested as the config is (`_apply_dict_overrides` in
  vllm/config/model.py).
- SGLang: ``--json-model-override-args``, also JSON (`get_config` in
  sglang/srt/utils/hf_transformers/config.py; tried with the parser of 0.5.23; before 2026 a nested
  section was replaced as a whole).
- transformers: keywords of ``from_pretrained`` that are keys of the config; a mapping updates a
  section.
- llama.cpp: ``--override-kv KEY=TYPE:VALUE,...`` (common/arg.cpp; versions before 2025 need the
  option once for each key, which is deprecated now).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moescale.checkpoint.gguf.names import is_gguf
from moescale.families.config import ConfigKey, NewValue, split_path
from moescale.storage.base import SourceId


@dataclass(frozen=True, slots=True)
class ConfigOverrides:
    """New config values that have the same effect as rewriting the checkpoint.

    Attributes:
        counts: the experts per token at every key; empty if unchanged.
        scales: the routed scaling key in every section; empty if nothing is scaled.
        model_type: the model type of the config.
    """

    counts: Sequence[NewValue]
    scales: Sequence[NewValue]
    model_type: str

    @property
    def depth(self) -> int:
        """Keys in the longest path; SGLang and transformers update only one level of sections."""
        return max(len(split_path(value.path)) for value in (*self.counts, *self.scales))

    @property
    def values(self) -> dict[str, Any]:
        """All new values, nested as in the config."""
        nested: dict[str, Any] = {}
        for value in (*self.counts, *self.scales):
            *sections, key = split_path(value.path)
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = value.after
        return nested


def find_overrides(
    model_type: str,
    count_keys: Sequence[ConfigKey],
    count: int | None,
    scales: Sequence[NewValue] = (),
) -> ConfigOverrides | None:
    """The new values; None if nothing changes.

    Args:
        model_type: the model type of the config.
        count_keys: the keys of the experts per token.
        count: the new number; None if unchanged.
        scales: the new values of the routed scaling key; empty for the factor 1.
    """
    counts = [] if count is None else list(_new_counts(count_keys, count))
    return ConfigOverrides(counts, scales, model_type) if counts or scales else None


def _new_counts(count_keys: Sequence[ConfigKey], count: int) -> Iterator[NewValue]:
    for key in count_keys:
        after = [count] * len(key.value) if isinstance(key.value, tuple) else count
        if after != (list(key.value) if isinstance(key.value, tuple) else key.value):
            yield NewValue(key.path, key.value, after)


def by_engine(overrides: ConfigOverrides, loader: str | None, source: SourceId) -> dict[str, str]:
    """For each engine, the command that runs the unchanged source with the new values.

    Args:
        overrides: the new values.
        loader: class of transformers that loads the model; None for GGUF, where the paths of the
            values are the names of keys.
        source: where the checkpoint is.
    """
    if loader is None:
        here = source.path is not None and is_gguf(source.id)
        file = source.id if here else "MODEL.gguf"
        keys = [(value.path, value.after) for value in (*overrides.counts, *overrides.scales)]
        return {"llama.cpp": _llama_server(file, keys)}
    lines = {}
    model = source.model_id
    if model is not None:
        path, values = shlex.quote(model), json.dumps(overrides.values)
        lines["vllm"] = f"vllm serve {path} --hf-overrides {shlex.quote(values)}"
        if overrides.depth <= 2:
            lines["sglang"] = (
                f"python -m sglang.launch_server --model-path {path}"
                f" --json-model-override-args {shlex.quote(values)}"
            )
            given = ", ".join(f"{key}={value!r}" for key, value in overrides.values.items())
            lines["transformers"] = f"{loader}.from_pretrained({model!r}, {given})"
    from moescale.families.llama_cpp_names import llama_cpp_name

    name = llama_cpp_name(overrides.model_type, bool(overrides.scales))
    if name is not None and not any(isinstance(value.after, list) for value in overrides.counts):
        keys = [(f"{name}.{key}", value) for key, value in _keys(overrides)]
        lines["llama.cpp"] = _llama_server("MODEL.gguf", keys)
    return lines


def _llama_server(file: str, keys: Iterable[tuple[str, Any]]) -> str:
    """The command of llama.cpp with new values for keys of a GGUF file."""
    kinds = {int: "int", float: "float"}
    given = ",".join(f"{key}={kinds[type(value)]}:{value}" for key, value in keys)
    return f"llama-server -m {shlex.quote(file)} --override-kv {given}"


def _keys(overrides: ConfigOverrides) -> Iterator[tuple[str, Any]]:
    """The new values by llama.cpp's names of the keys."""
    if overrides.counts:
        yield "expert_used_count", overrides.counts[0].after
    if overrides.scales:
        yield "expert_weights_scale", float(overrides.scales[0].after)
