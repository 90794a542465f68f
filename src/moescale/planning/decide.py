"""Decides everything: `make_plan` reads config, index and shard headers, and returns a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from moescale.errors import UnsupportedError
from moescale.factors.samples import Sample
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.options import Options
from moescale.planning.active import active
from moescale.planning.comparison import collapse_equal
from moescale.planning.experts import Experts
from moescale.planning.factors import (
    Findings,
    KnownFactors,
    averaged_for_fold,
    choose_factors,
    choose_scales,
    closed_forms,
    of_another_job,
)
from moescale.planning.formats import open_checkpoint
from moescale.planning.plan import Plan
from moescale.planning.rule import (
    RuleChoice,
    ScalableParts,
    choose_rule,
    remarks,
    scalable_parts,
)
from moescale.planning.tensors import find_scaled_routers, in_shards
from moescale.storage.base import Source, ignore
from moescale.storage.location import Location

Sampler = Callable[[Moe, Experts, ScalableParts | None], Findings]
"""Samples every MoE layer for a rule; ``fitted`` also needs the adjustable tensors."""


def make_plan(
    source: Source,
    options: Options,
    location: Location | None = None,
    sampler: Sampler | None = None,
    known: KnownFactors | None = None,
    progress: Callable[[int, int], None] = ignore,
) -> Plan:
    """Make every decision of a run.

    Args:
        source: the checkpoint; its config, index and shard headers are read.
        options: the options as the user gave them.
        location: location of the output; None without a destination.
        sampler: runs the model for ``measured`` and ``fitted``; other rules need none.
        known: factors that an earlier run of the same job found.
        progress: called with the number of layers done and of all layers while gates are sampled.

    Raises:
        SourceError: the checkpoint is malformed or incomplete, or these options cannot be applied.
        UsageError: the factors do not cover the checkpoint's MoE layers.
    """
    checkpoint = open_checkpoint(source, options, location)
    moe, tensors, headers = checkpoint.moe, checkpoint.tensors, checkpoint.headers
    warnings = [*source.remarks, *checkpoint.warnings]
    experts = _experts(moe, options)
    choice = choose_rule(moe, experts, options, headers)
    rule = choice.rule
    forms = closed_forms(moe, experts, options)
    scalable = scalable_parts(moe, tensors) if rule == "fitted" else None
    if sampler is not None:
        findings = sampler(moe, experts, scalable)
    else:
        findings = Findings(_sampled_gates(source, moe, experts, options, choice, progress))
    factors = choose_factors(rule, moe, experts, options, findings, known)
    if scalable and not scalable.experts:
        factors = dict.fromkeys(factors, 1.0)
    factors, averaging_notes = averaged_for_fold(factors, rule, options)
    scales = choose_scales(rule, moe, options, findings, known)
    edits = checkpoint.edits(factors)
    made_for = getattr(options.factors, "made_for", {})
    warnings += [
        *checkpoint.remarks(edits, factors, experts),
        *(scalable.remarks if scalable else ()),
        *averaging_notes,
        *remarks(rule, moe, experts, options),
        *of_another_job(made_for, moe, experts, options),
    ]
    if scales:
        routers = (scalable and scalable.routers) or find_scaled_routers(moe, tensors)
        edits += [edit.with_(factor=scales[edit.layer]) for edit in routers.edits]
        if routers.choice_warning:
            warnings.append(
                f"scaling the routers may change which experts are chosen: {routers.choice_warning}"
            )
    used = active(tensors, moe.projections, moe.experts_by_layer, experts)
    placed = in_shards(edits, headers)
    output = checkpoint.output(placed, factors, experts)
    plan = Plan(
        source=source.identity,
        location=location,
        options=options,
        model_type=moe.model_type,
        part=moe.architecture.part,
        experts=experts,
        router=moe.config.normalisation,
        rule=rule,
        why=choice.why,
        rho=options.rho or 0.0,
        factors=_by_name(factors),
        router_scales=_by_name(scales),
        alternatives=MappingProxyType(
            {name: collapse_equal(form) for name, form in forms.items() if name != "none"}
        ),
        tensors=placed,
        files=output.files,
        config=output.config,
        loader=checkpoint.loader,
        index=output.index,
        new_headers=MappingProxyType(output.new_headers),
        edited_files=MappingProxyType(output.edited_files),
        keys=MappingProxyType(output.keys),
        provenance_file=output.provenance_file,
        last_file=output.last_file,
        samples=_by_name(findings.samples),
        calibration=made_for.get("calibration", {}),
        factors_rule=made_for.get("factors_rule", made_for.get("rule")),
        warnings=(*warnings, *output.warnings),
        states=MappingProxyType({name: source.fingerprint(name) for name in source.files()}),
        active=used,
        config_overrides=None if scales else output.config_overrides,
        fold_key=output.fold_key,
    )
    if (warning := plan.comparison.warning) is not None:
        plan = replace(plan, warnings=(*plan.warnings, warning))
    plan = checkpoint.completed(plan)
    if plan.changes_nothing:
        already = "nothing to do: experts per token do not change, and every factor is 1"
        plan = replace(plan, warnings=(*plan.warnings, already))
    return plan


_Value = TypeVar("_Value")


def _by_name(values: Mapping[Layer, _Value]) -> Mapping[str, _Value]:
    return MappingProxyType({str(layer): value for layer, value in values.items()})


def _experts(moe: Moe, options: Options) -> Experts:
    before: int | tuple[int, ...] = moe.count
    after = before if options.experts is None else options.experts
    trained = options.trained_experts or before
    row = moe.architecture
    if row.fixed and after != before:
        raise UnsupportedError(
            f"model type {moe.model_type!r} cannot run with {after} experts per token: {row.fixed}",
            hint="--factor scales the experts without changing their number.",
        )
    if after != before and moe.config.has_layer_counts:
        raise UnsupportedError(
            f"config.json: per_layer_config sets {row.count_keys[0]} for individual layers",
            hint="Set those numbers yourself, then use --factors without --experts.",
        )
    _check_choice(moe, options, after, trained)
    return Experts(trained, before, after, moe.config.experts)


def _check_choice(
    moe: Moe, options: Options, after: int | tuple[int, ...], trained: int | tuple[int, ...]
) -> None:
    """Refuse more experts per token than the router of some layer can choose."""
    fewest = min(moe.experts_by_layer.values())
    largest = moe.config.max_count(fewest)
    limit = f"a layer has {fewest} routed experts"
    if largest < fewest:
        limit += f", of which its group-limited router can choose {largest}"
    given = {"--experts": options.experts, "--trained-experts": options.trained_experts}
    for name, count in (("--experts", after), ("--trained-experts", trained)):
        if (max(count) if isinstance(count, tuple) else count) <= largest:
            continue
        if given[name] is None:
            raise UnsupportedError(
                f"the model's own number of experts per token is {count}, but {limit}",
                hint="Give the number that the weights were trained with: --trained-experts N.",
            )
        raise UnsupportedError(
            f"{name} is {count}, but {limit}", hint=f"Choose a number from 1 to {largest}."
        )


def _sampled_gates(
    source: Source,
    moe: Moe,
    experts: Experts,
    options: Options,
    choice: RuleChoice,
    progress: Callable[[int, int], None],
) -> Mapping[Layer, Sample]:
    """Samples for the rule ``gates``; empty for other rules."""
    if choice.routers is None:
        return {}
    from moescale.planning.sampling import sample_gates  # here, since other rules need no numpy

    counts = {layer: (n, m) for layer in moe.layers for n, _, m in (experts.at(layer),)}
    router_scale, rho = options.gate_scale or 1.0, options.rho or 0.0
    return sample_gates(source, choice.routers, counts, router_scale, rho, progress)
