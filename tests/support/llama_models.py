"""Tiny random models for the real llama.cpp, one for each architecture in llama_models.json.

The list of tensors comes from the client's errors, one missing tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from support.gguf_models import add_key, finish
from support.llama_client import Client, MissingError

RECIPES: Mapping[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
"""By architecture: keys besides `KEYS`, tensors, and the tensors of a block."""

BLOCKS, EXPERTS, HIDDEN, WORDS = 2, 4, 32, 24

KEYS: Mapping[str, Any] = {
    "block_count": BLOCKS,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "feed_forward_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 8,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "vocab_size": WORDS,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
    "leading_dense_block_count": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 2,
}

Array = np.ndarray[Any, Any]
Change = Callable[[str, Array], Array]


def _same(name: str, values: Array) -> Array:
    return values


def write_runnable(
    path: Path,
    arch: str,
    *,
    change: Change = _same,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, Array] | None = None,
    split: int = 0,
    sizes: Mapping[int, int] | None = None,
    blocks: int = BLOCKS,
    without: Collection[str] = (),
) -> Path:
    """Write a model; return its path, or that of the first file of a split set.

    Args:
        path: where to write.
        arch: one of `RECIPES`.
        change: a function that is applied to each tensor.
        keys: other values of the architecture's keys.
        more: more tensors.
        split: tensors per file, for a split set.
        sizes: other sizes than those of the recipe.
        blocks: number of blocks.
        without: names to leave out.
    """
    recipe, sizes = RECIPES[arch], sizes or {}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_tokenizer_model("no_vocab")
    found = {**KEYS, **recipe["keys"], "block_count": blocks, **(keys or {})}
    for name, value in found.items():
        add_key(writer, f"{arch}.{name}", value)
    shapes = {"token_embd.weight": [WORDS, HIDDEN], "output_norm.weight": [HIDDEN]}
    shapes |= recipe["tensors"]
    for i in range(blocks):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in recipe["block"].items()}
    rng = np.random.default_rng(1)
    for name in without:
        del shapes[name]
    for name, shape in shapes.items():
        values = _values(rng, name, tuple(sizes.get(n, n) for n in shape))
        writer.add_tensor(name, np.ascontiguousarray(change(name, values), np.float32))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    if not split:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("norm.weight"):
        return 1 + 0.1 * rng.normal(size=shape)
    sigma = 1.0 if "ffn_gate_inp" in name else 0.15
    return rng.normal(0, sigma, shape)


def one_expert(name: str, values: Array) -> Array:
    """Make all experts of a block the same, so that the choice of experts has no effect."""
    return np.repeat(values[:1], len(values), 0) if "_exps." in name else values


def scales(factor: float) -> dict[str, Array]:
    """Make a ``.scale`` tensor for the experts of each block."""
    values = np.full(EXPERTS, factor, np.float32)
    return {f"blk.{i}.ffn_down_exps.scale": values for i in range(BLOCKS)}


def rms(one: Array, other: Array) -> float:
    """The root mean square of a difference."""
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean()))


def start() -> Iterator[Client]:
    """Start a client for the tests of a file, or skip them if it cannot run."""
    try:
        client = Client()
    except MissingError as error:
        pytest.skip(str(error))
    yield client
    client.close()
