"""Checkpoints with published sizes and names, as sparse shards: the plan is right for each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import sparse_checkpoints as sparse

from moescale import api
from moescale.errors import UnsupportedError


@dataclass(frozen=True)
class Wanted:
    """The expected plan of a published checkpoint."""

    published: sparse.Published
    layers: list[int]
    projections: int
    ends: str
    before: int
    total: int
    renormalised: bool
    places: tuple[str, ...] = ("",)
    key: str = "num_experts_per_tok"


WANTED = {
    "WizardLM-2-8x22B": Wanted(
        sparse.wizardlm(), list(range(56)), 448, ".w2.weight", 2, 8, renormalised=True
    ),
    "Qwen3.5-25B-REAP": Wanted(
        sparse.qwen_reap(), list(range(40)), 7200, ".down_proj.weight", 8, 180, renormalised=True
    ),
    "DeepSeek-OCR-2": Wanted(
        sparse.deepseek_ocr(),
        list(range(1, 12)),
        704,
        ".down_proj.weight",
        6,
        64,
        renormalised=False,
        places=("", "language_config"),
    ),
    "XVERSE-MoE-A4.2B": Wanted(
        sparse.xverse(),
        list(range(28)),
        1792,
        ".down_proj.weight",
        6,
        64,
        renormalised=True,
        key="moe_top_k",
    ),
    "Step-3.5-Flash": Wanted(
        sparse.step(),
        list(range(3, 45)),
        42,
        ".moe.down_proj.weight",
        8,
        288,
        renormalised=True,
        key="moe_top_k",
    ),
    "granite-3.1-1b-a400m": Wanted(
        sparse.granite(), list(range(24)), 24, ".output_linear.weight", 8, 32, renormalised=True
    ),
}

published = pytest.mark.parametrize("name", WANTED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all of them; each test reads one."""
    root = tmp_path_factory.mktemp("published")
    for name, wanted in WANTED.items():
        sparse.write(root / name, wanted.published)
    return root


def counts(config: bytes, wanted: Wanted) -> list[Any]:
    """The experts per token at each place of a config."""
    value = json.loads(config)
    return [(value[p] if p else value)[wanted.key] for p in wanted.places]


@published
@pytest.mark.parametrize("step", [-1, 1, 2])
def test_every_projection_is_planned(name: str, step: int, folder: Path) -> None:
    """All routed down-projections and no other tensor, the right factor, and every count set."""
    wanted = WANTED[name]
    after = wanted.before + step
    plan = api.plan(folder / name, experts=after, rule="preserve")
    planned = [t.tensor.name for t in plan.tensors]
    routed = {n for n in wanted.published.shapes if n.endswith(wanted.ends) and "shared" not in n}
    routed = {n for n in routed if "experts" in n or "output_linear" in n or ".moe." in n}
    assert len(planned) == wanted.projections and set(planned) == routed
    assert [int(layer) for layer in plan.factors] == wanted.layers
    assert plan.experts.total == wanted.total and plan.experts.before == wanted.before
    ratio = after / wanted.before if wanted.renormalised else wanted.before / after
    assert len(set(plan.factors.values())) == 1
    assert plan.factors[str(wanted.layers[0])] == pytest.approx(math.sqrt(ratio), rel=1e-15)
    assert counts(plan.config, wanted) == [after] * len(wanted.places)
    assert plan.bytes_changed == sum(t.tensor.nbytes for t in plan.tensors)
    assert plan.bytes_written == pytest.approx(wanted.published.nbytes, rel=0.01)


@published
def test_the_range_ends_at_the_number_of_experts(name: str, folder: Path) -> None:
    """All experts are accepted; one more is refused with the allowed range."""
    total = WANTED[name].total
    assert api.plan(folder / name, experts=total).experts.after == total
    with pytest.raises(UnsupportedError, match=f"{total} routed experts") as caught:
        api.plan(folder / name, experts=total + 1)
    assert caught.value.hint is not None and f"from 1 to {total}" in caught.value.hint
