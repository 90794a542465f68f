"""Finds the MoE of a safetensors checkpoint, from its config and tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families import architectures
from moescale.families.architectures import Architecture, Flag
from moescale.families.complete import check_complete
from moescale.families.config import CONFIG, Config, ConfigKey, find_count_keys
from moescale.families.config_search import has_norm_key, likely_count_key, values_at_count_keys
from moescale.families.duplicate_counts import duplicate_count_keys
from moescale.families.likely_experts import likely_down_projection
from moescale.families.moe_config import MoeConfig, configured_router, moe_config_of
from moescale.families.names import plain_name, refuse_unmerged_adapter
from moescale.families.pattern import find_by_pattern
from moescale.families.projections import (
    Layer,
    Projection,
    find_projections,
    in_part,
)
from moescale.families.router_shapes import RouterShapes
from moescale.families.shapes import check_shapes, empty_weights
from moescale.families.unknown import unknown_keys, unknown_tensors
from moescale.routers.normalisation import Normalisation


@dataclass(frozen=True, slots=True)
class Moe:
    """The MoE that a run rescales.

    Attributes:
        architecture: its row in the table.
        model_type: its name in the config or from the user.
        config: the config's description of it.
        count_keys: the keys of the experts per token; the first one decides.
        count: the experts per token, one number or one per layer.
        experts_by_layer: number of routed experts of each layer, from its tensors.
        projections: all routed down-projections.
        warnings: for the user.
        layer_aliases: the model's names for its layers in the other format; None for a layer that
            this checkpoint lacks.
        configured_router: the config's model type and its normalisation, if the user named another
            type; None if the config has no known type.
    """

    architecture: Architecture
    model_type: str
    config: MoeConfig
    count_keys: Sequence[ConfigKey]
    count: int | tuple[int, ...]
    experts_by_layer: Mapping[Layer, int]
    projections: Sequence[Projection]
    warnings: list[str]
    layer_aliases: Mapping[str, Layer | None] = field(default_factory=dict)
    configured_router: tuple[str, Normalisation] | None = None

    @property
    def layers(self) -> list[Layer]:
        """The MoE layers, in order."""
        return sorted({projection.layer for projection in self.projections})

    def owns(self, layer: Layer) -> bool:
        """Whether a layer belongs to this part, judged by its stack."""
        return in_part(layer, self.architecture, _other_parts(self.architecture))


def find_moe(
    config: Config,
    tensors: Sequence[Tensor],
    arch: str | None,
    part: str | None,
    pattern: str | None,
    experts_key: str | None,
) -> Moe:
    """Find the MoE and check that it is complete.

    Args:
        config: the checkpoint's config.
        tensors: all its tensors.
        arch: treat the model as this type.
        part: which MoE, if the type has several.
        pattern: regular expression for the names of the down-projections.
        experts_key: config key of the experts per token; goes with `pattern`.

    Raises:
        UnsupportedError: the type is not known, or has no such part.
        CheckpointError: config and tensors contradict each other.
    """
    model_type, row = _row(config, tensors, arch, part, pattern is not None)
    if experts_key is not None:
        row = _with_key(row, experts_key)
    try:
        count_keys = find_count_keys(config, row.sections, row.count_keys)
    except CheckpointError:
        if _is_dense(plain_name(tensor.name) for tensor in tensors):  # its count may be 0
            raise _dense_error(f"model type {model_type!r}") from None
        raise
    if not count_keys and row.fixed_count is None:
        raise _missing_count(config, row, tensors, experts_key)
    duplicates, count_warnings = duplicate_count_keys(config, row, count_keys)
    adapter_warnings = refuse_unmerged_adapter(tensor.name for tensor in tensors)
    if pattern is not None:
        projections = find_by_pattern(tensors, pattern)
    else:
        projections = find_projections(tensors, row, _other_parts(row))
    if not projections:
        raise _nothing_found(model_type, row, tensors, pattern)
    moe_config = moe_config_of(config, row, count_keys)
    _check_lists(count_keys, moe_config.layers)
    experts_by_layer = check_complete(projections, tensors, row, moe_config, _other_parts(row))
    check_shapes(
        projections, tensors, moe_config, experts_by_layer, RouterShapes(tensors, row, moe_config)
    )
    return Moe(
        architecture=row,
        model_type=model_type,
        config=moe_config,
        count_keys=[*count_keys, *duplicates],
        count=count_keys[0].value if count_keys else row.fixed_count or 0,
        experts_by_layer=experts_by_layer,
        projections=projections,
        warnings=[
            *adapter_warnings,
            *_config_warnings(row, count_keys, moe_config),
            *_partial_effect_warning(row, projections, tensors),
            *count_warnings,
            *_expert_number_warnings(moe_config, experts_by_layer),
            *(_inner_type_warning(config, row) if arch is None and pattern is None else ()),
            *empty_weights(tensors),
            *unknown_keys(row, moe_config),
            *unknown_tensors(row, moe_config, projections, tensors),
        ],
        configured_router=(
            configured_router(config, row, model_type, count_keys) if arch is not None else None
        ),
    )


def _missing_count(
    config: Config, row: Architecture, tensors: Sequence[Tensor], experts_key: str | None
) -> UnsupportedError:
    """The error for a config without the experts per token."""
    if _is_dense(plain_name(tensor.name) for tensor in tensors):
        model_type = next(iter(config.model_types), row.model_type)
        return _dense_error(f"model type {model_type!r}")
    keys = " or ".join(row.count_keys)
    empty = values_at_count_keys(config, row)
    has = f"null at {keys}, the key of" if empty else f"no key {keys} for"
    missing = f"{CONFIG}: has {has} the experts per token"
    likely = likely_count_key(config)
    if experts_key is not None and likely is not None:
        path, value = likely
        return UnsupportedError(missing, hint=f"A key that looks like it: {path} = {value!r}.")
    return UnsupportedError(
        missing, hint="Add the key with the number that the model was trained with."
    )


def _dense_error(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} is a dense model: it has no experts, so there is nothing to rescale"
    )


def _nothing_found(
    model_type: str, row: Architecture, tensors: Sequence[Tensor], pattern: str | None
) -> CheckpointError:
    names = [plain_name(tensor.name) for tensor in tensors]
    if pattern is None and _is_dense(names):
        return CheckpointError(
            f"the model has no experts: there is nothing to rescale, although {CONFIG} says"
            f" {model_type!r}",
            hint="The weights belong to a dense model, or part of the checkpoint is missing.",
        )
    expected = repr(pattern) if pattern else f"{row.experts[0]}, or a name of another known layout"
    routed = pattern is None and likely_down_projection(names)
    return CheckpointError(
        f"no routed down-projections found for model type {model_type!r}: no tensor has a"
        f" name like {expected}",
        hint=(f"{routed!r} looks like one: " if routed else "")
        + "describe the names with --pattern and --experts-key.",
    )


def _is_dense(names: Iterable[str]) -> bool:
    return not any(re.search("expert|moe|router|switch_mlp", name) for name in names)


def _expert_number_warnings(config: MoeConfig, found: Mapping[Layer, int]) -> Iterator[str]:
    """Warnings of unusual numbers of experts."""
    fewest, most = min(found.values()), max(found.values())
    stated = {layer: config.experts_in(layer.number) for layer in found}
    if fewest < most:
        yield (
            f"the layers have {fewest} to {most} routed experts; the smallest number limits the"
            " experts per token"
        )
    differing = [layer for layer, number in found.items() if number != stated[layer]]
    if differing:
        layer = differing[0]
        yield (
            f"{CONFIG} says {stated[layer]} routed experts, but layer {layer} has {found[layer]}"
            f" ({len(differing)} of {len(found)} layers differ); the number of the tensors is used,"
            " which the router confirms"
        )
    limit = config.groups
    odd = sorted({number for number in found.values() if limit and number % limit[0]})
    if limit and odd:
        yield (
            f"{odd[0]} experts cannot be divided into the {limit[0]} groups of {CONFIG} (n_group):"
            " loaders fail, or use only some of the experts"
        )


def _row(
    config: Config,
    tensors: Sequence[Tensor],
    arch: str | None,
    part: str | None,
    has_pattern: bool,
) -> tuple[str, Architecture]:
    """The row for `arch`, or for the first model type of the config that the table knows."""
    named = config.model_types if arch is None else [arch]
    known = [model_type for model_type in named if architectures.parts(model_type)]
    if known:
        row = architectures.find(known[0], part)
        inner = architectures.find(known[-1]) if row.any_text_model else row
        return (known[-1], inner) if _differ(inner, row) else (known[0], row)
    if has_pattern and arch is None:
        return (named or ["unknown"])[0], _UNKNOWN
    raise _unknown_type(named, tensors, config)


def _differ(one: Architecture, other: Architecture) -> bool:
    """Whether factors, or their effects, differ between two rows."""

    def decisive(row: Architecture) -> tuple[object, ...]:
        return row.normalisation, row.no_effect, row.fixed, row.partial_effect

    return decisive(one) != decisive(other)


def _check_lists(count_keys: Sequence[ConfigKey], layers: int) -> None:
    """Require one count per layer in a list; counts of MTP blocks may follow."""
    for key in count_keys:
        if isinstance(key.value, tuple) and len(key.value) < layers:
            raise CheckpointError(
                f"{CONFIG}: {key.path} has {len(key.value)} numbers for {layers} layers",
                hint="Write one number per layer, or one for all.",
            )


_UNKNOWN = Architecture("", experts=(), normalisation=Flag("norm_topk_prob", False))
"""The row of a model type that only --pattern describes."""


def _with_key(row: Architecture, dotted: str) -> Architecture:
    """The row with the user's config key for the experts per token."""
    section, _, key = dotted.rpartition(".")
    sections = (section,) if section else row.sections
    return row._replace(count_keys=(key,), sections=sections, moe_layers=None)


def _inner_type_warning(config: Config, row: Architecture) -> Iterator[str]:
    """A warning if the row is that of the text model, not of the config's model type."""
    outer = config.model_types[0]
    if architectures.parts(outer) and outer != row.model_type:
        yield f"{outer!r} may hold any text model; the router is that of {row.model_type!r}"
    elif outer != row.model_type:
        yield (
            f"model type {outer!r} is not known, so it is treated as its text model,"
            f" {row.model_type!r}; its experts and router may differ"
        )


def _unknown_type(
    named: Sequence[str], tensors: Sequence[Tensor], config: Config
) -> UnsupportedError:
    """The error for an unknown type, with similar types and what to try."""
    what = f"model type {named[0]!r}" if named else "a config without model_type"
    if tensors and _is_dense(plain_name(tensor.name) for tensor in tensors):
        return _dense_error(what)
    routed = likely_down_projection([tensor.name for tensor in tensors])
    alike = _types_named_alike(plain_name(routed or ""), config)
    close = difflib.get_close_matches(
        named[0] if named else "", alike or architectures.known_types(), 3
    )
    advice = []
    if alike:
        first = close[0] if close else alike[0]
        more = f" (and of {len(alike) - 1} other types)" if len(alike) > 1 else ""
        advice.append(
            f"Its tensors have the names of {first}{more}: use --arch {first} if its router works"
            " the same way."
        )
    elif close:
        advice.append(f"Closest known types: {', '.join(close)} (--arch).")
    if routed:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", re.escape(routed).replace(r"\.", "."))
        pattern = pattern.replace(".", r"\.").replace(r"\_", "_")
        key, _ = likely_count_key(config) or ("KEY", None)
        rule = (
            ""
            if has_norm_key(config)
            else " with --factor or --rule published, since its router is not known"
        )
        advice.append(
            f"{routed!r} looks like a routed down-projection:"
            f" try --pattern '{pattern}' --experts-key {key}{rule}."
        )
    return UnsupportedError(f"{what} is not known", hint=" ".join(advice) or None)


def _types_named_alike(name: str, config: Config) -> list[str]:
    """Types that use such names of down-projections and this config's key of the count."""
    rows = (row for row in architectures.ROWS if any(_matches(name, form) for form in row.experts))
    known = (row.model_type for row in rows if any(values_at_count_keys(config, row)))
    return list(dict.fromkeys(known))


def _matches(name: str, template: str) -> bool:
    """Whether a name contains a row's template."""
    numbers = re.sub(r"\\\{[LE]\\\}", r"\\d+", re.escape(template))
    return re.search(rf"(?:^|\.){numbers}(?:[._]|$)", name) is not None


def _other_parts(row: Architecture) -> list[Architecture]:
    return [other for other in architectures.parts(row.model_type) if other.part != row.part]


def _partial_effect_warning(
    row: Architecture, projections: Sequence[Projection], tensors: Sequence[Tensor]
) -> Iterator[str]:
    """A warning if scaling does not reach part of the output."""
    if row.partial_effect and row.partial_effect_if is not None:
        telling = {f"{plain_name(p.prefix)}.{row.partial_effect_if}" for p in projections}
        if telling.isdisjoint(plain_name(tensor.name) for tensor in tensors):
            return
    if row.partial_effect:
        yield f"model type {row.model_type!r}: {row.partial_effect}"


def _config_warnings(
    row: Architecture, count_keys: Sequence[ConfigKey], config: MoeConfig
) -> list[str]:
    warnings = []
    for key in count_keys[1:]:
        if key.value != (first := count_keys[0]).value:
            warnings.append(
                f"{CONFIG} says {key.value} at {key.path} and {first.value} at {first.path};"
                f" {first.value} is used"
            )
    if row.model_type == "deepseek_v2" and config.norm_topk_prob:
        warnings.append(
            "norm_topk_prob is true: transformers and this plan ignore it for deepseek_v2, but"
            " other engines renormalise"
        )
    for other in _other_parts(row):
        warnings.append(f"the part {other.part!r} of this checkpoint is not changed")
    return warnings
