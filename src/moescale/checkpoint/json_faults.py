"""Describes faults in JSON text: where they are, their usual cause, and how to fix them."""

from __future__ import annotations

import codecs
import json
import re

from moescale.checkpoint.foreign import placeholder
from moescale.errors import CheckpointError

SAVE = "Save it as UTF-8 without a BOM."
_MEND = "Fix it in a text editor; loaders cannot read the file either."
_CUT = "The file is truncated; fetch it again."

_CAUSES = (
    (r"\{?.?(//|/\*|#)", "a comment, which JSON does not have"),
    (r".,[}\]]|,[}\]]", "a comma before the closing bracket"),
    (r"..?'", "a string in single quotes; JSON uses double quotes"),
    (r":[,}]", "a value is missing"),
    (r"..?(True|False|None)\b", "JSON writes true, false and null"),
    (r"[^,{\[:]\"", "a comma is missing before this string"),
)
"""Usual causes, by a pattern of the last character before the fault and the text after it."""


class JsonError(ValueError):
    """A fault in JSON text, in one line; `hint` says how to fix it."""

    def __init__(self, message: str, hint: str = _MEND) -> None:
        super().__init__(message)
        self.hint = hint


def decoded(data: bytes) -> str:
    """The text of a JSON file.

    Raises:
        JsonError: it is not UTF-8, starts with a byte-order mark, or is not the file itself.
    """
    if found := placeholder(data.lstrip()[:64]):
        raise JsonError(*found)
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise JsonError(f"it starts with a byte-order mark ({name})", SAVE)
    if data[:1] == b"\0" or data[1:2] == b"\0":
        raise JsonError("it is UTF-16, not UTF-8", SAVE)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        byte = data[error.start]
        raise JsonError(
            f"line {line}, column {column}: the byte 0x{byte:02x} is not UTF-8", SAVE
        ) from None


_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def fault_in(text: str, error: json.JSONDecodeError) -> JsonError:
    """The fault that Python's parser found, with its usual cause."""
    if not text.strip():
        return JsonError("it is empty", _CUT)
    where = f"line {error.lineno}, column {error.colno}"
    rest = text[error.pos : error.pos + 200].lstrip()
    if not rest or error.msg.startswith("Unterminated"):
        return JsonError(f"{where}: the text ends early", _CUT)
    before = text[max(0, error.pos - 200) : error.pos].rstrip()[-1:]
    near = before + rest[0] + rest[1:].lstrip() if before else f" {rest}"
    cause = next((cause for pattern, cause in _CAUSES if re.match(pattern, near)), None)
    return JsonError(f"{where}: {cause or error.msg}")


def not_json(where: str, error: ValueError) -> CheckpointError:
    """The error for a file that is not JSON."""
    hint = error.hint if isinstance(error, JsonError) else None
    what = str(error) if str(error).startswith("is ") else f"is not valid JSON: {error}"
    return CheckpointError(f"{where}: {what}", hint=hint)
