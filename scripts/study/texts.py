"""What the models of the study learn, and what they are calibrated and evaluated on."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTEXT = 128
"""Bytes in a piece of text."""

CALIBRATED, EVALUATED = 128, 512
"""Pieces of CONTEXT bytes to calibrate with and to evaluate on."""

WINDOW = 64
"""Bytes that no text to calibrate with or to evaluate on has in common with the one before it."""


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes to train on, and pieces of CONTEXT bytes, int64, (count, CONTEXT), of other files.

    Attributes:
        train: what the models learn.
        calibrate: Python, too.
        prose: English.
        evaluate: Python; it shares no `WINDOW` bytes with any of the others.
    """

    train: bytes
    calibrate: Tensor
    prose: Tensor
    evaluate: Tensor


def texts(pieces: int) -> Text:
    """The sources of Python's standard library, and how installed packages describe themselves.

    Of the library every eighth file is held back for each purpose.
    """
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("site-packages", "dist-packages", "test", "idlelib", "lib2to3")
    files = [p for p in sorted(root.rglob("*.py")) if not set(p.parts) & set(packages)]
    if len(files) < 100:
        sys.exit(f"{root} has no sources of the standard library; use a Python that has them")
    parts = [b"".join(p.read_bytes() for p in files[i::8]) for i in range(8)]
    train = b"".join(parts[:6])
    known = windows(train)
    calibrate = contexts(parts[6], CALIBRATED, known)
    prose = contexts(descriptions(), CALIBRATED, known)
    for text in (calibrate, prose):
        known = np.union1d(known, windows(bytes(text.flatten().tolist())))
    return Text(train, calibrate, prose, contexts(parts[7], pieces, known))


def descriptions() -> bytes:
    """The long descriptions of installed packages, one after the other."""
    found = {
        dist.metadata["Name"]: dist.metadata.get_payload() for dist in metadata.distributions()
    }
    return "\n".join(str(found[name]) for name in sorted(found, key=str.lower)).encode()


def windows(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of every `WINDOW` bytes of a text, sorted, each once."""
    return np.unique(hashes(text))


def hashes(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of the `WINDOW` bytes from each place on: a polynomial, modulo 2**64."""
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    total = np.zeros(max(0, len(codes) - WINDOW + 1), np.uint64)
    for i in range(WINDOW):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += codes[i : i + len(total)]
    return total


def contexts(text: bytes, count: int, known: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
    """`count` pieces of a text, evenly spread, without those that have a window of `known`."""
    starts = range(0, len(text) - CONTEXT, CONTEXT)
    seen = np.isin(hashes(text), known)
    last = CONTEXT - WINDOW + 1
    fresh = [start for start in starts if not seen[start : start + last].any()]
    if len(fresh) < count:
        sys.exit(f"only {len(fresh)} of {count} pieces of a text are new")
    chosen = [fresh[i * len(fresh) // count] for i in range(count)]
    return torch.tensor([list(text[start : start + CONTEXT]) for start in chosen])
