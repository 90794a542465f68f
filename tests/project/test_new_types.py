"""The table covers transformers: each of its MoE types has a row, or a reason to have none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny_models import CANNOT_BUILD, TINY
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from moescale.families import architectures

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

import new_types  # noqa: E402

LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LOCKED = re.search(r"^transformers==(\S+)", LOCK, re.MULTILINE)[1]
HERE = transformers.__version__

# Its text section can be of any type, and is dense by default.
ANY_TEXT = {"mistral3"}


def assert_none(found: list[str], what_to_do: str) -> None:
    """Fail with the names; a release newer than the lock may bring new ones."""
    message = f"transformers {HERE} has {', '.join(found)}: {what_to_do}"
    if found and Version(HERE) > Version(LOCKED):
        pytest.xfail(f"{message} (the lock has {LOCKED})")
    assert not found, message


def config_class(**body: Any) -> type[PreTrainedConfig]:
    """A config class of an unknown type."""
    return type("Config", (PreTrainedConfig,), body)


def test_no_type_is_without_a_row() -> None:
    """In the locked transformers, every type with experts has a row or a reason."""
    assert_none(
        new_types.new_types(),
        "add a row to families/architectures.py, or a reason to scripts/new_types.py",
    )


def test_every_row_is_run_by_transformers() -> None:
    """A row whose type transformers has gets a tiny model for the oracle, or a reason."""
    named = (row.model_type + (f"/{row.part}" if row.part else "") for row in architectures.ROWS)
    known = {name for name in named if name.partition("/")[0] in CONFIG_MAPPING}
    missing = sorted(known - TINY.keys() - CANNOT_BUILD.keys())
    assert_none(missing, "add a tiny config to tests/support/tiny_table.py")


@pytest.mark.parametrize("name", sorted(set(architectures.known_types()) - ANY_TEXT))
def test_types_of_the_table_are_found(name: str) -> None:
    """The script would find each row whose type transformers has."""
    assert name not in CONFIG_MAPPING or new_types.has_experts(CONFIG_MAPPING[name])


@pytest.mark.parametrize(
    "key",
    [
        *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "n_experts_per_tok"),
        *(
            "moe_topk",
            "moe_top_k",
            "moe_k",
            "top_k_experts",
            "topk_experts",
            "num_selected_experts",
        ),
        *("num_active_experts", "n_activated_experts", "router_top_k", "expert_top_k"),
        *("num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts"),
    ],
)
def test_every_spelling_is_found(key: str) -> None:
    """As a field, as an alias of a field, and in a nested section."""
    field = config_class(__annotations__={key: int}, **{key: 2})
    alias = config_class(attribute_map={key: "hidden_size"})
    inner = config_class(sub_configs_defaults={"moe": alias})
    outer = config_class(sub_configs_defaults={"text_config": inner})
    assert all(map(new_types.has_experts, (field, alias, inner, outer)))


@pytest.mark.parametrize("key", ["num_shared_experts", "index_topk", "top_k", "num_heads"])
def test_what_counts_no_routed_experts_is_not_found(key: str) -> None:
    """Shared experts, and top-k choices of other things, do not make an MoE."""
    assert not new_types.has_experts(config_class(__annotations__={key: int}, **{key: 2}))


@pytest.mark.parametrize("name", new_types.SECTION_OF)
def test_a_section_is_part_of_a_type_with_a_row(name: str) -> None:
    """The enclosing type has a row, and no model class of transformers takes the section alone."""
    whole = new_types.SECTION_OF[name]
    assert architectures.parts(whole)
    assert CONFIG_MAPPING[name] in set(new_types.sections(CONFIG_MAPPING[whole]))
    models = [
        mapping
        for key, mapping in vars(modeling_auto).items()
        if key.startswith("MODEL_") and key.endswith("_MAPPING_NAMES")
    ]
    assert models
    assert not any(name in mapping for mapping in models)


def test_a_reason_is_needed() -> None:
    """Only a type without a row that the script would list may have a reason."""
    for name in new_types.SECTION_OF.keys() | new_types.NO_MOE.keys():
        assert new_types.has_experts(CONFIG_MAPPING[name])
        assert not architectures.parts(name)


def test_gemma4_assistant_is_dense() -> None:
    """Its config refuses an MoE block."""
    text = {"num_kv_shared_layers": 1, "num_hidden_layers": 1, "enable_moe_block": True}
    text |= dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
    with pytest.raises(Exception, match="enable_moe_block must be False"):
        CONFIG_MAPPING["gemma4_assistant"](text_config=text)


def test_the_caller_of_vitpose_names_the_expert() -> None:
    """The caller names an expert, and the backbone has no router."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_experts": 2, "part_features": 8, "image_size": [16, 16], "patch_size": [8, 8]}
    model = transformers.VitPoseBackbone(transformers.VitPoseBackboneConfig(**sizes))
    with pytest.raises(ValueError, match="dataset_index must be provided"):
        model(torch.zeros(1, 3, 16, 16))


def test_a_newer_release_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """New types in a newer release are an expected failure, in the locked one a failure."""
    monkeypatch.setattr(sys.modules[__name__], "HERE", LOCKED)
    with pytest.raises(AssertionError, match=f"transformers {LOCKED} has new_moe: add a row"):
        assert_none(["new_moe"], "add a row")
    monkeypatch.setattr(sys.modules[__name__], "HERE", "99.0")
    with pytest.raises(pytest.xfail.Exception, match=f"new_moe: .*the lock has {LOCKED}"):
        assert_none(["new_moe"], "add a row")
    assert_none([], "add a row")


@pytest.mark.parametrize(("found", "status"), [(["new_moe", "other_moe"], 1), ([], 0)])
def test_the_script_lists_them(
    found: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints one per line, and the exit code says whether there are any."""
    monkeypatch.setattr(new_types, "new_types", lambda: found)
    with pytest.raises(SystemExit) as end:
        new_types.main()
    assert end.value.code == status
    printed = capsys.readouterr().out.splitlines()
    assert printed == (found or [f"none in transformers {HERE}"])
