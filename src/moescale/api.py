"""The same as the command, from Python: `plan`, `convert`, `verify`.

Nothing here prints, exits, changes the environment or touches signals: those are the command's.
What goes wrong is an exception of `moescale.errors`. Ctrl-C is a `KeyboardInterrupt`, as
everywhere; after it, as after any error, the call's threads have ended, and the same call resumes.
An error's hint names the command's options; `check` is ``--verify``, the others have their names.

Only a model that the rule ``measured`` has to download shows the Hub client's own bars, on a
terminal; `huggingface_hub.utils.disable_progress_bars` turns them off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, get_args

from moescale.errors import DestinationError, MoescaleError, UsageError
from moescale.measuring.calibration import Calibration, measured_plan, open_calibration
from moescale.model.architectures import ROWS, known_types
from moescale.options import RULES, Fold, Options, Rescaling, StrPath, options_of
from moescale.planning.decide import make_plan
from moescale.planning.files import PROVENANCE
from moescale.planning.plan import Plan
from moescale.repos.base import Progress, Sink, Source
from moescale.repos.local_sink import LocalSink
from moescale.repos.places import (
    as_source,
    check_not_source,
    check_places,
    open_sink,
    open_source,
)
from moescale.running.conversion import Result, Status, fill_digests, run, status_of
from moescale.running.parallel import Crew
from moescale.running.verification import verify as compare

if TYPE_CHECKING:
    from moescale.running.cluster import Workers

Measuring = Callable[[int, int], None]
"""Called with tokens that a model ran over, or layers that ``gates`` sampled: done, and in all."""


def _silent(*_: object) -> None:
    """Nobody wants to know."""


def plan(
    source: StrPath,
    destination: StrPath | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    report: StrPath | None = None,
    measuring: Measuring = _silent,
    **options: Unpack[Rescaling],
) -> Plan:
    """Decide what a conversion would do; reads the config, the index and the shard headers.

    What `convert` would refuse at a local destination is a warning of the plan; a destination on
    the Hub is not looked at.

    >>> import moescale
    >>> plan = moescale.plan("Mixtral-8x7B", experts=3)
    >>> plan.experts.trained, plan.experts.after
    (2, 3)
    >>> plan.factors["0"]
    1.224744871391589
    >>> plan.predicted_norm["published"]  # of the routed output; 1 is that of the trained model
    0.6666666666666667

    Args:
        source: a directory, ``org/name``, or ``hf://org/name[@revision]``.
        destination: a directory or ``hf://org/name[@branch]``.
        revision: of a source that is given as ``org/name``.
        overwrite: as for `convert`.
        private: as for `convert`.
        create_pr: as for `convert`.
        commit_message: as for `convert`.
        report: draw the plan into this HTML page.
        measuring: told of the rule at work.
        options: see `moescale.Rescaling`.

    Raises:
        UsageError: an option is wrong by itself.
        SourceError: the checkpoint cannot be read, or not be rescaled so.
        TemporaryError: the Hub does not answer.
    """
    _check_report(report, source, destination)
    wanted, calibration = _asked(options, measuring)
    if destination is None:
        made = _made(open_source(os.fspath(source), revision), wanted, None, calibration, measuring)
    else:
        check_places(os.fspath(source), os.fspath(destination), revision)
        sink = open_sink(os.fspath(destination), private, create_pr, commit_message, overwrite)
        reader = open_source(os.fspath(source), revision)
        made = _trial(
            reader, sink, os.fspath(destination), wanted, calibration, measuring, overwrite
        )
    return _drawn(made, report)


def convert(
    source: StrPath,
    destination: StrPath,
    *,
    revision: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dask: StrPath | None = None,
    report: StrPath | None = None,
    progress: Progress = _silent,
    planned: Callable[[Plan], None] = _silent,
    measuring: Measuring = _silent,
    **options: Unpack[Rescaling],
) -> Result:
    """Rescale a checkpoint; continues an interrupted run of the same job.

    >>> import moescale
    >>> result = moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3, check=True)
    >>> result.status, result.verified
    ('new', True)
    >>> moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3).status
    'done'
    >>> moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=4)
    Traceback (most recent call last):
    moescale.errors.DestinationError: Mixtral-8x7B-3: already holds another output of moescale
    Give another destination, or --overwrite to replace what is there.

    Args:
        source: a directory, ``org/name``, or ``hf://org/name[@revision]``.
        destination: a directory or ``hf://org/name[@branch]``; nothing in it loads before
            everything is there.
        revision: of a source that is given as ``org/name``.
        jobs: shards at once; by default the number of cores, at most 8, and 2 to the Hub; on a
            cluster what its workers can do.
        overwrite: replace a destination that holds something else.
        check: afterwards read source and output again and prove the output (``--verify``).
        private: whether a repo that has to be made is private; None for the Hub's default.
        create_pr: open a pull request instead of changing the branch.
        commit_message: of the commit that brings the output.
        dask: address or file of a Dask scheduler, whose workers rewrite the shards. They need this
            version of moescale, and places that they can reach.
        report: draw the plan into this HTML page, before anything is written. Where that cannot be
            done is refused at first; what goes wrong later is a warning of the plan.
        progress: called with a file's name and the number of its bytes done since the last call,
            from several threads, also at once. For each of `Plan.large_files` the numbers add up
            to `Plan.output_size`; with `check`, once more. Where nothing is left to do there are
            no calls. What it raises ends the run.
        planned: called with the plan, in the calling thread, before anything is written.
        measuring: told of the rule at work. ``measured`` runs the model unless the destination has
            the factors of this very job.
        options: see `moescale.Rescaling`.

    Raises:
        UsageError: an option is wrong by itself.
        SourceError: the checkpoint cannot be read, or not be rescaled so; nothing was written.
        DestinationError: the destination holds something else, or cannot take the output.
        RewriteError: a shard could not be rewritten, or a value would overflow.
        VerificationError: `check` found a difference.
        TemporaryError: the Hub or the cluster failed for now; the same call resumes.
    """
    _check_report(report, source, destination)
    wanted, calibration = _asked(options, measuring)
    _check_jobs(jobs)
    check_places(os.fspath(source), os.fspath(destination), revision)
    sink = open_sink(os.fspath(destination), private, create_pr, commit_message, overwrite)
    with _crew(dask) as crew:
        reader = open_source(os.fspath(source), revision)
        check_not_source(reader, sink)
        made = _made(
            reader, wanted, os.fspath(destination), calibration, measuring, sink, overwrite
        )
        plan = _drawn(_with_room(made, sink), report)
        planned(plan)
        jobs = jobs or _default_jobs(sink, crew)
        outcome = run(
            plan, reader, sink, jobs=jobs, overwrite=overwrite, progress=progress, crew=crew
        )
        if not check:
            _check_status(outcome.status, os.fspath(destination))
        else:
            verify_output(plan, reader, sink, jobs, progress, crew)
    received = [f"{reader.received:,} bytes received"] if reader.received else []
    return Result(plan, outcome.status, check, sink.url, (*received, *sink.remarks))


def verify(
    source: StrPath,
    destination: StrPath,
    *,
    revision: str | None = None,
    jobs: int | None = None,
    dask: StrPath | None = None,
    progress: Progress = _silent,
    measuring: Measuring = _silent,
    **options: Unpack[Rescaling],
) -> Result:
    """Prove that `destination` is what `convert` with the same options makes of `source`.

    >>> import moescale
    >>> result = moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3)
    >>> moescale.verify("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3).verified
    True
    >>> try:
    ...     moescale.verify("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3, rule="published")
    ... except moescale.errors.VerificationError as error:
    ...     print(error.message)
    model-00001-of-00003.safetensors: differs from the plan at byte 1720, in tensor ...

    The arguments are those of `convert`. What SHA-256 sums the provenance lacks are noted there.

    Raises:
        VerificationError: with file, tensor and offset of the first difference.
        MoescaleError: as for `convert`.
    """
    wanted, calibration = _asked(options, measuring)
    _check_jobs(jobs)
    sink = open_sink(os.fspath(destination))
    with _crew(dask) as crew:
        reader = open_source(os.fspath(source), revision)
        plan = _made(reader, wanted, os.fspath(destination), calibration, measuring, sink)
        verify_output(plan, reader, sink, jobs or _default_jobs(sink, crew), progress, crew)
    return Result(plan, "done", True)


def values(option: str) -> list[str]:
    """What an option takes: ``rule``, ``fold``, ``arch`` or ``part``."""
    found = {
        "rule": RULES,
        "fold": get_args(Fold),
        "arch": known_types(),
        "part": {row.part for row in ROWS if row.part},
    }
    return sorted(found[option])


def _asked(given: Rescaling, measuring: Measuring) -> tuple[Options, Calibration | None]:
    """What was asked for, and the text for the rule ``measured``.

    Raises:
        UsageError: an option is wrong by itself.
    """
    calibration, memory = None, given.get("max_memory")
    if (text := given.get("calibrate")) is not None:
        calibration = open_calibration(Path(text), memory, measuring)
    elif memory is not None:
        raise UsageError("--max-memory goes with --rule measured")
    return options_of(given, calibration.sha256 if calibration else None), calibration


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}: it must be 1 or more")


def _default_jobs(sink: Sink, crew: Workers | None) -> int:
    """As many shards at once as there are cores, at most 8; to the Hub 2, for the memory."""
    if crew is not None:
        return crew.size()
    return min(8 if isinstance(sink, LocalSink) else 2, os.cpu_count() or 1)


def _check_report(file: StrPath | None, *places: StrPath | None) -> None:
    if file is not None:
        from moescale.report import page

        page.check(Path(file), *(os.fspath(place) for place in places if place))


def _drawn(plan: Plan, file: StrPath | None) -> Plan:
    """The plan; what hinders its page is a warning, since its factors may have taken hours."""
    if file is not None:
        from moescale.report import page

        try:
            page.write(plan, Path(file))
        except MoescaleError as error:
            return replace(plan, warnings=(*plan.warnings, error.message))
    return plan


def _trial(
    source: Source,
    sink: Sink,
    destination: str,
    wanted: Options,
    calibration: Calibration | None,
    measuring: Measuring,
    overwrite: bool,
) -> Plan:
    """A plan that no run follows: what a run would be refused for is a warning."""
    try:
        beside = sink if isinstance(sink, LocalSink) else None
        made = _made(source, wanted, destination, calibration, measuring, beside, overwrite)
    except DestinationError:  # a run would be refused, but a dry run shows what it would do
        made = _made(source, wanted, destination, calibration, measuring)
    try:
        if isinstance(sink, LocalSink):
            _check_status(status_of(made, source, sink, overwrite), destination)
            sink.check_writable()
        return _with_room(made, sink)
    except DestinationError as error:
        refusal = f"a run would be refused: {error}".replace("\n", ". ")
        return replace(made, warnings=(*made.warnings, refusal))


@contextmanager
def _crew(dask: StrPath | None) -> Iterator[Workers | None]:
    """The workers of a cluster, None for the threads of this process."""
    if dask is None:
        yield None
        return
    try:
        from moescale.running.cluster import connect
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--dask needs {error.name}, which is not installed",
            hint="Install it with pip install '.[dask]' in the clone, or: pip install distributed",
        ) from None
    with connect(os.fspath(dask)) as workers:
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

    Where blocks may be shared with the source, it is no refusal: a copy of them needs no room.

    Raises:
        DestinationError: the disk is too small, and nothing can be shared.
    """
    if not isinstance(sink, LocalSink):
        return plan
    try:
        missing = plan.bytes_written - sink.room()
        may_share = missing <= 0 or sink.may_share(plan.source)
    except OSError:  # a file system that does not tell, or a place that the run will refuse
        return plan
    if missing <= 0:
        return plan
    less = f"{sink.identity}: the disk has {missing:,} bytes less than the output needs"
    if not may_share:
        raise DestinationError(less, hint="Free some space, or give another destination.")
    warning = f"{less}, which is enough only where it can share blocks with the source"
    return replace(plan, warnings=(*plan.warnings, warning))


def _made(
    source: Source,
    wanted: Options,
    destination: str | None,
    calibration: Calibration | None,
    measuring: Measuring,
    sink: Sink | None = None,
    overwrite: bool | None = None,
) -> Plan:
    """The plan; see `moescale.measuring.calibration.measured_plan`."""
    if calibration is None:
        return make_plan(source, wanted, destination, progress=measuring)
    return measured_plan(source, wanted, destination, calibration, sink, overwrite)


def verify_output(
    plan: Plan,
    source: Source,
    sink: Sink,
    jobs: int,
    progress: Progress = _silent,
    crew: Crew | None = None,
) -> None:
    """Verify a finished output, and note the digests in its provenance."""
    output = as_source(sink)
    written = compare(plan, source, output, jobs=jobs, progress=progress, crew=crew)
    fill_digests(sink, plan, written, output.read(PROVENANCE))
