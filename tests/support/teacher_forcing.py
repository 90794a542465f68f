"""Runs two models layer by layer on the same inputs, as a reference for the rule ``measured``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from moescale.calibrate import runner
from support import tiny_models
from support.tiny_models import TINY


@torch.no_grad()
def norms(
    original: Path,
    rewritten: Path,
    entry: str,
    ids: Tensor,
    top_k: tuple[int | None, int | None] = (None, None),
) -> dict[str, tuple[float, float]]:
    """The mean norm of the routed output of each MoE block that a text reaches, in both models.

    The original runs on the token ids [sequences, length]; each block of the other model gets the
    same inputs. `top_k` is the number of experts per token of each model, None for the number in
    its config. The first token of each sequence is left out.
    """
    first, second = (
        tiny_models.load(directory, entry, top_k=k)
        for directory, k in zip((original, rewritten), top_k, strict=True)
    )
    blocks = {moe.path: moe for moe in tiny_models._blocks(first, TINY[entry])}
    others = {moe.path: moe for moe in tiny_models._blocks(second, TINY[entry])}
    inputs: list[tuple[str, Any, Any]] = []
    before, after = (_norms_of_calls(moes, ids) for moes in (blocks, others))

    def keep(path: str, _: nn.Module, args: Any, named: Any) -> None:
        inputs.append((path, args, named))

    for path, moe in blocks.items():
        moe.block.register_forward_pre_hook(partial(keep, path), with_kwargs=True)
    runner.forward(runner.text_model(first, blocks), ids)
    for path, args, named in inputs:
        others[path].block(*args, **named)
    return {path: (fmean(before[path]), fmean(after[path])) for path in before}


def _norms_of_calls(moes: dict[str, tiny_models.MoE], ids: Tensor) -> dict[str, list[float]]:
    """Lists of mean norms by block, one norm per call, filled while the blocks run."""
    found: dict[str, list[float]] = {}

    def note(path: str, _: nn.Module, __: Any, output: Any) -> None:
        routed = output if isinstance(output, Tensor) else output[0]
        found.setdefault(path, []).append(_mean(routed, ids))

    for path, moe in moes.items():
        moe.routed.register_forward_hook(partial(note, path))
    return found


def _mean(routed: Tensor, ids: Tensor) -> float:
    """The mean norm of an output; some experts return their terms before the sum."""
    outputs = routed.reshape(-1, *ids.shape, routed.shape[-1]).sum(0)
    return float(outputs[:, 1:].double().norm(dim=-1).mean())
