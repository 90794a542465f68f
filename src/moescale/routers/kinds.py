"""The kinds of routers: how they compute gate weights, and the names of their tensors.

The rule ``gates`` draws random inputs for the router of each layer, and ``--gate-scale`` multiplies
the router's weight; both need more than its normalisation. The facts come from transformers 5.24,
and the tests compare with its router modules. A model type with remote code has one of these kinds
if its code implements such a router. `architectures` assigns kinds to model types.

A new kind states the names of its tensors after the layer's number, how it computes scores and how
it chooses experts. A router that does not fit this description is an `OtherRouter` with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class RouterKind:
    """How one kind of router works.

    Tensor names follow ``layers.{L}.``; of several, the first that exists is used.

    Attributes:
        weight: names of the matrix that computes the logits.
        norm: names of the weight of the norm before the router.
        bias: names of the bias added to the scores for the choice only; () for none.
        logit_bias: names of the bias added to the logits; () for none.
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        score_key: config key that may name another score.
        biased_score: the score if there is a `bias` and no key names a score.
        chosen_by_logits: experts are chosen by logits; only those chosen have scores.
        group_best: a group is chosen by the sum of this many of its best scores.
        zero_centred: the norm multiplies by 1 + weight.
        bias_key: config key that is false if there is no `bias`.
        bias_optional: some models of the type have no `bias`; their tensors show it.
        zero_experts_key: config key of the number of experts without weights, which come last.
        cap_key: config key of the soft cap of the logits (``tanh(x / cap) * cap``); 0 for none.
        product_keys: the logits are two halves; an expert's logit is the sum of one from each.
        not_if: suffix of a tensor name that shows a router of another kind, and the reason why
            that is refused.
    """

    weight: Sequence[str]
    norm: Sequence[str]
    bias: Sequence[str] = ()
    logit_bias: Sequence[str] = ()
    score: str = "softmax"
    score_key: str | None = None
    biased_score: str | None = None
    chosen_by_logits: bool = False
    group_best: int = 2
    zero_centred: bool = False
    bias_key: str | None = None
    bias_optional: bool = False
    zero_experts_key: str | None = None
    cap_key: str | None = None
    product_keys: bool = False
    not_if: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class OtherRouter:
    """A router that `RouterKind` cannot describe.

    Attributes:
        why: the reason, for messages.
    """

    why: str


_NORM = "post_attention_layernorm.weight"
LLAMA_NORM = "ffn_norm.weight"
"""The norm before the router in Meta's naming, which checkpoints of any type may use."""
_BIAS = "e_score_correction_bias"

SOFTMAX: Final = RouterKind(("mlp.gate.weight",), (_NORM,))
"""Qwen, OLMoE: the softmax of all logits, then the top k."""
MIXTRAL: Final = replace(SOFTMAX, weight=("block_sparse_moe.gate.weight", "mlp.gate.weight"))
CENTRED: Final = replace(SOFTMAX, zero_centred=True)
SIGMOID: Final = replace(
    SOFTMAX,
    score="sigmoid",
    bias=(f"mlp.gate.{_BIAS}", f"mlp.{_BIAS}", "mlp.gate.expert_bias", "mlp.expert_bias"),
)
"""DeepSeek-V3: sigmoid scores; a bias affects only the choice of groups and experts."""
NEMOTRON: Final = replace(
    SIGMOID,
    weight=("mixer.gate.weight",),
    norm=("norm.weight",),
    bias=(f"mixer.gate.{_BIAS}",),
)
SOFTMAX_OF_CHOSEN: Final = replace(SOFTMAX, chosen_by_logits=True)
"""Granite: the top k logits, then their softmax."""
GPT_OSS: Final = replace(
    SOFTMAX_OF_CHOSEN, weight=("mlp.router.weight",), logit_bias=("mlp.router.bias",)
)
GRANITE: Final = replace(
    SOFTMAX_OF_CHOSEN,
    weight=("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)
SPARSE_SIGMOID: Final = replace(
    MIXTRAL,
    score="sigmoid",
    bias=(
        *(f"block_sparse_moe.gate.{_BIAS}", f"block_sparse_moe.{_BIAS}"),
        *(f"mlp.gate.{_BIAS}", f"mlp.{_BIAS}"),
    ),
)
LING: Final = replace(
    SIGMOID,
    score="softmax",
    score_key="score_function",
    biased_score="sigmoid",
    bias_optional=True,
)
"""Bailing: sigmoid scores if there is a bias, unless the config says otherwise."""
XLLM: Final = replace(
    SOFTMAX,
    score="sigmoid",
    score_key="router_score_func",
    bias=("mlp.gate.bias",),
    bias_optional=True,
)
V4: Final = RouterKind(
    ("ffn.gate.weight", "mlp.gate.weight"),
    ("ffn_norm.weight", _NORM),
    ("ffn.gate.bias", f"mlp.gate.{_BIAS}"),
    score="sqrtsoftplus",
    score_key="scoring_func",
    not_if=("gate.tid2eid", "some of its layers choose experts by a table of token ids"),
)
INKLING: Final = replace(
    SIGMOID, norm=("mlp_norm.weight", _NORM), bias=("mlp.gate.bias", f"mlp.gate.{_BIAS}")
)
LING_IMAGES: Final = replace(
    LING,
    not_if=(
        "image_gate.weight",
        "it has separate routers for images and audio",
    ),
)
DOTS_VLM: Final = replace(SIGMOID, score="softmax", score_key="scoring_func", bias_optional=True)
XLLM_VALUES: Final = replace(
    XLLM, not_if=("v_experts.0.weight", "its norms are stored as differences from 1")
)
IQUEST: Final = replace(
    SOFTMAX,
    weight=("mlp.router.weight", "mlp.gate.weight"),
    norm=("feed_forward_norm.weight",),
)
LING_SIGMOID: Final = replace(SIGMOID, score_key="score_function")
DEEPSEEK_V2: Final = replace(SOFTMAX, group_best=1)
NO_NORM: Final = replace(SOFTMAX, norm=())
HUNYUAN: Final = replace(SOFTMAX, weight=("mlp.gate.wg.weight",))
FLINT: Final = replace(SOFTMAX, score="sigmoid")
MISTRAL_LARGE: Final = replace(
    SOFTMAX, weight=("gate.weight", "mlp.gate.weight"), norm=("ffn_norm.weight", _NORM)
)
JAMBA: Final = replace(
    SOFTMAX, weight=("feed_forward.router.weight",), norm=("pre_ff_layernorm.weight",)
)
DBRX: Final = replace(
    SOFTMAX, weight=("ffn.router.layer.weight",), norm=("norm_attn_norm.norm_2.weight",)
)
ERNIE: Final = replace(SOFTMAX, bias=(f"mlp.moe_statics.{_BIAS}", f"mlp.gate.moe_statics.{_BIAS}"))
LONGCAT: Final = replace(
    SOFTMAX,
    weight=("mlp.router.classifier.weight",),
    norm=("post_attention_layernorm.0.weight",),
    bias=(f"mlp.router.{_BIAS}",),
    zero_experts_key="zero_expert_num",
)
BEAM: Final = replace(SIGMOID, norm=("pre_feedforward_layernorm.weight",))
MINIMAX_M3: Final = replace(SPARSE_SIGMOID, zero_centred=True)
STEP: Final = replace(
    SIGMOID,
    weight=("moe.gate.weight", "mlp.gate.weight"),
    bias=("moe.router_bias", f"mlp.gate.{_BIAS}"),
    zero_centred=True,
)
HY_V3: Final = replace(SIGMOID, weight=("mlp.router.gate.weight", "mlp.gate.weight"))
AFMOE: Final = replace(
    SIGMOID, weight=("mlp.router.gate.weight",), norm=("pre_mlp_layernorm.weight",)
)
KOLIBRI: Final = replace(
    SIGMOID, bias=("moe.router.expert_bias", f"mlp.gate.{_BIAS}"), chosen_by_logits=True
)
LAGUNA: Final = replace(
    SIGMOID,
    bias=(f"mlp.experts.{_BIAS}", f"mlp.gate.{_BIAS}"),
    cap_key="moe_router_logit_softcapping",
)
LFM2: Final = replace(
    SIGMOID,
    weight=("feed_forward.gate.weight",),
    norm=("ffn_norm.weight",),
    bias=("feed_forward.expert_bias",),
    bias_key="use_expert_bias",
)
DOTS_VISION: Final = replace(
    SIGMOID,
    weight=("mlp.gate_weight", "mlp.gate.weight"),
    norm=("norm_2.weight", "norm2.weight"),
    bias=("mlp.router_bias", f"mlp.{_BIAS}"),
)
INKLING2: Final = replace(INKLING, score_key="scoring_func")
COHERE2: Final = replace(
    SOFTMAX_OF_CHOSEN, norm=("input_layernorm.weight",), score_key="expert_selection_fn"
)
JETMOE: Final = replace(SOFTMAX_OF_CHOSEN, weight=("mlp.router.layer.weight",))
ARIA: Final = replace(SOFTMAX_OF_CHOSEN, weight=("mlp.router.weight",))
DOGE: Final = replace(SOFTMAX_OF_CHOSEN, weight=("mlp.router_gate.weight",), product_keys=True)
SPARSEMIXER: Final = OtherRouter(
    "it masks logits far below the largest, and weights its two experts separately"
)
ON_THE_INPUT: Final = OtherRouter("its gate weight multiplies an expert's input, not its output")
TWO_ROUTERS: Final = OtherRouter("a layer has two routers, for text and for images, but one factor")
OF_SEVERAL_LAYERS: Final = OtherRouter("several layers share it, each with its own norm before it")
BIASED_NORM: Final = OtherRouter("the norm before it adds a bias")
STREAMS: Final = OtherRouter(
    "its input is a mix of several streams, which depends on their content"
)
GATED_INPUT: Final = OtherRouter("its input is gated by a small network after the norm")
STATEFUL: Final = OtherRouter("it is a network with a state that passes from layer to layer")
LIMITED: Final = OtherRouter("its experts accept a limited number of tokens")
OWN_NORM: Final = OtherRouter("it has its own norm and scales")
NOT_COMPARED: Final = OtherRouter(
    "its code is not part of transformers, so nothing could be compared"
)
UNKNOWN: Final = OtherRouter("it is not in the table of routers")
"""For a model type that only ``--pattern`` describes."""
