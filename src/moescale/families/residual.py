"""The inverse fold: divide everything else that writes into the residual stream.

Every block reads the stream through a norm that does not depend on its size. A stream that is
smaller everywhere by one factor therefore gives the same outputs, and the unchanged experts weigh
more by that factor. This helps with formats that can only hold powers of two; it is exact up to the
rounding of the divided weights and the epsilon of the norms.

tests/families/test_residual.py proves it for gpt-oss with transformers. A new model type needs
pre-norm blocks and a row with everything else that is added to the stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from moescale.checkpoint.dtypes import SCALABLE
from moescale.checkpoint.edit import Role, TensorEdit
from moescale.checkpoint.tensor import Tensor
from moescale.errors import LEAVE_FOLD_OUT, CheckpointError, UnsupportedError
from moescale.families.names import plain_name
from moescale.families.projections import Layer

EMBEDDING: Final = "embed_tokens"
HEAD: Final = "lm_head.weight"

WRITERS: Final[Mapping[str, str]] = MappingProxyType({"gpt_oss": "layers.{L}.self_attn.o_proj"})
"""The module of each layer that writes into the stream besides the experts, by model type.

Source: transformers 5.23 modeling_gpt_oss.py, GptOssDecoderLayer and GptOssModel.
"""


def residual_writers(
    model_type: str,
    tied: bool,
    tensors: Sequence[Tensor],
    layers: set[int],
    factor: float,
) -> list[TensorEdit]:
    """The tensors to divide, the embedding first.

    Args:
        model_type: the key in `WRITERS`.
        tied: the embedding is also the head.
        tensors: all tensors of the checkpoint.
        layers: numbers of the layers with routed experts.
        factor: the factor of the writers, below 1 to give the experts more weight.

    Raises:
        UnsupportedError: the model type has no row, the embedding is also the head, or a writer
            is quantised.
        CheckpointError: a writer is missing.
    """
    if model_type not in WRITERS:
        raise UnsupportedError(
            f"--fold residual cannot be used with model type {model_type!r}: the modules that write"
            " into its residual stream are not known",
            hint=LEAVE_FOLD_OUT,
        )
    if tied or not any(plain_name(t.name) == HEAD for t in tensors):
        raise UnsupportedError(
            "--fold residual divides the embedding, which is also the head of this model",
            hint=LEAVE_FOLD_OUT,
        )
    escaped = re.escape(WRITERS[model_type]).replace(r"\{L\}", r"(?P<layer>[0-9]{1,9})")
    pattern = re.compile(rf"(?:model\.)?(?:{EMBEDDING}|{escaped})\.(?P<suffix>.+)")
    found = [(match, t) for t in tensors if (match := pattern.fullmatch(plain_name(t.name)))]
    _check_complete({m["layer"] for m, t in found if m["suffix"] == "weight"}, layers)
    return [_divided(tensor, match["suffix"], match["layer"], factor) for match, tensor in found]


def _check_complete(found: set[str | None], layers: set[int]) -> None:
    """Require the embedding (None) and one writer per layer, and nothing else."""
    wanted = {None, *map(str, layers)}
    if found != wanted:
        missing, surplus = sorted(map(str, wanted - found)), sorted(map(str, found - wanted))
        if missing[:1] == ["None"]:
            what = "has no embedding, the first tensor written to the residual stream"
            raise CheckpointError(f"--fold residual: the checkpoint {what}")
        what = f"layer {missing[0]} has no" if missing else f"layer {surplus[0]} has a surplus"
        raise CheckpointError(f"--fold residual: {what} writer into the residual stream")


def _divided(tensor: Tensor, suffix: str, layer: str | None, factor: float) -> TensorEdit:
    if suffix not in ("weight", "bias") or tensor.dtype not in SCALABLE:
        raise UnsupportedError(
            f"{tensor.name}: is {tensor.dtype}; --fold residual divides only unquantised tensors",
            hint=LEAVE_FOLD_OUT,
        )
    role: Role = "weight" if suffix == "weight" else "bias"
    of_layer = Layer(EMBEDDING, 0) if layer is None else Layer("", int(layer))
    return TensorEdit(tensor, factor, role=role, layer=of_layer)
