"""Every quantised format through the whole conversion, compared with independent formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support import quantised_checkpoints as q
from support import rounding
from support.checkpoints import Raw
from support.quantised_checkpoints import Case

from moescale import api
from moescale.errors import RewriteError, UnsupportedError

FACTOR = 1.37

every_format = pytest.mark.parametrize("case", q.EXACT, ids=lambda case: case.id)
powers_of_two = pytest.mark.parametrize("case", q.POWER_OF_TWO, ids=lambda case: case.id)


def convert(
    case: Case, folder: Path, factor: float, experts: int | None = None
) -> tuple[dict[str, Raw], dict[str, Raw]]:
    """The tensors before and after a verified conversion."""
    before = q.write(case, folder / "in")
    result = api.convert(folder / "in", folder / "out", factor=factor, experts=experts, verify=True)
    assert result.verified
    return before, q.read(folder / "out")


def parts(tensors: dict[str, Raw], module: str) -> dict[str, Raw]:
    """The tensors of one projection, by the suffix of their name."""
    return {n.removeprefix(module): t for n, t in tensors.items() if n.startswith(module)}


def changed(case: Case, before: Raw, operation: str, factor: float) -> Raw:
    """The expected bytes of a part."""
    dtype, shape, data = before
    if operation == "multiply":
        return dtype, shape, rounding.scaled(dtype, data, factor)
    if operation == "promote":
        wide = q.array(before).astype("<f4").tobytes()
        return "F32", shape, rounding.scaled("F32", wide, factor)
    if operation == "divide":
        return dtype, shape, (np.frombuffer(data, "<f4") / np.float32(factor)).tobytes()
    assert operation == "shift"
    codes = np.frombuffer(data, np.uint8).astype(int)
    k = int(np.log2(factor))
    return dtype, shape, np.where(codes == 0, 0, codes + k).astype(np.uint8).tobytes()


def check_bytes(case: Case, before: dict[str, Raw], after: dict[str, Raw], factor: float) -> None:
    """Planned parts have the expected bytes, and no other tensor changed."""
    assert before.keys() == after.keys()
    routed = {m + ending: how for m in q.modules(case) for ending, how in case.changed.items()}
    plain = [m for m in q.modules(case, q.LAYERS + 1) if m not in q.modules(case)]
    for name, tensor in before.items():
        if name in plain or re.sub(r"[._]weight$", "", name) in plain:
            assert after[name] == changed(case, tensor, "multiply", factor), name
        elif name not in routed:
            assert after[name] == tensor, name
        elif routed[name] != "json":
            assert after[name] == changed(case, tensor, routed[name], factor), name


def check_values(case: Case, before: dict[str, Raw], after: dict[str, Raw], factor: float) -> None:
    """Every term of every weight is the factor times the old one, within the scale's rounding."""
    for module in q.modules(case):
        old, new = case.terms(parts(before, module)), case.terms(parts(after, module))
        for one, other in zip(old, new, strict=True):
            assert np.isfinite(one).all() and np.abs(one).max() > 0
            tolerance = {"0.049 %": 4.9e-4, "0.39 %": 3.91e-3, None: 2.5e-7}[case.note]
            if ".svdquant_lora_b" in case.changed:
                tolerance = 3.91e-3  # a plain BF16 matrix; its products are added up
                np.testing.assert_allclose(other, one * factor, tolerance, 0.1)
            else:
                np.testing.assert_allclose(other, one * factor, tolerance, 0)


@every_format
def test_weights_are_multiplied_and_codes_stay(case: Case, tmp_path: Path) -> None:
    """Only the scales change: the plan's tensors are multiplied, and every other byte stays."""
    before, after = convert(case, tmp_path, FACTOR)
    check_bytes(case, before, after, FACTOR)
    check_values(case, before, after, np.float64(np.float32(FACTOR)))


@pytest.mark.parametrize("factor", [2.0, 0.25])
@powers_of_two
def test_power_of_two_scales_take_a_power_of_two(case: Case, factor: float, tmp_path: Path) -> None:
    """Exponents are shifted, zero blocks stay, and weights are multiplied without any rounding."""
    before, after = convert(case, tmp_path, factor)
    check_bytes(case, before, after, factor)
    for module in q.modules(case):
        old, new = case.terms(parts(before, module)), case.terms(parts(after, module))
        for one, other in zip(old, new, strict=True):
            shifted = np.abs(one) > 2.0**-100  # the value of byte 0 stays 0
            np.testing.assert_array_equal(other[shifted], one[shifted] * factor)
            assert shifted.any()


@powers_of_two
def test_power_of_two_scales_refuse_other_factors(case: Case, tmp_path: Path) -> None:
    """The error names the format and the alternatives, and nothing is written."""
    q.write(case, tmp_path / "in")
    with pytest.raises(UnsupportedError, match="powers of two") as caught:
        api.convert(tmp_path / "in", tmp_path / "out", factor=FACTOR)
    assert not (tmp_path / "out").exists()
    error = caught.value
    assert case.id.split(",")[0].split()[-1] in error.message
    assert error.hint is not None and "--factor 1 " in error.hint and "--factor 2." in error.hint
    has_key = "routed_scaling_factor" in q.config(case)
    assert ("--fold config multiplies routed_scaling_factor" in error.hint) == has_key


@every_format
def test_a_shard_without_a_wider_scale_keeps_its_header(case: Case, tmp_path: Path) -> None:
    """A header changes only if a scale is promoted to F32; other shards keep their length."""
    q.write(case, tmp_path / "in")
    plan = api.convert(tmp_path / "in", tmp_path / "out", factor=FACTOR).plan
    widened = {t.shard for t in plan.tensors if t.store_as}
    assert bool(widened) == ("promote" in case.changed.values())
    for path in (tmp_path / "in").glob("*.safetensors"):
        old, new = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        length = 8 + int.from_bytes(old[:8], "little")
        assert (len(old) == len(new) and old[:length] == new[:length]) == (path.name not in widened)


@every_format
def test_safetensors_loads_the_output(case: Case, tmp_path: Path) -> None:
    """Every shard opens in the library, and all its tensors can be read."""
    _, after = convert(case, tmp_path, FACTOR)
    seen = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is not a mapping
                assert shard.get_tensor(name).shape == after[name][1]
                seen.add(name)
    assert seen == after.keys()


@every_format
def test_rounding_is_said_once(case: Case, tmp_path: Path) -> None:
    """A scale that stays in 16 bits is rounded; one warning per format gives the error."""
    q.write(case, tmp_path / "in")
    said = [w for w in api.plan(tmp_path / "in", factor=FACTOR).warnings if "rounded" in w]
    assert [case.note in w for w in said] == ([True] if case.note else [])
    assert not [w for w in api.plan(tmp_path / "in", factor=2.0).warnings if "rounded" in w]


@pytest.mark.parametrize("case", [*q.EXACT, *q.POWER_OF_TWO], ids=lambda case: case.id)
def test_a_factor_of_one_changes_nothing(case: Case, tmp_path: Path) -> None:
    """With a factor of 1 all tensors are copied, including scales that could be promoted."""
    if case.family == "deepseek_v4":  # its count cannot change, so nothing does
        q.write(case, tmp_path / "in")
        assert api.plan(tmp_path / "in", factor=1.0).changes_nothing
        return
    before, after = convert(case, tmp_path, 1.0, experts=2)
    assert before == after


# Errors -------------------------------------------------------------------------------------------


def case_of(id: str) -> Case:
    """A case by its id."""
    return next(case for case in (*q.EXACT, *q.POWER_OF_TWO) if case.id == id)


def with_scale(id: str, folder: Path, ending: str, value: Raw) -> Path:
    """Write a checkpoint of this format in which one projection has another tensor."""
    case = case_of(id)
    tensors = q.tensors(case)
    tensors[q.modules(case)[1] + ending] = value
    q.write_shards(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps(q.config(case)))
    return folder


@pytest.mark.parametrize(
    ("id", "ending", "dtype", "shape"),
    [
        ("AWQ gemv", ".scales", "F16", (q.OUT, 8)),
        ("tensor FP8, static", ".weight_scale", "F32", (1,)),
        ("channel FP8", ".weight_scale", "BF16", (q.OUT, 1)),
        ("MXFP8, ModelOpt", ".weight_scale", "U8", (q.OUT, 2)),
    ],
)
def test_scales_that_are_all_zero_are_named(
    id: str, ending: str, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """No factor changes their weights; a single nonzero scale is enough to suppress the warning."""
    zeros = np.zeros(shape)
    source = with_scale(id, tmp_path / "in", ending, q.raw(dtype, zeros))
    result = api.convert(source, tmp_path / "out", factor=2.0)
    name = q.modules(case_of(id))[1] + ending
    assert [w.partition(":")[0] for w in result.warnings] == [name]
    assert result.warnings[0].count("every scale in it is 0 (1 in all)") == 1
    assert result.rounding == {}
    zeros.flat[-1] = 120
    source = with_scale(id, tmp_path / "well", ending, q.raw(dtype, zeros))
    assert not api.convert(source, tmp_path / "done", factor=2.0).warnings


TOO_FAR = {
    "F16 grows": ("AWQ gemv", ".scales", "F16", (q.OUT, 8), 60000, 1.5),
    "F16 sinks": ("AWQ gemv", ".scales", "F16", (q.OUT, 8), 7e-5, 0.5),
    "F16 vanishes": ("AWQ gemv", ".scales", "F16", (q.OUT, 8), 6e-8, 0.25),
    "BF16 sinks": ("HQQ", ".scale", "BF16", (64, 1), 1.5e-38, 0.5),
    "F32 grows": ("tensor FP8, static", ".weight_scale", "F32", (1,), 3e38, 1.5),
    "F32 sinks": ("tensor FP8, static", ".weight_scale", "F32", (1,), 1.5e-38, 0.5),
    "promoted, grows": ("channel FP8", ".weight_scale", "BF16", (q.OUT, 1), 3e38, 1.5),
    "promoted, sinks": ("channel FP8", ".weight_scale", "BF16", (q.OUT, 1), 1.5e-38, 0.5),
    "divisor sinks": (
        "NVFP4, compressed-tensors",
        ".weight_global_scale",
        "F32",
        (1,),
        2e-38,
        2.0,
    ),
    "divisor grows": ("NVFP4, compressed-tensors", ".weight_global_scale", "F32", (1,), 3e38, 0.5),
    "E8M0 grows": ("MXFP8, ModelOpt", ".weight_scale", "U8", (q.OUT, 2), 253, 4.0),
    "E8M0 sinks": ("MXFP8, ModelOpt", ".weight_scale", "U8", (q.OUT, 2), 2, 0.25),
}


@pytest.mark.parametrize("what", TOO_FAR)
def test_a_scale_that_leaves_its_range_is_an_error(what: str, tmp_path: Path) -> None:
    """If a scale would become infinite, zero or subnormal, the run ends and names its tensor."""
    id, ending, dtype, shape, value, factor = TOO_FAR[what]
    source = with_scale(id, tmp_path / "in", ending, q.raw(dtype, np.full(shape, value)))
    with pytest.raises(RewriteError, match="would leave the normal range") as caught:
        api.convert(source, tmp_path / "out", factor=factor)
    assert q.modules(case_of(id))[1] + ending in caught.value.message


@pytest.mark.parametrize("what", ["F16 grows", "F16 sinks", "E8M0 grows"])
def test_a_narrow_scale_is_tried_before_anything_is_written(what: str, tmp_path: Path) -> None:
    """On a local disk, a narrow scale that leaves its range ends the run before its first shard."""
    id, ending, dtype, shape, value, factor = TOO_FAR[what]
    source = with_scale(id, tmp_path / "in", ending, q.raw(dtype, np.full(shape, value)))
    with pytest.raises(RewriteError, match="would leave the normal range"):
        api.convert(source, tmp_path / "out", factor=factor)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_was_subnormal_may_stay_so(tmp_path: Path) -> None:
    """Groups of zeros may have subnormal F16 scales, which is not an error."""
    tiny = q.raw("F16", np.full((q.OUT, 8), 6.7e-7))
    source = with_scale("AWQ gemv", tmp_path / "in", ".scales", tiny)
    api.convert(source, tmp_path / "out", factor=0.9, verify=True)


STATE = ".weight.quant_state.bitsandbytes__nf4"
BROKEN_STATES = {
    "no JSON": b"\x00\x01\x02",
    "no text": b'\xff{"nested_offset": 1.0}',
    "no offset": b'{"quant_type": "nf4"}',
    "no object": b"[1, 2]",
    "no number": b'{"nested_offset": "1.0"}',
    "two of them": b'{"nested_offset": 1.0, "nested_offset": 2.0}',
    "no room": b'{"nested_offset":1}',
    "infinite": b'{"nested_offset": 1e999, "shape": [1, 2]}',
    "huge": b'{"nested_offset": ' + b"9" * 400 + b"}",
    "grows": b'{"nested_offset": 3.4e38, "shape": [1, 2]}',
}


@pytest.mark.parametrize("what", BROKEN_STATES)
def test_a_broken_quantisation_state_is_one_line(what: str, tmp_path: Path) -> None:
    """A state that cannot be rewritten ends the run with an error that names the tensor."""
    state = q.raw("U8", np.frombuffer(BROKEN_STATES[what], np.uint8))
    source = with_scale("bitsandbytes nf4 double", tmp_path / "in", STATE, state)
    with pytest.raises(RewriteError) as caught:
        api.convert(source, tmp_path / "out", factor=FACTOR)
    assert STATE in caught.value.message and "\n" not in caught.value.message


def test_an_offset_with_few_digits_still_fits(tmp_path: Path) -> None:
    """If the new offset is longer than the old one, the spaces after commas give way."""
    text = b'{"quant_type": "nf4", "shape": [1, 2], "nested_offset": 0.5}'
    state = q.raw("U8", np.frombuffer(text, np.uint8))
    source = with_scale("bitsandbytes nf4 double", tmp_path / "in", STATE, state)
    api.convert(source, tmp_path / "out", factor=FACTOR, verify=True)
    name = q.modules(case_of("bitsandbytes nf4 double"))[1] + STATE
    new = q.read(tmp_path / "out")[name][2]
    assert len(new) == len(text) and np.float32(json.loads(new)["nested_offset"]) == np.float32(
        np.float32(0.5) * np.float32(FACTOR)
    )
    assert list(json.loads(new)) == list(json.loads(text))
