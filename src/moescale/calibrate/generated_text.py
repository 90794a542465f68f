"""Text that the model generates itself, to calibrate on if the user gives none."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from moescale.calibrate.runner import device_of, quiet_run
from moescale.calibrate.text import Text
from moescale.errors import UnsupportedError
from moescale.storage.base import ignore

SEQUENCES, LENGTH = 80, 256
"""Sequences, and tokens of each."""

SEED = 294
SEQUENCES_PER_BATCH = 16
"""Sequences generated at a time."""


def write_text(
    model: Any,
    tokeniser: Any,
    vocabulary: int,
    context: int = LENGTH,
    progress: Callable[[int, int], None] = ignore,
) -> Text:
    """Let the model generate a text at temperature 1 from a fixed seed.

    Sequences are `LENGTH` tokens long, or `context` if that is shorter. A sequence begins with the
    tokeniser's BOS token, or a random token if there is none, and continues after an EOS token.

    Raises:
        UnsupportedError: the model does not generate text.
    """
    generates = hasattr(model, "generate") and model.can_generate()
    if not generates or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            "the model cannot generate text", hint="Give a text: --calibrate FILE."
        )
    total, length = SEQUENCES, min(LENGTH, context)
    pieces: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for done in range(0, total, SEQUENCES_PER_BATCH):
            first = _first(tokeniser, vocabulary, min(SEQUENCES_PER_BATCH, total - done))
            ids = _write(model, first, length)
            pieces += ids.flatten().tolist()
            progress(len(pieces), total * length)
    return Text(tuple(pieces), length=length)


def _first(tokeniser: Any, vocabulary: int, rows: int) -> Tensor:
    begin = getattr(tokeniser, "bos_token_id", None)
    if begin is None:
        return torch.randint(vocabulary, (rows, 1))
    return torch.full((rows, 1), begin)


def _write(model: Any, first: Tensor, length: int) -> Tensor:
    how: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
    )
    first = first.to(device_of(model))
    with quiet_run("text generation"):
        ids: Tensor = model.generate(
            first, attention_mask=torch.ones_like(first), generation_config=how
        )
    return ids.cpu()


def digest_of(text: Text) -> str:
    """SHA-256 of the token ids as little-endian 32-bit integers."""
    return hashlib.sha256(struct.pack(f"<{len(text.tokens)}i", *text.tokens)).hexdigest()


def keep_text(text: Text, tokeniser: Any, file: Path) -> None:
    """Write sequences as lines of JSON with their tokens; `read_text` reads them."""
    assert text.length is not None
    lines = []
    for start in range(0, len(text.tokens), text.length):
        tokens = text.tokens[start : start + text.length]
        lines.append(json.dumps({"text": _words(tokens, tokeniser), "tokens": list(tokens)}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _words(tokens: Sequence[int], tokeniser: Any) -> str:
    if tokeniser is None:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
    return str(tokeniser.decode(tokens))
