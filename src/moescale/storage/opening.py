"""Opens what is at a location: sources to read from, and destinations to write to."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from moescale.checkpoint.gguf.names import is_beside, is_gguf, part_name, parts_of
from moescale.checkpoint.safetensors.index import SUFFIX as SAFETENSORS
from moescale.errors import DestinationError, SourceError, TemporaryError, UsageError
from moescale.storage.base import Destination, Source, SourceId
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.source import LocalSource
from moescale.storage.location import (
    PREFIX,
    HubRef,
    LocalPath,
    Location,
    is_directory,
    is_file,
)
from moescale.storage.shelf import Shelf


def open_source(
    location: Location, revision: str | None = None, follow_links: bool = True
) -> Source:
    """A checkpoint; see `LocalSource` for its links.

    Raises:
        UsageError: a revision is given twice, or for a directory.
        SourceError: it is neither a directory nor a repo that can be read.
    """
    match location:
        case HubRef():
            return _hub_source(location, revision)
        case LocalPath():
            return _local_source(location, revision, follow_links)


def _local_source(location: LocalPath, revision: str | None, follow_links: bool) -> LocalSource:
    path = location.path
    if revision is not None:
        raise UsageError(f"--revision goes with a repo on the Hub; {location} is a directory")
    if is_gguf(str(location)) and is_file(path):
        return _gguf_source(path, follow_links)
    _check_directory(str(location))
    if (model := _only_gguf(path)) is not None:
        return _gguf_source(model, follow_links)
    return LocalSource(path, follow_links=follow_links)


def _hub_source(ref: HubRef, revision: str | None) -> Source:
    if revision is not None and ref.revision is not None:
        raise UsageError(f"{ref.said} names a revision already; leave --revision out")
    from moescale.storage.hub.source import HubSource

    try:
        repo = HubSource(HubRef(ref.repo, revision or ref.revision, ref.folder))
        return repo.gguf(ref.quant) if ref.quant or repo.is_gguf else repo
    except (SourceError, TemporaryError) as error:
        first = Path(ref.said.partition("/")[0])
        if ref.said.startswith(PREFIX) or not is_directory(first):
            raise
        raise SourceError(f"{_no_directory(ref.said)}; {error.message}", hint=_SAY) from None


def _only_gguf(folder: Path) -> Path | None:
    """The one GGUF model of a folder that holds no other weights; None where it is not so."""
    try:
        names = os.listdir(folder)
    except OSError:  # the source says what is wrong
        return None
    if any(name.endswith(SAFETENSORS) for name in names):
        return None
    models = sorted(name for name in names if is_gguf(name) and not is_beside(name))
    same = bool(models) and parts_of(models[0], models) == models
    return folder / models[0] if same else None


def _gguf_source(path: Path, follow_links: bool) -> LocalSource:
    """A GGUF file; of a split set all files, whichever was given."""
    part = part_name(path.name)
    folder = LocalSource(
        path.parent, follow_links=follow_links, shelf=Shelf(part.stem, part.stem, part.count)
    )
    first = parts_of(path.name, folder.files())[0]
    known = folder.identity
    folder.identity = SourceId("local", str(path.parent / first), known.revision, known.repo, first)
    return folder


_SAY = (
    "Give the directory of a checkpoint, or a repo on the Hub: org/name, hf://org/name@rev,"
    " org/name/folder, or its address."
)


def _check_directory(text: str) -> None:
    """Refuse a path that is no directory, and say what to give instead.

    Raises:
        SourceError: nothing is there, or a file is.
    """
    path = Path(text)
    try:
        if path.is_dir():
            return
        if not path.exists():
            raise SourceError(_no_directory(text), hint=_SAY)
        in_checkpoint = (path.parent / "config.json").is_file()
    except OSError as error:
        raise SourceError(f"{text}: cannot be read: {error.strerror}") from None
    if in_checkpoint:
        raise SourceError(
            f"{text}: is not a directory, but a file of a checkpoint",
            hint=f"Give its folder: moescale {path.parent} DST -k K",
        )
    raise SourceError(f"{text}: is not a directory", hint=_SAY)


def _no_directory(text: str) -> str:
    if os.path.islink(text):
        return f"{text}: is a link to {os.readlink(text)}, which does not exist"
    near = _nearest(Path(text))
    return f"{text}: does not exist" + (f" (did you mean {near}?)" if near else "")


def _nearest(path: Path) -> Path | None:
    """A folder beside the path, or beside the folder above it, whose name is much like it."""
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
    shelf: Shelf | None = None,
) -> Destination:
    """Where an output goes; of a source with a `shelf` also a file.

    Raises:
        UsageError: an option of the Hub is given for a directory, or a file for a directory.
    """
    match location:
        case LocalPath():
            _check_no_dangling_link(location.said)
            if private is not None or create_pr or commit_message is not None:
                options = "--private, --create-pr and --commit-message"
                raise UsageError(f"{options} need hf://, not {location}")
            return _local_destination(location, shelf)
        case HubRef():
            from moescale.storage.hub.destination import HubDestination, HubOptions

            if location.folder or location.quant:
                what = "folder" if location.folder else "part"
                raise UsageError(
                    f"{location.said}: is a {what} of a repo; the output is a repo of its own",
                    hint="Give hf://org/name or hf://org/name@branch.",
                )
            return HubDestination(
                location, HubOptions(private, create_pr, commit_message, overwrite)
            )


def _local_destination(location: LocalPath, shelf: Shelf | None) -> LocalDestination:
    path = location.path
    named = is_gguf(path.name) and not is_directory(path)
    if shelf is None:
        if named:
            raise UsageError(
                f"{location}: is the name of a GGUF file, and the source is none",
                hint="Give a directory; llama.cpp's convert_hf_to_gguf.py makes a GGUF of it.",
            )
        return LocalDestination(path)
    if named:
        own = replace(shelf, stem=part_name(path.name).stem)
        return LocalDestination(path.parent, own, location.said)
    return LocalDestination(path, shelf, location.said)


def _check_no_dangling_link(text: str) -> None:
    if os.path.islink(text) and not os.path.exists(text):
        raise DestinationError(_no_directory(text), hint="Make that folder, or remove the link.")


def check_apart(source: Location, destination: Location, revision: str | None) -> None:
    """Refuse a destination that is the source, or inside it, or around it.

    Raises:
        UsageError: writing there would change the source.
    """
    match source, destination:
        case HubRef(), HubRef():
            branches = (destination.revision or "main", revision or source.revision or "main")
            if destination.repo == source.repo and branches[0] == branches[1]:
                raise UsageError(f"{destination.said}: is the branch that the source is read from")
        case LocalPath(), LocalPath():
            if is_gguf(source.said) and is_file(source.path):
                return  # what it may not be is known with its parts
            one, other = source.path.resolve(), destination.path.resolve()
            if one == other:
                raise UsageError(f"{destination}: source and destination are the same directory")
            if other.is_relative_to(one) or one.is_relative_to(other):
                raise UsageError(f"{destination}: source and destination lie inside one another")


def check_not_source(source: Source, destination: Destination) -> None:
    """Refuse to write onto the branch whose head is the commit that is read.

    Raises:
        UsageError: the source was given as a commit or a tag of that branch.
    """
    if destination.is_at(source.identity):
        raise UsageError(f"{destination.identity}: is the branch that the source is read from")


def check_links(source: Source, destination: Destination) -> None:
    """Refuse a destination that holds the source's file, or what a link of the source leads to.

    Raises:
        UsageError: writing there would change the source.
    """
    if destination.remote:
        return
    if source.shelf and destination.is_at(source.identity):
        raise UsageError(
            f"{destination.identity}: source and destination are the same file",
            hint="Give another name, or another directory.",
        )
    source.files()
    for name, target in source.linked.items():
        if destination.holds(target):
            raise UsageError(
                f"{destination.identity}: holds the file that the source's {name} is a link to",
                hint="Give another destination.",
            )


def check_file(option: str, path: Path, *folders: Path) -> None:
    """Refuse a file that cannot be written to, before hours are spent on what it gets.

    Raises:
        UsageError: it cannot, or lies in one of the folders, which hold checkpoints only.
    """
    for folder in folders:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{option} {path}: lies in {folder}", hint="Give a place outside.")
    try:
        there = path.exists()
        if not path.is_fifo():  # whoever reads that would take it for the end
            path.open("ab").close()
        if not there:
            path.resolve().unlink()
    except OSError as error:
        hint = "Give a file, in a folder that is there and can be written to."
        raise UsageError(f"{option} {path}: {error.strerror}", hint=hint) from None
