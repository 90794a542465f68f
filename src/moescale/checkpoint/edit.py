"""The edit of one tensor. A plan needs no arithmetic (`scaling`), and so no numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moescale.checkpoint.dtypes import BITS
from moescale.checkpoint.gguf.types import BLOCKS
from moescale.checkpoint.tensor import Tensor
from moescale.errors import printable

Operation = Literal["multiply", "divide", "shift", "nested_offset"]
"""``divide`` is for scales by which codes are divided; ``shift`` for F8_E8M0 scales (also stored as
U8), which are powers of two; ``nested_offset`` for the number of that name in the JSON text of a
bitsandbytes quantisation state."""

Role = Literal["weight", "bias", "scale", "router"]


@dataclass(frozen=True, slots=True, order=True)
class Layer:
    """A layer; as a string, ``3`` or ``mtp.0``.

    Attributes:
        stack: the name of its stack; "" for the main one.
        number: its number in the stack.
    """

    stack: str
    number: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)


FIRST = Layer("", 0)


class TensorEdit(Mapping[str, Any]):
    """The edit of one tensor; as a mapping, it is a row of ``--dry-run --json``.

    ``pandas.DataFrame(plan.tensors)`` has the columns name, shard, dtype, shape, role, layer and
    factor. This is not a dataclass, since pandas would use its fields as columns.

    Attributes:
        tensor: the tensor in the source.
        factor: the factor to apply.
        operation: how the factor is applied.
        store_as: the dtype of the result, if it differs from the source's.
        role: the tensor's purpose in its module. A scale must stay a normal number: a subnormal one
            has fewer bits, and so does every weight that it scales.
        format: the name of the tensor format.
        layer: the layer of the module.
        shard: the file that holds the tensor; "" until it is looked up.
    """

    __slots__ = (  # in the order of the arguments
        *("tensor", "factor", "operation", "store_as"),
        *("role", "format", "layer", "shard"),
    )

    tensor: Tensor
    factor: float
    operation: Operation
    store_as: str | None
    role: Role
    format: str
    layer: Layer
    shard: str

    def __init__(
        self,
        tensor: Tensor,
        factor: float = 1.0,
        operation: Operation = "multiply",
        store_as: str | None = None,
        role: Role = "weight",
        format: str = "plain",
        layer: Layer = FIRST,
        shard: str = "",
    ) -> None:
        """The attributes are final; `with_` makes a changed copy."""
        values = tensor, factor, operation, store_as, role, format, layer, shard
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name!r} is final; `with_` makes a changed copy")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorEdit, self._values()

    def with_(self, **changes: Any) -> TensorEdit:
        """A copy with some attributes changed."""
        return TensorEdit(**dict(zip(self.__slots__, self._values(), strict=True)) | changes)

    def __eq__(self, other: object) -> bool:
        """Compare all attributes of two edits; another mapping is compared with the row."""
        if isinstance(other, TensorEdit):
            return self._values() == other._values()
        return super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self._values())

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return self.tensor.nbytes * self.widening

    @property
    def unit(self) -> int:
        """Bytes that must be edited together: a block of a quantised GGUF tensor, else one byte."""
        kind = BLOCKS.get(self.tensor.dtype)
        return 1 if kind is None else kind.size

    @property
    def widening(self) -> int:
        """Bytes of the result for each byte of the source."""
        return 1 if self.store_as is None else BITS[self.store_as] // BITS[self.tensor.dtype]

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
        """The tensor as in ``--dry-run --json``; `operation` only if it is not "multiply"."""
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
            **({"promoted_to": self.store_as} if self.store_as else {}),
        }
