"""The entry of one tensor in a header."""

from __future__ import annotations

from typing import NamedTuple


class Tensor(NamedTuple):
    """One entry of a header.

    Attributes:
        name: as in the header.
        dtype: as in the header (``BF16``); for GGUF, the name of the type (``Q4_K``).
        shape: the slowest dimension first.
        start: offset of its data in the file, in bytes.
        stop: offset of the end of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start
