"""Verifies an output: reads source and output again and compares them with the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from moescale.checkpoint.rewrite import PIECE, Segment, expected
from moescale.conversion.executor import JobResult, Monitor, Pool, run_jobs
from moescale.conversion.small_files import generated_files
from moescale.errors import SourceError, VerificationError
from moescale.planning import provenance
from moescale.planning.files import PROVENANCE, PlannedFile
from moescale.planning.plan import Plan
from moescale.planning.shards import shard_header
from moescale.storage.base import FileInfo, FileRecord, Progress, Source, ignore, io_errors


class Difference(NamedTuple):
    """A file of an output that differs from the plan.

    Attributes:
        name: the file.
        how: how it differs, for the error message.
    """

    name: str
    how: str


class Proof(NamedTuple):
    """The result of a verification.

    Attributes:
        written: size and SHA-256 of every correct file except the provenance.
        differences: all other files.
    """

    written: Mapping[str, FileRecord]
    differences: tuple[Difference, ...]

    def raise_if_different(self) -> None:
        """Raise if a file differs.

        Raises:
            VerificationError: names all files that differ, and the difference in the first.
        """
        if not self.differences:
            return
        first, *others = self.differences
        rest = [difference.name for difference in others]
        also = f"; {_joined(rest)} differ too" if rest else ""
        names = (first.name, *rest)
        raise VerificationError(f"{first.name}: {first.how}{also}", files=names)


_SHOWN = 8


def _joined(names: list[str]) -> str:
    shown = names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def verify_files(
    plan: Plan,
    source: Source,
    output: Source,
    *,
    jobs: int,
    only: Collection[str] | None = None,
    progress: Progress = ignore,
    pool: Pool,
) -> Proof:
    """Compare every byte of the output with the plan.

    Args:
        plan: the plan.
        source: the checkpoint.
        output: the output.
        jobs: how many files are read in parallel.
        only: the large files to read; None for all.
        progress: called for every piece, from several threads.
        pool: reads the large files.
    """
    small = generated_files(plan, source)
    large = {file.name for file in plan.large_files}
    # A copied index can be large, so it is read like a shard.
    files = {f.name: f for f in plan.files if f.name in large or plan.index == (f.name, None)}
    found = _found_names(output)
    differences = list(_name_differences({*files, *small, plan.provenance_file}, found))
    read = [n for n in files if n in found and (only is None or n in only or n not in large)]
    pool.check_reachable(source.subset(files), output.subset(read))

    def keep(name: str, done: JobResult[FileRecord | str | int]) -> FileRecord | str:
        source.received += done.received
        if isinstance(done.result, int):
            return _differs(done.result, _describe_offset(files[name], plan, source, done.result))
        return done.result

    def shown(name: str, size: int) -> None:
        if name in large:
            progress(name, size)

    comparisons = (_compare_job(files[name], plan, source, output) for name in read)
    results = run_jobs(comparisons, jobs, keep, shown, pool)
    results |= {n: _verify_small(data, output.read(n)) for n, data in small.items() if n in found}
    differences += [Difference(name, how) for name, how in results.items() if isinstance(how, str)]
    written = {name: file for name, file in results.items() if isinstance(file, FileRecord)}
    if not differences and only is None and plan.provenance_file not in large:
        differences += _provenance_differences(plan, output.read(PROVENANCE), written)
    return Proof(written, tuple(differences))


def _found_names(output: Source) -> Collection[str]:
    try:
        return output.files().keys()
    except SourceError as error:
        raise VerificationError(f"the output cannot be read: {error.message}") from None


def _name_differences(wanted: Collection[str], found: Collection[str]) -> Iterator[Difference]:
    """Missing files, and files that do not belong to the output."""
    for name in sorted(set(wanted) - set(found)):
        yield Difference(name, "is missing from the output")
    for name in sorted(set(found) - set(wanted) - {".gitattributes"}):  # created by the Hub
        yield Difference(name, "does not belong to the output")


def _verify_small(wanted: bytes, found: bytes) -> FileRecord | str:
    if found != wanted:
        return _differs(_first_difference(found, wanted))
    return FileRecord(len(found), hashlib.sha256(found).hexdigest())


def _provenance_differences(
    plan: Plan, data: bytes, written: Mapping[str, FileRecord]
) -> Iterator[Difference]:
    """Compare every byte, except digests that may not be recorded yet."""
    listed = {name: digest for name, (_, digest) in provenance.decode(data).files.items()}
    for name, digest in listed.items():
        if name in written and digest not in (None, written[name].sha256):
            yield Difference(name, f"its SHA-256 is not the one recorded in {PROVENANCE}")
            return
    large = {file.name for file in plan.large_files}

    def wanted(digests: Collection[str]) -> bytes:
        files = {n: w if n in digests else FileRecord(w.size) for n, w in written.items()}
        return provenance.encode(provenance.provenance(plan, files))

    if data != wanted({name for name, digest in listed.items() if digest is not None}):
        usual = (wanted(written), wanted(written.keys() - large))
        yield Difference(PROVENANCE, _differs(max(_first_difference(data, one) for one in usual)))


@dataclass(frozen=True, slots=True)
class CompareJob:
    """The job that compares one large file with the plan.

    Attributes:
        name: the file.
        size: its size according to the plan.
        segments: its content according to the plan.
        source: limited to this file.
        output: limited to this file.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]
    source: Source
    output: Source

    def __call__(self, monitor: Monitor) -> FileRecord | str | int:
        """Its size and digest; or the offset of the first difference; or another difference."""
        name, position = self.name, 0
        if (found_size := self.output.files()[name].size) != self.size:
            return f"has {found_size} bytes instead of {self.size}"
        with (
            io_errors(name),
            self.source.open(name) as original,
            self.output.open(name) as copy,
            _Digest() as digest,
        ):
            for _, wanted in expected(original, self.segments):
                found = digest.buffer(len(wanted))
                copy.read_into(found, position)
                if not _equal(found, wanted):
                    return position + _first_difference(found, wanted)
                digest.update(found)
                position += len(wanted)
                monitor.raise_if_cancelled()
                monitor.count(len(wanted))
            return FileRecord(self.size, digest.hexdigest())


def _compare_job(file: PlannedFile, plan: Plan, source: Source, output: Source) -> CompareJob:
    name, segments = file.name, tuple(plan.segments(file))
    sources = source.subset([name]), output.subset([name])
    return CompareJob(name, plan.output_size(file), segments, *sources)


class _Digest:
    """Computes SHA-256 in a thread of its own, while the next piece is read and compared."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moescale-sha256")
        self._buffers = [memoryview(b""), memoryview(b"")]
        self._busy: Future[None] | None = None

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def buffer(self, size: int) -> memoryview:
        """A buffer for a piece, not the one of the previous piece."""
        self._buffers.reverse()
        if len(self._buffers[0]) < size:
            self._buffers[0] = memoryview(bytearray(max(size, PIECE)))
        return self._buffers[0][:size]

    def update(self, piece: memoryview) -> None:
        """Start on a piece; the previous one is finished on return, so its buffer is free."""
        self._wait()
        self._busy = self._thread.submit(self._digest.update, piece)

    def _wait(self) -> None:
        if self._busy is not None:
            self._busy.result()

    def hexdigest(self) -> str:
        """The digest of all pieces."""
        self._wait()
        return self._digest.hexdigest()


def _describe_offset(file: PlannedFile, plan: Plan, source: Source, offset: int) -> str:
    """The part of the output at an offset: the header, or a tensor by name."""
    segments = plan.segments(file)
    ends = accumulate(segment.new_size for segment in segments)
    segment, end = next(pair for pair in zip(segments, ends, strict=True) if offset < pair[1])
    if segment.edit is not None:
        return f", in tensor {segment.edit.tensor.name!r}, which is scaled"
    if segment.data is not None:
        return ", in the header"
    copied = segment.stop - (end - offset)
    header = shard_header(source, FileInfo(file.name, file.size or 0))
    if header is None:
        whole = len(segments) == 1
        return "" if whole else f", which is copied from byte {copied} of the source"
    if copied < header.data_start:
        return ", in the header"
    name = next(t.name for t in header.tensors if t.start <= copied < t.stop)
    return f", in tensor {name!r}, which is copied"


def _differs(offset: int, where: str = "") -> str:
    return f"differs from the plan at byte {offset}{where}"


def _equal(one: memoryview, other: memoryview) -> bool:
    """Compare in numpy, 15 times as fast as with memoryviews, and without holding the GIL."""
    import numpy as np

    return bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))


def _first_difference(found: bytes | memoryview, wanted: bytes | memoryview) -> int:
    import numpy as np

    shorter = min(len(found), len(wanted))
    one, other = (np.frombuffer(data, np.uint8)[:shorter] for data in (found, wanted))
    different = one != other
    return int(different.argmax()) if different.any() else shorter
