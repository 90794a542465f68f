"""Finds the routed experts' down-projections of a checkpoint by name."""

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
"""Words of a tensor's name that do not distinguish stacks of layers."""


@dataclass(slots=True)
class Projection:
    """One down-projection, of one expert or of all experts of a layer.

    Attributes:
        module: its name in the model, without the words of wrappers.
        layer: its layer.
        expert: the expert's number; None for all experts of the layer.
        number_span: position of the layer's number in `module`.
        by_suffix: its tensors, by the suffix of their names.
    """

    module: str
    layer: Layer
    expert: int | None
    number_span: tuple[int, int]
    by_suffix: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The name up to the layer's number: ``model.layers.3``."""
        return self.module[: self.number_span[1]]

    @property
    def block(self) -> str:
        """The name of the block with router and experts, after the layer's number: ``.mlp.``."""
        return block_of(self.module[self.number_span[1] :])


class StackFilter:
    """The stacks that belong to one part of a model type.

    These are the stacks in its row, or all stacks that no other part lists.
    """

    def __init__(self, architecture: Architecture, others: Iterable[Architecture]) -> None:
        self._included = architecture.stacks
        self._excluded = frozenset().union(*(row.stacks or frozenset() for row in others))

    def __contains__(self, stack: str) -> bool:
        return stack in self._included if self._included else stack not in self._excluded


def find_projections(
    tensors: Iterable[Tensor], architecture: Architecture, others: Iterable[Architecture] = ()
) -> list[Projection]:
    """Find the routed down-projections by name, with their tensors.

    The row has the published names of the type. Tools write the same weights under the names of
    another type, fused or one by one, so every layout of the table counts for every type.

    Args:
        tensors: all tensors of the checkpoint.
        architecture: the row whose stacks count.
        others: the other parts of the same model type, whose stacks are ignored.

    Raises:
        CheckpointError: two tensors are the same part of one projection.
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
                f"{projection.module}: has two tensors for its {suffix},"
                f" {by_suffix[suffix].name!r} and {tensor.name!r}"
            )
        by_suffix[suffix] = tensor
    if architecture.part is None:
        drop_single_stack(found.values())
    return in_order(found.values())


def in_order(projections: Iterable[Projection]) -> list[Projection]:
    """Sort by layer, name and expert."""
    return sorted(projections, key=lambda p: (p.layer, p.module, p.expert or 0))


def stack_of(before: str) -> str:
    """The name of a stack: the words before a layer's number that distinguish stacks."""
    return ".".join(word for word in before.split(".") if word and word not in GENERIC)


def drop_single_stack(projections: Collection[Projection]) -> None:
    """Name the layers by number only if they all belong to one stack."""
    if len({p.layer.stack for p in projections}) == 1:
        for projection in projections:
            projection.layer = _interned_layer("", projection.layer.number)


NUMBER: Final = "[0-9]{1,9}"
_DOWN: Final = "(?:down_projs?|w2|fc2|wo|output_linear)"
"""Last words that mean a down-projection in every layout of the table."""
_EXPERT: Final = rf"experts\.(?:expert_)?(?P<E>{NUMBER})\.{_DOWN}"
_ALL_EXPERTS: Final = rf"experts\.(?:mlp\.)?{_DOWN}(?:\.(?P<F>{NUMBER}))?"
_MLX: Final = r"switch_mlp\.(?:down_proj|fc2)"
"""mlx-lm's names, for every type: `sanitize` methods of mlx-lm 0.32; `SwitchMLP` has fc2."""


@lru_cache(maxsize=1)
def _any_layout() -> str:
    """A regular expression for every layout of the table: container, block and experts."""
    containers, blocks, without = {"h"}, {"moe."}, set()
    for template in {template for row in ROWS for template in row.experts}:
        container, _, rest = template.partition(".{L}.")
        block, experts, _ = rest.partition("experts.")
        containers.add(container)
        if experts:
            blocks.add(block)
        elif "moe." in block and "{E}" not in block:  # any other may be a dense layer's
            without.add(rest)
    in_block = f"(?:{_either(blocks)})(?:{_EXPERT}|{_ALL_EXPERTS}|{_MLX})"
    return rf"(?:{_either(containers)})\.(?P<L>{NUMBER})\.(?:{in_block}|{_either(without)})"


def _either(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words)))


@lru_cache(maxsize=16)
def _name_pattern(templates: tuple[str, ...]) -> re.Pattern[str]:
    """One regular expression for all layouts; groups: prefix, layer, expert and suffix."""
    choices = []
    for i, template in enumerate(templates):
        escaped = re.escape(template).replace(r"\{L\}", rf"(?P<L{i}>{NUMBER})")
        choices.append(escaped.replace(r"\{E\}", rf"(?P<E{i}>{NUMBER})"))
    choices.insert(0, _any_layout())
    expression = rf"(?P<prefix>(?:.*\.)?)(?:{'|'.join(choices)})(?P<suffix>(?:[._].*)?)"
    return re.compile(expression, re.DOTALL)  # without it, a long name with line ends is slow


def _projection(match: re.Match[str]) -> Projection:
    groups = {key: value for key, value in match.groupdict().items() if value is not None}
    layer = next(key for key in groups if key[0] == "L")
    expert = next((value for key, value in groups.items() if key[0] in "EF"), None)
    stack = stack_of(match.string[: match.start(layer)])
    module = match.string[: match.start("suffix")]
    return Projection(
        module,
        _interned_layer(stack, int(groups[layer])),
        None if expert is None else int(expert),
        _interned_span(*match.span(layer)),
    )


@lru_cache(maxsize=1024)
def _interned_layer(stack: str, number: int) -> Layer:
    """The same object for all experts of a layer."""
    return Layer(stack, number)


@lru_cache(maxsize=1024)
def _interned_span(start: int, stop: int) -> tuple[int, int]:
    """The same object for all names with the layer's number at this position."""
    return start, stop


@lru_cache(maxsize=1024)
def block_of(rest: str) -> str:
    """The name of the MoE block after the layer's number: ``.mlp.`` of ``.mlp.experts.0.w2``."""
    experts = re.search(r"(?:experts|switch_mlp)\.", rest)
    if experts:
        return rest[: experts.start()]
    return re.split(r"(?<=\.)[0-9]+\.", rest.rpartition(".")[0] + ".")[0]


def layer_after(before: str, number: int) -> Layer:
    """The layer of that number; `before` is the part of a tensor's name before it."""
    return _interned_layer(stack_of(before), number)


def in_part(layer: Layer, architecture: Architecture, others: Iterable[Architecture]) -> bool:
    """Whether a layer made by `layer_after` belongs to this part of a model type."""
    return layer.stack in StackFilter(architecture, others)
