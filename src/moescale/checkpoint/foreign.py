"""Recognises other formats, and placeholders for a file, by the first bytes; unpickles nothing."""

from __future__ import annotations

import re

TORCH = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that torch saves."""

TORCH_HEAD = 4 << 20
"""Bytes of a torch file to read: enough for the names of 24,000 tensors, which precede the data."""

GGUF_HEAD = 64 << 10
"""Bytes of a GGUF file to read: enough for the hyperparameters, which precede the vocabulary."""

HEAD = 16
"""Bytes of a file that are enough to recognise its format."""

_TEXT = re.compile(rb"X(?P<long>.[\x00-\x03]\x00\x00)|\x8c(?P<short>.)", re.DOTALL)
"""The opcodes BINUNICODE and SHORT_BINUNICODE, each with the length of the text that follows."""


_POINTER = b"version https://git-lfs"
_TAG = re.compile(rb"\s*<[!?/a-z]", re.IGNORECASE)
"""The start of HTML or XML, such as the error page of a server."""


def placeholder(head: bytes) -> tuple[str, str] | None:
    """What a file is that was stored in place of another, and the remedy; None for other files.

    Args:
        head: its first bytes, at least 8.
    """
    if len(head) >= 8 and _POINTER.startswith(head[: len(_POINTER)]):
        return "is a Git LFS pointer, not the file itself", "Run git lfs pull."
    if _TAG.match(head):
        return "is a web page, not the file itself", "Fetch it again; the repo may be gated."
    return None


def weights_suffix(head: bytes) -> str:
    """The usual suffix of weights whose first bytes are `head`; "" if the format is unknown."""
    kinds = {b"PK\x03\x04": ".pt", b"\x80": ".pt", b"GGUF": ".gguf"}
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return ".safetensors"
    return next((suffix for start, suffix in kinds.items() if head.startswith(start)), "")


def torch_names(head: bytes) -> set[str] | None:
    """All strings in the pickle of a torch file, including tensor names; None for another file.

    Args:
        head: the first `TORCH_HEAD` bytes of a zip that starts with ``data.pkl``, as `torch.save`
            has written it since 1.6, or of a bare pickle.
    """
    zipped = head.startswith(b"PK\x03\x04") and b"data.pkl" in head[:512]
    if not zipped and not head.startswith(b"\x80"):
        return None
    found = set()
    for match in _TEXT.finditer(head):
        size = int.from_bytes(match["long"] or match["short"], "little")
        text = head[match.end() : match.end() + size]
        if text.isascii():
            found.add(text.decode())
    return found


def gguf_has_experts(head: bytes) -> bool | None:
    """Whether the hyperparameters describe an MoE model; None if the file is not GGUF.

    Source: `{arch}.expert_count`, which llama.cpp's converter writes before the tokenizer.
    """
    if not head.startswith(b"GGUF") or len(head) < 24:
        return None
    return b".expert_count" in head
