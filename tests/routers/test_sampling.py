"""The rule gates on checkpoints: what is read, what is refused, and that runs agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import checkpoints, tiny_models
from support.checkpoints import HIDDEN, Raw, values, write_shards
from support.gated_checkpoints import EXPERTS, GATE, NORM, gated_mixtral, gated_tensors
from support.hub_checkpoints import Lab

from moescale import api
from moescale.errors import CheckpointError, SourceError, UnsupportedError
from moescale.options import Options
from moescale.planning import sampling
from moescale.planning.decide import make_plan
from moescale.planning.sampling import decode
from moescale.storage.hub.source import HubSource
from moescale.storage.location import HubRef

# In these, every layer has its own router; k goes from 2 to 5 of 8.
MODELS = {
    "mixtral": {},
    "olmoe": {},
    "deepseek_v3": {"n_group": 4, "topk_group": 3},
    "gpt_oss": {},
}


@torch.no_grad()
@pytest.mark.parametrize("entry", MODELS)
def test_the_factor_is_that_of_the_models_router(entry: str, tmp_path: Path) -> None:
    """Transformers' router gives the same factors for inputs drawn by torch, within sampling error.

    The plan states that error.
    """
    tiny_models.build(entry, tmp_path, config=MODELS[entry])
    plan = api.plan(tmp_path, experts=5, rule="gates")
    error = plan.as_json()["factor_error"]
    assert 0 < error < 0.01
    assert f"standard error at most {error:.2%}" in plan.summary()
    sizes: dict[int, list[float]] = {2: [], 5: []}
    for k, found in sizes.items():
        model = tiny_models.load(tmp_path, entry, top_k=k)
        layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
        for number, layer in enumerate(layers):
            drawn = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(number))
            router = layer.mlp.router if entry == "gpt_oss" else layer.mlp.gate
            weights = router(layer.post_attention_layernorm(drawn))[1]
            found.append(float(weights.double().square().sum(-1).mean()))
    wanted = np.sqrt(np.array(sizes[2]) / np.array(sizes[5]))
    assert list(plan.factors.values()) == pytest.approx(wanted, rel=5 * error)


def test_a_block_that_predicts_a_second_token_has_its_own_factor(tmp_path: Path) -> None:
    """The router of an MTP block is sampled like the others."""
    tiny_models.build("qwen3_next", tmp_path, mtp=True)
    factors = api.plan(tmp_path, experts=4, rule="gates").factors
    assert list(factors) == ["1", "2", "mtp.0"]
    assert len(set(factors.values())) == 3


def test_every_sampled_layer_is_reported(tmp_path: Path) -> None:
    """Layers done and their total are reported; a plan by another rule reports nothing."""
    tiny_models.build("mixtral", tmp_path)
    told: list[tuple[int, int]] = []
    api.plan(tmp_path, experts=3, rule="gates", measuring=lambda *now: told.append(now))
    assert told == [(1, 3), (2, 3), (3, 3)]
    api.plan(tmp_path, experts=3, rule="preserve", measuring=lambda *now: told.append(now))
    assert len(told) == 3


def test_counts_may_differ_by_layer(tmp_path: Path) -> None:
    """Each layer is sampled with its trained count."""
    tiny_models.build("hunyuan_v1_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe_topk"] = [1, 2, 3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    samples = api.plan(tmp_path, experts=3, rule="gates").samples
    assert [sample.before.experts for sample in samples.values()] == [1, 2, 3]
    assert {sample.after.experts for sample in samples.values()} == {3}
    assert api.plan(tmp_path, experts=3, rule="gates").factors["2"] == 1.0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_a_router_is_read_in_every_plain_dtype(dtype: str) -> None:
    """The numbers are the values of the bytes."""
    numbers = np.array([0.0, 1.5, -2.25, 2.0**-10])
    raw = {
        "BF16": lambda: (numbers.astype("<f4").view("<u4") >> 16).astype("<u2"),
        "F16": lambda: numbers.astype("<f2"),
        "F32": lambda: numbers.astype("<f4"),
        "F64": lambda: numbers.astype("<f8"),
    }[dtype]()
    assert np.array_equal(decode(raw.tobytes(), dtype), numbers)


def test_runs_agree_to_the_last_byte(tmp_path: Path) -> None:
    """Two runs write the same output, which is verified; the provenance has the factors."""
    gated_mixtral(tmp_path / "in")
    for name in ("one", "two"):
        plan = api.convert(
            tmp_path / "in", tmp_path / name, experts=4, rule="gates", rho=0.25, verify=True
        ).plan
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "two")
    written = json.loads((tmp_path / "one" / "moescale.json").read_text())
    assert written["factors"] == dict(plan.factors)
    assert (written["rule"], written["rho"]) == ("gates", 0.25)
    assert len(set(plan.factors.values())) == 2


def test_the_factors_can_be_used_again(tmp_path: Path) -> None:
    """The factors of one output, given as --factors, make the same shards."""
    gated_mixtral(tmp_path / "in")
    api.convert(tmp_path / "in", tmp_path / "one", experts=4, rule="gates")
    factors = json.loads((tmp_path / "one" / "moescale.json").read_text())["factors"]
    api.convert(tmp_path / "in", tmp_path / "two", experts=4, factors=factors)
    one, two = (checkpoints.tree(tmp_path / name) for name in ("one", "two"))
    shards = [name for name in one if name.endswith(".safetensors")]
    assert shards
    assert all(one[name] == two[name] for name in shards)


# Refusals -----------------------------------------------------------------------------------------

G8 = ("F8_E4M3", (EXPERTS, HIDDEN), bytes(EXPERTS * HIDDEN))
NAN = values("F32", (EXPERTS, HIDDEN), special=True)
WRONG: dict[str, tuple[dict[str, Raw | None], type[SourceError], str]] = {
    "no router": ({GATE.format(1): None}, CheckpointError, "routed experts, but no router"),
    "no norm": ({NORM.format(1): None}, CheckpointError, "no post_attention_layernorm.weight"),
    "quantised": ({GATE.format(1): G8}, UnsupportedError, "is F8_E4M3"),
    "turned": (
        {GATE.format(1): values("BF16", (HIDDEN, EXPERTS))},
        CheckpointError,
        r"its shape is \[8, 4\], but that of",
    ),
    "all turned": (
        {GATE.format(layer): values("F32", (HIDDEN, EXPERTS)) for layer in (0, 1)},
        CheckpointError,
        r"layers\.0.*its shape is \[8, 4\], not \[4, 8\]",
    ),
    "empty": (
        {GATE.format(1): ("F32", (EXPERTS, 0), b""), NORM.format(1): ("F32", (0,), b"")},
        CheckpointError,
        r"its shape is \[4, 0\], but that of",
    ),
    "logits beyond float64": (
        {GATE.format(1): ("F64", (EXPERTS, HIDDEN), np.full(EXPERTS * HIDDEN, 1e308).tobytes())},
        CheckpointError,
        "gate weights that are zero or not finite",
    ),
    "not numbers": ({GATE.format(1): NAN}, CheckpointError, "values that are not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_router_that_cannot_be_read_is_refused(what: str, tmp_path: Path) -> None:
    """The error names the tensor or the layer; the closed form does not read the router."""
    changes, error, why = WRONG[what]
    gated_mixtral(tmp_path, changes)
    with pytest.raises(error, match=why) as caught:
        api.plan(tmp_path, experts=3, rule="gates")
    assert what == "all turned" or "layers.1" in caught.value.message
    assert caught.value.hint
    if what in ("no router", "turned", "empty"):  # no rule scales only a part of a model
        with pytest.raises(error, match=why):
            api.plan(tmp_path, experts=3, rule="preserve")
    else:
        api.plan(tmp_path, experts=3, rule="preserve")


def test_groups_that_do_not_divide_the_experts_are_refused(tmp_path: Path) -> None:
    """No model has groups of unequal size."""
    tiny_models.build("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_group"], config["topk_group"] = 3, 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="8 experts do not form 3 equal groups"):
        api.plan(tmp_path, experts=3, rule="gates")


def test_a_router_too_large_to_be_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are read whole have a size limit."""
    gated_mixtral(tmp_path)
    monkeypatch.setattr(sampling, "SMALL_FILE_BYTES", 10)
    with pytest.raises(CheckpointError, match="too large for a router"):
        api.plan(tmp_path, experts=3, rule="gates")


def test_an_unknown_score_is_refused(tmp_path: Path) -> None:
    """A score function in the config that the table lacks is not guessed."""
    tiny_models.build("inkling2_text", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["scoring_func"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="relu"):
        api.plan(tmp_path, experts=3, rule="gates")


def test_a_type_that_only_a_pattern_describes_is_refused(tmp_path: Path) -> None:
    """The router is unknown, so the error suggests the closed form."""
    gated_mixtral(tmp_path)
    config = (tmp_path / "config.json").read_text().replace("mixtral", "newer")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedError) as caught:
        api.plan(
            tmp_path,
            experts=3,
            rule="gates",
            pattern=r".*\.(?P<layer>\d+)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.w2\.weight",
            experts_key="num_experts_per_tok",
        )
    assert "--rule preserve" in str(caught.value)


def test_norms_that_mlx_may_have_changed_are_refused(tmp_path: Path) -> None:
    """Conversion by mlx-lm adds 1 to zero-centred norms, which the file does not show."""
    tiny_models.build("qwen3_next", tmp_path, fused=True)
    tensors = {
        name.replace("mlp.experts.down_proj", "mlp.switch_mlp.down_proj.weight"): tensor
        for name, tensor in tiny_models._read(tmp_path).items()
    }
    tiny_models._write(tmp_path, tensors)
    with pytest.raises(UnsupportedError, match="mlx-lm"):
        api.plan(tmp_path, experts=3, rule="gates")
    api.plan(tmp_path, experts=3)


# From the Hub -------------------------------------------------------------------------------------


def test_the_hub_gives_the_same_factors(lab: Lab) -> None:
    """Routers are read by ranges, and the plan is that of a local directory."""
    hub = lab.start()
    folder = lab.root / "gated"
    gated_mixtral(folder)
    hub.add_repo("lab/gated", {name: folder / name for name in checkpoints.tree(folder)})
    plans = [
        json.loads(lab.done(source, "-k", "3", "--rule", "gates", "--dry-run", "--json").out)
        for source in ("lab/gated", str(folder))
    ]
    assert plans[0]["factors"] == plans[1]["factors"]
    assert plans[0]["source"]["kind"] == "hub"
    assert len(set(plans[0]["factors"].values())) == 2


def test_only_routers_come_over_the_network(lab: Lab) -> None:
    """The plan fetches the header of a shard and the byte ranges of its routers."""
    hub = lab.start()
    folder = lab.root / "gated"
    write_shards(folder, {"model.embed": values("F32", (1000, 500)), **gated_tensors()}, 1)
    (folder / "config.json").write_bytes(checkpoints.MIXTRAL_CONFIG.encode())
    hub.add_repo("lab/gated", {name: folder / name for name in checkpoints.tree(folder)})
    source = HubSource(HubRef("lab/gated"))
    plan = make_plan(source, Options(experts=3, rule="gates"))
    assert plan.factors == api.plan(folder, experts=3, rule="gates").factors
    assert source.received < 40_000 < folder.joinpath("model.safetensors").stat().st_size / 10
    lab.done("lab/gated", str(lab.root / "out"), "-k", "3", "--rule", "gates", "--verify", "-q")
