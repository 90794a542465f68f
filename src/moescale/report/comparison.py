"""What each rule does to each MoE layer, as far as a plan knows: for people to look at.

Factors of all rules that can be computed, and the norm of the routed output with each, relative
to that of the model as it was trained. The norm is measured where experts were run, now or when
the factors were noted, predicted from the model's own gate weights where those were sampled, and
from the closed form elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moescale.planning.plan import ByLayer, Plan
from moescale.rules import gates, measured

Basis = Literal["measured", "noted", "sampled", "balanced", "unknown"]
"""Where the norms come from."""

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
        taken: the rule of the plan; ``own`` where the user gave the factors.
        factors: by rule, the factor of each layer; ``none`` is the config edit alone.
        norms: by rule, the relative norm in each layer; empty where nothing is known of it.
        basis: where the norms come from.
        edit: what is done without any factor, in words.
    """

    layers: tuple[str, ...]
    taken: str
    factors: Mapping[str, tuple[float, ...]]
    norms: Mapping[str, tuple[float, ...]]
    basis: Basis
    edit: str

    def name(self, rule: str) -> str:
        """What people call a rule."""
        return {"none": self.edit, "own": "given"}.get(rule, rule)


def compare(plan: Plan) -> Comparison:
    """Every rule that can be computed from what the plan knows."""
    layers = tuple(plan.factors)
    method = plan.options.method
    taken = "own" if method in ("factor", "factors") else method
    factors = {"none": (1.0,) * len(layers)}
    factors |= {name: _by_layer(form, layers) for name, form in plan.alternatives.items()}
    samples = [plan.samples[layer] for layer in layers] if plan.samples else []
    if samples:
        factors["gates"] = tuple(gates.factor(sample, plan.rho) for sample in samples)
    if samples and all(sample.before.norm and sample.after.norm for sample in samples):
        factors["measured"] = tuple(measured.factor(sample) for sample in samples)
    factors[taken] = tuple(plan.factors.values())
    edited, basis = _edited(factors, bool(samples))
    norms = {
        name: tuple(f * norm for f, norm in zip(found, edited, strict=True))
        for name, found in factors.items()
        if edited
    }
    edit = "config edit alone" if plan.options.gate_scale is None else "config edit and gate"
    return Comparison(layers, taken, factors, norms, basis, edit)


def _by_layer(value: ByLayer, layers: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(value[layer] if isinstance(value, dict) else value for layer in layers)


def _edited(
    factors: Mapping[str, tuple[float, ...]], sampled: bool
) -> tuple[tuple[float, ...], Basis]:
    """The relative norm of each layer with the config edit alone: what undoes it, inverted."""
    bases: tuple[tuple[str, Basis], ...] = (
        ("measured", "measured" if sampled else "noted"),
        ("gates", "sampled"),
        ("preserve", "balanced"),
    )
    for rule, basis in bases:
        if rule in factors:
            return tuple(1 / factor for factor in factors[rule]), basis
    return (), "unknown"
