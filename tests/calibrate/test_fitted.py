"""The rule ``fitted``: one router scale and one factor per layer, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import build

from moescale.calibrate import generated_text, guard, runner
from moescale.calibrate.measure import LoadedModel, evaluate, measure, open_model
from moescale.calibrate.routers import scaled
from moescale.calibrate.scoring import Setting, paired
from moescale.calibrate.text import Text
from moescale.factors.fitted import GRID, FitSums, fit
from moescale.factors.samples import Sample
from moescale.families.find import Moe
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.experts import Experts
from moescale.storage.local.source import LocalSource

LENGTH = 32
IDS = torch.randint(3, 90, (8, LENGTH), generator=torch.Generator().manual_seed(5))
TEXT = Text(tuple(IDS.flatten().tolist()), length=LENGTH)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


# The closed form ----------------------------------------------------------------------------------


def sums(outputs: np.ndarray[Any, Any], weights: Any, trained: np.ndarray[Any, Any]) -> FitSums:
    """Sums by numpy: outputs [tokens, k, hidden], weights [tokens, k] at a scale, the target."""
    routed = [np.einsum("tk,tkh->th", weights(scale), outputs) for scale in GRID]
    return FitSums(
        [float((y * trained).sum()) for y in routed],
        [float((y * y).sum()) for y in routed],
        [float(np.linalg.norm(y, axis=1).sum()) for y in routed],
        float((trained * trained).sum()),
        float(np.linalg.norm(trained, axis=1).sum()),
    )


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Softmax over the last axis."""
    found = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray[Any, Any] = found / found.sum(-1, keepdims=True)
    return result


def test_the_grid_has_24_scales_from_04_to_6_with_1() -> None:
    """The grid is the documented one."""
    assert len(GRID) == 24 and 1.0 in GRID
    assert (GRID[0], GRID[-1]) == (pytest.approx(0.4), pytest.approx(6.0))
    assert list(GRID) == sorted(GRID)


@pytest.mark.parametrize("sharper", [0.6, 1.0, 1.7, 3.3])
def test_a_scale_that_was_put_in_comes_out(sharper: float) -> None:
    """If the target uses the same experts with multiplied logits, that scale is found."""
    generator = np.random.default_rng(3)
    outputs, logits = generator.normal(size=(400, 4, 16)), generator.normal(size=(400, 4))
    trained = 1.3 * np.einsum("tk,tkh->th", softmax(sharper * logits), outputs)
    found = fit(sums(outputs, lambda t: softmax(t * logits), trained))
    assert found.scale == pytest.approx(sharper, rel=0.02)
    assert found.factor == pytest.approx(1.3, rel=0.01)
    assert found.error_after < 1e-3
    assert found.error_after <= found.error_before


def test_a_scale_that_gains_too_little_stays_1() -> None:
    """A gain below one hundredth of the error does not justify a router scale."""
    generator = np.random.default_rng(4)
    outputs, logits = generator.normal(size=(2000, 4, 8)), generator.normal(size=(2000, 4)) * 1e-3
    trained = generator.normal(size=(2000, 8))
    found = fit(sums(outputs, lambda t: softmax(t * logits), trained))
    assert found.scale == 1.0
    assert found.error_after == found.error_before


def test_a_router_that_cannot_be_scaled_gets_the_factor_only() -> None:
    """The factor is then the one that keeps the norm."""
    generator = np.random.default_rng(3)
    outputs, logits = generator.normal(size=(400, 4, 16)), generator.normal(size=(400, 4))
    trained = np.einsum("tk,tkh->th", softmax(3 * logits), outputs)
    there = sums(outputs, lambda t: softmax(t * logits), trained)
    found = fit(there, scalable=False)
    at_one = there.norms[GRID.index(1.0)]
    assert found.scale == 1.0
    assert found.factor == pytest.approx(there.trained_norms / at_one, rel=1e-5)


# On models ----------------------------------------------------------------------------------------


@contextmanager
def at_work(source: Path, experts: int) -> Iterator[tuple[LoadedModel, Moe, Experts]]:
    """A tiny model in memory, and what a plan found out about it."""
    found: list[tuple[Moe, Experts]] = []

    def sampler(moe: Moe, counts: Experts, _: Any) -> Any:
        found.append((moe, counts))
        raise LookupError

    with pytest.raises(LookupError):
        make_plan(LocalSource(source), Options(experts=experts, rule="none"), None, sampler)
    ((moe, counts),) = found
    with open_model(source, runner.read_config(source), moe) as model:
        yield model, moe, counts


BIASES = {"gpt_oss": frozenset({"bias"})}
FITTED = ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe"]


@pytest.mark.parametrize("entry", FITTED)
def test_the_sums_are_those_of_the_blocks_run_at_each_scale(entry: str, tmp_path: Path) -> None:
    """The norm with the fitted scale and factor is that of the trained block, computed another way.

    Routers are scaled in the weights of a model that transformers loads anew, and its blocks run
    on the hidden states of the unchanged one.
    """
    build(entry, tmp_path, dtype="float32")
    biases = BIASES.get(entry, frozenset())
    # Between two scales of the grid a bias may change the choice of experts.
    rough = 2e-2 if entry in ("deepseek_v3", "glm4_moe") else 2e-3
    with at_work(tmp_path, 3) as (model, moe, counts):
        fits = {
            layer: sample.fit
            for layer, sample in measure(
                model, TEXT, moe, counts, fitted=True, biases=biases
            ).items()
        }
        inputs, before = routed(model, TEXT, dict.fromkeys(fits, (1.0, 1.0)), counts.trained)
        for layer, found in fits.items():
            assert found is not None and found.error_after <= found.error_before + 1e-9
            after = alone(
                model, layer, inputs[layer], found.scale, moe.experts_by_layer[layer], biases
            )
            norms = (before[layer].norm(dim=-1).mean(), found.factor * after.norm(dim=-1).mean())
            assert float(norms[1] / norms[0]) == pytest.approx(1, abs=0.02)
            cosine = (before[layer] * after).sum() / (before[layer].norm() * after.norm())
            assert 1 - float(cosine) ** 2 == pytest.approx(found.error_after, abs=rough)


def routed(
    model: LoadedModel, text: Text, _: Any, count: Any
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The inputs of each block and the outputs of its experts, except for first tokens."""
    inputs: dict[Any, Any] = {}
    outputs: dict[Any, Any] = {}
    handles = []
    for layer, (path,) in model.paths.items():
        block = model.model.get_submodule(path.rpartition(".")[0])
        experts = model.model.get_submodule(path)
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, named, layer=layer: inputs.__setitem__(layer, (args, named)),
                with_kwargs=True,
            )
        )
        handles.append(
            experts.register_forward_hook(
                lambda _, __, out, layer=layer: outputs.__setitem__(layer, kept(out))
            )
        )
    runner.forward(runner.text_model(model.model, [p for (p,) in model.paths.values()]), IDS)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def kept(out: Any) -> torch.Tensor:
    """The routed output of all tokens except the first, [tokens, hidden]."""
    result = out if isinstance(out, torch.Tensor) else out[0]
    hidden = result.shape[-1]
    return (
        result.reshape(-1, IDS.numel(), hidden)
        .sum(0)
        .reshape(*IDS.shape, hidden)[:, 1:]
        .reshape(-1, hidden)
    )


@torch.no_grad()
def alone(
    model: LoadedModel, layer: Any, inputs: Any, scale: float, total: int, biases: frozenset[str]
) -> torch.Tensor:
    """The routed output of one block with three experts and a multiplied router weight."""
    (path,) = model.paths[layer]
    block = model.model.get_submodule(path.rpartition(".")[0])
    experts = model.model.get_submodule(path)
    own = {
        name: p
        for name, p in block.named_parameters()
        if "experts" not in name
        and ((p.ndim == 2 and p.shape[0] == total) or name.rpartition(".")[2] in biases)
    }
    assert own
    old = {name: p.clone() for name, p in own.items()}
    for p in own.values():
        p.data *= scale
    found: list[torch.Tensor] = []
    handle = experts.register_forward_hook(lambda _, __, out: found.append(kept(out)))
    counts = [
        (m, n)
        for m in [*block.modules(), getattr(block, "config", None)]
        if m is not None
        for n in ("top_k", "num_experts_per_tok")
        if isinstance(vars(m).get(n), int)
    ]
    before = [(m, n, getattr(m, n)) for m, n in counts]
    for m, n in counts:
        setattr(m, n, 3)
    block(*inputs[0], **inputs[1])
    for m, n, value in before:
        setattr(m, n, value)
    handle.remove()
    for name, p in own.items():
        p.data.copy_(old[name])
    return found[-1]


def test_the_model_is_as_it_was_afterwards(tmp_path: Path) -> None:
    """Routers, counts and hooks are restored after every setting."""
    build("deepseek_v3", tmp_path, dtype="float32")
    with at_work(tmp_path, 3) as (model, moe, counts):
        before = runner.forward(model.model, IDS).logits
        found = measure(model, TEXT, moe, counts, fitted=True, biases=frozenset())
        held = Text(TEXT.tokens[: 2 * LENGTH], length=LENGTH)
        guard.run_trials(model, held, moe, counts, found, by="loss", biases=frozenset())
        assert torch.equal(before, runner.forward(model.model, IDS).logits)


def test_settings_are_scored_as_the_models_that_they_stand_for(tmp_path: Path) -> None:
    """Hooks for count, factors and scales give the loss of a model with multiplied weights."""
    build("mixtral", tmp_path / "m", dtype="float32")
    with at_work(tmp_path / "m", 3) as (model, moe, counts):
        layers = list(model.paths)
        settings = [
            Setting(dict.fromkeys(layers, 2)),
            Setting(dict.fromkeys(layers, 3)),
            Setting(
                dict.fromkeys(layers, 3), dict.fromkeys(layers, 1.25), dict.fromkeys(layers, 2.0)
            ),
        ]
        scores = evaluate(model, TEXT, moe, counts, settings, biases=frozenset())
    for number, (score, count) in enumerate(zip(scores, (2, 3, 3), strict=True)):
        other = tiny_models.load(tmp_path / "m", "mixtral", top_k=count)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if number == 2 and name.endswith("gate.weight"):
                    p *= 2.0
                if number == 2 and name.endswith("down_proj"):
                    p *= 1.25
            logits = other(input_ids=IDS, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        assert score.loss == pytest.approx(float(loss), abs=2e-5)
    assert scores[0].divergence == 0.0
    assert scores[2].divergence > 0


def test_the_guard_takes_what_loses_least(tmp_path: Path) -> None:
    """The config edit wins if it loses least: samples that make no sense are not used."""
    build("mixtral", tmp_path, dtype="float32")
    with at_work(tmp_path, 3) as (model, moe, counts):
        found = measure(model, TEXT, moe, counts, fitted=True, biases=frozenset())
        nonsense = {layer: inflated(sample) for layer, sample in found.items()}
        tried = guard.run_trials(
            model, TEXT, moe, counts, nonsense, by="divergence", biases=frozenset()
        )
        assert tried.taken == "none"
        assert [trial.rule for trial in tried.trials] == ["none", "measured", "fitted"]
        assert tried.as_json()["taken"] == "none"
        assert tried.trials[0].difference == tried.trials[0].standard_error == 0.0
        good = guard.run_trials(
            model, TEXT, moe, counts, found, by="divergence", biases=frozenset()
        )
        best = min(good.trials, key=lambda trial: trial.divergence)
        assert good.taken == best.rule


def inflated(sample: Sample) -> Sample:
    """A sample whose factors are a hundred times too large."""
    from dataclasses import replace

    assert sample.fit is not None and sample.after.norm is not None
    after = replace(sample.after, norm=sample.after.norm / 100)
    return replace(sample, after=after, fit=replace(sample.fit, factor=sample.fit.factor * 100))


def test_standard_errors_are_of_paired_differences() -> None:
    """A difference that is the same in every sequence has no error, however the losses vary."""
    assert paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [10, 10, 10]) == pytest.approx(0, abs=1e-12)
    found = paired([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [5, 5, 5, 5])
    assert found == pytest.approx(np.std([0, 1, 2, 3], ddof=1) / math.sqrt(4))


def test_a_model_writes_the_same_text_twice_and_it_is_read_again(tmp_path: Path) -> None:
    """The seed is fixed; a saved file gives the same tokens."""
    build("mixtral", tmp_path / "m", dtype="float32", config={"vocab_size": 256})
    own = {"SEQUENCES": 4, "LENGTH": 16, "SEQUENCES_PER_BATCH": 2}
    with pytest.MonkeyPatch.context() as patch, at_work(tmp_path / "m", 3) as (model, _, __):
        for name, value in own.items():
            patch.setattr(generated_text, name, value)
        patch.setattr("moescale.calibrate.text.MIN_TOKENS", 16)
        first = generated_text.write_text(model.model, None, 256)
        state = torch.random.get_rng_state()
        assert generated_text.write_text(model.model, None, 256) == first
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (len(first.tokens), first.length) == (64, 16)
        assert generated_text.digest_of(first) == generated_text.digest_of(first)
        generated_text.keep_text(first, None, tmp_path / "text.jsonl")
        from moescale.calibrate.text import read_text

        again = read_text(tmp_path / "text.jsonl", tmp_path / "m", 256)
        assert (again.tokens, again.length) == (first.tokens, first.length)


def test_a_router_is_scaled_as_a_conversion_writes_it() -> None:
    """The product is one of float32 numbers, rounded once."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    wanted = (weight.float().numpy() * np.float32(1.37)).astype(np.float32)
    assert torch.equal(scaled(weight, 1.37), torch.from_numpy(wanted).to(torch.bfloat16))
