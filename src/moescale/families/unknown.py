"""Warns of config keys and tensors that a model type's row does not know.

An unknown norm, bias or score can reverse or remove the effect of a factor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

from moescale.checkpoint.tensor import Tensor
from moescale.families.architectures import Architecture
from moescale.families.config import CONFIG
from moescale.families.formats import split_name
from moescale.families.moe_config import MoeConfig
from moescale.families.names import plain_name
from moescale.families.projections import Projection
from moescale.families.router_shapes import CHOICE_BIASES, LOGIT_BIASES
from moescale.routers.kinds import RouterKind

_PROJECTION: Final = re.compile(
    r"[0-9]*\.?(?:expert_[0-9]+\.)?(?:mlp\.)?(?:gate_up_projs?|(?:gate|up|down)_projs?|w[123]|w13|v1"
    r"|fc[1-3]?|proj|wi(?:_[01])?|wo|(?:in|out)put_linear|linear(?:_v|_1)?)(?![a-z0-9])(?!.*norm)"
)
"""The part of a name after ``experts.``, for tensors of experts."""
_LINEAR: Final = re.compile(
    r"(?:(?:global_)?shared?_?(?:mlp|experts?)\w*|switch_mlp|(?:gate|up|down|gate_up)_proj"
    r"|w[123]|fc[1-3]|(?:in|out)put_linear|[0-9]+)(?![a-z0-9])"
)
"""Names of linear layers in MoE blocks of all model types, up to the first part."""
_ROUTER: Final = re.compile(
    r"(?:gate|router)(?:\.(?:layer|linear|gate|proj|wg|classifier))?|gate_weight|router_gate|wg"
)
"""Modules that make logits."""
_BESIDE: Final = re.compile(
    r"(?:pre|post)_(?:feed_?forward|ffn|mlp|moe)\w*norm[^.]*\.weight"
    r"|(?:feed_?forward|ffn|mlp|moe)_(?:post|out)\w*norm[^.]*\.weight"
)
"""Norms before and after the feed-forward block, by the names of various types."""


def unknown_keys(row: Architecture, config: MoeConfig) -> Iterator[str]:
    """One warning per config key that may change the routing and that the row does not read."""
    for key, value in config.unread_keys:
        yield (
            f"{CONFIG}: {key} is {value!r}, which moescale does not read for {row.model_type!r};"
            " if the model's code does, the factors may be wrong"
        )


def unknown_tensors(
    row: Architecture,
    config: MoeConfig,
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
) -> Iterator[str]:
    """One warning per kind of tensor in MoE layers that the row does not know."""
    if not row.model_type or not config.scaling_has_effect:
        return
    blocks = {plain_name(p.prefix) + p.block for p in projections}
    layers = {plain_name(p.prefix) + "." for p in projections}
    blocks -= layers
    in_block, in_layer = _longest_prefix(blocks), _longest_prefix(layers)
    found: dict[str, list[str]] = defaultdict(list)
    known = _KnownTensors(row)
    for tensor in tensors:
        name = plain_name(tensor.name)
        if known.in_experts(name):  # first, because most tensors are
            continue
        at = in_block(name) or in_layer(name)
        if at is not None and not known(name[len(at) :], in_block=at not in layers):
            found[name[len(at) :]].append(tensor.name)
    for rest, names in sorted(found.items()):
        yield (
            f"{names[0]} ({len(names)} in all): moescale does not know what {rest} does in an MoE"
            f" layer of {row.model_type!r}; if it follows the experts, the factors may be wrong"
        )


def _longest_prefix(prefixes: Collection[str]) -> Callable[[str], str | None]:
    """A function that finds a name's longest prefix, in time independent of its length."""
    lengths = sorted({len(part) for part in prefixes if part.endswith(".")}, reverse=True)
    return lambda name: next((name[:n] for n in lengths if name[:n] in prefixes), None)


class _KnownTensors:
    """The tensors of MoE layers that a row knows."""

    def __init__(self, row: Architecture) -> None:
        kind = row.router if isinstance(row.router, RouterKind) else None
        self._any_router = kind is None
        self._names = set(row.other_modules)
        if kind is None or kind.bias:
            self._names |= set(CHOICE_BIASES)
        if kind is None or kind.logit_bias:
            self._names |= set(LOGIT_BIASES)
        if kind is not None:
            names = {*kind.weight, *kind.norm, *kind.bias, *kind.logit_bias}
            self._names |= names | {name.partition(".")[2] for name in names}
            self._names |= {"gate.tid2eid"} if kind.not_if else set()
        self._joint_norm = row.partial_effect is not None
        self._forms: dict[str, bool] = {}

    def in_experts(self, name: str) -> bool:
        """Whether a tensor belongs to an expert and is of a known kind."""
        _, experts, rest = name.rpartition("experts.")
        form = rest.lstrip("0123456789")
        if experts and form not in self._forms:
            self._forms[form] = _PROJECTION.match(rest) is not None
        return bool(experts) and self._forms[form]

    def __call__(self, rest: str, in_block: bool) -> bool:
        """Whether a tensor is known, by the part of its name after its block or layer."""
        if rest in self._names or rest.partition(".")[0] in self._names:
            return True
        if _BESIDE.fullmatch(rest):
            return self._joint_norm
        if not in_block or _LINEAR.match(rest):
            return True
        if self._any_router and _ROUTER.match(rest):
            return True
        module, suffix = split_name(rest)
        return _ROUTER.fullmatch(module) is not None and suffix not in ("bias", "scale")
