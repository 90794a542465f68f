"""The state of the destination: what a run finds there, and whether it may go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from moescale.conversion.small_files import record_of, small_files
from moescale.errors import DestinationError
from moescale.planning import provenance
from moescale.planning.plan import Plan
from moescale.results import Status
from moescale.storage.base import Destination, FileRecord, Source
from moescale.storage.location import Location
from moescale.version import __version__

SmallFiles = Callable[[], Mapping[str, bytes]]
"""Returns the small files of the output, as `small_files` does."""


def status_of(plan: Plan, source: Source, destination: Destination, overwrite: bool) -> Status:
    """What the run finds at the destination, and will do.

    Raises:
        DestinationError: the destination has other content, and `overwrite` is false.
    """
    unfinished = destination.unfinished_job()
    if unfinished is not None:
        wanted = provenance.job(plan)
        if unfinished == wanted:
            return "resume"
        difference = provenance.job_difference(unfinished, wanted)
        return _status_if_replaceable(
            destination, overwrite, f"holds an unfinished run of {difference}"
        )
    existing = destination.existing()
    if not existing:
        return "new"
    small = cache(partial(small_files, plan, source))  # read at most once
    same_job = _is_output(plan, destination, small)
    complete = _is_complete(plan, destination, existing, small) and bool(same_job or small())
    if same_job or complete:
        if overwrite:
            return "replace"
        if not (same_job and complete):
            return "changed"
        return "done" if source.last_changed() <= destination.changed_at(plan.record) else "stale"
    if not overwrite and _has_same_options(plan, destination):
        return "outdated"
    return _status_if_replaceable(
        destination, overwrite, _describe_existing(plan, destination, existing)
    )


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


def _has_same_options(plan: Plan, destination: Destination) -> bool:
    """Whether the destination was made with the same options from other files of this source."""
    recorded = destination.read_provenance()
    found = None if recorded is None else provenance.decode(recorded)
    options = provenance.made_with(found)
    if found is None or options is None:
        return False
    now = provenance.provenance(plan, {})
    same = all(found.get(key) == now[key] for key in ("moescale", "source"))
    return same and provenance.options_given(options) == now["options"]


def _describe_existing(plan: Plan, destination: Destination, existing: Mapping[str, int]) -> str:
    if (recorded := destination.read_provenance()) is None:
        some = ", ".join(sorted(existing)[:3])
        return f"is not empty ({some}{', ...' if len(existing) > 3 else ''})"
    found = provenance.decode(recorded) or {}
    version, options = found.get("moescale"), provenance.made_with(found)
    if isinstance(version, str) and version != __version__:
        return f"holds an output of moescale {version[:20]}; this is {__version__}"
    source = found.get("source")
    name = source.get("id") if isinstance(source, dict) else None
    if not isinstance(name, str) or options is None:
        return "holds another output of moescale"
    rule = str(found.get("rule"))[:20]
    existing_job = provenance.described(options, rule)
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


def _is_output(plan: Plan, destination: Destination, small: SmallFiles) -> bool:
    """Whether the destination's provenance is that of this job."""
    if (recorded := destination.read_provenance()) is None:
        return False
    sizes = {f.name: FileRecord(plan.output_size(f)) for f in plan.large_files}
    others = {name: record_of(data) for name, data in small().items()}
    wanted = provenance.provenance(plan, {**sizes, **others})
    return provenance.same_job(provenance.decode(recorded), wanted)


def _is_complete(
    plan: Plan, destination: Destination, existing: Mapping[str, int], small: SmallFiles
) -> bool:
    """Whether all files exist: large ones with the right size, small ones with the right bytes."""
    if any(existing.get(f.name) != plan.output_size(f) for f in plan.large_files):
        return False
    if any(existing.get(name) != len(data) for name, data in small().items()):
        return False
    return all(destination.read_existing(name) == data for name, data in small().items())
