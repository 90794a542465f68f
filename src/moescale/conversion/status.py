"""The state of the destination: what a run finds there, and whether it may go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from moescale.conversion.small_files import record_of, small_files
from moescale.errors import DestinationError
from moescale.planning import provenance
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun
from moescale.results import Status
from moescale.storage.base import Destination, FileRecord, Source
from moescale.storage.location import Location
from moescale.version import __version__

SmallFiles = Callable[[], Mapping[str, bytes]]
"""Returns the small files of the output, as `small_files` does."""


def status_of(
    plan: Plan, source: Source, destination: Destination, found: PreviousRun | None, overwrite: bool
) -> Status:
    """What the run finds at the destination, and will do.

    Args:
        plan: the plan.
        source: the checkpoint.
        destination: where the output goes.
        found: the record of the previous run there.
        overwrite: replace any existing content.

    Raises:
        DestinationError: the destination has other content, and `overwrite` is false.
    """
    if found is not None and not found.finished:
        wanted = provenance.job(plan)
        if found.content == wanted:
            return "resume"
        difference = provenance.job_difference(found, wanted)
        return _status_if_replaceable(
            destination, overwrite, f"holds an unfinished run of {difference}"
        )
    existing = destination.existing()
    if not existing:
        return "new"
    small = cache(partial(small_files, plan, source))  # read at most once
    same_job = found is not None and _is_output(plan, found, small)
    complete = _is_complete(plan, destination, existing, small) and bool(same_job or small())
    if same_job or complete:
        if overwrite:
            return "replace"
        if not (same_job and complete):
            return "changed"
        finished = destination.changed_at(plan.provenance_file)
        return "done" if source.last_changed() <= finished else "stale"
    if not overwrite and found is not None and _has_same_options(plan, found):
        return "outdated"
    why = _describe_existing(plan, found, existing)
    return _status_if_replaceable(destination, overwrite, why)


def check_status(status: Status, destination: Location) -> None:
    """Refuse an output of this job if source or output may have changed since.

    Raises:
        DestinationError: names the change.
    """
    if status == "stale":
        raise DestinationError(
            f"{destination}: is an output of this job, but the source is newer",
            hint="--verify shows whether it is still correct; --overwrite writes it again.",
        )
    if status == "changed":
        raise DestinationError(
            f"{destination}: is an output of this job, but was changed since",
            hint="--verify shows where; --overwrite writes it again.",
        )
    if status == "outdated":
        raise DestinationError(
            f"{destination}: was made with the same options, but from other files than the source"
            " has now",
            hint="--verify names the files that differ; --overwrite writes it again.",
        )


def _has_same_options(plan: Plan, found: PreviousRun) -> bool:
    """Whether it was made with the same options from other files of this source."""
    return provenance.same_source(found, plan) and found.options == plan.options


def _describe_existing(plan: Plan, found: PreviousRun | None, existing: Mapping[str, int]) -> str:
    if found is None:
        some = ", ".join(sorted(existing)[:3])
        return f"is not empty ({some}{', ...' if len(existing) > 3 else ''})"
    if found.version not in (None, __version__):
        return f"holds an output of moescale {found.version[:20]}; this is {__version__}"
    name = found.source.get("id")
    if not isinstance(name, str) or found.options is None:
        return "holds another output of moescale"
    existing_job = provenance.described(found.options, str(found.rule)[:20])
    new_job = provenance.described(plan.options, plan.rule)
    this = new_job if name == plan.source.name else f"{plan.source.name} with {new_job}"
    return f"holds {name} with {existing_job}; this run has {this}"


def _status_if_replaceable(destination: Destination, overwrite: bool, why: str) -> Status:
    what = "--overwrite to replace its content"
    try:
        destination.check_replaceable()
    except DestinationError:
        if overwrite:
            raise
        what = "empty this one"
    if overwrite:
        return "replace"
    verify = (
        "; --verify without other options verifies it"
        if destination.read_provenance() is not None
        else ""
    )
    hint = f"Give another destination, or {what}{verify}."
    raise DestinationError(f"{destination.identity}: {why}", hint=hint)


def _is_output(plan: Plan, found: PreviousRun, small: SmallFiles) -> bool:
    """Whether a provenance is that of this job."""
    sizes = {f.name: FileRecord(plan.output_size(f)) for f in plan.large_files}
    others = {name: record_of(data) for name, data in small().items()}
    return provenance.same_job(found, provenance.provenance(plan, {**sizes, **others}))


def _is_complete(
    plan: Plan, destination: Destination, existing: Mapping[str, int], small: SmallFiles
) -> bool:
    """Whether all files exist: large ones with the right size, small ones with the right bytes."""
    if any(existing.get(f.name) != plan.output_size(f) for f in plan.large_files):
        return False
    if any(existing.get(name) != len(data) for name, data in small().items()):
        return False
    return all(destination.read_existing(name) == data for name, data in small().items())
