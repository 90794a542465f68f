"""Files beside the shards: twins are left out, unlisted shards are scaled, others are copied."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints

import moescale
from moescale.errors import CheckpointError
from moescale.families.architectures import ROWS
from moescale.families.foreign_names import layer_from_name
from moescale.families.projections import Layer
from moescale.planning.extra_files import EVALUATION, FORM, INDEX, LAYOUT, TWIN

INDEX_FILE = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Qwen2-MoE in one file."""
    return write(tmp_path / "source", {SINGLE: checkpoints.qwen2_tensors()})


def write(folder: Path, shards: Mapping[str, Mapping[str, checkpoints.Raw]]) -> Path:
    """Write a Qwen2-MoE with these shards, without an index."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        (folder / name).write_bytes(checkpoints.shard(tensors))
    (folder / "config.json").write_text(json.dumps({**checkpoints.QWEN2_CONFIG, "hidden_size": 8}))
    return folder


def add(folder: Path, name: str, content: bytes | Mapping[str, checkpoints.Raw]) -> None:
    """Add a file: bytes, or a shard of these tensors."""
    data = content if isinstance(content, bytes) else checkpoints.shard(content)
    checkpoints.write_files(folder, {name: data})


def left_out(folder: Path, **options: Any) -> dict[str, str | None]:
    """The files that a plan leaves out, with the reasons, each of which must be a warning too."""
    plan = moescale.plan(folder, experts=3, **options)
    files = {file.name: file.why for file in plan.files if file.action == "skip"}
    assert all(any(f"left out: {n}" in w for w in plan.warnings) for n in [*files][:1])
    assert all(any(why and why in w for w in plan.warnings) for why in files.values())
    return files


def saved(content: object, **how: Any) -> bytes:
    """The bytes that `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def state_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """A state of small torch tensors with these names."""
    return dict.fromkeys(names, torch.zeros(2))


def renamed(old: str, new: str) -> dict[str, checkpoints.Raw]:
    """The tensors of the small model under other names."""
    return {name.replace(old, new): raw for name, raw in checkpoints.qwen2_tensors().items()}


def fused() -> dict[str, checkpoints.Raw]:
    """The same layers, with the experts of each in one tensor."""
    return {
        f"model.layers.{layer}.mlp.experts.down_proj": checkpoints.values("BF16", (4, 8, 6))
        for layer in (1, 2)
    }


# Copies under other endings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.safetensors.bak", checkpoints.qwen2_tensors(), TWIN),
        ("model.safetensors.old/copy.bak.1", b"text", None),
        ("model.safetensors~", checkpoints.qwen2_tensors(), TWIN),
        ("model-00001-of-00002.safetensors.orig", checkpoints.qwen2_tensors(), TWIN),
        ("backup/model.safetensors.1", renamed("model.layers.", "layers."), LAYOUT),
        ("pytorch_model.bin.old", saved(state_of(checkpoints.qwen2_tensors())), TWIN),
        ("tiny.gguf.part", b"GGUF" + b"\0" * 20 + b"qwen2moe.expert_count", LAYOUT),
        (
            "copy",
            {**checkpoints.qwen2_tensors(), "pad": checkpoints.values("F32", (1 << 18,))},
            TWIN,
        ),
        ("model.safetensors.sha256", b"0123", None),
        ("model.safetensors.bak", {"visual": checkpoints.values("F32", (2,))}, None),
    ],
)
def test_a_copy_under_another_ending_is_a_twin_by_its_content(
    source: Path, name: str, content: Any, why: str | None
) -> None:
    """A backup of the unscaled weights is left out; other files with similar names are copied."""
    add(source, name, content)
    assert left_out(source) == ({name: why} if why else {})
    assert why or not [w for w in moescale.plan(source, experts=3).warnings if name in w]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors.zst", b"compressed" * 1000, "its tensors cannot be read"),
        (
            "mtp.safetensors.bak",
            {"model.layers.9.mlp.experts.0.down_proj.weight": checkpoints.values("F32", (8, 6))},
            "has routed experts of layer 9 that are not rescaled",
        ),
    ],
)
def test_a_copy_that_is_no_twin_is_copied_with_a_warning(
    source: Path, name: str, content: Any, said: str
) -> None:
    """No loader reads it, so it need not be scaled or refused."""
    add(source, name, content)
    assert left_out(source) == {}
    assert any(name in w and said in w for w in moescale.plan(source, experts=3).warnings)


# Twins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.fp16.safetensors", checkpoints.qwen2_tensors(dtype="F16"), TWIN),
        ("fused/model.safetensors", fused(), LAYOUT),
        ("old/w.safetensors", renamed("model.layers.", "layers."), LAYOUT),
        ("original/x.safetensors", renamed("mlp.experts.", "feed_forward.experts."), LAYOUT),
        ("consolidated.safetensors", {"anything": checkpoints.values("F32", (2,))}, FORM),
        ("pytorch_model.bin", b"a twin", FORM),
        ("pytorch_model-00001-of-00001.bin", b"a twin", FORM),
        ("weights.bin", saved(state_of(checkpoints.qwen2_tensors())), TWIN),
        (
            "ckpt/last.pt",
            saved({"model": state_of(fused())}, _use_new_zipfile_serialization=False),
            LAYOUT,
        ),
        ("consolidated.00.pth", b"a twin", FORM),
        ("original/consolidated.00.pth", b"a twin", FORM),
        ("tiny.gguf", b"GGUF", FORM),
        ("tf_model.h5", b"a twin", FORM),
        ("flax_model.msgpack", b"a twin", FORM),
        ("onnx/decoder_model_merged.onnx", b"a twin", FORM),
        ("metal/model.bin", b"a twin", FORM),
        ("large.onnx", b"large" * 1000, FORM),
        (".eval_results/x.yaml", b"x", EVALUATION),
    ],
)
def test_a_twin_is_left_out(source: Path, name: str, content: Any, why: str) -> None:
    """The content decides if it can be read, otherwise the name, the folder or the size."""
    add(source, name, content)
    assert left_out(source) == {name: why}


def gguf(*keys: bytes) -> bytes:
    """The beginning of a GGUF file with these keys, each with a number."""
    pairs = b"".join(struct.pack("<Q", len(k)) + k + struct.pack("<II", 4, 8) for k in keys)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + pairs


@pytest.mark.parametrize(("key", "twin"), [(b"qwen2moe.expert_count", True), (b"clip.x", False)])
def test_a_gguf_says_itself_whether_it_has_experts(source: Path, key: bytes, twin: bool) -> None:
    """A projector or a dense draft is kept under any name."""
    add(source, "other.gguf", gguf(b"general.alignment", key))
    assert ("other.gguf" in left_out(source)) == twin


def test_what_goes_with_twins_is_left_out(source: Path) -> None:
    """Their indexes are left out, and folders that hold no other weights."""
    add(source, "pytorch_model-1-of-1.bin", b"a twin")
    add(source, "pytorch_model.bin.index.json", b"{}")
    add(source, "checkpoint-5/model-1-of-2.safetensors", checkpoints.qwen2_tensors())
    add(source, "checkpoint-5/model-2-of-2.safetensors", {"x": checkpoints.values("F32", (2,))})
    add(source, "checkpoint-5/optimizer.pt", b"state")
    add(source, "checkpoint-5/config.json", (source / "config.json").read_bytes())
    add(source, "mixed/model.safetensors", checkpoints.qwen2_tensors())
    add(source, "mixed/dense.safetensors", {"x": checkpoints.values("F32", (2,))})
    add(source, "mixed/dense.json", b"{}")
    goes = "belongs to checkpoint-5/model-1-of-2.safetensors, which is left out"
    assert left_out(source) == {
        "pytorch_model-1-of-1.bin": FORM,
        "pytorch_model.bin.index.json": INDEX,
        "checkpoint-5/model-1-of-2.safetensors": TWIN,
        "checkpoint-5/model-2-of-2.safetensors": TWIN,
        "checkpoint-5/optimizer.pt": goes,
        "checkpoint-5/config.json": goes,
        "mixed/model.safetensors": TWIN,
    }


def test_a_second_indexed_set_is_left_out_with_its_index(source: Path) -> None:
    """The index that loaders read is kept."""
    (source / SINGLE).unlink()
    checkpoints.write_shards(source, checkpoints.qwen2_tensors(), 2)
    add(source, "model.fp16-1-of-1.safetensors", checkpoints.qwen2_tensors(dtype="F16"))
    add(source, "model.safetensors.index.fp16.json", b"{}")
    assert left_out(source) == {
        "model.fp16-1-of-1.safetensors": TWIN,
        "model.safetensors.index.fp16.json": INDEX,
    }


# Files that are not twins -------------------------------------------------------------------------

SIDE: Mapping[str, Any] = {
    "2_Dense/model.safetensors": {"linear.weight": checkpoints.values("F32", (2,))},
    "2_Dense/config.json": b"{}",
    "3_Dense/pytorch_model.bin": saved(state_of({"linear.weight": 0})),
    "4_Dense/pytorch_model.bin": b"x",
    "vision.safetensors": {"visual.layers.0.mlp.down_proj.weight": checkpoints.values("F32", (2,))},
    "value_head.safetensors": {"v_head.weight": checkpoints.values("F32", (2,))},
    "spk_dict.pt": saved({"v": torch.ones(2)}),
    "mm_projector.bin": b"x",
    "training_args.bin": pickle.dumps({"lr": 1}),
    "optimizer.pt": saved({"state": state_of(checkpoints.qwen2_tensors())}),
    "campplus.onnx": b"x",
    "mmproj-model-f16.gguf": b"GGUF",
    "original/params.json": b"{}",
    "broken.safetensors": b"broken",
}


def test_files_that_are_not_twins_are_copied(source: Path, tmp_path: Path) -> None:
    """Side models, heads, projectors and leftovers of training are copied byte for byte."""
    for name, content in SIDE.items():
        add(source, name, content)
    before = checkpoints.tree(source)
    result = moescale.convert(source, tmp_path / "out", experts=3, verify=True)
    after = checkpoints.tree(tmp_path / "out")
    assert {name: after.get(name) for name in SIDE} == {name: before[name] for name in SIDE}
    assert [w for w in result.plan.warnings if "broken" in w] == [*result.plan.warnings]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_stays_with_its_config(source: Path, weights: str) -> None:
    """One does not load without the other; a warning says that the adapter is not rescaled."""
    at = "base_model.model.model.layers.1.mlp.experts.0.down_proj.lora_B.weight"
    tensors = {at: checkpoints.values("F32", (2,))}
    add(source, weights, tensors if "safe" in weights else saved(state_of(tensors)))
    add(source, "adapter_config.json", b"{}")
    assert left_out(source) == {}
    [warning] = moescale.plan(source, experts=3).warnings
    assert weights in warning
    assert "not rescaled" in warning


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 1}, {"hidden_size": 4}])
def test_another_model_in_a_folder_is_copied(source: Path, sizes: dict[str, int]) -> None:
    """A draft has the same names, but its config has other sizes."""
    add(source, "speculator/model.safetensors", checkpoints.qwen2_tensors())
    own = {**checkpoints.QWEN2_CONFIG, "hidden_size": 8, **sizes}
    add(source, "speculator/config.json", json.dumps(own).encode())
    assert left_out(source) == {}
    [warning] = moescale.plan(source, experts=3).warnings
    assert warning.startswith("speculator/model.safetensors: has experts of another model")


def test_experts_of_a_model_of_its_own_are_copied(source: Path) -> None:
    """In a folder with a config, layers that the model lacks belong to another model."""
    add(source, "mtp/model.safetensors", mtp())
    add(source, "mtp/config.json", b"{}")
    assert left_out(source) == {}


def test_code_and_licences_stay_without_their_weights(source: Path) -> None:
    """Only files that are useless without the twins are left out with them."""
    add(source, "original/consolidated.00.pth", b"a twin")
    for name in ("params.json", "run.py", "LICENSE", "README.md"):
        add(source, f"original/{name}", b"x")
    assert left_out(source).keys() == {"original/consolidated.00.pth", "original/params.json"}


def test_a_twin_of_what_a_pattern_names_is_left_out(source: Path) -> None:
    """Names that are not in the table are compared literally."""
    tensors = renamed("mlp.experts.", "block.things.")
    (source / SINGLE).write_bytes(checkpoints.shard(tensors))
    add(source, "model.fp16.safetensors", tensors)
    pattern = r"model\.layers\.\d+\.block\.things\.\d+\.down_proj\.weight"
    found = left_out(source, pattern=pattern, experts_key="num_experts_per_tok")
    assert found == {"model.fp16.safetensors": TWIN}


def test_other_shapes_are_another_model(source: Path) -> None:
    """The same names with other shapes are not the tensors that the plan scales."""
    small = {name: ("BF16", (2, 2), bytes(8)) for name in checkpoints.qwen2_tensors()}
    add(source, "talker/model.safetensors", small)
    assert left_out(source) == {}


def test_the_other_part_of_a_model_is_no_forgotten_shard(tmp_path: Path) -> None:
    """Experts of the part that is not rescaled are copied, whether the index lists them or not."""
    tensors = renamed("model.", "thinker.model.")
    source = write(tmp_path / "source", {SINGLE: tensors})
    text = {**checkpoints.QWEN2_CONFIG, "model_type": "qwen3_omni_moe_text"}
    config = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text}}
    (source / "config.json").write_text(json.dumps(config))
    talker = "talker.model.layers.7.mlp.experts.0.down_proj.weight"
    add(source, "more.safetensors", {talker: checkpoints.values("F32", (2,))})
    assert left_out(source) == {}


# Shards that the index does not list --------------------------------------------------------------


def mtp(stack: str = "model.layers.3", experts: int = 4) -> dict[str, checkpoints.Raw]:
    """Another MoE layer, and a tensor that the main shards have too."""
    names = [
        f"{stack}.mlp.experts.{e}.{p}_proj.weight" for e in range(experts) for p in ("up", "down")
    ]
    tensors = {
        name: checkpoints.values("BF16", (8, 6) if ".down_" in name else (6, 8), i)
        for i, name in enumerate(names)
    }
    router = {f"{stack}.mlp.gate.weight": checkpoints.values("F32", (4, 8), 4)}
    return {**tensors, **router, "lm_head.weight": checkpoints.values("BF16", (10, 8), 5)}


@pytest.mark.parametrize("stack", ["model.layers.3", "mtp.layers.0"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_forgotten_shard_is_scaled(tmp_path: Path, stack: str, shards: int) -> None:
    """Its experts belong to the model; the index does not change, and a warning names the shard."""
    source, output = write(tmp_path / "source", {}), tmp_path / "out"
    checkpoints.write_shards(source, checkpoints.qwen2_tensors(), shards)
    add(source, "model-mtp.safetensors", mtp(stack))
    result = moescale.convert(source, output, experts=3, verify=True)
    before, after = checkpoints.tree(source), checkpoints.tree(output)
    factors = dict.fromkeys(checkpoints.routed(mtp(stack)), result.plan.factors["1"])
    assert len(factors) == 4
    want = checkpoints.rescaled(before["model-mtp.safetensors"], factors)
    assert after["model-mtp.safetensors"] == want
    assert after.get(INDEX_FILE) == before.get(INDEX_FILE)
    assert any("model-mtp.safetensors" in warning for warning in result.plan.warnings)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("mtp/model.safetensors", mtp()),
        ("half.safetensors", mtp(experts=2)),
        ("both.safetensors", {**checkpoints.qwen2_tensors(2), **mtp()}),
        ("part.safetensors", {n: raw for n, raw in fused().items() if "1" in n}),
    ],
)
def test_what_can_neither_be_scaled_nor_left_out_is_refused(
    source: Path, name: str, tensors: Any
) -> None:
    """Experts in a folder, of an incomplete layer or among twins: the error names the file."""
    add(source, name, tensors)
    with pytest.raises(CheckpointError) as caught:
        moescale.plan(source, experts=3)
    assert caught.value.message.startswith(name)


def test_a_layer_in_a_forgotten_shard_is_found(tmp_path: Path) -> None:
    """If the listed shards are incomplete, the error names the shard with the rest."""
    tensors = checkpoints.qwen2_tensors()
    last = {name: raw for name, raw in tensors.items() if "layers.2." in name}
    rest = {name: raw for name, raw in tensors.items() if name not in last}
    source = write(tmp_path / "source", {"a.safetensors": rest, "b.safetensors": last})
    index = {"weight_map": dict.fromkeys(rest, "a.safetensors")}
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layer 2: .*b\.safetensors holds routed experts"):
        moescale.plan(source, experts=3)


# Two sets, and stale indexes ----------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_two_sets_are_one_model_or_refused(tmp_path: Path, indexed: bool) -> None:
    """If their bytes agree, one is kept; otherwise loaders would disagree about the model."""
    source, output = write(tmp_path / "source", {}), tmp_path / "out"
    tensors = checkpoints.qwen2_tensors()
    checkpoints.write_shards(source, tensors, 2)
    checkpoints.write_shards(source, dict(reversed(tensors.items())), 1)
    if not indexed:
        (source / INDEX_FILE).unlink()
    names = {n for n in checkpoints.tree(source) if n.endswith("2.safetensors")}
    assert left_out(source).keys() == ({SINGLE} if indexed else names)
    moescale.convert(source, output, experts=3, verify=True)
    dtype, shape, data = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = dtype, shape, data[:-1] + bytes([data[-1] ^ 1])
    checkpoints.write_shards(source, tensors, 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors and .* two sets of weights"):
        moescale.plan(source, experts=3)


@pytest.mark.parametrize(("matrix", "planned"), [("w1", False), ("w3", False), ("w2", True)])
def test_a_second_copy_counts_where_it_is_scaled(
    tmp_path: Path, matrix: str, planned: bool
) -> None:
    """The digit in a matrix name is not an expert number: w1 differs from w2, which is scaled."""
    checkpoints.write_shards(tmp_path, checkpoints.mixtral_tensors(), 2)
    (tmp_path / "config.json").write_text(checkpoints.MIXTRAL_CONFIG)
    index = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    first, last = sorted(set(index.values()))
    name = f"model.layers.0.block_sparse_moe.experts.0.{matrix}.weight"
    assert index[name] == first
    own = {n: r for n, r in checkpoints.mixtral_tensors().items() if index[n] == last}
    add(tmp_path, last, {**own, name: checkpoints.mixtral_tensors()[name]})
    if planned:
        with pytest.raises(CheckpointError, match=name):
            moescale.plan(tmp_path, experts=3)
    else:
        assert any(name in w for w in moescale.plan(tmp_path, experts=3).warnings)


def test_what_was_left_behind_of_a_set_is_left_out(source: Path) -> None:
    """One part of a set is not a second model, whatever its content."""
    add(source, "model-00002-of-00009.safetensors", checkpoints.qwen2_tensors(2))
    assert left_out(source) == {"model-00002-of-00009.safetensors": TWIN}


def test_a_stale_index_beside_the_single_file_is_left_out(source: Path, tmp_path: Path) -> None:
    """Transformers loads the single file; with the index, other loaders find nothing."""
    index = {"weight_map": dict.fromkeys(checkpoints.qwen2_tensors(), "old.safetensors")}
    (source / INDEX_FILE).write_text(json.dumps(index))
    assert "stale" in (left_out(source)[INDEX_FILE] or "")
    moescale.convert(source, tmp_path / "out", experts=3, verify=True)
    assert not (tmp_path / "out" / INDEX_FILE).exists()


@pytest.mark.parametrize(("names", "said"), [(("new",), "stale"), ((), "incomplete")])
def test_a_listed_shard_that_is_not_there(tmp_path: Path, names: Any, said: str) -> None:
    """If other files have its tensors the index is stale, otherwise the download is incomplete."""
    shards = {f"{name}.safetensors": checkpoints.qwen2_tensors() for name in names}
    source = write(tmp_path / "source", shards)
    index = {"weight_map": dict.fromkeys(checkpoints.qwen2_tensors(), "old.safetensors")}
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lists old\.safetensors") as caught:
        moescale.plan(source, experts=3)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name", ["gptq_model-4bit.safetensors", "model-00001-of-00001.safetensors"]
)
def test_one_file_under_another_name_gets_an_index(tmp_path: Path, name: str) -> None:
    """Without an index, loaders find only ``model.safetensors``."""
    source = write(tmp_path / "source", {name: checkpoints.qwen2_tensors()})
    moescale.convert(source, tmp_path / "out", experts=3, verify=True)
    made = json.loads((tmp_path / "out" / INDEX_FILE).read_bytes())
    assert made["weight_map"] == dict.fromkeys(sorted(checkpoints.qwen2_tensors()), name)


def test_an_absent_expert_is_refused(tmp_path: Path) -> None:
    """Each tensor that the plan scales must be where the index says."""
    tensors = checkpoints.qwen2_tensors()
    expert = next(name for name in reversed(tensors) if name.endswith("experts.3.down_proj.weight"))
    source = write(tmp_path / "source", {})
    checkpoints.write_shards(source, tensors, 2)
    index = json.loads((source / INDEX_FILE).read_bytes())
    index["weight_map"][expert.replace(".3.", ".7.")] = index["weight_map"][expert]
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"experts\.7\.down_proj") as caught:
        moescale.plan(source, experts=3)
    assert "stale" in str(caught.value)


# Names --------------------------------------------------------------------------------------------

TEMPLATES = sorted({template for row in ROWS for template in row.experts})


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_layout_of_the_table_is_recognised(template: str) -> None:
    """Wrappers may add a prefix to it, and formats a suffix."""
    name = template.replace("{L}", "7").replace("{E}", "3")
    for prefix in ("", "model.", "language_model.model."):
        for suffix in (".weight", ".weight_scale_inv", ".qweight", "_scales", ""):
            found = layer_from_name(prefix + name + suffix)
            assert found is not None, prefix + name + suffix
            assert found.number == 7


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("block.3.mlp.mlp2_weight.blocks", Layer("", 3)),
        ("layers.3.feed_forward.experts.moe_w_out_eD_F", Layer("", 3)),
        ("decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight", Layer("decoder", 3)),
        ("blk.3.ffn_down_exps.weight", Layer("", 3)),
        ("mtp.layers.0.mlp.experts.1.down_proj.weight", Layer("mtp", 0)),
        ("model.layers.3.mlp.experts.0.up_proj.weight", None),
        ("model.layers.3.mlp.experts.gate_up_proj", None),
        ("model.layers.3.mlp.experts.0.gate_proj.output_scale", None),
        ("model.layers.3.mlp.experts.0.down_proj.input_scale", None),
        ("model.layers.3.mlp.experts.0.down_proj.lora_A.weight", None),
        ("model.layers.3.mlp.shared_expert.down_proj.weight", None),
        ("model.layers.3.mlp.down_proj.weight", None),
        ("model.layers.3.mlp.gate.weight", None),
        ("experts.down." * 100, None),
    ],
)
def test_other_names_are_distinguished(name: str, layer: Layer | None) -> None:
    """Only second projections of routed experts match, not shared experts or adapters."""
    assert layer_from_name(name) == layer


def test_a_zip_that_is_no_torch_file_is_not_looked_into(source: Path) -> None:
    """Its text is not searched, and no pickle is run."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "model.layers.1.mlp.experts.0.down_proj.weight")
    add(source, "sub/notes.bin", file.getvalue())
    assert left_out(source) == {}
    (warning, *_) = moescale.plan(source, experts=3).warnings
    assert "sub/notes.bin: its tensors cannot be read" in warning
