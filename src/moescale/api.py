"""The same as the command, from Python: `plan`, `convert`, `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescale.convert import Status, fill_digests, run
from moescale.errors import DestinationError, UsageError
from moescale.options import Options
from moescale.plan import Plan, make_plan
from moescale.repos.base import Progress, Source
from moescale.repos.local import LocalSink, LocalSource
from moescale.verify import verify as compare

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run.

    Attributes:
        plan: what was to be done.
        status: ``new``, ``resume``, ``replace``, or ``done`` if there was nothing left to do.
        verified: the output was read again and compared.
    """

    plan: Plan
    status: Status
    verified: bool


def plan(source: str | Path, destination: str | Path | None = None, **options: Any) -> Plan:
    """Decide what a conversion would do; reads the config, the index and the shard headers.

    Args:
        source: a directory.
        destination: a directory, for the record only; nothing is written.
        options: the fields of `Options`.

    Raises:
        UsageError: an option is wrong by itself.
        SourceError: the checkpoint cannot be rescaled so.
    """
    if destination is not None:
        _check_places(Path(source), Path(destination))
    name = None if destination is None else str(destination)
    return make_plan(_source(source), Options(**options), name)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    check: bool = False,
    progress: Progress = lambda name, size: None,
    planned: Callable[[Plan], None] = lambda plan: None,
    **options: Any,
) -> Result:
    """Rescale a checkpoint; continues an interrupted run of the same job.

    Args:
        source: a directory.
        destination: a directory; nothing in it loads before everything is there.
        jobs: shards at once; by default the number of cores, at most 8.
        overwrite: replace a destination that holds something else.
        check: afterwards read source and output again and prove the output.
        progress: called with a file's name and a number of bytes, from several threads.
        planned: called with the plan before anything is written.
        options: the fields of `Options`.

    Raises:
        MoescaleError: see `moescale.errors`; a rerun resumes wherever it can.
    """
    _check_places(Path(source), Path(destination))
    reader, sink = _source(source), LocalSink(Path(destination))
    plan = make_plan(reader, Options(**options), str(destination))
    planned(plan)
    jobs = default_jobs() if jobs is None else jobs
    outcome = run(plan, reader, sink, jobs=jobs, overwrite=overwrite, progress=progress)
    if outcome.status == "stale" and not check:
        raise DestinationError(
            f"{destination}: is an output of this job, but the source is younger than it",
            hint="--verify proves whether it is still right; --overwrite does it again.",
        )
    if check:
        verify_output(plan, reader, sink, jobs, progress)
    return Result(plan, outcome.status, check)


def verify(
    source: str | Path, destination: str | Path, *, jobs: int | None = None, **options: Any
) -> Result:
    """Prove that `destination` is what `convert` with the same options makes of `source`.

    Raises:
        VerificationError: with file, tensor and offset of the first difference.
    """
    reader = _source(source)
    plan = make_plan(reader, Options(**options), str(destination))
    verify_output(plan, reader, LocalSink(Path(destination)), jobs or default_jobs())
    return Result(plan, "done", True)


def verify_output(
    plan: Plan,
    source: Source,
    sink: LocalSink,
    jobs: int,
    progress: Progress = lambda name, size: None,
) -> None:
    """Verify a finished output, and note the digests in its provenance."""
    written = compare(plan, source, LocalSource(sink.root), jobs=jobs, progress=progress)
    fill_digests(sink, plan, written)


def default_jobs() -> int:
    """As many shards at once as there are cores, at most 8."""
    return min(8, os.cpu_count() or 1)


def _source(source: str | Path) -> Source:
    return LocalSource(Path(source))


def _check_places(source: Path, destination: Path) -> None:
    """Refuse a destination that is the source, or inside it, or around it.

    Raises:
        UsageError: writing there would change the source.
    """
    one, other = source.resolve(), destination.resolve()
    if one == other:
        raise UsageError(f"{destination}: source and destination are the same directory")
    if other.is_relative_to(one) or one.is_relative_to(other):
        raise UsageError(f"{destination}: source and destination lie inside one another")
