"""Carries out a plan: reads, rewrites and writes shard by shard, and resumes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from types import MappingProxyType

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.rewrite import Segment, check_scales, rewrite
from moescale.checkpoint.rounding import Rounding
from moescale.conversion.executor import JobResult, Monitor, Pool, run_jobs
from moescale.conversion.small_files import generated_files, record_of, small_files
from moescale.conversion.status import status_of
from moescale.families.config import CONFIG
from moescale.planning import provenance
from moescale.planning.files import CARD, PlannedFile
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun
from moescale.results import Status
from moescale.storage.base import (
    Destination,
    FileRecord,
    PendingFile,
    Progress,
    Source,
    Writers,
    ignore,
    io_errors,
)


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The result of a run.

    Attributes:
        status: see `moescale.results.Status`.
        rounding: the effect of rounding block scales, by tensor.
    """

    status: Status
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


def run(
    plan: Plan,
    source: Source,
    destination: Destination,
    found: PreviousRun | None,
    *,
    jobs: int,
    overwrite: bool = False,
    keep: Mapping[str, FileRecord] = MappingProxyType({}),
    progress: Progress = ignore,
    pool: Pool,
) -> RunOutcome:
    """Carry out a plan, unless its output is already done.

    Args:
        plan: the plan.
        source: the checkpoint.
        destination: where the output goes.
        found: the record of the previous run there.
        jobs: how many shards are rewritten in parallel.
        overwrite: replace any existing content.
        keep: correct large files of a finished output, which are not written again.
        progress: called for every piece, from several threads.
        pool: rewrites the shards.

    Raises:
        DestinationError: the destination has other content, or a worker cannot reach it.
        RewriteError: a file could not be written, or a value would overflow.
        InterruptedRun: a part of the run was stopped; the same call resumes.
    """
    status = status_of(plan, source, destination, found, overwrite)
    if status in ("done", "stale", "changed", "outdated"):
        destination.close()
        return RunOutcome(status)
    _dry_run_scales(plan, source)
    rounding: dict[str, Rounding] = {}
    if (made := generated_files(plan, source).get(CARD)) is not None:
        destination.check_card(made)
    try:
        large = source.subset(f.name for f in plan.large_files)
        pool.prepare(large, destination)  # before any old content is removed
        destination.begin(provenance.job(plan), replace=status == "replace", keep=keep)
        written = _write_large_files(plan, source, destination, jobs, progress, pool, rounding)
        small = small_files(plan, source)  # late, since an index may have many megabytes
        written |= {name: record_of(data) for name, data in small.items()}
        if CARD in small:
            with io_errors(CARD):
                destination.write_small(CARD, small.pop(CARD))
        last = dict[str, bytes]()
        if plan.provenance_file not in written:
            last[plan.provenance_file] = provenance_bytes(plan, written)
        config = {CONFIG: small.pop(CONFIG)} if CONFIG in small else {}
        destination.publish({**last, **small, **config}, keep=frozenset(written) | {*last})
    finally:
        destination.close()
    return RunOutcome("repair" if keep else status, rounding)


def _dry_run_scales(plan: Plan, source: Source) -> None:
    """Refuse scales that are not finite or would leave their range, before a shard is written.

    For local sources only: on the Hub each scale would be a request.
    """
    if source.remote:
        return
    edits: dict[str, list[TensorEdit]] = defaultdict(list)
    for t in plan.changed_tensors:
        if t.role == "scale":
            edits[t.shard].append(t)
    for shard, chosen in edits.items():
        with io_errors(shard), source.open(shard) as reader:
            check_scales(reader, chosen, shard)


def _write_large_files(
    plan: Plan,
    source: Source,
    destination: Destination,
    jobs: int,
    progress: Progress,
    pool: Pool,
    rounding: dict[str, Rounding],
) -> dict[str, FileRecord]:
    """Write every large file that no earlier run has finished; fills `rounding`."""
    files = source.files()
    copied = [files[f.name] for f in plan.large_files if f.action == "copy"]
    finished = {
        **destination.finished_files(),
        **destination.copy_on_server(copied, source.identity),
    }
    done = {
        f.name: finished[f.name]
        for f in plan.large_files
        if f.name in finished and finished[f.name].size == plan.output_size(f)
    }
    left = {file.name: file for file in plan.large_files if file.name not in done}
    for name, written in done.items():
        progress(name, written.size)

    def keep(name: str, done: JobResult[PendingFile]) -> FileRecord:
        source.received += done.received
        rounding.update(done.result.rounding)
        with io_errors(name):
            return destination.commit_file(name, done.result)

    for group in (
        [n for n in left if n != plan.last_file],
        [n for n in left if n == plan.last_file],
    ):
        rewritten = sum(left[name].action == "rewrite" for name in group)
        threads = pool.editing_threads(min(jobs, rewritten))
        work = (
            rewrite_job(left[name], plan, source, destination.writers, threads) for name in group
        )
        done |= run_jobs(work, jobs, keep, progress, pool, destination.cancel)
    return done


class _StepCounter:
    """Counts a byte once after all its steps, such as written and sent."""

    def __init__(self, steps: int, count: Callable[[int], None]) -> None:
        self._steps = steps
        self._count = count
        self._lock = Lock()
        self._done = 0

    def __call__(self, size: int) -> None:
        with self._lock:
            before, self._done = self._done, self._done + size
            whole = self._done // self._steps - before // self._steps
        self._count(whole)


@dataclass(frozen=True, slots=True)
class RewriteJob:
    """The job that writes one large file, on any machine.

    Attributes:
        name: the file.
        size: its new size in bytes.
        segments: its new content.
        source: limited to this file.
        writers: open the writer for it.
        digest: whether to compute its SHA-256.
        threads: how many threads edit its tensors.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]
    source: Source
    writers: Writers
    digest: bool
    threads: int

    def __call__(self, monitor: Monitor) -> PendingFile:
        """Write the file."""
        name, count = self.name, _StepCounter(self.writers.steps, monitor.count)

        def advance(size: int) -> None:
            monitor.raise_if_cancelled()
            count(size)

        with io_errors(name), self.writers.open(name, self.size, self.digest, count) as writer:
            with self.source.open(name) as reader:
                rounding = rewrite(reader, writer, self.segments, name, advance, self.threads)
            return replace(writer.finish(), rounding=rounding)


def rewrite_job(
    file: PlannedFile, plan: Plan, source: Source, writers: Writers, threads: int = 1
) -> RewriteJob:
    """The job for one large file."""
    size, segments, part = (
        plan.output_size(file),
        tuple(plan.segments(file)),
        source.subset([file.name]),
    )
    digest = source.remote  # its bytes go through memory anyway
    return RewriteJob(file.name, size, segments, part, writers, digest, threads)


def provenance_bytes(plan: Plan, written: Mapping[str, FileRecord]) -> bytes:
    """The content of the provenance file."""
    return provenance.encode(provenance.provenance(plan, written))


def fill_digests(
    destination: Destination, plan: Plan, written: Mapping[str, FileRecord], output: Source
) -> None:
    """Add the digests found by a verification to the output's provenance.

    Provenance inside a shard has no digests: no file can contain its own.
    """
    if plan.provenance_file in written:
        return
    content = provenance_bytes(plan, written)
    if content != output.read(plan.provenance_file):
        with io_errors(plan.provenance_file):
            destination.replace_small(plan.provenance_file, content)
