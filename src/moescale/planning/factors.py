"""The factor of each MoE layer, from the rule or from the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moescale.errors import UnsupportedError, UsageError
from moescale.factors import closed_form, fitted, gates, measured
from moescale.factors.samples import Sample, geometric_mean, rounded
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.options import Options
from moescale.planning.experts import Experts


class Findings(NamedTuple):
    """The findings of a rule that sampled a model.

    Attributes:
        samples: by layer; may be empty.
        chosen_rule: the rule that the guard of ``fitted`` chose; ``fitted`` if there was no guard.
    """

    samples: Mapping[Layer, Sample]
    chosen_rule: str = "fitted"


class KnownFactors(NamedTuple):
    """Factors and router scales of an earlier run of the same job.

    Attributes:
        factors: multiplier of the routed output, by layer name.
        router_scales: multiplier of the router's logits, by layer name; empty if none changes.
    """

    factors: Mapping[str, float]
    router_scales: Mapping[str, float]


def choose_factors(
    rule: str,
    moe: Moe,
    experts: Experts,
    options: Options,
    findings: Findings,
    known: KnownFactors | None,
) -> dict[Layer, float]:
    """The factor of each MoE layer; `known` replaces a measurement.

    Raises:
        UsageError: the factors that the user gave do not cover the layers.
        UnsupportedError: the rule needs the router's normalisation, which is unknown.
    """
    layers, samples = moe.layers, findings.samples
    if (given := options.factors if known is None else known.factors) is not None:
        return _given(moe, given, "factor", getattr(options.factors, "file", ""))
    match findings.chosen_rule if rule == "fitted" else rule:
        case "gates":
            return {layer: gates.factor(samples[layer], options.rho or 0.0) for layer in layers}
        case "measured":
            return {layer: measured.factor(samples[layer]) for layer in layers}
        case "fitted":
            return {layer: fitted.factor(samples[layer]) for layer in layers}
        case plain:
            return {layer: _factor(plain, moe, experts, options, layer) for layer in layers}


def choose_scales(
    rule: str, moe: Moe, options: Options, findings: Findings, known: KnownFactors | None
) -> dict[Layer, float]:
    """The scale of each MoE layer's router; empty if none is scaled.

    Raises:
        UsageError: the scales that the user gave do not cover the layers.
    """
    layers = moe.layers
    if options.gate_scale is not None:
        return dict.fromkeys(layers, options.gate_scale)
    given = getattr(options.factors, "router_scales", {}) if known is None else known.router_scales
    if given:
        return _given(moe, given, "router scale", getattr(options.factors, "file", ""))
    if rule != "fitted" or findings.chosen_rule != "fitted" or known is not None:
        return {}
    scales = {layer: fitted.scale(findings.samples[layer]) for layer in layers}
    return scales if any(scale != 1.0 for scale in scales.values()) else {}


def averaged_for_fold(
    factors: Mapping[Layer, float], rule: str, options: Options
) -> tuple[dict[Layer, float], list[str]]:
    """A rule's factors, or their geometric mean and a remark if the fold takes only one."""
    ends = min(factors.values()), max(factors.values())
    if options.fold not in ("config", "residual") or rule not in BY_LAYER or ends[0] == ends[1]:
        return dict(factors), []
    mean = rounded(geometric_mean(factors.values()))
    return dict.fromkeys(factors, mean), [
        f"--fold {options.fold} takes one factor for all layers: {mean:g}, the geometric mean of"
        f" those of --rule {rule}, {ends[0]:g} to {ends[1]:g}"
    ]


BY_LAYER = ("gates", "measured")
"""Rules with a factor for each layer, which can be averaged."""


def _given(moe: Moe, given: Mapping[str, float], what: str, file: str) -> dict[Layer, float]:
    layers = moe.layers
    names = {str(layer) for layer in layers}
    aliases = {name: moe.layer_aliases.get(name, name) for name in given}
    given = {str(layer): given[name] for name, layer in aliases.items() if layer is not None}
    where = f"--factors {file}".rstrip()
    surplus = sorted(given.keys() - names)
    more = f" has a {what} for layer {surplus[0]}, which is not an MoE layer" if surplus else ""
    if missing := [str(layer) for layer in layers if str(layer) not in given]:
        raise UsageError(
            f"{where} has no {what} for layer {missing[0]} ({len(missing)} of {len(layers)}"
            f" MoE layers are missing){', and' if more else ''}{more}"
        )
    if surplus:
        raise UsageError(f"{where}{more}")
    return {layer: given[str(layer)] for layer in layers}


def _factor(rule: str, moe: Moe, experts: Experts, options: Options, layer: Layer) -> float:
    n, _, m = experts.at(layer)
    match rule:
        case "factor":
            assert options.factor is not None
            return options.factor
        case "published":
            return closed_form.published(n, m)
        case "preserve":
            if moe.config.normalisation is None:
                raise UnsupportedError(
                    f"model type {moe.model_type!r}: how its router weights experts is not known",
                    hint="Use --arch with a type whose router is the same, --factor, or --rule"
                    " published.",
                )
            return closed_form.preserve(
                n, m, moe.config.normalisation.balanced_weight, options.rho or 0.0
            )
        case _:
            return 1.0


def of_another_job(
    made_for: Mapping[str, Any], moe: Moe, experts: Experts, options: Options
) -> Iterator[str]:
    """Warnings about differences between the job of the ``--factors`` file and this one."""
    given = options.factors or {}
    scales = getattr(given, "router_scales", {})
    absent = sorted(n for n in {*map(str, given), *scales} if moe.layer_aliases.get(n, n) is None)
    if absent:
        yield (
            f"--factors has values for {', '.join(absent)}, MTP layers that this model does not"
            " have: they are left out"
        )
    if not made_for:
        return
    then = made_for.get("experts", {})
    gate = made_for.get("gate_scale", 1.0), options.gate_scale or 1.0
    both = {
        "-n": (then.get("trained"), experts.trained),
        "-k": (then.get("to"), experts.after),
        **({"--gate-scale": gate} if not scales else {}),
        "model type": (made_for.get("model_type"), moe.model_type),
    }
    for what, (old, new) in both.items():
        now = list(new) if isinstance(new, tuple) else new  # JSON has no tuples
        if old is not None and old != now:
            yield f"the values of --factors were made with {what} {old}, this run has {now}"


def one_factor(factors: Mapping[Layer, float], options: Options) -> float:
    """The factor of all layers, for a fold that takes only one.

    Raises:
        UsageError: the layers have different factors.
    """
    if len(set(factors.values())) > 1:
        raise UsageError(
            f"--fold {options.fold} needs one factor for all layers; these differ by layer"
        )
    return next(iter(factors.values()))


def closed_forms(moe: Moe, experts: Experts, options: Options) -> dict[str, dict[str, float]]:
    """The factors of each closed form; empty if the router is unknown."""
    if moe.config.normalisation is None:
        return {}
    weight, rho = moe.config.normalisation.balanced_weight, options.rho or 0.0
    counts = {str(layer): experts.at(layer) for layer in moe.layers}
    return {
        "none": dict.fromkeys(counts, 1.0),
        "preserve": {
            at: closed_form.preserve(n, m, weight, rho) for at, (n, _, m) in counts.items()
        },
        "published": {at: closed_form.published(n, m) for at, (n, _, m) in counts.items()},
    }
