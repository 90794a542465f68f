"""Multiplies the config's routed scaling factor instead of the weights."""

from __future__ import annotations

import math

from moescale.checkpoint.json_text import Path, replace_spans, value_spans
from moescale.errors import UnsupportedError
from moescale.families.architectures import Architecture
from moescale.families.config import CONFIG, Config, parse_config, split_path


def fold_factor(config: Config, architecture: Architecture, factor: float) -> Config:
    """The config with the routed scaling key multiplied by `factor`; all other bytes stay.

    Raises:
        UnsupportedError: the result would differ from scaling the weights, or the key is missing.
    """
    key = architecture.scale_key
    if not architecture.can_fold or key is None:
        why = (
            "it has no config key that multiplies the routed output"
            if key is None
            else f"not every engine multiplies the routed experts, and nothing else, by {key}"
        )
        raise UnsupportedError(
            f"--fold config cannot be used with model type {architecture.model_type!r}: {why}",
            hint="Leave --fold out; the weights are scaled then.",
        )
    paths = {(*split_path(section), key) for section in architecture.sections}

    def wanted(path: Path) -> bool:
        return path in paths

    spans = [span for _, span in value_spans(config.text, wanted)]
    if not spans:
        raise UnsupportedError(
            f"{CONFIG}: has no {key}, so --fold config has no number to multiply",
            hint="Leave --fold out; the weights are scaled then.",
        )
    if factor == 1.0:
        return config
    edits = [(span, _product(config.text[slice(*span)], factor, key)) for span in spans]
    return parse_config(replace_spans(config.text, edits).encode())


def _product(old: str, factor: float, key: str) -> str:
    try:
        new = float(old) * factor
    except ValueError:
        new = math.nan
    if not math.isfinite(new):
        raise UnsupportedError(
            f"{CONFIG}: {key} is {' '.join(old.split())[:60]}, which cannot be multiplied",
            hint="Leave --fold out; the weights are scaled then.",
        )
    return repr(new)
