"""Sources that are not MoE checkpoints: the error says what they are, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import checkpoints

from moescale import errors, plan
from moescale.families.likely_experts import likely_down_projection

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
CONFIG = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "a GGUF folder": (
        {"m-Q4.gguf": b"GGUF", "m-Q6.gguf": b"GGUF"},
        "holds GGUF files; one of them must be given",
        "m-Q4.gguf",
    ),
    "a GGUF folder with a config": (
        {"m-Q4.gguf": b"GGUF", "n-Q4.gguf": b"GGUF", "config.json": CONFIG},
        "holds GGUF files; one of them must be given",
        "m-Q4.gguf",
    ),
    "an adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": b""},
        "is a LoRA adapter of org/base: merge it into that model first",
        "merge_and_unload",
    ),
    "an adapter of no name": ({"adapter_config.json": {}}, "is a LoRA adapter: merge", "merge"),
    "another adapter": ({"adapter_config.json": {"peft_type": "IA3"}}, "PEFT adapter", "merge"),
    "a broken adapter": ({"adapter_config.json": b"\xff"}, "LoRA adapter", "merge"),
    "a pipeline": ({"model_index.json": {}, "unet/config.json": {}}, "diffusers", "folder"),
    "a torch file": (
        {"pytorch_model.bin": b"PK", "config.json": CONFIG},
        "has only pytorch_model.bin",
        "save_pretrained",
    ),
    "a sharded checkpoint": (
        {"__0_0.distcp": b"x", ".metadata": b"x", "config.json": CONFIG},
        "sharded checkpoint of torch.distributed (__0_0.distcp)",
        "dcp_to_torch",
    ),
    "Meta's layout": (
        {"consolidated.00.pth": b"PK", "params.json": {}},
        "Meta's own layout",
        "safetensors",
    ),
    "a Keras file": ({"tf_model.h5": b"", "config.json": CONFIG}, "only tf_model.h5", "Give"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_it_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    """One line says what it is, another what to do; the error does not ask for a key or a type."""
    files, what, advice = OTHERS[kind]
    written = {n: c if isinstance(c, bytes) else json.dumps(c).encode() for n, c in files.items()}
    checkpoints.write_files(tmp_path, written)
    with pytest.raises(errors.SourceError) as caught:
        plan(tmp_path, experts=3)
    assert what in caught.value.message
    assert advice in (caught.value.hint or "")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """The file itself is refused, and its folder."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for place in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(errors.SourceError, match="too few for a GGUF file"):
            plan(place, experts=3)


DENSE = {"model.layers.0.mlp.down_proj.weight": checkpoints.values("F32", (4, 8))}


@pytest.mark.parametrize("arch", [None, "llama4", "mixtral"])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "k2_horizon", "num_experts": 0, "num_experts_per_tok": 0},
        {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "num_experts": None}},
    ],
)
def test_a_dense_model_has_no_experts(tmp_path: Path, arch: str | None, config: dict) -> None:
    """Whatever its type, the error does not ask for a key."""
    checkpoints.write_shards(tmp_path, DENSE, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedError, match=r"dense model.*no experts") as caught:
        plan(tmp_path, experts=2, arch=arch)
    assert "Add the key" not in str(caught.value)
    assert config["model_type"] in caught.value.message or arch


def test_a_wrong_key_of_the_config_names_the_likely_one(tmp_path: Path) -> None:
    """If --experts-key finds nothing, the error names a similar key with its value."""
    source = checkpoints.mixtral(tmp_path)
    with pytest.raises(errors.UnsupportedError, match=r"num_experts_per_tok = 2"):
        plan(source, experts=3, factor=1.2, pattern=".*w2.*", experts_key="k")


@pytest.mark.parametrize(
    "word", ["share_expert", "shared_expert", "shared_experts", "share_experts"]
)
def test_a_shared_expert_is_no_routed_one(word: str) -> None:
    """No spelling of a shared expert counts as a routed one, even with a number."""
    assert likely_down_projection([f"model.layers.0.moe.{word}.down_proj.weight"]) is None
    assert likely_down_projection([f"model.layers.0.moe.{word}.0.down_proj.weight"]) is None


def test_an_error_in_a_file_of_factors_names_the_file(tmp_path: Path) -> None:
    """Bad values, missing layers and extra layers give an error that names the file."""
    source = checkpoints.mixtral(tmp_path / "source")
    file = tmp_path / "mine.json"
    contents = {
        '{"0": 1.2, "1": 0}': "mine.json: the factor of layer 1 is 0.0",
        '{"0": 1.2}': "mine.json has no factor for layer 1",
        '{"0": 1.2, "9": 1}': "mine.json has no factor for layer 1 .*has a factor for layer 9",
        '{"0": 1.2, "1": 1, "9": 1}': "mine.json has a factor for layer 9",
        (source / "config.json").read_text(): "mine.json: is not a file of factors",
    }
    for content, words in contents.items():
        file.write_text(content)
        with pytest.raises(errors.UsageError, match=words):
            plan(source, factors=file)


def test_a_draft_of_another_size_is_not_called_incomplete(tmp_path: Path) -> None:
    """All its experts are present; the config does not state their number."""
    source, tensors = checkpoints.qwen2(tmp_path), checkpoints.qwen2_tensors()
    part = "model.layers.1.mlp.experts."
    draft = {
        name.replace("model.layers.1", "mtp.layers.0"): raw
        for name, raw in tensors.items()
        if name.startswith(part) and int(name.removeprefix(part).partition(".")[0]) < 2
    }
    for old in source.glob("model*"):
        old.unlink()
    checkpoints.write_shards(source, {**tensors, **draft}, 2)
    with pytest.raises(errors.CheckpointError, match=r"mtp\.0: has 2 routed experts") as caught:
        plan(source, experts=3)
    assert "incomplete" not in str(caught.value)
