"""Where a checkpoint is and where the output goes: from what the user says to sources and sinks."""

from __future__ import annotations

from pathlib import Path

from moescale.errors import SourceError, UsageError
from moescale.repos.base import Sink, Source
from moescale.repos.hub import PREFIX, HubPlace, is_repo_id, parse_place
from moescale.repos.local_sink import LocalSink
from moescale.repos.local_source import LocalSource


def open_source(text: str, revision: str | None = None, follow_links: bool = True) -> Source:
    """An existing directory wins over a repo id; see `LocalSource` for its links.

    Raises:
        UsageError: a revision is given twice, or for a directory.
        SourceError: it is neither a directory nor a repo that can be read.
    """
    if not text.strip():
        raise UsageError("SRC is empty", hint="For this directory say a dot.")
    if not _says_hub(text) and (is_directory(text) or not is_repo_id(text)):
        if revision is not None:
            raise UsageError(f"--revision goes with a repo on the Hub; {text} is a directory")
        return LocalSource(Path(text), follow_links=follow_links)
    place = parse_place(text)
    if revision is not None and place.revision is not None:
        raise UsageError(f"{text} names a revision already; leave --revision out")
    from moescale.repos.hub_source import HubSource

    return HubSource(HubPlace(place.repo, revision or place.revision))


def _says_hub(text: str) -> bool:
    """Whether a place starts with ``hf://``; what only begins like it is a slip, no directory."""
    if text.startswith("hf:") and not text.startswith(PREFIX):
        raise UsageError(
            f"{text!r}: a place on the Hub is {PREFIX}org/name",
            hint="For a directory of this name put ./ before it.",
        )
    return text.startswith(PREFIX)


def is_directory(text: str) -> bool:
    """Whether a place is a directory.

    Raises:
        SourceError: the system does not let us look.
    """
    try:
        return Path(text).is_dir()
    except OSError as error:
        raise SourceError(f"{text}: cannot be read: {error.strerror}") from None


def open_sink(
    text: str,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
) -> Sink:
    """A directory, unless the text starts with ``hf://``.

    Raises:
        UsageError: an option of the Hub is given for a directory.
    """
    if not _says_hub(text):
        if private is not None or create_pr or commit_message is not None:
            raise UsageError(f"--private, --create-pr and --commit-message need hf://, not {text}")
        return LocalSink(Path(text))
    from moescale.repos.hub_sink import HubOptions, HubSink

    return HubSink(parse_place(text), HubOptions(private, create_pr, commit_message, overwrite))


def as_source(sink: Sink) -> Source:
    """What was written, for reading."""
    if isinstance(sink, LocalSink):
        return LocalSource(sink.root)
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
    if _says_hub(destination):
        place = parse_place(destination)
        if _says_hub(source) or (not is_directory(source) and is_repo_id(source)):
            other = parse_place(source)
            branches = (place.revision or "main", revision or other.revision or "main")
            if place.repo == other.repo and branches[0] == branches[1]:
                raise UsageError(f"{destination}: is the branch that the source is read from")
        return
    if _says_hub(source):
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
    source.files()
    root = sink.root.resolve()
    for name, target in source.linked.items():
        if target.is_relative_to(root):
            raise UsageError(
                f"{sink.identity}: holds the file that the source's {name} is a link to",
                hint="Give another destination.",
            )
