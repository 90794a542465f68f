"""The four models of the study, and their training."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from texts import CONTEXT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

transformers.utils.logging.disable_progress_bar()

LAYERS, HIDDEN, BATCH = 4, 96, 16
STEPS, WARM_UP, RATE = 500, 50, 3e-3
BALANCE = 2e-3
"""Step of DeepSeek-V3's selection bias towards experts with less than their share of tokens."""

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.01}


@dataclass(frozen=True, slots=True)
class Study:
    """One kind of router.

    Attributes:
        title: a description of the model.
        config: config keys besides those in `COMMON`.
        trained: experts per token in training.
        tried: other numbers of experts per token.
    """

    title: str
    config: dict[str, Any]
    trained: int
    tried: tuple[int, ...]


STUDIES = {
    "mixtral": Study(
        "8 experts, trained with 2; softmax over the chosen, so weights sum to 1",
        {"num_local_experts": 8, "intermediate_size": 192, **BALANCED},
        2,
        (1, 3, 4, 5, 6, 7, 8),
    ),
    "olmoe": Study(
        "16 experts, trained with 4; softmax over all, not renormalised",
        {"num_experts": 16, "intermediate_size": 96, "norm_topk_prob": False, **BALANCED},
        4,
        (1, 2, 3, 5, 6, 8, 12, 16),
    ),
    "deepseek_v3": Study(
        "16 experts in 4 groups of which 2 are used, trained with 4; sigmoid scores with a"
        " selection bias, renormalised; one shared expert",
        {
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 96,
            "intermediate_size": 192,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
            "kv_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
        4,
        (1, 2, 3, 5, 6, 7, 8),
    ),
    "qwen2_moe": Study(
        "16 experts, trained with 4; softmax over all, not renormalised; one gated shared expert",
        {
            "num_experts": 16,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 96,
            "intermediate_size": 192,
            "norm_topk_prob": False,
            **BALANCED,
        },
        4,
        (1, 2, 3, 5, 6, 8, 12, 16),
    ),
}


def train(name: str, study: Study, text: bytes, steps: int, folder: Path) -> None:
    """Train a model and save it in bf16."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": LAYERS, "num_experts_per_tok": study.trained}
    config = transformers.CONFIG_MAPPING[name](**COMMON, **layers, **study.config)
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    balance = balancer(model)
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        tokens = torch.stack([data[s : s + CONTEXT] for s in starts]).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        plan.step()
        balance()
        if step % 100 == 0 or step == steps - 1:
            say(f"{name}: step {step}, training loss {loss.item():.3f}")
    part = folder.with_name(
        f"{folder.name}.part"
    )  # so that an interrupted training does not count as done
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    part.rename(folder)


def rate(step: int, steps: int) -> float:
    """The relative learning rate: a linear warm-up, then half a cosine down to a tenth."""
    progress = max(0.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * progress))


def balancer(model: PreTrainedModel) -> Callable[[], None]:
    """A function that moves the selection biases as DeepSeek-V3's authors do, after each step."""
    gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    chosen: dict[nn.Module, Tensor] = {}
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, output: chosen.update({gate: output[2]}))

    def balance() -> None:
        for gate in gates:
            bias = gate.e_score_correction_bias
            load = torch.bincount(chosen[gate].flatten(), minlength=len(bias)).float()
            bias += BALANCE * torch.sign(load.mean() - load)

    return balance


def say(text: str) -> None:
    """Print progress to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
