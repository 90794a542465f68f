"""Checkpoints of published sizes without weights: real names and shapes in sparse shards.

A shard is its header and a hole of the right length, so that 281 GB take a few kB on disk. The
names, counts and configs are those of checkpoints on the Hub, generated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoints import header

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A checkpoint without its weights; its 16-bit tensors are in the order of names."""

    config: Mapping[str, Any]
    shapes: Shapes
    shards: int
    shard_name: str = "model-{:05}-of-{:05}.safetensors"
    dtype: str = "BF16"
    index: bool = True

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(2 * int(np.prod(shape)) for shape in self.shapes.values())


def write(folder: Path, published: Published) -> Path:
    """Write config, index and sparse shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published.config, indent=2))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_parts(published), start=1):
        name = published.shard_name.format(number, published.shards)
        write_shard(folder / name, {n: published.shapes[n] for n in part}, published.dtype)
        weight_map |= dict.fromkeys(part, name)
    if published.index:
        content = {"metadata": {"total_size": published.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return folder


def write_shard(path: Path, shapes: Shapes, dtype: str) -> None:
    """Write a shard of 16-bit tensors whose data are a hole."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        stop = position + 2 * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    first = header(entries)
    with path.open("wb") as file:
        file.write(first)
        file.truncate(len(first) + position)


def _parts(published: Published) -> Iterable[list[str]]:
    names = list(published.shapes)
    chosen = np.array_split(np.arange(len(names)), published.shards)
    return ([names[i] for i in part] for part in chosen)


def _experts(at: str, experts: int, hidden: int, inner: int, names: tuple[str, str, str]) -> Shapes:
    up, gate, down = names
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(experts):
        for name in (up, gate):
            shapes[f"{at}experts.{expert}.{name}.weight"] = (inner, hidden)
        shapes[f"{at}experts.{expert}.{down}.weight"] = (hidden, inner)
    return shapes


def _mlp(at: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (inner, hidden),
        f"{at}.up_proj.weight": (inner, hidden),
        f"{at}.down_proj.weight": (hidden, inner),
    }


QWEN = ("gate_proj", "up_proj", "down_proj")


def qwen3(layers: int, experts: int, shards: int) -> Published:
    """A Qwen3-MoE of any size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp."
        shapes |= _experts(at, experts, 2048, 512, QWEN)
        shapes[at + "gate.weight"] = (experts, 2048)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (2048,)
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    return Published(config, shapes, shards)


def wizardlm() -> Published:
    """WizardLM-2-8x22B: a Mixtral of 281 GB in 59 shards."""
    hidden, inner, layers = 6144, 16384, 56
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (32000, hidden)}
    shapes["model.embed_tokens.weight"] = (32000, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= _experts(at + "block_sparse_moe.", 8, hidden, inner, ("w1", "w3", "w2"))
        shapes[at + "block_sparse_moe.gate.weight"] = (8, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[at + norm + ".weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", 1024), ("v", 1024), ("o", hidden)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_local_experts": 8,
    }
    return Published(config, shapes, 59)


def qwen_reap() -> Published:
    """Qwen3.5-25B-REAP: 180 experts are left, and the config is that of the text model.

    The names are those of the multimodal model, and the MTP layer of the config is missing.
    """
    hidden, inner, layers, experts = 2048, 512, 40, 180
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (248320, hidden)}
    shapes["model.language_model.embed_tokens.weight"] = (248320, hidden)
    for layer in range(layers):
        at = f"model.language_model.layers.{layer}."
        mixer = "self_attn.o_proj" if layer % 4 == 3 else "linear_attn.out_proj"
        shapes[f"{at}{mixer}.weight"] = (hidden, 2 * hidden)
        shapes |= _experts(at + "mlp.", experts, hidden, inner, QWEN)
        shapes[at + "mlp.gate.weight"] = (experts, hidden)
        shapes |= _mlp(at + "mlp.shared_expert", hidden, inner)
        shapes[at + "mlp.shared_expert_gate.weight"] = (1, hidden)
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "dtype": "float16",
        "hidden_size": hidden,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": inner,
        "mtp_num_hidden_layers": 1,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
    }
    return Published(config, shapes, 10, dtype="F16")


def deepseek_ocr() -> Published:
    """DeepSeek-OCR-2: remote code; every key is in `language_config` and at the top level."""
    hidden, inner, layers = 1280, 896, 12
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(12):
        at = f"model.sam_model.blocks.{block}.mlp.lin"
        shapes |= {at + "1.weight": (3072, 768), at + "2.weight": (768, 3072)}
    for block in range(24):
        shapes |= _mlp(f"model.qwen2_model.model.model.layers.{block}.mlp", 896, 4864)
    shapes |= _mlp("model.layers.0.mlp", hidden, 6848)
    for layer in range(1, layers):
        at = f"model.layers.{layer}.mlp."
        shapes[at + "gate.weight"] = (64, hidden)
        shapes |= _mlp(at + "shared_experts", hidden, 2 * inner)
        shapes |= _experts(at, 64, hidden, inner, QWEN)
    text = {
        "first_k_dense_replace": 1,
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "n_group": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": layers,
        "topk_group": 1,
        "topk_method": "greedy",
    }
    config = {
        "architectures": ["DeepseekOCR2ForCausalLM"],
        "language_config": {"architectures": ["DeepseekV2ForCausalLM"], **text},
        "model_type": "deepseek_vl_v2",
        **text,
    }
    return Published(config, shapes, 1, shard_name="model-{:05}-of-{:06}.safetensors")


def xverse() -> Published:
    """XVERSE-MoE-A4.2B: remote code with its own key for the number of experts per token."""
    hidden, inner, layers, experts = 2560, 1728, 28, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100534, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp."
        shapes[at + "router.weight"] = (experts, hidden)
        shapes |= _experts(at, experts, hidden, inner, QWEN)
        shapes |= _mlp(at + "shared_experts", hidden, 2 * inner)
    config = {
        "architectures": ["XverseForCausalLM"],
        "model_type": "xverse",
        "moe_top_k": 6,
        "num_experts": experts,
        "num_hidden_layers": layers,
        "num_shared_experts": 2,
    }
    return Published(config, shapes, 10)


def step() -> Published:
    """Step-3.5-Flash: the text model of step3p7, with its keys at the top level of the config."""
    hidden, inner, layers, experts = 4096, 1280, 45, 288
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128896, hidden)}
    for layer in range(3, layers):
        at = f"model.layers.{layer}."
        shapes[at + "moe.gate.weight"] = (experts, hidden)
        shapes[at + "moe.router_bias"] = (experts,)
        shapes |= dict.fromkeys(
            (at + "moe.gate_proj.weight", at + "moe.up_proj.weight"), (experts, inner, hidden)
        )
        shapes[at + "moe.down_proj.weight"] = (experts, hidden, inner)
        shapes |= _mlp(at + "share_expert", hidden, inner)
    config = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": hidden,
        "moe_layers_enum": ",".join(map(str, range(3, layers))),
        "moe_num_experts": experts,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "moe_top_k": 8,
        "norm_expert_weight": True,
        "num_hidden_layers": layers,
        "use_moe_router_bias": True,
    }
    return Published(config, shapes, 9)


def granite() -> Published:
    """granite-3.1-1b-a400m: stacked experts in a single file without an index."""
    hidden, inner, layers, experts = 1024, 512, 24, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (49155, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}.block_sparse_moe."
        shapes[at + "input_linear.weight"] = (experts, 2 * inner, hidden)
        shapes[at + "output_linear.weight"] = (experts, hidden, inner)
        shapes[at + "router.layer.weight"] = (experts, hidden)
    config = {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
    }
    return Published(config, shapes, 1, shard_name="model.safetensors", index=False)
