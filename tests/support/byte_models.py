"""Trains small byte-level language models in seconds, on text that ships with Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

CONTEXT = 64
_HELD_BACK = 100_000
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}


def mixtral() -> transformers.PreTrainedModel:
    """8 experts, 2 per token; the gate weights are renormalised."""
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
    config = transformers.MixtralConfig(**_COMMON, **sizes, num_key_value_heads=2)
    return transformers.MixtralForCausalLM(config)


def olmoe() -> transformers.PreTrainedModel:
    """16 experts, 4 per token; the gate weights are not renormalised."""
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32}
    config = transformers.OlmoeConfig(**_COMMON, **sizes, norm_topk_prob=False)
    return transformers.OlmoeForCausalLM(config)


MODELS = {"mixtral": mixtral, "olmoe": olmoe}


def texts() -> tuple[bytes, bytes]:
    """Python's own library, split into training text and held-back text."""
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    data = b"".join(path.read_bytes() for path in library)
    return data[:-_HELD_BACK], data[-_HELD_BACK:]


def train(name: str, folder: Path, steps: int = 400) -> None:
    """Write a checkpoint in bfloat16 and, beside its files, the held-back text as ``val.bin``."""
    train_text, held_back = texts()
    data = torch.frombuffer(bytearray(train_text), dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().train()
        optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
            starts = torch.randint(0, len(data) - CONTEXT, (16,)).tolist()
            ids = torch.stack([data[start : start + CONTEXT] for start in starts]).long()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="200KB")
    (folder / "val.bin").write_bytes(held_back)
