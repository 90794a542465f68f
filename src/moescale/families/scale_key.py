"""Multiplies the config's routed scaling factor instead of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moescale.checkpoint.json_text import Path, replace_spans, value_spans
from moescale.errors import LEAVE_FOLD_OUT, UnsupportedError
from moescale.families.architectures import Architecture
from moescale.families.config import CONFIG, Config, NewValue, dotted, split_path, values_at


class Folded(NamedTuple):
    """A config with a factor in its routed scaling key.

    Attributes:
        text: its text; all other bytes are those of the source.
        values: the key in every section that has it; empty if the factor is 1.
    """

    text: str
    values: Sequence[NewValue] = ()


def fold_factor(config: Config, architecture: Architecture, factor: float) -> Folded:
    """Multiply the routed scaling key of a config by `factor`.

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
            hint=LEAVE_FOLD_OUT,
        )
    present = list(values_at(config, architecture.sections, [key]))
    if not present:
        raise UnsupportedError(
            f"{CONFIG}: has no {key}, so --fold config has no number to multiply",
            hint=LEAVE_FOLD_OUT,
        )
    if factor == 1.0:
        return Folded(config.text)
    paths = {(*split_path(section), key) for section in architecture.sections}

    def wanted(path: Path) -> bool:
        return path in paths

    new = [
        (path, span, _product(config.text[slice(*span)], factor, key))
        for path, span in value_spans(config.text, wanted)
    ]
    after = {path: product for path, _, product in new}
    return Folded(
        replace_spans(config.text, [(span, repr(product)) for _, span, product in new]),
        [
            NewValue(dotted(section, key), before, after[(*split_path(section), key)])
            for section, _, before in present
        ],
    )


def _product(old: str, factor: float, key: str) -> float:
    try:
        new = float(old) * factor
    except ValueError:
        new = math.nan
    if not math.isfinite(new):
        raise UnsupportedError(
            f"{CONFIG}: {key} is {' '.join(old.split())[:60]}, which cannot be multiplied",
            hint=LEAVE_FOLD_OUT,
        )
    return new
