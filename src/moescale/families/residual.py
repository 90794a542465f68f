"""The inverse fold: what else writes into the residual stream is divided, the experts stay.

Every block reads the stream through a norm that does not see how large it is. So a stream that
is smaller everywhere by one factor gives the same outputs, and in it the experts, whose weights
were not touched, count for the factor more. This serves formats that hold no other factor than a
power of two; it is exact up to the rounding of the divided weights and the epsilon of the norms.

Proven for gpt-oss in tests/families/test_residual.py, with transformers. A new model type needs
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
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.names import plain_name
from moescale.families.projections import Layer

EMBEDDING: Final = "embed_tokens"
HEAD: Final = "lm_head.weight"

WRITERS: Final[Mapping[str, str]] = MappingProxyType({"gpt_oss": "layers.{L}.self_attn.o_proj"})
"""By model type, the module of each layer that writes into the stream beside the experts.

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
        model_type: whose row of `WRITERS` counts.
        tied: the embedding is also the head.
        tensors: the whole checkpoint.
        layers: the numbers of the layers that have routed experts.
        factor: what they are multiplied by.

    Raises:
        UnsupportedError: the model type has no row, the embedding is also the head, or a writer
            is not stored as plain numbers.
        CheckpointError: a writer is missing.
    """
    if model_type not in WRITERS:
        raise UnsupportedError(
            f"--fold residual cannot be used with model type {model_type!r}: what writes into its"
            " residual stream is not known",
            hint="Leave --fold out; the weights are scaled then.",
        )
    if tied or not any(plain_name(t.name) == HEAD for t in tensors):
        raise UnsupportedError(
            "--fold residual divides the embedding, which is also the head of this model",
            hint="Leave --fold out; the weights are scaled then.",
        )
    escaped = re.escape(WRITERS[model_type]).replace(r"\{L\}", r"(?P<layer>[0-9]{1,9})")
    pattern = re.compile(rf"(?:model\.)?(?:{EMBEDDING}|{escaped})\.(?P<suffix>.+)")
    found = [(match, t) for t in tensors if (match := pattern.fullmatch(plain_name(t.name)))]
    _check_complete({m["layer"] for m, t in found if m["suffix"] == "weight"}, layers)
    return [_divided(tensor, match["suffix"], match["layer"], factor) for match, tensor in found]


def _check_complete(found: set[str | None], layers: set[int]) -> None:
    """The embedding (None) and a writer for each layer, no more and no less."""
    wanted = {None, *map(str, layers)}
    if found != wanted:
        missing, surplus = sorted(map(str, wanted - found)), sorted(map(str, found - wanted))
        what = f"layer {missing[0]} has no" if missing else f"layer {surplus[0]} has a surplus"
        if missing[:1] == ["None"]:
            what = "the checkpoint has no embedding, thus no first"
        raise CheckpointError(f"--fold residual: {what} writer into the residual stream")


def _divided(tensor: Tensor, suffix: str, layer: str | None, factor: float) -> TensorEdit:
    if suffix not in ("weight", "bias") or tensor.dtype not in SCALABLE:
        raise UnsupportedError(
            f"{tensor.name}: is {tensor.dtype}; --fold residual divides plain numbers only",
            hint="Leave --fold out; the weights are scaled then.",
        )
    place = Layer(EMBEDDING, 0) if layer is None else Layer("", int(layer))
    role: Role = "weight" if suffix == "weight" else "bias"
    return TensorEdit(tensor, factor, role=role, layer=place)
