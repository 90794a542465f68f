"""Reads what a config says about its MoE, once, into a `MoeConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moescale.errors import CheckpointError, UnsupportedError
from moescale.families import architectures
from moescale.families.architectures import (
    TEXT_SECTIONS,
    All,
    Architecture,
    FirstDense,
    Flag,
    MoeLayers,
    PowerNorm,
    SharedSum,
    SparseStep,
)
from moescale.families.config import (
    CONFIG,
    MAX_NUMBER,
    Config,
    ConfigKey,
    Section,
    read_integer,
)
from moescale.families.unread_keys import group_keys, unread_keys
from moescale.routers.kinds import RouterKind
from moescale.routers.normalisation import Normalisation


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The config's description of one MoE.

    Attributes:
        experts: routed experts per layer; the largest number if layers differ.
        experts_by_layer: routed experts of the layers for which the config has separate numbers;
            keys are layer numbers as text, as in JSON.
        layers: layers of the model without MTP blocks; 0 if the config does not say.
        moe_layers: numbers of the MoE layers; None if only the tensors tell.
        experts_without_weights: experts that the router can choose and that return a token
            unchanged.
        groups: number of groups of experts, and of groups that a token may use; None for no limit.
        normalisation: of the weights of the chosen experts; None if unknown.
        scaling_has_effect: False if a norm after the experts removes every factor.
        has_layer_counts: some layers have their own number of experts per token.
        hidden_size: width of the hidden states; None if the config does not say.
        narrow_sizes: widths of narrower streams that experts may write to.
        intermediate_size: width between the matrices of an expert; None if unknown or if it
            differs by layer.
        score: the score function that a key names; None if no key does.
        logit_cap: bound of the tanh on the logits, as the config has it; not checked here, since
            only a few rules need it.
        choice_bias: False if a key says that no bias takes part in the choice of experts.
        has_scale: the row's `scale_key` is present.
        tied_embeddings: the embedding is also the head.
        norm_topk_prob: the key of this name is true, whether or not the model's code reads it.
        unread_keys: keys, with their values, that change the routing of some model types and that
            the row does not read.
    """

    experts: int
    experts_by_layer: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0
    moe_layers: frozenset[int] | None = None
    experts_without_weights: int = 0
    groups: tuple[int, int] | None = None
    normalisation: Normalisation | None = None
    scaling_has_effect: bool = True
    has_layer_counts: bool = False
    hidden_size: int | None = None
    narrow_sizes: frozenset[int] = frozenset()
    intermediate_size: int | None = None
    score: Any = None
    logit_cap: Any = None
    choice_bias: bool = True
    has_scale: bool = False
    tied_embeddings: bool = False
    norm_topk_prob: bool = False
    unread_keys: tuple[tuple[str, Any], ...] = ()

    def experts_in(self, layer: int) -> int:
        """Routed experts of a layer, by its number."""
        return self.experts_by_layer.get(str(layer), self.experts)

    def max_count(self, experts: int) -> int:
        """The largest number of experts per token for a router of this many experts.

        A group-limited router masks all experts outside ``topk_group`` of ``n_group`` groups. Asked
        for more experts than those groups have, it silently takes masked ones.
        """
        experts += self.experts_without_weights
        if self.groups is None:
            return experts
        groups, chosen = self.groups
        return min(experts, chosen * (experts // groups))


def moe_config_of(config: Config, row: Architecture, count_keys: Sequence[ConfigKey]) -> MoeConfig:
    """As `read_moe_config`, of the section with the experts per token."""
    return read_moe_config(_moe_section(config, row, count_keys), row)


def configured_router(
    config: Config, row: Architecture, model_type: str, count_keys: Sequence[ConfigKey]
) -> tuple[str, Normalisation] | None:
    """The model type of the config and its normalisation; None if it is unknown or `model_type`.

    Args:
        config: the checkpoint's config.
        row: the row of the type that the user named.
        model_type: that type.
        count_keys: the keys of the experts per token.

    Raises:
        UnsupportedError: the closed forms do not cover the normalisation.
    """
    named = next((name for name in config.model_types if architectures.parts(name)), model_type)
    if named == model_type:
        return None
    parts = architectures.parts(named)
    own = next((p for p in parts if p.part == row.part), parts[0])
    return named, _normalisation_of(own, _moe_section(config, row, count_keys))


def _moe_section(config: Config, row: Architecture, count_keys: Sequence[ConfigKey]) -> Section:
    """The section that describes the MoE: that of the count, or else the row's last."""
    return config.section(count_keys[0].section if count_keys else row.sections[-1]) or {}


def read_moe_config(section: Section, row: Architecture) -> MoeConfig:
    """Read the config's description of one MoE.

    Args:
        section: the section of the config that describes the MoE.
        row: the row of its model type.

    Raises:
        CheckpointError: a value is not a number.
        UnsupportedError: the number of experts is missing, or the normalisation is unknown.
    """
    overrides = _layer_overrides(section)
    experts = total_experts(row, section)
    normalisation = _normalisation(row, section)
    count = row.count_keys[0] if row.count_keys else None
    kind = row.router if isinstance(row.router, RouterKind) else None
    layers = read_integer(section, "num_hidden_layers", 0)
    limited = row.groups and section.get("topk_method") != "greedy"
    no_effect = row.no_effect and (row.no_effect_if is None or section.get(row.no_effect_if))
    return MoeConfig(
        experts=experts,
        experts_by_layer=_experts_by_layer(section, overrides, experts),
        layers=layers,
        moe_layers=_moe_layers(layers, row.moe_layers, section),
        experts_without_weights=read_integer(section, "zero_expert_num", 0),
        groups=group_limit(*group_keys(section)) if limited else None,
        normalisation=normalisation,
        scaling_has_effect=not no_effect,
        has_layer_counts=any(count in layer for layer in overrides.values()),
        hidden_size=next((n for n in _hidden_sizes(section) if type(n) is int), None),
        narrow_sizes=frozenset(_narrow_sizes(section)),
        intermediate_size=(
            None
            if "per_layer_config" in section
            else _integer(section.get("moe_intermediate_size"))
        ),
        score=(section.get(kind.score_key) if kind and kind.score_key else None) or None,
        logit_cap=section.get(kind.cap_key) if kind and kind.cap_key else None,
        choice_bias=not (kind and kind.bias_key and section.get(kind.bias_key) is False),
        has_scale=row.scale_key in section,
        tied_embeddings=bool(section.get("tie_word_embeddings")),
        norm_topk_prob=bool(section.get("norm_topk_prob")),
        unread_keys=tuple(unread_keys(row, section, normalisation)),
    )


def total_experts(row: Architecture, section: Section) -> int:
    """Routed experts per layer; the largest number if layers differ.

    Raises:
        UnsupportedError: the config has no such number.
    """
    for key in row.total_keys:
        value = section.get(key)
        numbers = _by_layer(value) or ({"": value} if type(value) is int else {})
        most = max(numbers.values(), default=0)
        if 0 < most <= MAX_NUMBER and min(numbers.values()) >= 0:
            return most
    keys = " or ".join(row.total_keys)
    raise UnsupportedError(
        f"{CONFIG}: does not say how many routed experts a layer has ({keys})",
        hint="Add the key with that number, beside the key of the experts per token.",
    )


def _normalisation_of(row: Architecture, section: Section) -> Normalisation:
    """The normalisation of the weights of the chosen experts.

    Raises:
        UnsupportedError: the closed forms do not cover it.
    """
    normalised = row.normalisation
    if isinstance(normalised, Flag):
        if (
            normalised.only_if is not None
            and section.get(normalised.only_if[0]) != normalised.only_if[1]
        ):
            return Normalisation(True)
        keys = (normalised.key, *normalised.aliases)
        value = next((section[key] for key in keys if section.get(key) is not None), None)
        return Normalisation(normalised.default if value is None else bool(value))
    if isinstance(normalised, SharedSum):
        return Normalisation(True, read_integer(section, normalised.key, 0))
    if isinstance(normalised, PowerNorm):
        power = section.get(normalised.key, 1)
        if power not in (1, None):
            raise UnsupportedError(
                f"{CONFIG}: {normalised.key} is {power!r}; only 1 and null are supported",
                hint="Give the factor yourself (--factor).",
            )
        return Normalisation(power == 1)
    return Normalisation(normalised)


def group_limit(groups: int, chosen: int) -> tuple[int, int] | None:
    """Number of groups of experts, and of groups that a token may use; None for no limit."""
    return (groups, chosen) if chosen and groups > 1 else None


def sizes(config: Config) -> Iterator[tuple[Any, Any]]:
    """Hidden size and number of layers, unchecked, from each text section of a config."""
    for section in (config.section(name) or {} for name in TEXT_SECTIONS):
        yield next(_hidden_sizes(section), None), section.get("num_hidden_layers")


def _hidden_sizes(section: Section) -> Iterator[Any]:
    keys = ("hidden_size", "d_model", "n_embd")
    return (section[key] for key in keys if section.get(key) is not None)


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _normalisation(row: Architecture, section: Section) -> Normalisation | None:
    """None if neither a row of the table nor the config tells."""
    if row.model_type or "norm_topk_prob" in section:
        return _normalisation_of(row, section)
    return None


def _layer_overrides(section: Section) -> dict[str, Section]:
    """The entries of ``per_layer_config``, by layer number."""
    overrides = section.get("per_layer_config")
    items = overrides.items() if isinstance(overrides, dict) else ()
    return {layer: value for layer, value in items if isinstance(value, dict)}


def _experts_by_layer(
    section: Section, overrides: Mapping[str, Section], total: int
) -> dict[str, int]:
    """Routed experts of layers for which a list or ``per_layer_config`` gives a number."""
    listed = next((found for key in _LIST_KEYS if (found := _by_layer(section.get(key)))), {})
    by_layer = {layer: n if 0 < n <= MAX_NUMBER else total for layer, n in listed.items()}
    for layer, override in overrides.items():
        by_layer[layer] = read_integer(override, "num_local_experts", 0) or total
    return by_layer


_LIST_KEYS: Final = (
    *("num_experts_per_layer", "num_local_experts_per_layer", "n_routed_experts_per_layer"),
    *("moe_num_experts_per_layer", "pyramid_num_routed"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
"""Config keys that may hold one number of experts per layer."""


def _by_layer(value: Any) -> dict[str, int]:
    """The numbers of a list or an object, by layer number; empty if `value` is neither.

    Dense layers may have null.
    """
    if isinstance(value, list):
        value = {str(layer): number for layer, number in enumerate(value)}
    if not isinstance(value, dict):
        return {}
    numbers = {layer: number for layer, number in value.items() if number is not None}
    return numbers if all(type(number) is int for number in numbers.values()) else {}


def _moe_layers(count: int, rule: MoeLayers | None, section: Section) -> frozenset[int] | None:
    """The MoE layers among `count` layers, according to the config."""
    if rule is None or not count:
        return None
    if isinstance(rule, All):
        return frozenset(range(count))
    if isinstance(rule, SparseStep):
        step = read_integer(section, "decoder_sparse_step", 1) or 1
        dense = section.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"{CONFIG}: mlp_only_layers is {dense!r}, not a list")
        return frozenset(range(step - 1, count, step)) - {i for i in dense if isinstance(i, int)}
    assert isinstance(rule, FirstDense)
    return _after_dense(
        count, read_integer(section, "first_k_dense_replace", rule.default), section
    )


def _after_dense(count: int, first: int, section: Section) -> frozenset[int]:
    freq = section.get("moe_layer_freq")
    every = freq if type(freq) is int and freq > 0 else 1
    found = frozenset(layer for layer in range(first, count) if layer % every == 0)
    types = section.get("mlp_layer_types")
    if not isinstance(types, list):
        return found
    named = frozenset(layer for layer, kind in enumerate(types[:count]) if kind != "dense")
    return named | {layer for layer in found if layer >= len(types)}


def _narrow_sizes(section: Section) -> Iterator[int]:
    words = ("latent", "rank", "expert_hidden", "moe_hidden")
    for key, value in section.items():
        if type(value) is int and any(word in key for word in words):
            yield value
