"""Plans by rules that run the model; measurements of an earlier run are reused."""

from __future__ import annotations

from dataclasses import replace

from moescale.calibrate.calibration import Calibration, needed_files
from moescale.calibrate.devices import check_installed
from moescale.conversion.previous import previous_run
from moescale.conversion.status import status_of
from moescale.errors import UsageError
from moescale.factors.samples import Moments, Sample
from moescale.families.find import Moe
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.experts import Experts
from moescale.planning.factors import Findings
from moescale.planning.plan import Plan
from moescale.planning.provenance import PreviousRun, same_source
from moescale.planning.rule import ScalableParts
from moescale.storage.base import Destination, Source
from moescale.storage.location import Location


def has_measured(found: PreviousRun | None, trial: Plan) -> bool:
    """Whether a run of this job, unfinished or finished, has measured the factors.

    `trial` is a plan with arbitrary factors. Two machines may differ in a digit of a measured
    factor, so a run keeps the factors with which it began.
    """
    if found is None or found.known is None or not found.calibration:
        return False
    if found.options != trial.options or not same_source(found, trial):
        return False
    layers, scaled = (values.keys() for values in (found.known.factors, found.known.router_scales))
    if layers != trial.factors.keys() or (scaled and scaled != layers):
        return False
    text, generated = trial.options.calibrate, found.calibration.get("own") is True
    return generated if text is None else bool(found.calibration["text_sha256"] == text)


def _placeholder_factors(moe: Moe, experts: Experts, _: ScalableParts | None) -> Findings:
    """Samples for a plan before the measurement.

    Their factor is not a power of two, so that formats which need one are refused now.
    """
    some = Sample(Moments(1, 1.0, 1.0, norm=5.0), Moments(1, 1.0, 1.0, norm=4.0))
    return Findings(dict.fromkeys(moe.layers, some))


def measured_plan(
    source: Source,
    options: Options,
    location: Location | None,
    calibration: Calibration,
    destination: Destination | None = None,
    overwrite: bool | None = None,
) -> Plan:
    """A plan with measured factors, or with those of the same job at the destination.

    Args:
        source: the checkpoint; one on the Hub is downloaded into the Hub's cache.
        options: the user's options.
        location: the location of the output.
        calibration: the text.
        destination: may have the measurement of an earlier run.
        overwrite: the option of the run that follows; None if none follows. A run that would be
            refused is refused before measuring; one that starts over measures again.

    Raises:
        MoescaleError: see `make_plan`, `status_of` and `moescale.calibrate.measure`.
    """
    plan = trial = make_plan(source, options, location, _placeholder_factors)
    found = previous_run(destination) if destination is not None else None
    measured = found if has_measured(found, trial) else None
    if measured is not None:
        plan = make_plan(source, options, location, known=measured.known)
        plan = replace(plan, calibration=measured.calibration)
    status = ""
    if destination is not None and overwrite is not None:
        status = status_of(plan, source, destination, found, overwrite)
    if measured is not None and status not in ("new", "replace"):
        return _with_unwritten_text(plan) if calibration.keep is not None else plan
    if options.calibrate is not None and calibration.text is None:
        raise UsageError(
            f"--rule {options.rule} needs the text of the earlier run again",
            hint="Give it with --calibrate FILE.",
        )
    check_installed(f"--rule {options.rule}")
    calibration.folder = source.local_folder(needed_files(trial))
    plan = make_plan(source, options, location, calibration)
    return replace(plan, calibration=calibration.facts)


def _with_unwritten_text(plan: Plan) -> Plan:
    why = "--calibrate-out: not written, because the factors come from the earlier run"
    return replace(plan, warnings=(*plan.warnings, why))
