"""Parses the location of a source or a destination, once: a local path or a Hub repo."""

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
    """A path on this machine, which need not exist.

    Attributes:
        text: the path as the user wrote it.
        kind: the kind of location, for messages.
        on_hub: whether it is a repo.
        revision: None; a directory has none.
    """

    text: str
    kind: ClassVar[str] = "local"
    on_hub: ClassVar[bool] = False
    revision: ClassVar[None] = None

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> Path:
        """The path."""
        return Path(self.text)

    @property
    def model_id(self) -> str:
        """The argument for ``from_pretrained`` and engines: the path."""
        return self.text


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repo on the Hub, or part of one.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the default branch.
        folder: a folder in the repo, or a GGUF file.
        quant: a GGUF model of the repo, by part of its file name.
        text: the reference as the user wrote it.
        path: None; nothing of it is on this machine.
        kind: the kind of location, for messages.
        on_hub: whether it is a repo.
    """

    repo: str
    revision: str | None = None
    folder: str = ""
    quant: str = ""
    text: str = field(default="", compare=False)
    path: ClassVar[None] = None
    kind: ClassVar[str] = "Hub"
    on_hub: ClassVar[bool] = True

    @property
    def explicit(self) -> bool:
        """Whether the user wrote ``hf://``, which excludes a directory."""
        return self.text.startswith(PREFIX)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{PREFIX}{self.repo}{revision}{folder}" + (f":{self.quant}" if self.quant else "")

    @property
    def model_id(self) -> str:
        """The argument for ``from_pretrained`` and engines, without the revision."""
        return f"{self.repo}/{self.folder}" if self.folder else self.repo

    def interpretations(self) -> Iterator[HubRef]:
        """All possible meanings: the end of a revision with slashes may be a folder."""
        yield self
        parts = [] if self.folder else (self.revision or "").split("/")
        for stop in range(len(parts) - 1, 0, -1):
            yield HubRef(self.repo, "/".join(parts[:stop]), "/".join(parts[stop:]), self.quant)


def parse_ref(text: str) -> HubRef:
    """``hf://org/name[/folder]``, ``hf://org/name@revision[/folder]``, or these without ``hf://``.

    A folder may be a GGUF file; ``:QUANT`` at the end names a GGUF model of the repo. Only the Hub
    knows where the revision ends and the folder begins; see `HubRef.interpretations`.

    Raises:
        UsageError: the text has none of these forms.
    """
    path, colon, quant = text.removeprefix(PREFIX).partition(":")
    path, at, revision = path.partition("@")
    org, _, rest = path.rstrip("/").partition("/")
    name, _, folder = rest.partition("/")
    plain = all(part not in ("", ".", "..") for part in folder.split("/")) or not folder
    named = _QUANT.fullmatch(quant) or not colon
    if not is_repo_id(f"{org}/{name}") or not plain or (at and not revision) or not named:
        raise UsageError(
            f"{text!r} is not a Hub repo: hf://org/name or hf://org/name@revision, optionally"
            " followed by /folder or :QUANT"
        )
    return HubRef(f"{org}/{name}", revision.rstrip("/") or None, folder, quant, text)


_QUANT = re.compile(r"[\w.-]+", re.ASCII)


def is_ref(text: str) -> bool:
    """Whether `text` has the form of a Hub repo."""
    try:
        parse_ref(text)
    except UsageError:
        return False
    return True


def ref_from_url(text: str) -> str | None:
    """The reference to the model at a web address; None if the text is not a web address.

    Raises:
        UsageError: the address does not lead to a model.
    """
    match = _URL.fullmatch(text)
    if match is None or not (match["scheme"] or match["host"].lower() in _HOSTS):
        return None
    if match["host"].lower() not in _HOSTS | {_endpoint_host()}:
        raise UsageError(
            f"{text}: is not an address of the Hub",
            hint="Give a directory, or a repo on the Hub as org/name.",
        )
    parts = unquote(match["path"]).strip("/").split("/")
    (org, name, page), rest = [*parts, "", ""][:3], parts[3:]
    ref = f"{PREFIX}{org}/{name.removesuffix('.git')}"
    if org in _NOT_MODELS or not is_ref(ref) or page not in _PAGES:
        hint = f"Give {ref}." if is_ref(ref) else "Give a model: org/name, or its address."
        raise UsageError(f"{text}: is not the address of a model or its files", hint=hint)
    file = page in _FILES and bool(rest) and is_gguf(rest[-1])
    revision = "/".join(rest if file else rest[: _PAGES[page]])
    return ref + (f"@{revision}" if revision else "")


def _endpoint_host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.lower()


_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_URL = re.compile(
    r"(?P<scheme>https?:/{1,2})?(?P<host>[\w.-]+(?::\d+)?)/(?P<path>[^?#]*)(?:[?#].*)?",
    re.ASCII | re.IGNORECASE,
)
_NOT_MODELS = frozenset({"datasets", "spaces", "collections", "papers", "docs", "blog", "api"})
_FILES = ("blob", "resolve", "raw")
_PAGES: Mapping[str, int | None] = {
    "": 0,
    "tree": None,
    "commit": 1,
    **dict.fromkeys(_FILES, -1),
}
"""Pages of a repo: how many of the following parts of the address are revision and folder."""


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form ``org/name``."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


Location = LocalPath | HubRef


def source_location(given: str | os.PathLike[str]) -> Location:
    """The location of a source: a path wins over a repo if it, or its first folder, exists.

    Raises:
        UsageError: the text is empty, or the address does not lead to a model.
    """
    text = _nonempty_text(given, "SRC")
    if _is_hub_uri(text):
        return parse_ref(text)
    if os.path.lexists(text):
        return LocalPath(text)
    text = ref_from_url(text) or text
    if not is_ref(text):
        return LocalPath(text)
    ref = parse_ref(text)
    return LocalPath(text) if ref.folder and _is_in_folder(ref) else ref


def _is_in_folder(ref: HubRef) -> bool:
    return not _is_hub_uri(ref.text) and is_directory(Path(ref.text.partition("/")[0]))


def destination_location(given: str | os.PathLike[str]) -> Location:
    """The location of an output: a path, unless it starts with ``hf://``.

    Raises:
        UsageError: the text is empty, or a web address.
    """
    text = _nonempty_text(given, "DST")
    if _is_hub_uri(text):
        return parse_ref(text)
    if not os.path.lexists(text) and (ref := ref_from_url(text)):
        raise UsageError(f"{text}: is an address", hint=f"To upload there, give {ref}.")
    return LocalPath(text)


def _nonempty_text(given: str | os.PathLike[str], name: str) -> str:
    text = expand_user(given)
    if not text.strip():
        raise UsageError(f"{name} is empty", hint="A dot means the current directory.")
    return text


def expand_user(path: str | os.PathLike[str]) -> str:
    """A path with the user's home in place of ``~``, which not every shell expands."""
    return os.path.expanduser(os.fspath(path))


def _is_hub_uri(text: str) -> bool:
    """Whether a text starts with ``hf://``; any other ``hf:`` is a typing error."""
    if text.startswith("hf:") and not text.startswith(PREFIX):
        raise UsageError(
            f"{text!r}: a repo on the Hub is {PREFIX}org/name",
            hint="For a directory of this name, put ./ before it.",
        )
    return text.startswith(PREFIX)


def remarks_on(destination: Location) -> tuple[str, ...]:
    """A remark on a local destination that looks like a repo."""
    text = str(destination)
    if destination.path is None or not is_ref(text) or parse_ref(text).folder:
        return ()
    if os.path.lexists(text.partition("/")[0]):
        return ()
    what = "file" if text.endswith(".gguf") else "folder"
    return (f"{text} is a local {what}, not a repo; to upload, give {PREFIX}{text}",)


def is_file(path: Path) -> bool:
    """Whether the path is a file.

    Raises:
        SourceError: the system denies access.
    """
    return _query(path, Path.is_file)


def is_directory(path: Path) -> bool:
    """Whether the path is a directory.

    Raises:
        SourceError: the system denies access.
    """
    return _query(path, Path.is_dir)


def _query(path: Path, question: Callable[[Path], bool]) -> bool:
    try:
        return question(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
