"""Hostile files: no crash, no hang, and little memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoints, environment, nasty, quantised_checkpoints
from support.properties import (
    card_holds,
    factors_hold,
    gguf_holds,
    header_holds,
    index_holds,
    journal_holds,
    plan_holds,
    provenance_holds,
    small_gguf,
    small_model,
    spans_hold,
    with_header,
)

from moescale.api import plan
from moescale.checkpoint.dtypes import BITS
from moescale.errors import MoescaleError
from moescale.families import architectures
from moescale.storage.local.source import LocalSource

# JSON that no JSON writer produces ----------------------------------------------------------------

TOKENS = (
    *("0", "-0", "1", "4", "2.0", "1e2", "-1", "1E400", "04", "NaN", "Infinity", "-Infinity"),
    *(str(1 << 62), str((1 << 64) - 1), str(1 << 64), str(-(1 << 63)), "9" * 50, "9" * 5000),
    *("true", "false", "null", '""', '"a"', '"U8"', '"BF16"', '"F4"', '"model.safetensors"'),
    *(r'"\ud800"', r'"\udc00\ud83d"', r'"\ud83d\ude00"', '"\ufeff"', r'"\u0000"', '"a\nb"'),
    *("[" * 300, "[]", "{}", "[4]", "[0,4]", '{"a":1,"a":2}', "", "'a'", "/**/1"),
)
KEYS = st.sampled_from(
    [
        *('""', '"a"', '"b"', '"0"', '"__metadata__"', '"dtype"', '"shape"', '"data_offsets"'),
        *('"weight_map"', '"metadata"', '"factors"', '"files"', r'"\u0061"', r'"\ud800"', '"\x1b"'),
    ]
)


def _objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(KEYS, inner), max_size=4)  # keys may repeat
    return pairs.map(lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items) + "}")


JSON = st.recursive(
    st.sampled_from(TOKENS),
    lambda inner: _objects(inner) | st.lists(inner, max_size=4).map(lambda v: f"[{','.join(v)}]"),
    max_leaves=8,
)
AROUND = st.sampled_from(["", "", "", " ", "\n", "\ufeff", "\0", "x", "\xa0"])


@st.composite
def texts(draw: st.DrawFn, inner: st.SearchStrategy[str] = JSON) -> bytes:
    """A JSON text with something before and after it, possibly cut off or not UTF-8."""
    data = (draw(AROUND) + draw(inner) + draw(AROUND)).encode()
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.sampled_from([b"", b"\xff"]))
    return data


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file with contiguous entries, some of which have strange fields."""
    items, position = [], 0
    for name in draw(st.lists(KEYS, max_size=5)):
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(st.lists(st.integers(0, 3)))
        size = BITS[dtype]
        for side in shape:
            size *= side
        start, stop = position, position + size // 8
        fields = {"dtype": f'"{dtype}"', "shape": json.dumps(shape)}
        fields["data_offsets"] = f"[{start + draw(OFF)},{stop + draw(OFF)}]"
        if draw(st.integers(0, 3)) == 0:
            fields[draw(st.sampled_from([*fields, "more"]))] = draw(JSON)
        entry = ",".join(f'"{key}":{value}' for key, value in fields.items())
        items.append(f"{name}:{draw(st.just(f'{{{entry}}}') | JSON)}")
        position = stop
    text = "{" + ",".join(items) + "}"
    file = bytearray(with_header(draw(AROUND) + text, bytes(position + draw(OFF) + 1)))
    if draw(st.integers(0, 9)) == 0:
        del file[draw(st.integers(0, len(file))) :]
    return bytes(file if draw(st.booleans()) else file[:-1])


OFF = st.sampled_from([0] * 12 + [1, -1, 8])
"""The error of an offset."""


@settings(deadline=None, max_examples=400)
@given(headers())
def test_headers_of_any_kind(file: bytes) -> None:
    """Holes, overlaps, repeated keys and invalid numbers: at least as strict as safetensors."""
    header_holds(file)


@settings(deadline=None, max_examples=200)
@given(texts(_objects(JSON) | JSON) | texts(JSON.map(lambda inner: f'{{"weight_map":{inner}}}')))
def test_indexes_of_any_kind(data: bytes) -> None:
    """An index is a mapping from text to text, or refused with one line."""
    index_holds(data)


@settings(deadline=None, max_examples=300)
@given(texts())
def test_places_in_any_json(data: bytes) -> None:
    """The position of a value is found in every JSON text that `json` reads."""
    spans_hold(data)


@settings(deadline=None, max_examples=200)
@given(texts() | texts(JSON.map(lambda inner: f'{{"factors":{{"0":{inner}}}}}')))
def test_factors_of_any_kind(data: bytes) -> None:
    """A file for --factors gives usable numbers, or is refused with one line."""
    factors_hold(data)


@settings(deadline=None, max_examples=200)
@given(texts())
def test_states_of_any_kind(data: bytes) -> None:
    """A provenance or a journal of another program is ignored, without a crash."""
    provenance_holds(data)
    journal_holds(data)


YAML = st.lists(
    st.sampled_from(
        [
            *("license: mit\n", "tags: [a]\n", "tags:\n- a\n", "model-index: &m [x]\n", "x: *m\n"),
            *("a: &a [*a]\n", "tags: *a\n", "<<: *a\n", "b: {<<: [*a, *a]}\n", "? [x]\n: y\n"),
            *("n: 1:1:1.5\n", "n: " + "1:" * 300 + "1.5\n", "t: 2024-01-01T00:00:00Z\n", "- x\n"),
            *(
                "d: 0000-00-00\n",
                "x: !!binary '-'\n",
                "x: !!set {a}\n",
                "x: !!omap [a]\n",
                "x: |\n",
            ),
            *("%YAML 9.9\n", "--- \n", "...\n", "\t\n", "\x85", "\ufeff", "\0", "é: ü\n", "x: @\n"),
            *("base_model: ~\n", "tags: {a: b}\n", "tags: no\n", "1: 2\n", "null: 1\n", "&x : 1\n"),
        ]
    ),
    max_size=6,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(YAML, st.sampled_from(["---\n", "---", ""]))
def test_cards_of_any_kind(text: str, end: str) -> None:
    """Any card gives a card for the output."""
    card_holds(f"---\n{text}{end}\nbody\n".encode())


GGUF = small_gguf()


def test_a_small_gguf_file_is_a_model() -> None:
    """The file that the next test damages is valid."""
    assert plan_holds({"m.gguf": GGUF}, experts=3, rule="preserve")
    gguf_holds(GGUF)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_gguf_files(data: st.DataObject) -> None:
    """Whatever bytes change and wherever the file ends, the result is a plan or one line."""
    file = bytearray(GGUF[: data.draw(st.integers(len(GGUF) // 2, len(GGUF)))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(file), 420) - 1))
        new = data.draw(st.sampled_from((b"\0", b"\1", b"\x7f", b"\xff" * 8, b"\xff" * 4)))
        file[at : at + len(new)] = new
    gguf_holds(bytes(file))


# Whole checkpoints --------------------------------------------------------------------------------

MODELS = [(row, small_model(row)) for row in architectures.ROWS] + [
    (
        architectures.find(quantised_checkpoints.FAMILIES[case.family].model_type),
        {
            "config.json": json.dumps(quantised_checkpoints.config(case)).encode(),
            "model.safetensors": checkpoints.shard(quantised_checkpoints.tensors(case)),
        },
    )
    for case in (*quantised_checkpoints.EXACT, *quantised_checkpoints.POWER_OF_TWO)
]
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"experts": 1}, {"experts": 3}, {"factor": 2.0}, {"factors": {"0": 2.0, "1": 0.5}}),
    *({"experts": 3, "rule": "none"}, {"experts": 2, "fold": "config"}, {"experts": 4, "rho": 1}),
    *({"experts": 4, "fold": "residual"}, {"experts": 3, "arch": "mixtral"}),
)
CONFIG_KEYS = (
    *("model_type", "num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts"),
    *("first_k_dense_replace", "mlp_layer_types", "moe_layer_freq", "decoder_sparse_step"),
    *("mlp_only_layers", "n_group", "topk_group", "topk_method", "num_expert_group"),
    *("zero_expert_num", "norm_topk_prob", "per_layer_config", "pyramid_num_routed"),
    *("n_shared_experts", "moe_normalize_expert_weights", "quantization_config"),
    *("compression_config", "tie_word_embeddings", "text_config", "llm_config", "scale_fmt"),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 4, 10**5, 10**6, 10**18, 1 << 64, -(1 << 63), 1.5, 1e308),
    *(float("inf"), float("nan"), "", "mixtral", "x" * 50, "\ud800", "\n\0", "ue8m0", "e5m3"),
)


def strange(rng: random.Random, depth: int = 0) -> Any:
    """A value of the wrong type for its key."""
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(STRANGE)
    if rng.random() < 0.5:
        return [strange(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["0", "1", rng.choice(CONFIG_KEYS)]
    return {rng.choice(keys): strange(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed_config(rng: random.Random, row: architectures.Architecture, data: bytes) -> bytes:
    """A config with one or two keys, in any section, set to strange values."""
    config = json.loads(data)
    own = [*row.count_keys, *row.total_keys, *([row.scale_key] if row.scale_key else [])]
    for _ in range(rng.randrange(1, 3)):
        section = config
        while inner := [value for value in section.values() if isinstance(value, dict)]:
            if rng.random() < 0.4:
                break
            section = rng.choice(inner)
        section[rng.choice([*CONFIG_KEYS, *section, *own * 3])] = strange(rng)
    return json.dumps(config).encode()


def changed_shard(rng: random.Random, file: bytes) -> bytes:
    """A shard whose tensors have other names, dtypes or shapes, or are missing."""
    length = int.from_bytes(file[:8], "little")
    entries = json.loads(file[8 : 8 + length])
    for name in rng.sample(sorted(entries), min(3, len(entries))):
        entry = entries.pop(name)
        number = rng.choice(["0", "7", "00", "", "²", "9" * 5000, "x\ny", "\x1b[2J", "-1"])
        new = name.replace(rng.choice([".0.", ".1.", "weight", "experts"]), f".{number}.")
        entries[rng.choice([name, new, name + "_scale", name + ".absmax"])] = entry
        if name == "__metadata__":
            return with_header(json.dumps(entries), file[8 + length :])
        if rng.random() < 0.5:
            same_size = [dtype for dtype in BITS if BITS[dtype] == BITS[entry["dtype"]]]
            entry["dtype"] = rng.choice(same_size)
        if rng.random() < 0.5:
            size = (entry["data_offsets"][1] - entry["data_offsets"][0]) * 8 // BITS[entry["dtype"]]
            entry["shape"] = rng.choice(
                [[size], [1, size], [size, 1], [1, 1, size], [4, size // 4]]
            )
    return with_header(json.dumps(entries), file[8 + length :])


@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_of_any_kind(seed: int) -> None:
    """Every model type and format with nonsense in config or header is planned or refused."""
    rng = random.Random(seed)
    planned = 0
    for _ in range(600):
        row, files = rng.choice(MODELS)
        files = dict(files)
        if rng.random() < 0.7:
            files["config.json"] = changed_config(rng, row, files["config.json"])
        else:
            files["model.safetensors"] = changed_shard(rng, files["model.safetensors"])
        options = rng.choice(OPTIONS)
        try:
            planned += plan_holds(files, **options)
        except BaseException as error:
            error.add_note(f"{options} {files['config.json'].decode()[:2000]}")
            raise
    assert planned > 50  # otherwise few cases passed the first checks


# Time and memory ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs() -> dict[str, nasty.Cost]:
    """The cost of each nasty case, measured in a separate process."""
    child = subprocess.run(
        [sys.executable, "-m", "support.nasty"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env=environment(),
    )
    return {name: nasty.Cost(*cost) for name, cost in json.loads(child.stdout).items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the peak is measured in forked processes")
@pytest.mark.parametrize("case", nasty.CASES)
def test_a_few_kilobytes_cost_little(costs: dict[str, nasty.Cost], case: str) -> None:
    """A small file costs at most one second of CPU time and 200 MiB."""
    cost = costs[case]
    assert cost.status == 0, "crashed"
    assert cost.seconds < 1
    assert cost.mebibytes < 200


# Paths that are not files -------------------------------------------------------------------------


def pipe(path: Path, outside: Path) -> None:
    """A named pipe; opening it would block forever."""
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    """A folder under the name of a file, which is not empty."""
    path.mkdir()
    (path / "inner.txt").write_bytes(b"x")


def nowhere(path: Path, outside: Path) -> None:
    """A link to a missing file."""
    path.symlink_to("missing")


def itself(path: Path, outside: Path) -> None:
    """A link to itself."""
    path.symlink_to(path.name)


def away(path: Path, outside: Path) -> None:
    """A link to the same file outside of the repo."""
    path.symlink_to(outside)


def terminal(path: Path, outside: Path) -> None:
    """A link to a device without an end."""
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("make", [pipe, folder, nowhere, itself, away, terminal])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors", "LICENSE"],
)
def test_something_else_in_place_of_a_file(
    tmp_path: Path, name: str, make: Callable[[Path, Path], None]
) -> None:
    """One line names the config, index, shard or other file, and nothing blocks."""
    source = checkpoints.mixtral(tmp_path / "source")
    outside = tmp_path / "outside"
    (source / name).rename(outside)
    make(source / name, outside)
    if make is folder and name == "LICENSE":  # a folder may have this name
        assert "LICENSE/inner.txt" in LocalSource(source).files()
        return
    if make is away:  # every loader follows it
        assert plan(source, experts=3).factors
        return
    if make in (nowhere, itself) and name == "LICENSE":  # no loader reads it
        assert any(name in warning for warning in plan(source, experts=3).warnings)
        return
    with pytest.raises(MoescaleError) as caught:
        plan(source, experts=3)
    assert len(caught.value.message.splitlines()) == 1
    assert name.partition(".index")[0].partition("-0")[0] in caught.value.message


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """A tensor's name with escape sequences is shown escaped, in errors and in the plan."""
    evil = "\x1b[2Jx\r\nmoescale: all is well\u202e."
    tensors = {f"{evil}{name}": raw for name, raw in checkpoints.mixtral_tensors().items()}
    command = [sys.executable, "-m", "moescale", tmp_path / "source", "-k", "3", "--dry-run", "-v"]
    for code, name in ((0, ""), (3, f"{evil}model.layers.1.block_sparse_moe.experts.3.w2.weight")):
        tensors.pop(name, None)
        checkpoints.write_shards(tmp_path / "source", tensors, 1)
        (tmp_path / "source" / "config.json").write_text(checkpoints.MIXTRAL_CONFIG)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert not {"\x1b", "\r", "\u202e"} & set(done.stdout + done.stderr)
        assert len(done.stderr.splitlines()) <= 2
        assert code or "all is well" in done.stdout


def test_factors_without_end_are_refused() -> None:
    """A device or a pipe without an end is not read whole."""
    command = [sys.executable, "-m", "moescale", ".", "--factors", "/dev/zero", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "too large" in done.stderr
