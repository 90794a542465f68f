"""Verifies a finished output, and rewrites files of it that differ."""

from __future__ import annotations

from moescale.conversion.executor import Pool
from moescale.conversion.previous import previous_run
from moescale.conversion.run import fill_digests, run
from moescale.conversion.verify import verify_files
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun, same_decisions
from moescale.results import Status
from moescale.storage.base import Destination, Phase, Progress, Source


def may_repair(plan: Plan, destination: Destination, found: PreviousRun | None) -> bool:
    """Whether the destination holds an output of the same plan, perhaps damaged."""
    if found is None or not found.finished:
        return False
    return destination.keeps_files and same_decisions(found, plan)


def repair(
    plan: Plan,
    source: Source,
    destination: Destination,
    jobs: int,
    progress: Progress,
    phase: Phase,
    pool: Pool,
) -> Status:
    """Rewrite the files of a finished output that differ, and verify them."""
    output, sizes = destination.open_output(), plan.large_sizes
    phase("verifying", sizes)
    proof = verify_files(plan, source, output, jobs=jobs, progress=progress, pool=pool)
    if not proof.differences:
        fill_digests(destination, plan, proof.written, output)
        return "done"
    keep = {name: file for name, file in proof.written.items() if name in sizes}
    phase("writing", sizes)
    run(
        plan,
        source,
        destination,
        previous_run(destination),
        jobs=jobs,
        overwrite=True,
        keep=keep,
        progress=progress,
        pool=pool,
    )
    again, only = destination.open_output(), sizes.keys() - keep.keys()
    phase("verifying", {name: sizes[name] for name in only})
    repaired = verify_files(plan, source, again, jobs=jobs, only=only, progress=progress, pool=pool)
    repaired.raise_if_different()
    fill_digests(destination, plan, {**repaired.written, **keep}, again)
    return "repair"


def verify_output(
    plan: Plan,
    source: Source,
    destination: Destination,
    jobs: int,
    progress: Progress,
    pool: Pool,
) -> None:
    """Verify a finished output, and add the digests to its provenance."""
    output = destination.open_output()
    proof = verify_files(plan, source, output, jobs=jobs, progress=progress, pool=pool)
    proof.raise_if_different()
    fill_digests(destination, plan, proof.written, output)
