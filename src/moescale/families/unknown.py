"""What a checkpoint has that its row of the table knows nothing of: config keys and tensors.

A norm, a bias or a score that nobody told the row of can turn a factor round or remove it, so each
is a warning with its name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from moescale.checkpoint.tensor import Tensor
from moescale.families.architectures import Architecture, Flag, PowerNorm
from moescale.families.config import whole
from moescale.families.formats import split_name
from moescale.families.names import plain_name
from moescale.families.projections import Projection
from moescale.families.router import Router, has_no_effect
from moescale.families.witness import CHOICE_BIASES, LOGIT_BIASES
from moescale.routers.kinds import Gating

# Config keys --------------------------------------------------------------------------------------
# As transformers 5.24, sglang 0.5.23, mlx-lm 0.32.2 and the code in published repos read them

SCORES: Final = frozenset(
    (
        *("score_function", "scoring_func", "score_func", "expert_selection_fn"),
        *("router_score_func", "router_scoring_func"),
        *("moe_router_score_func", "moe_router_activation_func"),
    )
)
"""Keys that name how scores are made of logits."""
_SCORING: Final = re.compile(
    r"(?!.*share)(?:.*(?:scor|rout|expert|moe|top_?k).*|gat(?:e|ing))"
    r"_(?:fn|func|function|act|activation|type)"
)
"""Keys that may do so under other names, where their value is the name of a score."""
_SCORE_NAMES: Final = ("softmax", "sigmoid", "sqrtsoftplus")
NORMALISED: Final = frozenset(
    ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm")
)
"""Keys that say whether the weights of the chosen experts sum to 1."""
_NORMALISING: Final = re.compile(
    r"(?:re)?normali[sz]e|(?:re)?norm(?:ali[sz]e)?_(?:top_?k|expert|rout\w*|gat\w*|moe)\w*"
    r"|(?:top_?k|expert|rout\w*|gat\w*|moe)\w*_(?:renorm|normali[sz]e)\w*"
)
"""Keys that may say so under other names."""
BIASED: Final = frozenset(
    (
        *("moe_router_enable_expert_bias", "use_expert_bias", "use_moe_router_bias"),
        *("use_routing_bias", "use_gate_bias", "moe_gate_bias"),
    )
)
"""Keys that say whether a bias takes part in the choice of experts."""
ON_INPUT: Final = frozenset(("moe_apply_router_weight_on_input", "apply_router_weight_on_input"))
"""Keys that say that the weight of an expert multiplies its input, not its output."""
_BOUND: Final = re.compile(
    r"(?:moe_)?(?:gate|gating|router?|routing)_(?:logits?_)?(?:temp|temperature|softcap\w*)"
)
"""Keys of numbers that divide or bound the logits; 0, 1 and null change nothing."""
_NORM: Final = re.compile(r".*(?:rout|moe|expert).*norm.*|.*norm.*(?:rout|moe|expert).*")
"""Keys that turn on a norm inside the MoE block, by true."""


def unread_keys(
    row: Architecture, section: Mapping[str, Any], router: Router | None
) -> Iterator[str]:
    """Config keys that change the routing in some model types and that this row does not read."""
    gating = _gating(row)
    read = _read_by(row, gating)
    unread = {} if row.groups else _groups(section)
    for key, value in section.items():
        if key in unread or (key not in read and _is_unusual(key, value, gating, router)):
            yield (
                f"config.json: {key} is {value!r}, which the row of {row.model_type!r} does"
                " not read; where the model's code does, factors may be wrong"
            )


def _groups(section: Mapping[str, Any]) -> Mapping[str, int]:
    """The keys of a limit to some groups of experts, where they say one."""
    groups = whole(section, "n_group", whole(section, "num_expert_group", 0))
    return {"topk_group": groups} if 0 < whole(section, "topk_group", 0) < groups else {}


def _gating(row: Architecture) -> Gating | None:
    """How the row's router works, where it can be formed."""
    return row.gating if isinstance(row.gating, Gating) else None


def _read_by(row: Architecture, gating: Gating | None) -> set[str | None]:
    keys: set[str | None] = {row.no_effect_if}
    if isinstance(row.weights, Flag):
        keys |= {row.weights.key, *row.weights.aliases}
    if isinstance(row.weights, PowerNorm):
        keys.add(row.weights.key)
    if row.model_type == "deepseek_v2":  # which has a warning of its own
        keys.add("norm_topk_prob")
    if gating is not None:
        keys |= {gating.score_key, gating.bias_key, gating.cap_key, gating.idle_key}
    return keys


def _is_unusual(key: str, value: Any, gating: Gating | None, router: Router | None) -> bool:
    """Whether a key changes the routing from what the row takes it for."""
    if key in SCORES:
        return gating is not None and isinstance(value, str) and value != gating.score
    if _SCORING.fullmatch(key) and value in _SCORE_NAMES:
        return gating is not None and value != gating.score
    if key in NORMALISED or (value is False and _NORMALISING.fullmatch(key)):
        anyway = gating is not None and gating.late and gating.score == "softmax"
        contradicts = router is not None and value is not router.renormalised
        return isinstance(value, bool) and contradicts and not anyway
    if key in BIASED or (key, value) == ("topk_method", "noaux_tc"):
        return bool(value) and gating is not None and not (gating.bias or gating.logit_bias)
    if key == "zero_expert_num":
        return type(value) is int and value > 0 and gating is not None
    if _BOUND.fullmatch(key):
        return type(value) in (int, float) and value not in (0, 1)
    return value is True and (key in ON_INPUT or _NORM.fullmatch(key) is not None)


# Tensors ------------------------------------------------------------------------------------------

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


def unknown_tensors(
    row: Architecture,
    section: Mapping[str, Any],
    projections: Sequence[Projection],
    tensors: Iterable[Tensor],
) -> Iterator[str]:
    """Tensors of MoE layers that the row does not know, one warning a kind."""
    if not row.model_type or has_no_effect(row, section):
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
        gating = _gating(row)
        self._any_router = gating is None
        self._own = set(row.beside)
        if gating is None or gating.bias:
            self._own |= set(CHOICE_BIASES)
        if gating is None or gating.logit_bias:
            self._own |= set(LOGIT_BIASES)
        if gating is not None:
            names = {*gating.weight, *gating.norm, *gating.bias, *gating.logit_bias}
            self._own |= names | {name.partition(".")[2] for name in names}
            self._own |= {"gate.tid2eid"} if gating.not_if else set()
        self._joint_norm = row.partly is not None
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
        module, leaf = split_name(rest)
        return _ROUTER.fullmatch(module) is not None and leaf not in ("bias", "scale")
