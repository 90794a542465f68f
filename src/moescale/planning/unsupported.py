"""Refuses folders and repos that do not hold a safetensors checkpoint, and says what they hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moescale.checkpoint.foreign import TORCH
from moescale.checkpoint.json_text import parse_lenient
from moescale.checkpoint.safetensors.index import SUFFIX
from moescale.errors import SourceError
from moescale.families.config import CONFIG
from moescale.storage.base import Source

ADAPTER = "adapter_config.json"

_OTHER = (
    (
        ".gguf",
        "holds GGUF files; one of them must be given",
        "For example: moescale {where}/{name}, or the first file of a split set.",
    ),
    (
        ".distcp",
        "is a sharded checkpoint of torch.distributed ({name}), which is not supported",
        "Merge it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch, or"
        " accelerate merge-weights, then save_pretrained(...).",
    ),
    (
        "consolidated.00.pth",
        "has only {name}, in Meta's own layout, which is not supported",
        "Give the repo with the safetensors weights of the same model.",
    ),
    (
        TORCH,
        "has only {name}, which is not supported",
        "Convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).",
    ),
    (
        (".h5", ".msgpack", ".onnx", ".tflite", ".npz", ".nemo", ".mlmodel", ".pte"),
        "has only {name}, which is not supported",
        "Give the repo with the safetensors weights that it was made from.",
    ),
)
"""Weights in other formats: suffix, description, and remedy."""


def refuse_other(source: Source, files: Collection[str]) -> None:
    """Refuse a source that holds something else that is known instead of a safetensors checkpoint.

    Raises:
        SourceError: says what it holds, and the remedy.
    """
    top = sorted(name for name in files if "/" not in name)
    weights = [n for n in top if n.endswith(SUFFIX) and not n.startswith("adapter_")]
    if weights and CONFIG in top:
        return
    where = source.identity.id
    if "model_index.json" in top:
        raise SourceError(
            f"{where}: is a diffusers pipeline (model_index.json), not a language model",
            hint="If a folder in it holds a mixture-of-experts model, give that folder.",
        )
    if ADAPTER in top and not weights:
        raise _adapter(where, source.read(ADAPTER))
    for suffixes, why, advice in _OTHER:
        name = next((name for name in top if name.lower().endswith(suffixes)), None)
        if name is not None and not weights:
            hint = advice.format(where=where, name=name)
            raise SourceError(f"{where}: {why.format(name=name)}", hint=hint)


def _adapter(where: str, data: bytes) -> SourceError:
    try:
        content: Any = parse_lenient(data.decode())
    except ValueError:
        content = None
    facts = content if isinstance(content, dict) else {}
    kind = "LoRA" if facts.get("peft_type", "LORA") == "LORA" else "PEFT"
    base = facts.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return SourceError(
        f"{where}: is a {kind} adapter{of}: merge it into that model first",
        hint="PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...) does it.",
    )
