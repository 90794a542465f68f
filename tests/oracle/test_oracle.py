"""The oracle: transformers runs a tiny checkpoint of every type before and after moescale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.tiny_models import TINY, build, generates, outputs, routed_outputs

from moescale import api
from moescale.errors import UnsupportedError
from moescale.families.architectures import find

FACTOR = 0.7320508
MORE = 3  # experts per token; tiny models have 2, and accept 3 unless their count is fixed

ROWS = {entry: find(*entry.split("/")) for entry in TINY}
LINEAR = [e for e, row in ROWS.items() if not (row.fixed or row.no_effect)]
NO_EFFECT = [e for e, row in ROWS.items() if row.no_effect]
FOLDS = [e for e, row in ROWS.items() if row.can_fold]
FIXED = [e for e, row in ROWS.items() if row.fixed]
LAYOUTS = pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]

SCALES_IN_PART = {"longcat_flash": "tokens that chose an identity expert keep their size"}


def convert(source: Path, output: Path, entry: str, **options: object) -> api.Result:
    """Rescale the part that the entry names."""
    part = entry.partition("/")[2] or None
    return api.convert(source, output, part=part, jobs=1, **options)


def assert_scaled(before: dict, after: dict, factor: float) -> None:
    """Compare module by module, relative to the largest value of each."""
    assert before.keys() == after.keys()
    assert before
    for path, output in before.items():
        wanted = output.double() * factor
        error = (after[path].double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-6, (path, float(error))


@LAYOUTS
@pytest.mark.parametrize("entry", LINEAR)
def test_routed_output_is_the_factor_times_the_original(
    entry: str, fused: bool, tmp_path: Path
) -> None:
    """With the same inputs and the same k, transformers computes factor times the old output.

    Shared experts and attention compute the same bits. The factor is given for the Hub's layout;
    for the fused one it is that of the closed form.
    """
    source, output = tmp_path / "source", tmp_path / "output"
    build(entry, source, fused=fused)
    how: dict[str, Any] = {"rule": "preserve"} if fused else {"factor": FACTOR}
    plan = convert(source, output, entry, experts=MORE, **how).plan
    assert [w for w in plan.warnings if "does not know" in w or "does not read" in w] == []
    (factor,) = set(plan.factors.values())
    assert factor == pytest.approx(closed_form(plan) if fused else FACTOR)
    before, after = outputs(source, entry, top_k=MORE), outputs(output, entry)
    if entry in SCALES_IN_PART:
        assert before.routed.keys() == after.routed.keys()
    else:
        assert_scaled(before.routed, after.routed, factor)
    assert set(after.used.values()) == {MORE}
    assert before.other.keys() == after.other.keys()
    for path, tensor in before.other.items():
        assert torch.equal(tensor, after.other[path]), path


def closed_form(plan: api.Plan) -> float:
    """The factor of the rule ``preserve`` for the router of a plan, from 2 experts to `MORE`."""
    assert plan.router is not None
    if plan.router.shared:
        shared = plan.router.shared
        return ((2 / (2 + shared) ** 2) / (3 / (3 + shared) ** 2)) ** 0.5
    return float((3 / 2) ** 0.5 if plan.router.renormalised else (2 / 3) ** 0.5)


@torch.no_grad()
def block_outputs(directory: Path, entry: str) -> dict[str, torch.Tensor]:
    """The whole output of each MoE block, its shared experts set to zero, for fixed inputs."""
    tiny, model = TINY[entry], tiny_models.load(directory, entry)
    found: dict[str, torch.Tensor] = {}
    for number, moe in enumerate(tiny_models._blocks(model, tiny)):
        for shared in tiny_models._shared(model, moe, tiny).values():
            for parameter in shared.parameters():
                parameter.zero_()
        hidden, token_ids = tiny_models._inputs(model, number)
        with tiny_models._watch({moe.path: moe.block}, found):
            tiny_models.FEEDS[tiny.feed](moe.block, hidden, token_ids)
    return found


@pytest.mark.parametrize("entry", FOLDS)
def test_folding_into_the_config_is_the_same_as_scaling(entry: str, tmp_path: Path) -> None:
    """`--fold config` copies every shard, and transformers computes factor times the old output."""
    source, output = tmp_path / "source", tmp_path / "output"
    build(entry, source)
    plan = convert(source, output, entry, factor=FACTOR, fold="config").plan
    assert {f.action for f in plan.large_files} == {"copy"}
    before, after = block_outputs(source, entry), block_outputs(output, entry)
    assert_scaled(before, after, FACTOR)


@pytest.mark.parametrize("entry", sorted(ROWS.keys() - set(FOLDS)))
def test_folding_is_refused_where_it_is_not_the_same(entry: str, tmp_path: Path) -> None:
    """A type that is not in the list is refused with the reason."""
    build(entry, tmp_path / "source")
    with pytest.raises(UnsupportedError, match=r"--fold config|no effect"):
        convert(tmp_path / "source", tmp_path / "output", entry, factor=FACTOR, fold="config")


@pytest.mark.parametrize("entry", NO_EFFECT)
def test_what_a_norm_would_undo_is_refused(entry: str, tmp_path: Path) -> None:
    """If scaling has no effect, only `--rule none` is accepted, and it changes the count."""
    source, output = tmp_path / "source", tmp_path / "output"
    build(entry, source)
    with pytest.raises(UnsupportedError, match="no effect"):
        convert(source, output, entry, experts=MORE)
    convert(source, output, entry, experts=MORE, rule="none")
    assert generates(output, entry) == MORE


@LAYOUTS
@pytest.mark.parametrize("entry", SCALES_IN_PART)
def test_without_identity_experts_all_of_it_scales(entry: str, fused: bool, tmp_path: Path) -> None:
    """If no token can choose an expert without weights, the routed output scales exactly."""
    source, output = tmp_path / "source", tmp_path / "output"
    build(entry, source, fused=fused, config={"zero_expert_num": 0})
    convert(source, output, entry, experts=MORE, factor=FACTOR)
    before = routed_outputs(source, entry, top_k=MORE)
    assert_scaled(before, routed_outputs(output, entry), FACTOR)


@LAYOUTS
@pytest.mark.parametrize("entry", FIXED)
def test_a_fixed_count_is_kept(entry: str, fused: bool, tmp_path: Path) -> None:
    """If code or a table fixes the count, another one is refused; a factor still scales."""
    source, output = tmp_path / "source", tmp_path / "output"
    build(entry, source, fused=fused)
    count = generates(source, entry)
    with pytest.raises(UnsupportedError):
        convert(source, output, entry, experts=count + 1)
    convert(source, output, entry, factor=FACTOR)
    assert_scaled(routed_outputs(source, entry), routed_outputs(output, entry), FACTOR)
