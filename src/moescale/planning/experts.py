"""How many experts a token is sent to, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moescale.families.projections import Layer


class LayerExperts(NamedTuple):
    """The numbers of experts per token of one layer, as in `Experts`.

    Attributes:
        trained: experts per token that the weights were trained for.
        before: experts per token of the source.
        after: experts per token of the output.
    """

    trained: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Numbers of experts; a tuple has one number for each layer.

    Attributes:
        trained: experts per token that the weights were trained for.
        before: experts per token of the source.
        after: experts per token of the output.
        total: routed experts of a layer.
    """

    trained: int | tuple[int, ...]
    before: int | tuple[int, ...]
    after: int | tuple[int, ...]
    total: int

    def at(self, layer: Layer) -> LayerExperts:
        """The numbers of experts per token of one layer."""
        return LayerExperts(*(_at(n, layer) for n in (self.trained, self.before, self.after)))


def _at(count: int | tuple[int, ...], layer: Layer) -> int:
    """The count of one layer; a layer beyond the list is an MTP layer and has the last count."""
    if isinstance(count, int):
        return count
    return count[min(layer.number, len(count) - 1)]
