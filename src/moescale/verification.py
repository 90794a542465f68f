"""Proves an output: reads source and output again and compares them with the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from moescale import provenance
from moescale.checkpoint.rewrite import PIECE, Segment, expected
from moescale.conversion import small_files
from moescale.errors import SourceError, VerificationError
from moescale.files import PROVENANCE, PlannedFile
from moescale.parallel import Check, each
from moescale.planning import Plan
from moescale.repos.base import Progress, Source, Written


def verify(
    plan: Plan,
    source: Source,
    output: Source,
    *,
    jobs: int,
    progress: Progress = lambda name, size: None,
) -> dict[str, Written]:
    """Compare every byte of the output with what the plan says.

    Returns:
        Size and SHA-256 of every file of the output, but the provenance.

    Raises:
        VerificationError: at the first difference, with file, tensor and offset.
    """
    small = small_files(plan, source)
    _check_names(plan, output, small)

    files = {file.name: file for file in plan.large_files}

    def one(name: str, check: Check) -> Written:
        def advance(size: int) -> None:
            check()
            progress(name, size)

        return _verify_large(files[name], plan, source, output, advance)

    large = dict(each(list(files), one, jobs))
    written = large | {name: _verify_small(name, data, output) for name, data in small.items()}
    _check_provenance(plan, output, written)
    return written


def _check_names(plan: Plan, output: Source, small: Mapping[str, bytes]) -> None:
    wanted = {f.name for f in plan.large_files} | small.keys() | {PROVENANCE}
    try:
        found = output.files().keys()
    except SourceError as error:
        raise VerificationError(f"the output cannot be read: {error.message}") from None
    if missing := sorted(wanted - found):
        raise VerificationError(f"{missing[0]}: is missing from the output")
    if surplus := sorted(found - wanted - {".gitattributes"}):  # the Hub makes one
        raise VerificationError(f"{surplus[0]}: does not belong into the output")


def _verify_small(name: str, wanted: bytes, output: Source) -> Written:
    found = output.read(name)
    if found != wanted:
        offset = _first_difference(memoryview(found), memoryview(wanted))
        raise VerificationError(f"{name}: differs from what the plan says, first at byte {offset}")
    return Written(len(found), hashlib.sha256(found).hexdigest())


def _check_provenance(plan: Plan, output: Source, written: Mapping[str, Written]) -> None:
    wanted = provenance.provenance(plan, written)
    found = provenance.decode(output.read(PROVENANCE))
    if not provenance.same_job(found, wanted):
        raise VerificationError(f"{PROVENANCE}: does not say what was done")
    for entry in found["files"]:
        if entry["sha256"] not in (None, written[entry["name"]].sha256):
            raise VerificationError(f"{entry['name']}: its SHA-256 is not the one noted")


def _verify_large(
    file: PlannedFile, plan: Plan, source: Source, output: Source, advance: Callable[[int], None]
) -> Written:
    size, found_size = plan.output_size(file), output.files()[file.name].size
    if size != found_size:
        raise VerificationError(f"{file.name}: has {found_size} bytes instead of {size}")
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2 * PIECE))
    position = 0
    with source.open(file.name) as original, output.open(file.name) as copy:
        for part, wanted in expected(original, plan.segments(file)):
            if len(wanted) > len(buffer):
                buffer = memoryview(bytearray(len(wanted)))
            found = buffer[: len(wanted)]
            copy.read_into(found, position)
            if found != wanted:
                raise _difference(file.name, part, position, found, wanted)
            digest.update(found)
            position += len(wanted)
            advance(len(wanted))
    return Written(size, digest.hexdigest())


def _difference(
    name: str, part: Segment, start: int, found: memoryview, wanted: memoryview
) -> VerificationError:
    offset = start + _first_difference(found, wanted)
    where = f"in tensor {part.edit.tensor.name!r}" if part.edit else "outside the planned tensors"
    return VerificationError(f"{name}: differs from the plan at byte {offset}, {where}")


def _first_difference(found: memoryview, wanted: memoryview) -> int:
    pairs = enumerate(zip(found, wanted, strict=False))
    shorter = min(len(found), len(wanted))
    return next((i for i, (one, other) in pairs if one != other), shorter)
