"""The routed experts' down-projections of this checkpoint: found, counted and complete."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from moescale.checkpoint.header import Tensor
from moescale.errors import CheckpointError, UnsupportedError, UsageError
from moescale.model.architectures import (
    All,
    Architecture,
    FirstDense,
    MoeLayers,
    SparseStep,
)
from moescale.model.count import MOST, whole
from moescale.model.formats import leaf_name, split_name

_GENERIC = frozenset(
    (
        *("model", "language_model", "text_model", "base_model", "llm", "transformer"),
        *("backbone", "module", "layers", "blocks", "block"),
    )
)
"""Parts of a tensor's name that do not tell one stack of layers from another."""


@dataclass(slots=True)
class Projection:
    """One down-projection, of one expert or of all experts of a layer."""

    module: str
    layer: Layer
    expert: int | None
    number_at: tuple[int, int]  # where the layer's number stands in the module's name
    leaves: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Layer:
    """A layer by its stack ("" for the main one) and its number; written ``3`` or ``mtp.0``."""

    stack: str
    number: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)


class _Stacks:
    """The stacks that belong to one part of a model type: its own, or all that no other has."""

    def __init__(self, architecture: Architecture, others: Iterable[Architecture]) -> None:
        self._own = architecture.stacks
        self._foreign = frozenset().union(*(row.stacks or frozenset() for row in others))

    def __contains__(self, stack: str) -> bool:
        return stack in self._own if self._own else stack not in self._foreign


def find_projections(
    tensors: Iterable[Tensor], architecture: Architecture, others: Iterable[Architecture] = ()
) -> list[Projection]:
    """All tensors whose names are those of routed down-projections, module by module.

    Args:
        tensors: the whole checkpoint.
        architecture: the row whose names and stacks count.
        others: the other parts of the same model type, whose stacks are left alone.
    """
    pattern = _name_pattern((*architecture.experts, *_mlx_names(architecture.experts)))
    stacks = _Stacks(architecture, others)
    found: dict[str, Projection] = {}
    for tensor in tensors:
        match = pattern.fullmatch(tensor.name)
        if match is None:
            continue
        projection = _projection(match)
        if projection.layer.stack not in stacks:
            continue
        leaves = found.setdefault(projection.module, projection).leaves
        leaf = leaf_name(match["leaf"])
        if leaf in leaves:
            raise CheckpointError(f"{projection.module}: has two tensors that are its {leaf}")
        leaves[leaf] = tensor
    if architecture.part is None:
        _drop_single_stack(found.values())
    return sorted(found.values(), key=lambda p: (p.layer, p.module, p.expert or 0))


def _stack(before: str) -> str:
    """What tells a stack of layers from others, in what stands before the layer's number."""
    return ".".join(word for word in before.split(".") if word and word not in _GENERIC)


def _drop_single_stack(projections: Collection[Projection]) -> None:
    """Call the layers by their numbers alone where there is one stack of them, however named."""
    if len({p.layer.stack for p in projections}) == 1:
        for projection in projections:
            projection.layer = _same_layer("", projection.layer.number)


def _mlx_names(templates: Iterable[str]) -> list[str]:
    """The names that mlx-lm gives the experts of every model type: all of a layer in one module.

    Source: the `sanitize` methods of mlx-lm 0.32; `SwitchGLU` has a down_proj, `SwitchMLP` an fc2.
    """
    blocks = sorted({t.partition("experts.")[0] for t in templates if "experts." in t})
    return [f"{block}switch_mlp.{name}" for block in blocks for name in ("down_proj", "fc2")]


_NUMBER = "[0-9]{1,9}"


def _name_pattern(templates: Iterable[str]) -> re.Pattern[str]:
    """One expression for all templates: groups for prefix, layer, expert and leaf."""
    choices = []
    for i, template in enumerate(templates):
        escaped = re.escape(template).replace(r"\{L\}", rf"(?P<L{i}>{_NUMBER})")
        choices.append(escaped.replace(r"\{E\}", rf"(?P<E{i}>{_NUMBER})"))
    expression = rf"(?P<prefix>(?:.*\.)?)(?:{'|'.join(choices)})(?P<leaf>(?:[._].*)?)"
    return re.compile(expression, re.DOTALL)  # a line end in a long name would be searched for long


def _projection(match: re.Match[str]) -> Projection:
    groups = match.groupdict()
    layer = next(key for key, value in groups.items() if key[0] == "L" and value is not None)
    expert = groups.get("E" + layer[1:])
    stack = _stack(match.string[: match.start(layer)])
    module = match.string[: match.start("leaf")]
    number = _same_layer(stack, int(groups[layer]))
    return Projection(module, number, None if expert is None else int(expert), match.span(layer))


@lru_cache(maxsize=1024)
def _same_layer(stack: str, number: int) -> Layer:
    """One object for all experts of a layer."""
    return Layer(stack, number)


def find_by_pattern(tensors: Iterable[Tensor], pattern: str) -> list[Projection]:
    """Projections by a user's expression, which has to match the whole tensor name.

    The groups ``layer`` and ``expert`` name the numbers; without them, the first number between
    dots is the layer and the second the expert.

    Raises:
        UsageError: the expression is not valid, takes too long, or matches a name without number.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    found: dict[str, Projection] = {}
    for name, layer, expert in _search_in_child(pattern, list(by_name)):
        if layer is None:
            raise UsageError(f"--pattern matches {name!r}, in which no layer number can be found")
        module, _ = split_name(name)
        found.setdefault(module, _by_spans(name, module, layer, expert))
    for name, tensor in by_name.items():  # a bias or a scale belongs to it, matched or not
        module, leaf = split_name(name)
        if module in found:
            found[module].leaves[leaf] = tensor
    _drop_single_stack(found.values())
    return sorted(found.values(), key=lambda p: (p.layer, p.module, p.expert or 0))


def _by_spans(name: str, module: str, layer: list[int], expert: list[int] | None) -> Projection:
    """The projection whose numbers stand at the given places of a name."""
    start, stop = layer
    numbers = [name[start:stop]] if expert is None else [name[start:stop], name[slice(*expert)]]
    for number in numbers:
        if not re.fullmatch(_NUMBER, number):
            raise UsageError(f"--pattern: in {name!r} its group catches {number!r}, no number")
    before = name[:start]
    if expert is not None and expert[1] <= start:
        before = name[: expert[0]] + name[expert[1] : start]
    stack = _stack(before)
    which = None if expert is None else int(numbers[1])
    return Projection(module, Layer(stack, int(numbers[0])), which, (start, stop))


_SEARCH = r"""
import json, re, signal, sys
pattern, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
try:
    pattern = re.compile(pattern)
except re.error as error:
    sys.exit(f"is not a valid expression: {error}")
found = []
for name in names:
    match = pattern.fullmatch(name)
    if match:
        spans = [m.span() for m in re.finditer(r"(?<![^.])\d+(?![^.])", name)] + [None, None]
        groups = {key: match.span(key) for key, value in match.groupdict().items() if value}
        layer = groups.get("layer", spans[0])
        expert = groups.get("expert", None if "layer" in groups else spans[1])
        found.append((name, layer, expert))
json.dump(found, sys.stdout)
"""

_SEARCH_SECONDS = 0.8
"""Processor time for a few names, so that a busy machine makes no difference."""
_NAMES_A_SECOND = 100_000
_PATIENCE = 10.0 if hasattr(signal, "setitimer") else 2.0
"""More seconds on the clock, for a machine that is busy; Windows has no timer of processor time."""


def _search_in_child(
    pattern: str, names: list[str]
) -> list[tuple[str, list[int] | None, list[int] | None]]:
    """Match in a child process, since an expression can backtrack without end.

    `re` cannot be stopped from within on every system and in every thread; a process can.
    """
    seconds = _SEARCH_SECONDS + len(names) / _NAMES_A_SECOND
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _SEARCH],
            input=json.dumps([pattern, names, seconds]),
            capture_output=True,
            text=True,
            timeout=seconds + _PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        child = None
    if child is None or child.returncode < 0:  # a signal: its timer went off
        raise UsageError(
            f"--pattern {pattern!r} took longer than {seconds:.1f} s for {len(names)} names",
            hint="It backtracks; write it without nested repetitions.",
        )
    if child.returncode:
        raise UsageError(f"--pattern {pattern!r} {child.stderr.strip().splitlines()[-1]}")
    result: list[tuple[str, list[int] | None, list[int] | None]] = json.loads(child.stdout)
    return result


def check_complete(
    projections: list[Projection],
    names: Iterable[str],
    architecture: Architecture,
    section: Mapping[str, Any],
    total: int,
    others: Iterable[Architecture] = (),
) -> None:
    """Refuse a checkpoint in which any routed down-projection is missing or surplus.

    Args:
        projections: what was found.
        names: the names of all tensors of the checkpoint.
        architecture: the row that they were found with.
        section: the config section that describes this MoE.
        total: routed experts of a layer, as the config says.
        others: the other parts of the same model type.

    Raises:
        CheckpointError: with the first layer or expert that is not as the config says.
    """
    by_layer: dict[Layer, list[Projection]] = defaultdict(list)
    for projection in projections:
        by_layer[projection.layer].append(projection)
    for layer, members in by_layer.items():
        _check_layer(
            layer, members, experts_of_layer(section, layer.number, total), architecture.moes
        )
    _check_layers(set(by_layer), architecture, section)
    _check_routers(projections, names, _Stacks(architecture, others))


def _check_layer(layer: Layer, members: list[Projection], total: int, moes: int) -> None:
    numbers = sorted(p.expert for p in members if p.expert is not None)
    stacked = [p for p in members if p.expert is None]
    if stacked and numbers:
        raise CheckpointError(
            f"layer {layer}: its experts are there twice, one by one and all in one tensor"
            f" ({members[0].module})"
        )
    if stacked and len(stacked) != moes:
        raise CheckpointError(f"layer {layer}: has {len(stacked)} tensors with all experts")
    if numbers and (len(numbers) != total * moes or numbers != list(range(total * moes))):
        known = set(numbers)
        missing = next((i for i in range(total * moes) if i not in known), None)
        what = "it has more" if missing is None else f"expert {missing} is missing"
        raise CheckpointError(
            f"layer {layer}: the config says {total * moes} routed experts, but {what}"
            f" ({len(numbers)} down-projections found)",
            hint="The checkpoint is incomplete, or its config belongs to another one.",
        )
    for projection in stacked:
        for leaf, tensor in projection.leaves.items():
            if leaf in _ONE_EACH or len(tensor.shape) > 2:
                _check_stacked(tensor, total)


_ONE_EACH = frozenset({"weight", "bias", "blocks", "weight_packed", "qweight"})
"""Leaves with something of every expert; scales may be numbers for all of them or lie flat."""


def _check_stacked(tensor: Tensor, total: int) -> None:
    experts = tensor.shape[0] if tensor.shape else 0
    one_each = experts == total or (len(tensor.shape) == 2 and experts and experts % total == 0)
    if not one_each:
        raise CheckpointError(
            f"{tensor.name}: its shape {list(tensor.shape)} does not hold {total} experts",
            hint="The config belongs to another checkpoint, or the tensor has another layout.",
        )


def _check_layers(
    found: set[Layer], architecture: Architecture, section: Mapping[str, Any]
) -> None:
    count = whole(section, "num_hidden_layers", 0)
    if architecture.moe_layers is None or not count:
        return
    main = {layer.number for layer in found if layer.stack == _main_stack(found)}
    expected = _moe_layers(count, architecture.moe_layers, section)
    missing, surplus = sorted(expected - main), sorted(i for i in main - expected if i < count)
    if missing:
        raise CheckpointError(
            f"layer {missing[0]}: the config makes it a MoE layer, but it has no routed"
            f" down-projections ({len(missing)} of {len(expected)} MoE layers are missing)",
            hint="The checkpoint is incomplete, or its config belongs to another one.",
        )
    if surplus:
        raise CheckpointError(
            f"layer {surplus[0]}: has routed experts, but the config makes it a dense layer"
        )


def _main_stack(found: set[Layer]) -> str:
    """The stack with the most layers; beside it there are only MTP blocks."""
    stacks = [layer.stack for layer in found]
    return max(sorted(set(stacks)), key=stacks.count)


def _moe_layers(count: int, rule: MoeLayers, section: Mapping[str, Any]) -> set[int]:
    """Those of `count` layers that the config makes MoE layers."""
    if isinstance(rule, All):
        return set(range(count))
    if isinstance(rule, SparseStep):
        step = whole(section, "decoder_sparse_step", 1) or 1
        dense = section.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"config.json: mlp_only_layers is {dense!r}, not a list")
        return set(range(step - 1, count, step)) - {i for i in dense if isinstance(i, int)}
    assert isinstance(rule, FirstDense)
    first = whole(section, "first_k_dense_replace", rule.default)
    freq = section.get("moe_layer_freq")
    every = freq if type(freq) is int and freq > 0 else 1
    found = {layer for layer in range(first, count) if layer % every == 0}
    types = section.get("mlp_layer_types")
    if not isinstance(types, list):
        return found
    named = {layer for layer, kind in enumerate(types[:count]) if kind != "dense"}
    return named | {layer for layer in found if layer >= len(types)}


def _check_routers(projections: list[Projection], names: Iterable[str], stacks: _Stacks) -> None:
    """Every layer that has a router needs down-projections, whatever the config says."""
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for projection in projections:
        start, stop = projection.number_at
        if projection.module[:start].endswith("."):
            layers[projection.module[:start], _block(projection.module[stop:])].add(
                projection.module[start:stop]
            )
    if not layers:
        return
    blocks = "|".join(re.escape(block) for block in {block for _, block in layers})
    containers = "|".join({re.escape(head.split(".")[-2]) for head, _ in layers})
    router = re.compile(rf"((?:.*\.)?(?:{containers})\.)([0-9]+)({blocks}){_ROUTER}", re.DOTALL)
    for name in names:
        match = router.match(name)
        if match is None or _stack(match[1]) not in stacks:
            continue
        if match[2] not in layers.get((match[1], match[3]), ()):
            raise CheckpointError(
                f"{name}: is the router of layer {match[2]}, which has no routed down-projections",
                hint="The checkpoint is incomplete; fetch the missing shard again.",
            )


_ROUTER = r"(?:gate|router)(?:\.|_weight|_gate)"
"""What follows the name of a MoE block in the names of its router."""


def _block(rest: str) -> str:
    """The name of the MoE block after the layer's number: ``.mlp.`` of ``.mlp.experts.0.w2``."""
    experts = re.search(r"(?:experts|switch_mlp)\.", rest)
    return rest[: experts.start()] if experts else rest.rpartition(".")[0] + "."


def total_experts(architecture: Architecture, section: Mapping[str, Any]) -> int:
    """Routed experts of a layer, as the config says.

    Raises:
        UnsupportedError: the config does not say.
    """
    for key in architecture.total:
        value = section.get(key)
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            value = max(value)  # a number for each layer
        if type(value) is int and 0 < value <= MOST:
            return value
    keys = " or ".join(architecture.total)
    raise UnsupportedError(
        f"config.json: does not say how many routed experts a layer has ({keys})",
        hint="Add the key with that number, beside the one of the experts per token.",
    )


def experts_of_layer(section: Mapping[str, Any], layer: int, total: int) -> int:
    """Routed experts of one layer, where the config gives some layers another number."""
    own = section.get("per_layer_config")
    number = own.get(str(layer)) if isinstance(own, dict) else None
    if isinstance(number, dict):
        return whole(number, "num_local_experts", 0) or total
    for key in ("pyramid_num_routed", "num_experts"):
        listed = section.get(key)
        if isinstance(listed, list) and layer < len(listed) and type(listed[layer]) is int:
            return listed[layer] if 0 < listed[layer] <= MOST else total
    return total


def looks_routed(names: Collection[str]) -> str | None:
    """The first name that looks like a routed down-projection, for a type that is not known."""
    experts, down = re.compile(r"experts?\b"), re.compile("down|w2|fc2|wo|output")
    for name in sorted(names):
        match = experts.search(name)
        if match and down.search(name, match.end()) and "shared" not in name:
            return name
    return _looks_numbered(names)


_NUMBERED = re.compile(r"[^0-9]*\.[0-9]+(\.[^0-9]*)\.[0-9]+\.(.+)\.weight")
_NOT_DOWN = re.compile("norm|(?<![a-z])(?:gate|router|up|in|wi|[wv][13]|fc[13])(?![a-z])")


def _looks_numbered(names: Iterable[str]) -> str | None:
    """The first weight of an expert that has a number, where one kind of them only can be meant."""
    found: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        match = _NUMBERED.fullmatch(name)
        routed = match and re.search("moe|(?<!shared_)expert", match[1])
        if match and routed and not _NOT_DOWN.search(match[2]):
            found[match[2]] = name
    return found.popitem()[1] if len(found) == 1 else None


def raw_layer(before: str, number: int) -> Layer:
    """The layer of that number, by what stands before it in the name of a tensor."""
    return _same_layer(_stack(before), number)


def in_part(layer: Layer, architecture: Architecture, others: Iterable[Architecture]) -> bool:
    """Whether a layer that `raw_layer` gives is of this part of a model type."""
    return layer.stack in _Stacks(architecture, others)
