"""The routed experts' down-projections of this checkpoint, found by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from moescale.checkpoint.edit import Layer as Layer
from moescale.checkpoint.tensor import Tensor
from moescale.errors import CheckpointError
from moescale.families.architectures import ROWS, Architecture
from moescale.families.formats import plain_suffix
from moescale.families.names import plain_name

GENERIC: Final = frozenset(
    (
        *("model", "language_model", "text_model", "base_model", "llm", "transformer"),
        *("backbone", "module", "layers", "blocks", "block", "h"),
    )
)
"""Parts of a tensor's name that do not tell one stack of layers from another."""


@dataclass(slots=True)
class Projection:
    """One down-projection, of one expert or of all experts of a layer.

    `module` is the name that the model itself has for it, without the words of wrappers.
    """

    module: str
    layer: Layer
    expert: int | None
    number_span: tuple[int, int]  # where the layer's number stands in the module's name
    by_suffix: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The name up to the layer's number: ``model.layers.3``."""
        return self.module[: self.number_span[1]]

    @property
    def block(self) -> str:
        """What holds router and experts, after the layer's number: ``.mlp.``."""
        return block_of(self.module[self.number_span[1] :])


class StackFilter:
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

    The row says how the type is published. Tools write the same weights under the names of
    another type, fused or one by one; so every layout of the table counts for every type.

    Args:
        tensors: the whole checkpoint.
        architecture: the row whose stacks count.
        others: the other parts of the same model type, whose stacks are left alone.
    """
    pattern = _name_pattern(tuple(architecture.experts))
    stacks = StackFilter(architecture, others)
    found: dict[str, Projection] = {}
    for tensor in tensors:
        match = pattern.fullmatch(plain_name(tensor.name))
        if match is None:
            continue
        projection = _projection(match)
        if projection.layer.stack not in stacks:
            continue
        by_suffix = found.setdefault(projection.module, projection).by_suffix
        suffix = plain_suffix(match["suffix"])
        if suffix in by_suffix:
            raise CheckpointError(
                f"{projection.module}: has two tensors that are its {suffix},"
                f" {by_suffix[suffix].name!r} and {tensor.name!r}"
            )
        by_suffix[suffix] = tensor
    if architecture.part is None:
        drop_single_stack(found.values())
    return in_order(found.values())


def in_order(projections: Iterable[Projection]) -> list[Projection]:
    """By layer, name and expert."""
    return sorted(projections, key=lambda p: (p.layer, p.module, p.expert or 0))


def stack_of(before: str) -> str:
    """What tells a stack of layers from others, in what stands before the layer's number."""
    return ".".join(word for word in before.split(".") if word and word not in GENERIC)


def drop_single_stack(projections: Collection[Projection]) -> None:
    """Call the layers by their numbers alone where there is one stack of them, however named."""
    if len({p.layer.stack for p in projections}) == 1:
        for projection in projections:
            projection.layer = _interned_layer("", projection.layer.number)


NUMBER: Final = "[0-9]{1,9}"
_DOWN: Final = "(?:down_projs?|w2|fc2|wo|output_linear)"
"""The last words that mean a down-projection in every layout of the table that has them."""
_EXPERT: Final = rf"experts\.(?:expert_)?(?P<E>{NUMBER})\.{_DOWN}"
_ALL_EXPERTS: Final = rf"experts\.(?:mlp\.)?{_DOWN}(?:\.(?P<F>{NUMBER}))?"
_MLX: Final = r"switch_mlp\.(?:down_proj|fc2)"
"""mlx-lm's, for every type: the `sanitize` methods of mlx-lm 0.32; `SwitchMLP` has an fc2."""


@lru_cache(maxsize=1)
def _any_layout() -> str:
    """An expression for every layout of the table: a container, a block and its experts."""
    containers, blocks, without = {"h"}, {"moe."}, set()
    for template in {template for row in ROWS for template in row.experts}:
        container, _, rest = template.partition(".{L}.")
        block, experts, _ = rest.partition("experts.")
        containers.add(container)
        if experts:
            blocks.add(block)
        elif "moe." in block and "{E}" not in block:  # else it may be that of a dense layer
            without.add(rest)
    in_block = f"(?:{_either(blocks)})(?:{_EXPERT}|{_ALL_EXPERTS}|{_MLX})"
    return rf"(?:{_either(containers)})\.(?P<L>{NUMBER})\.(?:{in_block}|{_either(without)})"


def _either(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words)))


@lru_cache(maxsize=16)
def _name_pattern(templates: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all layouts: groups for prefix, layer, expert and suffix."""
    choices = []
    for i, template in enumerate(templates):
        escaped = re.escape(template).replace(r"\{L\}", rf"(?P<L{i}>{NUMBER})")
        choices.append(escaped.replace(r"\{E\}", rf"(?P<E{i}>{NUMBER})"))
    choices.insert(0, _any_layout())
    expression = rf"(?P<prefix>(?:.*\.)?)(?:{'|'.join(choices)})(?P<suffix>(?:[._].*)?)"
    return re.compile(expression, re.DOTALL)  # a line end in a long name would be searched for long


def _projection(match: re.Match[str]) -> Projection:
    groups = {key: value for key, value in match.groupdict().items() if value is not None}
    layer = next(key for key in groups if key[0] == "L")
    expert = next((value for key, value in groups.items() if key[0] in "EF"), None)
    stack = stack_of(match.string[: match.start(layer)])
    module = match.string[: match.start("suffix")]
    number = _interned_layer(stack, int(groups[layer]))
    place = _interned_span(*match.span(layer))
    return Projection(module, number, None if expert is None else int(expert), place)


@lru_cache(maxsize=1024)
def _interned_layer(stack: str, number: int) -> Layer:
    """One object for all experts of a layer."""
    return Layer(stack, number)


@lru_cache(maxsize=1024)
def _interned_span(start: int, stop: int) -> tuple[int, int]:
    """One object for all names that have the layer's number at the same place."""
    return start, stop


@lru_cache(maxsize=1024)
def block_of(rest: str) -> str:
    """The name of the MoE block after the layer's number: ``.mlp.`` of ``.mlp.experts.0.w2``."""
    experts = re.search(r"(?:experts|switch_mlp)\.", rest)
    if experts:
        return rest[: experts.start()]
    return re.split(r"(?<=\.)[0-9]+\.", rest.rpartition(".")[0] + ".")[0]


def layer_after(before: str, number: int) -> Layer:
    """The layer of that number, by what stands before it in the name of a tensor."""
    return _interned_layer(stack_of(before), number)


def in_part(layer: Layer, architecture: Architecture, others: Iterable[Architecture]) -> bool:
    """Whether a layer that `layer_after` gives is of this part of a model type."""
    return layer.stack in StackFilter(architecture, others)
