"""Where a checkpoint is and where the output goes, parsed once from what the user says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from moescale.checkpoint.gguf.names import is_gguf
from moescale.errors import SourceError, UsageError

PREFIX = "hf://"

_REPO_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A path on this machine, which need not exist."""

    said: str

    def __str__(self) -> str:
        return self.said

    @property
    def path(self) -> Path:
        """The path."""
        return Path(self.said)


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repo on the Hub, a revision of it, None for the default, and a folder or GGUF file in it.

    `quant` names one of its GGUF models instead, by a part of the file's name; `said` is what the
    user wrote.
    """

    repo: str
    revision: str | None = None
    folder: str = ""
    quant: str = ""
    said: str = field(default="", compare=False)
    path: ClassVar[None] = None  # nothing of it is on this machine

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{PREFIX}{self.repo}{revision}{folder}" + (f":{self.quant}" if self.quant else "")

    def readings(self) -> Iterator[HubRef]:
        """What may be meant: of a revision with slashes, the end may be a folder."""
        yield self
        parts = [] if self.folder else (self.revision or "").split("/")
        for stop in range(len(parts) - 1, 0, -1):
            yield HubRef(self.repo, "/".join(parts[:stop]), "/".join(parts[stop:]), self.quant)


def parse_ref(text: str) -> HubRef:
    """``hf://org/name[/folder]``, ``hf://org/name@revision[/folder]``, or these without ``hf://``.

    A folder may be a GGUF file; ``:QUANT`` at the end names a GGUF model of the repo.

    Where the revision ends and the folder begins, only the Hub knows; see `HubRef.readings`.

    Raises:
        UsageError: it is none of these.
    """
    path, colon, quant = text.removeprefix(PREFIX).partition(":")
    path, at, revision = path.partition("@")
    org, _, rest = path.rstrip("/").partition("/")
    name, _, folder = rest.partition("/")
    plain = all(part not in ("", ".", "..") for part in folder.split("/")) or not folder
    named = _QUANT.fullmatch(quant) or not colon
    if not is_repo_id(f"{org}/{name}") or not plain or (at and not revision) or not named:
        raise UsageError(
            f"{text!r} is not a Hub repo: hf://org/name, hf://org/name@revision, and /folder or"
            " :QUANT behind"
        )
    return HubRef(f"{org}/{name}", revision.rstrip("/") or None, folder, quant, text)


_QUANT = re.compile(r"[\w.-]+", re.ASCII)


def is_ref(text: str) -> bool:
    """Whether `text` is written as a place on the Hub."""
    try:
        parse_ref(text)
    except UsageError:
        return False
    return True


def from_address(text: str) -> str | None:
    """The place of a model that a web address shows; None for what is no web address.

    Raises:
        UsageError: it is the address of something else.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not (match["scheme"] or match["host"].lower() in _HOSTS):
        return None
    if match["host"].lower() not in _HOSTS | {_own_host()}:
        raise UsageError(
            f"{text}: is no address of the Hub",
            hint="Give a directory, or a repo on the Hub as org/name.",
        )
    parts = unquote(match["path"]).strip("/").split("/")
    (org, name, page), rest = [*parts, "", ""][:3], parts[3:]
    place = f"{PREFIX}{org}/{name.removesuffix('.git')}"
    if org in _NO_MODELS or not is_ref(place) or page not in _PAGES:
        hint = "Give a model: org/name, or its address." if not is_ref(place) else f"Say {place}."
        raise UsageError(f"{text}: is no address of a model or its files", hint=hint)
    file = page in _FILES and bool(rest) and is_gguf(rest[-1])
    revision = "/".join(rest if file else rest[: _PAGES[page]])
    return place + (f"@{revision}" if revision else "")


def _own_host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.lower()


_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_ADDRESS = re.compile(
    r"(?P<scheme>https?:/{1,2})?(?P<host>[\w.-]+(?::\d+)?)/(?P<path>[^?#]*)(?:[?#].*)?",
    re.ASCII | re.IGNORECASE,
)
_NO_MODELS = frozenset({"datasets", "spaces", "collections", "papers", "docs", "blog", "api"})
_FILES = ("blob", "resolve", "raw")
_PAGES: Mapping[str, int | None] = {
    "": 0,
    "tree": None,
    "commit": 1,
    **dict.fromkeys(_FILES, -1),
}
"""Pages of a repo: how much of what follows in the address is a revision and a folder."""


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form ``org/name``."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


Location = LocalPath | HubRef


def source_location(said: str | os.PathLike[str]) -> Location:
    """Where a source is: an existing path wins over a repo, and so does one in a folder that is.

    Raises:
        UsageError: it is empty, or the address of something else.
    """
    text = _text(said, "SRC")
    if _says_hub(text):
        return parse_ref(text)
    if os.path.lexists(text):
        return LocalPath(text)
    text = from_address(text) or text
    if not is_ref(text):
        return LocalPath(text)
    ref = parse_ref(text)
    return LocalPath(text) if ref.folder and _is_in_folder(ref) else ref


def _is_in_folder(ref: HubRef) -> bool:
    return not _says_hub(ref.said) and is_directory(Path(ref.said.partition("/")[0]))


def destination_location(said: str | os.PathLike[str]) -> Location:
    """Where an output goes: to a path, since only ``hf://`` uploads.

    Raises:
        UsageError: it is empty, or an address.
    """
    text = _text(said, "DST")
    if _says_hub(text):
        return parse_ref(text)
    if not os.path.lexists(text) and (ref := from_address(text)):
        raise UsageError(f"{text}: is an address", hint=f"To upload there say {ref}.")
    return LocalPath(text)


def _text(said: str | os.PathLike[str], name: str) -> str:
    text = expanded(said)
    if not text.strip():
        raise UsageError(f"{name} is empty", hint="For this directory say a dot.")
    return text


def expanded(path: str | os.PathLike[str]) -> str:
    """A path with the user's home in place of ``~``, which not every shell expands."""
    return os.path.expanduser(os.fspath(path))


def _says_hub(text: str) -> bool:
    """Whether a text starts with ``hf://``; what only begins like it is a slip, no directory."""
    if text.startswith("hf:") and not text.startswith(PREFIX):
        raise UsageError(
            f"{text!r}: a place on the Hub is {PREFIX}org/name",
            hint="For a directory of this name put ./ before it.",
        )
    return text.startswith(PREFIX)


def remarks_on(destination: Location) -> tuple[str, ...]:
    """What the user should know of a folder here that looks like a repo."""
    text = str(destination)
    if destination.path is None or not is_ref(text) or parse_ref(text).folder:
        return ()
    if os.path.lexists(text.partition("/")[0]):
        return ()
    what = "file" if text.endswith(".gguf") else "folder"
    return (f"{text} is a {what} here, not a repo; to upload, say {PREFIX}{text}",)


def is_file(path: Path) -> bool:
    """Whether it is a file.

    Raises:
        SourceError: the system does not let us look.
    """
    return _asked(path, Path.is_file)


def is_directory(path: Path) -> bool:
    """Whether it is a directory.

    Raises:
        SourceError: the system does not let us look.
    """
    return _asked(path, Path.is_dir)


def _asked(path: Path, question: Callable[[Path], bool]) -> bool:
    try:
        return question(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
