"""Writes tiny GGUF models with the format's own library; they cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 4, 32, 256
"""Number of blocks, experts per block, and dimensions; `WIDTH` is one block of the k-quants."""

Array = np.ndarray[Any, Any]


def numbers(*shape: int, seed: int = 0, sigma: float = 0.02) -> Array:
    """Normal weights."""
    return np.random.default_rng([seed, *shape]).normal(0, sigma, shape).astype(np.float32)


def blocks_of(kind: gguf.GGMLQuantizationType, *shape: int, seed: int = 0) -> Array:
    """Weights in a type, as bytes; random if the library cannot quantise to the type."""
    weights = numbers(*shape, seed=seed)
    if kind.name in ("F32", "F16"):
        return weights.astype({"F32": np.float32, "F16": np.float16}[kind.name])
    try:
        return gguf.quants.quantize(weights, kind)
    except NotImplementedError:
        return _random_blocks(kind, shape, seed)


def _random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], seed: int) -> Array:
    """Random codes with scales of usual size."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng([seed, int(kind)])
    count = int(np.prod(shape)) // size
    return random_blocks(rng, kind.name, count, nbytes).reshape(*shape[:-1], -1)


def random_blocks(rng: np.random.Generator, kind: str, count: int, nbytes: int) -> Array:
    """Blocks of a type, ``[count, nbytes]``."""
    blocks = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    scales = rng.uniform(1e-3, 0.01, count).astype("<f2").view(np.uint8).reshape(count, 2)
    if kind == "NVFP4":
        blocks[:, :4] = rng.integers(0x08, 0x7F, (count, 4))
    elif kind == "IQ1_M":  # its four nibbles are the highest of four words
        for i, at in enumerate(SCALES_AT[kind]):
            nibble = scales[:, i // 2] >> 4 * (i % 2) & 0xF
            blocks[:, at] = blocks[:, at] & 0xF | nibble << 4
    else:
        for at in SCALES_AT[kind]:
            blocks[:, at : at + 2] = scales
    return blocks


SCALES_AT: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "IQ1_M": (49, 51, 53, 55),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Offsets of the scales in a block, from ``gguf.quants``: F16 numbers, or for IQ1_M the bytes that
hold a nibble of one. Those of Q1_0 and Q2_0 are from ``ggml-common.h``."""


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key, with the type of its value."""
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds[type(value)](key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    arch: str = "llama",
    *,
    used: int | list[int] = 2,
    kind: str = "F32",
    layers: int = LAYERS,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    without: tuple[str, ...] = (),
    norm: str = "ffn_norm",
    words: int = 0,
    split: int = 0,
    seed: int = 0,
) -> list[Path]:
    """Write a model with routed experts; return the paths of its files in order.

    Args:
        path: where to write; for a split set, the name without a number.
        arch: ``general.architecture``.
        used: experts per token, or a list by layer.
        kind: type of the down-projections.
        layers: how many blocks.
        keys: more keys of the architecture.
        tensors: more tensors, or others of the same name.
        without: names to leave out.
        norm: name of the norm before the router.
        words: size of the vocabulary.
        split: tensors per file, for a split set.
        seed: of the weights.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_expert_count(EXPERTS)
    for name, value in {"expert_used_count": used, **(keys or {})}.items():
        add_key(writer, f"{arch}.{name}", value)
    if words:
        writer.add_array("tokenizer.ggml.tokens", [f"word{i}" for i in range(words)])
    down = gguf.GGMLQuantizationType[kind]
    found: dict[str, Array] = {"token_embd.weight": numbers(16, HIDDEN, seed=seed)}
    raw = set()
    for i in range(layers):
        found |= {
            f"blk.{i}.{norm}.weight": 1 + numbers(HIDDEN, seed=seed + 1),
            f"blk.{i}.ffn_gate_inp.weight": numbers(EXPERTS, HIDDEN, seed=seed + i, sigma=1.0),
            f"blk.{i}.ffn_up_exps.weight": numbers(EXPERTS, WIDTH, HIDDEN, seed=seed + 2),
            f"blk.{i}.ffn_down_exps.weight": blocks_of(down, EXPERTS, HIDDEN, WIDTH, seed=seed + i),
        }
        raw.add(f"blk.{i}.ffn_down_exps.weight")
    found |= {"output.weight": numbers(16, HIDDEN, seed=seed + 3), **(tensors or {})}
    for name, values in found.items():
        if name not in without:
            writer.add_tensor(name, values, raw_dtype=down if name in raw else None)
    finish(writer)
    stem = path.name.removesuffix(".gguf")
    return sorted(path.parent.glob(f"{stem}-0*.gguf")) if split else [path]


def read_model(*paths: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the first file and the tensors of all, as the library reads them."""
    readers = [gguf.GGUFReader(path) for path in paths]
    keys = {
        name: field.contents()
        for name, field in readers[0].fields.items()
        if not name.startswith("GGUF.")
    }
    return keys, {tensor.name: tensor for reader in readers for tensor in reader.tensors}


def weights_of(tensor: Any) -> Array:
    """The values of a tensor, as the library dequantises them."""
    result: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return result
