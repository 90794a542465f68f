"""One row per model type: its class, its config besides the common sizes, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Overrides = Mapping[str, Any]

# Sizes for every config class, by field; a class takes those that it has.
SIZES: Overrides = {
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size", "text_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "d_kv"), 8),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("index_topk", "index_head_dim", "index_n_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "router_hidden_size"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 20),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_hidden_size"), 24),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    "unpadded_vocab_size": 90,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64,
    "rel_extent": 16,
    "sliding_window": 16,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    # Image and audio towers, as small as their classes allow.
    **dict.fromkeys(("depth", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("projection_hidden_size", "projector_hidden_size", "vision_hidden_size"), 32),
    **dict.fromkeys(("projection_intermediate_size", "projection_hidden_dim"), 32),
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "output_dim"), 32),
    **dict.fromkeys(("downsample_hidden_size", "output_channels", "subsampling_conv_channels"), 8),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "posemb_grid_size"), 4),
    **dict.fromkeys(("position_embedding_size", "num_position_embeddings"), 16),
    "patch_size": 4,
    "image_size": 8,
    "max_img_size": 8,
}


@dataclass(frozen=True)
class Tiny:
    """How a model type is built, and where its routed experts are."""

    model: str
    """Name of the model class."""
    config: Overrides = field(default_factory=dict)
    """Config keys besides `SIZES`, section by section."""
    count: str = "num_experts_per_tok"
    """Path of the number of experts per token in config.json."""
    fixed: str | None = None
    """The reason why the number cannot be changed, if any."""
    part: str = ""
    """The path below which the modules of this entry are; the rest of the model is ignored."""
    routed: str = "experts"
    """Name of the modules that return the routed sum."""
    down: str = r"down_proj(_bias)?"
    """The names of down-projections in a routed module, as a regular expression."""
    shared: str = r"shared_experts?|shared_mlp"
    """The names of shared experts in a layer, as a regular expression."""
    silenced: tuple[str, ...] = ()
    """Parameters of a routed module that add other terms to its output."""
    feed: str = "block"
    """How an MoE block takes hidden states: a key of `tiny_models.FEEDS`."""
    run: str = "generate"
    """How the whole model runs: a key of `tiny_models.RUNS`."""
    width: str = "index"
    """How the experts of a token are counted: a key of `tiny_models.WIDTHS`."""
    shard: str = "1GB"
    """The largest size of a shard."""
    config_class: str = ""
    """Name of the config class, if the model class belongs to another type."""
    mtp: str | None = None
    """The path of the MTP layer in the files on the Hub."""


def _text(
    model: str, text: Overrides, *, count: str = "num_experts_per_tok", **others: Any
) -> Tiny:
    """A row whose experts and count are in the config's `text_config`."""
    config = {"text_config": text, **others.pop("config", {})}
    return Tiny(model, config, count=f"text_config.{count}", **others)


def _rope(**others: Any) -> Overrides:
    return {"rope_type": "default", "rope_theta": 10000.0, **others}


_OMNI: Overrides = {
    "thinker_config": {
        "vision_start_token_id": 90,
        "text_config": {"mlp_only_layers": [0]},
        "vision_config": {"deepstack_visual_indexes": [0]},
        "audio_config": {"num_mel_bins": 16},
    },
    "talker_config": {
        "thinker_hidden_size": 32,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
        "text_config": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 24},
    },
    "code2wav_config": {
        "codebook_size": 16,
        "upsample_rates": [2],
        "upsampling_ratios": [2],
        "decoder_dim": 16,
    },
}
_DELTA_NET: Overrides = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_QWEN4: Overrides = {
    **_DELTA_NET,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_SAM: Overrides = {"sam_config": {"downsample_channels": [8, 32], "mlp_dim": 48}}
_MAMBA_MOE: Overrides = {
    "layers_block_type": ["full_attention", "moe", "linear_attention", "moe"],
    "num_hidden_layers": 4,
    "n_groups": 2,
}
_LOOP: Overrides = {
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_gate_rank": 8,
}
_DOTS3: Overrides = {
    "text_config": {"layer_types": ["indexed_attention"] * 3},
    "vision_config": {"pyramid_num_routed": [-1, 4, 8], "capacity_factor": 2},
    "audio_config": {"feature_size": 16},
}

TINY: dict[str, Tiny] = {
    # The most common families.
    "mixtral": Tiny("MixtralForCausalLM", shard="100KB"),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}, shard="60KB"),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_next": Tiny(
        "Qwen3NextForCausalLM",
        {"mlp_only_layers": [0], **_DELTA_NET},
        mtp="mtp.layers.0",
    ),
    "qwen3_5_moe": _text("Qwen3_5MoeForConditionalGeneration", _DELTA_NET, mtp="mtp.layers.0"),
    "qwen3_5_moe_text": Tiny("Qwen3_5MoeForCausalLM", _DELTA_NET, mtp="mtp.layers.0"),
    "qwen3_vl_moe": _text(
        "Qwen3VLMoeForConditionalGeneration",
        {"mlp_only_layers": [0]},
        config={"vision_config": {"deepstack_visual_indexes": [0]}},
    ),
    "qwen3_vl_moe_text": Tiny("Qwen3VLMoeTextModel", {"mlp_only_layers": [0]}, run="forward"),
    "qwen3_omni_moe/thinker": Tiny(
        "Qwen3OmniMoeForConditionalGeneration",
        _OMNI,
        count="thinker_config.text_config.num_experts_per_tok",
        part="thinker",
        run="thinker",
    ),
    "qwen3_omni_moe/talker": Tiny(
        "Qwen3OmniMoeForConditionalGeneration",
        _OMNI,
        count="talker_config.text_config.num_experts_per_tok",
        part="talker",
        run="talker",
    ),
    "qwen3_omni_moe_thinker": Tiny(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _OMNI["thinker_config"],
        count="text_config.num_experts_per_tok",
    ),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", shard="100KB", mtp="model.layers.3"),
    "deepseek_v32": Tiny("DeepseekV32ForCausalLM", mtp="model.layers.3"),
    "deepseek_v4": Tiny(
        "DeepseekV4ForCausalLM",
        {"mlp_layer_types": ["hash_moe", "moe", "moe"], "o_groups": 2},
        fixed="the hash layers hold a table with k columns",
        feed="ids",
        mtp="mtp.0",
    ),
    "kimi_k25": _text("Kimi_K25ForConditionalGeneration", {}),
    "olmoe": Tiny("OlmoeForCausalLM"),
    # All others.
    "minimax": Tiny("MiniMaxForCausalLM", {"block_size": 8}),
    "minimax_m2": Tiny("MiniMaxM2ForCausalLM"),
    "phimoe": Tiny("PhimoeForCausalLM", fixed="the router takes two, whatever the config says"),
    "qwen4_exp": _text(
        "Qwen4ExpForConditionalGeneration",
        _QWEN4,
        mtp="mtp.layers.0",
    ),
    "qwen4_exp_text": Tiny("Qwen4ExpForCausalLM", _QWEN4, mtp="mtp.layers.0"),
    "flex_olmo": Tiny("FlexOlmoForCausalLM"),
    "mellum": Tiny("MellumForCausalLM", {"num_mtp_layers": 1}, mtp="mtp.layers.0"),
    "hunyuan_v1_moe": Tiny("HunYuanMoEV1ForCausalLM", count="moe_topk"),
    "jamba": Tiny(
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "use_mamba_kernels": False,
        },
    ),
    "ernie4_5_moe": Tiny("Ernie4_5_MoeForCausalLM", count="moe_k"),
    "ernie4_5_vl_moe": _text(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "moe_intermediate_size": [20, 12],
            "rope_parameters": _rope(mrope_section=[1, 1, 2]),
        },
        count="moe_k",
    ),
    "flint": Tiny("FlintForCausalLM", {"mlp_only_layers": [0]}),
    "lara_mini": Tiny("LaraMiniForCausalLM", _DELTA_NET),
    "cohere2_moe": Tiny("Cohere2MoeForCausalLM", {"num_shared_experts": 1}),
    "deepseek_ocr2": _text(
        "DeepseekOcr2ForConditionalGeneration", {}, config={"vision_config": _SAM}
    ),
    "unlimited_ocr": _text(
        "UnlimitedOcrForConditionalGeneration", {}, config={"vision_config": _SAM}
    ),
    "bailing_hybrid": Tiny(
        "BailingHybridForCausalLM", _DELTA_NET, count="num_experts_per_token", mtp="model.layers.3"
    ),
    "kimi_linear": Tiny("KimiLinearForCausalLM", _DELTA_NET, count="num_experts_per_token"),
    "exaone_moe": Tiny("ExaoneMoeForCausalLM", mtp="mtp.layers.0"),
    "dots1": Tiny("Dots1ForCausalLM", {"n_shared_experts": 1}),
    "glm4_moe": Tiny("Glm4MoeForCausalLM", mtp="model.layers.3"),
    "glm4_moe_lite": Tiny("Glm4MoeLiteForCausalLM", mtp="model.layers.3"),
    "glm4v_moe": _text(
        "Glm4vMoeForConditionalGeneration", {"rope_parameters": _rope(mrope_section=[1, 1, 0])}
    ),
    "glm4v_moe_text": Tiny(
        "Glm4vMoeTextModel", {"rope_parameters": _rope(mrope_section=[1, 1, 0])}, run="forward"
    ),
    "glm_moe_dsa": Tiny("GlmMoeDsaForCausalLM", mtp="model.layers.3"),
    "glm5_next": _text(
        "Glm5NextForConditionalGeneration",
        {
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
        mtp="model.language_model.layers.3",
    ),
    "glm5_next_text": Tiny(
        "Glm5NextTextModel",
        {
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
        run="forward",
    ),
    "hy_v4": Tiny("HYV4ForCausalLM", mtp="model.mtp_layers.0"),
    "hy_v4_vl": _text(
        "HYV4VLForConditionalGeneration",
        {"rope_parameters": _rope(mrope_section=[1, 1, 2])},
        mtp="model.mtp_layers.0",
    ),
    "hy_v4_vl_text": Tiny(
        "HYV4VLTextModel", {"rope_parameters": _rope(mrope_section=[1, 1, 2])}, run="forward"
    ),
    "mimo_v2_flash": Tiny("MiMoV2FlashForCausalLM", {"head_dim": 12, "num_key_value_heads": 2}),
    "solar_open": Tiny("SolarOpenForCausalLM"),
    "sarvam_moe": Tiny("Glm4MoeForCausalLM", config_class="SarvamMoEConfig"),
    "sarvam_mla": Tiny("DeepseekV3ForCausalLM", config_class="SarvamMLAConfig"),
    "axk1": Tiny("AXK1ForCausalLM"),
    "axk2": Tiny("AXK2ForCausalLM"),
    "beam": Tiny("BeamForCausalLM"),
    "nemotron_h": Tiny("NemotronHForCausalLM", _MAMBA_MOE, mtp="mtp.layers.0"),
    "nemotron_h_omni": _text(
        "NemotronH_Omni_Reasoning_V3",
        _MAMBA_MOE,
        config={"vision_config": {"video_temporal_patch_size": 2}},
    ),
    "nemo_speechlm": _text(
        "Nemotron3_5TranscribeForConditionalGeneration",
        _MAMBA_MOE,
        config={
            "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
            "word_timestamp_config": {"blank_token_id": 95},
        },
    ),
    "dots3_note/text": Tiny(
        "Dots3NoteForConditionalGeneration",
        _DOTS3,
        count="text_config.num_experts_per_tok",
        part="model.language_model",
    ),
    "dots3_note_text": Tiny("Dots3NoteForCausalLM", _DOTS3["text_config"]),
    "dots3_note/vision": Tiny(
        "Dots3NoteForConditionalGeneration",
        _DOTS3,
        count="vision_config.num_experts_per_tok",
        part="model.vision_tower",
        run="vision",
    ),
    "afmoe": Tiny("AfmoeForCausalLM"),
    "kolibri1": Tiny("Kolibri1ForCausalLM"),
    "laguna": Tiny("LagunaForCausalLM"),
    "lfm2_moe": Tiny("Lfm2MoeForCausalLM", {"layer_types": ["full_attention", "conv", "conv"]}),
    "hy_v3": Tiny("HYV3ForCausalLM", mtp="model.layers.3"),
    "minimax_m3_vl": _text("MiniMaxM3SparseForConditionalGeneration", {}),
    "minimax_m3_vl_text": Tiny("MiniMaxM3VLForCausalLM"),
    "step3p5": Tiny("Step3p7TextModel", run="forward"),
    "step3p7": _text("Step3p7ForConditionalGeneration", {}, mtp="model.layers.3"),
    "mistral4": Tiny("Mistral4ForCausalLM"),
    "mistral3": _text("Mistral3ForConditionalGeneration", {"model_type": "mistral4"}),
    "mistral_large4": _text("MistralLarge4ForConditionalGeneration", {}),
    "mistral_large4_text": Tiny("MistralLarge4TextModel", run="forward"),
    "granitemoe": Tiny("GraniteMoeForCausalLM"),
    "granitemoeshared": Tiny("GraniteMoeSharedForCausalLM"),
    "granitemoehybrid": Tiny(
        "GraniteMoeHybridForCausalLM", {"layer_types": ["attention", "mamba", "mamba"]}
    ),
    "granitemoe_swa": Tiny("GraniteMoeSWAForCausalLM"),
    "gpt_oss": Tiny("GptOssForCausalLM"),
    "openai_privacy_filter": Tiny("OpenAIPrivacyFilterForTokenClassification", run="forward"),
    "aria": _text("AriaForConditionalGeneration", {}, count="moe_topk"),
    "aria_text": Tiny("AriaTextForCausalLM", count="moe_topk"),
    "dbrx": Tiny(
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 8, "moe_top_k": 2},
        },
        count="ffn_config.moe_top_k",
        down=r"mlp\.w2",
    ),
    "doge": Tiny(
        "DogeForCausalLM",
        {"is_moe": True, "num_experts": 16},
        routed="mlp",
        down=r"up_embed\.weight",
        shared="down_proj",
        silenced=("down_proj.weight",),
        width="embedding",
    ),
    "jetmoe": Tiny(
        "JetMoeForCausalLM",
        {"num_key_value_heads": 2},
        fixed="the count also sets the attention heads",
        routed="mlp",
        down=r"output_linear\.weight",
        silenced=("bias",),
        width="gating",
    ),
    "llama4": _text("Llama4ForConditionalGeneration", {"moe_layers": [1, 2]}, width="scores"),
    "llama4_text": Tiny("Llama4ForCausalLM", {"moe_layers": [1, 2]}, width="scores"),
    "longcat_flash": Tiny(
        "LongcatFlashForCausalLM",
        {"zero_expert_num": 2},
        count="moe_topk",
        mtp="model.mtp.layers.0",
    ),
    "gemma4": _text(
        "Gemma4ForConditionalGeneration",
        {"enable_moe_block": True},
        count="top_k_experts",
        shared="mlp",
        feed="router",
    ),
    "gemma4_text": Tiny(
        "Gemma4ForCausalLM",
        {"enable_moe_block": True},
        count="top_k_experts",
        shared="mlp",
        feed="router",
    ),
    "diffusion_gemma": _text(
        "DiffusionGemmaForBlockDiffusion",
        {},
        count="top_k_experts",
        shared="mlp",
        feed="router",
        part="model.decoder",
        config={"canvas_length": 8},
    ),
    "inkling_mm_model": _text(
        "InklingForConditionalGeneration",
        {},
        config={
            "vision_config": {"num_hidden_layers": 4},
            "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16},
        },
    ),
    "inkling_text": Tiny("InklingForCausalLM"),
    "inkling2": _text("Inkling2ForConditionalGeneration", {}),
    "inkling2_text": Tiny("Inkling2ForCausalLM"),
    "inkling2_loop": _text("Inkling2LoopForConditionalGeneration", _LOOP),
    "inkling2_loop_text": Tiny("Inkling2LoopForCausalLM", _LOOP),
    "muse_spark": _text(
        "MuseSparkForConditionalGeneration",
        {},
        config={
            "audio_config": {"patch_sizes": [2] * 3, "hidden_sizes": [8] * 3, "depths": [1] * 3}
        },
    ),
    "muse_spark_text": Tiny("MuseSparkTextModel", run="forward"),
    "zaya": Tiny("ZayaForCausalLM", {"num_experts_per_tok": 1}, fixed="the config takes only 1"),
    "nllb-moe": Tiny(
        "NllbMoeForConditionalGeneration",
        {
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
        fixed="there is no key: always 2",
        down=r"expert_\d+\.fc2\.(weight|bias)",
        width="weights",
    ),
    "switch_transformers": Tiny(
        "SwitchTransformersForConditionalGeneration",
        {
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        },
        fixed="there is no key: always 1",
        down=r"expert_\d+\.wo\.weight",
        width="weights",
    ),
}

# Model types that transformers cannot build, and why.
CANNOT_BUILD: dict[str, str] = {}
