"""Runs a plan: source to rewriting to destination, shard by shard, resumable."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from threading import Lock
from types import MappingProxyType

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.rewrite import Segment, check_scales, rewrite
from moescale.checkpoint.rounding import Rounding
from moescale.conversion import card
from moescale.conversion.executor import Done, Monitor, Pool, each
from moescale.errors import DestinationError
from moescale.families.config import CONFIG
from moescale.planning import provenance
from moescale.planning.files import CARD, PlannedFile
from moescale.planning.plan import Plan
from moescale.results import Status
from moescale.storage.base import (
    Destination,
    FileRecord,
    PendingFile,
    Progress,
    Source,
    Writers,
    io_errors,
)
from moescale.version import __version__

Small = Callable[[], Mapping[str, bytes]]
"""Gives the small files of the output, as `small_files` does."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: whether it had anything to do, and what stands in the output."""

    status: Status
    written: Mapping[str, FileRecord]
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


def status_of(plan: Plan, source: Source, destination: Destination, overwrite: bool) -> Status:
    """Whether the destination is empty, ours and unfinished, ours and done, or in the way.

    Raises:
        DestinationError: it holds something else, and `overwrite` was not given.
    """
    unfinished = destination.unfinished_job()
    if unfinished is not None:
        wanted = provenance.job(plan)
        if unfinished == wanted:
            return "resume"
        difference = provenance.job_difference(unfinished, wanted)
        return _replace(destination, overwrite, f"holds an unfinished run of {difference}")
    existing = destination.existing()
    if not existing:
        return "new"
    small = cache(partial(small_files, plan, source))  # read once, and only where it is needed
    said = _is_output(plan, destination, small)
    whole = _is_whole(plan, destination, existing, small) and bool(said or small())
    if said or whole:
        if overwrite:
            return "replace"
        if not (said and whole):
            return "changed"
        return "done" if source.last_changed() <= destination.changed_at(plan.record) else "stale"
    if not overwrite and _in_these_words(plan, destination):
        return "outdated"
    return _replace(destination, overwrite, _what_is_there(plan, destination, existing))


def _in_these_words(plan: Plan, destination: Destination) -> bool:
    """Whether the destination holds what the same words made of other files of this source."""
    said = destination.read_provenance()
    found = None if said is None else provenance.decode(said)
    options = provenance.made_with(found)
    if found is None or options is None:
        return False
    now = provenance.provenance(plan, {})
    same = all(found.get(key) == now[key] for key in ("moescale", "source"))
    return same and provenance.options_given(options) == now["options"]


def _what_is_there(plan: Plan, destination: Destination, existing: Mapping[str, int]) -> str:
    if (said := destination.read_provenance()) is None:
        some = ", ".join(sorted(existing)[:3])
        return f"is not empty ({some}{', ...' if len(existing) > 3 else ''})"
    found = provenance.decode(said) or {}
    version, options = found.get("moescale"), provenance.made_with(found)
    if isinstance(version, str) and version != __version__:
        return f"holds an output of moescale {version[:20]}, and this is {__version__}"
    source = found.get("source")
    name = source.get("id") if isinstance(source, dict) else None
    if not isinstance(name, str) or options is None:
        return "holds another output of moescale"
    rule = str(found.get("rule"))[:20]
    theirs = provenance.described(options, rule)
    ours = provenance.described(plan.options, plan.rule)
    this = ours if name == plan.source.name else f"{plan.source.name} with {ours}"
    return f"holds {name} with {theirs}; this run is {this}"


def _replace(destination: Destination, overwrite: bool, why: str) -> Status:
    what = "--overwrite to replace what is there"
    try:
        destination.check_replaceable()
    except DestinationError:
        if overwrite:
            raise
        what = "empty this one"
    if overwrite:
        return "replace"
    proof = (
        "; --verify without other options proves it"
        if destination.read_provenance() is not None
        else ""
    )
    hint = f"Give another destination, or {what}{proof}."
    raise DestinationError(f"{destination.identity}: {why}", hint=hint)


def _is_output(plan: Plan, destination: Destination, small: Small) -> bool:
    """Whether the destination says that it is the output of this very job."""
    if (said := destination.read_provenance()) is None:
        return False
    sizes = {f.name: FileRecord(plan.output_size(f)) for f in plan.large_files}
    others = {name: _written(data) for name, data in small().items()}
    wanted = provenance.provenance(plan, {**sizes, **others})
    return provenance.same_job(provenance.decode(said), wanted)


def _is_whole(
    plan: Plan, destination: Destination, existing: Mapping[str, int], small: Small
) -> bool:
    """Whether all its files are there, the large ones in their sizes, the small ones as written."""
    if any(existing.get(f.name) != plan.output_size(f) for f in plan.large_files):
        return False
    if any(existing.get(name) != len(data) for name, data in small().items()):
        return False
    return all(destination.read_existing(name) == data for name, data in small().items())


def run(
    plan: Plan,
    source: Source,
    destination: Destination,
    *,
    jobs: int,
    overwrite: bool = False,
    keep: Mapping[str, FileRecord] = MappingProxyType({}),
    progress: Progress = lambda name, size: None,
    pool: Pool | None = None,
) -> Outcome:
    """Do what the plan says; does nothing where it is done.

    Args:
        plan: what to do.
        source: where the checkpoint is read.
        destination: where the output goes.
        jobs: shards that are rewritten at once.
        overwrite: write again what is there, whatever it is.
        keep: large files of a finished output that are right and stay, where it is overwritten.
        progress: is told of every piece, from several threads.
        pool: who rewrites the shards; by default threads here.

    Raises:
        DestinationError: the destination holds something else, or a worker cannot reach it.
        RewriteError: a file could not be written, or a value would overflow.
        InterruptedRun: the user stopped it; the same call resumes.
    """
    status = status_of(plan, source, destination, overwrite)
    if status in ("done", "stale", "changed", "outdated"):
        destination.close()
        return Outcome(status, {})
    _rehearse_scales(plan, source)
    rounding: dict[str, Rounding] = {}
    if (made := made_files(plan, source).get(CARD)) is not None:
        destination.check_card(made)
    try:
        if pool is not None:  # before anything old is removed
            destination.share_writers()
            pool.check_reachable(
                source.subset(f.name for f in plan.large_files), destination.writers
            )
        destination.begin(provenance.job(plan), replace=status == "replace", keep=keep)
        written = _stream(plan, source, destination, jobs, progress, pool or Pool(), rounding)
        small = small_files(plan, source)  # only now, since an index may have many megabytes
        written |= {name: _written(data) for name, data in small.items()}
        if CARD in small:
            with io_errors(CARD):
                destination.write_small(CARD, small.pop(CARD))
        last = {} if plan.record in written else {plan.record: provenance_bytes(plan, written)}
        config = {CONFIG: small.pop(CONFIG)} if CONFIG in small else {}
        destination.publish({**last, **small, **config}, keep=frozenset(written) | {plan.record})
    finally:
        destination.close()
    return Outcome("repair" if keep else status, written, rounding)


def _rehearse_scales(plan: Plan, source: Source) -> None:
    """Find the scales that are no numbers or would leave their range, before a shard is written.

    Only on a disk: from the Hub each of them would be a request.
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


def small_files(plan: Plan, source: Source) -> dict[str, bytes]:
    """The files that are made or edited, and the index: card, index, config."""
    index, made = plan.index or ("", b"")
    first = {} if made is not None else {index: source.read(index)}
    return {**first, **made_files(plan, source)}


def made_files(plan: Plan, source: Source) -> dict[str, bytes]:
    """The files that are made or edited: card, config, and an index where there was none."""
    result = {}
    if (row := next((f for f in plan.files if f.name == CARD), None)) is not None:
        result[CARD] = card.render(plan, source.read(CARD) if row.action == "edit" else None)
    if plan.index is not None and plan.index[1] is not None:
        result[plan.index[0]] = plan.index[1]
    return {**result, **plan.edits, **({} if plan.config is None else {CONFIG: plan.config})}


def _written(data: bytes) -> FileRecord:
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _stream(
    plan: Plan,
    source: Source,
    destination: Destination,
    jobs: int,
    progress: Progress,
    pool: Pool,
    rounding: dict[str, Rounding],
) -> dict[str, FileRecord]:
    """Write every large file that an earlier run has not finished; `rounding` is filled."""
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

    def keep(name: str, done: Done[PendingFile]) -> FileRecord:
        source.received += done.received
        rounding.update(done.result.rounding)
        with io_errors(name):
            return destination.commit_file(name, done.result)

    for group in ([n for n in left if n != plan.opens], [n for n in left if n == plan.opens]):
        work = (rewriting(left[name], plan, source, destination.writers) for name in group)
        done |= each(work, jobs, keep, progress, pool, destination.cancel)
    return done


class _Counter:
    """Counts a byte for a part of one at each of its steps: written, and arrived where it goes."""

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
class Rewriting:
    """The job that writes one large file; this is all that is done to it, on whatever machine.

    With `digest` its SHA-256 is wanted.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]
    source: Source
    writers: Writers
    digest: bool

    def __call__(self, monitor: Monitor) -> PendingFile:
        """Write it."""
        name, count = self.name, _Counter(self.writers.steps, monitor.count)

        def advance(size: int) -> None:
            monitor.raise_if_cancelled()
            count(size)

        with io_errors(name), self.writers.open(name, self.size, self.digest, count) as writer:
            with self.source.open(name) as reader:
                rounding = rewrite(reader, writer, self.segments, name, advance)
            return replace(writer.finish(), rounding=rounding)


def rewriting(file: PlannedFile, plan: Plan, source: Source, writers: Writers) -> Rewriting:
    """What is to be done to one large file."""
    size, segments, part = (
        plan.output_size(file),
        tuple(plan.segments(file)),
        source.subset([file.name]),
    )
    digest = source.remote  # then the bytes come through memory in any case
    return Rewriting(file.name, size, segments, part, writers, digest)


def provenance_bytes(plan: Plan, written: Mapping[str, FileRecord]) -> bytes:
    """The content of the file that has the provenance, where it is a file of its own."""
    return provenance.encode(provenance.provenance(plan, written))


def fill_digests(
    destination: Destination, plan: Plan, written: Mapping[str, FileRecord], output: Source
) -> None:
    """Put the digests that a verification found into the output's provenance.

    Where that is inside a shard, it has none: no file can say its own.
    """
    if plan.record in written:
        return
    content = provenance_bytes(plan, written)
    if content != output.read(plan.record):
        with io_errors(plan.record):
            destination.replace_small(plan.record, content)
