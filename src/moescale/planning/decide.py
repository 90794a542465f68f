"""Decides everything: `make_plan` reads config, index and shard headers, and returns a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from moescale.checkpoint.header import Header
from moescale.errors import SourceError, UnsupportedError
from moescale.model.count import CONFIG, Config, parse_config, set_count
from moescale.model.experts import Layer
from moescale.model.formats import confirm
from moescale.model.lookup import Moe, own_router
from moescale.model.router import has_no_effect, largest_count
from moescale.model.scale_key import fold_factor
from moescale.model.second_counts import candidates, with_count
from moescale.options import Options
from moescale.planning.comparison import joined
from moescale.planning.factors import (
    choose_factors,
    closed_forms,
    of_another_job,
    one_factor,
)
from moescale.planning.files import PROVENANCE, left_out_warnings, plan_files
from moescale.planning.other import refuse_other
from moescale.planning.plan import Experts, Plan
from moescale.planning.shards import output_index
from moescale.planning.tensors import (
    alternative,
    chosen_tensors,
    new_headers,
    planned_tensors,
    sharpened_routers,
)
from moescale.planning.weights import find_weights
from moescale.repos.base import Source
from moescale.rules import closed_form
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
    files = source.files()
    refuse_other(source, files)
    config = _read_config(source, files)
    weights = find_weights(source, config, options)
    moe, tensors, headers = weights.moe, weights.tensors, weights.found.headers
    warnings = [*source.remarks, *weights.warnings]
    if PROVENANCE in files:
        warnings.append(
            f"the source is itself an output of moescale ({PROVENANCE}); its factors stay in it"
        )
    experts = _experts(moe, options)
    forms = closed_forms(moe, experts, options)
    if sampler is not None:
        samples = sampler(moe, experts)
    else:
        samples = _sampled_gates(source, moe, experts, options, headers, progress)
    factors = choose_factors(moe, experts, options, samples, noted)
    scaled = chosen_tensors(moe, factors, tensors, options)
    warnings += confirm(
        ((s, factor) for s, _, factor in scaled), config.value, alternative(moe, factors)
    )
    made_for = getattr(options.factors, "made_for", {})
    warnings += [
        *_of_arch(config, moe, experts, options),
        *_remarks(options),
        *of_another_job(made_for, moe, experts, options),
    ]
    scaled += sharpened_routers(moe, tensors, options)
    new_config = _edited(config, moe, factors, options)
    moe = replace(moe, projections=())  # large, and not needed any more
    planned = planned_tensors(scaled, headers)
    index = output_index(weights.found)
    edits, of_others = _second_files(source, moe, experts, {*headers, *weights.left_out})
    warnings += of_others
    rows = plan_files(
        files,
        headers,
        {t.shard for t in planned if t.edit.factor != 1.0},
        index and index[0],
        new_config.text != config.text,
        edits,
        weights.left_out,
    )
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
        files=rows,
        config=new_config.text.encode(),
        index=index,
        new_headers=MappingProxyType(new_headers(source, headers, planned)),
        edits=MappingProxyType(edits),
        samples=MappingProxyType({str(layer): sample for layer, sample in samples.items()}),
        calibration=made_for.get("calibration", {}),
        factors_rule=made_for.get("factors_rule", made_for.get("rule")),
        warnings=(*warnings, *left_out_warnings(rows)),
        states=MappingProxyType({name: source.state(name) for name in files}),
    )
    if (harm := plan.comparison.harm) is not None:
        plan = replace(plan, warnings=(*plan.warnings, harm))
    if plan.changes_nothing:
        already = "nothing to do: the model has this number of experts per token, every factor is 1"
        plan = replace(plan, warnings=(*plan.warnings, already))
    return plan


def _read_config(source: Source, files: Collection[str]) -> Config:
    if CONFIG not in files:
        inner = next((name for name in files if name.endswith(f"/{CONFIG}")), None)
        such = f", such as {inner.removesuffix(f'/{CONFIG}')} in it" if inner else ""
        raise SourceError(
            f"{source.identity.id}: has no {CONFIG}",
            hint="Give the folder or the repo that holds a model in the Hugging Face layout"
            f"{such}.",
        )
    return parse_config(source.read(CONFIG))


def _second_files(
    source: Source, moe: Moe, experts: Experts, others: Collection[str]
) -> tuple[dict[str, bytes], list[str]]:
    """Other files that hold the count, as they will be; and what the user should know of them."""
    edits: dict[str, bytes] = {}
    warnings: list[str] = []
    before, after = experts.before, experts.after
    if not isinstance(before, int) or not isinstance(after, int):
        return edits, warnings
    sizes = {name: file.size for name, file in source.files().items() if name not in others}
    for name in candidates(sizes):
        changed, said = with_count(name, source.read(name), before, after, moe.total)
        warnings += said
        if changed is not None:
            edits[name] = changed
    return edits, warnings


def _edited(config: Config, moe: Moe, factors: Mapping[Layer, float], options: Options) -> Config:
    """The config of the output."""
    if options.fold == "config":
        config = fold_factor(config, moe.architecture, one_factor(factors, options))
    if options.experts is not None:
        config = set_count(config, moe.places, options.experts)
    return config


def _of_arch(config: Config, moe: Moe, experts: Experts, options: Options) -> Iterator[str]:
    """What --arch changes, where the config names a type that the table knows."""
    own = own_router(config, moe) if options.arch is not None else None
    if own is None or moe.router is None:
        return
    n, _, m = experts.at(moe.layers[0])
    asked, known = (
        closed_form.preserve(n, m, router.balanced_weight, options.rho or 0.0)
        for router in (moe.router, own[1])
    )
    yield (
        f"--arch {options.arch} contradicts {CONFIG}, whose model_type is {own[0]!r}: the router of"
        f" {options.arch!r} makes the factor {asked:.4f}, that of {own[0]!r} {known:.4f}; the names"
        " of the tensors need no --arch"
    )


def _remarks(options: Options) -> list[str]:
    """What the user should know of the options."""
    remarks = []
    if options.fold == "residual":
        remarks.append(
            "--fold residual is the same as scaling the experts but for the rounding of the divided"
            " weights and the epsilon of the norms, which stays while the stream shrinks"
        )
    if options.gate_scale is not None and options.method in ("preserve", "published"):
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
