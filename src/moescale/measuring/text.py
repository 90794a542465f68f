"""The calibration text: what it is, and its tokens."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescale.errors import UnsupportedError, UsageError

FEWEST, MOST = 2_048, 65_536
"""Tokens of a text: fewer are refused, of more the first are taken."""

_MOST_BYTES = 32 * MOST
"""As much of the file is tokenised at most; no tokeniser takes 32 bytes a token on average."""

_BYTE_VOCABULARY = range(256, 385)
"""Sizes of a vocabulary of bytes: 256, and as many more tokens as a model may add to them."""

_TOKENISERS = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens.

    Attributes:
        tokens: the token ids, at least `FEWEST` and at most `MOST`.
        start: the ids that the tokeniser puts at the beginning of every sequence.
        unit: ``tokens`` of the model's tokeniser, or ``bytes``.
        cut: the file has more.
    """

    tokens: tuple[int, ...]
    start: tuple[int, ...] = ()
    unit: str = "tokens"
    cut: bool = False


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UsageError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"--calibrate {path}: is no regular file, which is read more than once")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"--calibrate {path}: {error.strerror}") from None


def read_text(path: Path, folder: Path, vocabulary: int) -> Text:
    """The first `MOST` tokens of a text.

    Args:
        path: UTF-8 text, or anything at all for a model of bytes.
        folder: the checkpoint, which has the tokeniser.
        vocabulary: number of the model's token ids.

    Raises:
        UsageError: the text is no text, or too short.
        UnsupportedError: the model's tokeniser cannot be used.
    """
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES)
    names = [entry.name for entry in folder.iterdir()]
    if any(fnmatch.filter(names, pattern) for pattern in _TOKENISERS):
        text = _tokenised(data, path, folder)
    elif vocabulary in _BYTE_VOCABULARY:
        text = Text(tuple(data[:MOST]), unit="bytes", cut=len(data) > MOST)
    else:
        raise UnsupportedError(
            f"the model has no tokeniser, and {vocabulary} token ids are no vocabulary of bytes",
            hint="Put the tokeniser's files into the checkpoint; --rule gates needs no text.",
        )
    if len(text.tokens) < FEWEST:
        raise UsageError(
            f"--calibrate {path}: is {len(text.tokens):,} {text.unit} long, {FEWEST:,} are needed",
            hint="Give a longer text of the kind that the model is for.",
        )
    return text


def _tokenised(data: bytes, path: Path, folder: Path) -> Text:
    words = _decoded(data, path)
    tokeniser = _tokeniser(folder)
    # Not verbose, since it would warn of a long text.
    tokens = tokeniser(words, add_special_tokens=False, verbose=False)["input_ids"]
    both: list[int] = tokeniser("a")["input_ids"]
    bare: list[int] = tokeniser("a", add_special_tokens=False)["input_ids"]
    start = both[: _find(bare, both)]
    cut = len(tokens) > MOST or len(data) == _MOST_BYTES
    return Text(tuple(tokens[:MOST]), tuple(start), cut=cut)


def _find(part: list[int], whole: list[int]) -> int:
    """Where a list begins in another one; 0 where it does not."""
    places = range(len(whole) - len(part) + 1)
    return next((i for i in places if whole[i : i + len(part)] == part), 0)


def _decoded(data: bytes, path: Path) -> str:
    """The text, without a letter that the end of what was read cuts in two."""
    whole = len(data) < _MOST_BYTES
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and len(data) - error.start < 4:
            return data[: error.start].decode("utf-8-sig")
        raise UsageError(
            f"--calibrate {path}: is not UTF-8 text (byte {error.start:,})",
            hint="Only a model of bytes without a tokeniser takes other files.",
        ) from None


def _tokeniser(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a tokeniser's file makes the library raise
        raise UnsupportedError(
            f"the model's tokeniser cannot be loaded: {one_line(error)}",
            hint="Remote code is never run; --rule gates needs no tokeniser.",
        ) from None


def one_line(error: BaseException) -> str:
    """What a library says, cut to a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
