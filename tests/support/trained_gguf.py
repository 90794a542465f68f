"""The small trained byte-level models as GGUF files, in the layout of llama.cpp's converter.

Rows of the experts are padded with zeros to a block of the k-quants, which changes no output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

from support.gguf_models import finish

ROW = 256
"""Weights per block of the k-quants."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Names:
    """The tensor names of a type, and whether llama.cpp orders its rotated rows differently."""

    arch: str
    moe: str
    gate: str
    up: str
    down: str
    turned: bool


NAMES: Mapping[str, Names] = {
    "mixtral": Names("llama", "block_sparse_moe", "w1", "w3", "w2", turned=True),
    "olmoe": Names("olmoe", "mlp", "gate_proj", "up_proj", "down_proj", turned=False),
}


def write(source: Path, path: Path) -> str:
    """Write a checkpoint of `byte_models` as one GGUF file in F32; return its architecture."""
    config, tensors = _read(source)
    names = NAMES[config["model_type"]]
    writer = gguf.GGUFWriter(path, names.arch)
    _add_keys(writer, config)
    for name, values in _tensors(config, tensors, names).items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    finish(writer)
    return names.arch


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            tensors |= {name: file.get_tensor(name).float().numpy() for name in names}
    return json.loads((source / "config.json").read_text()), tensors


def _add_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(ROW)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(config: dict[str, Any], tensors: dict[str, Array], names: Names) -> dict[str, Array]:
    found = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        old = f"model.layers.{layer}."
        own = {n.removeprefix(old): t for n, t in tensors.items() if n.startswith(old)}
        block = {**_attention(config, own, names), **_experts(own, names)}
        found |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    return found


def _attention(config: dict[str, Any], own: dict[str, Array], names: Names) -> dict[str, Array]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    found = {f"attn_{s}.weight": own[f"self_attn.{s}_proj.weight"] for s in "qkv"}
    if names.turned:
        found |= {f"attn_{s}.weight": _turned(found[f"attn_{s}.weight"], heads[s]) for s in heads}
    norms = {f"attn_{s}_norm.weight": own.get(f"self_attn.{s}_norm.weight") for s in heads}
    found |= {name: values for name, values in norms.items() if values is not None}
    found["attn_output.weight"] = own["self_attn.o_proj.weight"]
    found["attn_norm.weight"] = own["input_layernorm.weight"]
    return found


def _experts(own: dict[str, Array], names: Names) -> dict[str, Array]:
    found = {
        "ffn_norm.weight": own["post_attention_layernorm.weight"],
        "ffn_gate_inp.weight": own[f"{names.moe}.gate.weight"],
    }
    for part, axis in (("gate", 1), ("up", 1), ("down", 2)):
        suffix = f".{getattr(names, part)}.weight"
        count = sum(name.endswith(suffix) for name in own)
        experts = np.stack([own[f"{names.moe}.experts.{e}{suffix}"] for e in range(count)])
        found[f"ffn_{part}_exps.weight"] = _padded(experts, axis)
    return found


def _turned(rows: Array, heads: int) -> Array:
    """Interleave the halves of each head's rotation, as architecture llama does."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _padded(values: Array, axis: int) -> Array:
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, ROW - values.shape[axis])
    return np.pad(values, widths)
