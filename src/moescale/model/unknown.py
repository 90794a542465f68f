"""What a checkpoint has that its row of the table knows nothing of: config keys and tensors.

A norm, a bias or a score that nobody told the row of can turn a factor round or remove it, so each
is a warning with its name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from moescale.checkpoint.header import Tensor
from moescale.model.architectures import Architecture, Flag
from moescale.model.experts import Projection
from moescale.model.gating import GATINGS, Gating
from moescale.model.names import plain_name

SCORES: Final = ("score_function", "scoring_func", "expert_selection_fn", "router_score_func")
"""Config keys that name how scores are made of logits."""
NORMALISED: Final = ("norm_topk_prob", "moe_renormalize", "norm_expert_weight")
"""Config keys that say whether the weights of the chosen experts sum to 1."""
BIASED: Final = ("moe_router_enable_expert_bias", "use_expert_bias", "use_moe_router_bias")
"""Config keys that say whether a bias takes part in the choice of experts."""
TEMPERATURES: Final = ("gate_temp", "router_temperature", "moe_router_logit_softcapping")
"""Config keys of numbers that divide or bound the logits; 0, 1 and null change nothing."""
NORMS: Final = ("latent_moe_use_norm", "use_routed_expert_norm", "moe_use_norm", "use_router_norm")
"""Config keys that turn on a norm inside the MoE block."""


def unread_keys(row: Architecture, section: Mapping[str, Any]) -> Iterator[str]:
    """Config keys that change the routing in some model types and that this row does not read."""
    part = f"/{row.part}" if row.part else ""
    gating = GATINGS.get(row.model_type + part)
    read = _read_by(row, gating)
    own = gating.score if isinstance(gating, Gating) else None
    unusual: dict[str, bool] = {
        **{key: own is not None and section.get(key) not in (None, own) for key in SCORES},
        **{key: _contradicts(row, section.get(key)) for key in NORMALISED},
        **{
            key: section.get(key) is True and isinstance(gating, Gating) and not gating.bias
            for key in BIASED
        },
        **{key: section.get(key) not in (None, 0, 1, False) for key in TEMPERATURES},
        **{key: bool(section.get(key)) for key in NORMS},
    }
    for key in unusual:
        if unusual[key] and key not in read:
            yield (
                f"config.json: {key} is {section[key]!r}, which the row of {row.model_type!r} does"
                " not read; where the model's code does, factors may be wrong"
            )


def _read_by(row: Architecture, gating: object) -> set[str]:
    keys = {row.no_effect_if}
    if isinstance(row.weights, Flag):
        keys |= {row.weights.key, *row.weights.aliases}
    if isinstance(gating, Gating):
        keys |= {gating.score_key, gating.bias_key, gating.cap_key}
    return {key for key in keys if key}


def _contradicts(row: Architecture, value: Any) -> bool:
    """Whether a config says the opposite of what the code of the type always does."""
    return isinstance(row.weights, bool) and isinstance(value, bool) and value is not row.weights


_KNOWN: Final = re.compile(
    r"(gate|router|wg|switch_mlp|shared?_?(mlp|experts?)(_gate|_scale)?|moe_statics|coefficient|"
    r"e_score_correction_bias|expert_bias|expert_biases|router_bias|gate_weight|gate_bias|tid2eid|"
    r"(text|vision)_moe|fc[12]_latent_proj|routed_expert_(up|down)_proj|experts|"
    r"(gate|up|down|gate_up)_proj(s|_bias|_scale|_blocks|_scales|_scale_inv)?|w[123]|fc[12]|"
    r"(in|out)put_linear|bias|layer|classifier|global_shared_expert\w*)\b|\d+\b"
)
"""First words, after the name of a MoE block, of what some row of the table knows."""


def unknown_tensors(
    row: Architecture, projections: Sequence[Projection], tensors: Iterable[Tensor]
) -> Iterator[str]:
    """Tensors inside MoE blocks that no row of the table knows, one warning a kind."""
    blocks = {plain_name(p.prefix) + p.block for p in projections if len(p.block) > 1}
    if not blocks or row.no_effect or not row.model_type:
        return
    found: dict[str, list[str]] = defaultdict(list)
    for tensor in tensors:
        if ".experts." in tensor.name:  # which are most of them, and known
            continue
        name = plain_name(tensor.name)
        block = _block_of(name, blocks)
        if block is not None and not _KNOWN.match(name[len(block) :]):
            found[name[len(block) :]].append(tensor.name)
    for rest, names in sorted(found.items()):
        yield (
            f"{names[0]} ({len(names)} such): the row of {row.model_type!r} does not know what"
            f" {rest} does in a MoE block; where it follows the experts, factors may be wrong"
        )


def _block_of(name: str, blocks: set[str]) -> str | None:
    """The block that a tensor lies in, by trying each beginning of its name."""
    for dot in re.finditer(r"\.", name):
        if name[: dot.end()] in blocks:
            return name[: dot.end()]
    return None
