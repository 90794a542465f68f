"""llama.cpp's names for model types.

From the converter and the graphs of llama.cpp 0.5.0 (src/models/*.cpp). Types whose count its code
fixes are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from moescale.families.llama_cpp import BY_NAME

_NAMES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25"), "deepseek2"),
    **dict.fromkeys(("glm4_moe_lite", "deepseek_vl_v2"), "deepseek2"),
    **dict.fromkeys(("glm4_moe", "glm4v_moe", "glm4v_moe_text", "solar_open"), "glm4moe"),
    "deepseek": "deepseek",
    "deepseek_ocr2": "deepseek2-ocr",
    "deepseek_v32": "deepseek32",
    "mistral4": "mistral4",
    "dots1": "dots1",
    "dots3_note": "dots3note",
    "glm_moe_dsa": "glm-dsa",
    "glm5_next": "glm5-next",
    "bailing_moe": "bailingmoe",
    "bailing_moe_v2": "bailingmoe2",
    "bailing_hybrid": "bailingmoe3",
    "hy_v3": "hy_v3",
    "hy_v4": "hy_v4",
    "exaone_moe": "exaone-moe",
    "afmoe": "afmoe",
    "laguna": "laguna",
    "minimax_m3_vl": "minimax-m3",
    "step3p7": "step35",
    "kimi_linear": "kimi-linear",
    "nemotron_h": "nemotron_h_moe",
    "cohere2_moe": "cohere2moe",
    "mixtral": "llama",
    **dict.fromkeys(("llama4", "llama4_text"), "llama4"),
    "grok-1": "grok",
    "dbrx": "dbrx",
    "arctic": "arctic",
    "jamba": "jamba",
    **dict.fromkeys(("granitemoe", "granitemoeshared"), "granitemoe"),
    "granitemoehybrid": "granitehybrid",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), "qwen3vlmoe"),
    "qwen3_next": "qwen3next",
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), "qwen35moe"),
    "olmoe": "olmoe",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "lfm2_moe": "lfm2moe",
    "gpt_oss": "gpt-oss",
    "minimax": "minimax-01",
    "minimax_m2": "minimax-m2",
    "mimo_v2_flash": "mimo2",
    **dict.fromkeys(("gemma4", "gemma4_text"), "gemma4"),
}


def llama_cpp_name(model_type: str, scaled: bool) -> str | None:
    """The architecture in a GGUF file; with `scaled`, None if no key scales its routed output."""
    name = _NAMES.get(model_type)
    return name if name is None or not scaled or BY_NAME[name].scale_key else None
