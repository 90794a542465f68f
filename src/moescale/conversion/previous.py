"""What a destination records about its previous run, finished or not."""

from __future__ import annotations

from dataclasses import replace

from moescale.errors import MoescaleError, VerificationError
from moescale.options import RUN_RULES, Options
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.factors import KnownFactors
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun
from moescale.storage.base import Destination, Source


def previous_run(destination: Destination) -> PreviousRun | None:
    """The record of the unfinished run, or that of the output; None if there is neither."""
    if (job := destination.unfinished_job()) is not None:
        return provenance.decode_job(job)
    recorded = destination.read_provenance()
    return None if recorded is None else provenance.decode(recorded)


def previous_options(destination: Destination) -> Options | None:
    """The options that the destination was made with, if it records them."""
    found = previous_run(destination)
    return None if found is None else found.options


def with_original_options(plan: Plan, source: Source, found: PreviousRun | None) -> Plan:
    """The plan with the options of the previous run, if that made an equal plan.

    Two runs with the same decisions are the same job, even if their options differ. Card and
    provenance state the options; this keeps those of the first run.
    """
    if found is None or found.options in (None, plan.options):
        return plan
    sampled = found.options.rule in RUN_RULES
    if (sampled and not found.calibration) or not provenance.same_decisions(found, plan):
        return plan
    try:
        again = make_plan(
            source,
            found.options,
            plan.location,
            known=KnownFactors(plan.factors, plan.router_scales) if sampled else None,
        )
    except MoescaleError:  # anybody may have edited the recorded options
        return plan
    if sampled:
        again = replace(again, calibration=found.calibration)
    same = provenance.decided(again) == provenance.decided(plan)
    return replace(again, warnings=plan.warnings, view=plan.view) if same else plan


def check_same_job(plan: Plan, found: PreviousRun | None, destination: Destination) -> None:
    """Refuse to verify an output against options that it was not made with.

    Raises:
        VerificationError: names the options that it was made with.
    """
    if found is None or not found.finished or found.options in (None, plan.options):
        return
    if not provenance.same_source(found, plan) or provenance.same_decisions(found, plan):
        return  # comparing the bytes decides
    words = provenance.in_words(found.options)
    by_default = "" if "rule=" in words or found.rule is None else f" ({found.rule}, by default)"
    raise VerificationError(
        f"{destination.identity}: was made with {words}{by_default}",
        hint="Verify it with these options, or with none: then its own are used.",
    )
