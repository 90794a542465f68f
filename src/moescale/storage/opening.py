"""Opens sources and destinations at their locations."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from moescale.checkpoint.gguf.names import is_beside, is_gguf, part_name, parts_of
from moescale.checkpoint.safetensors.index import SUFFIX as SAFETENSORS
from moescale.errors import DestinationError, SourceError, TemporaryError, UsageError
from moescale.storage.base import Destination, Source, SourceId
from moescale.storage.gguf_set import GgufSet
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.source import LocalSource
from moescale.storage.location import (
    HubRef,
    LocalPath,
    Location,
    is_directory,
    is_file,
)


def open_source(
    location: Location, revision: str | None = None, follow_links: bool = True
) -> Source:
    """Open a checkpoint; see `LocalSource` for `follow_links`.

    Raises:
        UsageError: the revision is given twice, or for a directory.
        SourceError: the location is neither a readable directory nor a readable repo.
    """
    match location:
        case HubRef():
            return _hub_source(location, revision)
        case LocalPath():
            return _local_source(location, revision, follow_links)


def _local_source(location: LocalPath, revision: str | None, follow_links: bool) -> LocalSource:
    path = location.path
    if revision is not None:
        raise UsageError(f"--revision needs a repo on the Hub; {location} is a directory")
    if is_gguf(str(location)) and is_file(path):
        return _gguf_source(path, follow_links)
    _check_directory(str(location))
    if (model := _single_gguf(path)) is not None:
        return _gguf_source(model, follow_links)
    return LocalSource(path, follow_links=follow_links)


def _hub_source(ref: HubRef, revision: str | None) -> Source:
    if revision is not None and ref.revision is not None:
        raise UsageError(f"{ref.text} already names a revision; leave --revision out")
    from moescale.storage.hub.source import HubSource

    try:
        repo = HubSource(HubRef(ref.repo, revision or ref.revision, ref.folder))
        return repo.gguf(ref.quant) if ref.quant or repo.is_gguf else repo
    except (SourceError, TemporaryError) as error:
        first = Path(ref.text.partition("/")[0])
        if ref.explicit or not is_directory(first):
            raise
        raise SourceError(
            f"{_why_missing(ref.text)}; {error.message}", hint=_SOURCE_FORMS
        ) from None


def _single_gguf(folder: Path) -> Path | None:
    """The only GGUF model of a folder; None if there are several, or other weights."""
    try:
        names = os.listdir(folder)
    except OSError:  # opening the source reports it
        return None
    if any(name.endswith(SAFETENSORS) for name in names):
        return None
    models = sorted(name for name in names if is_gguf(name) and not is_beside(name))
    same = bool(models) and parts_of(models[0], models) == models
    return folder / models[0] if same else None


def _gguf_source(path: Path, follow_links: bool) -> LocalSource:
    """A GGUF file; if it is part of a split set, all files of the set."""
    part = part_name(path.name)
    folder = LocalSource(
        path.parent, follow_links=follow_links, gguf_set=GgufSet(part.stem, part.stem, part.count)
    )
    first = parts_of(path.name, folder.files())[0]
    file, known = path.parent / first, folder.identity
    folder.identity = SourceId(str(file), file, known.revision, known.repo, first)
    return folder


_SOURCE_FORMS = (
    "Give the directory of a checkpoint, or a repo on the Hub: org/name, hf://org/name@rev,"
    " org/name/folder, or its address."
)


def _check_directory(text: str) -> None:
    """Refuse a path that is not a directory, with a hint about what to give instead.

    Raises:
        SourceError: the path does not exist, or is a file.
    """
    path = Path(text)
    try:
        if path.is_dir():
            return
        if not path.exists():
            raise SourceError(_why_missing(text), hint=_SOURCE_FORMS)
        in_checkpoint = (path.parent / "config.json").is_file()
    except OSError as error:
        raise SourceError(f"{text}: cannot be read: {error.strerror}") from None
    if in_checkpoint:
        raise SourceError(
            f"{text}: is a file of a checkpoint, not a directory",
            hint=f"Give its folder: moescale {path.parent} DST -k K",
        )
    raise SourceError(f"{text}: is not a directory", hint=_SOURCE_FORMS)


def _why_missing(text: str) -> str:
    if os.path.islink(text):
        return f"{text}: is a link to {os.readlink(text)}, which does not exist"
    near = _similar_folder(Path(text))
    return f"{text}: does not exist" + (f" (did you mean {near}?)" if near else "")


def _similar_folder(path: Path) -> Path | None:
    """An existing folder with a similar name, next to the path or next to its parent."""
    for level in (path, path.parent):
        if not level.name or not level.parent.is_dir():
            continue
        try:
            names = [entry.name for entry in os.scandir(level.parent) if entry.is_dir()]
        except OSError:
            return None
        by_case = {name.lower(): name for name in names}
        for close in difflib.get_close_matches(level.name.lower(), by_case, 3, 0.75):
            found = level.parent / by_case[close] / path.relative_to(level)
            if found.is_dir():
                return found
    return None


def open_destination(
    location: Location,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    gguf_set: GgufSet | None = None,
) -> Destination:
    """Open a destination; for a source with a `gguf_set` it may be a file.

    Raises:
        UsageError: an option for the Hub is given for a directory, or the destination is a file
            and the source is not GGUF.
    """
    match location:
        case LocalPath():
            if os.path.islink(location.text) and not os.path.exists(location.text):
                hint = "Create that folder, or remove the link."
                raise DestinationError(_why_missing(location.text), hint=hint)
            if private is not None or create_pr or commit_message is not None:
                options = "--private, --create-pr and --commit-message"
                raise UsageError(f"{options} need hf://, not {location}")
            return _local_destination(location, gguf_set)
        case HubRef():
            from moescale.storage.hub.destination import HubDestination, HubOptions

            if location.folder or location.quant:
                what = "folder" if location.folder else "part"
                raise UsageError(
                    f"{location.text}: is a {what} of a repo; the output needs a repo of its own",
                    hint="Give hf://org/name or hf://org/name@branch.",
                )
            return HubDestination(
                location, HubOptions(private, create_pr, commit_message, overwrite)
            )


def _local_destination(location: LocalPath, gguf_set: GgufSet | None) -> LocalDestination:
    path = location.path
    named = is_gguf(path.name) and not is_directory(path)
    if gguf_set is None:
        if named:
            raise UsageError(
                f"{location}: is the name of a GGUF file, but the source is not GGUF",
                hint="Give a directory; llama.cpp's convert_hf_to_gguf.py converts it to GGUF.",
            )
        return LocalDestination(path)
    if named:
        own = replace(gguf_set, stem=part_name(path.name).stem)
        return LocalDestination(path.parent, own, location.text)
    return LocalDestination(path, gguf_set, location.text)


def check_apart(source: Location, destination: Location, revision: str | None) -> None:
    """Refuse a destination that is the source, contains it or lies inside it.

    Raises:
        UsageError: writing to it would change the source.
    """
    match source, destination:
        case HubRef(), HubRef():
            branches = (destination.revision or "main", revision or source.revision or "main")
            if destination.repo == source.repo and branches[0] == branches[1]:
                raise UsageError(f"{destination.text}: is the branch that the source is read from")
        case LocalPath(), LocalPath():
            if is_gguf(source.text) and is_file(source.path):
                return  # `check_links` compares the files of the set
            one, other = source.path.resolve(), destination.path.resolve()
            if one == other:
                raise UsageError(f"{destination}: source and destination are the same directory")
            if other.is_relative_to(one) or one.is_relative_to(other):
                raise UsageError(f"{destination}: one of source and destination contains the other")


def check_not_source(source: Source, destination: Destination) -> None:
    """Refuse to write to the branch whose head is the source's commit.

    Raises:
        UsageError: the source was given as a commit or a tag of that branch.
    """
    if destination.is_same_as(source.identity):
        raise UsageError(f"{destination.identity}: is the branch that the source is read from")


def check_links(source: Source, destination: Destination) -> None:
    """Refuse a destination that holds a file of the source, or the target of one of its links.

    Raises:
        UsageError: writing to it would change the source.
    """
    if destination.remote:
        return
    if source.gguf_set and destination.is_same_as(source.identity):
        raise UsageError(
            f"{destination.identity}: source and destination are the same file",
            hint="Give another name, or another directory.",
        )
    source.files()
    for name, target in source.links.items():
        if destination.holds(target):
            raise UsageError(
                f"{destination.identity}: holds the target of {name}, a link in the source",
                hint="Give another destination.",
            )


def check_output_file(option: str, path: Path, *folders: Path) -> None:
    """Refuse a file that cannot be written, before hours are spent on its content.

    Raises:
        UsageError: it cannot be written, or lies in one of the folders, which are checkpoints.
    """
    for folder in folders:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{option} {path}: lies in {folder}", hint="Give a path outside it.")
    try:
        existed = path.exists()
        if not path.is_fifo():  # closing it would signal end of file
            path.open("ab").close()
        if not existed:
            path.resolve().unlink()
    except OSError as error:
        hint = "Give a file in an existing, writable folder."
        raise UsageError(f"{option} {path}: {error.strerror}", hint=hint) from None
