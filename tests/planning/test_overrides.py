"""Settings that need no rewriting: each engine gets the config of a rewritten output."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints, tiny_models
from support.gguf_models import write_model
from support.tiny_table import TINY, Tiny
from transformers import AutoConfig, PreTrainedConfig

import moescale
from moescale.families import architectures
from moescale.families.config import Config, find_count_keys, parse_config, set_count
from moescale.families.duplicate_counts import duplicate_count_keys
from moescale.planning.overrides import ConfigOverrides, by_engine, find_overrides
from moescale.report.run_commands import commands_text
from moescale.report.terminal import plan_text
from moescale.storage.base import SourceId

HERE = SourceId("some/model", Path("some/model"))


def tiny_config(tiny: Tiny) -> Config:
    """The config of a tiny model, as transformers writes it."""
    made = tiny_models._config(tiny_models._config_class(tiny), tiny.config)
    return parse_config(made.to_json_string(use_diff=False).encode())


def loaded(text: str, folder: Path, **given: Any) -> PreTrainedConfig:
    """A config as transformers loads it from a folder."""
    (folder / "config.json").write_text(text)
    return AutoConfig.from_pretrained(folder, **given)


def words(line: str) -> list[str]:
    """The words of a command line, split as a shell does."""
    return shlex.split(line)


KINDS = sorted(
    kind
    for kind in TINY
    if (row := architectures.find(kind.partition("/")[0])).part is None and not row.fixed
)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gets_the_config_of_the_output(kind: str, tmp_path: Path) -> None:
    """For every type that it knows, keywords of from_pretrained do what the edited config does.

    vLLM and SGLang update the same object section by section; they are not installed here.
    """
    config, row = tiny_config(TINY[kind]), architectures.find(kind)
    count_keys = find_count_keys(config, row.sections, row.count_keys)
    count_keys += duplicate_count_keys(config, row, count_keys)[0]
    found = find_overrides(row.model_type, count_keys, 1)
    assert found is not None
    wanted = loaded(set_count(config.text, count_keys, 1), tmp_path).to_dict()
    if found.depth <= 2:
        assert loaded(config.text, tmp_path, **found.values).to_dict() == wanted
        line = by_engine(found, config.loader, HERE)["transformers"]
        assert line.startswith(f"{config.loader}.from_pretrained('some/model', ")
    updated = loaded(config.text, tmp_path)
    update(updated, found.values)
    assert updated.to_dict() == wanted


def update(config: Any, values: dict[str, Any]) -> None:
    """Set values section by section, as vLLM does with --hf-overrides and SGLang at one level."""
    for key, value in values.items():
        if isinstance(value, dict):
            update(getattr(config, key), value)
        else:
            setattr(config, key, value)


def test_lines_for_a_factor_in_the_config(tmp_path: Path) -> None:
    """One factor for all layers goes into the routed scaling key, for every engine."""
    source = checkpoints.deepseek(tmp_path / "a model", routed_scaling_factor=2.5)
    plan = moescale.plan(source, experts=3, rule="preserve")
    new = 2.5 * 1.5**0.5
    values = {"num_experts_per_tok": 3, "routed_scaling_factor": new}
    lines = plan.overrides
    vllm, sglang = words(lines["vllm"]), words(lines["sglang"])
    assert vllm[:-1] == ["vllm", "serve", str(source), "--hf-overrides"]
    assert sglang[:-1] == [
        *("python", "-m", "sglang.launch_server", "--model-path", str(source)),
        "--json-model-override-args",
    ]
    assert json.loads(vllm[-1]) == json.loads(sglang[-1]) == values
    assert f"num_experts_per_tok=3, routed_scaling_factor={new!r})" in lines["transformers"]
    assert words(lines["llama.cpp"])[3:] == [
        "--override-kv",
        f"deepseek2.expert_used_count=int:3,deepseek2.expert_weights_scale=float:{new!r}",
    ]
    assert plan.as_json()["overrides"] == lines
    folded = moescale.plan(source, tmp_path / "out", experts=3, fold="config", rule="preserve")
    assert folded.overrides == lines
    made = json.loads(folded.config)
    assert {key: made[key] for key in values} == values


def test_no_factor_needs_no_rewriting(tmp_path: Path) -> None:
    """Any model runs with another count; a factor that only weights can hold gets no line."""
    source = checkpoints.mixtral(tmp_path / "source")
    assert moescale.plan(source, experts=3, rule="preserve").overrides == {}
    lines = moescale.plan(source, experts=3, rule="none").overrides
    assert json.loads(words(lines["vllm"])[-1]) == {"num_experts_per_tok": 3}
    assert words(lines["llama.cpp"])[-1] == "llama.expert_used_count=int:3"


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 3, "factors": {1: 1.1, 2: 1.2, 3: 1.3}},
        {"experts": 3, "gate_scale": 1.5, "rule": "preserve"},
        {"experts": 2, "rule": "preserve"},
    ],
)
def test_what_no_config_can_say_has_no_line(options: Any, tmp_path: Path) -> None:
    """Factors by layer and router scales need new weights; no change needs no command line."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=2.5)
    if "gate_scale" in options:
        source = checkpoints.mixtral(tmp_path / "mixtral")
    assert moescale.plan(source, **options).overrides == {}


def test_a_count_by_layer_stays_a_list(tmp_path: Path) -> None:
    """If the config has one number per layer, so has the override."""
    source = checkpoints.mixtral(tmp_path / "source")
    path = source / "config.json"
    config = {**json.loads(path.read_bytes()), "num_experts_per_tok": [1, 2]}
    path.write_text(json.dumps(config))
    lines = moescale.plan(source, experts=3, rule="none").overrides
    assert json.loads(words(lines["vllm"])[-1]) == {"num_experts_per_tok": [3, 3]}
    assert "llama.cpp" not in lines


def test_deep_sections_are_for_vllm_alone() -> None:
    """Other engines replace a nested section, and would lose its other keys."""
    deep = {"thinker_config": {"text_config": {"num_experts_per_tok": 2, "n": 1}}}
    config = parse_config(json.dumps(deep).encode())
    row = architectures.find("mixtral")
    section = "thinker_config.text_config"
    count_keys = find_count_keys(config, [section], row.count_keys)
    found = find_overrides(row.model_type, count_keys, 3)
    assert isinstance(found, ConfigOverrides)
    assert found.values == {"thinker_config": {"text_config": {"num_experts_per_tok": 3}}}
    lines = by_engine(found, config.loader, HERE)
    assert "vllm" in lines
    assert not {"sglang", "transformers"} & lines.keys()


def test_engines_do_not_load_a_folder_of_a_repo() -> None:
    """Engines load whole repos."""
    config = parse_config(b'{"num_experts_per_tok": 2}')
    row = architectures.find("mixtral")
    count_keys = find_count_keys(config, row.sections, row.count_keys)
    found = find_overrides(row.model_type, count_keys, 3)
    assert found is not None
    folder = SourceId("org/name/sub", None, "c" * 40, "org/name")
    loader = config.loader
    assert by_engine(found, loader, folder).keys() == {"llama.cpp"}
    repo = SourceId("org/name", None, "c" * 40)
    assert "vllm serve org/name " in by_engine(found, loader, repo)["vllm"]


def test_keys_of_a_gguf_file(tmp_path: Path) -> None:
    """llama.cpp gets the keys that --fold config would set, if its graph reads them."""
    keys = {"bailingmoe.expert_weights_scale": 2.5}
    (path,) = write_model(tmp_path / "a model.gguf", "bailingmoe", keys=keys)
    plan = moescale.plan(path, experts=3, rule="preserve")
    folded = moescale.plan(path, experts=3, rule="preserve", fold="config")
    line = words(plan.overrides["llama.cpp"])
    assert plan.overrides == folded.overrides and plan.overrides.keys() == {"llama.cpp"}
    assert line[:3] == ["llama-server", "-m", str(path)]
    given = dict(pair.split("=") for pair in line[-1].split(","))
    assert given["bailingmoe.expert_used_count"] == "int:3"
    scale = float(given["bailingmoe.expert_weights_scale"].removeprefix("float:"))
    assert scale == folded.keys["bailingmoe.expert_weights_scale"]
    assert "--fold config multiplies bailingmoe.expert_weights_scale" in plan_text(plan)
    (other,) = write_model(tmp_path / "llama.gguf")
    assert moescale.plan(other, experts=3, rule="preserve").overrides == {}
    assert "llama.cpp" in moescale.plan(other, experts=3, rule="none").overrides


def test_a_gguf_output_is_for_llama_cpp(tmp_path: Path) -> None:
    """The command opens the first file, however the destination was given."""
    (path,) = write_model(tmp_path / "m.gguf")
    first, *_ = write_model(tmp_path / "set.gguf", split=2)
    for source, place, opened in (
        (path, "out.gguf", "out.gguf"),
        (path, "out", "out/m.gguf"),
        (first, "out", f"out/{first.name}"),
    ):
        text = commands_text(moescale.plan(source, place, experts=3, rule="preserve"), written=True)
        assert text == f"To run it:\n  llama.cpp  llama-server -m {opened}"
    plan = moescale.plan(first, "out.gguf", experts=3, rule="preserve")
    parts = sum(file.name.endswith(".gguf") for file in plan.files)
    assert commands_text(plan, written=True).endswith(f"-m out-00001-of-{parts:05d}.gguf")
    hub = moescale.plan(first, "hf://me/out@try", experts=3, rule="preserve")
    assert commands_text(hub, written=True).endswith("llama-server -hf me/out@try")


def test_the_text_says_what_to_run(tmp_path: Path) -> None:
    """Before a run it lists the source with other values and the output; after it, the output."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=2.5)
    plan = moescale.plan(source, "my out", experts=3, rule="preserve")
    before, after = commands_text(plan, written=False), commands_text(plan, written=True)
    assert "The same without rewriting:\n  vLLM " in before and "--override-kv" in before
    for text in (before, after):
        assert "vllm serve 'my out'" in text
        assert "AutoModelForCausalLM.from_pretrained('my out')" in text
    assert "without rewriting" not in after
    hub = moescale.plan(source, "hf://me/out@try", experts=3, rule="preserve")
    assert "vllm serve me/out --revision try\n" in commands_text(hub, written=True)
    assert "from_pretrained('me/out', revision='try')" in commands_text(hub, written=True)
    assert commands_text(moescale.plan(source, experts=2), written=False) == ""


def test_the_plan_shows_and_suggests_the_key(tmp_path: Path) -> None:
    """With --fold config the plan shows both values; without, it says that the fold is possible."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=2.5)
    plain = plan_text(moescale.plan(source, experts=3, rule="preserve"))
    assert "--fold config multiplies routed_scaling_factor and changes no weight" in plain
    folded = plan_text(moescale.plan(source, experts=3, rule="preserve", fold="config"))
    assert "routed_scaling_factor 2.5 -> 3.06186; every weight is copied" in folded
    mixtral = checkpoints.mixtral(tmp_path / "mixtral")
    assert "--fold" not in plan_text(moescale.plan(mixtral, experts=3, rule="preserve"))
