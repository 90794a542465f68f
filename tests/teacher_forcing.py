"""Two models layer by layer on the same inputs: what the rule ``measured`` is held to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import TINY
from torch import Tensor, nn

from moescale.measuring import runner


@torch.no_grad()
def norms(
    original: Path,
    rewritten: Path,
    entry: str,
    ids: Tensor,
    top_k: tuple[int | None, int | None] = (None, None),
) -> dict[str, tuple[float, float]]:
    """Mean norm of the routed output of each MoE block that a text reaches, in both models.

    The original runs on the token ids [sequences, length]; each block of the other one is given
    what that block was given. `top_k` runs the models with so many experts a token, None with the
    number of their configs. The first token of each sequence is left out.
    """
    first, second = (
        tiny_models.load(directory, entry, top_k=k)
        for directory, k in zip((original, rewritten), top_k, strict=True)
    )
    blocks = {moe.path: moe for moe in tiny_models._blocks(first, TINY[entry])}
    others = {moe.path: moe for moe in tiny_models._blocks(second, TINY[entry])}
    inputs: dict[str, tuple[Any, Any]] = {}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, args: Any, named: Any) -> None:
        inputs[path] = args, named

    for path, moe in blocks.items():
        moe.block.register_forward_pre_hook(partial(keep, path), with_kwargs=True)
    with tiny_models._watch({path: moe.routed for path, moe in blocks.items()}, before):
        runner.forward(runner.text_model(first, blocks), ids)
    with tiny_models._watch({path: moe.routed for path, moe in others.items()}, after):
        for path, (args, named) in inputs.items():
            others[path].block(*args, **named)
    return {path: (_mean(before[path], ids), _mean(after[path], ids)) for path in inputs}


def _mean(routed: Tensor, ids: Tensor) -> float:
    """Some experts return what each of them adds, before the sum."""
    outputs = routed.reshape(-1, *ids.shape, routed.shape[-1]).sum(0)
    return float(outputs[:, 1:].double().norm(dim=-1).mean())
