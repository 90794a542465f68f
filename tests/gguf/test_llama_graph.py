"""How many experts llama.cpp has room for; tests/gguf/test_llama.py asks the client itself."""

from __future__ import annotations

import pytest

from moescale.families.llama_cpp import BY_NAME
from moescale.families.llama_graph import GRAPHS, max_experts_per_token

QWEN3 = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"),
    *("ffn_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
)
ENDS = ("token_embd.weight", "output_norm.weight", "output.weight")


def names(blocks: int, by_suffix: tuple[str, ...] = QWEN3) -> set[str]:
    """The names of a model's tensors."""
    return {f"blk.{i}.{suffix}.weight" for i in range(blocks) for suffix in by_suffix} | set(ENDS)


def test_qwen3_30b_a3b_runs_with_24() -> None:
    """In the shape of that model, the client ran with 24 and ended with 25."""
    assert len(names(48)) == 579
    assert max_experts_per_token(BY_NAME["qwen3moe"], {}, names(48)) == 24


def test_every_architecture_has_a_number() -> None:
    """Architectures that were not counted get a usual number; a model without routers gets None."""
    assert set(GRAPHS) < set(BY_NAME)
    for row in BY_NAME.values():
        most = max_experts_per_token(row, {}, names(48))
        assert most is not None
        assert most >= 20 if row.nodes == 8 else most > 100
    assert max_experts_per_token(BY_NAME["qwen3moe"], {}, ENDS) is None


def test_blocks_for_further_tokens_have_a_graph_of_their_own() -> None:
    """Their tensors add room, and their graph takes none."""
    more = {f"blk.48.{suffix}.weight" for suffix in (*QWEN3, "nextn.eh_proj")}
    before = max_experts_per_token(BY_NAME["glm4moe"], {}, names(48))
    assert before is not None
    assert max_experts_per_token(BY_NAME["glm4moe"], {}, names(48) | more) == before + 1


@pytest.mark.parametrize(
    ("key", "value", "less"),
    [
        ("expert_group_count", 8, 7),
        ("expert_weights_norm", True, 2),
        ("expert_weights_scale", 2, 0),
    ],
)
def test_what_a_key_adds_takes_room(key: str, value: float, less: int) -> None:
    """Each block takes 14 tensors for groups, 5 for a sum, 1 for a factor; an expert takes two."""
    row, own = BY_NAME["deepseek2"], {"general.architecture": "deepseek2"}
    before = max_experts_per_token(row, own, names(200))
    after = max_experts_per_token(row, {**own, f"deepseek2.{key}": value}, names(200))
    assert before is not None
    assert after is not None
    assert before - after in (less, less + 1)
