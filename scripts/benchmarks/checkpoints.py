"""Makes checkpoints to measure with, of random bytes or as sparse files."""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HIDDEN, INNER, EXPERTS, HEADS, VOCABULARY = 2048, 3584, 8, 16, 1024
NORMS = ("input", "post_attention")
SMALLEST = 1.4
PIECE = 16 << 20


def gigabytes(text: str) -> float:
    """Parse the size of the model; the smallest one has a layer in each of its 4 shards."""
    if (size := float(text)) < SMALLEST:
        raise argparse.ArgumentTypeError(f"is {text}: the smallest model has {SMALLEST}")
    return size


def make_mixtral(folder: Path, gigabytes: float) -> None:
    """Write a complete Mixtral of random bf16 numbers in 4 shards of equal size."""
    layer_bytes = EXPERTS * 3 * HIDDEN * INNER * 2
    layers = max(4, round(gigabytes * 1e9 / layer_bytes))
    shards: list[dict[str, list[int]]] = [{} for _ in range(4)]
    for layer in range(layers):
        shards[layer * 4 // layers] |= layer_shapes(f"model.layers.{layer}")
    shards[0]["model.embed_tokens.weight"] = [VOCABULARY, HIDDEN]
    shards[-1] |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    folder.mkdir()
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-00004.safetensors"
        write_shard(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, layers)


def layer_shapes(layer: str) -> dict[str, list[int]]:
    """The tensors of one decoder layer."""
    shapes = {f"{layer}.self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
    shapes |= {f"{layer}.{name}_layernorm.weight": [HIDDEN] for name in NORMS}
    block = f"{layer}.block_sparse_moe"
    shapes[f"{block}.gate.weight"] = [EXPERTS, HIDDEN]
    for expert in range(EXPERTS):
        for name, shape in (
            ("w1", [INNER, HIDDEN]),
            ("w2", [HIDDEN, INNER]),
            ("w3", [INNER, HIDDEN]),
        ):
            shapes[f"{block}.experts.{expert}.{name}.weight"] = shape
    return shapes


def make_stacked(folder: Path, gigabytes: float) -> None:
    """Write one shard with one tensor, which holds all down-projections of the only layer."""
    inner = round(gigabytes * 1e9 / (EXPERTS * HIDDEN * 2))
    folder.mkdir()
    shapes = {"model.layers.0.mlp.experts.down_proj": [EXPERTS, HIDDEN, inner]}
    write_shard(folder / "model.safetensors", shapes)
    write_config(folder, 1)


def write_config(folder: Path, layers: int) -> None:
    """Write the config of a Mixtral."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": "mixtral",
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "num_local_experts": EXPERTS,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_shard(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a shard of random bf16 numbers, with small exponents so that nothing overflows."""
    import numpy as np

    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    generator = np.random.default_rng(list(path.name.encode()))  # no two files are alike
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while position:
            size = min(position, PIECE)
            block = generator.integers(0, 1 << 16, size // 2, dtype=np.uint16) & np.uint16(0xBFFF)
            file.write(memoryview(block).cast("B"))
            position -= size


class Size(NamedTuple):
    """The size of a checkpoint in the layout of DeepSeek-V3: FP8 with a scale for each block."""

    layers: int
    dense: int
    experts: int
    hidden: int
    inner: int
    shards: int


SIZES = {
    "DeepSeek-V3": Size(61, 3, 256, 7168, 2048, 163),
    "Kimi-K2": Size(61, 1, 384, 7168, 2048, 62),
    "200 GB": Size(68, 3, 256, 4096, 1024, 200),
}
BLOCK = 128
"""Side of the squares of elements that share a scale."""

Shape = tuple[str, str, list[int]]
"""Name, dtype and shape of a tensor."""


def make_sparse(folder: Path, size: Size) -> None:
    """Write config, index, and shards that consist of a header and a hole."""
    tensors = list(block_fp8(size))
    total, done = sum(map(nbytes, tensors)), 0
    shards: list[list[Shape]] = [[] for _ in range(size.shards)]
    for tensor in tensors:
        shards[done * size.shards // total].append(tensor)
        done += nbytes(tensor)
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{size.shards:06}.safetensors"
        write_hole(folder / name, shard)
        weight_map |= dict.fromkeys((tensor[0] for tensor in shard), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": size.layers,
        "n_routed_experts": size.experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "first_k_dense_replace": size.dense,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def block_fp8(size: Size) -> Iterator[Shape]:
    """Every tensor of the checkpoint, in the order of the shards."""

    def pair(name: str, rows: int, columns: int) -> Iterator[Shape]:
        yield f"{name}.weight", "F8_E4M3", [rows, columns]
        yield f"{name}.weight_scale_inv", "F32", [-(-rows // BLOCK), -(-columns // BLOCK)]

    def gated(name: str, inner: int) -> Iterator[Shape]:
        yield from pair(f"{name}.down_proj", size.hidden, inner)
        yield from pair(f"{name}.gate_proj", inner, size.hidden)
        yield from pair(f"{name}.up_proj", inner, size.hidden)

    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, size.hidden]
    for layer in range(size.layers):
        block = f"model.layers.{layer}"
        for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            yield from pair(f"{block}.self_attn.{part}", size.hidden, 1536)
        for norm in NORMS:
            yield f"{block}.{norm}_layernorm.weight", "BF16", [size.hidden]
        if layer < size.dense:
            yield from gated(f"{block}.mlp", 9 * size.inner)
            continue
        yield f"{block}.mlp.gate.weight", "BF16", [size.experts, size.hidden]
        yield from gated(f"{block}.mlp.shared_experts", size.inner)
        for expert in range(size.experts):
            yield from gated(f"{block}.mlp.experts.{expert}", size.inner)
    yield "lm_head.weight", "BF16", [VOCABULARY, size.hidden]


def nbytes(tensor: Shape) -> int:
    """Size of its data in bytes."""
    return {"F8_E4M3": 1, "BF16": 2, "F32": 4}[tensor[1]] * math.prod(tensor[2])


def write_hole(path: Path, tensors: list[Shape]) -> None:
    """Write a shard whose data are a hole, which takes no space on the disk."""
    header, position = {}, 0
    for tensor in tensors:
        name, dtype, shape = tensor
        offsets = [position, position := position + nbytes(tensor)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


def make_for_torch(folder: Path, gigabytes: float) -> None:
    """Write a byte-level Mixtral with the initial weights of transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=round(gigabytes * 1e9 / (EXPERTS * 3 * HIDDEN * INNER * 2)),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        max_position_embeddings=256,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
