"""What happens to one tensor. A plan needs no more; numpy comes with the arithmetic (`scaling`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moescale.checkpoint.dtypes import BITS
from moescale.checkpoint.gguf.types import BLOCKS
from moescale.checkpoint.header import Tensor

Operation = Literal["multiply", "divide", "shift", "nested_offset"]
"""``divide`` is for scales that divide; ``shift`` for F8_E8M0 scales (also stored as U8), which
hold powers of two only; ``nested_offset`` for the number in the JSON text of a bitsandbytes
quantisation state."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What happens to one tensor; `promote` names the dtype that it is stored in from then on.

    `scale` says that the values are scales: below the normal numbers they would lose bits, and
    with them every weight that they belong to.
    """

    tensor: Tensor
    factor: float
    operation: Operation = "multiply"
    promote: str | None = None
    scale: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return self.tensor.nbytes * self.widening

    @property
    def unit(self) -> int:
        """Bytes that have to be together: those of a block of a quantised GGUF tensor."""
        kind = BLOCKS.get(self.tensor.dtype)
        return 1 if kind is None else kind.size

    @property
    def widening(self) -> int:
        """Bytes of the result for each byte of the source."""
        return 1 if self.promote is None else BITS[self.promote] // BITS[self.tensor.dtype]
