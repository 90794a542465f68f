"""The texts that the models are trained, calibrated and evaluated on."""

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
"""Pieces of CONTEXT bytes to calibrate and to evaluate on."""

WINDOW = 64
"""No sequence of so many bytes is in two of the texts."""


@dataclass(frozen=True, slots=True)
class Text:
    """The texts; all but `train` are pieces of CONTEXT bytes as int64, (count, CONTEXT).

    Attributes:
        train: Python to train on.
        calibrate: Python, from other files.
        prose: English.
        evaluate: Python, from yet other files.
    """

    train: bytes
    calibrate: Tensor
    prose: Tensor
    evaluate: Tensor


def texts(pieces: int) -> Text:
    """Make them from Python's standard library and from the descriptions of installed packages.

    Every eighth file of the library is for calibration, and every eighth for evaluation.
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
    """The long descriptions of the installed packages, joined."""
    found = {
        dist.metadata["Name"]: dist.metadata.get_payload() for dist in metadata.distributions()
    }
    return "\n".join(str(found[name]) for name in sorted(found, key=str.lower)).encode()


def windows(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The distinct hashes of all sequences of `WINDOW` bytes in a text, sorted."""
    return np.unique(hashes(text))


def hashes(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of the `WINDOW` bytes from each position on: a polynomial, modulo 2**64."""
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    total = np.zeros(max(0, len(codes) - WINDOW + 1), np.uint64)
    for i in range(WINDOW):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += codes[i : i + len(total)]
    return total


def contexts(text: bytes, count: int, known: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
    """`count` pieces of a text, evenly spread, of those without a hash in `known`."""
    starts = range(0, len(text) - CONTEXT, CONTEXT)
    seen = np.isin(hashes(text), known)
    last = CONTEXT - WINDOW + 1
    fresh = [start for start in starts if not seen[start : start + last].any()]
    if len(fresh) < count:
        sys.exit(f"only {len(fresh)} of {count} pieces of a text are new")
    chosen = [fresh[i * len(fresh) // count] for i in range(count)]
    return torch.tensor([list(text[start : start + CONTEXT]) for start in chosen])
