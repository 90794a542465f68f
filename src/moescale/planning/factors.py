"""How much: the factor of each MoE layer, by the rule or as the user gave it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moescale.errors import UnsupportedError, UsageError
from moescale.model.experts import Layer
from moescale.model.lookup import Moe
from moescale.options import Options
from moescale.planning.plan import Experts
from moescale.rules import closed_form, gates, measured
from moescale.rules.samples import Sample


def choose_factors(
    moe: Moe,
    experts: Experts,
    options: Options,
    samples: Mapping[Layer, Sample],
    noted: Mapping[str, float] | None,
) -> dict[Layer, float]:
    """What each MoE layer is multiplied by; `noted` takes the place of a measurement.

    Raises:
        UsageError: the factors that the user gave do not cover the layers.
        UnsupportedError: the rule needs to know how the router weighs, and that is not known.
    """
    layers = moe.layers
    if (given := options.factors if noted is None else noted) is not None:
        return _given_factors(layers, given)
    match options.method:
        case "gates":
            return {layer: gates.factor(samples[layer], options.rho or 0.0) for layer in layers}
        case "measured":
            return {layer: measured.factor(samples[layer]) for layer in layers}
    return {layer: _factor(moe, experts, options, layer) for layer in layers}


def _given_factors(layers: Sequence[Layer], given: Mapping[str, float]) -> dict[Layer, float]:
    names = {str(layer) for layer in layers}
    where = f"--factors {getattr(given, 'file', '')}".rstrip()
    surplus = sorted(given.keys() - names)
    more = f" has a factor for layer {surplus[0]}, which is no MoE layer" if surplus else ""
    if missing := [str(layer) for layer in layers if str(layer) not in given]:
        raise UsageError(
            f"{where} has no factor for layer {missing[0]} ({len(missing)} of {len(layers)}"
            f" MoE layers are missing){', and' if more else ''}{more}"
        )
    if surplus:
        raise UsageError(f"{where}{more}")
    return {layer: given[str(layer)] for layer in layers}


def _factor(moe: Moe, experts: Experts, options: Options, layer: Layer) -> float:
    n, _, m = experts.at(layer)
    match options.method:
        case "factor":
            assert options.factor is not None
            return options.factor
        case "published":
            return closed_form.published(n, m)
        case "preserve":
            if moe.router is None:
                raise UnsupportedError(
                    f"model type {moe.model_type!r}: how its router weighs experts is not known",
                    hint="Use --arch with a type that routes alike, --factor, or --rule published.",
                )
            return closed_form.preserve(n, m, moe.router.balanced_weight, options.rho or 0.0)
        case _:
            return 1.0


def of_another_job(
    made_for: Mapping[str, Any], moe: Moe, experts: Experts, options: Options
) -> Iterator[str]:
    """What the file of the factors says of its job that is not so in this one."""
    if not made_for:
        return
    then = made_for.get("experts", {})
    both = {
        "-n": (then.get("trained"), experts.trained),
        "-k": (then.get("to"), experts.after),
        "--gate-scale": (made_for.get("gate_scale", 1.0), options.gate_scale or 1.0),
        "model type": (made_for.get("model_type"), moe.model_type),
    }
    for what, (old, new) in both.items():
        now = list(new) if isinstance(new, tuple) else new  # JSON has no tuples
        if old is not None and old != now:
            yield f"--factors were made with {what} {old}, this run has {now}"


def one_factor(factors: Mapping[Layer, float], options: Options) -> float:
    """The factor of all layers; a config and a residual stream have one for them."""
    if len(set(factors.values())) > 1:
        raise UsageError(
            f"--fold {options.fold} takes one factor for all layers, these differ by layer"
        )
    return next(iter(factors.values()))


def closed_forms(moe: Moe, experts: Experts, options: Options) -> dict[str, dict[str, float]]:
    """What each rule would multiply each layer by; nothing where the router is not known."""
    if moe.router is None:
        return {}
    weight, rho = moe.router.balanced_weight, options.rho or 0.0
    counts = {str(layer): experts.at(layer) for layer in moe.layers}
    return {
        "none": dict.fromkeys(counts, 1.0),
        "preserve": {
            at: closed_form.preserve(n, m, weight, rho) for at, (n, _, m) in counts.items()
        },
        "published": {at: closed_form.published(n, m) for at, (n, _, m) in counts.items()},
    }
