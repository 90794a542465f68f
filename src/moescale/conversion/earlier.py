"""What a destination says of itself: the options of its output, or of its unfinished run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescale.errors import MoescaleError, VerificationError
from moescale.options import RUN, Options, is_calibration
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.factors import KnownFactors
from moescale.planning.plan import Plan
from moescale.planning.provenance import options_given
from moescale.storage.base import Destination, Source


def earlier(destination: Destination) -> Any:
    """The job of an unfinished run, or the provenance of an output; None where there is neither."""
    if (job := destination.unfinished_job()) is not None:
        return job
    said = destination.read_provenance()
    return None if said is None else provenance.decode(said)


def options_there(destination: Destination) -> Options | None:
    """The options that the destination was made with, where it says so."""
    return provenance.made_with(earlier(destination))


def in_first_words(plan: Plan, source: Source, destination: Destination) -> Plan:
    """The plan as it was asked for at first, where the destination holds the same in other words.

    Two runs are the same job when they decide the same. Card and provenance hold the words of the
    options too, and keep those of the first run.
    """
    found = earlier(destination)
    if not provenance.same_decisions(found, plan):
        return plan
    options = provenance.made_with(found)
    if options is None or options_given(options) == options_given(plan.options):
        return plan
    sampled = options.rule in RUN
    if sampled and not is_calibration(found.get("calibration")):
        return plan
    try:
        again = make_plan(
            source,
            options,
            plan.destination,
            known=KnownFactors(plan.factors, plan.router_scales) if sampled else None,
        )
    except MoescaleError:  # words that anybody may have written
        return plan
    if sampled:
        again = replace(again, calibration=found["calibration"])
    same = provenance.decided(again) == provenance.decided(plan)
    return replace(again, warnings=plan.warnings, view=plan.view) if same else plan


def check_same_job(plan: Plan, destination: Destination) -> None:
    """Refuse to prove an output against a plan that it was not made with.

    Raises:
        VerificationError: with what it was made with.
    """
    found = earlier(destination)
    words = provenance.in_words(found)
    if words is None or provenance.same_decisions(found, plan):
        return
    now = provenance.provenance(plan, {})
    if any(found.get(key) != now[key] for key in ("moescale", "source")):
        return  # another version or source: the bytes tell
    if found.get("options") == now["options"]:
        return  # the source has other files than it had: the bytes tell
    rule = found.get("rule")
    by_default = "" if "rule=" in words or not isinstance(rule, str) else f" ({rule}, by default)"
    raise VerificationError(
        f"{destination.identity}: was made with {words}{by_default}",
        hint="Verify it with these options, or with none: they are taken from there.",
    )
