"""The calibration text and its tokens."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moescale.errors import UnsupportedError, UsageError, one_line

MIN_TOKENS, MAX_TOKENS = 2_048, 65_536
"""Limits of a text in tokens: a shorter text is refused, a longer one is cut."""

_MAX_BYTES = 32 * MAX_TOKENS
"""Bytes read from a file; no tokeniser needs 32 bytes per token on average."""

_BYTE_VOCABULARY = range(256, 385)
"""Sizes of a vocabulary of bytes: 256, and the tokens that a model may add."""

_SEQUENCE_LENGTHS = range(2, 257)
"""Lengths of sequences that a model may have generated; others are cut like any text."""

_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""

_TOKENISERS = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens.

    Attributes:
        tokens: the token ids, at least `MIN_TOKENS` and at most `MAX_TOKENS`.
        start: the ids that the tokeniser puts at the beginning of every sequence.
        unit: ``tokens`` of the model's tokeniser, or ``bytes``.
        cut: whether the file has more.
        length: tokens of each sequence, if the text is one of sequences, which include `start`.
    """

    tokens: tuple[int, ...]
    start: tuple[int, ...] = ()
    unit: str = "tokens"
    cut: bool = False
    length: int | None = None

    def split(self, length: int, part: float) -> tuple[Text, Text]:
        """Split after whole sequences; the second text has at least `part` of it if possible."""
        size = self.length or max(1, length - len(self.start))
        at = max(1, int(len(self.tokens) * (1 - part)) // size) * size
        return replace(self, tokens=self.tokens[:at]), replace(self, tokens=self.tokens[at:])


def digest(path: Path, option: str = "--calibrate") -> str:
    """SHA-256 of a file.

    Raises:
        UsageError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path}: must be a regular file (it is read twice)")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None


def check_kept(path: Path) -> None:
    """Refuse to replace a file unless it is text that a model generated.

    Raises:
        UsageError: the file is something else.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        first = file.read(1 << 20).partition(b"\n")[0]
    if first and not (first.startswith(b'{"text": ') and b', "tokens": [' in first):
        raise UsageError(
            f"--calibrate-out {path}: exists, and is not text that a model generated",
            hint="Give another file; only the text of an earlier run is replaced.",
        )


def read_text(path: Path, folder: Path, vocabulary: int, option: str = "--calibrate") -> Text:
    """The first `MAX_TOKENS` tokens of a text.

    Args:
        path: UTF-8 text; lines of JSON (``.jsonl``) with a field ``text``, or with the ``tokens``
            that `moescale.calibrate.generated_text.keep_text` writes; or, for a byte-level model,
            any file.
        folder: the checkpoint with the tokeniser.
        vocabulary: number of the model's token ids.
        option: the option to name in errors.

    Raises:
        UsageError: the file is not text, or too short.
        UnsupportedError: the model's tokeniser cannot be used.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES)
    text = _read(data, f"{option} {path}", path.suffix.lower() == ".jsonl", folder, vocabulary)
    if len(text.tokens) < MIN_TOKENS:
        raise UsageError(
            f"{option} {path}: has {len(text.tokens):,} {text.unit}, needs {MIN_TOKENS:,}",
            hint="Give a longer text of the kind that the model is for.",
        )
    return text


def _read(data: bytes, where: str, is_json: bool, folder: Path, vocabulary: int) -> Text:
    whole = len(data) < _MAX_BYTES
    if is_json:
        lines = _json_lines(_decoded(data, where), where, whole)
        if lines and all(isinstance(line.get("tokens"), list) for line in lines):
            return _given_tokens([line["tokens"] for line in lines], where, vocabulary)
        data = "\n\n".join(line["text"] for line in lines).encode()
    tokeniser = tokeniser_of(folder, vocabulary)
    if tokeniser is None:
        return Text(tuple(data[:MAX_TOKENS]), unit="bytes", cut=len(data) > MAX_TOKENS)
    text = _tokenised(_decoded(data, where), tokeniser)
    return text if whole else replace(text, cut=True)


def _json_lines(text: str, where: str, whole: bool) -> list[dict[str, Any]]:
    """The objects of lines of JSON; the last line may be cut if the file has more."""
    lines = text.split("\n")  # not splitlines(): a string may contain U+2028 and the like
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if not whole and number == len(lines):
                break
            raise UsageError(f"{where}: line {number} is not valid JSON") from None
        if not isinstance(value, dict) or type(value.get("text")) is not str:
            raise UsageError(f"{where}: line {number} has no field text")
        if _LONE_SURROGATE.search(value["text"]):
            raise UsageError(
                f"{where}: the text of line {number} has a lone surrogate, not a character",
                hint="Save the text as UTF-8 again, or leave the line out.",
            )
        found.append(value)
    return found


def _given_tokens(rows: Sequence[Any], where: str, vocabulary: int) -> Text:
    for number, row in enumerate(rows, 1):
        good = isinstance(row, list) and all(type(t) is int and 0 <= t < vocabulary for t in row)
        if not good or len(row) != len(rows[0]):
            raise UsageError(
                f"{where}: line {number} has tokens of another model, or another length"
            )
    tokens = tuple(token for row in rows for token in row)[:MAX_TOKENS]
    length = len(rows[0])
    return Text(tokens, length=length if length in _SEQUENCE_LENGTHS else None)


def tokeniser_of(folder: Path, vocabulary: int) -> Any:
    """The model's tokeniser; None if its tokens are bytes.

    Raises:
        UnsupportedError: the tokeniser is missing or cannot be loaded.
    """
    names = [entry.name for entry in folder.iterdir()]
    if any(fnmatch.filter(names, pattern) for pattern in _TOKENISERS):
        return _tokeniser(folder)
    if vocabulary in _BYTE_VOCABULARY:
        return None
    raise UnsupportedError(
        f"no tokeniser files, and a vocabulary of {vocabulary:,} cannot be raw bytes",
        hint="Put the tokeniser's files into the checkpoint; --rule gates needs no text.",
    )


def _tokenised(words: str, tokeniser: Any) -> Text:
    # Without verbose=False it warns about a long text.
    tokens = tokeniser(words, add_special_tokens=False, verbose=False)["input_ids"]
    both: list[int] = tokeniser("a")["input_ids"]
    bare: list[int] = tokeniser("a", add_special_tokens=False)["input_ids"]
    start = both[: _find(bare, both)]
    return Text(tuple(tokens[:MAX_TOKENS]), tuple(start), cut=len(tokens) > MAX_TOKENS)


def overlap(one: Text, other: Text) -> bool:
    """Whether two texts share a passage of 32 tokens, or of 64 bytes."""
    window = 64 if one.unit == "bytes" else 32
    found = {one.tokens[i : i + window] for i in range(len(one.tokens) - window + 1)}
    return any(other.tokens[i : i + window] in found for i in range(len(other.tokens) - window + 1))


def _find(part: list[int], whole: list[int]) -> int:
    """The position of one list in another; 0 if absent."""
    starts = range(len(whole) - len(part) + 1)
    return next((i for i in starts if whole[i : i + len(part)] == part), 0)


def _decoded(data: bytes, where: str) -> str:
    """The text, without a character that the end of the read part cuts in two."""
    whole = len(data) < _MAX_BYTES
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and len(data) - error.start < 4:
            return data[: error.start].decode("utf-8-sig")
        raise UsageError(
            f"{where}: is not UTF-8 text (byte {error.start:,})",
            hint="Only byte-level models without a tokeniser can read other files.",
        ) from None


def _tokeniser(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged tokeniser file makes the library raise anything
        raise UnsupportedError(
            f"the model's tokeniser cannot be loaded: {one_line(error)}",
            hint="Remote code is never run; --rule gates needs no tokeniser.",
        ) from None
