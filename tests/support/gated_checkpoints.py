"""Small Mixtrals with realistic router weights, for tests that sample them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from support.checkpoints import HIDDEN, MIXTRAL_CONFIG, Raw, mixtral_tensors, values, write_shards

AT = "model.layers.{}."
GATE = AT + "block_sparse_moe.gate.weight"
NORM = AT + "post_attention_layernorm.weight"
EXPERTS, LAYERS = 4, 2


def gated_tensors(dtype: str = "BF16") -> dict[str, Raw]:
    """The tensors of a Mixtral of two layers with four experts."""
    tensors = mixtral_tensors(LAYERS, EXPERTS, dtype)
    for layer in range(LAYERS):
        shape = (EXPERTS, HIDDEN)
        tensors[GATE.format(layer)] = values(dtype, shape, 50 + layer, special=False)
        tensors[NORM.format(layer)] = values(dtype, (HIDDEN,), 60 + layer, special=False)
    return tensors


def gated_mixtral(
    folder: Path, changes: Mapping[str, Raw | None] | None = None, dtype: str = "BF16"
) -> dict[str, Raw]:
    """Write it, with tensors changed or left out; return the tensors."""
    tensors = {**gated_tensors(dtype), **(changes or {})}
    present = {name: raw for name, raw in tensors.items() if raw is not None}
    write_shards(folder, present, 3)
    (folder / "config.json").write_bytes(MIXTRAL_CONFIG.encode())
    return present
