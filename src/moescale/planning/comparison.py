"""The effect of each rule on each MoE layer, as far as a plan knows it; every report shows it.

It has the factors of all rules that can be computed, and the norm of the routed output with each,
relative to the model as trained. The norm is measured if experts were run, for this plan or for
recorded factors; else it is predicted from sampled gate weights, or from the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moescale.factors import gates, measured
from moescale.factors.samples import Sample, geometric_mean

ByLayer = float | dict[str, float]
"""One number for all layers, or one for each layer if they differ."""

Basis = Literal["measured", "noted", "sampled", "balanced", "unknown"]
"""The origin of the norms."""

BASES: Mapping[Basis, str] = {
    "measured": "measured",
    "noted": "measured earlier",
    "sampled": "from sampled gates",
    "balanced": "if the gate is balanced",
    "unknown": "unknown",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rules side by side.

    Attributes:
        layers: names of the MoE layers.
        taken: the rule of the plan; ``own`` if the user gave factors.
        factors: the factor of each layer, by rule; ``none`` is the config edit alone.
        norms: the relative norm in each layer, by rule; empty if unknown.
        basis: the origin of the norms.
        edit: the change without any factor, in words.
    """

    layers: tuple[str, ...]
    taken: str
    factors: Mapping[str, tuple[float, ...]]
    norms: Mapping[str, tuple[float, ...]]
    basis: Basis
    edit: str

    def name(self, rule: str) -> str:
        """The name of a rule in reports."""
        return {"none": self.edit, "own": "given"}.get(rule, rule)

    def norm(self, rule: str) -> ByLayer:
        """The relative norm with a rule: one number, or one for each layer if they differ."""
        return collapse_equal(dict(zip(self.layers, self.norms[rule], strict=True)))

    @property
    def warning(self) -> str | None:
        """A warning if the chosen rule is worse than the config edit, by the predicted norms."""
        norms, none = self.norms.get(self.taken), self.norms.get("none")
        if norms is None or none is None or self.taken == "own" or _far(norms) <= _far(none):
            return None
        return (
            f"--rule {self.taken} does not help: it moves the norm of the routed output further"
            f" from the trained one (x {geometric_mean(norms):.3f}) than the {self.edit} (x"
            f" {geometric_mean(none):.3f})"
        )


def _far(norms: Sequence[float]) -> float:
    """The mean distance from 1, in logarithms, rounded so that equal norms compare as equal."""
    return round(sum(abs(math.log(norm)) for norm in norms) / len(norms), 9)


def compare(
    taken: str,
    factors: Mapping[str, float],
    alternatives: Mapping[str, ByLayer],
    samples: Mapping[str, Sample],
    rho: float,
    edit: str,
    scaled_routers: bool = False,
) -> Comparison:
    """Every rule that can be computed from what a plan knows.

    Args:
        taken: the rule of the plan, ``factor`` or ``factors``.
        factors: the factor of each layer.
        alternatives: the closed forms.
        samples: the samples of each layer; may be empty.
        rho: correlation of expert outputs.
        edit: the change without any factor, in words.
        scaled_routers: whether the plan scales each router by its own number.
    """
    layers = tuple(factors)
    taken = "own" if taken in ("factor", "factors") else taken
    found = {"none": (1.0,) * len(layers)}
    found |= {name: _by_layer(form, layers) for name, form in alternatives.items()}
    sampled = [samples[layer] for layer in layers] if samples else []
    if sampled:
        found["gates"] = tuple(gates.factor(sample, rho) for sample in sampled)
    if sampled and all(sample.before.norm and sample.after.norm for sample in sampled):
        found["measured"] = tuple(measured.factor(sample) for sample in sampled)
    found[taken] = tuple(factors.values())
    edited, basis = _edited(found, bool(sampled))
    norms = {
        name: tuple(f * norm for f, norm in zip(by_layer, edited, strict=True))
        for name, by_layer in found.items()
        if edited
    }
    if scaled_routers and taken == "fitted":
        norms[taken] = (1.0,) * len(layers)  # its factors keep the trained norm
    elif scaled_routers:
        norms.pop(taken, None)
    return Comparison(layers, taken, found, norms, basis, edit)


def collapse_equal(by_layer: Mapping[str, float]) -> ByLayer:
    """One number if it is the same for all layers, else the mapping."""
    values = set(by_layer.values())
    return values.pop() if len(values) == 1 else dict(by_layer)


def _by_layer(value: ByLayer, layers: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(value[layer] if isinstance(value, dict) else value for layer in layers)


def _edited(
    factors: Mapping[str, tuple[float, ...]], sampled: bool
) -> tuple[tuple[float, ...], Basis]:
    """The relative norm of each layer with the config edit alone, and the origin of these norms.

    It is the inverse of the factor that restores the norm.
    """
    bases: tuple[tuple[str, Basis], ...] = (
        ("measured", "measured" if sampled else "noted"),
        ("gates", "sampled"),
        ("preserve", "balanced"),
    )
    for rule, basis in bases:
        if rule in factors:
            return tuple(1 / factor for factor in factors[rule]), basis
    return (), "unknown"
