"""What a config says of its MoE: read once, here, into a record that everything else takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moescale.errors import CheckpointError, UnsupportedError
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
from moescale.families.config import CONFIG, MOST, Config, whole
from moescale.families.unread_keys import group_keys, unread_keys
from moescale.routers.kinds import RouterKind
from moescale.routers.normalisation import Normalisation

Section = Mapping[str, Any]
"""The object in the config that describes the MoE; nothing but this module and `unread_keys`, which
it calls, looks into one."""


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """What the config says of one MoE.

    Attributes:
        experts: routed experts of a layer; the largest number, where layers differ.
        experts_by_layer: routed experts of the layers that the config counts one by one.
        layers: layers of the model without MTP blocks; 0 where the config does not say.
        moe_layers: the numbers of its MoE layers; None where only the tensors can tell.
        experts_without_weights: experts that the router chooses too and that pass a token on as it
            is.
        groups: groups of experts, and how many of them a token may choose from; None for no limit.
        router: how the weights of the chosen experts are normalised; None where that is not known.
        effective: False if something after the experts removes every factor.
        own_counts: single layers have their own number of experts per token.
        hidden: numbers in a hidden state; None where the config does not say.
        narrower: numbers in the states of narrower streams that experts may write to.
        inner: numbers between the matrices of an expert; None where unknown or not one number.
        score: the score function that a key names; None where no key does.
        logit_cap: the bound that a tanh squeezes the logits into; None for no bound.
        choice_bias: False if a key says that no bias takes part in the choice of experts.
        has_scale: the row's `scale_key` is present.
        tied: the embedding is also the head.
        asks_to_renormalise: ``norm_topk_prob`` is true, whatever the model's code makes of it.
        unread: keys that change the routing of some model types and that the row does not read,
            with their values.
    """

    experts: int
    experts_by_layer: Mapping[int, int] = field(default_factory=dict)
    layers: int = 0
    moe_layers: frozenset[int] | None = None
    experts_without_weights: int = 0
    groups: tuple[int, int] | None = None
    router: Normalisation | None = None
    effective: bool = True
    own_counts: bool = False
    hidden: int | None = None
    narrower: frozenset[int] = frozenset()
    inner: int | None = None
    score: Any = None
    logit_cap: float | None = None
    choice_bias: bool = True
    has_scale: bool = False
    tied: bool = False
    asks_to_renormalise: bool = False
    unread: tuple[tuple[str, Any], ...] = ()

    def experts_of(self, layer: int) -> int:
        """Routed experts of the layer with that number."""
        return self.experts_by_layer.get(layer, self.experts)

    def largest_count(self, experts: int) -> int:
        """The largest number of experts per token that a router of so many experts can choose.

        A group-limited router masks all experts outside ``topk_group`` of ``n_group`` groups; asked
        for more than those hold, it silently takes masked ones.
        """
        experts += self.experts_without_weights
        if self.groups is None:
            return experts
        groups, chosen = self.groups
        return min(experts, chosen * (experts // groups))


def read_moe_config(section: Section, row: Architecture) -> MoeConfig:
    """Read all that a config says of its MoE.

    Args:
        section: the section of the config that describes it.
        row: the row of its model type.

    Raises:
        CheckpointError: a number is not one.
        UnsupportedError: the number of experts is missing, or the normalisation is not known.
    """
    own = _per_layer(section)
    experts = total_experts(row, section)
    router = _router(row, section)
    count = row.count[0] if row.count else None
    kind = row.router if isinstance(row.router, RouterKind) else None
    layers = whole(section, "num_hidden_layers", 0)
    hidden, _ = _sizes(section)
    return MoeConfig(
        experts=experts,
        experts_by_layer=_experts_by_layer(section, own, experts),
        layers=layers,
        moe_layers=_moe_layers(layers, row.moe_layers, section),
        experts_without_weights=whole(section, "zero_expert_num", 0),
        groups=group_limit(*group_keys(section)) if row.groups and _is_limited(section) else None,
        router=router,
        effective=not (row.no_effect and _is_on(row.no_effect_if, section)),
        own_counts=any(count in layer for layer in own.values()),
        hidden=hidden,
        narrower=frozenset(_narrower(section)),
        inner=None if own else _integer(section.get("moe_intermediate_size")),
        score=(section.get(kind.score_key) if kind and kind.score_key else None) or None,
        logit_cap=_logit_cap(section, kind.cap_key) if kind and kind.cap_key else None,
        choice_bias=not (kind and kind.bias_key and section.get(kind.bias_key) is False),
        has_scale=row.scale_key in section,
        tied=bool(section.get("tie_word_embeddings")),
        asks_to_renormalise=bool(section.get("norm_topk_prob")),
        unread=tuple(unread_keys(row, section, router)),
    )


def total_experts(row: Architecture, section: Section) -> int:
    """Routed experts of a layer; of several numbers the largest.

    Raises:
        UnsupportedError: the config does not say.
    """
    for key in row.total:
        value = section.get(key)
        numbers = _by_layer(value) or ({"": value} if type(value) is int else {})
        most = max(numbers.values(), default=0)
        if 0 < most <= MOST and min(numbers.values()) >= 0:
            return most
    keys = " or ".join(row.total)
    raise UnsupportedError(
        f"{CONFIG}: does not say how many routed experts a layer has ({keys})",
        hint="Add the key with that number, beside the one of the experts per token.",
    )


def router_of(row: Architecture, section: Section) -> Normalisation:
    """How the weights of the chosen experts are normalised.

    Raises:
        UnsupportedError: in a way that the closed forms do not cover.
    """
    normalised = row.normalised
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
        return Normalisation(True, whole(section, normalised.key, 0))
    if isinstance(normalised, PowerNorm):
        power = section.get(normalised.key, 1)
        if power not in (1, None):
            raise UnsupportedError(
                f"{CONFIG}: {normalised.key} is {power!r}: only 1 and null are known",
                hint="Give the factor yourself (--factor).",
            )
        return Normalisation(power == 1)
    return Normalisation(normalised)


def group_limit(groups: int, chosen: int) -> tuple[int, int] | None:
    """How many groups of experts there are and how many a token may choose; None for no limit."""
    return (groups, chosen) if chosen and groups > 1 else None


def sizes(config: Config) -> Iterator[tuple[int | None, int | None]]:
    """The hidden size and the number of layers, as each text section of a config has them."""
    return (_sizes(config.section(name) or {}) for name in TEXT_SECTIONS)


def _sizes(section: Section) -> tuple[int | None, int | None]:
    hidden = (_integer(section.get(key)) for key in ("hidden_size", "d_model", "n_embd"))
    return next((h for h in hidden if h is not None), None), _integer(
        section.get("num_hidden_layers")
    )


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _router(row: Architecture, section: Section) -> Normalisation | None:
    """None if the row is not of the table and the config does not tell either."""
    if row.model_type or "norm_topk_prob" in section:
        return router_of(row, section)
    return None


def _is_limited(section: Section) -> bool:
    return section.get("topk_method") != "greedy"


def _is_on(switch: str | None, section: Section) -> bool:
    return switch is None or bool(section.get(switch))


def _per_layer(section: Section) -> dict[int, Section]:
    """What ``per_layer_config`` says of single layers, by their numbers."""
    own = section.get("per_layer_config")
    items = own.items() if isinstance(own, dict) else ()
    return {int(key): value for key, value in items if key.isdecimal() and isinstance(value, dict)}


def _experts_by_layer(section: Section, own: Mapping[int, Section], total: int) -> dict[int, int]:
    """Routed experts of layers that have their own number, or stand in a list of numbers."""
    listed = next((found for key in _LISTED if (found := _by_layer(section.get(key)))), {})
    numbers = {int(key): number for key, number in listed.items() if key.isdecimal()}
    by_layer = {layer: n if 0 < n <= MOST else total for layer, n in numbers.items()}
    overrides = {layer: whole(value, "num_local_experts", 0) for layer, value in own.items()}
    return by_layer | {layer: number or total for layer, number in overrides.items()}


_LISTED: Final = (
    *("num_experts_per_layer", "num_local_experts_per_layer", "n_routed_experts_per_layer"),
    *("moe_num_experts_per_layer", "pyramid_num_routed"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
"""Config keys that may hold a number of experts for each layer."""


def _by_layer(value: Any) -> dict[str, int]:
    """A list or an object of numbers by the layer's number; empty if it is neither.

    A dense layer may have a null.
    """
    if isinstance(value, list):
        value = {str(layer): number for layer, number in enumerate(value)}
    if not isinstance(value, dict):
        return {}
    numbers = {layer: number for layer, number in value.items() if number is not None}
    return numbers if all(type(number) is int for number in numbers.values()) else {}


def _moe_layers(count: int, rule: MoeLayers | None, section: Section) -> frozenset[int] | None:
    """Those of `count` layers that the config makes MoE layers."""
    if rule is None or not count:
        return None
    if isinstance(rule, All):
        return frozenset(range(count))
    if isinstance(rule, SparseStep):
        step = whole(section, "decoder_sparse_step", 1) or 1
        dense = section.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"{CONFIG}: mlp_only_layers is {dense!r}, not a list")
        return frozenset(range(step - 1, count, step)) - {i for i in dense if isinstance(i, int)}
    assert isinstance(rule, FirstDense)
    return _after_dense(count, whole(section, "first_k_dense_replace", rule.default), section)


def _after_dense(count: int, first: int, section: Section) -> frozenset[int]:
    freq = section.get("moe_layer_freq")
    every = freq if type(freq) is int and freq > 0 else 1
    found = frozenset(layer for layer in range(first, count) if layer % every == 0)
    types = section.get("mlp_layer_types")
    if not isinstance(types, list):
        return found
    named = frozenset(layer for layer, kind in enumerate(types[:count]) if kind != "dense")
    return named | {layer for layer in found if layer >= len(types)}


def _narrower(section: Section) -> Iterator[int]:
    words = ("latent", "rank", "expert_hidden", "moe_hidden")
    for key, value in section.items():
        if type(value) is int and any(word in key for word in words):
            yield value


def _logit_cap(section: Section, key: str) -> float | None:
    cap = section.get(key)
    if cap is not None and (type(cap) not in (int, float) or not 0 <= cap < math.inf):
        raise CheckpointError(f"{CONFIG}: {key} is {cap!r}, not a number from 0")
    return cap or None
