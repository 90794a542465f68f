"""Counts in other keys and files: the same number of the same model is set, others are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from moescale import api

CONFIG = json.loads(checkpoints.MIXTRAL_CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Mixtral: 2 of 4 experts."""
    return checkpoints.mixtral(tmp_path / "source", extras=False)


def converted(source: Path, **options: Any) -> tuple[Path, list[str]]:
    """The verified output with three experts, and the warnings of the plan."""
    out = source.parent / "out"
    result = api.convert(source, out, **{"experts": 3, "verify": True, **options})
    assert result.verified
    return out, list(result.plan.warnings)


@pytest.mark.parametrize("key", ["num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts"])
def test_another_spelling_beside_the_one_that_counts_is_set(source: Path, key: str) -> None:
    """A key that some loader reads, with the same number, in the same section, is set too."""
    (source / "config.json").write_text(json.dumps({**CONFIG, key: 2}, indent=3))
    out, warnings = converted(source)
    assert (out / "config.json").read_text() == json.dumps(
        {**CONFIG, "num_experts_per_tok": 3, key: 3}, indent=3
    )
    assert warnings == []


def test_another_number_is_named_and_left(source: Path) -> None:
    """Another number may count something else, so it stays."""
    odd = {"num_experts_per_token": 4, "draft_config": {"num_experts_per_tok": 2}}
    (source / "config.json").write_text(json.dumps({**CONFIG, **odd}))
    out, warnings = converted(source)
    assert json.loads((out / "config.json").read_text()) == {
        **CONFIG,
        **odd,
        "num_experts_per_tok": 3,
    }
    assert [w.partition(";")[0] for w in warnings] == [
        "config.json: num_experts_per_token is 4",
        "config.json: draft_config.num_experts_per_tok is 2",
    ]


@pytest.mark.parametrize("name", ["mlc-chat-config.json", "model_args.json", "llm/config.json"])
def test_configs_of_other_programs_are_set(source: Path, name: str) -> None:
    """The number of experts next to the count shows that it is the same model."""
    text = '{"model_config": {"num_local_experts": 4, "num_experts_per_tok": 2}}'
    checkpoints.write_files(source, {name: text.encode()})
    out, warnings = converted(source)
    assert (out / name).read_text() == text.replace('tok": 2', 'tok": 3') and warnings == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_token", "2"),
        ("num_experts_per_token", 2.0),
        ("num_experts_per_token", [2, 3]),
        ("num_selected_experts", 2),
        ("moe_router_topk", 2),
        ("moe_config", {"top_k": 2}),
    ],
)
def test_what_may_be_the_number_is_named(source: Path, key: str, value: Any) -> None:
    """A value that is not an integer, or an unknown key, may be read by a loader: it is named."""
    (source / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    out, warnings = converted(source)
    assert json.loads((out / "config.json").read_text())[key] == value
    assert [key in warning for warning in warnings] == [True]


def test_a_list_of_the_number_is_the_number(source: Path) -> None:
    """A count per layer works in a second key, in a second file, and if the first one is a list."""
    text = '{"num_experts": 4, "moe_topk": [2, 2]}'
    for config, beside in (({"moe_topk": [2, 2]}, [3, 3]), ({"num_experts_per_token": 2}, 3)):
        (source / "params.json").write_text(text)
        first = {"num_experts_per_tok": [2, 2]} if beside == 3 else {}
        (source / "config.json").write_text(json.dumps({**CONFIG, **first, **config}))
        out, warnings = converted(source, overwrite=True)
        assert json.loads((out / "config.json").read_text())[next(iter(config))] == beside
        assert (out / "params.json").read_text() == text.replace("[2, 2]", "[3, 3]")
        assert warnings == []


@pytest.mark.parametrize("key", ["top_k", "num_experts", "intermediate_size", "num_hidden_layers"])
def test_keys_of_other_things_are_left(source: Path, key: str) -> None:
    """A sampler's top_k of 2, or two layers, are not counts of experts."""
    (source / "config.json").write_text(json.dumps({**CONFIG, key: CONFIG.get(key, 2)}))
    out, warnings = converted(source)
    assert json.loads((out / "config.json").read_text())[key] == CONFIG.get(key, 2)
    assert warnings == []


def test_how_the_model_was_quantised_is_no_setting(source: Path) -> None:
    """The quantisation config stays as it is, without a warning."""
    how = {"quantization_config": {"quant_method": "x", "num_experts_per_tok": 2}}
    (source / "config.json").write_text(json.dumps({**CONFIG, **how}))
    out, warnings = converted(source)
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]
        == how["quantization_config"]
    )
    assert warnings == []


PARAMS = '{ "dim":8,\n\t"moe": {"num_experts_per_tok":  2, "num_experts": 4 } }'
INFERENCE = '{"n_routed_experts": 4, "n_activated_experts": 2, "route_scale": 2.5}\n'


def test_other_files_that_loaders_read_are_set_to_the_byte(source: Path) -> None:
    """Mistral's params.json and the config of DeepSeek's code are set; the plan says so."""
    second = ("inference/config_1B.json", "configs/1B.json", "inference/1B.json")
    files = {"params.json": PARAMS, **dict.fromkeys(second, INFERENCE)}
    checkpoints.write_files(source, {name: text.encode() for name, text in files.items()})
    out, warnings = converted(source)
    assert warnings == []
    assert (out / "params.json").read_text() == PARAMS.replace(":  2", ":  3")
    for name in second:
        assert (out / name).read_text() == INFERENCE.replace(": 2,", ": 3,"), name
    plan = api.plan(source, experts=3)
    actions = {file.name: file.action for file in plan.files}
    assert {actions[name] for name in files} == {"edit"}
    assert plan.bytes_written == sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file() and f.name not in OURS
    )
    assert api.convert(source, out, experts=3).status == "done"


OURS = ("README.md", "moescale.json")


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("params.json", '{"moe": {"num_experts_per_tok": 1, "num_experts": 4}}', True),
        ("params.json", '{"moe": {"num_experts_per_tok": 2, "num_experts": 8}}', True),
        ("params.json", '{"num_experts_per_tok": 2}', True),
        ("params.json", '{"n_heads": 2}', False),
        ("params.json", "not JSON", False),
        ("params.json", '{"num_experts_per_tok": 2,}', True),
        ("params.json", '\ufeff{"num_experts_per_tok": 2, "num_experts": 4}', True),
        ("config_x.json", '{"moe": {"top_k": 2, "num_experts": 4}}', True),
        ("params.json", '["num_experts_per_tok", 2]', False),
        ("tokenizer_config.json", '{"num_experts_per_tok": 2, "num_experts": 4}', False),
        ("notes.json", '{"num_experts_per_tok": 2, "num_experts": 4}', False),
    ],
)
def test_other_files_stay(source: Path, name: str, text: str, named: bool) -> None:
    """Another number or model is named; files that are not model configs are ignored."""
    (source / name).write_text(text)
    out, warnings = converted(source)
    assert (out / name).read_text() == text
    assert [name in warning for warning in warnings] == [True] * named


def test_a_model_beside_keeps_its_number(source: Path) -> None:
    """A config in a folder with weights describes those weights."""
    text = '{"num_experts_per_tok": 2, "num_experts": 4}'
    files = {"talker/config.json": text.encode(), "talker/pytorch_model.bin": b"\x80\x02}q\x00."}
    checkpoints.write_files(source, files)
    out, _ = converted(source)
    assert (out / "talker/config.json").read_text() == text


def test_a_damaged_second_file_is_found_by_verification(source: Path) -> None:
    """Verification covers the second file as it covers the config."""
    (source / "params.json").write_text(PARAMS)
    out, _ = converted(source)
    (out / "params.json").write_text(PARAMS)
    with pytest.raises(api.MoescaleError, match=r"params\.json"):
        api.verify(source, out, experts=3)
