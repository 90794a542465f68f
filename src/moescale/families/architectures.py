"""The table of architectures: one row per model type.

A row holds the names of the routed experts' down-projections, the config keys of the experts per
token, the normalisation of the router's weights, and the obstacles to rescaling. The facts are
those of transformers 5.24 (modeling and configuration files of each type) and were checked there
on small models; rows under "remote code" follow the published code.

To add an architecture, add a row: the tensor names of one checkpoint (its index lists them) and its
config are enough. Names are templates: ``{L}`` is the layer, ``{E}`` the expert; without ``{E}``
one tensor holds all experts. Any prefix is allowed (``model.``, ``language_model.model.``,
``mtp.``), and `formats` knows the suffixes (``.weight``, ``.weight_scale_inv``, ``_bias``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from moescale.errors import UnsupportedError
from moescale.routers import kinds
from moescale.routers.kinds import UNKNOWN, OtherRouter, RouterKind

# Names of down-projections ---------------------------------------------------------------------

MLP: Final = ("layers.{L}.mlp.experts.{E}.down_proj", "layers.{L}.mlp.experts.down_proj")
"""The usual names: one tensor per expert, or one for all experts of a layer."""
SPARSE_MOE: Final = (
    "layers.{L}.block_sparse_moe.experts.{E}.w2",
    "layers.{L}.mlp.experts.down_proj",
)
FEED_FORWARD: Final = (
    "layers.{L}.feed_forward.experts.{E}.down_proj",
    "layers.{L}.feed_forward.experts.down_proj",
)
MIXER: Final = (
    "layers.{L}.mixer.experts.{E}.down_proj",
    "layers.{L}.mixer.experts.down_proj",
    "layers.{L}.mixer.experts.down_projs",
)
GRANITE: Final = (
    "layers.{L}.block_sparse_moe.output_linear",
    "layers.{L}.block_sparse_moe.experts.down_proj",
)
ARIA: Final = ("layers.{L}.mlp.experts.fc2", "layers.{L}.mlp.experts.down_proj")
INKLING: Final = ("layers.{L}.mlp.experts.w2", "layers.{L}.mlp.experts.down_proj")
GEMMA: Final = ("layers.{L}.experts.down_proj",)

# How the weights of the chosen experts are normalised ------------------------------------------


@dataclass(frozen=True, slots=True)
class Flag:
    """A config key switches renormalisation on or off.

    Attributes:
        key: its name.
        default: the value without the key, from the config class.
        only_if: another key and its value; without that value the weights always sum to 1.
        aliases: other names of the key in transformers' ``attribute_map``.
    """

    key: str
    default: bool
    only_if: tuple[str, str] | None = None
    aliases: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SharedSum:
    """The weights of routed and shared experts together sum to 1.

    Attributes:
        key: config key of the number of shared experts.
    """

    key: str


@dataclass(frozen=True, slots=True)
class PowerNorm:
    """The weights are divided by their p-norm.

    Attributes:
        key: config key of p; null for no normalisation.
    """

    key: str


NormalisationRule = bool | Flag | SharedSum | PowerNorm
ALWAYS: Final = True
"""The weights of the chosen experts sum to 1 (times a constant)."""
NEVER: Final = False
"""The weights are plain scores, so their sum grows with the number of chosen experts."""
NORM_TRUE: Final = Flag("norm_topk_prob", True)
NORM_FALSE: Final = Flag("norm_topk_prob", False)

# Which layers are MoE layers -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class All:
    """Every layer."""


@dataclass(frozen=True, slots=True)
class SparseStep:
    """Every ``decoder_sparse_step``-th layer, except those in ``mlp_only_layers``."""


@dataclass(frozen=True, slots=True)
class FirstDense:
    """All layers from ``first_k_dense_replace`` on, unless ``mlp_layer_types`` lists them.

    Attributes:
        default: the value without the key.
    """

    default: int


MoeLayers = All | SparseStep | FirstDense

# The rows ----------------------------------------------------------------------------------------

TEXT_SECTIONS: Final = ("text_config", "language_config", "llm_config", "")
"""Config sections that may hold the MoE keys; transformers reads the first that does."""


class Architecture(NamedTuple):
    """The facts about one model type.

    Attributes:
        model_type: as in ``config.json``.
        experts: name templates of the routed down-projections.
        normalisation: of the weights of the chosen experts.
        count_keys: config keys of the experts per token. If several are present, transformers reads
            the first; moescale sets all. Empty if the code fixes the number.
        sections: config sections that may hold the keys, in order of precedence.
        moe_layers: the layers with experts; None if only the tensors tell.
        groups: the router may be limited to ``topk_group`` of ``n_group`` groups of experts.
        total_keys: config keys of the number of experts per layer.
        part: the name of this MoE if the type has several, each with its own count.
        stacks: the stacks of layers that belong to `part`; None for all that belong to no other.
        moes_per_layer: MoEs in one layer that share count and numbering.
        fixed: why another count is refused.
        fixed_count: the number that the code fixes.
        no_effect: why scaling the down-projections has no effect.
        no_effect_if: config key that switches the cause of `no_effect` on; None if it is always on.
        partial_effect: what scaling the down-projections does not reach.
        partial_effect_if: tensor of an MoE layer that has the cause; None if every layer has it.
        other_modules: modules of the MoE block that other types do not have and that do not change
            the effect of a factor, by the first word of their names.
        scale_key: config key of a constant that multiplies the routed output.
        any_text_model: the text model may be of any type, and that type's row applies.
        can_fold: every engine examined multiplies the routed output, and nothing else, by that
            constant; changing it therefore equals scaling the weights.
        router: its kind, or why it has none.
    """

    model_type: str
    experts: Sequence[str]
    normalisation: NormalisationRule
    count_keys: Sequence[str] = ("num_experts_per_tok",)
    sections: Sequence[str] = TEXT_SECTIONS
    moe_layers: MoeLayers | None = None
    groups: bool = False
    total_keys: Sequence[str] = ("num_local_experts", "num_experts", "n_routed_experts")
    part: str | None = None
    stacks: frozenset[str] | None = None
    moes_per_layer: int = 1
    fixed: str | None = None
    fixed_count: int | None = None
    no_effect: str | None = None
    no_effect_if: str | None = None
    partial_effect: str | None = None
    partial_effect_if: str | None = None
    other_modules: Sequence[str] = ()
    scale_key: str | None = None
    any_text_model: bool = False
    can_fold: bool = False
    router: RouterKind | OtherRouter = UNKNOWN


_POST_NORM = (
    "a norm on the routed output alone removes every factor, so only the choice of experts changes"
)
_JOINT_NORM = (
    "a norm follows the sum of routed and shared experts: scaling changes the share of the routed"
    " experts in it, not its size"
)
_PER_TOKEN = ("num_experts_per_token", "num_experts_per_tok")
_MOE_TOPK = ("num_experts_per_tok", "moe_topk")
_MOE_TOTAL = ("moe_num_experts", "num_experts")
_SCALE = "routed_scaling_factor"


V4_EXPERTS: Final = (
    "layers.{L}.ffn.experts.{E}.w2",
    "mtp.{L}.ffn.experts.{E}.w2",
    "layers.{L}.mlp.experts.down_proj",
    "mtp.{L}.mlp.experts.down_proj",
)
_HASHED = (
    "its hash layers choose experts from a table with one column per expert of a token"
    " (gate.tid2eid), and columns would have to be cut or invented"
)
_MULTI_ROUTER = ("image_gate", "audio_gate")
_LATENT = ("routed_expert_down_proj", "routed_expert_up_proj")
_MOE_RENORMALIZE = Flag("moe_renormalize", True, aliases=("norm_topk_prob",))


def _group_limited(model_type: str, normalised: NormalisationRule, **more: Any) -> Architecture:
    """A row for a DeepSeek-like type: groups, a routed scaling factor, by default its router."""
    return Architecture(
        model_type,
        more.pop("experts", MLP),
        normalised,
        groups=True,
        scale_key=more.pop("scale_key", _SCALE),
        router=more.pop("router", kinds.SIGMOID),
        **more,
    )


ROWS: Final[tuple[Architecture, ...]] = (
    # Mixtral and similar types
    Architecture("mixtral", SPARSE_MOE, ALWAYS, moe_layers=All(), router=kinds.MIXTRAL),
    Architecture("minimax", SPARSE_MOE, ALWAYS, moe_layers=All(), router=kinds.MIXTRAL),
    Architecture("minimax_m2", SPARSE_MOE, ALWAYS, moe_layers=All(), router=kinds.SPARSE_SIGMOID),
    # The last is the text model of the others: sglang 0.5.23 minimax_m3.py
    *(
        Architecture(
            model_type,
            SPARSE_MOE,
            ALWAYS,
            scale_key=_SCALE,
            can_fold=True,
            router=kinds.MINIMAX_M3,
        )
        for model_type in ("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3")
    ),
    # Softmax, renormalised: config.json and model file in the repo of MiniMax-M1
    Architecture("minimax_m1", SPARSE_MOE, ALWAYS, moe_layers=All(), router=kinds.MIXTRAL),
    Architecture("minimax_text_01", SPARSE_MOE, ALWAYS, moe_layers=All(), router=kinds.MIXTRAL),
    Architecture(
        "phimoe",
        SPARSE_MOE,
        NEVER,
        moe_layers=All(),
        fixed="its router (sparsemixer) always takes 2 experts and ignores the config",
        router=kinds.SPARSEMIXER,
    ),
    # Qwen
    Architecture("qwen2_moe", MLP, NORM_FALSE, moe_layers=SparseStep(), router=kinds.SOFTMAX),
    Architecture("qwen3_moe", MLP, NORM_FALSE, moe_layers=SparseStep(), router=kinds.SOFTMAX),
    Architecture("qwen3_next", MLP, NORM_TRUE, moe_layers=SparseStep(), router=kinds.CENTRED),
    Architecture("qwen3_vl_moe", MLP, ALWAYS, moe_layers=SparseStep(), router=kinds.SOFTMAX),
    Architecture("qwen3_vl_moe_text", MLP, ALWAYS, moe_layers=SparseStep(), router=kinds.SOFTMAX),
    Architecture("qwen3_5_moe", MLP, ALWAYS, moe_layers=All(), router=kinds.CENTRED),
    Architecture("qwen3_5_moe_text", MLP, ALWAYS, moe_layers=All(), router=kinds.CENTRED),
    # sglang 0.5.23 interns2preview.py: the classes of Qwen3.5
    Architecture("intern_s2_preview", MLP, ALWAYS, moe_layers=All(), router=kinds.CENTRED),
    # sglang 0.5.23 interns2_mobius.py: all layers share a few banks of experts in turn; a bank has
    # one factor, and its number takes the place of the layer's
    *(
        Architecture(
            model_type,
            ("meta_mlp.{L}.experts.down_proj",),
            NORM_TRUE,
            router=kinds.OF_SEVERAL_LAYERS,
        )
        for model_type in ("interns2_mobius", "interns2_mobius_text")
    ),
    Architecture("qwen4_exp", MLP, NORM_TRUE, router=kinds.STREAMS),
    Architecture("qwen4_exp_text", MLP, NORM_TRUE, router=kinds.STREAMS),
    Architecture(
        "qwen3_omni_moe_thinker", MLP, NORM_TRUE, moe_layers=SparseStep(), router=kinds.SOFTMAX
    ),
    Architecture(
        "qwen3_omni_moe",
        MLP,
        NORM_TRUE,
        part="thinker",
        sections=("thinker_config.text_config",),
        moe_layers=SparseStep(),
        router=kinds.SOFTMAX,
    ),
    Architecture(
        "qwen3_omni_moe",
        MLP,
        NORM_FALSE,
        part="talker",
        stacks=frozenset({"talker"}),
        sections=("talker_config.text_config",),
        moe_layers=All(),
        router=kinds.SOFTMAX,
    ),
    # DeepSeek and types built like it
    _group_limited("deepseek_v2", NEVER, moe_layers=FirstDense(0), router=kinds.DEEPSEEK_V2),
    _group_limited("deepseek_ocr2", NEVER, router=kinds.DEEPSEEK_V2),
    _group_limited("unlimited_ocr", NEVER, router=kinds.DEEPSEEK_V2),
    _group_limited("deepseek_v3", NORM_TRUE, moe_layers=FirstDense(3), can_fold=True),
    _group_limited("deepseek_v32", NORM_TRUE, moe_layers=FirstDense(3), can_fold=True),
    _group_limited(
        "kimi_k25",
        NORM_TRUE,
        experts=(*MLP, "blocks.{L}.mlp.experts.{E}.down_proj"),
        moe_layers=FirstDense(3),
        any_text_model=True,
        can_fold=True,
    ),
    # sglang 0.5.23 kimi_vl.py, dots_vlm.py: the text model is DeepseekV2ForCausalLM, with its keys
    # in text_config (Kimi-VL) or at the top (dots.vlm); mlx-vlm 0.7.10 youtu_vl/language.py
    _group_limited("kimi_vl", NORM_TRUE, any_text_model=True, can_fold=True),
    _group_limited("dots_vlm", NORM_FALSE, can_fold=True, router=kinds.DOTS_VLM),
    _group_limited("youtu_vl", NORM_TRUE, can_fold=True),
    _group_limited(
        "kimi_linear",
        _MOE_RENORMALIZE,
        experts=SPARSE_MOE,
        count_keys=_PER_TOKEN,
        can_fold=True,
        router=kinds.SPARSE_SIGMOID,
    ),
    # sglang 0.5.23 kimi_k3.py: routed_expert_norm follows the routed sum
    _group_limited(
        "kimi_k3",
        _MOE_RENORMALIZE,
        experts=SPARSE_MOE,
        count_keys=_PER_TOKEN,
        other_modules=_LATENT,
        no_effect="a norm on the routed sum (routed_expert_norm) removes every factor",
        no_effect_if="latent_moe_use_norm",
        router=kinds.SPARSE_SIGMOID,
    ),
    _group_limited("bailing_hybrid", _MOE_RENORMALIZE, count_keys=_PER_TOKEN, can_fold=True),
    # Ling with images, sglang 0.5.23: bailing_mm_v3.py over bailing_moe_v3.py (text_config),
    # bailing_mm.py over bailing_moe.py (llm_config); a "MultiRouter" has gates for images and sound
    _group_limited(
        "bailing_moe_v3_vl",
        NORM_FALSE,
        other_modules=_MULTI_ROUTER,
        can_fold=True,
        router=kinds.LING_IMAGES,
    ),
    _group_limited(
        "bailingmm_moe_v2_lite",
        NORM_TRUE,
        other_modules=_MULTI_ROUTER,
        can_fold=True,
        router=kinds.LING_IMAGES,
    ),
    # sglang 0.5.23 gigachat35.py: DeepSeek-V3 with a norm after the MoE, by layernorm_type
    _group_limited(
        "gigachat3_5",
        NORM_TRUE,
        partial_effect=_JOINT_NORM,
        partial_effect_if="post_feedforward_layernorm.weight",
        router=kinds.GATED_INPUT,
    ),
    _group_limited("exaone_moe", NORM_TRUE, can_fold=True),
    _group_limited("dots1", NORM_FALSE, can_fold=True),
    _group_limited("glm4_moe", NORM_TRUE, moe_layers=FirstDense(1), can_fold=True),
    _group_limited("glm4_moe_lite", NORM_TRUE, can_fold=True),
    _group_limited("glm4v_moe", NORM_TRUE, moe_layers=FirstDense(1)),
    _group_limited("glm4v_moe_text", NORM_TRUE, moe_layers=FirstDense(1)),
    _group_limited("glm_moe_dsa", NORM_TRUE, can_fold=True),
    _group_limited("glm5_next", NORM_TRUE),
    _group_limited("glm5_next_text", NORM_TRUE),
    *(
        _group_limited(
            model_type, NORM_TRUE, experts=(*MLP, "mtp_layers.{L}.mlp.experts.down_proj")
        )
        for model_type in ("hy_v4", "hy_v4_vl", "hy_v4_vl_text")
    ),
    _group_limited("mimo_v2_flash", NORM_TRUE),
    _group_limited("mimo_v2", NORM_TRUE),  # sglang 0.5.23 mimo_v2.py: one class for both
    _group_limited("solar_open", NORM_TRUE),
    _group_limited("sarvam_moe", NORM_TRUE, moe_layers=FirstDense(1)),
    _group_limited("sarvam_mla", NORM_TRUE, moe_layers=FirstDense(1)),
    _group_limited("axk1", NORM_TRUE, partial_effect=_JOINT_NORM),
    _group_limited("axk2", NORM_TRUE, router=kinds.GATED_INPUT),
    _group_limited("beam", NORM_TRUE, no_effect=_POST_NORM, router=kinds.BEAM),
    _group_limited("nemotron_h", NORM_TRUE, experts=MIXER, can_fold=True, router=kinds.NEMOTRON),
    _group_limited(
        "nemotron_h_omni", NORM_TRUE, experts=MIXER, any_text_model=True, router=kinds.NEMOTRON
    ),
    _group_limited(
        "nemo_speechlm", NORM_TRUE, experts=MIXER, any_text_model=True, router=kinds.NEMOTRON
    ),
    _group_limited("mistral4", NORM_TRUE, router=kinds.SOFTMAX),
    _group_limited("mistral3", NORM_TRUE, any_text_model=True, router=kinds.SOFTMAX),
    *(
        _group_limited(
            model_type,
            ALWAYS,
            experts=("layers.{L}.experts.{E}.w2", "layers.{L}.mlp.experts.down_proj"),
            router=kinds.MISTRAL_LARGE,
        )
        for model_type in ("mistral_large4", "mistral_large4_text")
    ),
    _group_limited("dots3_note", NORM_TRUE, part="text"),
    _group_limited("dots3_note_text", NORM_TRUE),
    Architecture(
        "dots3_note",
        ("blocks.{L}.mlp.experts.{E}.fc2", "blocks.{L}.mlp.experts.down_proj"),
        ALWAYS,
        part="vision",
        stacks=frozenset({"vision_encoder", "vision_tower"}),
        count_keys=("num_experts_per_tok", "capacity_factor"),
        sections=("vision_config",),
        scale_key="router_scaling_factor",
        router=kinds.DOTS_VISION,
    ),
    # deepseek_ref: V4's config as public benchmarks copy it, with the same code
    *(
        Architecture(
            model_type,
            V4_EXPERTS,
            ALWAYS,
            moe_layers=All(),
            fixed=_HASHED,
            scale_key=_SCALE,
            can_fold=True,
            router=kinds.V4,
        )
        for model_type in ("deepseek_v4", "deepseek_ref")
    ),
    # V4.1 has no hash layers; its draft has its own count and number of experts
    *(
        Architecture(
            "deepseek_v41",
            V4_EXPERTS,
            NORM_TRUE,
            part=part,
            stacks=stacks,
            count_keys=(f"{key}num_experts_per_tok",),
            total_keys=(f"{key}n_routed_experts",),
            scale_key=_SCALE,
            router=kinds.NOT_COMPARED,
        )
        for part, key, stacks in (("text", "", None), ("draft", "dspark_", frozenset({"mtp"})))
    ),
    Architecture(
        "deepseek_v41_text", V4_EXPERTS, NORM_TRUE, scale_key=_SCALE, router=kinds.NOT_COMPARED
    ),
    # Types without relatives
    Architecture("olmoe", MLP, NORM_FALSE, moe_layers=All(), router=kinds.SOFTMAX),
    Architecture(
        "flex_olmo",
        MLP,
        NORM_FALSE,
        moe_layers=All(),
        no_effect=_POST_NORM,
        router=kinds.NO_NORM,
    ),
    Architecture("mellum", MLP, NORM_TRUE, router=kinds.SOFTMAX),
    Architecture("hunyuan_v1_moe", MLP, ALWAYS, count_keys=_MOE_TOPK, router=kinds.HUNYUAN),
    # Tencent's name for hunyuan_v1_moe: mlx-lm 0.32.2 hunyuan.py, sglang 0.5.23 hunyuan.py
    Architecture("hunyuan", MLP, ALWAYS, count_keys=_MOE_TOPK, router=kinds.HUNYUAN),
    Architecture("jamba", FEED_FORWARD, NEVER, router=kinds.JAMBA),
    Architecture(
        "ernie4_5_moe",
        MLP,
        ALWAYS,
        count_keys=("num_experts_per_tok", "moe_k"),
        total_keys=_MOE_TOTAL,
        router=kinds.ERNIE,
    ),
    # The second is Baidu's name: sglang 0.5.23 ernie45_vl.py, mlx-vlm 0.7.10 ernie4_5_moe_vl
    *(
        Architecture(
            model_type,
            (
                MLP[0],
                "layers.{L}.mlp.text_moe.experts.down_proj",
                "layers.{L}.mlp.vision_moe.experts.down_proj",
            ),
            ALWAYS,
            count_keys=("num_experts_per_tok", "moe_k"),
            total_keys=_MOE_TOTAL,
            moes_per_layer=2,
            other_modules=("moe_statics", "text_moe", "vision_moe"),
            router=kinds.TWO_ROUTERS,
        )
        for model_type in ("ernie4_5_vl_moe", "ernie4_5_moe_vl")
    ),
    Architecture("flint", MLP, NORM_FALSE, router=kinds.FLINT),
    Architecture("lara_mini", MLP, NORM_TRUE, moe_layers=All(), router=kinds.SOFTMAX),
    Architecture(
        "cohere2_moe",
        MLP,
        Flag("norm_topk_prob", True, only_if=("expert_selection_fn", "sigmoid")),
        router=kinds.COHERE2,
    ),
    Architecture(
        "afmoe",
        MLP,
        ALWAYS,
        partial_effect=_JOINT_NORM,
        scale_key="route_scale",
        router=kinds.AFMOE,
    ),
    Architecture("kolibri1", MLP, NORM_FALSE, partial_effect=_JOINT_NORM, router=kinds.KOLIBRI),
    Architecture("laguna", MLP, ALWAYS, scale_key="moe_routed_scaling_factor", router=kinds.LAGUNA),
    Architecture(
        "lfm2_moe",
        (
            "layers.{L}.feed_forward.experts.{E}.w2",
            "layers.{L}.feed_forward.experts.down_proj",
        ),
        NORM_TRUE,
        scale_key=_SCALE,
        router=kinds.LFM2,
    ),
    Architecture("hy_v3", MLP, ALWAYS, scale_key="router_scaling_factor", router=kinds.HY_V3),
    *(
        Architecture(
            model_type,
            ("layers.{L}.moe.down_proj", "layers.{L}.mlp.experts.down_proj"),
            ALWAYS,
            count_keys=("moe_top_k", "num_experts_per_tok"),
            total_keys=("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"),
            scale_key="moe_router_scaling_factor",
            router=kinds.STEP,
        )
        for model_type in ("step3p5", "step3p7")
    ),
    # Step3: sglang 0.5.23 step3_vl.py
    *(
        Architecture(
            model_type,
            ("layers.{L}.moe.down_proj", "layers.{L}.mlp.experts.down_proj"),
            Flag("norm_expert_weight", False),
            count_keys=("moe_top_k",),
            total_keys=("moe_num_experts",),
            router=kinds.NOT_COMPARED,
        )
        for model_type in ("step3_vl", "step3_text")
    ),
    Architecture("granitemoe", GRANITE, ALWAYS, moe_layers=All(), router=kinds.GRANITE),
    Architecture("granitemoeshared", GRANITE, ALWAYS, moe_layers=All(), router=kinds.GRANITE),
    Architecture("granitemoehybrid", GRANITE, ALWAYS, router=kinds.GRANITE),
    Architecture("granitemoe_swa", GRANITE, ALWAYS, router=kinds.GRANITE),
    Architecture(
        "gpt_oss",
        MLP,
        ALWAYS,
        count_keys=("num_experts_per_tok", "experts_per_token"),
        router=kinds.GPT_OSS,
    ),
    Architecture("openai_privacy_filter", MLP, ALWAYS, router=kinds.GPT_OSS),
    *(
        Architecture(
            model_type,
            ARIA,
            ALWAYS,
            count_keys=("moe_topk",),
            total_keys=_MOE_TOTAL,
            router=kinds.ARIA,
        )
        for model_type in ("aria", "aria_text")
    ),
    Architecture(
        "dbrx",
        ("blocks.{L}.ffn.experts.mlp.w2",),
        PowerNorm("moe_normalize_expert_weights"),
        count_keys=("moe_top_k",),
        sections=("ffn_config",),
        total_keys=_MOE_TOTAL,
        router=kinds.DBRX,
    ),
    Architecture(
        "doge",
        ("layers.{L}.mlp.up_embed",),
        ALWAYS,
        other_modules=("down_embed", "up_embed"),
        router=kinds.DOGE,
    ),
    Architecture(
        "jetmoe",
        ("layers.{L}.mlp.output_linear",),
        ALWAYS,
        other_modules=("bias",),
        fixed="the same number also sets the number of attention heads",
        router=kinds.JETMOE,
    ),
    Architecture("llama4", FEED_FORWARD, NEVER, router=kinds.ON_THE_INPUT),
    Architecture("llama4_text", FEED_FORWARD, NEVER, router=kinds.ON_THE_INPUT),
    # The three share one router: mlx-lm 0.32.2 longcat_flash_ngram.py (longcat_flash in sglang
    # 0.5.23), mlx-vlm 0.7.10 longcat_flash_sparse
    *(
        Architecture(
            model_type,
            MLP,
            NEVER,
            count_keys=_MOE_TOPK,
            partial_effect="its identity experts have no weights, so their part of the output is"
            " not scaled",
            scale_key=_SCALE,
            router=kinds.LONGCAT,
        )
        for model_type in ("longcat_flash", "longcat_flash_ngram", "longcat_flash_sparse")
    ),
    *(
        Architecture(
            model_type,
            GEMMA,
            ALWAYS,
            count_keys=("top_k_experts",),
            no_effect=_POST_NORM,
            router=kinds.OWN_NORM,
        )
        for model_type in ("gemma4", "gemma4_text", "diffusion_gemma")
    ),
    *(
        Architecture(
            model_type,
            MLP,
            ALWAYS,
            no_effect="each expert's output is normalised before its gate weight is applied",
            scale_key=_SCALE,
            router=kinds.OWN_NORM,
        )
        for model_type in ("muse_spark", "muse_spark_text")
    ),
    *(
        Architecture(
            model_type,
            INKLING,
            SharedSum("n_shared_experts"),
            partial_effect="routed and shared experts share one normalisation: another number of"
            " routed experts also changes the weight of the shared ones, which is not scaled",
            scale_key="route_scale",
            router=kinds.INKLING,
        )
        for model_type in ("inkling_mm_model", "inkling_text")
    ),
    *(
        Architecture(model_type, INKLING, ALWAYS, scale_key="route_scale", router=kinds.INKLING2)
        for model_type in ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text")
    ),
    Architecture(
        "zaya",
        MLP,
        NEVER,
        fixed="its configuration allows only one expert per token",
        router=kinds.STATEFUL,
    ),
    Architecture(
        "nllb-moe",
        ("layers.{L}.ffn.experts.expert_{E}.fc2",),
        ALWAYS,
        count_keys=(),
        fixed="its router always takes 2 experts",
        fixed_count=2,
        router=kinds.LIMITED,
    ),
    Architecture(
        "switch_transformers",
        (
            "block.{L}.layer.1.mlp.experts.expert_{E}.wo",
            "block.{L}.layer.2.mlp.experts.expert_{E}.wo",
        ),
        NEVER,
        count_keys=(),
        fixed="its router always takes 1 expert",
        fixed_count=1,
        router=kinds.LIMITED,
    ),
    # Remote code: types that transformers does not know by this name
    _group_limited("kimi_k2", NORM_TRUE, moe_layers=FirstDense(3), can_fold=True),
    _group_limited(
        "deepseek_vl_v2", NORM_FALSE, moe_layers=FirstDense(0), router=kinds.NOT_COMPARED
    ),
    Architecture("deepseek", MLP, NORM_FALSE, moe_layers=FirstDense(0), router=kinds.SOFTMAX),
    _group_limited(
        "bailing_moe", NORM_TRUE, moe_layers=FirstDense(0), can_fold=True, router=kinds.LING
    ),
    _group_limited("bailing_moe_v2", NORM_TRUE, moe_layers=FirstDense(0), can_fold=True),
    # sglang 0.5.23: sdar_moe.py, bailing_moe_linear.py, llada2.py
    Architecture("sdar_moe", MLP, NORM_TRUE, router=kinds.SOFTMAX),
    _group_limited(
        "bailing_moe_linear",
        NORM_TRUE,
        moe_layers=FirstDense(0),
        can_fold=True,
        router=kinds.LING_SIGMOID,
    ),
    _group_limited("llada2_moe", NORM_TRUE, moe_layers=FirstDense(0), router=kinds.LING_SIGMOID),
    _group_limited("joyai_llm_flash", NORM_TRUE, can_fold=True),  # mlx-lm 0.32.2: deepseek_v3
    # sglang 0.5.23 xllm.py: router_scaling_factor also scales the experts of its attention
    *(
        Architecture(
            model_type,
            MLP,
            NORM_TRUE,
            moe_layers=SparseStep(),
            scale_key="router_scaling_factor",
            router=router,
        )
        for model_type, router in (("xllm", kinds.XLLM_VALUES), ("k2_horizon", kinds.XLLM))
    ),
    # sglang 0.5.23 iquest_q1.py: all experts in experts.proj, the gate is called router
    Architecture(
        "iquest_q1",
        ("layers.{L}.mlp.experts.proj", *MLP),
        ALWAYS,
        partial_effect="a norm follows the experts of layer 0 (ffn_out_norm) and removes its"
        " factor",
        partial_effect_if="ffn_out_norm.weight",
        router=kinds.IQUEST,
    ),
    # mlx-lm 0.32.2 Klear.py (the type is the file's name), mlx-vlm 0.7.10 klear: `coefficient`
    # weighs the routed sum against the shared expert, after the factor
    *(
        Architecture(
            model_type,
            MLP,
            NORM_TRUE,
            moe_layers=SparseStep(),
            other_modules=("coefficient",),
            router=kinds.SIGMOID,
        )
        for model_type in ("Klear", "klear")
    ),
    # mlx-lm 0.32.2 phixtral.py: the softmax of the chosen experts' logits
    Architecture("phixtral", ("h.{L}.moe.mlp.{E}.fc2",), ALWAYS, router=kinds.BIASED_NORM),
    Architecture("arctic", SPARSE_MOE, ALWAYS, router=kinds.NOT_COMPARED),
    Architecture("minicpm", ("layers.{L}.mlp.experts.{E}.w2",), ALWAYS, router=kinds.SOFTMAX),
    Architecture(
        "xverse",
        MLP,
        ALWAYS,
        count_keys=("moe_top_k",),
        moe_layers=All(),
        router=kinds.NOT_COMPARED,
    ),
    Architecture(
        "grok-1",
        ("layers.{L}.moe_block.experts.{E}.linear_1", *SPARSE_MOE),
        NEVER,
        no_effect=_POST_NORM,
        router=kinds.NOT_COMPARED,
    ),
)


def find(model_type: str, part: str | None = None) -> Architecture:
    """The row of a model type; for a type with several MoEs, that of `part` or the first.

    Raises:
        KeyError: no row has this type.
        UnsupportedError: the type has no such part.
    """
    rows = parts(model_type)
    if not rows:
        raise KeyError(model_type)
    if part is None:
        return rows[0]
    for row in rows:
        if row.part == part:
            return row
    names = ", ".join(repr(row.part) for row in rows if row.part)
    raise UnsupportedError(
        f"model type {model_type!r} has no part {part!r}",
        hint=f"Its parts are {names}." if names else "It has only one MoE; leave --part out.",
    )


def parts(model_type: str) -> tuple[Architecture, ...]:
    """All rows of a model type; the first is the text model."""
    return tuple(row for row in ROWS if row.model_type == model_type)


def known_types() -> tuple[str, ...]:
    """The model types of the table, sorted."""
    return tuple(sorted({row.model_type for row in ROWS}))
