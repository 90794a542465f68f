"""The table of llama.cpp's architectures with routed experts, one row each.

llama.cpp, not transformers, decides how the weights in a GGUF file are normalised: ``qwen2moe`` and
``olmoe`` never renormalise, ``qwen3moe`` always does, whatever the original config said. A row
states every fold that works: llama.cpp silently ignores a key that an architecture does not read
and a ``.scale`` tensor that its graph does not use.

Source: llama.cpp 0.5.0 (ggml-org/llama.cpp@0c1e57098), ``src/models/*.cpp`` (one file per
architecture; the calls of ``build_moe_ffn``), ``src/llama-graph.cpp`` (``build_moe_ffn``),
``src/llama-arch.cpp`` (names) and ``src/llama-context.cpp`` (``graph_max_nodes``). docs/gguf.md
lists the rows that were run in that release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from moescale.routers.kinds import OtherRouter, RouterKind

RELEASE: Final = "0.5.0"
"""The release of llama.cpp that the table describes."""

EXPERTS: Final = ("ffn_down_exps",)
"""Names of the routed down-projections after ``blk.N.``."""

Renormalises = Literal["always", "never", "key"]
"""Whether the weights of the chosen experts are divided by their sum; ``key``: if
``ARCH.expert_weights_norm`` is true (false if missing)."""

SCORES: Final[Mapping[int, tuple[str, bool]]] = MappingProxyType(
    {1: ("softmax", False), 2: ("sigmoid", False), 3: ("softmax", True), 4: ("sqrtsoftplus", False)}
)
"""The score function, and whether only the chosen have scores, by ``ARCH.expert_gating_func``."""

_FFN: Final = RouterKind(("ffn_gate_inp.weight",), ("ffn_norm.weight",))
_BIASED: Final = replace(_FFN, bias=("exp_probs_b.bias",), bias_optional=True)
_POST_ATTENTION: Final = replace(_FFN, norm=("post_attention_norm.weight",))

_ROUTED_NORM = "a norm on the routed output alone removes every factor"
_SHARE = "a norm follows the sum of routed and other experts, so scaling changes their share of it"


@dataclass(frozen=True, slots=True)
class Row:
    """The facts about one architecture.

    Attributes:
        name: as in ``general.architecture``.
        renormalises: whether the weights of the chosen experts are divided by their sum.
        router: its kind, or why it has none.
        score: the number of the gating function if no key names one; None if the key is required.
        score_key: ``ARCH.expert_gating_func`` is read.
        scale_key: ``ARCH.expert_weights_scale`` is read and multiplies the routed output.
        scale_tensor: ``blk.N.ffn_down_exps.scale`` multiplies the routed output.
        experts: names of the routed down-projections.
        refused: why moescale refuses it.
        no_effect: why scaling has no effect.
        no_effect_if: `no_effect` applies only if this tensor exists.
        no_effect_unless: `no_effect` applies only if this tensor does not exist.
        partial_effect: what scaling does not reach.
        fixed_if: the tensor whose presence fixes the number of experts.
        nodes: nodes that a graph may have per tensor of the model.
    """

    name: str
    renormalises: Renormalises
    router: RouterKind | OtherRouter = _FFN
    score: int | None = 1
    score_key: bool = False
    scale_key: bool = False
    scale_tensor: bool = False
    experts: Sequence[str] = EXPERTS
    refused: str | None = None
    no_effect: str | None = None
    no_effect_if: str | None = None
    no_effect_unless: str | None = None
    partial_effect: str | None = None
    fixed_if: str | None = None
    nodes: int = 8


def _keyed(name: str, score: int | None = None, scale_tensor: bool = False) -> Row:
    """A DeepSeek-like row: keys for norm, scale and score, perhaps a bias in the choice."""
    return Row(name, "key", _BIASED, score, True, True, scale_tensor)


_HYPER = OtherRouter("its input is a mix of several residual streams")

ROWS: Final[tuple[Row, ...]] = (
    Row("llama", "always", scale_tensor=True),
    Row("llama-embed", "always", scale_tensor=True),
    Row("llama4", "never", score=2),  # the weights multiply the experts' input
    Row("mistral3", "always", scale_tensor=True),
    _keyed("mistral4"),
    Row(
        "grok",
        "always",
        no_effect="a norm on the output of the feed-forward block alone removes every factor",
        no_effect_unless="ffn_up.weight",
        partial_effect=_SHARE,
    ),
    Row("dbrx", "always", replace(_FFN, norm=("attn_output_norm.weight",))),
    Row("arctic", "always", replace(_FFN, norm=("ffn_norm_exps.weight",))),
    Row("jamba", "never"),
    Row("phimoe", "always", OtherRouter("the norm before it has a bias")),
    Row("minicpm", "always"),
    Row("granite", "always"),
    Row("granitemoe", "always"),
    Row("granitehybrid", "always"),
    Row("granite_swa", "always"),
    Row("qwen2moe", "never"),
    Row("qwen3moe", "always", scale_tensor=True),
    Row("qwen3vlmoe", "always"),
    Row("qwen3next", "always", _POST_ATTENTION, scale_tensor=True, nodes=32),
    Row("qwen35moe", "always", _POST_ATTENTION, scale_tensor=True, nodes=32),
    Row("qwen4exp", "always", _HYPER, scale_tensor=True, nodes=32),
    Row("rnd1", "always"),
    Row("olmoe", "never"),
    Row("llada-moe", "never"),
    Row("deepseek", "never", scale_key=True),
    _keyed("deepseek2", 1),
    _keyed("deepseek2-ocr", 1),
    _keyed("deepseek32", scale_tensor=True),
    replace(_keyed("deepseek4"), router=_HYPER, fixed_if="ffn_gate_tid2eid.weight", nodes=32),
    _keyed("dots1"),
    _keyed("dots3note", scale_tensor=True),
    replace(_keyed("glm4moe", 2), router=replace(_BIASED, norm=_POST_ATTENTION.norm)),
    _keyed("glm-dsa", 2, scale_tensor=True),
    replace(_keyed("glm5-next", 2), router=_HYPER, nodes=64),
    Row("bailingmoe", "key", scale_key=True),
    _keyed("bailingmoe2"),
    replace(_keyed("bailingmoe3"), nodes=32),
    Row("ernie4_5-moe", "always", _BIASED),
    Row("hunyuan-moe", "always"),
    _keyed("hy_v3", 2, scale_tensor=True),
    replace(_keyed("hy_v4"), router=_HYPER, nodes=32),
    _keyed("exaone-moe"),
    replace(_keyed("afmoe", 2), partial_effect=_SHARE),
    _keyed("laguna", 2),
    Row("lfm2moe", "always", _BIASED, None, True),
    Row(
        "gpt-oss",
        "always",
        replace(_POST_ATTENTION, logit_bias=("ffn_gate_inp.bias",)),
        score=3,
    ),
    Row("smallthinker", "always", OtherRouter("it comes before the attention"), None, True),
    Row("grovemoe", "always", experts=("ffn_down_exps", "ffn_down_chexps")),
    Row("minimax-01", "always", _BIASED, nodes=32),
    Row("minimax-m2", "always", _BIASED, None, True),
    replace(_keyed("minimax-m3"), nodes=32),
    Row("mimo2", "always", _BIASED, 2),
    _keyed("step35", 2),
    Row("kimi-linear", "always", _BIASED, None, True, True, nodes=32),
    replace(
        _keyed("kimi-k3"),
        router=OtherRouter("its input comes from several layers"),
        no_effect=_ROUTED_NORM,
        no_effect_if="ffn_routed_norm.weight",
        nodes=64,
    ),
    Row(
        "nemotron_h_moe",
        "key",
        replace(_BIASED, norm=("post_attention_norm.weight", "attn_norm.weight")),
        2,
        scale_key=True,
        scale_tensor=True,
    ),
    Row("cohere2moe", "key", replace(_FFN, norm=("attn_norm.weight",)), 2, True, True, True),
    Row(
        "gemma4",
        "always",
        OtherRouter("scaling has no effect"),
        scale_tensor=True,
        no_effect=_ROUTED_NORM,
    ),
    Row("maple", "always"),
    Row("mellum", "always", scale_tensor=True),
    Row(
        "nomic-bert-moe",
        "never",
        OtherRouter("the norm before it has a bias"),
        partial_effect=_SHARE,
    ),
    Row(
        "dflash",
        "key",
        OtherRouter("moescale does not change draft models"),
        refused="it is a draft model, which moescale does not change",
    ),
)

BY_NAME: Final[Mapping[str, Row]] = MappingProxyType({row.name: row for row in ROWS})

_REFUSED: Final = "b8352; b8179 refuses the file"
_TENSOR_SINCE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama": _REFUSED,
        "qwen3moe": _REFUSED,
        "mistral3": "b9842; b8390 takes the file and ignores the tensor",
        "mellum": "b9842; b8390 does not know the architecture",
    }
)
"""The oldest release seen to use ``.scale``, and the behaviour of the one tested before it.

Tiny models were run in b8179, b8352, b8390, b9842, b10068 and b10361 (npm's
``@node-llama-cpp/linux-x64`` 3.17.1 to 3.20.0) and gave the logits of scaled weights.
"""


def tensor_since(arch: str) -> str:
    """The oldest release of llama.cpp known to use ``.scale`` with an architecture."""
    return _TENSOR_SINCE.get(arch, f"{RELEASE}; no older one was tested")
