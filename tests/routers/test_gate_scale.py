"""--gate-scale: the logits of every router multiplied by one number, or a clear refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints, tiny_models
from support.gated_checkpoints import GATE, LAYERS, gated_mixtral
from support.tiny_models import TINY, build
from test_weights import FORMED, build_formed, routers_of, transformers_weights

from moescale import api
from moescale.errors import CheckpointError, UnsupportedError, UsageError, VerificationError
from moescale.families.architectures import find
from moescale.planning.sampling import Routers
from moescale.report.terminal import plan_text
from moescale.routers.kinds import RouterKind
from moescale.routers.weights import RouterArrays, gate_weights

SCALE = 2.5

pytestmark = [
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


def router_kind(entry: str) -> RouterKind:
    """The row of a type whose router can be computed."""
    row = find(*entry.split("/")).router
    assert isinstance(row, RouterKind)
    return row


SUMS = {"mistral4", "mistral3", "mistral_large4", "mistral_large4_text"}
"""Types that choose groups by sums of scores."""
SCALES = [e for e in FORMED if not router_kind(e).bias and e not in SUMS]
UNWEIGHTED = "flex_olmo"  # a norm undoes scaled experts, but not changed gate weights
MOVES = [e for e in FORMED if e not in SCALES]
OTHERS = [e for e in TINY if e not in (*SCALES, *MOVES, UNWEIGHTED)]


# What transformers computes -----------------------------------------------------------------------


def assert_weighs_scaled_logits(
    output: Path, entry: str, routers: Routers, before: Sequence[RouterArrays], scale: float
) -> None:
    """Transformers forms an output's gate weights as the source's routers do from scaled logits."""
    model = tiny_models.load(output, entry)
    blocks = list(tiny_models._blocks(model, TINY[entry]))
    for number, (block, router) in enumerate(zip(blocks, before, strict=True)):
        hidden = tiny_models._inputs(model, number)[0]
        logits = hidden[0].double().numpy() @ router.weight.T
        if router.logit_bias is not None:
            logits = logits + router.logit_bias
        ours = gate_weights(scale * logits, 2, routers.gate, router.bias)
        theirs = transformers_weights(block, entry, hidden, routers)
        constant = (ours * theirs).sum() / (ours**2).sum()
        assert np.abs(theirs / constant - ours).max() < 3e-6


@pytest.mark.parametrize("entry", SCALES)
def test_the_choice_stays_and_weights_are_those_of_scaled_logits(
    entry: str, tmp_path: Path
) -> None:
    """Transformers chooses the same experts, with the gate weights of the scaled logits."""
    build_formed(entry, tmp_path / "in")
    part = entry.partition("/")[2] or None
    plan = api.convert(tmp_path / "in", tmp_path / "out", gate_scale=SCALE, part=part).plan
    routers, before = routers_of(tmp_path / "in", entry)
    assert len([t for t in plan.tensors if t.role == "router"]) == len(before) * (
        1 + (before[0].logit_bias is not None)
    )
    assert_weighs_scaled_logits(tmp_path / "out", entry, routers, before, SCALE)


@torch.no_grad()
def test_the_same_experts_are_chosen(tmp_path: Path) -> None:
    """Mixtral keeps its indices, and its gate weights are the softmax of the scaled logits."""
    build("mixtral", tmp_path / "in")
    api.convert(tmp_path / "in", tmp_path / "out", gate_scale=SCALE)
    hidden = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("in", "out"):
        gate = tiny_models.load(tmp_path / name, "mixtral").model.layers[0].mlp.gate
        found.append(gate(hidden))
    (logits, _, before), (_, weights, after) = found
    assert torch.equal(before, after)
    wanted = torch.softmax(SCALE * logits.gather(1, before), dim=-1)
    assert (weights - wanted).abs().max() < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("entry", MOVES)
def test_a_choice_that_may_move_is_said_and_made_as_transformers_makes_it(
    entry: str, tmp_path: Path
) -> None:
    """If more than the order of the logits decides, the choice follows the scaled logits."""
    build_formed(entry, tmp_path / "in")
    part = entry.partition("/")[2] or None
    plan = api.convert(tmp_path / "in", tmp_path / "out", gate_scale=1.25, part=part).plan
    assert any("may change which experts are chosen" in warning for warning in plan.warnings)
    routers, before = routers_of(tmp_path / "in", entry)
    assert {t.role for t in plan.changed_tensors} == {"router"}
    assert len(plan.changed_tensors) == len(before) * (1 + (before[0].logit_bias is not None))
    assert_weighs_scaled_logits(tmp_path / "out", entry, routers, before, 1.25)


@pytest.mark.parametrize("entry", OTHERS)
def test_a_router_that_cannot_be_scaled_is_refused(entry: str, tmp_path: Path) -> None:
    """The error gives the reason, and says to leave --gate-scale out."""
    build(entry, tmp_path)
    part = entry.partition("/")[2] or None
    with pytest.raises(UnsupportedError) as caught:
        api.plan(tmp_path, gate_scale=SCALE, rule="none", part=part)
    assert "--gate-scale cannot be used with the router of" in caught.value.message
    assert "Leave --gate-scale out" in str(caught.value.hint)


def test_a_norm_on_the_routed_output_is_no_obstacle(tmp_path: Path) -> None:
    """If scaling the experts has no effect, the gate can still be sharpened."""
    build(UNWEIGHTED, tmp_path)
    plan = api.plan(tmp_path, gate_scale=SCALE, rule="none")
    assert {t.role for t in plan.changed_tensors} == {"router"}


# The run ------------------------------------------------------------------------------------------


def test_only_routers_change(tmp_path: Path) -> None:
    """Without --experts, the routers' weights are multiplied and every other byte stays."""
    gated_mixtral(tmp_path / "in")
    plan = api.convert(tmp_path / "in", tmp_path / "out", gate_scale=SCALE, verify=True).plan
    assert plan.rule == "none" and plan.why
    assert set(plan.factors.values()) == {1.0}
    for name, data in checkpoints.tree(tmp_path / "in").items():
        wanted = data
        if name.endswith(".safetensors"):
            gates = {GATE.format(layer): SCALE for layer in range(LAYERS)}
            wanted = checkpoints.rescaled(data, gates)
        assert (tmp_path / "out" / name).read_bytes() == wanted, name


def test_the_plan_and_the_provenance_name_it(tmp_path: Path) -> None:
    """Each router is a planned tensor with its role, and moescale.json contains the number."""
    gated_mixtral(tmp_path / "in")
    options: dict[str, Any] = {"experts": 3, "rule": "gates", "gate_scale": SCALE}
    plan = api.convert(tmp_path / "in", tmp_path / "out", **options).plan
    content = plan.as_json()
    routers = [t for t in content["tensors"] if t["role"] == "router"]
    assert [(t["name"], t["layer"], t["factor"]) for t in routers] == [
        (GATE.format(layer), layer, SCALE) for layer in range(LAYERS)
    ]
    written = json.loads((tmp_path / "out" / "moescale.json").read_text())
    assert written["gate_scale"] == content["gate_scale"] == SCALE
    assert written["options"]["gate_scale"] == SCALE
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| router weights | multiplied by {SCALE:g} |" in card


def test_the_plan_for_people_names_it(tmp_path: Path) -> None:
    """The text says what the routers are multiplied by, and lists their tensors by layer."""
    gated_mixtral(tmp_path)
    text = plan_text(api.plan(tmp_path, experts=3, rule="gates", gate_scale=0.5))
    assert "the routers' weights are multiplied by 0.5: flatter" in text
    assert re.search(r"\b1 +router +BF16 +0\.5\b", text)


def test_a_card_without_other_changes_says_so(tmp_path: Path) -> None:
    """If the experts do not change, the card does not claim that they were multiplied."""
    gated_mixtral(tmp_path / "in")
    api.convert(tmp_path / "in", tmp_path / "out", gate_scale=SCALE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the experts are unchanged" in card
    assert "down-projections" not in card


def test_verification_sees_a_router_that_was_not_scaled(tmp_path: Path) -> None:
    """If the provenance has the number but a router is unscaled, the error names its tensor."""
    gated_mixtral(tmp_path / "in")
    how = {"experts": 3, "rule": "none", "gate_scale": SCALE}
    api.convert(tmp_path / "in", tmp_path / "out", **how)
    for shard in (tmp_path / "in").glob("*.safetensors"):
        (tmp_path / "out" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(VerificationError, match=r"gate\.weight"):
        api.verify(tmp_path / "in", tmp_path / "out", **how)


def test_one_copies(tmp_path: Path) -> None:
    """A scale of 1 changes no value."""
    gated_mixtral(tmp_path / "in")
    plan = api.convert(tmp_path / "in", tmp_path / "out", gate_scale=1.0).plan
    assert plan.changed_tensors == ()


def test_the_rule_gates_sees_the_new_gate(tmp_path: Path) -> None:
    """The samples after the change equal those of a router that was scaled before sampling."""
    gated_mixtral(tmp_path / "in", dtype="F32")
    api.convert(tmp_path / "in", tmp_path / "out", gate_scale=2.0)
    wanted = api.plan(tmp_path / "out", experts=3, rule="gates").samples
    found = api.plan(tmp_path / "in", experts=3, rule="gates", gate_scale=2.0).samples
    for layer, sample in found.items():
        assert sample.after == wanted[layer].after
        assert sample.before != wanted[layer].before


@pytest.mark.parametrize("rule", ["preserve", "published"])
def test_the_closed_forms_do_not_see_it(rule: str, tmp_path: Path) -> None:
    """A rule that assumes a balanced gate is allowed, and a warning suggests --rule gates."""
    gated_mixtral(tmp_path)
    plan = api.plan(tmp_path, experts=3, rule=rule, gate_scale=SCALE)
    assert any("--rule gates" in warning for warning in plan.warnings)
    assert plan.factors == api.plan(tmp_path, experts=3, rule=rule).factors


@pytest.mark.parametrize("options", [{"rule": "gates"}, {"rule": "none"}, {"factor": 1.5}])
def test_no_warning_where_there_is_nothing_to_say(options: dict[str, Any], tmp_path: Path) -> None:
    """Rules that sample the gate, or do not depend on it, give no warning."""
    gated_mixtral(tmp_path)
    assert api.plan(tmp_path, experts=3, gate_scale=SCALE, **options).warnings == ()


def test_it_goes_with_the_inverse_fold(tmp_path: Path) -> None:
    """The norm before a router cancels the smaller stream, so the two can be combined."""
    build("gpt_oss", tmp_path / "in")
    plan = api.convert(
        tmp_path / "in",
        tmp_path / "out",
        factor=1.5,
        fold="residual",
        gate_scale=SCALE,
        verify=True,
    ).plan
    assert {t.factor for t in plan.tensors if t.role == "router"} == {SCALE}
    assert {t.factor for t in plan.tensors if t.role != "router"} == {1 / 1.5}


# Refusals -----------------------------------------------------------------------------------------


def test_every_layer_needs_its_router(tmp_path: Path) -> None:
    """A model is refused if one of its routers would stay unscaled."""
    gated_mixtral(tmp_path, {GATE.format(1): None})
    with pytest.raises(CheckpointError, match=r"layers\.1: has routed experts, but no"):
        api.plan(tmp_path, gate_scale=SCALE)


def test_a_quantised_router_is_refused(tmp_path: Path) -> None:
    """Quantised codes cannot be multiplied."""
    gated_mixtral(tmp_path, {GATE.format(1): ("F8_E4M3", (4, 8), bytes(32))})
    with pytest.raises(UnsupportedError, match="needs an unquantised router"):
        api.plan(tmp_path, gate_scale=SCALE)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e39, 1e-46])
def test_a_number_that_is_none_is_refused(scale: float) -> None:
    """The scale must be positive, finite and within the range of float32."""
    with pytest.raises(UsageError, match="--gate-scale"):
        api.plan("anywhere", gate_scale=scale)


def test_folding_into_the_config_is_refused() -> None:
    """--fold config guarantees that no weight changes."""
    with pytest.raises(UsageError, match="--fold config"):
        api.plan("anywhere", factor=2.0, fold="config", gate_scale=SCALE)
