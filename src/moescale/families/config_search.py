"""Searches a config for what an error message suggests if the model type is not known."""

from __future__ import annotations

import re
from typing import Any

from moescale.families.architectures import TEXT_SECTIONS, Architecture
from moescale.families.config import Config, dotted, values_at


def values_at_count_keys(config: Config, row: Architecture) -> list[Any]:
    """The config's values at a row's keys of the experts per token."""
    return [value for _, _, value in values_at(config, row.sections, row.count_keys)]


def likely_count_key(config: Config) -> tuple[str, Any] | None:
    """The dotted path and the value of a key that looks like the experts per token."""
    sections = [(section, config.section(section) or {}) for section in TEXT_SECTIONS]
    for likely in (r"(expert|moe).*(per_tok|top_?k)|top_?k.*expert|^moe_k$", "^top_?k$"):
        for section, values in sections:
            for key, value in values.items():
                if re.search(likely, key):
                    return dotted(section, key), value
    return None


def has_norm_key(config: Config) -> bool:
    """Whether the config tells the normalisation of a router that is not known."""
    return any("norm_topk_prob" in (config.section(name) or {}) for name in TEXT_SECTIONS)
