"""The header of one file in any format, and the entries of its tensors."""

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


class Header(NamedTuple):
    """The header of one shard.

    Attributes:
        tensors: in the order of their data.
        data_start: offset of the first tensor in the file.
        file_size: size of the whole file in bytes.
    """

    tensors: tuple[Tensor, ...]
    data_start: int
    file_size: int

    @property
    def by_name(self) -> dict[str, Tensor]:
        """A new mapping from name to tensor."""
        return {tensor.name: tensor for tensor in self.tensors}
