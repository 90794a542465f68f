"""Proves an output: reads source and output again and compares them with the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moescale.checkpoint.rewrite import PIECE, Segment, expected
from moescale.checkpoint.safetensors.header import LENGTH_BYTES, header_length, parse_header
from moescale.checkpoint.safetensors.index import SUFFIX
from moescale.conversion.executor import Done, Monitor, Pool, each
from moescale.conversion.run import made_files
from moescale.errors import CheckpointError, SourceError, VerificationError
from moescale.planning import provenance
from moescale.planning.files import PROVENANCE, PlannedFile
from moescale.planning.plan import Plan
from moescale.storage.base import FileRecord, Progress, Source, io_errors


@dataclass(frozen=True, slots=True)
class Difference:
    """A file of an output that is not what the plan says, and how it differs, in words."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What a verification found.

    Attributes:
        written: size and SHA-256 of every file that is right, but the provenance.
        differences: of all other files.
    """

    written: Mapping[str, FileRecord]
    differences: tuple[Difference, ...]

    def raise_if_different(self) -> None:
        """Refuse an output that differs.

        Raises:
            VerificationError: with every file, and how the first one differs.
        """
        if not self.differences:
            return
        first, *others = self.differences
        rest = [difference.name for difference in others]
        also = f"; {_listed(rest)} differ too" if rest else ""
        names = (first.name, *rest)
        raise VerificationError(f"{first.name}: {first.how}{also}", files=names)


_SHOWN = 8


def _listed(names: list[str]) -> str:
    shown = names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def verify(
    plan: Plan,
    source: Source,
    output: Source,
    *,
    jobs: int,
    only: Collection[str] | None = None,
    progress: Progress = lambda name, size: None,
    pool: Pool | None = None,
) -> Proof:
    """Compare every byte of the output with what the plan says.

    Args:
        plan: what the output must be.
        source: where the checkpoint is read.
        output: what is proved.
        jobs: files that are read at once.
        only: large files that are read; None for all.
        progress: is told of every piece, from several threads.
        pool: who reads the large files; by default threads here.
    """
    small = made_files(plan, source)
    large = {file.name for file in plan.large_files}
    files = {f.name: f for f in plan.files if f.name in large or _is_copied_index(f, plan)}
    found = _found_names(output)
    differences = list(_other_names({*files, *small, plan.record}, found))
    read = [n for n in files if n in found and (only is None or n in only or n not in large)]
    pool = pool or Pool()
    pool.check_reachable(source.subset(files), output.subset(read))

    def keep(name: str, done: Done[FileRecord | str | int]) -> FileRecord | str:
        source.received += done.received
        if isinstance(done.result, int):
            return _differs(done.result, _place(files[name], plan, source, done.result))
        return done.result

    def shown(name: str, size: int) -> None:
        if name in large:
            progress(name, size)

    comparisons = (_comparison(files[name], plan, source, output) for name in read)
    results = each(comparisons, jobs, keep, shown, pool)
    results |= {n: _verify_small(data, output.read(n)) for n, data in small.items() if n in found}
    differences += [Difference(name, how) for name, how in results.items() if isinstance(how, str)]
    written = {name: file for name, file in results.items() if isinstance(file, FileRecord)}
    if not differences and only is None and plan.record not in large:
        differences += _provenance_differences(plan, output.read(PROVENANCE), written)
    return Proof(written, tuple(differences))


def _is_copied_index(file: PlannedFile, plan: Plan) -> bool:
    """An index is verified like a shard, since it may have many megabytes."""
    return plan.index == (file.name, None)


def _found_names(output: Source) -> Collection[str]:
    try:
        return output.files().keys()
    except SourceError as error:
        raise VerificationError(f"the output cannot be read: {error.message}") from None


def _other_names(wanted: Collection[str], found: Collection[str]) -> Iterator[Difference]:
    """Names that are missing, and those that should not be there."""
    for name in sorted(set(wanted) - set(found)):
        yield Difference(name, "is missing from the output")
    for name in sorted(set(found) - set(wanted) - {".gitattributes"}):  # the Hub makes one
        yield Difference(name, "does not belong into the output")


def _verify_small(wanted: bytes, found: bytes) -> FileRecord | str:
    if found != wanted:
        return _differs(_first_difference(found, wanted))
    return FileRecord(len(found), hashlib.sha256(found).hexdigest())


def _provenance_differences(
    plan: Plan, data: bytes, written: Mapping[str, FileRecord]
) -> Iterator[Difference]:
    """Every byte is as it was made, but for digests, which may not be known yet."""
    noted = _noted_digests(provenance.decode(data))
    for name, digest in noted.items():
        if name in written and digest not in (None, written[name].sha256):
            yield Difference(name, f"its SHA-256 is not the one noted in {PROVENANCE}")
            return
    large = {file.name for file in plan.large_files}

    def wanted(digests: Collection[str]) -> bytes:
        files = {n: w if n in digests else FileRecord(w.size) for n, w in written.items()}
        return provenance.encode(provenance.provenance(plan, files))

    if data != wanted({name for name, digest in noted.items() if digest is not None}):
        usual = (wanted(written), wanted(written.keys() - large))
        yield Difference(PROVENANCE, _differs(max(_first_difference(data, one) for one in usual)))


def _noted_digests(found: Any) -> dict[str, Any]:
    files = found.get("files") if isinstance(found, dict) else None
    entries = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return {f["name"]: f.get("sha256") for f in entries if isinstance(f.get("name"), str)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The job that compares one large file with what it has to be."""

    name: str
    size: int
    segments: tuple[Segment, ...]
    source: Source
    output: Source

    def __call__(self, monitor: Monitor) -> FileRecord | str | int:
        """What it is; the offset of the first difference; or what else is wrong with it."""
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


def _comparison(file: PlannedFile, plan: Plan, source: Source, output: Source) -> Comparison:
    name, segments = file.name, tuple(plan.segments(file))
    sources = source.subset([name]), output.subset([name])
    return Comparison(name, plan.output_size(file), segments, *sources)


class _Digest:
    """SHA-256 in a thread of its own, while the next piece is read and compared."""

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
        """Room for a piece, other than that of the piece before."""
        self._buffers.reverse()
        if len(self._buffers[0]) < size:
            self._buffers[0] = memoryview(bytearray(max(size, PIECE)))
        return self._buffers[0][:size]

    def update(self, piece: memoryview) -> None:
        """Take a piece; the one before is through afterwards, so that its buffer is free."""
        self._wait()
        self._busy = self._thread.submit(self._digest.update, piece)

    def _wait(self) -> None:
        if self._busy is not None:
            self._busy.result()

    def hexdigest(self) -> str:
        """The digest of all pieces."""
        self._wait()
        return self._digest.hexdigest()


def _place(file: PlannedFile, plan: Plan, source: Source, offset: int) -> str:
    """What stands at an offset of a shard of the output: the header, or a tensor by name."""
    if not file.name.endswith(SUFFIX):
        return _in_segments(plan.segments(file), offset)
    try:
        first = _first_bytes(file, plan, source)
        header = parse_header(first[LENGTH_BYTES:], plan.output_size(file), file.name)
    except CheckpointError:  # a file of that name that is no shard
        return ""
    if offset < header.data_start:
        return ", in the header"
    name = next(t.name for t in header.tensors if t.start <= offset < t.stop)
    planned = any(t.tensor.name == name for t in plan.changed_tensors)
    return f", in tensor {name!r}, which is {'scaled' if planned else 'copied'}"


def _in_segments(parts: Sequence[Segment], offset: int) -> str:
    """What stands at an offset of a file of which not all is copied."""
    position = 0
    for part in parts if len(parts) > 1 else ():
        size = part.stop - part.start if part.data is None else len(part.data)
        if offset < position + size:
            if part.edit is not None:
                return f", in tensor {part.edit.tensor.name!r}, which is scaled"
            if part.data is not None:
                return ", in the header"
            return f", which is copied from byte {part.start + offset - position} of the source"
        position += size
    return ""


def _first_bytes(file: PlannedFile, plan: Plan, source: Source) -> bytes:
    if file.name in plan.new_headers:
        return plan.new_headers[file.name].patches[0].data or b""
    length = header_length(source.read(file.name, 0, LENGTH_BYTES), file.size or 0, file.name)
    return source.read(file.name, 0, LENGTH_BYTES + length)


def _differs(offset: int, where: str = "") -> str:
    return f"differs from the plan at byte {offset}{where}"


def _equal(one: memoryview, other: memoryview) -> bool:
    """Compare in numpy, which is 15 times as fast as memoryviews are, and lets threads run."""
    import numpy as np

    return bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))


def _first_difference(found: bytes | memoryview, wanted: bytes | memoryview) -> int:
    import numpy as np

    shorter = min(len(found), len(wanted))
    one, other = (np.frombuffer(data, np.uint8)[:shorter] for data in (found, wanted))
    different = one != other
    return int(different.argmax()) if different.any() else shorter
