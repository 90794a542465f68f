"""Decides everything: `make_plan` reads config, index and shard headers, and returns a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from moescale.checkpoint.header import Header
from moescale.errors import UnsupportedError
from moescale.model.experts import Layer
from moescale.model.lookup import Moe
from moescale.model.router import has_no_effect, largest_count
from moescale.options import Options
from moescale.planning.active import active
from moescale.planning.comparison import joined
from moescale.planning.factors import (
    choose_factors,
    closed_forms,
    of_another_job,
)
from moescale.planning.kinds import open_checkpoint
from moescale.planning.plan import Experts, Plan
from moescale.planning.tensors import (
    planned_tensors,
    sharpened_routers,
)
from moescale.repos.base import Source
from moescale.rules.samples import Sample

Sampler = Callable[[Moe, Experts], Mapping[Layer, Sample]]
"""Finds out what a rule wants to know of every MoE layer."""


def make_plan(
    source: Source,
    options: Options,
    destination: str | None = None,
    sampler: Sampler | None = None,
    noted: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Decide everything.

    Args:
        source: where the checkpoint is; its config, index and shard headers are read.
        options: what the user asked for.
        destination: what the user calls the place of the output, for the record.
        sampler: samples the layers for the rule ``measured``; ``gates`` needs none.
        noted: the factors of ``measured``, where an earlier run of the same job has them.
        progress: that of `sample_gates`.

    Raises:
        SourceError: the checkpoint is malformed, incomplete or cannot be rescaled so.
        UsageError: the factors do not cover the checkpoint's MoE layers.
    """
    checkpoint = open_checkpoint(source, options, destination)
    moe, tensors, headers = checkpoint.moe, checkpoint.tensors, checkpoint.headers
    warnings = [*source.remarks, *checkpoint.warnings]
    experts = _experts(moe, options)
    forms = closed_forms(moe, experts, options)
    if sampler is not None:
        samples = sampler(moe, experts)
    else:
        samples = _sampled_gates(source, moe, experts, options, headers, progress)
    factors = choose_factors(moe, experts, options, samples, noted)
    scaled = checkpoint.chosen(factors)
    made_for = getattr(options.factors, "made_for", {})
    warnings += [
        *checkpoint.remarks(scaled, factors, experts),
        *_remarks(options),
        *of_another_job(made_for, moe, experts, options),
    ]
    scaled += sharpened_routers(moe, tensors, options)
    used = active(tensors, moe.projections, moe.held, experts)
    planned = planned_tensors(scaled, headers)
    output = checkpoint.output(planned, factors, experts)
    plan = Plan(
        source=source.identity,
        destination=destination,
        options=options,
        model_type=moe.model_type,
        part=moe.architecture.part,
        experts=experts,
        router=moe.router,
        rho=options.rho or 0.0,
        factors=MappingProxyType({str(layer): factor for layer, factor in factors.items()}),
        alternatives=MappingProxyType(
            {name: joined(form) for name, form in forms.items() if name != "none"}
        ),
        tensors=planned,
        files=output.files,
        config=output.config,
        index=output.index,
        new_headers=MappingProxyType(output.new_headers),
        edits=MappingProxyType(output.edits),
        keys=MappingProxyType(output.keys),
        record=output.record,
        opens=output.opens,
        samples=MappingProxyType({str(layer): sample for layer, sample in samples.items()}),
        calibration=made_for.get("calibration", {}),
        factors_rule=made_for.get("factors_rule", made_for.get("rule")),
        warnings=(*warnings, *output.warnings),
        states=MappingProxyType({name: source.state(name) for name in source.files()}),
        active=used,
        instead=output.instead,
        fold_key=output.fold_key,
    )
    if (harm := plan.comparison.harm) is not None:
        plan = replace(plan, warnings=(*plan.warnings, harm))
    plan = checkpoint.sealed(plan)
    if plan.changes_nothing:
        already = "nothing to do: the model has this number of experts per token, every factor is 1"
        plan = replace(plan, warnings=(*plan.warnings, already))
    return plan


def _remarks(options: Options) -> list[str]:
    """What the user should know of the options."""
    remarks = []
    if options.fold == "residual":
        remarks.append(
            "--fold residual is the same as scaling the experts but for the rounding of the divided"
            " weights and the epsilon of the norms, which stays while the stream shrinks"
        )
    scaled = options.gate_scale not in (None, 1.0)
    if scaled and options.method in ("preserve", "published"):
        remarks.append(
            f"--gate-scale changes the gate weights, which --rule {options.method} does not see,"
            " since it assumes a balanced gate; --rule gates does"
        )
    return remarks


def _experts(moe: Moe, options: Options) -> Experts:
    before: int | tuple[int, ...] = moe.count
    after = before if options.experts is None else options.experts
    trained = options.trained_experts or before
    row = moe.architecture
    if row.fixed and after != before:
        raise UnsupportedError(
            f"model type {moe.model_type!r} cannot run with {after} experts per token: {row.fixed}",
            hint="--factor scales the experts and leaves their number as it is.",
        )
    own = moe.section.get("per_layer_config")
    overrides = own.values() if isinstance(own, dict) else ()
    if after != before and any(isinstance(o, dict) and row.count[0] in o for o in overrides):
        raise UnsupportedError(
            f"config.json: per_layer_config gives single layers their own {row.count[0]}",
            hint="Set those numbers yourself, then use --factors without --experts.",
        )
    fewest = min(moe.held.values())
    largest = largest_count(row, moe.section, fewest)
    for name, count in (("--experts", after), ("--trained-experts", trained)):
        if max(_as_tuple(count)) > largest:
            limit = f"a layer has {fewest} routed experts"
            if largest < fewest:
                limit += f", of which its group-limited router can choose {largest}"
            raise UnsupportedError(
                f"{name} is {count}, but {limit}", hint=f"Choose from 1 to {largest}."
            )
    if has_no_effect(row, moe.section) and options.method != "none":
        raise UnsupportedError(
            f"scaling has no effect on model type {moe.model_type!r}: {row.no_effect}",
            hint="--rule none changes the number of experts alone.",
        )
    return Experts(trained, before, after, moe.total)


def _as_tuple(count: int | tuple[int, ...]) -> tuple[int, ...]:
    return count if isinstance(count, tuple) else (count,)


def _sampled_gates(
    source: Source,
    moe: Moe,
    experts: Experts,
    options: Options,
    headers: Mapping[str, Header],
    progress: Callable[[int, int], None],
) -> Mapping[Layer, Sample]:
    """What the rule ``gates`` wants to know; nothing for the others."""
    if options.method != "gates":
        return {}
    from moescale.planning.sampling import sample_gates  # here, since the others need no numpy

    counts = {layer: (n, m) for layer in moe.layers for n, _, m in (experts.at(layer),)}
    return sample_gates(source, moe, headers, counts, options.gate_scale or 1.0, progress)
