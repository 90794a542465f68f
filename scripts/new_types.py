#!/usr/bin/env python3
"""Lists MoE model types of the installed transformers without a row or a reason to have none.

python scripts/new_types.py  # one per line; exits with 1 if there are any
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moescale.families.architectures import parts

SECTION_OF: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_ocr2_text": "deepseek_ocr2",
        "diffusion_gemma_text": "diffusion_gemma",
        "dots3_note_vision_encoder": "dots3_note",
        "ernie4_5_vl_moe_text": "ernie4_5_vl_moe",
        "qwen3_omni_moe_talker_text": "qwen3_omni_moe",
        "qwen3_omni_moe_text": "qwen3_omni_moe",
        "unlimited_ocr_text": "unlimited_ocr",
    }
)
"""Config sections, and the type whose row covers them; no model class takes them alone."""

NO_MOE: Mapping[str, str] = MappingProxyType(
    {
        "gemma4_assistant": "it is dense: its config refuses enable_moe_block",
        **dict.fromkeys(
            ("vitpose", "vitpose_backbone"),
            "it has no router: the caller names the expert by dataset_index",
        ),
    }
)
"""Types whose config mentions experts, and why there is nothing to rescale."""

EXPERTS = re.compile(
    r"(experts?|moe)_(per_tok(en)?|top_?k|k|used|active|activated|selected)"
    r"|(top_?k|k|(n|num)_(used|active|activated|selected|chosen))_experts?(_per_tok(en)?)?"
    r"|\w*experts?_per_tok(en)?|\w*(moe|router|expert)s?_top_?k"
    r"|(n|num|moe_num|num_moe)_(routed_|local_|moe_)?experts"
)
"""Config keys for the number of experts, per token or per layer."""


def main() -> None:
    """Print the new types."""
    found = new_types()
    print("\n".join(found) or f"none in transformers {transformers.__version__}")
    sys.exit(bool(found))


def new_types() -> list[str]:
    """The types that need a row or a reason, sorted."""
    explained = SECTION_OF.keys() | NO_MOE.keys()
    return sorted(
        model_type
        for model_type, config in CONFIG_MAPPING.items()
        if not parts(model_type) and model_type not in explained and has_experts(config)
    )


def has_experts(config: type[PreTrainedConfig]) -> bool:
    """Whether the config or one of its sections has a key for the number of experts."""
    return any(EXPERTS.fullmatch(key) for section in sections(config) for key in keys(section))


def sections(config: type[PreTrainedConfig]) -> Iterator[type[PreTrainedConfig]]:
    """The config, and its default sections at any depth."""
    yield config
    for name, section in config.sub_configs.items():
        if section is not AutoConfig:
            yield from sections(section)
        elif (default := config.sub_configs_defaults[name].model_type) in CONFIG_MAPPING:
            yield from sections(CONFIG_MAPPING[default])  # without a default it may be of any type


def keys(config: type[PreTrainedConfig]) -> set[str]:
    """All keys of a ``config.json`` that the class takes."""
    fields = {field.name for field in dataclasses.fields(config)}
    return fields | set(inspect.signature(config.__init__).parameters) | {*config.attribute_map}


if __name__ == "__main__":
    main()
