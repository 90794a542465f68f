"""The tiny checkpoints, tested before other tests rely on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    CANNOT_BUILD,
    MTP_RUNS,
    PUBLISHED,
    TINY,
    build,
    experts_used,
    generates,
    load,
    mtp_outputs,
    other_outputs,
    routed_outputs,
)

LAYOUTS = pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])

# One entry for each combination of ways to feed, run and inspect a model.
KINDS = list(
    {
        (tiny.feed, tiny.run, tiny.width, tiny.routed, tiny.shared, bool(tiny.fixed)): entry_id
        for entry_id, tiny in TINY.items()
    }.values()
)

# The config without identity experts, which have no weights to scale.
NO_IDENTITY = {"longcat_flash": {"zero_expert_num": 0}}

# Their expert outputs are normalised before they are weighted.
NORMALISED = ("muse_spark", "muse_spark_text")


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    assert [path for path in one if not torch.equal(one[path], other[path])] == []


def _halve_down_projections(directory: Path, entry_id: str) -> int:
    """Halve them in a checkpoint of the fused layout, whose names are module paths."""
    tiny = TINY[entry_id]
    pattern = rf"{tiny.part}.*\.{tiny.routed}\.{tiny.down}"
    count = 0
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        chosen = [name for name in tensors if re.fullmatch(pattern, name)]
        halves = {name: tensors[name] * 0.5 for name in chosen}
        save_file(tensors | halves, shard, metadata={"format": "pt"})
        count += len(chosen)
    return count


def test_every_type_is_built_or_has_a_reason() -> None:
    """A type that transformers cannot build has a reason, and is not in the table as well."""
    assert not TINY.keys() & CANNOT_BUILD.keys()
    assert all(CANNOT_BUILD.values())


@pytest.mark.parametrize("entry_id", TINY)
def test_both_layouts_hold_the_same_model(entry_id: str, tmp_path: Path) -> None:
    """Both load fully and give the same bits; halved down-projections halve the routed output."""
    hub, fused = tmp_path / "hub", tmp_path / "fused"
    build(entry_id, hub, config=NO_IDENTITY.get(entry_id))
    build(entry_id, fused, fused=True, config=NO_IDENTITY.get(entry_id))
    routed = routed_outputs(hub, entry_id)
    _assert_same(routed, routed_outputs(fused, entry_id))
    assert len(routed) >= 2
    assert all(output.abs().max() > 1e-3 for output in routed.values())
    assert _halve_down_projections(fused, entry_id) > 0
    if entry_id not in NORMALISED:
        halves = {path: output * 0.5 for path, output in routed.items()}
        _assert_same(halves, routed_outputs(fused, entry_id))


@pytest.mark.parametrize("entry_id", KINDS)
def test_the_rest_does_not_depend_on_the_routed_experts(entry_id: str, tmp_path: Path) -> None:
    """Shared experts and attention give the same bits if the routed experts change."""
    build(entry_id, tmp_path, fused=True)
    others = other_outputs(tmp_path, entry_id)
    assert all(output.abs().max() > 1e-3 for output in others.values())
    _halve_down_projections(tmp_path, entry_id)
    _assert_same(others, other_outputs(tmp_path, entry_id))


@pytest.mark.parametrize("entry_id", KINDS)
def test_the_model_runs_with_the_experts_of_its_config(entry_id: str, tmp_path: Path) -> None:
    """It generates tokens, and each passes two experts, or one if the type allows only one."""
    build(entry_id, tmp_path)
    one = entry_id in ("zaya", "switch_transformers")
    assert generates(tmp_path, entry_id) == (1 if one else 2)


@pytest.mark.parametrize("entry_id", KINDS)
def test_another_count_changes_the_output_or_is_refused(entry_id: str, tmp_path: Path) -> None:
    """The routed output depends on the number of experts in every block."""
    build(entry_id, tmp_path)
    if TINY[entry_id].fixed:
        with pytest.raises(ValueError, match="takes no other number"):
            routed_outputs(tmp_path, entry_id, top_k=3)
        return
    two, three = (routed_outputs(tmp_path, entry_id, top_k=k) for k in (2, 3))
    _assert_same(two, routed_outputs(tmp_path, entry_id))
    assert not any(torch.equal(two[path], three[path]) for path in two)


def test_a_checkpoint_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    """A missing tensor is not silently filled with random values."""
    build("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys: model\.layers\.1\.mlp\.gate\.weight"):
        load(tmp_path, "olmoe")


def test_a_count_for_each_layer(tmp_path: Path) -> None:
    """Hunyuan's config can list a number of experts for each layer."""
    build("hunyuan_v1_moe", tmp_path, config={"moe_topk": [2, 1, 3]})
    assert list(experts_used(tmp_path, "hunyuan_v1_moe").values()) == [2, 1, 3]


@pytest.mark.parametrize("entry_id", PUBLISHED)
def test_published_names_hold_the_same_model(entry_id: str, tmp_path: Path) -> None:
    """The Hub's own names load, and give the same bits as the names that transformers writes."""
    build(entry_id, tmp_path / "written")
    build(entry_id, tmp_path / "published", published=True)
    _assert_same(
        routed_outputs(tmp_path / "written", entry_id),
        routed_outputs(tmp_path / "published", entry_id),
    )


@LAYOUTS
@pytest.mark.parametrize("entry_id", MTP_RUNS)
def test_the_block_for_a_second_token_runs(entry_id: str, fused: bool, tmp_path: Path) -> None:
    """It shares the count of the model."""
    build(entry_id, tmp_path, fused=fused, mtp=True)
    two, three = (mtp_outputs(tmp_path, entry_id, top_k=k) for k in (2, 3))
    _assert_same(two, mtp_outputs(tmp_path, entry_id))
    assert not any(torch.equal(two[path], three[path]) for path in two)


@pytest.mark.parametrize("entry_id", [entry_id for entry_id, tiny in TINY.items() if tiny.mtp])
def test_the_block_for_a_second_token_is_stored(entry_id: str, tmp_path: Path) -> None:
    """Its routed experts have their own names, in a shard that the index lists."""
    build(entry_id, tmp_path, mtp=True)
    names = load_file(tmp_path / "model-00002-of-00002.safetensors")
    assert all(name.startswith(f"{TINY[entry_id].mtp}.") for name in names)
    assert any("experts" in name or ".moe." in name for name in names)


@pytest.mark.parametrize("entry_id", ["mixtral", "qwen3_omni_moe/talker", "deepseek_v4"])
def test_a_seed_gives_the_same_bytes_again(entry_id: str, tmp_path: Path) -> None:
    """The same seed writes the same files, another seed other values, whatever ran before."""
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.rand(1)
        build(entry_id, tmp_path / name, seed=seed)
    one, again, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "again", "other")
    )
    assert one == again
    assert one.keys() == other.keys()
    assert one != other


def test_values_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """A checkpoint in bfloat16 is written in several shards with an index."""
    build("mixtral", tmp_path, dtype="bfloat16")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    dtypes = {tensor.dtype for shard in shards for tensor in load_file(shard).values()}
    assert dtypes == {torch.bfloat16}
