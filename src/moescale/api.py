"""The same as the command, from Python: `plan`, `convert`, `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescale.errors import DestinationError, SourceError, UsageError
from moescale.measuring.calibration import Calibration, measured_plan, open_calibration
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.files import PROVENANCE
from moescale.planning.plan import Plan
from moescale.repos.base import Progress, Sink, Source
from moescale.repos.hub import HubPlace, is_repo_id, parse_place
from moescale.repos.local_sink import LocalSink
from moescale.repos.local_source import LocalSource
from moescale.running.conversion import Status, fill_digests, run, status_of
from moescale.running.parallel import Crew
from moescale.running.verification import verify as compare

if TYPE_CHECKING:
    from moescale.running.cluster import Workers


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run.

    Attributes:
        plan: what was to be done.
        status: ``new``, ``resume``, ``replace``, or ``done`` if there was nothing left to do.
        verified: the output was read again and compared.
        url: where the output can be looked at, if it is on the Hub.
        remarks: what else there is to know.
    """

    plan: Plan
    status: Status
    verified: bool
    url: str | None = None
    remarks: tuple[str, ...] = ()


def plan(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    calibrate: str | Path | None = None,
    max_memory: str | int | None = None,
    measuring: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Plan:
    """Decide what a conversion would do; reads the config, the index and the shard headers.

    What `convert` would refuse at a local destination is a warning of the plan; a destination on
    the Hub is not looked at.

    Args:
        source: a directory, ``org/name``, or ``hf://org/name[@revision]``.
        destination: a directory or ``hf://org/name[@branch]``.
        revision: of a source that is given as ``org/name``.
        overwrite: as for `convert`.
        private: as for `convert`.
        create_pr: as for `convert`.
        commit_message: as for `convert`.
        calibrate: the text for the rule ``measured``, which is run for it.
        max_memory: of main memory for weights then, such as ``8GiB``; the rest lies on disk.
        measuring: called with the number of tokens done and in all.
        options: the other fields of `Options`.

    Raises:
        UsageError: an option is wrong by itself.
        SourceError: the checkpoint cannot be rescaled so.
    """
    calibration = _calibration(calibrate, max_memory, measuring)
    wanted = _options(options, calibration)
    if destination is None:
        return _made(open_source(str(source), revision), wanted, None, calibration)
    check_places(str(source), str(destination), revision)
    sink = open_sink(str(destination), private, create_pr, commit_message, overwrite)
    reader = open_source(str(source), revision)
    try:
        beside = sink if isinstance(sink, LocalSink) else None
        made = _made(reader, wanted, str(destination), calibration, beside, overwrite)
    except DestinationError:  # a run would be refused, but a dry run shows what it would do
        made = _made(reader, wanted, str(destination), calibration)
    try:
        if isinstance(sink, LocalSink):
            _check_status(status_of(made, reader, sink, overwrite), str(destination))
            sink.check_writable()
    except DestinationError as error:
        refusal = f"a run would be refused: {error}".replace("\n", " ")
        return replace(made, warnings=(*made.warnings, refusal))
    return _with_room(made, sink)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dask: str | Path | None = None,
    progress: Progress = lambda name, size: None,
    planned: Callable[[Plan], None] = lambda plan: None,
    calibrate: str | Path | None = None,
    max_memory: str | int | None = None,
    measuring: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Result:
    """Rescale a checkpoint; continues an interrupted run of the same job.

    Args:
        source: a directory, ``org/name``, or ``hf://org/name[@revision]``.
        destination: a directory or ``hf://org/name[@branch]``; nothing in it loads before
            everything is there.
        revision: of a source that is given as ``org/name``.
        jobs: shards at once; by default the number of cores, at most 8, and 2 to the Hub; on a
            cluster what its workers can do.
        overwrite: replace a destination that holds something else.
        check: afterwards read source and output again and prove the output.
        private: whether a repo that has to be made is private; None for the Hub's default.
        create_pr: open a pull request instead of changing the branch.
        commit_message: of the commit that brings the output.
        dask: address or file of a Dask scheduler, whose workers rewrite the shards. They need this
            version of moescale, and places that they can reach.
        progress: called with a file's name and a number of bytes, from several threads.
        planned: called with the plan before anything is written.
        calibrate: the text for the rule ``measured``, which is run for it, unless the destination
            has the factors of this very job.
        max_memory: of main memory for weights then, such as ``8GiB``; the rest lies on disk.
        measuring: called with the number of tokens done and in all.
        options: the other fields of `Options`.

    Raises:
        MoescaleError: see `moescale.errors`; a rerun resumes wherever it can.
    """
    calibration = _calibration(calibrate, max_memory, measuring)
    wanted = _options(options, calibration)
    check_places(str(source), str(destination), revision)
    sink = open_sink(str(destination), private, create_pr, commit_message, overwrite)
    with _crew(dask) as crew:
        reader = open_source(str(source), revision)
        _check_not_source(reader, sink)
        made = _made(reader, wanted, str(destination), calibration, sink, overwrite)
        plan = _with_room(made, sink)
        planned(plan)
        if jobs is None:
            jobs = default_jobs(sink) if crew is None else crew.size()
        outcome = run(
            plan, reader, sink, jobs=jobs, overwrite=overwrite, progress=progress, crew=crew
        )
        if not check:
            _check_status(outcome.status, str(destination))
        else:
            verify_output(plan, reader, sink, jobs, progress, crew)
    received = [f"{reader.received:,} bytes received"] if reader.received else []
    return Result(plan, outcome.status, check, sink.url, (*received, *sink.remarks))


@contextmanager
def _crew(dask: str | Path | None) -> Iterator[Workers | None]:
    """The workers of a cluster, None for the threads of this process."""
    if dask is None:
        yield None
        return
    try:
        from moescale.running.cluster import connect
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--dask needs {error.name}, which is not installed",
            hint="pip install 'moescale[dask]'",
        ) from None
    with connect(str(dask)) as workers:
        yield workers


def _check_status(status: Status, destination: str) -> None:
    """Refuse an output of this job that is no longer sure to be what it says.

    Raises:
        DestinationError: source or output were changed since.
    """
    if status == "stale":
        raise DestinationError(
            f"{destination}: is an output of this job, but the source is younger than it",
            hint="--verify proves whether it is still right; --overwrite does it again.",
        )
    if status == "changed":
        raise DestinationError(
            f"{destination}: is an output of this job, but was changed since",
            hint="--verify says where; --overwrite does it again.",
        )


def _with_room(plan: Plan, sink: Sink) -> Plan:
    """The plan, with a warning where the disk has less room than the output needs.

    It is no refusal: where blocks can be shared with the source, a copy needs no room.
    """
    if not isinstance(sink, LocalSink):
        return plan
    try:
        missing = plan.bytes_written - sink.room()
    except OSError:  # a file system that does not tell, or a place that the run will refuse
        return plan
    if missing <= 0:
        return plan
    warning = (
        f"{sink.identity}: the disk has {missing:,} bytes less than the output needs, which is"
        " enough only where it can share blocks with the source"
    )
    return replace(plan, warnings=(*plan.warnings, warning))


def verify(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    jobs: int | None = None,
    calibrate: str | Path | None = None,
    max_memory: str | int | None = None,
    **options: Any,
) -> Result:
    """Prove that `destination` is what `convert` with the same options makes of `source`.

    Raises:
        VerificationError: with file, tensor and offset of the first difference.
    """
    calibration = _calibration(calibrate, max_memory)
    wanted = _options(options, calibration)
    reader = open_source(str(source), revision)
    sink = open_sink(str(destination))
    plan = _made(reader, wanted, str(destination), calibration, sink)
    verify_output(plan, reader, sink, jobs or default_jobs(sink))
    return Result(plan, "done", True)


def _calibration(
    text: str | Path | None,
    max_memory: str | int | None,
    measuring: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration | None:
    if text is not None:
        return open_calibration(text, max_memory, measuring)
    if max_memory is not None:
        raise UsageError("--max-memory goes with --rule measured")
    return None


def _options(given: Mapping[str, Any], calibration: Calibration | None) -> Options:
    return Options(**given, calibrate=calibration.sha256 if calibration else None)


def _made(
    source: Source,
    wanted: Options,
    destination: str | None,
    calibration: Calibration | None,
    sink: Sink | None = None,
    overwrite: bool | None = None,
) -> Plan:
    """The plan; see `moescale.measuring.calibration.measured_plan`."""
    if calibration is None:
        return make_plan(source, wanted, destination)
    return measured_plan(source, wanted, destination, calibration, sink, overwrite)


def verify_output(
    plan: Plan,
    source: Source,
    sink: Sink,
    jobs: int,
    progress: Progress = lambda name, size: None,
    crew: Crew | None = None,
) -> None:
    """Verify a finished output, and note the digests in its provenance."""
    output = _as_source(sink)
    written = compare(plan, source, output, jobs=jobs, progress=progress, crew=crew)
    fill_digests(sink, plan, written, output.read(PROVENANCE))


def default_jobs(sink: Sink) -> int:
    """As many shards at once as there are cores, at most 8; to the Hub 2, for the memory."""
    return min(8 if isinstance(sink, LocalSink) else 2, os.cpu_count() or 1)


def open_source(text: str, revision: str | None = None) -> Source:
    """An existing directory wins over a repo id.

    Raises:
        UsageError: a revision is given twice, or for a directory.
        SourceError: it is neither a directory nor a repo that can be read.
    """
    if not text.strip():
        raise UsageError("SRC is empty", hint="For this directory say a dot.")
    if not text.startswith("hf://") and (is_directory(text) or not is_repo_id(text)):
        if revision is not None:
            raise UsageError(f"--revision goes with a repo on the Hub; {text} is a directory")
        return LocalSource(Path(text))
    place = parse_place(text)
    if revision is not None and place.revision is not None:
        raise UsageError(f"{text} names a revision already; leave --revision out")
    from moescale.repos.hub_source import HubSource

    return HubSource(HubPlace(place.repo, revision or place.revision))


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
    if not text.startswith("hf://"):
        if private is not None or create_pr or commit_message is not None:
            raise UsageError(f"--private, --create-pr and --commit-message need hf://, not {text}")
        return LocalSink(Path(text))
    from moescale.repos.hub_sink import HubOptions, HubSink

    return HubSink(parse_place(text), HubOptions(private, create_pr, commit_message, overwrite))


def _as_source(sink: Sink) -> Source:
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
    if destination.startswith("hf://"):
        place = parse_place(destination)
        if source.startswith("hf://") or (not is_directory(source) and is_repo_id(source)):
            other = parse_place(source)
            branches = (place.revision or "main", revision or other.revision or "main")
            if place.repo == other.repo and branches[0] == branches[1]:
                raise UsageError(f"{destination}: is the branch that the source is read from")
        return
    if source.startswith("hf://"):
        return
    one, other_folder = Path(source).resolve(), Path(destination).resolve()
    if one == other_folder:
        raise UsageError(f"{destination}: source and destination are the same directory")
    if other_folder.is_relative_to(one) or one.is_relative_to(other_folder):
        raise UsageError(f"{destination}: source and destination lie inside one another")


def _check_not_source(source: Source, sink: Sink) -> None:
    """Refuse to write onto the branch whose head is the commit that is read.

    Raises:
        UsageError: the source was given as a commit or a tag of that branch.
    """
    if sink.is_at(source.identity):
        raise UsageError(f"{sink.identity}: is the branch that the source is read from")
