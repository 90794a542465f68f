"""Samples every MoE layer of a checkpoint on a text, and computes losses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moescale.calibrate import runner
from moescale.calibrate.blocks import (
    BlockProbe,
    find_blocks,
    find_modules,
    scored_blocks,
)
from moescale.calibrate.devices import ANYWHERE, Running
from moescale.calibrate.scoring import Score, Setting, score
from moescale.calibrate.statistics import WEIGHTS_KEPT
from moescale.calibrate.text import Text
from moescale.errors import UnsupportedError
from moescale.factors.samples import Sample
from moescale.families import architectures
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.experts import Experts
from moescale.storage.base import ignore

SEQUENCE, TOKENS_PER_BATCH = 256, 1_024
"""`SEQUENCE`: tokens of a sequence for ``fitted`` and for losses, as in the model's own text; the
config may name a longer context than the one used in training. `TOKENS_PER_BATCH`: tokens of a
batch for losses, whose logits stay in memory."""

COMPARED_RUNS, COMPARED = 4, 128
"""Batches, and tokens in each, for which the outputs of the chosen experts are compared."""

Progress = Callable[[int, int], None]
"""Called with tokens done and total tokens."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: the transformers model.
        config: its transformers config.
        paths: the paths of each MoE layer's experts.
    """

    model: Any
    config: Any
    paths: Mapping[Layer, Sequence[str]]


@contextmanager
def open_model(
    folder: Path, config: Any, moe: Moe, how: Running = ANYWHERE
) -> Iterator[LoadedModel]:
    """Load the model.

    Args:
        folder: the checkpoint.
        config: its config, as `moescale.calibrate.runner.read_config` gives it.
        moe: the MoE of the checkpoint.
        how: memory and device to use.

    Raises:
        UnsupportedError: transformers cannot load it here, or has no module for its experts.
    """
    _check_part(moe)
    with runner.load_model(folder, config, how) as (model, left_over):
        found = find_blocks(model, moe.architecture)
        _check_scales(find_modules(left_over, moe.architecture), found)
        measured = _measured_layers(moe.layers, found)
        yield LoadedModel(model, config, {layer: found[layer] for layer in measured})


def measure(
    model: LoadedModel,
    text: Text,
    moe: Moe,
    experts: Experts,
    *,
    fitted: bool = False,
    biases: frozenset[str] | None = None,
    progress: Progress = ignore,
) -> dict[Layer, Sample]:
    """Run the model as trained over a text, and each MoE block with both counts.

    Every block gets the hidden states of the unchanged model and is run on them twice: with the
    trained number of experts and with the new one.

    Args:
        model: the model.
        text: the text to run it on.
        moe: the MoE of the checkpoint.
        experts: the numbers of experts per token.
        fitted: also run each block with scaled routers, for the rule ``fitted``.
        biases: names of biases of the routers' logits; None if the logits cannot be scaled.
        progress: called with tokens done and total tokens.

    Returns:
        A sample of each MoE layer, except MTP layers, which transformers does not run.

    Raises:
        UnsupportedError: transformers cannot run the model, or not with these numbers of experts.
    """
    every = max(1, len(text.tokens) // WEIGHTS_KEPT)
    probes: dict[Layer, list[BlockProbe]] = {}
    for layer, paths in model.paths.items():
        numbers, total = experts.at(layer), moe.experts_by_layer[layer]
        probes[layer] = [BlockProbe(model.model, p, numbers, total, every, biases) for p in paths]
    blocks = [b for blocks in probes.values() for b in blocks]
    if fitted:
        for block in blocks:
            block.fit_router()
    try:
        _run(model.model, blocks, text, context_of(model.config), progress)
        return {layer: _sample(blocks) for layer, blocks in probes.items()}
    finally:
        for block in blocks:
            block.remove()


def evaluate(
    model: LoadedModel,
    text: Text,
    moe: Moe,
    experts: Experts,
    settings: Sequence[Setting],
    *,
    biases: frozenset[str] | None = None,
    context: int | None = None,
    progress: Progress = ignore,
) -> list[Score]:
    """Score settings of a model on a text; the first is the model as trained.

    Args:
        model: the model.
        text: the text to score.
        moe: the MoE of the checkpoint.
        experts: the numbers of experts per token.
        settings: ways to run it.
        biases: as for `measure`.
        context: tokens of a sequence, default `SEQUENCE`; the model's own limit still applies.
        progress: called with tokens done and total tokens.
    """
    blocks = [
        block
        for layer, paths in model.paths.items()
        for block in scored_blocks(
            model.model,
            paths,
            layer,
            experts.at(layer).before,
            moe.experts_by_layer[layer],
            biases,
        )
    ]
    try:
        ids = batches_of(text, model.config, progress, context)
        return score(model.model, blocks, settings, ids)
    finally:
        for block in blocks:
            if block.router is not None:
                block.router.remove()


def batches_of(
    text: Text, config: Any, progress: Progress, context: int | None = None
) -> Iterator[Tensor]:
    """The sequences to score, of at most `context` tokens, default `SEQUENCE`."""
    length = text.length or min(context or SEQUENCE, context_of(config))
    done = 0
    for ids in runner.batches(text.tokens, text.start, length, max(length, TOKENS_PER_BATCH)):
        if ids.shape[1] > 1:
            yield ids
        done += ids.shape[0] * (ids.shape[1] - len(text.start))
        progress(done, len(text.tokens))


def context_of(config: Any) -> int:
    """The longest sequence to run a model on, in tokens."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(own or runner.LONGEST, runner.LONGEST)


def _check_part(moe: Moe) -> None:
    """Refuse any part except the default one, the text model: only that runs on text."""
    row = moe.architecture
    if row.part is not None and row.part != architectures.find(row.model_type, None).part:
        raise UnsupportedError(
            f"the part {row.part!r} of {moe.model_type} does not run on text",
            hint=runner.OTHER_RULES,
        )


def _check_scales(left_over: Mapping[Layer, Sequence[str]], found: Collection[Layer]) -> None:
    """Refuse quantised experts whose scales transformers ignores: it would run the bare codes.

    Raises:
        UnsupportedError: there are such experts; the error names the first module.
    """
    for layer, modules in left_over.items():
        if layer in found:
            raise UnsupportedError(
                f"{modules[0]}: transformers does not read this quantised format",
                hint="Measure the model in another format, and give the result to --factors.",
            )


def _measured_layers(wanted: Sequence[Layer], found: Collection[Layer]) -> list[Layer]:
    """The layers that transformers runs: all except MTP layers.

    Raises:
        UnsupportedError: another layer of the checkpoint is not in the model.
    """
    measured = [layer for layer in wanted if layer in found]
    last = measured[-1].number if measured else -1
    for layer in wanted:
        second = any("mtp" in word for word in layer.stack.split("."))
        if layer not in found and not (second or layer.number > last >= 0):
            raise UnsupportedError(
                f"layer {layer}: transformers has no separate module for its experts, so their"
                " output cannot be measured",
                hint=runner.OTHER_RULES,
            )
    return measured


def _run(
    model: Any, blocks: Sequence[BlockProbe], text: Text, context: int, progress: Progress
) -> None:
    """Run the model, announcing each batch to the blocks."""
    batches = list(runner.batches(text.tokens, text.start, text.length or context))
    compared = {i * len(batches) // COMPARED_RUNS for i in range(COMPARED_RUNS)}
    inner = runner.text_model(model, [block.path for block in blocks])
    done = 0
    for number, ids in enumerate(batches):
        for block in blocks:
            block.set_batch(ids.shape, COMPARED if number in compared else 0)
        runner.forward(inner, ids)
        done += ids.shape[0] * (ids.shape[1] - len(text.start))
        progress(done, len(text.tokens))


def _sample(blocks: Sequence[BlockProbe]) -> Sample:
    """The sample of the MoE of a layer that text passes through."""
    reached = [block for block in blocks if block.reached]
    if not reached:
        raise UnsupportedError(
            f"{blocks[0].path}: text does not pass through it", hint=runner.OTHER_RULES
        )
    return reached[0].sample()
