"""Every tensor type with every fold, from file to file.

Reference values come from PyPI's ``gguf`` and, for the two types that it lacks, from the
formulas of ``ggml-quants.c`` (``dequantize_row_q1_0``, ``_q2_0``).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.gguf_models import (
    EXPERTS,
    HIDDEN,
    SCALES_AT,
    WIDTH,
    random_blocks,
    read_model,
    write_model,
)

import moescale
from moescale.checkpoint.gguf.types import ROWS
from moescale.errors import UnsupportedError

FACTOR = np.float32(1.2247448713915892)
NAMES = tuple(f"blk.{layer}.ffn_down_exps.weight" for layer in range(2))

KINDS = tuple(row.name for row in ROWS if row.refused is None)
FOLDED = (*KINDS, "NVFP4")

Array = np.ndarray[Any, Any]


def write(path: Path, arch: str, kind: str) -> Path:
    """Write a model whose down-projections have this type."""
    keys = {"expert_weights_norm": True} if arch == "bailingmoe" else {}
    if kind != "Q2_0":
        return write_model(path, arch, kind=kind, keys=keys)[0]
    rng = np.random.default_rng(42)
    shape = EXPERTS, HIDDEN, WIDTH // 64 * 18 // 2
    blocks = [random_blocks(rng, kind, EXPERTS * HIDDEN * WIDTH // 64, 18) for _ in NAMES]
    tensors = {n: b.view("<f2").reshape(shape) for n, b in zip(NAMES, blocks, strict=True)}
    write_model(path, arch, kind="F16", keys=keys, tensors=tensors)
    retype(path, (shape[2], 1), (WIDTH, 42))
    return path


def retype(path: Path, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Change the row length and the type: the library has no name for Q2_0."""
    data = path.read_bytes()
    for name in NAMES:
        before, after = (
            name.encode() + struct.pack("<IQQQI", 3, row, HIDDEN, EXPERTS, number)
            for row, number in (old, new)
        )
        assert data.count(before) == 1
        data = data.replace(before, after)
    path.write_bytes(data)


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors, as the library reads them."""
    if kind == "Q2_0":
        retype(path, (WIDTH, 42), (WIDTH // 64 * 18 // 2, 1))
    return read_model(path)


def weights(kind: str, tensor: Any) -> Array:
    """The values of a tensor, in double precision."""
    data = np.ascontiguousarray(tensor.data)
    if kind in ("Q1_0", "Q2_0"):
        blocks = data.reshape(-1).view(np.uint8).reshape(-1, 18)
        bits = 1 if kind == "Q1_0" else 2
        codes = blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
        numbers = codes.reshape(len(blocks), -1).astype(np.float64)
        numbers = 2 * numbers - 1 if kind == "Q1_0" else numbers - 1
        found = numbers * blocks[:, :2].copy().view("<f2").astype(np.float64)
    elif kind in ("F32", "F16"):
        found = data
    else:
        found = gguf.quants.dequantize(data, tensor.tensor_type)
    return found.astype(np.float64).reshape(EXPERTS, HIDDEN, WIDTH)


def convert(source: Path, output: Path, **options: Any) -> None:
    """Convert with the closed form, and verify."""
    given = {"experts": 3, "rule": "preserve", "verify": True, **options}
    moescale.convert(source, output, **given)


def outside_scales(kind: str, tensor: Any) -> Array:
    """The bytes of all blocks except their scales."""
    size = {"MXFP4": 17}.get(kind) or gguf.GGML_QUANT_SIZES.get(
        getattr(gguf.GGMLQuantizationType, kind, None), (0, 18)
    )[1]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).reshape(-1, size).copy()
    width = 1 if kind in ("MXFP4", "IQ1_M") else 2
    for at in SCALES_AT.get(kind, (0,)):
        blocks[:, at : at + width] &= 0x0F if kind == "IQ1_M" else 0
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_multiplied(tmp_path: Path, kind: str) -> None:
    """MXFP4, by powers of two, is exact; other types are right up to the rounding of a scale."""
    source, output = write(tmp_path / "m.gguf", "llama", kind), tmp_path / "out.gguf"
    exact = kind == "MXFP4"
    convert(source, output, **({"rule": None, "factor": 0.5} if exact else {}))
    factor = 0.5 if exact else float(FACTOR)
    (_, old), (_, new) = read(source, kind), read(output, kind)
    for name in NAMES:
        before, after = weights(kind, old[name]), weights(kind, new[name])
        assert np.isfinite(before).all()
        assert np.abs(before).max() > 0
        error = np.abs(after - factor * before)
        bound = {"F32": 2.0**-24, "BF16": 2.0**-8, "MXFP4": 0.0}.get(kind, 2.0**-10)
        assert (error <= bound * 2 * np.abs(before).max()).all()
        assert exact or error.max() > 0
        if kind not in ("F32", "F16", "BF16"):
            assert np.array_equal(outside_scales(kind, old[name]), outside_scales(kind, new[name]))


@pytest.mark.parametrize("kind", FOLDED)
def test_a_scale_tensor_multiplies_any_type(tmp_path: Path, kind: str) -> None:
    """The factor is stored in F32, and the weights keep their bytes."""
    source, output = write(tmp_path / "m.gguf", "llama", kind), tmp_path / "out.gguf"
    convert(source, output, fold="scale")
    (_, old), (_, new) = read(source, kind), read(output, kind)
    for name in NAMES:
        scale = new[name.replace("weight", "scale")].data
        assert scale.tolist() == [FACTOR] * EXPERTS
        assert new[name].data.tobytes() == old[name].data.tobytes()
        product = weights(kind, new[name]) * scale.astype(np.float64)[:, None, None]
        assert np.array_equal(product, weights(kind, old[name]) * float(FACTOR))


@pytest.mark.parametrize("kind", FOLDED)
def test_a_key_multiplies_any_type(tmp_path: Path, kind: str) -> None:
    """The key holds one factor; no tensor changes, and none is added."""
    source, output = write(tmp_path / "m.gguf", "bailingmoe", kind), tmp_path / "out.gguf"
    convert(source, output, fold="config")
    (_, old), (keys, new) = read(source, kind), read(output, kind)
    assert keys["bailingmoe.expert_weights_scale"] == FACTOR
    assert {n: t.data.tobytes() for n, t in new.items()} == {
        n: t.data.tobytes() for n, t in old.items()
    }
    for name in NAMES:
        assert np.array_equal(weights(kind, new[name]), weights(kind, old[name]))


@pytest.mark.parametrize(("arch", "way"), [("llama", "--fold scale"), ("olmoe", "cannot")])
def test_the_bytes_of_nvfp4_are_left_alone(tmp_path: Path, arch: str, way: str) -> None:
    """Its scales have no room for a factor; the error names a fold that has, if there is one."""
    source = write(tmp_path / "m.gguf", arch, "NVFP4")
    with pytest.raises(UnsupportedError, match="NVFP4") as caught:
        moescale.plan(source, experts=3, rule="preserve")
    assert way in f"{caught.value}"
