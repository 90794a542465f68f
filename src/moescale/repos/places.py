"""Where a checkpoint is and where the output goes: from what the user says to sources and sinks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moescale.checkpoint.gguf.names import is_beside, is_gguf, part_name, parts_of
from moescale.checkpoint.index import SUFFIX as SAFETENSORS
from moescale.errors import DestinationError, SourceError, TemporaryError, UsageError
from moescale.repos.base import Sink, Source, SourceId
from moescale.repos.hub import PREFIX, HubPlace, from_address, is_place, parse_place
from moescale.repos.local_sink import LocalSink
from moescale.repos.local_source import LocalSource
from moescale.repos.shelf import Shelf


def expanded(path: str | os.PathLike[str]) -> str:
    """A path with the user's home in place of ``~``, which not every shell expands."""
    return os.path.expanduser(os.fspath(path))


def source_place(path: str | os.PathLike[str]) -> str:
    """What the user calls a source: an existing path, or else a place on the Hub or its address.

    Raises:
        UsageError: it is the address of something else.
    """
    text = expanded(path)
    return text if os.path.lexists(text) else from_address(text) or text


def destination_place(path: str | os.PathLike[str]) -> str:
    """What the user calls a destination; an address is none, since only ``hf://`` uploads.

    Raises:
        UsageError: it is an address.
    """
    text = expanded(path)
    if not os.path.lexists(text) and (place := from_address(text)):
        raise UsageError(f"{text}: is an address", hint=f"To upload there say {place}.")
    return text


def on_destination(text: str) -> tuple[str, ...]:
    """What the user should know of a destination that looks like a repo: it is a folder here."""
    if says_hub(text) or not is_place(text) or parse_place(text).folder:
        return ()
    if os.path.lexists(text.partition("/")[0]):
        return ()
    return (f"{text} is a folder here, not a repo; to upload, say {PREFIX}{text}",)


def open_source(
    path: str | os.PathLike[str], revision: str | None = None, follow_links: bool = True
) -> Source:
    """An existing path wins over a repo; see `LocalSource` for its links.

    Raises:
        UsageError: a revision is given twice, or for a directory.
        SourceError: it is neither a directory nor a repo that can be read.
    """
    text = source_place(path)
    if not text.strip():
        raise UsageError("SRC is empty", hint="For this directory say a dot.")
    if not _is_on_hub(text):
        if revision is not None:
            raise UsageError(f"--revision goes with a repo on the Hub; {text} is a directory")
        if is_gguf(text) and is_file(text):
            return _gguf_source(Path(text), follow_links)
        _check_directory(text)
        if (model := _only_gguf(Path(text))) is not None:
            return _gguf_source(model, follow_links)
        return LocalSource(Path(text), follow_links=follow_links)
    place = parse_place(text)
    if revision is not None and place.revision is not None:
        raise UsageError(f"{text} names a revision already; leave --revision out")
    from moescale.repos.hub_source import HubSource

    try:
        repo = HubSource(HubPlace(place.repo, revision or place.revision, place.folder))
        return repo.gguf(place.quant) if place.quant or repo.is_gguf else repo
    except (SourceError, TemporaryError) as error:
        if says_hub(text) or not Path(text).parts[0] or not is_directory(Path(text).parts[0]):
            raise
        raise SourceError(f"{_no_directory(text)}; {error.message}", hint=_SAY) from None


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


def _is_on_hub(text: str) -> bool:
    """Whether a source is a repo; a path that is there is none, nor one in a folder that is."""
    if says_hub(text):
        return True
    if os.path.lexists(text) or not is_place(text):
        return False
    return not (parse_place(text).folder and is_directory(text.partition("/")[0]))


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


def says_hub(text: str) -> bool:
    """Whether a place starts with ``hf://``; what only begins like it is a slip, no directory."""
    if text.startswith("hf:") and not text.startswith(PREFIX):
        raise UsageError(
            f"{text!r}: a place on the Hub is {PREFIX}org/name",
            hint="For a directory of this name put ./ before it.",
        )
    return text.startswith(PREFIX)


def is_file(text: str) -> bool:
    """Whether a place is a file.

    Raises:
        SourceError: the system does not let us look.
    """
    return _asked(text, Path.is_file)


def is_directory(text: str) -> bool:
    """Whether a place is a directory.

    Raises:
        SourceError: the system does not let us look.
    """
    return _asked(text, Path.is_dir)


def _asked(text: str, question: Callable[[Path], bool]) -> bool:
    try:
        return question(Path(text))
    except OSError as error:
        raise SourceError(f"{text}: cannot be read: {error.strerror}") from None


def open_sink(
    text: str,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    shelf: Shelf | None = None,
) -> Sink:
    """A directory, unless the text starts with ``hf://``; of a source with a `shelf` also a file.

    Raises:
        UsageError: an option of the Hub is given for a directory, or a file for a directory.
    """
    if not says_hub(text):
        _check_no_dangling_link(text)
        if private is not None or create_pr or commit_message is not None:
            raise UsageError(f"--private, --create-pr and --commit-message need hf://, not {text}")
        return _local_sink(text, shelf)
    from moescale.repos.hub_sink import HubOptions, HubSink

    place = parse_place(text)
    if place.folder or place.quant:
        what = "folder" if place.folder else "part"
        raise UsageError(
            f"{text}: is a {what} of a repo; the output is a repo of its own",
            hint="Give hf://org/name or hf://org/name@branch.",
        )
    return HubSink(place, HubOptions(private, create_pr, commit_message, overwrite))


def _local_sink(text: str, shelf: Shelf | None) -> LocalSink:
    path = Path(text)
    named = is_gguf(path.name) and not is_directory(text)
    if shelf is None:
        if named:
            raise UsageError(
                f"{text}: is the name of a GGUF file, and the source is none",
                hint="Give a directory; llama.cpp's convert_hf_to_gguf.py makes a GGUF of it.",
            )
        return LocalSink(path)
    if named:
        return LocalSink(path.parent, replace(shelf, stem=part_name(path.name).stem), text)
    return LocalSink(path, shelf, text)


def _check_no_dangling_link(text: str) -> None:
    if os.path.islink(text) and not os.path.exists(text):
        raise DestinationError(_no_directory(text), hint="Make that folder, or remove the link.")


def as_source(sink: Sink) -> Source:
    """What was written, for reading."""
    if isinstance(sink, LocalSink):
        return LocalSource(sink.root, follow_links=False, links_of_shards=False, shelf=sink.shelf)
    from moescale.repos.hub_sink import HubSink
    from moescale.repos.hub_source import HubSource

    assert isinstance(sink, HubSink)
    return HubSource(HubPlace(sink.place.repo, sink.published or sink.branch))


def check_places(source: str, destination: str, revision: str | None) -> None:
    """Refuse a destination that is the source, or inside it, or around it.

    Raises:
        UsageError: writing there would change the source.
    """
    for name, text in (("SRC", source), ("DST", destination)):
        if not text.strip():
            raise UsageError(f"{name} is empty", hint="For this directory say a dot.")
    if says_hub(destination):
        place = parse_place(destination)
        if _is_on_hub(source):
            other = parse_place(source)
            branches = (place.revision or "main", revision or other.revision or "main")
            if place.repo == other.repo and branches[0] == branches[1]:
                raise UsageError(f"{destination}: is the branch that the source is read from")
        return
    if _is_on_hub(source):
        return
    if is_gguf(source) and is_file(source):  # what it may not be is known with its parts
        return
    one, other_folder = Path(source).resolve(), Path(destination).resolve()
    if one == other_folder:
        raise UsageError(f"{destination}: source and destination are the same directory")
    if other_folder.is_relative_to(one) or one.is_relative_to(other_folder):
        raise UsageError(f"{destination}: source and destination lie inside one another")


def check_not_source(source: Source, sink: Sink) -> None:
    """Refuse to write onto the branch whose head is the commit that is read.

    Raises:
        UsageError: the source was given as a commit or a tag of that branch.
    """
    if sink.is_at(source.identity):
        raise UsageError(f"{sink.identity}: is the branch that the source is read from")


def check_links(source: Source, sink: Sink) -> None:
    """Refuse a destination that holds what a link of the source leads to.

    Raises:
        UsageError: writing there would change the source.
    """
    if not (isinstance(source, LocalSource) and isinstance(sink, LocalSink)):
        return
    if source.shelf and sink.is_at(source.identity):
        raise UsageError(
            f"{sink.identity}: source and destination are the same file",
            hint="Give another name, or another directory.",
        )
    source.files()
    for name, target in source.linked.items():
        if sink.holds(target):
            raise UsageError(
                f"{sink.identity}: holds the file that the source's {name} is a link to",
                hint="Give another destination.",
            )
