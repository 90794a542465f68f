"""What happens to one tensor. A plan needs no more; numpy comes with the arithmetic (`scaling`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moescale.checkpoint.dtypes import BITS
from moescale.checkpoint.gguf.types import BLOCKS
from moescale.checkpoint.tensor import Tensor
from moescale.errors import printable

Operation = Literal["multiply", "divide", "shift", "nested_offset"]
"""``divide`` is for scales that divide; ``shift`` for F8_E8M0 scales (also stored as U8), which
hold powers of two only; ``nested_offset`` for the number in the JSON text of a bitsandbytes
quantisation state."""

Role = Literal["weight", "bias", "scale", "router"]


@dataclass(frozen=True, slots=True, order=True)
class Layer:
    """A layer by its stack ("" for the main one) and its number; written ``3`` or ``mtp.0``."""

    stack: str
    number: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)


FIRST = Layer("", 0)


class TensorEdit(Mapping[str, Any]):
    """What happens to one tensor; as a mapping, it is the row of ``--dry-run --json``.

    So ``pandas.DataFrame(plan.tensors)`` has a column for each of name, shard, dtype, shape, role,
    layer and factor. It is no dataclass, since pandas would look into that.

    Attributes:
        tensor: what it is in the source.
        factor: what it is multiplied by.
        operation: how.
        promote: the dtype that it is stored in from then on, where that is another.
        role: what it is in its module. Scales below the normal numbers would lose bits, and with
            them every weight that they belong to.
        format: the name of the format that says so.
        layer: the layer that it belongs to.
        shard: the file that it is in; "" where that is not looked up yet.
    """

    __slots__ = ("factor", "format", "layer", "operation", "promote", "role", "shard", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        factor: float = 1.0,
        operation: Operation = "multiply",
        promote: str | None = None,
        role: Role = "weight",
        format: str = "plain",
        layer: Layer = FIRST,
        shard: str = "",
    ) -> None:
        """Nothing of it is changed later; see `with_`."""
        self.tensor, self.factor, self.operation, self.promote = tensor, factor, operation, promote
        self.role, self.format, self.layer, self.shard = role, format, layer, shard

    def with_(self, **changes: Any) -> TensorEdit:
        """The same with other attributes."""
        return TensorEdit(**{name: getattr(self, name) for name in self.__slots__} | changes)

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

    def __getitem__(self, key: str) -> Any:
        return self.as_json()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_json())

    def __len__(self) -> int:
        return len(self.as_json())

    def __repr__(self) -> str:
        tensor = self.tensor
        name = printable(tensor.name, 100)
        return f"<{name}, {tensor.dtype} {list(tensor.shape)} x {self.factor:.6g}>"

    def as_json(self) -> dict[str, Any]:
        """The tensor as ``--dry-run --json`` prints it; `operation` only where it is another."""
        tensor = self.tensor
        return {
            "name": tensor.name,
            "shard": self.shard,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "role": self.role,
            "layer": str(self.layer) if self.layer.stack else self.layer.number,
            "factor": self.factor,
            **({"operation": self.operation} if self.operation != "multiply" else {}),
            **({"promoted_to": self.promote} if self.promote else {}),
        }
