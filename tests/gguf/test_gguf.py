"""GGUF in, GGUF out, compared with the format's own library."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.gguf_models import EXPERTS, HIDDEN, WIDTH, numbers, read_model, weights_of, write_model

import moescale
from moescale.checkpoint.gguf.types import NOISE
from moescale.errors import (
    CheckpointError,
    DestinationError,
    RewriteError,
    SourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from moescale.report import terminal
from moescale.storage.local import destination as local_destination

OURS = "moescale."
ROOT = math.sqrt(1.5)


def convert(source: Path, output: Path, **options: Any) -> moescale.Result:
    """Convert to 3 experts per token with the closed form, and verify."""
    given = {"experts": 3, "rule": "preserve", "verify": True, **options}
    return moescale.convert(source, output, **given)


def others(tensors: dict[str, Any], *names: str) -> dict[str, bytes]:
    """The bytes of all tensors except those with these name suffixes."""
    return {n: t.data.tobytes() for n, t in tensors.items() if not n.endswith(names)}


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_the_experts_are_scaled_and_all_else_is_as_it_was(tmp_path: Path, kind: str) -> None:
    """Weights are multiplied, the rest is bit-identical; test_gguf_types tries all types."""
    (source,) = write_model(tmp_path / "m.gguf", kind=kind, words=50)
    result = convert(source, tmp_path / "out.gguf")
    keys, tensors = read_model(source)
    new_keys, new = read_model(tmp_path / "out.gguf")
    assert (result.status, result.verified) == ("new", True)
    assert list(new) == list(tensors)
    assert others(new, "down_exps.weight") == others(tensors, "down_exps.weight")
    for layer in range(2):
        name = f"blk.{layer}.ffn_down_exps.weight"
        before, after = weights_of(tensors[name]), weights_of(new[name])
        assert not np.array_equal(before, after)
        assert np.abs(after - before * np.float32(ROOT)).max() <= 2e-3 * np.abs(before).max()
    kept = {name: value for name, value in new_keys.items() if not name.startswith(OURS)}
    assert kept == {**keys, "llama.expert_used_count": 3}
    assert list(kept) == list(keys)


def test_the_header_says_what_was_done(tmp_path: Path) -> None:
    """Keys give version, source, rule, counts and a factor per block, and all of it as JSON."""
    (source,) = write_model(tmp_path / "m.gguf")
    convert(source, tmp_path / "out.gguf")
    keys, _ = read_model(tmp_path / "out.gguf")
    assert keys["moescale.version"] == moescale.__version__
    assert keys["moescale.source"] == "m.gguf"
    assert (keys["moescale.rule"], keys["moescale.experts"]) == ("preserve", 3)
    assert keys["moescale.trained_experts"] == 2
    assert keys["moescale.factors"] == [ROOT, ROOT]
    said = json.loads(keys["moescale.provenance"])
    assert said["factors"] == {"0": ROOT, "1": ROOT}
    assert said["options"] == {"experts": 3, "rule": "preserve"}
    assert str(tmp_path) not in keys["moescale.provenance"]


def test_an_output_can_be_a_source(tmp_path: Path) -> None:
    """The keys of the earlier run are replaced, not repeated, and the plan warns."""
    (source,) = write_model(tmp_path / "m.gguf")
    convert(source, tmp_path / "once.gguf")
    result = convert(tmp_path / "once.gguf", tmp_path / "twice.gguf", experts=4)
    keys, _ = read_model(tmp_path / "twice.gguf")
    assert (keys["moescale.experts"], keys["moescale.trained_experts"]) == (4, 3)
    assert any("itself an output of moescale" in warning for warning in result.plan.warnings)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("qwen3moe", "is b8352; b8179 refuses the file"),
        ("mistral3", "is b9842; b8390 takes the file and ignores the tensor"),
        ("llama-embed", "is 0.5.0; no older one was tested"),
    ],
)
def test_a_scale_tensor_names_the_oldest_release(tmp_path: Path, arch: str, said: str) -> None:
    """Older releases than the named one may ignore the tensor silently."""
    (source,) = write_model(tmp_path / "m.gguf", arch)
    plan = moescale.plan(source, experts=3, rule="preserve", fold="scale")
    assert [w for w in plan.warnings if f"{arch!r} {said};" in w]


def test_the_rounding_of_scales_is_measured(tmp_path: Path) -> None:
    """For each tensor: root mean square and maximum of the block errors, compared with numpy."""
    (source,) = write_model(tmp_path / "m.gguf", kind="Q6_K")
    result = convert(source, tmp_path / "out.gguf")
    _, old = read_model(source)
    _, new = read_model(tmp_path / "out.gguf")
    name = "blk.1.ffn_down_exps.weight"

    def scales(tensor: Any) -> Any:
        blocks = tensor.data.reshape(-1, 210)[:, 208:]
        return np.ascontiguousarray(blocks).view("<f2").astype(np.float64).ravel()

    error = scales(new[name]) / (scales(old[name]) * float(np.float32(ROOT))) - 1
    assert result.rounding[name].rms == pytest.approx(np.sqrt(np.square(error).mean()))
    assert result.rounding[name].worst == pytest.approx(np.abs(error).max())
    assert set(result.rounding) == {f"blk.{layer}.ffn_down_exps.weight" for layer in range(2)}
    shown = terminal.rounding_json(result)[name]
    assert shown == {**result.rounding[name].as_json(), "type_rms": NOISE["Q6_K"]}


def test_a_destination_that_looks_like_a_repo_is_said_to_be_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning says how to name a Hub repo, as for folders."""
    (source,) = write_model(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    plan = moescale.plan(source, "me/out.gguf", experts=3, rule="preserve")
    said = "me/out.gguf is a local file, not a repo; to upload, give hf://me/out.gguf"
    assert said in plan.warnings


@pytest.mark.parametrize("split", [1, 3])
def test_any_part_of_a_set_stands_for_all(tmp_path: Path, split: int) -> None:
    """One part finds the set; the parts keep their names and together hold the scaled model."""
    (whole,) = write_model(tmp_path / "whole.gguf", kind="Q4_K")
    parts = write_model(tmp_path / "m.gguf", kind="Q4_K", split=split)
    assert len(parts) > 2
    convert(whole, tmp_path / "one.gguf")
    convert(parts[1], tmp_path / "out", jobs=2)
    written = [tmp_path / "out" / part.name for part in parts]
    assert sorted((tmp_path / "out").iterdir()) == written
    _, wanted = read_model(tmp_path / "one.gguf")
    keys, tensors = read_model(*written)
    assert keys["llama.expert_used_count"] == 3
    assert others(tensors) == others(wanted)
    untouched = [p for p in parts if "down_exps" not in str(list(read_model(p)[1]))][1:]
    assert all((tmp_path / "out" / p.name).read_bytes() == p.read_bytes() for p in untouched)


def test_a_set_can_have_another_name(tmp_path: Path) -> None:
    """The bytes do not depend on the output's name."""
    parts = write_model(tmp_path / "m.gguf", split=4)
    convert(parts[0], tmp_path / "out")
    convert(parts[0], tmp_path / "other.gguf")
    for part in parts:
        number = part.name.removeprefix("m")
        other = (tmp_path / f"other{number}").read_bytes()
        assert (tmp_path / "out" / part.name).read_bytes() == other


def test_a_renamed_set_is_found_by_its_first_file(tmp_path: Path) -> None:
    """The run prints the path of the first file, and the record lists the new names."""
    parts = write_model(tmp_path / "m.gguf", split=4)
    numbered = tmp_path / f"z-00001-of-{len(parts):05d}.gguf"
    for place in (tmp_path / "z.gguf", numbered):
        command = [sys.executable, "-m", "moescale", parts[0], place, "-k", "3", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{numbered}\n"
    record = moescale.record(numbered, verify=True)
    assert record is not None
    assert record.differences == {}
    second = numbered.with_name(numbered.name.replace("00001-of", "00002-of"))
    second.write_bytes(second.read_bytes() + b"more")
    record = moescale.record(numbered)
    assert record is not None
    assert list(record.differences) == [second.name]


def test_a_folder_of_one_model_stands_for_it(tmp_path: Path) -> None:
    """A projector beside the model does not count; with two models the user must choose one."""
    source = tmp_path / "in"
    source.mkdir()
    parts = write_model(source / "m.gguf", split=4)
    (source / "mmproj-m.gguf").write_bytes(b"GGUF")
    plan = moescale.plan(source, experts=3)
    assert [file.name for file in plan.files] == [part.name for part in parts]
    write_model(source / "n.gguf")
    with pytest.raises(SourceError, match="one of them must be given"):
        moescale.plan(source, experts=3)


def test_a_missing_or_foreign_part_is_refused(tmp_path: Path) -> None:
    """The error names the missing part; parts of two models are not a set."""
    parts = write_model(tmp_path / "m.gguf", split=4)
    write_model(tmp_path / "n.gguf", split=3)
    parts[1].rename(tmp_path / "away")
    with pytest.raises(SourceError, match=f"file 2 of {len(parts)} is missing"):
        moescale.plan(parts[0], experts=3)
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match="says that it is file 2, counted from 0"):
        moescale.plan(parts[0], experts=3)


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    """A run with --overwrite replaces only the files of the model."""
    (source,) = write_model(tmp_path / "m.gguf")
    out = tmp_path / "out"
    (out / "empty").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "other.gguf").write_text("not ours")
    convert(source, out)
    convert(source, out, experts=4, overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert names == {"empty", "notes.txt", "other.gguf", "m.gguf"}


def test_what_is_there_is_kept_without_overwrite(tmp_path: Path) -> None:
    """The same job is done, another is refused, and a file that is not GGUF is never replaced."""
    (source,) = write_model(tmp_path / "m.gguf")
    out = tmp_path / "out.gguf"
    convert(source, out)
    before = out.read_bytes()
    assert moescale.convert(source, out, experts=3, rule="preserve").status == "done"
    with pytest.raises(DestinationError, match=r"holds m\.gguf with 3 experts per token"):
        convert(source, out, experts=4, verify=False)
    assert out.read_bytes() == before
    assert convert(source, out, experts=4, overwrite=True).status == "replace"
    out.write_text("a letter")
    with pytest.raises(DestinationError, match="is not a GGUF file"):
        convert(source, out, overwrite=True)
    assert out.read_text() == "a letter"


def test_the_source_is_never_the_destination(tmp_path: Path) -> None:
    """A name, a folder and a link that lead to the source are refused."""
    parts = write_model(tmp_path / "m.gguf", split=4)
    link = tmp_path / "links" / "m2.gguf"
    link.parent.mkdir()
    (single,) = write_model(tmp_path / "single.gguf")
    link.symlink_to(single)
    for source, output in ((parts[0], tmp_path), (parts[1], tmp_path / "m.gguf"), (link, single)):
        with pytest.raises(UsageError):
            convert(source, output)


def test_the_first_part_comes_last_and_a_stopped_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients open the first part, so it must not exist before the others."""
    parts = write_model(tmp_path / "m.gguf", split=2)
    convert(parts[0], tmp_path / "whole")
    commit, order = local_destination.LocalDestination.commit_file, list[str]()

    def stop(destination: Any, name: str, made: Any) -> Any:
        if len(order) == 3:
            raise KeyboardInterrupt
        order.append(name)
        return commit(destination, name, made)

    out = tmp_path / "out"
    monkeypatch.setattr(local_destination.LocalDestination, "commit_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(parts[0], out, jobs=1)
    assert not (out / parts[0].name).exists()
    with pytest.raises(SourceError, match="unfinished run"):
        moescale.plan(out / order[0], experts=3)
    order.clear()
    monkeypatch.setattr(
        local_destination.LocalDestination,
        "commit_file",
        lambda destination, name, made: (order.append(name), commit(destination, name, made))[1],
    )
    assert convert(parts[0], out, jobs=1).status == "resume"
    assert order[-1] == parts[0].name
    assert len(order) == len(parts) - 3
    assert sorted(p.name for p in out.iterdir()) == [part.name for part in parts]
    for part in parts:
        assert (out / part.name).read_bytes() == (tmp_path / "whole" / part.name).read_bytes()


def test_a_changed_output_is_found_and_mended(tmp_path: Path) -> None:
    """Damage in header or data is found; --overwrite with --verify rewrites the damaged files."""
    parts = write_model(tmp_path / "m.gguf", split=4)
    out = tmp_path / "out"
    convert(parts[0], out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    data = bytearray(whole[parts[1].name])
    data[-5] ^= 1
    (out / parts[1].name).write_bytes(data)
    with pytest.raises(VerificationError, match=parts[1].name):
        moescale.verify(parts[0], out)
    (out / parts[1].name).write_bytes(whole[parts[1].name])
    header = bytearray(whole[parts[0].name])
    header[header.index(b"moescale.rule") + 30] ^= 1
    (out / parts[0].name).write_bytes(header)
    with pytest.raises(VerificationError, match="in the header"):
        moescale.verify(parts[0], out, experts=3, rule="preserve")
    assert convert(parts[0], out, overwrite=True).status == "repair"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert moescale.verify(parts[0], out).verified


@pytest.mark.parametrize("written", ["weights", "config", "scale"])
def test_the_factor_goes_where_it_is_asked_to(tmp_path: Path, written: str) -> None:
    """The weights change only if the factor goes into them, not into a key or a tensor."""
    keys = {"expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2}
    (source,) = write_model(tmp_path / "m.gguf", "hy_v3", keys=keys, kind="Q4_K")
    convert(source, tmp_path / "out.gguf", fold=written)
    old_keys, old = read_model(source)
    new_keys, new = read_model(tmp_path / "out.gguf")
    scales = [f"blk.{layer}.ffn_down_exps.scale" for layer in range(2)]
    assert [name for name in new if name not in old] == (scales if written == "scale" else [])
    changed = [name for name in old if old[name].data.tobytes() != new[name].data.tobytes()]
    assert len(changed) == (2 if written == "weights" else 0)
    factor = new_keys["hy_v3.expert_weights_scale"] / old_keys["hy_v3.expert_weights_scale"]
    assert factor == pytest.approx(ROOT if written == "config" else 1.0, rel=1e-7)
    said = moescale.plan(source, experts=3, rule="preserve", fold=written).as_json()["keys"]
    assert said["hy_v3.expert_used_count"] == 3
    assert ("hy_v3.expert_weights_scale" in said) == (written == "config")
    for name in scales if written == "scale" else ():
        assert new[name].data.tolist() == [np.float32(ROOT)] * EXPERTS


@pytest.mark.parametrize("old", [None, 0.0])
def test_a_routed_scale_of_none_or_zero_is_one(tmp_path: Path, old: float | None) -> None:
    """The client reads it this way; an absent key is added."""
    keys = {"expert_weights_norm": True} | ({} if old is None else {"expert_weights_scale": old})
    (source,) = write_model(tmp_path / "m.gguf", "bailingmoe", keys=keys)
    convert(source, tmp_path / "out.gguf", fold="config")
    found, _ = read_model(tmp_path / "out.gguf")
    assert found["bailingmoe.expert_weights_scale"] == np.float32(ROOT)


def test_every_part_counts_the_new_tensors(tmp_path: Path) -> None:
    """Each file of a set states the number of tensors in the set."""
    parts = write_model(
        tmp_path / "m.gguf",
        split=4,
        tensors={"blk.0.ffn_down_exps.scale": np.full(EXPERTS, 0.5, np.float32)},
    )
    convert(parts[0], tmp_path / "out", fold="scale")
    written = [tmp_path / "out" / part.name for part in parts]
    total = sum(len(read_model(path)[1]) for path in written)
    assert {read_model(path)[0]["split.tensors.count"] for path in written} == {total}
    _, tensors = read_model(*written)
    assert tensors["blk.0.ffn_down_exps.scale"].data.tolist() == [np.float32(0.5 * ROOT)] * EXPERTS
    assert tensors["blk.1.ffn_down_exps.scale"].data.tolist() == [np.float32(ROOT)] * EXPERTS


@pytest.mark.parametrize(
    ("arch", "fold"), [("llama", "config"), ("olmoe", "config"), ("olmoe", "scale")]
)
def test_a_fold_that_would_change_nothing_is_refused(tmp_path: Path, arch: str, fold: str) -> None:
    """llama.cpp would load the file and ignore the factor without a message."""
    (source,) = write_model(tmp_path / "m.gguf", arch)
    with pytest.raises(UnsupportedError, match="nothing would change"):
        moescale.plan(source, experts=3, rule="preserve", fold=fold)


@pytest.mark.parametrize(
    ("arch", "keys", "factor"),
    [
        ("llama", {}, ROOT),
        ("qwen3moe", {}, ROOT),
        ("qwen2moe", {"expert_weights_norm": True}, 1 / ROOT),  # the client does not read this key
        ("olmoe", {}, 1 / ROOT),
        ("deepseek2", {}, 1 / ROOT),
        ("deepseek2", {"expert_weights_norm": True}, ROOT),
        ("gpt-oss", {}, ROOT),
        ("bailingmoe", {"expert_weights_norm": False}, 1 / ROOT),
    ],
)
def test_the_client_decides_how_experts_are_weighed(
    tmp_path: Path, arch: str, keys: dict[str, Any], factor: float
) -> None:
    """The factor follows the gate weights of llama.cpp, which may differ from transformers."""
    (source,) = write_model(tmp_path / "m.gguf", arch, keys=keys)
    plan = moescale.plan(source, experts=3, rule="preserve")
    assert plan.factors["0"] == pytest.approx(factor)
    assert plan.router is not None


def test_the_router_is_sampled_as_the_client_forms_it(tmp_path: Path) -> None:
    """The rule gates reads what it needs from the file; a bias and groups affect the choice."""
    keys = {"expert_weights_norm": True, "expert_gating_func": 2, "expert_weights_scale": 2.0}
    (plain,) = write_model(tmp_path / "a.gguf", "deepseek2", keys=keys)
    bias = {f"blk.{i}.exp_probs_b.bias": numbers(EXPERTS, sigma=2.0) for i in range(2)}
    (biased,) = write_model(tmp_path / "b.gguf", "deepseek2", keys=keys, tensors=bias)
    groups = keys | {"expert_group_count": 2, "expert_group_used_count": 1}
    (grouped,) = write_model(tmp_path / "c.gguf", "deepseek2", keys=groups, used=1)
    one, two = (moescale.plan(path, experts=3, rule="gates") for path in (plain, biased))
    assert one.comparison.basis == "sampled"
    assert one.factors != two.factors
    assert moescale.plan(grouped, experts=2, rule="gates").factors != one.factors
    with pytest.raises(UnsupportedError, match="group-limited router can choose 2"):
        moescale.plan(grouped, experts=3, rule="gates")


@pytest.mark.parametrize(
    ("arch", "norm"),
    [
        ("gpt-oss", "post_attention_norm"),
        ("dbrx", "attn_output_norm"),
        ("glm4moe", "post_attention_norm"),
        ("cohere2moe", "attn_norm"),
    ],
)
def test_the_norm_before_the_router_is_that_of_the_architecture(
    tmp_path: Path, arch: str, norm: str
) -> None:
    """Architectures use different names for it."""
    bias = {f"blk.{i}.ffn_gate_inp.bias": numbers(EXPERTS) for i in range(2)}
    (source,) = write_model(tmp_path / "m.gguf", arch, norm=norm, tensors=bias)
    assert moescale.plan(source, experts=3, rule="gates").comparison.basis == "sampled"


def test_routers_can_be_scaled(tmp_path: Path) -> None:
    """--gate-scale multiplies the router's matrix."""
    (source,) = write_model(tmp_path / "m.gguf")
    convert(source, tmp_path / "out.gguf", rule="gates", gate_scale=1.5)
    _, old = read_model(source)
    _, new = read_model(tmp_path / "out.gguf")
    name = "blk.1.ffn_gate_inp.weight"
    assert np.array_equal(new[name].data, old[name].data * np.float32(1.5))


def test_each_layer_may_have_a_count_and_a_factor_of_its_own(tmp_path: Path) -> None:
    """A layer without experts keeps its count of 0; the others get the new count."""
    dense = tuple(f"blk.1.{n}.weight" for n in ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps"))
    keys = {"expert_weights_norm": True}
    (source,) = write_model(
        tmp_path / "m.gguf", "nemotron_h_moe", used=[2, 0, 1], layers=3, without=dense, keys=keys
    )
    result = convert(source, tmp_path / "out.gguf")
    found, _ = read_model(tmp_path / "out.gguf")
    assert found["nemotron_h_moe.expert_used_count"] == [3, 0, 3]
    assert result.plan.factors == {"0": ROOT, "2": math.sqrt(3)}
    assert found["moescale.factors"] == [ROOT, 1.0, math.sqrt(3)]


def test_factors_are_matched_by_layer(tmp_path: Path) -> None:
    """Factors are matched by the number of the layer."""
    (source,) = write_model(tmp_path / "m.gguf")
    result = convert(source, tmp_path / "out.gguf", rule=None, factors={0: 1.25, 1: 0.75})
    assert dict(result.plan.factors) == {"0": 1.25, "1": 0.75}
    _, old = read_model(source)
    _, new = read_model(tmp_path / "out.gguf")
    for layer, factor in enumerate((1.25, 0.75)):
        name = f"blk.{layer}.ffn_down_exps.weight"
        assert np.array_equal(new[name].data, old[name].data * np.float32(factor))


@pytest.mark.parametrize("name", ["mtp.0", "3"])
def test_factors_of_layers_for_further_tokens_find_them(tmp_path: Path, name: str) -> None:
    """Safetensors models number MTP layers apart or after the others; many GGUF files lack them."""
    given = {"0": 1.25, "1": 0.75, "2": 0.5, name: 1.5}
    keys = {"nextn_predict_layers": 1}
    (source,) = write_model(tmp_path / "m.gguf", "qwen3next", layers=4, keys=keys)
    plan = moescale.plan(source, experts=3, factors=given)
    assert dict(plan.factors) == {"0": 1.25, "1": 0.75, "2": 0.5, "3": 1.5}
    assert not any("left out" in w for w in plan.warnings)
    (source,) = write_model(tmp_path / "m.gguf", "qwen3next", layers=3)
    plan = moescale.plan(source, experts=3, factors=given)
    assert dict(plan.factors) == {"0": 1.25, "1": 0.75, "2": 0.5}
    assert any(f"values for {name}, " in w and "left out" in w for w in plan.warnings)
    with pytest.raises(UsageError, match=r"mtp\.9"):
        moescale.plan(source, experts=3, factors={**given, "mtp.9": 1.0})


def test_router_scales_of_the_safetensors_model_serve_too(tmp_path: Path) -> None:
    """The scales of a file that the rule fitted wrote go into the routers and the header."""
    (source,) = write_model(tmp_path / "m.gguf")
    scales = {"0": 1.5, "1": 0.5}
    given = {"factors": {"0": 1.25, "1": 0.75}, "router_scales": scales}
    (tmp_path / "factors.json").write_text(json.dumps(given))
    convert(source, tmp_path / "out.gguf", rule=None, factors=tmp_path / "factors.json")
    _, old = read_model(source)
    keys, new = read_model(tmp_path / "out.gguf")
    assert keys["moescale.router_scales"] == [1.5, 0.5]
    for layer, scale in scales.items():
        name = f"blk.{layer}.ffn_gate_inp.weight"
        assert np.array_equal(new[name].data, old[name].data * np.float32(scale))


def test_a_scale_that_would_overflow_is_an_error(tmp_path: Path) -> None:
    """The error names the tensor, and no output file appears."""
    (source,) = write_model(tmp_path / "m.gguf", kind="Q8_0")
    with pytest.raises(RewriteError, match=r"blk\.0\.ffn_down_exps\.weight"):
        convert(source, tmp_path / "out.gguf", rule=None, factor=1e9)
    assert not (tmp_path / "out.gguf").exists()


def test_mxfp4_takes_powers_of_two_or_says_what_else(tmp_path: Path) -> None:
    """MXFP4 scales are powers of two; the hint for other factors depends on the architecture."""
    (source,) = write_model(tmp_path / "m.gguf", kind="MXFP4")
    with pytest.raises(UnsupportedError, match="powers of two") as caught:
        moescale.plan(source, experts=3, rule="preserve")
    assert "--fold scale" in str(caught.value)
    convert(source, tmp_path / "double.gguf", rule=None, factor=2.0)
    _, old = read_model(source)
    _, new = read_model(tmp_path / "double.gguf")
    name = "blk.0.ffn_down_exps.weight"
    assert np.array_equal(weights_of(new[name]), 2 * weights_of(old[name]))
    (oss,) = write_model(tmp_path / "oss.gguf", "gpt-oss", kind="MXFP4")
    with pytest.raises(UnsupportedError, match="powers of two") as caught:
        moescale.plan(oss, experts=3, rule="preserve")
    assert "--fold residual" in str(caught.value)


def test_the_other_writers_of_the_stream_are_divided_instead(tmp_path: Path) -> None:
    """--fold residual, for gpt-oss, divides the embedding and the output of the attention."""
    more = {f"blk.{i}.attn_output.weight": numbers(HIDDEN, HIDDEN, seed=i) for i in range(2)}
    more |= {f"blk.{i}.attn_output.bias": numbers(HIDDEN, seed=i) for i in range(2)}
    (source,) = write_model(tmp_path / "m.gguf", "gpt-oss", kind="MXFP4", tensors=more)
    convert(source, tmp_path / "out.gguf", fold="residual")
    _, old = read_model(source)
    _, new = read_model(tmp_path / "out.gguf")
    changed = {name for name in old if old[name].data.tobytes() != new[name].data.tobytes()}
    assert changed == {"token_embd.weight", *more}
    for name in changed:
        assert np.array_equal(new[name].data, old[name].data * np.float32(1 / ROOT))


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    """The error gives the reason, such as an unknown architecture, a draft or a dense model."""
    cases = (
        ("newmoe", {}, {}, "architecture 'newmoe' is not known"),
        ("dflash", {}, {}, "draft model"),
        ("gemma4", {}, {}, "a norm on the routed output alone removes every factor"),
        ("deepseek4", {}, {"blk.0.ffn_gate_tid2eid.weight": numbers(16, 2)}, "cannot run with 3"),
    )
    for arch, keys, tensors, why in cases:
        (source,) = write_model(tmp_path / f"{arch}.gguf", arch, keys=keys, tensors=tensors)
        with pytest.raises(UnsupportedError, match=why):
            moescale.plan(source, experts=3, rule="preserve")
    dense = [
        f"blk.{i}.{n}.weight"
        for i in range(2)
        for n in ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps")
    ]
    (source,) = write_model(tmp_path / "dense.gguf", without=tuple(dense))
    with pytest.raises(UnsupportedError, match="dense"):
        moescale.plan(source, experts=3)
    (old,) = write_model(
        tmp_path / "old.gguf",
        without=tuple(dense),
        tensors={"blk.0.ffn_down.0.weight": numbers(4, 4)},
    )
    with pytest.raises(UnsupportedError, match="April 2024"):
        moescale.plan(old, experts=3)


def test_an_unknown_architecture_can_be_described(tmp_path: Path) -> None:
    """A pattern and a config key are enough, and the hint of the refusal says so."""
    (source,) = write_model(tmp_path / "m.gguf", "newmoe")
    with pytest.raises(UnsupportedError) as caught:
        moescale.plan(source, experts=3)
    assert "--pattern" in str(caught.value)
    plan = moescale.plan(
        source,
        experts=3,
        rule="published",
        pattern=r"blk\.\d+\.ffn_down_exps\.weight",
        experts_key="newmoe.expert_used_count",
    )
    assert plan.factors["1"] == pytest.approx(1 / ROOT)
    assert moescale.plan(source, experts=3, rule="preserve", arch="llama").factors["0"] == ROOT
    (known,) = write_model(tmp_path / "known.gguf")
    with pytest.raises(UnsupportedError, match="leave --arch out"):
        moescale.plan(known, experts=3, arch="mixtral")


def test_a_block_without_its_experts_or_router_is_refused(tmp_path: Path) -> None:
    """A model is never rescaled in part."""
    for name in ("ffn_down_exps", "ffn_gate_inp"):
        (source,) = write_model(tmp_path / "m.gguf", without=(f"blk.1.{name}.weight",))
        with pytest.raises(CheckpointError, match=r"blk\.1"):
            moescale.plan(source, experts=3)
    (source,) = write_model(
        tmp_path / "n.gguf",
        tensors={"blk.1.ffn_down_exps.weight": numbers(EXPERTS + 1, HIDDEN, WIDTH)},
    )
    with pytest.raises(CheckpointError, match="holds 5 experts, but the header says 4"):
        moescale.plan(source, experts=3)


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    """With the same count and no factor, no file is written."""
    (source,) = write_model(tmp_path / "m.gguf")
    assert convert(source, tmp_path / "out.gguf", experts=2, verify=False).status == "nothing"
    assert not (tmp_path / "out.gguf").exists()


def test_glm_4_7_flash_is_known_by_its_vocabulary(tmp_path: Path) -> None:
    """An old deepseek2 file may lack the gating function; the client then assumes sigmoid."""
    words = {"token_embd.weight": numbers(154_880, HIDDEN)}
    found = []
    for tensors in ({}, words):
        (source,) = write_model(tmp_path / "m.gguf", "deepseek2", layers=47, tensors=tensors)
        plan = moescale.plan(source, experts=3, rule="gates")
        found.append(dict(plan.factors))
    (source,) = write_model(
        tmp_path / "m.gguf", "deepseek2", layers=47, keys={"expert_gating_func": 2}
    )
    assert found[0] != found[1]
    assert found[1] == dict(moescale.plan(source, experts=3, rule="gates").factors)


def test_a_count_that_has_no_room_in_the_graph_is_warned_of(tmp_path: Path) -> None:
    """llama.cpp's graph has 8 nodes per tensor, and each active expert takes two in every block."""
    router = {f"blk.{i}.ffn_gate_inp.weight": numbers(256, HIDDEN) for i in range(8)}
    experts = {f"blk.{i}.ffn_down_exps.weight": numbers(256, HIDDEN, 32) for i in range(8)}
    (source,) = write_model(tmp_path / "m.gguf", layers=8, tensors={**router, **experts})
    reader = gguf.GGUFReader(source, "r+")
    reader.fields["llama.expert_count"].parts[-1][0] = 256
    del reader
    few = moescale.plan(source, experts=16, rule="preserve").warnings
    many = moescale.plan(source, experts=200, rule="preserve").warnings
    assert not any("GGML_ASSERT" in warning for warning in few)
    assert any("GGML_ASSERT" in warning for warning in many)


def test_rules_that_run_the_model_are_refused(tmp_path: Path) -> None:
    """Transformers does not run GGUF files."""
    (source,) = write_model(tmp_path / "m.gguf")
    text = tmp_path / "text.txt"
    text.write_text("word " * 4000)
    with pytest.raises(UnsupportedError, match="--rule measured"):
        moescale.plan(source, experts=3, rule="measured", calibrate=text)
    with pytest.raises(UnsupportedError, match="llama-perplexity"):
        moescale.plan(source, experts=3, evaluate=text)
    with pytest.raises(UnsupportedError, match="llama-perplexity"):
        convert(source, tmp_path / "out.gguf", evaluate=text)
    assert not (tmp_path / "out.gguf").exists()


def test_a_gguf_name_is_no_destination_of_safetensors(folder: Path, tmp_path: Path) -> None:
    """A conversion between the two formats is refused."""
    with pytest.raises(UsageError, match=r"convert_hf_to_gguf|source is not GGUF"):
        moescale.plan(folder, tmp_path / "out.gguf", experts=3)
