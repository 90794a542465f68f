#!/usr/bin/env python3
"""Makes a small, complete Mixtral checkpoint and rescales it from 2 to 3 experts per token."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN, INNER, LAYERS, EXPERTS, HEADS, VOCABULARY = 256, 512, 4, 8, 4, 260
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 256,
    "dtype": "bfloat16",
    "eos_token_id": 257,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 256,
    "model_type": "mixtral",
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "num_local_experts": EXPERTS,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
CARD = """---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
---

# A small Mixtral with random weights

Made by moescale's demo.
"""


def main() -> None:
    """Make the checkpoint, rescale and verify it, and show the norms and files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to put both checkpoints")
    folder = parser.parse_args().folder
    source, output = folder / "mixtral-2", folder / "mixtral-3"
    if folder.exists() and not source.exists():
        sys.exit(f"{folder} exists and was not made by the demo; name another folder")
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    make_checkpoint(source)
    print(f"A Mixtral with random weights is in {source}. Rescaling it from 2 to 3 experts:\n")
    command = [sys.executable, "-m", "moescale", str(source), str(output), "-k", "3", "--verify"]
    print("$ moescale " + " ".join(command[3:]) + "\n", flush=True)
    subprocess.run(command, check=True)
    print("\nMean norm of the routed experts' output on the same random inputs:\n")
    show_norms(source, output)
    print("\nThe output, complete and ready to load:\n")
    for path in sorted(output.iterdir()):
        print(f"  {path.stat().st_size:>10,}  {path}")


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint: several bf16 shards, index, config, tokenizer and card."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    shards = [make_layer(generator, layer) for layer in range(LAYERS)]
    shards[0]["model.embed_tokens.weight"] = random(generator, VOCABULARY, HIDDEN)
    shards[-1]["model.norm.weight"] = ones(HIDDEN)
    shards[-1]["lm_head.weight"] = random(generator, VOCABULARY, HIDDEN)
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    write_tokenizer(folder)
    (folder / "README.md").write_text(CARD)


def make_layer(generator: np.random.Generator, layer: int) -> dict[str, np.ndarray]:
    """The tensors of one decoder layer, named as on the Hub."""
    name = f"model.layers.{layer}"
    tensors = {
        f"{name}.input_layernorm.weight": ones(HIDDEN),
        f"{name}.post_attention_layernorm.weight": ones(HIDDEN),
        f"{name}.block_sparse_moe.gate.weight": random(generator, EXPERTS, HIDDEN),
    }
    for projection in "qkvo":
        tensors[f"{name}.self_attn.{projection}_proj.weight"] = random(generator, HIDDEN, HIDDEN)
    for expert in range(EXPERTS):
        block = f"{name}.block_sparse_moe.experts.{expert}"
        tensors[f"{block}.w1.weight"] = random(generator, INNER, HIDDEN)
        tensors[f"{block}.w2.weight"] = random(generator, HIDDEN, INNER)
        tensors[f"{block}.w3.weight"] = random(generator, INNER, HIDDEN)
    return tensors


def random(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A bf16 matrix of normal numbers."""
    return (generator.standard_normal((rows, columns)) * 0.02).astype(ml_dtypes.bfloat16)


def ones(size: int) -> np.ndarray:
    """A bf16 vector of ones."""
    return np.ones(size, dtype=ml_dtypes.bfloat16)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes, in the layout of the tokenizers library."""
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 256 + place,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for place, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    write_json(folder / "tokenizer.json", tokenizer)
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), special, strict=True))
    write_json(folder / "special_tokens_map.json", names)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: object) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def show_norms(source: Path, output: Path) -> None:
    """Print the norm of the routed output by layer: as trained, with the config edit, rescaled."""
    before, after = load(source), load(output)
    inputs = np.random.default_rng(1).standard_normal((256, HIDDEN)).astype(np.float32)
    print("  layer   2 experts   3, config edit alone   3, rescaled")
    for layer in range(LAYERS):
        trained = routed_norm(before, layer, inputs, 2)
        edited, rescaled = (
            routed_norm(before, layer, inputs, 3),
            routed_norm(after, layer, inputs, 3),
        )
        print(
            f"  {layer:5}   {trained:9.5f}   {edited:9.5f} (x {edited / trained:.3f})"
            f"   {rescaled:9.5f} (x {rescaled / trained:.3f})"
        )


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint in float32."""
    return {
        name: tensor.astype(np.float32)
        for shard in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def routed_norm(tensors: dict[str, np.ndarray], layer: int, inputs: np.ndarray, k: int) -> float:
    """The mean norm of the sum of gate weight times expert output over the top `k` experts."""
    block = f"model.layers.{layer}.block_sparse_moe"
    logits = inputs @ tensors[f"{block}.gate.weight"].T
    chosen = np.argsort(-logits, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(logits, chosen, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    result = np.zeros_like(inputs)
    for expert in range(EXPERTS):
        w1, w2, w3 = (tensors[f"{block}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
        gate = inputs @ w1.T
        output = (gate / (1 + np.exp(-gate)) * (inputs @ w3.T)) @ w2.T
        result += output * (weights * (chosen == expert)).sum(axis=1, keepdims=True)
    return float(np.linalg.norm(result, axis=1).mean())


if __name__ == "__main__":
    main()
