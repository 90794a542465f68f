"""The real llama.cpp 0.5.0: what it does with rescaled files, and whether the table is right."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.llama_client import FTYPES, MISSING, Client, DiedError
from support.llama_models import RECIPES, one_expert, rms, scales, start, write_runnable

import moescale
from moescale.checkpoint.gguf.header import GgufHeader, parse_header
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.llama_cpp import BY_NAME
from moescale.options import Options
from moescale.planning.formats.gguf import GgufCheckpoint
from moescale.planning.sampling import find_gates, read_gates
from moescale.routers.kinds import RouterKind
from moescale.routers.weights import gate_weights
from moescale.storage.location import LocalPath
from moescale.storage.opening import open_source

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

TOKENS = (1, 5, 2, 7, 3, 11, 4, 9)
FACTOR = 1.2247448713915892
EXACT, VISIBLE = 1e-5, 1e-3
"""Root mean squares of logits: what the client's own rounding may be, and what is a difference."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """The client, in a separate process."""
    yield from start()


def convert(source: Path, output: Path, **options: Any) -> Path:
    """Convert to three experts with the closed form."""
    moescale.convert(source, output, **{"experts": 3, "rule": "preserve", **options})
    return output


def damaged(data: bytes, end: int, seed: int) -> bytes:
    """A file with some bytes of its header changed, removed or inserted."""
    rng = random.Random(seed)
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(end)
        match rng.randrange(5):
            case 0:
                found[at] = rng.randrange(256)
            case 1:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                found[at : at + 8] = rng.choice(
                    (0, 1, 5, 33, 1 << 31, 1 << 62, (1 << 64) - 1)
                ).to_bytes(8, "little")
            case 3:
                del found[at : at + rng.choice((1, 4, 8, 32))]
            case 4:
                found[at:at] = bytes(rng.choice((1, 4, 8, 32)))
    return bytes(found)


def test_what_its_reader_rejects_is_rejected(client: Client, tmp_path: Path) -> None:
    """Of headers with damage of every kind, the client reads all that moescale accepts."""
    source = write_runnable(tmp_path / "m.gguf", "llama", blocks=1)
    data = source.read_bytes()

    def taken(data: bytes) -> GgufHeader | None:
        try:
            return parse_header(lambda start, size: data[start : start + size], len(data), "x")
        except CheckpointError:
            return None

    whole = taken(data)
    assert whole is not None
    counts = {(ours, its): 0 for ours in (True, False) for its in (True, False)}
    for seed in range(400):
        changed = damaged(data, whole.infos_stop, seed)
        (tmp_path / "x.gguf").write_bytes(changed)
        verdict = taken(changed) is not None, client.reads(tmp_path / "x.gguf")
        counts[verdict] += 1
        assert verdict != (True, False), seed
    print(counts)
    assert counts[True, True] > 20
    assert counts[False, False] > 100


@pytest.mark.parametrize("arch", RECIPES)
def test_the_row_says_what_the_client_does(client: Client, tmp_path: Path, arch: str) -> None:
    """Which key and tensor multiply, and whether the gate weights' sum grows with the count."""
    row, key = BY_NAME[arch], f"{arch}.expert_weights_scale"
    base = write_runnable(tmp_path / "base.gguf", arch)
    plain = client.logits(base, TOKENS)
    scaled = client.logits(base, TOKENS, {key: 3.0})
    assert (rms(scaled, plain) > 1e-4) == row.scale_key
    zero = client.logits(base, TOKENS, {key: 0.0})
    assert np.array_equal(zero, plain)
    tensor = write_runnable(tmp_path / "tensor.gguf", arch, more=scales(3.0))
    assert (rms(client.logits(tensor, TOKENS), plain) > 1e-4) == row.scale_tensor
    alike = write_runnable(tmp_path / "alike.gguf", arch, change=one_expert)
    two, three = (client.logits(alike, TOKENS, {f"{arch}.expert_used_count": k}) for k in (2, 3))
    plan = moescale.plan(alike, experts=3, rule="none")
    assert plan.router is not None
    assert (rms(two, three) < 1e-5) == plan.router.renormalised
    if row.renormalises == "key":
        keys = {"expert_weights_norm": False}
        never = write_runnable(tmp_path / "never.gguf", arch, change=one_expert, keys=keys)
        two, three = (
            client.logits(never, TOKENS, {f"{arch}.expert_used_count": k}) for k in (2, 3)
        )
        assert rms(two, three) > 1e-4


@pytest.mark.parametrize("arch", [a for a in RECIPES if a != "grok"])
def test_scaled_weights_are_the_exact_fold(client: Client, tmp_path: Path, arch: str) -> None:
    """The reference is the factor in a key, in a tensor, or in weights multiplied by numpy."""
    row = BY_NAME[arch]
    source = write_runnable(tmp_path / "m.gguf", arch)
    plan = moescale.plan(source, experts=3, rule="preserve")
    factor = plan.factors["0"]
    output = convert(source, tmp_path / "out.gguf")
    found = client.logits(output, TOKENS)
    count = {f"{arch}.expert_used_count": 3}
    edit = client.logits(source, TOKENS, count)
    assert rms(found, edit) > 1e-4
    by_hand = write_runnable(
        tmp_path / "hand.gguf",
        arch,
        change=lambda name, values: values * (factor if "ffn_down_exps" in name else 1),
    )
    wanted = client.logits(by_hand, TOKENS, count)
    assert rms(found, wanted) < EXACT
    if row.scale_key:
        folded = client.logits(convert(source, tmp_path / "key.gguf", fold="config"), TOKENS)
        assert rms(found, folded) < EXACT
        override = {**count, f"{arch}.expert_weights_scale": factor}
        assert np.array_equal(folded, client.logits(source, TOKENS, override))
    if row.scale_tensor:
        folded = client.logits(convert(source, tmp_path / "tensor.gguf", fold="scale"), TOKENS)
        assert rms(found, folded) < EXACT


def test_a_set_is_loaded_by_its_first_file(client: Client, tmp_path: Path) -> None:
    """A set scaled part by part gives the bits of the scaled file, also with added tensors."""
    whole = write_runnable(tmp_path / "whole.gguf", "llama")
    parts = write_runnable(tmp_path / "m.gguf", "llama", split=7)
    for fold in ("weights", "scale"):
        convert(parts, tmp_path / fold, fold=fold)
        one = client.logits(tmp_path / fold / parts.name, TOKENS)
        other = convert(whole, tmp_path / f"{fold}.gguf", fold=fold)
        assert np.array_equal(one, client.logits(other, TOKENS))


def test_dividing_what_else_is_written_is_the_same(client: Client, tmp_path: Path) -> None:
    """--fold residual of gpt-oss: the stream is smaller, which only the norms' epsilon shows."""
    keys = {"attention.layer_norm_rms_epsilon": 1e-12}
    source = write_runnable(tmp_path / "m.gguf", "gpt-oss", keys=keys)
    plain, divided = (
        client.logits(convert(source, tmp_path / f"{fold}.gguf", fold=fold), TOKENS)
        for fold in ("weights", "residual")
    )
    assert rms(plain, divided) < EXACT
    edit = client.logits(source, TOKENS, {"gpt-oss.expert_used_count": 3})
    assert rms(plain, edit) > VISIBLE


def test_routers_are_scaled_where_the_client_reads_them(client: Client, tmp_path: Path) -> None:
    """The result equals that of a router multiplied beforehand; gpt-oss has a bias too."""
    for arch in ("qwen3moe", "gpt-oss"):
        source = write_runnable(tmp_path / "m.gguf", arch)
        convert(source, tmp_path / "out.gguf", gate_scale=1.5, overwrite=True)
        factor = moescale.plan(source, experts=3, rule="preserve").factors["0"]

        def change(name: str, values: Any, factor: float = factor) -> Any:
            down, router = "ffn_down_exps" in name, "ffn_gate_inp" in name
            return values * (factor if down else 1.5 if router else 1)

        by_hand = write_runnable(tmp_path / "hand.gguf", arch, change=change)
        wanted = client.logits(by_hand, TOKENS, {f"{arch}.expert_used_count": 3})
        assert rms(client.logits(tmp_path / "out.gguf", TOKENS), wanted) < EXACT


@pytest.mark.parametrize("kind", FTYPES)
def test_a_quantised_file_is_near_the_exact_fold(client: Client, tmp_path: Path, kind: str) -> None:
    """The client quantises; rounding the scales changes far less than the edit does."""
    plain = write_runnable(
        tmp_path / "plain.gguf",
        "llama",
        sizes={32: 256},
        keys={
            "embedding_length": 256,
            "feed_forward_length": 256,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 64,
        },
    )
    source = tmp_path / "m.gguf"
    client.quantise(plain, source, FTYPES[kind])
    exact = client.logits(convert(source, tmp_path / "tensor.gguf", fold="scale"), TOKENS)
    edit = client.logits(source, TOKENS, {"llama.expert_used_count": 3})
    if kind == "MXFP4_MOE":
        with pytest.raises(UnsupportedError, match="powers of two"):
            moescale.plan(source, experts=3, rule="preserve")
        convert(source, tmp_path / "out.gguf", rule=None, factor=2.0)
        twice = convert(source, tmp_path / "twice.gguf", rule=None, factor=2.0, fold="scale")
        assert (
            rms(client.logits(tmp_path / "out.gguf", TOKENS), client.logits(twice, TOKENS)) < 0.01
        )
        return
    found = client.logits(convert(source, tmp_path / "out.gguf"), TOKENS)
    assert rms(found, exact) < 0.1 * rms(edit, exact)


FORMED = [arch for arch in RECIPES if isinstance(BY_NAME[arch].router, RouterKind)]
GROUPED = [arch for arch in FORMED if BY_NAME[arch].renormalises == "key"]


@pytest.mark.parametrize(
    ("arch", "groups"), [*((arch, 0) for arch in FORMED), *((arch, 2) for arch in GROUPED)]
)
def test_gate_weights_are_those_of_the_client(
    client: Client, tmp_path: Path, arch: str, groups: int
) -> None:
    """The rule gates finds the router and its norm, and computes the client's gate weights."""
    kind = BY_NAME[arch].router
    assert isinstance(kind, RouterKind)
    biases = {f"blk.{i}.{name}" for i in range(2) for name in kind.bias}
    biases -= {f"blk.{i}.{name}" for i in range(2) for name in RECIPES[arch]["block"]}
    more = {name: np.float32([0.3, 0, 0.1, -0.2]) for name in biases}
    keys = {"expert_group_count": groups, "expert_group_used_count": 1} if groups else {}
    write_runnable(tmp_path / "m.gguf", arch, more=more, keys=keys)
    source = open_source(LocalPath(str(tmp_path / "m.gguf")))
    checkpoint = GgufCheckpoint(source, Options(experts=2), False)
    routers = find_gates(checkpoint.moe, checkpoint.headers)
    for k in (1, 2) if groups else (1, 2, 3):
        seen = client.gates(tmp_path / "m.gguf", TOKENS, {f"{arch}.expert_used_count": k})
        assert len(seen) == 2
        for tensors, router in read_gates(source, routers):
            inputs, found = seen[tensors.layer.number]
            sizes = np.sqrt(np.square(inputs / router.norm).mean(axis=1))
            assert np.allclose(sizes, 1, atol=2e-3)
            logits = inputs @ router.weight.T
            if router.logit_bias is not None:
                logits = logits + router.logit_bias
            wanted = gate_weights(logits, k, routers.gate, router.bias)
            assert np.allclose(-np.sort(-found, axis=1), wanted, atol=1e-5)


CROWD, MANY = 160, 140


def crowded(path: Path, arch: str, **given: Any) -> tuple[Path, int]:
    """A model of four blocks with many experts, and the largest count that a plan has room for."""

    def many(name: str, values: Any) -> Any:
        if "norm" in name or not any(part in name for part in ("_exps", "gate_inp.", "exp_probs")):
            return values
        return np.resize(values, (CROWD, *values.shape[1:]))

    keys = {"expert_count": CROWD, **given.pop("keys", {})}
    write_runnable(path, arch, change=many, keys=keys, blocks=4, **given)
    plan = moescale.plan(path, experts=MANY, rule="none")
    (said,) = (text for text in plan.warnings if "GGML_ASSERT" in text)
    found = re.search(r"has room for (\d+) experts", said)
    assert found is not None
    most = int(found[1])
    fits = moescale.plan(path, experts=most, rule="none").warnings
    assert not any("GGML_ASSERT" in text for text in fits)
    return path, most


def check_room(client: Client, source: Path, arch: str, most: int) -> None:
    """The client runs this count, and one more ends it."""
    key = f"{arch}.expert_used_count"
    client.logits(source, TOKENS, {key: most}, exact=False)
    with pytest.raises(DiedError):
        client.logits(source, TOKENS, {key: most + 1}, exact=False)


@pytest.mark.parametrize("arch", RECIPES)
def test_one_expert_more_than_the_plan_says_ends_the_client(
    client: Client, tmp_path: Path, arch: str
) -> None:
    """The number is exact for every architecture that was counted."""
    source, most = crowded(tmp_path / "m.gguf", arch)
    check_room(client, source, arch, most)


def numbers(*shape: int) -> Any:
    """Random weights."""
    return np.full(shape, 0.1, np.float32)


BIASES = {f"blk.{i}.attn_{s}.bias": numbers(32) for i in range(4) for s in "qkv"}
NORMS = {f"blk.{i}.attn_{s}_norm.weight": numbers(8) for i in range(4) for s in "qk"}


@pytest.mark.parametrize(
    ("arch", "more", "keys"),
    [
        ("qwen2moe", BIASES, {}),
        ("gpt-oss", BIASES, {}),
        ("glm4moe", {**BIASES, **NORMS}, {}),
        ("llama", {f"blk.{i}.ffn_gate_exps.weight": numbers(CROWD, 32, 32) for i in range(4)}, {}),
        ("llama", {f"blk.{i}.ffn_down_exps.scale": numbers(CROWD) for i in range(4)}, {}),
        ("deepseek2", {}, {"expert_group_count": 8, "expert_group_used_count": 7}),
        ("deepseek2", {}, {"expert_weights_norm": False, "expert_weights_scale": 2.0}),
    ],
)
def test_what_else_is_in_a_file_takes_room_too(
    client: Client, tmp_path: Path, arch: str, more: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Optional weights of the architecture, groups and a factor take nodes of the graph."""
    source, most = crowded(tmp_path / "m.gguf", arch, more=more, keys=keys)
    check_room(client, source, arch, most)


@pytest.mark.parametrize("arch", ["deepseek2", "dots1", "glm4moe", "ernie4_5-moe"])
def test_dense_blocks_take_less_room(client: Client, tmp_path: Path, arch: str) -> None:
    """They have no experts and no router."""
    parts = ("exps", "gate_inp", "shexp", "exp_probs")
    routed = [n for n in RECIPES[arch]["block"] if any(part in n for part in parts)]
    source, most = crowded(
        tmp_path / "m.gguf",
        arch,
        keys={"leading_dense_block_count": 1},
        without=[f"blk.0.{name}" for name in routed],
        more={f"blk.0.ffn_{name}.weight": numbers(32, 32) for name in ("gate", "up", "down")},
    )
    check_room(client, source, arch, most)
