"""Tries every rule on a model of the study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from models import say
from texts import Text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moescale

RULES = {
    "none": "config edit alone",
    "published": "published",
    "preserve": "preserve",
    "gates": "gates",
    "measured": "measured",
    "fitted": "fitted",
}
OTHERWISE = {"prose": "English prose", "own": "what the model writes"}
"""The other texts that `fitted` is calibrated on."""


class Trial(NamedTuple):
    """The figures of one model.

    Attributes:
        loss: mean, in nats per byte.
        norms: mean norm of the routed experts' output, by layer, on the inputs that this layer has
            in the original model.
    """

    loss: float
    norms: list[float]


@dataclass(frozen=True, slots=True)
class Results:
    """The results for one router.

    Attributes:
        name: model type.
        trained: the trial with the number of experts as trained.
        trials: by number of experts and rule; a name of `OTHERWISE` is `fitted` on that text.
        taken: the rule that the guard of `fitted` took, by number of experts and text.
    """

    name: str
    trained: Trial
    trials: dict[int, dict[str, Trial]]
    taken: dict[int, dict[str, str]]

    def rise(self, rule: str, m: int) -> float:
        """The loss, minus the loss as trained."""
        return self.trials[m][rule].loss - self.trained.loss

    def norm(self, rule: str, m: int) -> float:
        """The norm, relative to the norm as trained, as the mean over layers."""
        pairs = zip(self.trials[m][rule].norms, self.trained.norms, strict=True)
        return sum(new / old for new, old in pairs) / len(self.trained.norms)


def try_rules(name: str, counts: Sequence[int], text: Text, folder: Path) -> Results:
    """Rewrite a model with moescale by every rule for every count, and run the outputs."""
    files = {"fitted": folder / "calibrate.txt", "prose": folder / "prose.txt"}
    for file, pieces in zip(files.values(), (text.calibrate, text.prose), strict=True):
        file.write_bytes(bytes(pieces.flatten().tolist()))
    files["measured"] = files["fitted"]
    model = load(folder / name)
    inputs = block_inputs(model, text.evaluate[: len(text.evaluate) // 4])
    results = Results(name, trial(model, text.evaluate, inputs), {}, {})
    for m in counts:
        notes = folder / f"{name}-{m}.json"
        if not notes.exists():
            found = try_them(rewrite(folder / name, m, files), text.evaluate, inputs)
            part = notes.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.rename(notes)
            say(f"{name}: {m} experts tried")
        trials, results.taken[m] = json.loads(notes.read_text())
        results.trials[m] = {rule: Trial(*found) for rule, found in trials.items()}
    return results


def rewrite(
    source: Path, m: int, texts: Mapping[str, Path]
) -> Iterator[tuple[str, moescale.Plan, Path]]:
    """Yield the model with `m` experts per token by each rule; remove it before the next."""
    for name in (*RULES, *OTHERWISE):
        output = source.with_name(f"{source.name}-{m}-{name}")
        shutil.rmtree(output, ignore_errors=True)
        rule, given = "fitted" if name in OTHERWISE else name, {}
        if name in texts:
            given["calibrate"] = texts[name]
        yield name, moescale.convert(source, output, experts=m, rule=rule, **given).plan, output
        shutil.rmtree(output)


def try_them(
    rewritten: Iterable[tuple[str, moescale.Plan, Path]], text: Tensor, inputs: Sequence[Tensor]
) -> tuple[dict[str, Trial], dict[str, str]]:
    """A trial for each rule, and the rules that guards took; equal factors share one trial."""
    trials: dict[str, Trial] = {}
    taken: dict[str, str] = {}
    known: dict[tuple[float, ...], Trial] = {}
    for name, plan, output in rewritten:
        numbers = (*plan.factors.values(), *plan.router_scales.values())
        if numbers not in known:
            known[numbers] = trial(load(output), text, inputs)
        trials[name] = known[numbers]
        if plan.guard is not None:
            taken[name] = plan.guard.taken
    return trials, taken


def load(folder: Path) -> PreTrainedModel:
    """Load a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def block_inputs(model: PreTrainedModel, text: Tensor) -> list[Tensor]:
    """The inputs of each MoE block: float32, (tokens, hidden)."""
    seen: list[Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for layer in layers
    ]
    model(input_ids=text)
    for hook in hooks:
        hook.remove()
    return [hidden.flatten(0, 1) for hidden in seen]


@torch.no_grad()
def trial(model: PreTrainedModel, text: Tensor, inputs: Sequence[Tensor]) -> Trial:
    """Compute the loss on a text, and the norms on the inputs of the blocks."""
    losses = []
    for part in text.split(64):
        logits = model(input_ids=part).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
    norms: list[float] = []
    for layer, hidden in zip(model.model.layers, inputs, strict=True):
        hook = layer.mlp.experts.register_forward_hook(
            lambda _, __, output: norms.append(float(output.norm(dim=-1).mean()))
        )
        layer.mlp(hidden[None])
        hook.remove()
    return Trial(float(torch.stack(losses).mean()), norms)
