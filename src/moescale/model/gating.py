"""The table of routers: one row each, how its weights are formed and where its tensors are.

The rule ``gates`` draws inputs for the router of each layer, and ``--gate-scale`` multiplies its
weight; both need more of a router than `architectures` says. Facts are those of transformers
5.24, whose own router modules the tests compare with; types that only remote code knows are
here where that code is one of these routers.

To add a model type, put it into the row that routes alike, or add a row: the names of its
tensors after the layer's number, and how scores are made and experts chosen. A router that
cannot be described so gets a row with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.header import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.model.architectures import Architecture
from moescale.model.experts import Layer, Projection
from moescale.model.names import plain_name
from moescale.model.router import group_limit
from moescale.model.witness import CHOICE_BIASES, LOGIT_BIASES, PACKED, WEIGHTS


@dataclass(frozen=True, slots=True)
class Gating:
    """How one kind of router works; names are what follows ``layers.{L}.``, the first there counts.

    Attributes:
        weight: names of the matrix that makes the logits.
        norm: names of the weight of the norm before the router.
        bias: names of what is added to the scores for the choice alone; () for nothing.
        logit_bias: names of what is added to the logits; () for nothing.
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        score_key: config key that may name another score.
        biased_score: the score where there is a `bias` and no key names one.
        late: experts are chosen by their logits; scores are made of the chosen ones alone.
        group_best: how many of its best scores a group is chosen by, where the router has groups.
        zero_centred: the norm multiplies by 1 + weight.
        bias_key: config key that says, by false, that there is no `bias`.
        bias_optional: models of the type have `bias` or not; the tensors tell.
        idle_key: config key that counts the experts without weights, which come last.
        cap_key: config key of the bound that a tanh squeezes the logits into; 0 for none.
        grid: the logits are two halves, and each expert has the sum of one of each.
        not_if: the end of a tensor's name that tells another router, and why it is refused.
    """

    weight: Sequence[str]
    norm: Sequence[str]
    bias: Sequence[str] = ()
    logit_bias: Sequence[str] = ()
    score: str = "softmax"
    score_key: str | None = None
    biased_score: str | None = None
    late: bool = False
    group_best: int = 2
    zero_centred: bool = False
    bias_key: str | None = None
    bias_optional: bool = False
    idle_key: str | None = None
    cap_key: str | None = None
    grid: bool = False
    not_if: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """A router that works otherwise, and how."""

    why: str


_NORM = "post_attention_layernorm.weight"
_LLAMA_NORM = "ffn_norm.weight"
"""What Meta's names call the norm before the router, for any type."""
_BIAS = "e_score_correction_bias"

SOFTMAX: Final = Gating(("mlp.gate.weight",), (_NORM,))
"""Qwen, OLMoE: the softmax of all logits, then the largest."""
MIXTRAL: Final = replace(SOFTMAX, weight=("block_sparse_moe.gate.weight", "mlp.gate.weight"))
CENTRED: Final = replace(SOFTMAX, zero_centred=True)
SIGMOID: Final = replace(
    SOFTMAX,
    score="sigmoid",
    bias=(f"mlp.gate.{_BIAS}", f"mlp.{_BIAS}", "mlp.gate.expert_bias", "mlp.expert_bias"),
)
"""DeepSeek-V3: sigmoids; a bias takes part in the choice of groups and experts alone."""
NEMOTRON: Final = replace(
    SIGMOID,
    weight=("mixer.gate.weight",),
    norm=("norm.weight",),
    bias=(f"mixer.gate.{_BIAS}",),
)
LATE: Final = replace(SOFTMAX, late=True)
"""Granite: the largest logits, then their softmax."""
GPT_OSS: Final = replace(LATE, weight=("mlp.router.weight",), logit_bias=("mlp.router.bias",))
GRANITE: Final = replace(
    LATE, weight=("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")
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
"""Bailing: sigmoids where there is a bias, unless a key says otherwise."""
XLLM: Final = replace(
    SOFTMAX,
    score="sigmoid",
    score_key="router_score_func",
    bias=("mlp.gate.bias",),
    bias_optional=True,
)
V4: Final = Gating(
    ("ffn.gate.weight", "mlp.gate.weight"),
    ("ffn_norm.weight", _NORM),
    ("ffn.gate.bias", f"mlp.gate.{_BIAS}"),
    score="sqrtsoftplus",
    score_key="scoring_func",
    not_if=("gate.tid2eid", "some of its layers choose experts by a table of token numbers"),
)
INKLING: Final = replace(
    SIGMOID, norm=("mlp_norm.weight", _NORM), bias=("mlp.gate.bias", f"mlp.gate.{_BIAS}")
)

_ROWS: Final[tuple[tuple[Gating | Other, Sequence[str]], ...]] = (
    (MIXTRAL, ("mixtral", "minimax", "minimax_m1", "minimax_text_01")),
    (LING, ("bailing_moe",)),
    (
        replace(
            LING,
            not_if=(
                "image_gate.weight",
                "images and sound have routers of their own in it",
            ),
        ),
        ("bailing_moe_v3_vl", "bailingmm_moe_v2_lite"),
    ),
    (
        replace(SIGMOID, score="softmax", score_key="scoring_func", bias_optional=True),
        ("dots_vlm",),
    ),
    (XLLM, ("k2_horizon",)),
    (
        replace(XLLM, not_if=("v_experts.0.weight", "its norms are written as differences from 1")),
        ("xllm",),
    ),
    (
        replace(
            SOFTMAX,
            weight=("mlp.router.weight", "mlp.gate.weight"),
            norm=("feed_forward_norm.weight",),
        ),
        ("iquest_q1",),
    ),
    (replace(SIGMOID, score_key="score_function"), ("bailing_moe_linear", "llada2_moe")),
    (
        SOFTMAX,
        (
            *("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "olmoe", "mellum"),
            *("lara_mini", "qwen3_omni_moe_thinker"),
            *("qwen3_omni_moe/thinker", "qwen3_omni_moe/talker"),
            *("mistral4", "mistral3"),
            *("deepseek", "minicpm", "sdar_moe"),
        ),
    ),
    (CENTRED, ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "intern_s2_preview")),
    (replace(SOFTMAX, group_best=1), ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr")),
    (replace(SOFTMAX, norm=()), ("flex_olmo",)),
    (replace(SOFTMAX, weight=("mlp.gate.wg.weight",)), ("hunyuan_v1_moe", "hunyuan")),
    (replace(SOFTMAX, score="sigmoid"), ("flint",)),
    (
        replace(
            SOFTMAX, weight=("gate.weight", "mlp.gate.weight"), norm=("ffn_norm.weight", _NORM)
        ),
        ("mistral_large4", "mistral_large4_text"),
    ),
    (
        replace(SOFTMAX, weight=("feed_forward.router.weight",), norm=("pre_ff_layernorm.weight",)),
        ("jamba",),
    ),
    (
        replace(
            SOFTMAX, weight=("ffn.router.layer.weight",), norm=("norm_attn_norm.norm_2.weight",)
        ),
        ("dbrx",),
    ),
    (
        replace(SOFTMAX, bias=(f"mlp.moe_statics.{_BIAS}", f"mlp.gate.moe_statics.{_BIAS}")),
        ("ernie4_5_moe",),
    ),
    (
        replace(
            SOFTMAX,
            weight=("mlp.router.classifier.weight",),
            norm=("post_attention_layernorm.0.weight",),
            bias=(f"mlp.router.{_BIAS}",),
            idle_key="zero_expert_num",
        ),
        ("longcat_flash", "longcat_flash_ngram", "longcat_flash_sparse"),
    ),
    (
        SIGMOID,
        (
            *("deepseek_v3", "deepseek_v32", "kimi_k25", "kimi_k2", "bailing_hybrid"),
            *("kimi_vl", "youtu_vl", "Klear", "klear"),
            *("exaone_moe", "dots1", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text"),
            *("glm_moe_dsa", "glm5_next", "glm5_next_text", "hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
            *(
                "mimo_v2_flash",
                "mimo_v2",
                "joyai_llm_flash",
                "solar_open",
                "axk1",
                "dots3_note/text",
                "dots3_note_text",
            ),
            *("sarvam_moe", "sarvam_mla", "bailing_moe_v2"),
        ),
    ),
    (replace(SIGMOID, norm=("pre_feedforward_layernorm.weight",)), ("beam",)),
    (NEMOTRON, ("nemotron_h", "nemotron_h_omni", "nemo_speechlm")),
    (SPARSE_SIGMOID, ("minimax_m2", "kimi_linear", "kimi_k3")),
    (
        replace(SPARSE_SIGMOID, zero_centred=True),
        ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
    ),
    (
        replace(
            SIGMOID,
            weight=("moe.gate.weight", "mlp.gate.weight"),
            bias=("moe.router_bias", f"mlp.gate.{_BIAS}"),
            zero_centred=True,
        ),
        ("step3p5", "step3p7"),
    ),
    (
        replace(SIGMOID, weight=("mlp.router.gate.weight", "mlp.gate.weight")),
        ("hy_v3",),
    ),
    (
        replace(SIGMOID, weight=("mlp.router.gate.weight",), norm=("pre_mlp_layernorm.weight",)),
        ("afmoe",),
    ),
    (
        replace(SIGMOID, bias=("moe.router.expert_bias", f"mlp.gate.{_BIAS}"), late=True),
        ("kolibri1",),
    ),
    (
        replace(
            SIGMOID,
            bias=(f"mlp.experts.{_BIAS}", f"mlp.gate.{_BIAS}"),
            cap_key="moe_router_logit_softcapping",
        ),
        ("laguna",),
    ),
    (
        replace(
            SIGMOID,
            weight=("feed_forward.gate.weight",),
            norm=("ffn_norm.weight",),
            bias=("feed_forward.expert_bias",),
            bias_key="use_expert_bias",
        ),
        ("lfm2_moe",),
    ),
    (
        replace(
            SIGMOID,
            weight=("mlp.gate_weight", "mlp.gate.weight"),
            norm=("norm_2.weight", "norm2.weight"),
            bias=("mlp.router_bias", f"mlp.{_BIAS}"),
        ),
        ("dots3_note/vision",),
    ),
    (V4, ("deepseek_v4", "deepseek_ref")),
    (INKLING, ("inkling_mm_model", "inkling_text")),
    (
        replace(INKLING, score_key="scoring_func"),
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
    ),
    (
        replace(LATE, norm=("input_layernorm.weight",), score_key="expert_selection_fn"),
        ("cohere2_moe",),
    ),
    (GRANITE, ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa")),
    (replace(LATE, weight=("mlp.router.layer.weight",)), ("jetmoe",)),
    (replace(LATE, weight=("mlp.router.weight",)), ("aria", "aria_text")),
    (replace(LATE, weight=("mlp.router_gate.weight",), grid=True), ("doge",)),
    (GPT_OSS, ("gpt_oss", "openai_privacy_filter")),
    (
        Other("it masks logits far below the largest, and weighs its two experts apart"),
        ("phimoe",),
    ),
    (
        Other("its weight multiplies the input of an expert, not the output"),
        ("llama4", "llama4_text"),
    ),
    (
        Other("a layer has two routers, for text and for images, but one factor"),
        ("ernie4_5_vl_moe", "ernie4_5_moe_vl"),
    ),
    (
        Other("it serves several layers, each with a norm of its own before it"),
        ("interns2_mobius", "interns2_mobius_text"),
    ),
    (Other("the norm before it adds a bias"), ("phixtral",)),
    (
        Other("its input is a mix of several streams, which depends on what is in them"),
        ("qwen4_exp", "qwen4_exp_text"),
    ),
    (Other("its input is gated by a small network after the norm"), ("axk2", "gigachat3_5")),
    (Other("it is a network of its own, with a state from layer to layer"), ("zaya",)),
    (Other("its experts take a limited number of tokens"), ("nllb-moe", "switch_transformers")),
    (
        Other("it has a norm and scales of its own"),
        ("gemma4", "gemma4_text", "diffusion_gemma", "muse_spark", "muse_spark_text"),
    ),
    (
        Other("its code is not part of transformers, so that nothing could be compared"),
        (
            *("deepseek_vl_v2", "arctic", "xverse", "grok-1", "step3_vl", "step3_text"),
            *("deepseek_v41/text", "deepseek_v41/draft", "deepseek_v41_text"),
        ),
    ),
)

GATINGS: Final[Mapping[str, Gating | Other]] = MappingProxyType(
    {name: gating for gating, names in _ROWS for name in names}
)
"""By model type, with ``/part`` where a type has several."""

RULE: Final = "--rule gates"
SCALE: Final = "--gate-scale"
_INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {RULE: "--rule preserve needs the config alone.", SCALE: f"Leave {SCALE} out."}
)
"""What else can be done, by the option that needs the router."""


def gating_of(architecture: Architecture, tensors: Sequence[Tensor], option: str) -> Gating:
    """The row of a model type.

    Args:
        architecture: its row in the table of architectures.
        tensors: the whole checkpoint.
        option: `RULE` or `SCALE`, for errors.

    Raises:
        UnsupportedError: its router works otherwise.
    """
    part = f"/{architecture.part}" if architecture.part else ""
    unknown = Other("it is not in the table of routers")
    row = architecture.gating or GATINGS.get(architecture.model_type + part, unknown)
    if (
        isinstance(row, Gating)
        and row.not_if
        and any(t.name.endswith(row.not_if[0]) for t in tensors)
    ):
        row = Other(row.not_if[1])
    if isinstance(row, Other):
        raise UnsupportedError(
            f"{option} cannot be used with the router of"
            f" {architecture.model_type or 'an unknown type'!r}: {row.why}",
            hint=_INSTEAD[option],
        )
    return row


@dataclass(frozen=True, slots=True)
class RouterTensors:
    """The tensors of one layer's router; see `Gating`."""

    layer: Layer
    weight: Tensor
    norm: Tensor | None
    bias: Tensor | None
    logit_bias: Tensor | None

    @property
    def present(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in (self.weight, self.norm, self.bias, self.logit_bias) if t is not None]


def find_routers(
    gating: Gating,
    section: Mapping[str, Any],
    projections: Sequence[Projection],
    tensors: Sequence[Tensor],
    option: str,
) -> list[RouterTensors]:
    """The routers of all layers that have routed experts, one a layer.

    Args:
        gating: the row of the model type.
        section: the config section that describes this MoE.
        projections: the routed down-projections.
        tensors: the whole checkpoint.
        option: `RULE` or `SCALE`, for errors.

    Raises:
        CheckpointError: a layer lacks one of the tensors.
        UnsupportedError: a tensor is quantised.
    """
    ends = (*gating.weight, *gating.norm, *gating.bias, *gating.logit_bias)
    ends = (*ends, *WEIGHTS, *CHOICE_BIASES, *LOGIT_BIASES, *PACKED, _LLAMA_NORM)
    by_name = {plain_name(t.name): t for t in tensors if t.name.endswith(ends)}
    by_layer = {p.layer: p for p in projections}
    biased = gating.bias_key is None or section.get(gating.bias_key) is not False
    if gating.bias_optional:
        biased = any(name.endswith((*gating.bias, *CHOICE_BIASES)) for name in by_name)
    normed = gating.norm and option == RULE

    def one(beside: Projection, names: Sequence[str], known: Sequence[str]) -> Tensor:
        """By the names of the row, or by one of another layout in the block of the experts."""
        prefix = plain_name(beside.prefix)
        looked_for = (*(f".{name}" for name in names), *(beside.block + name for name in known))
        at = next((prefix + name for name in looked_for if prefix + name in by_name), None)
        if at is None:
            raise CheckpointError(
                f"{prefix}: has routed experts, but no {' or '.join(names)}",
                hint="The checkpoint is incomplete, quantised or of another layout."
                f" {_INSTEAD[option]}",
            )
        found = by_name[at]
        if found.dtype not in SCALABLE or any(f"{at}.{leaf}" in by_name for leaf in PACKED):
            raise UnsupportedError(
                f"{found.name}: is {found.dtype}; {option} needs a router of plain numbers",
                hint=_INSTEAD[option],
            )
        return found

    return [
        RouterTensors(
            layer,
            one(beside, gating.weight, WEIGHTS),
            one(beside, (*gating.norm, _LLAMA_NORM), ()) if normed else None,
            one(beside, gating.bias, CHOICE_BIASES) if gating.bias and biased else None,
            one(beside, gating.logit_bias, LOGIT_BIASES) if gating.logit_bias else None,
        )
        for layer, beside in sorted(by_layer.items())
    ]


@dataclass(frozen=True, slots=True)
class ScaledRouters:
    """How the logits of all routers are multiplied.

    Attributes:
        edits: of the tensors that make the logits, without a factor yet.
        biases: what the biases of the logits are called in their modules.
        moves: why other experts may be chosen then; None where the choice stays.
    """

    edits: Sequence[TensorEdit]
    biases: frozenset[str]
    moves: str | None


BIAS_MOVES: Final = "a bias fitted to the scores as they are takes part in the choice of experts"


def scaled_routers(
    architecture: Architecture,
    section: Mapping[str, Any],
    projections: Sequence[Projection],
    tensors: Sequence[Tensor],
) -> ScaledRouters:
    """What makes the logits of each router, to be multiplied all by one number.

    Args:
        architecture: the row of the model type.
        section: the config section that describes this MoE.
        projections: the routed down-projections.
        tensors: the whole checkpoint.

    Raises:
        UnsupportedError: the router works otherwise, or its logits are not its weight's alone.
        CheckpointError: a router is missing.
    """
    gating = gating_of(architecture, tensors, SCALE)
    found = find_routers(gating, section, projections, tensors, SCALE)
    if gating.cap_key and section.get(gating.cap_key):
        raise UnsupportedError(
            f"{SCALE} cannot be used with the router of {architecture.model_type!r}: a tanh bounds"
            " its logits",
            hint=_INSTEAD[SCALE],
        )
    grouped = group_limit(architecture, section) is not None
    moves = None
    if any(router.bias for router in found):
        moves = BIAS_MOVES
    elif grouped and gating.group_best > 1:
        moves = "groups of experts are chosen by sums of scores, whose order may change"
    edits = [
        TensorEdit(tensor, role="router", layer=router.layer)
        for router in found
        for tensor in (router.weight, router.logit_bias)
        if tensor is not None
    ]
    biases = {r.logit_bias.name.rpartition(".")[2] for r in found if r.logit_bias is not None}
    return ScaledRouters(edits, frozenset(biases), moves)
