"""The most experts per token in llama.cpp, which aborts when its graph is full.

The size of a graph is limited (``src/llama-context.cpp``, ``graph_max_nodes``), and its scheduler
keeps the graph's tensors, the weights and the caches in a hash table whose size is a prime
(``ggml_hash_size``). Each chosen expert takes a view and an addition in every block
(``src/llama-graph.cpp``, ``build_moe_ffn``). The other tensors of a block were counted in llama.cpp
with its default settings, in the context of its graph.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from moescale.families.gguf import GgufKeys
from moescale.families.llama_cpp import Row


@dataclass(frozen=True, slots=True)
class Graph:
    """The tensors of a graph, without those for weights and chosen experts.

    Attributes:
        block: in a block with routed experts whose weights are divided by their sum.
        rest: outside the blocks.
        cache: of earlier tokens, in a block.
    """

    block: int
    rest: int = 13
    cache: int = 2


GRAPHS: Final[Mapping[str, Graph]] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "mistral3", "qwen3moe", "qwen3vlmoe"), Graph(32)),
        **dict.fromkeys(("minimax-m2", "mellum", "olmoe"), Graph(32)),
        **dict.fromkeys(("arctic", "deepseek", "deepseek2-ocr", "dots1", "glm4moe"), Graph(34)),
        **dict.fromkeys(("bailingmoe", "bailingmoe2", "ernie4_5-moe", "hunyuan-moe"), Graph(34)),
        **dict.fromkeys(("granite", "granitemoe"), Graph(34, 14)),
        **dict.fromkeys(("mistral4", "deepseek2"), Graph(42, 12, 1)),
        "qwen2moe": Graph(37),
        "cohere2moe": Graph(35, 14),
        "dbrx": Graph(33),
        "exaone-moe": Graph(34, 16),
        "gpt-oss": Graph(28, 15),
        "granite_swa": Graph(33, 17),
        "grok": Graph(40, 15),
        "llada-moe": Graph(28, 11, 0),
        "maple": Graph(30, 18),
        "minicpm": Graph(34, 15),
        "phimoe": Graph(31, 15),
        "rnd1": Graph(28, 11, 0),
        "smallthinker": Graph(32, 14),
    }
)
"""By architecture; only those that were counted."""

_USUAL: Final = Graph(33)

_SUM, _GROUPS, _DENSE = 5, 14, 14
"""Tensors for dividing by the sum, for choosing by groups, and for routed experts instead of a
dense block."""

_UBATCH: Final = 512
"""Tokens of a batch without ``--ubatch-size``."""

_FLOORS: Final[Mapping[int, int]] = {8: 1024, 32: 40 * _UBATCH, 64: 160 * _UBATCH}
"""The smallest size of a graph, by its nodes per tensor of the model."""

_PRIMES: Final = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101, 262147)


def max_experts_per_token(row: Row, keys: GgufKeys, names: Collection[str]) -> int | None:
    """The most experts per token that fit into the graph; None if no block has experts.

    Args:
        row: the architecture.
        keys: the keys of the model.
        names: names of all tensors of the model.
    """
    blocks = _blocks(names)
    routed = [block for block in blocks if "ffn_gate_inp.weight" in block]
    if not routed:
        return None
    graph = GRAPHS.get(row.name, _USUAL)
    room = max(_FLOORS[row.nodes], row.nodes * len(names))
    taken = graph.rest + sum(_weight(suffix) for block in blocks for suffix in block)
    taken += graph.block * len(blocks) - _DENSE * (len(blocks) - len(routed))
    taken += _router(row, keys) * len(routed)
    weights = sum(map(len, blocks)) + sum(not name.startswith("blk.") for name in names)
    slots = _PRIMES[bisect_left(_PRIMES, room)] if room <= _PRIMES[-1] else room
    left = min(room, slots - weights - graph.cache * len(blocks)) - taken
    return max(0, (left // len(routed) + 1) // 2)


def _blocks(names: Iterable[str]) -> list[set[str]]:
    """The tensor names of each block, except MTP blocks, which have another graph."""
    found: dict[str, set[str]] = {}
    for name in names:
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            found.setdefault(match[1], set()).add(match[2])
    return [
        by_suffix
        for by_suffix in found.values()
        if not any("nextn" in suffix for suffix in by_suffix)
    ]


def _weight(suffix: str) -> int:
    """Tensors of a graph for one weight: a product, a norm and its product, or a scale's rows."""
    if suffix.endswith("exps.scale"):
        return 4
    return 2 if "norm" in suffix else 1


def _router(row: Row, keys: GgufKeys) -> int:
    """Additional tensors of a router, compared with one that divides by the sum."""
    arch = keys.get("general.architecture")
    divides = {"always": True, "never": False}.get(
        row.renormalises, keys.get(f"{arch}.expert_weights_norm") is True
    )
    scaled = row.scale_key and keys.get(f"{arch}.expert_weights_scale", 0.0) not in (0.0, 1.0)
    groups = keys.get(f"{arch}.expert_group_count", 0)
    grouped = isinstance(groups, int) and groups > 1
    return scaled + _GROUPS * grouped - _SUM * (not divides)
