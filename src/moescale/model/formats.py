"""The table of tensor formats: one row each, which tensor of a projection carries its scale.

The tensors of one down-projection share its name and differ in what follows it, their leaf:
``weight``, ``bias``, ``weight_scale_inv``, ``qweight`` and so on. The leaves and dtypes decide
the format, module by module, since checkpoints mix them; the config is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.header import Tensor
from moescale.checkpoint.scaling import Operation
from moescale.errors import UnsupportedError

Role = Literal["weight", "bias", "scale"]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a format that changes when the projection is scaled."""

    role: Role
    operation: Operation = "multiply"
    promote: bool = False  # store it as F32, where its own rounding would be the only error


@dataclass(frozen=True, slots=True)
class Format:
    """How one format stores a projection.

    Attributes:
        name: what people call it.
        dtypes: leaves that must be there, each with the dtypes it may have.
        scaled: the leaves that change.
    """

    name: str
    dtypes: Mapping[str, tuple[str, ...]]
    scaled: Mapping[str, Part]


ROWS: Final[tuple[Format, ...]] = (
    Format("plain", {"weight": SCALABLE}, {"weight": Part("weight")}),
)

UNTOUCHED: Final = frozenset({"input_scale", "activation_scale", "act_scale"})
"""Leaves that describe the input of the projection; its output can scale without them."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """One tensor to scale, and how."""

    tensor: Tensor
    role: Role
    operation: Operation = "multiply"
    promote: str | None = None


def leaf_name(leaf: str) -> str:
    """The leaf without its separator; a fused tensor without any is the weight itself."""
    return leaf.lstrip("._") or "weight"


def scaled_tensors(module: str, leaves: Mapping[str, Tensor], factor: float) -> list[Scaled]:
    """The tensors of a down-projection that change when it is multiplied by `factor`.

    Args:
        module: the projection's name, for errors.
        leaves: its tensors by leaf.
        factor: what it is multiplied by.

    Raises:
        UnsupportedError: no row of the table fits, so scaling it would be a guess.
    """
    for row in ROWS:
        if all(leaf in leaves and leaves[leaf].dtype in row.dtypes[leaf] for leaf in row.dtypes):
            parts = {**row.scaled}
            if "bias" in leaves:
                parts["bias"] = Part("bias")
            if not leaves.keys() - parts.keys() - row.dtypes.keys() - UNTOUCHED:
                return [_scaled(leaves[leaf], part) for leaf, part in parts.items()]
    found = ", ".join(f"{leaf} ({tensor.dtype})" for leaf, tensor in sorted(leaves.items()))
    raise UnsupportedError(
        f"{module}: is stored as {found}, which is no format that moescale can scale",
        hint="Rescale the unquantised checkpoint and quantise the result.",
    )


def _scaled(tensor: Tensor, part: Part) -> Scaled:
    promote = "F32" if part.promote and tensor.dtype in ("F16", "BF16") else None
    return Scaled(tensor, part.role, part.operation, promote)
