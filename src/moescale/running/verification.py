"""Proves an output: reads source and output again and compares them with the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moescale.checkpoint.header import LENGTH_BYTES, header_length, parse_header
from moescale.checkpoint.index import SUFFIX
from moescale.checkpoint.rewrite import PIECE, expected
from moescale.errors import CheckpointError, SourceError, VerificationError
from moescale.planning.files import PROVENANCE, PlannedFile
from moescale.planning.plan import Plan
from moescale.repos.base import Progress, Source, Written, io_errors
from moescale.running import provenance
from moescale.running.conversion import made_files, task_of
from moescale.running.parallel import Check, Count, Crew, Here, Task, each


def verify(
    plan: Plan,
    source: Source,
    output: Source,
    *,
    jobs: int,
    progress: Progress = lambda name, size: None,
    crew: Crew | None = None,
) -> dict[str, Written]:
    """Compare every byte of the output with what the plan says; `crew` reads the large files.

    Returns:
        Size and SHA-256 of every file of the output, but the provenance.

    Raises:
        VerificationError: at the first difference, with file, tensor and offset.
    """
    small = made_files(plan, source)
    large = {file.name for file in plan.large_files}
    files = {f.name: f for f in plan.files if f.name in large or _is_copied_index(f, plan)}
    _check_names({*files, *small, PROVENANCE}, output)
    crew = crew or Here()
    crew.check(source.only(files), output.only(files))

    def one(name: str, check: Check) -> Written:
        task, shown = task_of(files[name], plan), progress if name in large else _unseen
        found = crew.do(compare, task, source, output.only([name]), check, shown)
        if isinstance(found, int):
            raise _difference(name, found, _place(files[name], plan, source, found))
        return found

    written = dict(each(list(files), one, jobs, crew.cancel))
    written |= {name: _verify_small(name, data, output) for name, data in small.items()}
    _check_provenance(plan, output, written)
    return written


def _is_copied_index(file: PlannedFile, plan: Plan) -> bool:
    """An index is verified like a shard, since it may have many megabytes."""
    return plan.index == (file.name, None)


def _check_names(wanted: Collection[str], output: Source) -> None:
    try:
        found = output.files().keys()
    except SourceError as error:
        raise VerificationError(f"the output cannot be read: {error.message}") from None
    if missing := sorted(set(wanted) - found):
        raise VerificationError(f"{missing[0]}: is missing from the output")
    if surplus := sorted(found - set(wanted) - {".gitattributes"}):  # the Hub makes one
        raise VerificationError(f"{surplus[0]}: does not belong into the output")


def _verify_small(name: str, wanted: bytes, output: Source) -> Written:
    found = output.read(name)
    if found != wanted:
        raise _difference(name, _first_difference(found, wanted))
    return Written(len(found), hashlib.sha256(found).hexdigest())


def _check_provenance(plan: Plan, output: Source, written: Mapping[str, Written]) -> None:
    """Every byte is as it was made, but for digests, which may not be known yet."""
    data = output.read(PROVENANCE)
    noted = _noted_digests(provenance.decode(data))
    for name, digest in noted.items():
        if name in written and digest not in (None, written[name].sha256):
            raise VerificationError(f"{name}: its SHA-256 is not the one noted in {PROVENANCE}")
    large = {file.name for file in plan.large_files}

    def wanted(digests: Collection[str]) -> bytes:
        files = {n: w if n in digests else Written(w.size) for n, w in written.items()}
        return provenance.encode(provenance.provenance(plan, files))

    if data != wanted({name for name, digest in noted.items() if digest is not None}):
        usual = (wanted(written), wanted(written.keys() - large))
        raise _difference(PROVENANCE, max(_first_difference(data, one) for one in usual))


def _noted_digests(found: Any) -> dict[str, Any]:
    files = found.get("files") if isinstance(found, dict) else None
    entries = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return {f["name"]: f.get("sha256") for f in entries if isinstance(f.get("name"), str)}


def _unseen(name: str, size: int) -> None:
    """Progress that is not shown."""


def compare(
    task: Task, source: Source, output: Source, check: Check, progress: Count
) -> Written | int:
    """Compare one large file with what it has to be; the offset of the first difference, if any."""
    name, position = task.name, 0
    if (found_size := output.files()[name].size) != task.size:
        raise VerificationError(f"{name}: has {found_size} bytes instead of {task.size}")
    with (
        io_errors(name),
        source.open(name) as original,
        output.open(name) as copy,
        _Digest() as digest,
    ):
        for _, wanted in expected(original, task.segments):
            found = digest.buffer(len(wanted))
            copy.read_into(found, position)
            if not _equal(found, wanted):
                return position + _first_difference(found, wanted)
            digest.update(found)
            position += len(wanted)
            check()
            progress(len(wanted))
        return Written(task.size, digest.hexdigest())


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
        return ""
    try:
        first = _first_bytes(file, plan, source)
        header = parse_header(first[LENGTH_BYTES:], plan.output_size(file), file.name)
    except CheckpointError:  # a file of that name that is no shard
        return ""
    if offset < header.data_start:
        return ", in the header"
    name = next(t.name for t in header.tensors if t.start <= offset < t.stop)
    planned = any(t.edit.tensor.name == name for t in plan.changed_tensors)
    return f", in tensor {name!r}, which is {'scaled' if planned else 'copied'}"


def _first_bytes(file: PlannedFile, plan: Plan, source: Source) -> bytes:
    if file.name in plan.new_headers:
        return plan.new_headers[file.name].data
    length = header_length(source.read(file.name, 0, LENGTH_BYTES), file.size or 0, file.name)
    return source.read(file.name, 0, LENGTH_BYTES + length)


def _difference(name: str, offset: int, where: str = "") -> VerificationError:
    return VerificationError(f"{name}: differs from the plan at byte {offset}{where}")


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
