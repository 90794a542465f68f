"""Plans by rules that run the model; measurements of an earlier run are reused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moescale.calibrate.calibration import Calibration, needed_files
from moescale.calibrate.devices import check_installed
from moescale.conversion.status import status_of
from moescale.errors import UsageError
from moescale.factors.samples import Moments, Sample
from moescale.families.find import Moe
from moescale.options import Options, is_calibration
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.experts import Experts
from moescale.planning.factors import Findings, KnownFactors
from moescale.planning.plan import Plan
from moescale.planning.rule import ScalableParts
from moescale.storage.base import Destination, Source
from moescale.storage.location import Location


@dataclass(frozen=True, slots=True)
class PreviousMeasurement:
    """The measurement of an earlier run of the same job.

    Attributes:
        known: the factors, and router scales if any.
        calibration: the text, and how much of it was used.
    """

    known: KnownFactors
    calibration: Mapping[str, Any]


def previous_measurement(destination: Destination, trial: Plan) -> PreviousMeasurement | None:
    """The measurement of a run of this job at the destination, unfinished or finished.

    `trial` is a plan with arbitrary factors. Two machines may differ in a digit of a measured
    factor, so a run keeps the factors with which it began.
    """
    found, wanted = destination.unfinished_job(), provenance.job(trial)
    if found is not None:
        alike = ("version", "source", "options")
    elif (destination_text := destination.read_provenance()) is not None:
        found, wanted = provenance.decode(destination_text), provenance.provenance(trial, {})
        alike = ("moescale", "source", "options")
    if not isinstance(found, dict) or any(found.get(key) != wanted[key] for key in alike):
        return None
    calibration = found.get("calibration")
    factors: Any = found.get("factors")
    scales: Any = found.get("router_scales", {})
    if not _are_of_layers(factors, trial) or not (scales == {} or _are_of_layers(scales, trial)):
        return None
    if not is_calibration(calibration):
        return None
    wanted_text, generated = trial.options.calibrate, calibration.get("own") is True
    same = generated if wanted_text is None else calibration["text_sha256"] == wanted_text
    return PreviousMeasurement(KnownFactors(factors, scales), calibration) if same else None


def _are_of_layers(values: Any, plan: Plan) -> bool:
    """Whether the values are factors, one for each MoE layer."""
    if not isinstance(values, dict) or values.keys() != plan.factors.keys():
        return False
    return all(type(value) in (float, int) and 0 < value < 1e30 for value in values.values())


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
    found = previous_measurement(destination, trial) if destination is not None else None
    if found is not None:
        plan = make_plan(source, options, location, known=found.known)
        plan = replace(plan, calibration=found.calibration)
    status = ""
    if destination is not None and overwrite is not None:
        status = status_of(plan, source, destination, overwrite)
    if found is not None and status not in ("new", "replace"):
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
