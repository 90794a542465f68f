"""How many experts a token llama.cpp has room for: it ends the process where its graph is full.

A graph may hold so many tensors (``src/llama-context.cpp``, ``graph_max_nodes``), and its scheduler
keeps those, the weights and the caches in a table of as many places as a prime says
(``ggml_hash_size``). Each chosen expert takes a view and an addition in every block
(``src/llama-graph.cpp``, ``build_moe_ffn``); what a block takes besides was counted in the client,
with its arch settings, as the tensors in the context of its graph.
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
    """What a graph holds besides what weights and chosen experts take.

    Attributes:
        block: tensors of a block with routed experts whose weights are divided by their sum.
        rest: tensors of no block.
        cache: tensors that a block keeps of earlier tokens.
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
"""By architecture, as far as it was counted."""

_USUAL: Final = Graph(33)

_SUM, _GROUPS, _DENSE = 5, 14, 14
"""Tensors that dividing by the sum takes, and choosing by groups; and those of a block with routed
experts beyond those of a dense one."""

_UBATCH: Final = 512
"""Tokens of a batch, where ``--ubatch-size`` does not say."""

_FLOORS: Final[Mapping[int, int]] = {8: 1024, 32: 40 * _UBATCH, 64: 160 * _UBATCH}
"""The least room, by what each tensor of the model adds."""

_PRIMES: Final = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101, 262147)


def max_experts_per_token(row: Row, keys: GgufKeys, names: Collection[str]) -> int | None:
    """The most experts a token that the graph has room for; None where there are no blocks.

    Args:
        row: the architecture.
        keys: the keys of the model.
        names: all tensors of the model.
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
    """What each block holds; those that predict further tokens have a graph of their arch."""
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
    """Tensors of a graph that a weight takes: a product; a norm and its product; a scale's rows."""
    if suffix.endswith("exps.scale"):
        return 4
    return 2 if "norm" in suffix else 1


def _router(row: Row, keys: GgufKeys) -> int:
    """What a router takes beside one that divides by the sum."""
    arch = keys.get("general.architecture")
    divides = {"always": True, "never": False}.get(
        row.renormalises, keys.get(f"{arch}.expert_weights_norm") is True
    )
    scaled = row.scale_key and keys.get(f"{arch}.expert_weights_scale", 0.0) not in (0.0, 1.0)
    groups = keys.get(f"{arch}.expert_group_count", 0)
    grouped = isinstance(groups, int) and groups > 1
    return scaled + _GROUPS * grouped - _SUM * (not divides)
