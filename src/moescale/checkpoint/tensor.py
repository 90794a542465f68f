"""The entry of one tensor in a header."""

from __future__ import annotations

from typing import NamedTuple


class Tensor(NamedTuple):
    """One entry of a header; `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start
