"""The inverse fold: dividing the rest of the residual stream equals scaling the experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import quantised_checkpoints as q
from support import tiny_models
from support.checkpoints import Raw, values, write_shards

from moescale import api
from moescale.errors import CheckpointError, SourceError, UnsupportedError, UsageError

FACTOR = 1.37


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    """The logits that transformers computes for a fixed text, in float32."""
    torch.set_num_threads(1)
    model = tiny_models.load(directory, "gpt_oss")
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits.double()


def differences(
    folder: Path, eps: float, dtype: str = "float32", **config: int
) -> tuple[float, float]:
    """Largest difference between folding and scaling, and between scaling and the source."""
    source = folder / "source"
    tiny_models.build("gpt_oss", source, dtype=dtype, config={"rms_norm_eps": eps, **config})
    api.convert(source, folder / "scaled", factor=FACTOR, verify=True)
    api.convert(source, folder / "folded", factor=FACTOR, fold="residual", verify=True)
    scaled = logits(folder / "scaled")
    folded = (logits(folder / "folded") - scaled).abs().max()
    return float(folded), float((scaled - logits(source)).abs().max())


def test_folding_gives_the_logits_of_scaling(tmp_path: Path) -> None:
    """Without an epsilon in the norms, the logits are equal except for float32 rounding."""
    folded, scaled = differences(tmp_path, eps=1e-12)
    assert scaled > 0.1
    assert folded < 1e-5


def test_what_epsilon_leaves_is_small(tmp_path: Path) -> None:
    """With the model's epsilon, the difference is small compared with the factor's effect."""
    folded, scaled = differences(tmp_path, eps=1e-5)
    assert folded < 2e-3 * scaled


def test_rounding_in_bf16_stays_that_of_bf16(tmp_path: Path) -> None:
    """If every expert is chosen, no choice can flip: only the rounding of weights differs."""
    every = tiny_models.SIZES["num_local_experts"]
    folded, scaled = differences(tmp_path, eps=1e-5, dtype="bfloat16", num_experts_per_tok=every)
    assert folded < 0.05 * scaled


# Quantised experts ------------------------------------------------------------------------------

CASE = next(case for case in q.POWER_OF_TWO if case.id == "MXFP4, gpt-oss")


def gpt_oss(folder: Path, **changes: Raw | None) -> dict[str, Raw]:
    """A checkpoint with MXFP4 experts and the other writers of the stream; None omits a tensor."""
    tensors: dict[str, Raw | None] = dict(q.tensors(CASE))
    tensors["model.embed_tokens.weight"] = values("BF16", (6, q.OUT), 1, special=False)
    for layer in range(q.LAYERS + 1):
        at = f"model.layers.{layer}.self_attn.o_proj."
        tensors[at + "weight"] = values("BF16", (q.OUT, 8), layer, special=False)
        tensors[at + "bias"] = values("BF16", (q.OUT,), layer + 9, special=False)
    tensors |= {name.replace("__", "."): raw for name, raw in changes.items()}
    present = {name: raw for name, raw in tensors.items() if raw is not None}
    write_shards(folder, present, 2)
    (folder / "config.json").write_text(json.dumps(q.config(CASE)))
    return present


def test_experts_stay_and_all_other_writers_are_divided(tmp_path: Path) -> None:
    """Any factor works with MXFP4: only embedding and attention outputs are divided by it."""
    before = gpt_oss(tmp_path / "in")
    plan = api.convert(
        tmp_path / "in", tmp_path / "out", factor=FACTOR, fold="residual", verify=True
    ).plan
    after = q.read(tmp_path / "out")
    assert set(plan.factors.values()) == {FACTOR}
    for name, old in before.items():
        if "o_proj" in name or "embed" in name:
            wanted = q.array(old) / FACTOR
            np.testing.assert_allclose(q.array(after[name]), wanted, 2**-8, 1e-38)
            assert after[name] != old
        else:
            assert after[name] == old
    assert any("epsilon" in warning for warning in plan.warnings)


def test_mxfp4_points_to_it(tmp_path: Path) -> None:
    """The refusal of a factor that is not a power of two suggests this fold."""
    gpt_oss(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        api.plan(tmp_path, factor=FACTOR)
    assert "--fold residual" in (caught.value.hint or "")


def test_the_card_says_what_was_divided(tmp_path: Path) -> None:
    """The card says that the experts' weights are unchanged."""
    gpt_oss(tmp_path / "in")
    api.convert(tmp_path / "in", tmp_path / "out", factor=FACTOR, fold="residual")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "embedding and the attention outputs are divided" in card


WRONG = {
    "no head": {"lm_head__weight": None},
    "no embedding": {"model__embed_tokens__weight": None},
    "a layer without": {"model__layers__1__self_attn__o_proj__weight": None},
    "a layer too many": {"model__layers__7__self_attn__o_proj__weight": values("BF16", (4, 4))},
    "not plain": {"model__layers__1__self_attn__o_proj__weight": q.raw("U8", [1, 2])},
    "with a scale": {"model__layers__1__self_attn__o_proj__weight_scale": q.raw("F32", [1.0])},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_stream_that_is_not_known_whole_is_refused(what: str, tmp_path: Path) -> None:
    """An undivided writer would spoil the model, so all must be present and unquantised."""
    gpt_oss(tmp_path, **WRONG[what])
    with pytest.raises(SourceError):
        api.plan(tmp_path, factor=FACTOR, fold="residual")


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """An embedding that is also the output head cannot be divided alone."""
    gpt_oss(tmp_path)
    config = {**q.config(CASE), "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="also the head"):
        api.plan(tmp_path, factor=FACTOR, fold="residual")


def test_factors_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    """The stream passes through all layers, so there is one factor for it."""
    gpt_oss(tmp_path)
    with pytest.raises(UsageError, match="one factor"):
        api.plan(tmp_path, factors={"0": 1.1, "1": 1.2, "2": 1.3}, fold="residual")
    with pytest.raises(UnsupportedError) as caught:
        api.plan(tmp_path, factors={"0": 1.1, "1": 1.2, "2": 1.3})
    assert "--fold" not in (caught.value.hint or "")


def test_other_model_types_are_refused(tmp_path: Path) -> None:
    """A stream can be divided only if all its writers are known."""
    q.write(next(case for case in q.EXACT if case.id == "block FP8"), tmp_path)
    with pytest.raises(UnsupportedError, match="residual stream are not known"):
        api.plan(tmp_path, factor=FACTOR, fold="residual")


def test_a_factor_of_one_divides_nothing(tmp_path: Path) -> None:
    """A factor of one leaves every tensor unchanged."""
    before = gpt_oss(tmp_path / "in")
    how = {"factor": 1.0, "experts": 2, "fold": "residual"}
    assert api.convert(tmp_path / "in", tmp_path / "out", verify=True, **how).verified
    assert q.read(tmp_path / "out") == before


def test_a_missing_writer_is_named(tmp_path: Path) -> None:
    """The error names the layer whose writer is missing."""
    gpt_oss(tmp_path, model__layers__1__self_attn__o_proj__weight=None)
    with pytest.raises(CheckpointError, match="layer 1 has no writer"):
        api.plan(tmp_path, factor=FACTOR, fold="residual")
