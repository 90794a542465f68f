"""Warnings of config keys and tensors that the row of a model type does not know.

A norm, a bias or a score that the row does not know can turn a factor round or remove it, so each
is a warning with its name.
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
"""What follows ``experts.`` in the names of what experts are made of."""
_LINEAR: Final = re.compile(
    r"(?:(?:global_)?shared?_?(?:mlp|experts?)\w*|switch_mlp|(?:gate|up|down|gate_up)_proj"
    r"|w[123]|fc[1-3]|(?:in|out)put_linear|[0-9]+)(?![a-z0-9])"
)
"""First words, after the name of a MoE block, of linear layers that stand in some type."""
_ROUTER: Final = re.compile(
    r"(?:gate|router)(?:\.(?:layer|linear|gate|proj|wg|classifier))?|gate_weight|router_gate|wg"
)
"""Modules that make logits."""
_BESIDE: Final = re.compile(
    r"(?:pre|post)_(?:feed_?forward|ffn|mlp|moe)\w*norm[^.]*\.weight"
    r"|(?:feed_?forward|ffn|mlp|moe)_(?:post|out)\w*norm[^.]*\.weight"
)
"""Norms before and after what is not attention, as some types call them."""


def unknown_keys(row: Architecture, config: MoeConfig) -> Iterator[str]:
    """Config keys that change the routing and that the row does not read, one warning a key."""
    for key, value in config.unread_keys:
        yield (
            f"{CONFIG}: {key} is {value!r}, which the row of {row.model_type!r} does"
            " not read; where the model's code does, factors may be wrong"
        )


def unknown_tensors(
    row: Architecture,
    config: MoeConfig,
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
) -> Iterator[str]:
    """Tensors of MoE layers that the row does not know, one warning a kind."""
    if not row.model_type or not config.scaling_has_effect:
        return
    blocks = {plain_name(p.prefix) + p.block for p in projections}
    layers = {plain_name(p.prefix) + "." for p in projections}
    blocks -= layers
    in_block, in_layer = _longest_of(blocks), _longest_of(layers)
    found: dict[str, list[str]] = defaultdict(list)
    known = _Known(row)
    for tensor in tensors:
        name = plain_name(tensor.name)
        if known.in_experts(name):  # which are most of them
            continue
        at = in_block(name) or in_layer(name)
        if at is not None and not known(name[len(at) :], in_block=at not in layers):
            found[name[len(at) :]].append(tensor.name)
    for rest, names in sorted(found.items()):
        yield (
            f"{names[0]} ({len(names)} such): the row of {row.model_type!r} does not know what"
            f" {rest} does in a MoE layer; where it follows the experts, factors may be wrong"
        )


def _longest_of(beginnings: Collection[str]) -> Callable[[str], str | None]:
    """What finds the longest of these that a name begins with; a long name takes no longer."""
    lengths = sorted({len(part) for part in beginnings if part.endswith(".")}, reverse=True)
    return lambda name: next((name[:n] for n in lengths if name[:n] in beginnings), None)


class _Known:
    """What a row knows of the tensors of its MoE layers."""

    def __init__(self, row: Architecture) -> None:
        kind = row.router if isinstance(row.router, RouterKind) else None
        self._any_router = kind is None
        self._own = set(row.other_modules)
        if kind is None or kind.bias:
            self._own |= set(CHOICE_BIASES)
        if kind is None or kind.logit_bias:
            self._own |= set(LOGIT_BIASES)
        if kind is not None:
            names = {
                *kind.weight,
                *kind.norm,
                *kind.bias,
                *kind.logit_bias,
            }
            self._own |= names | {name.partition(".")[2] for name in names}
            self._own |= {"gate.tid2eid"} if kind.not_if else set()
        self._joint_norm = row.partial_effect is not None
        self._forms: dict[str, bool] = {}

    def in_experts(self, name: str) -> bool:
        """Whether a tensor is of an expert, and of a kind that is known."""
        _, experts, rest = name.rpartition("experts.")
        form = rest.lstrip("0123456789")
        if experts and form not in self._forms:
            self._forms[form] = _PROJECTION.match(rest) is not None
        return bool(experts) and self._forms[form]

    def __call__(self, rest: str, in_block: bool) -> bool:
        """Whether a tensor is known by what follows the name of its block, or else of its layer."""
        if rest in self._own or rest.partition(".")[0] in self._own:
            return True
        if _BESIDE.fullmatch(rest):
            return self._joint_norm
        if not in_block or _LINEAR.match(rest):
            return True
        if self._any_router and _ROUTER.match(rest):
            return True
        module, suffix = split_name(rest)
        return _ROUTER.fullmatch(module) is not None and suffix not in ("bias", "scale")
