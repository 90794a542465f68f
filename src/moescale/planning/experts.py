"""How many experts a token is sent to, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.families.projections import Layer


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts per token that the weights were trained for, before, after; and in total."""

    trained: int | tuple[int, ...]
    before: int | tuple[int, ...]
    after: int | tuple[int, ...]
    total: int

    def at(self, layer: Layer) -> tuple[int, int, int]:
        """The first three, of one layer."""
        return _at(self.trained, layer), _at(self.before, layer), _at(self.after, layer)


def _at(count: int | tuple[int, ...], layer: Layer) -> int:
    """The count of one layer; a layer after the last of a list is an MTP block."""
    if isinstance(count, int):
        return count
    return count[min(layer.number, len(count) - 1)]
