"""Recognises routed down-projections by the names of any library, as in a second set of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moescale.families.formats import INPUT_SUFFIXES, split_name
from moescale.families.projections import Layer, Projection, layer_after

_LAYER = re.compile(
    r"(?P<before>(?:.*?\.)??)(?:(?:layers?|blocks?|h|blk|meta_mlp)\.|(?<=mtp\.)|(?<=mtp_layers\.))"
    r"(?P<number>[0-9]{1,9})\.(?P<rest>.+)",
    re.DOTALL,
)
_WORDS = r"(?:down|w2|fc2|wo|out(?:put)?|down_projs?|linear_fc2|dense_4h_to_h)"
_ROUTED = re.compile(
    rf"(?:experts?|switch_mlp|moe)(?:[._].*)?[._]{_WORDS}(?![a-z0-9])"
    r"|(?:block_sparse_moe|mlp|moe)\.output_linear|mlp\.experts\.proj(?![a-z0-9])"
    r"|mlp2_(?:weight|bias)|down_exps|mlp\.up_embed|moe_block\.experts\.[0-9]+\.linear_1",
    re.DOTALL,
)
"""Names of an expert's down-projection, or of one for all experts of a layer, in any library.

Sources: the templates of `architectures`; OpenAI's own gpt-oss (``mlp2_weight``), Meta's Llama 4
(``moe_w_out_eD_F``), Megatron-Core (``experts.local_experts.0.linear_fc2``), llama.cpp
(``ffn_down_exps``).
"""
_NOT_ROUTED = re.compile(
    r"shared|share_expert|lora_|lokr_|hada_|oft_|router|output_scale|(?:gate|up)_proj"
    r"|(?<![a-z_])gate(?![a-z_])"
)
_LONGEST = 500
"""The longest name that is searched; the search of a longer one could take long."""
_NUMBER = re.compile("(?<![a-z0-9])[0-9]+")
"""A separate number; the 1 of ``w1`` belongs to the name."""


def layer_from_name(name: str) -> Layer | None:
    """The layer of a routed down-projection or its scale; None for other tensors."""
    match = _LAYER.fullmatch(name) if len(name) <= _LONGEST else None
    if match is None or not _ROUTED.search(match["rest"]) or _NOT_ROUTED.search(match["rest"]):
        return None
    if split_name(name)[1] in INPUT_SUFFIXES:
        return None
    return layer_after(match["before"], int(match["number"]))


def layers_from_names(names: Iterable[str]) -> set[Layer]:
    """The layers of all routed down-projections among the names."""
    return {layer for name in names if (layer := layer_from_name(name)) is not None}


def layers_of(projections: Iterable[Projection]) -> set[Layer]:
    """The layers of the projections, named as by `layers_from_names`."""
    return {
        layer_from_name(p.module) or layer_after(p.module[: p.number_span[0]], p.layer.number)
        for p in projections
    }


def expert_names(names: Iterable[str], projections: Iterable[Projection]) -> set[str]:
    """Names that equal the projections' except for numbers, or look like routed projections."""
    if not (names := list(names)):
        return set()
    forms = {_form(tensor.name) for p in projections for tensor in p.by_suffix.values()}
    return {name for name in names if _form(name) in forms or layer_from_name(name) is not None}


def _form(name: str) -> str:
    return _NUMBER.sub("#", name)
