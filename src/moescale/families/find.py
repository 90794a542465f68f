"""From a config and tensor names to the MoE that shall be rescaled, known row or not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families import architectures
from moescale.families.architectures import TEXT_SECTIONS, Architecture, Flag
from moescale.families.complete import check_complete
from moescale.families.config import CONFIG, Config, ConfigKey, find_count_keys
from moescale.families.duplicate_counts import duplicate_count_keys
from moescale.families.likely_experts import likely_down_projection
from moescale.families.moe_config import MoeConfig, normalisation_of, read_moe_config
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
    """The MoE of a checkpoint that a run is about.

    Attributes:
        architecture: its row of the table.
        model_type: what the config or the user calls it.
        config: what the config says of it.
        count_keys: the keys that hold the experts per token; the first is what counts.
        count: the experts per token, or those of each layer.
        experts_by_layer: routed experts of each layer, as its tensors hold.
        projections: the routed down-projections, complete.
        warnings: what the user should know.
        layer_aliases: what the same model calls layers in another format; None for one that this
            checkpoint lacks.
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

    @property
    def layers(self) -> list[Layer]:
        """The MoE layers, in order."""
        return sorted({projection.layer for projection in self.projections})

    def owns(self, layer: Layer) -> bool:
        """Whether a layer is of this part, by what stands before its number in tensor names."""
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
        arch: treat it as this model type.
        part: which MoE of a type that has several.
        pattern: expression for the names of the down-projections.
        experts_key: config key of the experts per token; goes with `pattern`.

    Raises:
        UnsupportedError: the type is not known, or has no such part.
        CheckpointError: config and tensors do not fit.
    """
    model_type, row = _row(config, tensors, arch, part, pattern is not None)
    if experts_key is not None:
        row = _with_key(row, experts_key)
    try:
        count_keys = find_count_keys(config, row.sections, row.count_keys)
    except CheckpointError:
        if _is_dense(plain_name(tensor.name) for tensor in tensors):  # whose count is 0
            raise _dense(f"model type {model_type!r}") from None
        raise
    if not count_keys and row.fixed_count is None:
        raise _no_count(config, row, tensors, experts_key)
    again, of_others = duplicate_count_keys(config, row, count_keys)
    adapted = refuse_unmerged_adapter(tensor.name for tensor in tensors)
    if pattern is not None:
        projections = find_by_pattern(tensors, pattern)
    else:
        projections = find_projections(tensors, row, _other_parts(row))
    if not projections:
        raise _none_found(model_type, row, tensors, pattern)
    read = read_moe_config(_section(config, count_keys, row), row)
    _check_lists(count_keys, read.layers)
    experts_by_layer = check_complete(projections, tensors, row, read, _other_parts(row))
    check_shapes(projections, tensors, read, experts_by_layer, RouterShapes(tensors, row, read))
    return Moe(
        architecture=row,
        model_type=model_type,
        config=read,
        count_keys=[*count_keys, *again],
        count=count_keys[0].value if count_keys else row.fixed_count or 0,
        experts_by_layer=experts_by_layer,
        projections=projections,
        warnings=[
            *adapted,
            *_warnings(row, count_keys, read),
            *_of_reach(row, projections, tensors),
            *of_others,
            *_expert_number_warnings(read, experts_by_layer),
            *(_other_type(config, row) if arch is None and pattern is None else ()),
            *empty_weights(tensors),
            *unknown_keys(row, read),
            *unknown_tensors(row, read, projections, tensors),
        ],
    )


def _no_count(
    config: Config, row: Architecture, tensors: Sequence[Tensor], experts_key: str | None
) -> UnsupportedError:
    """What to say where the experts per token are not in the config."""
    if _is_dense(plain_name(tensor.name) for tensor in tensors):
        own = next(iter(_model_types(config)), row.model_type)
        return _dense(f"model type {own!r}")
    empty = any(
        key in (config.section(name) or {}) for name in row.sections for key in row.count_keys
    )
    has = "has null at" if empty else "has no"
    missing = f"{CONFIG}: {has} {' or '.join(row.count_keys)}, the experts per token"
    likely = _likely_key(config)
    if experts_key is not None and likely != "KEY":
        path, _, key = likely.rpartition(".")
        value = (config.section(path) or {}).get(key)
        return UnsupportedError(missing, hint=f"A key that looks like it: {likely} = {value!r}.")
    return UnsupportedError(
        missing, hint="Add the key with the number that the model was trained with."
    )


def _dense(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} is a dense model: it has no experts, so there is nothing to rescale"
    )


def _none_found(
    model_type: str, row: Architecture, tensors: Sequence[Tensor], pattern: str | None
) -> CheckpointError:
    names = [plain_name(tensor.name) for tensor in tensors]
    if pattern is None and _is_dense(names):
        return CheckpointError(
            f"the model has no experts: there is nothing to rescale, although {CONFIG} says"
            f" {model_type!r}",
            hint="The weights are those of a dense model, or a part of the checkpoint is missing.",
        )
    looked_for = repr(pattern) if pattern else f"{row.experts[0]} or of another known layout"
    routed = pattern is None and likely_down_projection(names)
    return CheckpointError(
        f"no routed down-projections found for model type {model_type!r}: no tensor has a"
        f" name like {looked_for}",
        hint=(f"{routed!r} looks like one: " if routed else "")
        + "describe the names with --pattern and --experts-key.",
    )


def _is_dense(names: Iterable[str]) -> bool:
    return not any(re.search("expert|moe|router|switch_mlp", name) for name in names)


def _expert_number_warnings(config: MoeConfig, found: Mapping[Layer, int]) -> Iterator[str]:
    """Unusual numbers of experts."""
    fewest, most = min(found.values()), max(found.values())
    stated = {layer: config.experts_in(layer.number) for layer in found}
    if fewest < most:
        yield f"the layers have {fewest} to {most} routed experts; the fewest limit the choice"
    differing = [layer for layer, number in found.items() if number != stated[layer]]
    if differing:
        layer = differing[0]
        yield (
            f"{CONFIG} says {stated[layer]} routed experts, but layer {layer} has {found[layer]}"
            f" ({len(differing)} of {len(found)} layers differ); that is what its router chooses"
            " from, so the tensors are believed"
        )
    limit = config.groups
    odd = sorted({number for number in found.values() if limit and number % limit[0]})
    if limit and odd:
        yield (
            f"{odd[0]} experts cannot be divided into the {limit[0]} groups of {CONFIG} (n_group):"
            " loaders fail, or choose from a part of them"
        )


def configured_router(config: Config, moe: Moe) -> tuple[str, Normalisation] | None:
    """The type that the config names and its router, where the run was told another type."""
    for model_type in _model_types(config):
        if parts := architectures.parts(model_type):
            row = next((p for p in parts if p.part == moe.architecture.part), parts[0])
            if model_type == moe.model_type:
                return None
            return model_type, normalisation_of(
                row, _section(config, moe.count_keys, moe.architecture)
            )
    return None


def _row(
    config: Config,
    tensors: Sequence[Tensor],
    arch: str | None,
    part: str | None,
    named_by_user: bool,
) -> tuple[str, Architecture]:
    """The row for `arch`, or for the first model type of the config that the table knows."""
    named = _model_types(config) if arch is None else [arch]
    known = [model_type for model_type in named if architectures.parts(model_type)]
    if known:
        row = architectures.find(known[0], part)
        inner = architectures.find(known[-1]) if row.any_text_model else row
        return (known[-1], inner) if _routes_otherwise(inner, row) else (known[0], row)
    if named_by_user and arch is None:
        return (named or ["unknown"])[0], _UNKNOWN
    raise _unknown(named, tensors, config)


def _routes_otherwise(one: Architecture, other: Architecture) -> bool:
    """Whether a factor is another, or has another effect, by one row than by the other."""

    def decisive(row: Architecture) -> tuple[object, ...]:
        return row.normalisation, row.no_effect, row.fixed, row.partial_effect

    return decisive(one) != decisive(other)


def _section(
    config: Config, count_keys: Sequence[ConfigKey], row: Architecture
) -> Mapping[str, Any]:
    """The section that describes the MoE: where the count stands, or else what the config is."""
    return config.section(count_keys[0].section if count_keys else row.sections[-1]) or {}


def _check_lists(count_keys: Sequence[ConfigKey], layers: int) -> None:
    """A list of counts has one for each layer, and MTP blocks may follow."""
    for key in count_keys:
        if isinstance(key.value, tuple) and len(key.value) < layers:
            raise CheckpointError(
                f"{CONFIG}: {key.path} has {len(key.value)} numbers for {layers} layers",
                hint="Write one number for each layer, or one for all.",
            )


_UNKNOWN = Architecture("", experts=(), normalisation=Flag("norm_topk_prob", False))
"""What is known of a model type that only --pattern describes."""


def _with_key(row: Architecture, dotted: str) -> Architecture:
    """The row with the user's config key of the experts per token."""
    section, _, key = dotted.rpartition(".")
    sections = (section,) if section else row.sections
    return replace(row, count_keys=(key,), sections=sections, moe_layers=None)


def _other_type(config: Config, row: Architecture) -> Iterator[str]:
    """That the type of the text model was taken, not the config's own."""
    outer = _model_types(config)[0]
    if architectures.parts(outer) and outer != row.model_type:
        yield f"{outer!r} may hold any text model; the router is that of its {row.model_type!r}"
    elif outer != row.model_type:
        yield (
            f"model type {outer!r} is not known; {row.model_type!r} of its text model is taken,"
            " whose experts and router may be others"
        )


def _model_types(config: Config) -> list[str]:
    """The config's own model type, then those of its text sections."""
    sections = ("", *(s for s in TEXT_SECTIONS if s))
    found = [(config.section(section) or {}).get("model_type") for section in sections]
    return [model_type for model_type in found if isinstance(model_type, str)]


def _unknown(named: Sequence[str], tensors: Sequence[Tensor], config: Config) -> UnsupportedError:
    """Say what is not known, which types are close, and what to try."""
    what = f"model type {named[0]!r}" if named else "a config without model_type"
    if tensors and _is_dense(plain_name(tensor.name) for tensor in tensors):
        return _dense(what)
    routed = likely_down_projection([tensor.name for tensor in tensors])
    alike = _named_alike(plain_name(routed or ""), config)
    close = difflib.get_close_matches(
        named[0] if named else "", alike or architectures.known_types(), 3
    )
    advice = []
    if alike:
        first = close[0] if close else alike[0]
        more = f" (and of {len(alike) - 1} other types)" if len(alike) > 1 else ""
        advice.append(
            f"Its tensors are named as those of {first}{more}: --arch {first}, if its router weighs"
            " alike."
        )
    elif close:
        advice.append(f"Closest known types: {', '.join(close)} (--arch).")
    if routed:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", re.escape(routed).replace(r"\.", "."))
        pattern = pattern.replace(".", r"\.").replace(r"\_", "_")
        advice.append(
            f"{routed!r} looks like a routed down-projection:"
            f" try --pattern '{pattern}' --experts-key {_likely_key(config)}{_likely_rule(config)}."
        )
    return UnsupportedError(f"{what} is not known", hint=" ".join(advice) or None)


def _named_alike(name: str, config: Config) -> list[str]:
    """Types whose down-projections have such names and whose count is where this config has it."""
    rows = (row for row in architectures.ROWS if any(_fits(name, form) for form in row.experts))
    known = (row.model_type for row in rows if any(_counts(config, row)))
    return list(dict.fromkeys(known))


def _fits(name: str, template: str) -> bool:
    """Whether a name is one of a row's template, which any words may stand around."""
    numbers = re.sub(r"\\\{[LE]\\\}", r"\\d+", re.escape(template))
    return re.search(rf"(?:^|\.){numbers}(?:[._]|$)", name) is not None


def _counts(config: Config, row: Architecture) -> Iterator[Any]:
    """What a config has at the keys that a row reads as the experts per token."""
    sections = (config.section(section) or {} for section in row.sections)
    return (section[key] for section in sections for key in row.count_keys if key in section)


def _likely_key(config: Config) -> str:
    """A config key that looks like the number of experts per token."""
    sections = [(section, config.section(section) or {}) for section in TEXT_SECTIONS]
    for likely in (r"(expert|moe).*(per_tok|top_?k)|top_?k.*expert|^moe_k$", "^top_?k$"):
        for section, keys in sections:
            for key in keys:
                if re.search(likely, key):
                    return f"{section}.{key}" if section else key
    return "KEY"


def _likely_rule(config: Config) -> str:
    """What --pattern needs besides, where the config does not tell how the router weighs."""
    sections = (config.section(section) or {} for section in TEXT_SECTIONS)
    if any("norm_topk_prob" in section for section in sections):
        return ""
    return " with --factor or --rule published, since its router is not known"


def _other_parts(row: Architecture) -> list[Architecture]:
    return [other for other in architectures.parts(row.model_type) if other.part != row.part]


def _of_reach(
    row: Architecture, projections: Sequence[Projection], tensors: Sequence[Tensor]
) -> Iterator[str]:
    """What scaling does not reach, where that is so."""
    if row.partial_effect and row.partial_effect_if is not None:
        telling = {f"{plain_name(p.prefix)}.{row.partial_effect_if}" for p in projections}
        if telling.isdisjoint(plain_name(tensor.name) for tensor in tensors):
            return
    if row.partial_effect:
        yield f"model type {row.model_type!r}: {row.partial_effect}"


def _warnings(row: Architecture, count_keys: Sequence[ConfigKey], config: MoeConfig) -> list[str]:
    warnings = []
    for key in count_keys[1:]:
        if key.value != (first := count_keys[0]).value:
            warnings.append(
                f"{CONFIG} says {key.value} at {key.path} and {first.value} at {first.path};"
                f" {first.value} is taken"
            )
    if row.model_type == "deepseek_v2" and config.norm_topk_prob:
        warnings.append(
            "norm_topk_prob is true: transformers ignores it for deepseek_v2, as this plan does;"
            " other engines renormalise"
        )
    for other in _other_parts(row):
        warnings.append(f"the part {other.part!r} of this checkpoint is left alone")
    return warnings
