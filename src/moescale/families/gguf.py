"""Finds the MoE of a GGUF model, from its keys and tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.architectures import Architecture
from moescale.families.config import MAX_NUMBER, ConfigKey
from moescale.families.find import Moe
from moescale.families.llama_cpp import BY_NAME, SCORES, Row
from moescale.families.moe_config import MoeConfig, group_limit
from moescale.families.pattern import find_by_pattern
from moescale.families.projections import Layer, Projection
from moescale.routers.kinds import UNKNOWN, OtherRouter, RouterKind
from moescale.routers.normalisation import Normalisation

_KNOWN = re.compile(
    r"(?:ffn_(?:up|gate|down|gate_up)_(?:ch)?exps\.(?:weight|bias|scale|input_scale))|ffn_norm_exps\.weight"
)
"""Known tensors of routed experts."""
_ROUTED = re.compile(r"ffn_(?:gate_inp|(?:up|gate|gate_up|down)_exps)\.weight")
_OLD = re.compile(r"blk\.\d+\.ffn_down\.\d+\.weight")


class GgufKeys(Protocol):
    """The keys in the header of a file."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""


def find_gguf_moe(
    keys: GgufKeys,
    tensors: Sequence[Tensor],
    arch: str | None,
    pattern: str | None,
    experts_key: str | None,
) -> Moe:
    """Find the MoE and check that it is complete.

    Args:
        keys: the keys of the first file.
        tensors: of all files; shapes have the slowest dimension first.
        arch: treat the model as this architecture.
        pattern: regular expression for the names of the down-projections.
        experts_key: key of the experts per token; goes with `pattern`.

    Raises:
        UnsupportedError: the architecture is not known, or is refused.
        CheckpointError: keys and tensors contradict each other.
    """
    file_arch = keys.get("general.architecture")
    if not isinstance(file_arch, str):
        raise CheckpointError("the file has no general.architecture", hint=_NO_MODEL)
    row = _row(file_arch, tensors, arch, pattern)
    if row.refused:
        raise UnsupportedError(f"architecture {row.name!r}: {row.refused}")
    count_key = ConfigKey("", experts_key or f"{file_arch}.expert_used_count", 0)
    count = _count(keys, count_key.path)
    projections = find_by_pattern(tensors, pattern) if pattern else list(_projections(row, tensors))
    if not projections:
        raise _none_found(file_arch, tensors)
    total = _whole(keys, f"{file_arch}.expert_count")
    by_layer = _by_layer(tensors)
    experts_by_layer = _count_experts(projections, row, total)
    if pattern is None:
        _check_complete(row, by_layer, experts_by_layer)
    score = _score(row, file_arch, keys, tensors)
    renormalised = _renormalised(row, file_arch, keys, score)
    architecture = _architecture(row, file_arch, by_layer, score, renormalised)
    read = MoeConfig(
        experts=total,
        groups=_groups(keys, file_arch),
        normalisation=Normalisation(renormalised) if row.name else None,
        scaling_has_effect=architecture.no_effect is None,
    )
    return Moe(
        architecture=architecture,
        model_type=file_arch,
        config=read,
        count_keys=(count_key,),
        count=count,
        experts_by_layer=experts_by_layer,
        projections=projections,
        warnings=list(_warnings(row, file_arch, arch, by_layer)),
        layer_aliases=_layer_aliases(file_arch, keys, experts_by_layer),
    )


_MAX_NEXTN = 8
"""The most MTP layers that are looked for; models have one to three."""


def _layer_aliases(
    file_arch: str, keys: GgufKeys, experts_by_layer: Mapping[Layer, int]
) -> dict[str, Layer | None]:
    """The names of MTP layers in safetensors models; many GGUF files leave these layers out."""
    blocks, nextn = (keys.get(f"{file_arch}.{name}", 0) for name in ("block_count", _NEXTN_LAYERS))
    if type(blocks) is not int or type(nextn) is not int or blocks <= nextn:
        return {}
    found: dict[str, Layer | None] = {}
    for i in range(_MAX_NEXTN):
        layer = Layer("", blocks - nextn + i)
        present = layer if layer in experts_by_layer else None
        found |= {f"mtp.{i}": present, str(layer.number): present}
    return found


_NEXTN_LAYERS = "nextn_predict_layers"


_NO_MODEL = "It is not a model, but perhaps a projector, an adapter or an importance matrix."


def _row(file_arch: str, tensors: Sequence[Tensor], arch: str | None, pattern: str | None) -> Row:
    name = arch or file_arch
    if name in BY_NAME:
        return BY_NAME[name]
    if pattern is not None and arch is None:
        return Row("", "never", UNKNOWN)
    if not any(_ROUTED.search(t.name) or _OLD.fullmatch(t.name) for t in tensors):
        raise UnsupportedError(
            f"architecture {name!r}: is a dense model; it has no experts, so there is nothing to"
            " rescale"
        )
    if file_arch in BY_NAME:
        raise UnsupportedError(
            f"architecture {name!r} is not known",
            hint=f"The file says {file_arch!r}: leave --arch out.",
        )
    routed = next((t.name for t in tensors if "down_exps" in t.name), None)
    close = difflib.get_close_matches(name, BY_NAME, 3)
    advice = [f"Closest: {', '.join(close)} (--arch)."] if close else []
    if routed:
        shown = re.sub(r"\d+", r"\\d+", routed, count=1).replace(".", r"\.")
        advice.append(
            f"{routed!r} looks like a routed down-projection: try --pattern '{shown}'"
            f" --experts-key {file_arch}.expert_used_count, and --factor or --rule published."
        )
    raise UnsupportedError(f"architecture {name!r} is not known", hint=" ".join(advice) or None)


def _whole(keys: GgufKeys, name: str) -> int:
    value = keys.get(name)
    if type(value) is not int or not 0 < value <= MAX_NUMBER:
        fault = "is missing" if value is None else f"is {repr(value)[:40]}, not a number of experts"
        raise CheckpointError(f"key {name} {fault}", hint="The header is not that of an MoE model.")
    return value


def _groups(keys: GgufKeys, file_arch: str) -> tuple[int, int] | None:
    """Number of groups of experts, and of groups that a token may use; None for no limit."""
    names = (f"{file_arch}.expert_group_count", f"{file_arch}.expert_group_used_count")
    groups, chosen = (_whole(keys, name) if _is_set(keys, name) else 0 for name in names)
    return group_limit(groups, chosen)


def _is_set(keys: GgufKeys, name: str) -> bool:
    value = keys.get(name)
    return value is not None and not (type(value) is int and value == 0)


def _count(keys: GgufKeys, name: str) -> int | tuple[int, ...]:
    value = keys.get(name)
    if isinstance(value, tuple) and value and all(type(v) is int and v >= 0 for v in value):
        return value if any(value) else _whole(keys, name)
    return _whole(keys, name)


def _projections(row: Row, tensors: Sequence[Tensor]) -> Iterator[Projection]:
    names = "|".join(row.experts or ("ffn_down_exps",))
    pattern = re.compile(rf"(?P<module>blk\.(?P<layer>[0-9]{{1,6}})\.(?:{names}))\.(?P<suffix>\w+)")
    found: dict[str, Projection] = {}
    for tensor in tensors:
        if match := pattern.fullmatch(tensor.name):
            layer = Layer("", int(match["layer"]))
            new = Projection(match["module"], layer, None, match.span("layer"))
            found.setdefault(new.module, new).by_suffix[match["suffix"]] = tensor
    yield from found.values()


def _by_layer(tensors: Sequence[Tensor]) -> dict[int, set[str]]:
    """The tensor names of each block, after ``blk.N.``."""
    found: dict[int, set[str]] = {}
    for tensor in tensors:
        if match := re.fullmatch(r"blk\.([0-9]{1,6})\.(.+)", tensor.name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _count_experts(projections: Sequence[Projection], row: Row, total: int) -> dict[Layer, int]:
    """The number of routed experts of each layer, from its tensors."""
    experts_by_layer: dict[Layer, int] = {}
    for projection in projections:
        weight = projection.by_suffix.get("weight")
        if weight is None or len(weight.shape) != 3:
            shape = "missing" if weight is None else f"{list(weight.shape)}"
            raise CheckpointError(
                f"{projection.module}.weight: is {shape}, not one matrix per expert"
            )
        experts = weight.shape[0]
        if projection.module.endswith("_chexps"):
            continue
        if experts != total:
            raise CheckpointError(
                f"{weight.name}: holds {experts} experts, but the header says {total}",
                hint="Header and tensors belong to different models.",
            )
        experts_by_layer[projection.layer] = experts
    return experts_by_layer


def _check_complete(
    row: Row, by_layer: Mapping[int, set[str]], experts_by_layer: Mapping[Layer, int]
) -> None:
    """Require a router and down-projections in every block with any part of routed experts."""
    for number, names in sorted(by_layer.items()):
        routed = sorted(name for name in names if _ROUTED.fullmatch(name))
        if routed and Layer("", number) not in experts_by_layer:
            raise CheckpointError(
                f"blk.{number}: has {routed[0]}, but no {row.experts[0]}.weight",
                hint="A file of the set is missing, or of another model.",
            )
        if Layer("", number) in experts_by_layer and "ffn_gate_inp.weight" not in names:
            raise CheckpointError(
                f"blk.{number}: has routed experts, but no router (ffn_gate_inp.weight)",
                hint="A file of the set is missing, or of another model.",
            )


_Score = tuple[str, bool] | None


def _renormalised(row: Row, file_arch: str, keys: GgufKeys, score: _Score) -> bool:
    if score == ("softmax", True):
        return True
    if row.renormalises == "key":
        return keys.get(f"{file_arch}.expert_weights_norm") is True
    return row.renormalises == "always"


def _score(row: Row, file_arch: str, keys: GgufKeys, tensors: Sequence[Tensor]) -> _Score:
    named = keys.get(f"{file_arch}.expert_gating_func") if row.score_key else None
    return SCORES.get(named or _unnamed(row, file_arch, keys, tensors) or 0)


def _unnamed(row: Row, file_arch: str, keys: GgufKeys, tensors: Sequence[Tensor]) -> int | None:
    """The score if the file names none; as in llama.cpp, its size identifies GLM-4.7-Flash."""
    if row.name != "deepseek2":
        return row.score
    blocks = keys.get(f"{file_arch}.block_count", 0) - keys.get(f"{file_arch}.{_NEXTN_LAYERS}", 0)
    words = next((t.shape[0] for t in tensors if t.name == "token_embd.weight" and t.shape), 0)
    return 2 if blocks in (47, 48) and words == 154_880 else row.score


def _architecture(
    row: Row,
    file_arch: str,
    by_layer: Mapping[int, set[str]],
    score: _Score,
    renormalised: bool,
) -> Architecture:
    """The row and the file's facts, as a row of the table of model types."""
    names: set[str] = set().union(*by_layer.values())
    router = row.router
    if isinstance(router, RouterKind):
        if score is None:
            router = OtherRouter(f"{file_arch}.expert_gating_func names an unknown function")
        else:
            kind, chosen_by_logits = score
            router = replace(router, score=kind, chosen_by_logits=chosen_by_logits)
    removed = row.no_effect is not None
    if row.no_effect_if:
        removed = row.no_effect_if in names
    if row.no_effect_unless:
        removed = row.no_effect_unless not in names
    fixed = None
    if row.fixed_if in names:
        fixed = f"its {row.fixed_if} has a column for each expert of a token"
    return Architecture(
        file_arch,
        experts=(),
        normalisation=renormalised,
        count_keys=(f"{file_arch}.expert_used_count",),
        groups=True,
        fixed=fixed,
        no_effect=row.no_effect if removed else None,
        partial_effect=None if removed else row.partial_effect,
        scale_key=f"{file_arch}.expert_weights_scale" if row.scale_key else None,
        can_fold=row.scale_key,
        router=router,
    )


def _warnings(
    row: Row, file_arch: str, arch: str | None, by_layer: Mapping[int, set[str]]
) -> Iterator[str]:
    if arch is not None and arch != file_arch:
        yield f"--arch {arch} contradicts the file, whose architecture is {file_arch!r}"
    names = set[str]().union(*by_layer.values())
    if row.partial_effect and (row.no_effect_unless is None or row.no_effect_unless in names):
        yield f"architecture {file_arch!r}: {row.partial_effect}"
    for name in sorted(n for n in names if "exps" in n and not _KNOWN.fullmatch(n)):
        yield f"blk.N.{name}: is an unknown tensor of the routed experts; it is copied"


def _none_found(file_arch: str, tensors: Sequence[Tensor]) -> CheckpointError | UnsupportedError:
    if old := next((t.name for t in tensors if _OLD.fullmatch(t.name)), None):
        return UnsupportedError(
            f"{old!r}: has one tensor per expert, as in files from before April 2024",
            hint="llama.cpp no longer runs such a file; convert the model again.",
        )
    return UnsupportedError(
        f"architecture {file_arch!r}: is a dense model; it has no experts, so there is nothing to"
        " rescale"
    )
