"""How much of a model a token uses, counted from the shapes and compared with tensor names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load as read_tensors
from support import checkpoints, tiny_models
from support import quantised_checkpoints as quantised
from support.gguf_models import read_model, write_model

import moescale
from moescale.planning.active import Active
from moescale.report.terminal import active_text

FUSED = {"granitemoe": r"input_linear|output_linear", "dbrx": "experts", "gpt_oss": "experts"}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3", *FUSED])
def test_routed_experts_count_in_part(kind: str, tmp_path: Path) -> None:
    """In every layout, the tensors of the routed experts are those with the expected names."""
    tiny_models.build(kind, tmp_path / "in")
    plan = moescale.plan(tmp_path / "in", experts=1, rule="none")
    assert plan.active is not None and plan.active.unit == "parameters"
    sizes = {
        name: math.prod(tensor.shape)
        for shard in (tmp_path / "in").glob("*.safetensors")
        for name, tensor in read_tensors(shard.read_bytes()).items()
    }
    words = FUSED.get(kind, "experts").split("|")
    routed = sum(
        count
        for name, count in sizes.items()
        if any(word in name for word in words) and "shared" not in name
    )
    rest, each = sum(sizes.values()) - routed, routed / plan.experts.total
    assert routed > 0
    before, after = rest + each * plan.experts.before, rest + each
    assert (plan.active.before, plan.active.after) == (round(before), round(after))
    assert plan.active.total == sum(sizes.values())
    assert plan.as_json()["active"]["before"] == round(before)


def test_codes_of_any_width_are_counted_in_bytes(tmp_path: Path) -> None:
    """A quantised model is counted in bytes."""
    case = next(c for c in quantised.EXACT if c.id == "block FP8, BF16 scales")
    quantised.write(case, tmp_path / "in")
    used = moescale.plan(tmp_path / "in", factor=1.5).active
    assert used is not None and used.unit == "bytes"
    assert used.before == used.after <= used.total


def test_a_gguf_file(tmp_path: Path) -> None:
    """Each kind of expert matrix is one tensor; 2 of 4 experts are used, then 3."""
    (path,) = write_model(tmp_path / "m.gguf")
    used = moescale.plan(path, experts=3, rule="none").active
    _, tensors = read_model(path)
    routed = sum(t.n_elements for name, t in tensors.items() if "_exps" in name)
    rest = sum(t.n_elements for t in tensors.values()) - routed
    assert used == Active(rest + routed // 2, rest + routed * 3 // 4, rest + routed, "parameters")


def test_counts_by_layer(tmp_path: Path) -> None:
    """Each layer counts its own share."""
    source = checkpoints.mixtral(tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_bytes())
    path.write_text(json.dumps({**config, "num_experts_per_tok": [1, 3]}))
    one = moescale.plan(source, experts=2, rule="none").active
    path.write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    two = moescale.plan(source, experts=3, rule="none").active
    assert one is not None and two is not None
    assert one.before == one.after == two.before  # both layers are alike


@pytest.mark.parametrize(
    ("used", "text"),
    [
        (Active(3_300, 5_300, 30_500, "parameters"), "3.3 -> 5.3 of 30.5 thousand parameters"),
        (
            Active(13_000_000_000, 18_000_000_000, 46_700_000_000, "parameters"),
            "13 -> 18 of 46.7 billion parameters per token: x 1.4 the time",
        ),
        (
            Active(2_000_000_000, 1_000_000_000, 9_000_000_000, "bytes"),
            "2 -> 1 of 9 GB of weights per token: x 0.5 the time",
        ),
        (Active(0, 0, 0, "parameters"), "0 of 0 parameters"),
        (Active(5_000_000, 5_000_000, 9_000_000, "bytes"), "5 of 9 MB of weights"),
    ],
)
def test_the_text(used: Active, text: str) -> None:
    """The three numbers share one unit, followed by the effect of the change."""
    assert active_text(used).startswith(text)
