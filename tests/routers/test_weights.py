"""Routers: the gate weights computed with numpy are those of transformers' router modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import TINY, build
from torch import Tensor, nn

from moescale import api
from moescale.errors import UnsupportedError
from moescale.families.architectures import ROWS, find
from moescale.families.config import CONFIG, parse_config
from moescale.families.find import find_moe
from moescale.planning.sampling import Routers, find_gates, read_gates
from moescale.planning.shards import read_shards
from moescale.routers.kinds import UNKNOWN, RouterKind
from moescale.routers.weights import RouterArrays, gate_weights
from moescale.storage.local.source import LocalSource

ROUTERS = {row.model_type + (f"/{row.part}" if row.part else ""): row.router for row in ROWS}
NAMES = sorted(ROUTERS)


def names_of(row: Any) -> tuple[Any, ...]:
    """All names in a row, tensor by tensor."""
    return row.weight, row.norm, row.bias, row.logit_bias


FORMED = [e for e in TINY if isinstance(ROUTERS[e], RouterKind) and ROUTERS[e].norm]
RENAMED = [e for e in FORMED if any(len(n) > 1 for n in names_of(ROUTERS[e]))]
REFUSED = [e for e in TINY if e not in FORMED]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


def routers_of(directory: Path, entry: str) -> tuple[Routers, list[RouterArrays]]:
    """The routers of a checkpoint as the rule finds and reads them, in layer order."""
    source = LocalSource(directory)
    files = source.files()
    headers = read_shards(source, files).headers
    tensors = [tensor for header in headers.values() for tensor in header.tensors]
    part = entry.partition("/")[2] or None
    moe = find_moe(parse_config(source.read(CONFIG)), tensors, None, part, None, None)
    routers = find_gates(moe, headers)
    return routers, [weights for _, weights in read_gates(source, routers)]


def build_formed(entry: str, directory: Path, **how: Any) -> None:
    """Build a checkpoint whose router can be computed: no layer chooses experts by token id."""
    config = {"mlp_layer_types": ["moe"] * 3} if entry == "deepseek_v4" else {}
    build(entry, directory, config={**config, **how.pop("config", {})}, **how)


# --- What transformers computes ------------------------------------------------------------------


@torch.no_grad()
def transformers_weights(block: tiny_models.MoE, entry: str, hidden: Tensor, routers: Any) -> Any:
    """The gate weights of the chosen experts by transformers, ``[tokens, k]``, largest first."""
    seen: dict[str, Tensor] = {}
    if entry == "doge":
        return _doge(block.block, hidden)
    module = block.block.router if entry == "jetmoe" else block.routed
    hook = module.register_forward_hook(partial(_record, seen))
    tiny_models.FEEDS[TINY[entry].feed](block.block, hidden, torch.zeros(hidden.shape[:2]).long())
    hook.remove()
    weights, index = seen["weights"].double(), seen["index"]
    experts = routers.moe.config.experts
    if routers.gate.zero_experts:
        weights = torch.where(index < experts, weights, 0.0)
    return weights.sort(dim=-1, descending=True)[0].numpy()


def _record(seen: dict[str, Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if type(module).__name__ == "JetMoeTopKGating":
        order, batch, gates, *_ = output
        by_token = batch.argsort(stable=True)
        weights = gates[by_token].reshape(len(args[0]), -1)
        seen["weights"], seen["index"] = weights, order[by_token].reshape(weights.shape)
    else:
        _, seen["index"], seen["weights"], *_ = args


def _doge(block: nn.Module, hidden: Tensor) -> Any:
    """The gate weights, made visible: each expert returns 1 at its own position for any input.

    It runs token by token, since transformers' code mixes tokens of one batch.
    """
    block.act_fn = _Ones()
    block.up_embed.weight.copy_(torch.eye(*block.up_embed.weight.shape))
    block.down_proj.weight.zero_()
    outputs = [block(token[None])[0][0, 0] for token in hidden[0].split(1)]
    return torch.stack(outputs).sort(dim=-1, descending=True)[0][:, : block.top_k].double().numpy()


class _Ones(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)


def constants(folder: Path, routers: Routers, model: nn.Module, k: int) -> list[float]:
    """The constants by which all weights of a layer may differ: from the config, or cancelling."""
    key = routers.moe.architecture.scale_key
    config = parse_config((folder / CONFIG).read_bytes())
    section = config.section(routers.moe.count_keys[0].section) if routers.moe.count_keys else None
    scale = (section or {}).get(key) if key else None
    learned = [m.global_scale.item() for m in model.modules() if hasattr(m, "global_scale")]
    scales = [1.0, 1 / k] + ([float(scale)] if scale else [])
    return scales + [one * scale for one in scales for scale in learned]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("laguna", {"moe_router_logit_softcapping": 1.5}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("deepseek_v3", {"norm_topk_prob": False, "n_group": 4, "topk_group": 2}),
    ("deepseek_v4", {"scoring_func": "sigmoid"}),
    ("olmoe", {"norm_topk_prob": True}),
    ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": None}}),
]
"""Router options that a config can set."""


@pytest.mark.parametrize(
    ("entry", "config"), [*((entry, {}) for entry in FORMED), *VARIANTS], ids=str
)
def test_the_router_is_that_of_transformers(
    entry: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """For the same inputs gate weights agree up to a constant, and so does the norm before."""
    build_formed(entry, tmp_path, config=config)
    routers, weights = routers_of(tmp_path, entry)
    k = 2 if TINY[entry].fixed else 3
    model = tiny_models.load(tmp_path, entry, top_k=None if k == 2 else k)
    blocks = list(tiny_models._blocks(model, TINY[entry]))
    assert_norms(model, entry, blocks, weights)
    known = constants(tmp_path, routers, model, k)
    for number, (block, router) in enumerate(zip(blocks, weights, strict=True)):
        hidden = 2 * tiny_models._inputs(model, number)[0]
        theirs = transformers_weights(block, entry, hidden, routers)
        logits = hidden[0].double().numpy() @ router.weight.T
        if router.logit_bias is not None:
            logits = logits + router.logit_bias
        ours = gate_weights(logits, k, routers.gate, router.bias)
        assert ours.shape == theirs.shape == (len(hidden[0]), k)
        constant = (ours * theirs).sum() / (ours**2).sum()
        assert min(abs(constant / c - 1) for c in known) < 1e-5
        assert np.abs(theirs / constant - ours).max() < 3e-6


@torch.no_grad()
def assert_norms(
    model: nn.Module, entry: str, blocks: list[tiny_models.MoE], weights: list[RouterArrays]
) -> None:
    """In a run of the whole model, the input of a block is a unit input times the norm's weight."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        block.block.register_forward_pre_hook(
            partial(_note_input, inputs, block.path), with_kwargs=True
        )
        for block in blocks
    ]
    tiny_models.RUNS[TINY[entry].run](model, *tiny_models._inputs(model, 0))
    for hook in hooks:
        hook.remove()
    assert inputs
    for block, router in zip(blocks, weights, strict=True):
        if block.path in inputs:
            unit = inputs[block.path].flatten(0, -2).double().numpy() / router.norm
            assert np.sqrt((unit**2).mean(axis=1)) == pytest.approx(1, rel=2e-3), block.path


def _note_input(
    inputs: dict[str, Tensor], path: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    inputs.setdefault(path, args[0] if args else named["hidden_states"])


@pytest.mark.parametrize("entry", RENAMED)
def test_both_layouts_hold_the_same_routers(entry: str, tmp_path: Path) -> None:
    """The names that transformers uses internally are found, as are those of the Hub."""
    for fused in (False, True):
        build_formed(entry, tmp_path / str(fused), fused=fused)
    hub, inside = (routers_of(tmp_path / str(fused), entry)[1] for fused in (False, True))
    for one, other in zip(hub, inside, strict=True):
        for field in ("weight", "norm", "bias", "logit_bias"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), field


def test_every_model_type_has_a_row() -> None:
    """Every router in the table of architectures is computed, or refused with a reason."""
    assert not [name for name, kind in ROUTERS.items() if kind is UNKNOWN]


@pytest.mark.parametrize("entry", [*REFUSED, "deepseek_v4"])
def test_a_router_that_works_otherwise_is_refused(entry: str, tmp_path: Path) -> None:
    """The error gives the reason, and names a rule that works."""
    build(entry, tmp_path)
    part = entry.partition("/")[2] or None
    count = 1 if entry in ("zaya", "switch_transformers") else 2
    with pytest.raises(UnsupportedError) as caught:
        api.plan(tmp_path, experts=count, rule="gates", part=part)
    no_effect = find(*entry.split("/")).no_effect
    assert ("--rule none" if no_effect else "--rule preserve") in str(caught.value.hint)
