"""What a destination records about its previous run, finished or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescale.errors import MoescaleError, VerificationError
from moescale.options import RUN_RULES, Options, is_calibration
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.factors import KnownFactors
from moescale.planning.plan import Plan
from moescale.planning.provenance import options_given
from moescale.storage.base import Destination, Source


def previous_run(destination: Destination) -> Any:
    """The job of an unfinished run, or the provenance of an output; None if there is neither."""
    if (job := destination.unfinished_job()) is not None:
        return job
    recorded = destination.read_provenance()
    return None if recorded is None else provenance.decode(recorded)


def previous_options(destination: Destination) -> Options | None:
    """The options that the destination was made with, if it records them."""
    return provenance.made_with(previous_run(destination))


def with_original_options(plan: Plan, source: Source, destination: Destination) -> Plan:
    """The plan with the options of the previous run, if the destination holds an equal plan.

    Two runs with the same decisions are the same job, even if their options differ. Card and
    provenance state the options; this keeps those of the first run.
    """
    found = previous_run(destination)
    if not provenance.same_decisions(found, plan):
        return plan
    options = provenance.made_with(found)
    if options is None or options_given(options) == options_given(plan.options):
        return plan
    sampled = options.rule in RUN_RULES
    if sampled and not is_calibration(found.get("calibration")):
        return plan
    try:
        again = make_plan(
            source,
            options,
            plan.location,
            known=KnownFactors(plan.factors, plan.router_scales) if sampled else None,
        )
    except MoescaleError:  # anybody may have edited the recorded options
        return plan
    if sampled:
        again = replace(again, calibration=found["calibration"])
    same = provenance.decided(again) == provenance.decided(plan)
    return replace(again, warnings=plan.warnings, view=plan.view) if same else plan


def check_same_job(plan: Plan, destination: Destination) -> None:
    """Refuse to verify an output against options that it was not made with.

    Raises:
        VerificationError: names the options that it was made with.
    """
    found = previous_run(destination)
    words = provenance.in_words(found)
    if words is None or provenance.same_decisions(found, plan):
        return
    now = provenance.provenance(plan, {})
    if any(found.get(key) != now[key] for key in ("moescale", "source")):
        return  # another version or source: comparing the bytes decides
    if found.get("options") == now["options"]:
        return  # other files in the source: comparing the bytes decides
    rule = found.get("rule")
    by_default = "" if "rule=" in words or not isinstance(rule, str) else f" ({rule}, by default)"
    raise VerificationError(
        f"{destination.identity}: was made with {words}{by_default}",
        hint="Verify it with these options, or with none: then its own are used.",
    )
