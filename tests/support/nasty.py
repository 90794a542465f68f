"""Small files built to cost much time or memory, and the measurement of their cost.

As a script, it runs every case in a separate process and prints time and memory as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moescale.families import architectures
from support import properties
from support.properties import small_model, with_header


class Cost(NamedTuple):
    """Exit status, CPU seconds, and MiB above a process that does nothing."""

    status: int
    seconds: float
    mebibytes: float


MIXTRAL = small_model(architectures.find("mixtral"))
QWEN = small_model(architectures.find("qwen2_moe"))
DEEPSEEK = small_model(architectures.find("deepseek_v3"))


def _config(files: dict[str, bytes], changes: str) -> Callable[[], object]:
    """Plan a checkpoint with more keys in the config, given as text."""
    config = files["config.json"].rstrip(b"}") + f", {changes}}}".encode()
    return partial(properties.plan_holds, {**files, "config.json": config}, experts=3)


def _raw(config: str) -> Callable[[], object]:
    return partial(properties.plan_holds, {**MIXTRAL, "config.json": config.encode()}, experts=3)


def _card(metadata: str) -> Callable[[], object]:
    return partial(properties.card_holds, f"---\n{metadata}---\nbody\n".encode())


def _header(text: str, body: bytes = b"") -> Callable[[], object]:
    return partial(properties.header_holds, with_header(text, body))


def _index(text: str) -> Callable[[], object]:
    return partial(properties.index_holds, text.encode())


def _tensor(name: str) -> Callable[[], object]:
    """Plan a checkpoint with one more tensor."""
    shard = MIXTRAL["model.safetensors"]
    length = int.from_bytes(shard[:8], "little")
    entries = json.loads(shard[8 : 8 + length])
    end = len(shard) - 8 - length
    entries[name] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    file = with_header(json.dumps(entries), shard[8 + length :])
    return partial(properties.plan_holds, {**MIXTRAL, "model.safetensors": file}, experts=3)


def _claim(length: int, size: int = 4096) -> Callable[[], object]:
    """Plan a sparse file whose first bytes claim a header of this length."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "config.json").write_bytes(MIXTRAL["config.json"])
            with open(root / "model.safetensors", "wb") as file:
                file.write(struct.pack("<Q", length) + b"{}")
                file.truncate(size)
            properties.directory_holds(root)

    return run


def _shards(name: str) -> Callable[[], object]:
    files = {"config.json": MIXTRAL["config.json"], name: MIXTRAL["model.safetensors"]}
    return partial(properties.plan_holds, files, experts=3)


def _entry(**fields: Any) -> str:
    return json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], **fields}})


def _levels(first: str, level: str, count: int) -> str:
    return first + "".join(level.format(i=i, last=i - 1) for i in range(1, count))


CASES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    # Headers
    "a header of 2**63 bytes": _claim(1 << 63),
    "a header of 2**64 - 1 bytes": _claim((1 << 64) - 1),
    "a header of 100 MB in 4 kB": _claim(100_000_000),
    "a header of more than 100 MB in a sparse terabyte": _claim(100_000_001, 1 << 40),
    "a shape of 2**62 and 0": _header(_entry(shape=[1 << 62, 0])),
    "a shape of 0 and 2**62": _header(_entry(shape=[0, 1 << 62])),
    "a shape with ten thousand sides": _header(_entry(shape=[1] * 10_000), b"x"),
    "a shape with ten thousand large sides": _header(_entry(shape=[1 << 63] * 10_000)),
    "offsets of 2**64 - 1": _header(_entry(data_offsets=[0, (1 << 64) - 1])),
    "a header of arrays": _header("[" * 100_000),
    "a dtype of arrays": _header(_entry().replace('"U8"', "[" * 900 + "]" * 900)),
    "a header of escapes": _header('{"' + r"\ud83d\ude00" * 20_000 + '":1}'),
    # Indexes
    "an index of 100,000 arrays": _index('{"weight_map":{"a":' + "[" * 100_000),
    "an index of 100,000 closed arrays": _index("[" * 100_000 + "]" * 100_000),
    "an index of 990 objects": _index('{"a":' * 990 + "1" + "}" * 990),
    "a set of 999,999 shards": _shards("model-00001-of-999999.safetensors"),
    # Configs
    "a config of 100,000 arrays": _raw("[" * 100_000),
    "a config of 900 objects": _config(MIXTRAL, '"x":' + '{"a":' * 900 + "1" + "}" * 900),
    "a quantisation of 900 objects": _config(
        MIXTRAL, '"quantization_config":' + '{"a":' * 900 + "1" + "}" * 900
    ),
    "a number of a million digits": _config(MIXTRAL, '"num_local_experts":' + "9" * 1_000_000),
    "a fraction of a million digits": _config(MIXTRAL, '"x":0.' + "9" * 1_000_000),
    "a scale of a million digits": partial(
        properties.plan_holds,
        {"config.json": DEEPSEEK["config.json"].replace(b"2.5", b"2." + b"5" * 1_000_000)}
        | {"model.safetensors": DEEPSEEK["model.safetensors"]},
        experts=3,
        fold="config",
    ),
    "a trillion layers": _config(MIXTRAL, f'"num_hidden_layers":{10**12}'),
    "as many layers as are allowed": _config(MIXTRAL, '"num_hidden_layers":100000'),
    "many dense layers of many": _config(
        QWEN, f'"num_hidden_layers":100000,"mlp_only_layers":{list(range(10**6, 10**6 + 5000))}'
    ),
    "a trillion experts": _config(MIXTRAL, f'"num_local_experts":{10**12}'),
    "as many experts as are allowed": _config(MIXTRAL, '"num_local_experts":100000'),
    "a trillion experts in one layer": _config(MIXTRAL, f'"pyramid_num_routed":[{10**12}]'),
    "a million experts in one layer": _config(
        MIXTRAL, '"per_layer_config":{"0":{"num_local_experts":1000000}}'
    ),
    "many counts": _config(MIXTRAL, f'"text_config":{{"num_experts_per_tok":{[2] * 3000}}}'),
    # Names
    "a layer number of 5,000 digits": _tensor("layers." + "1" * 5000 + ".mlp.gate.weight"),
    "a name that repeats": _tensor("layers.1.block_sparse_moe.experts.1.w2." * 2500 + "\n"),
    "a router that repeats": _tensor("layers.1.block_sparse_moe." * 4000),
    "a leaf that repeats": _tensor("x" + ".weight_scale" * 8000),
    "a name that looks routed": partial(
        properties.plan_holds,
        {
            "config.json": b'{"model_type": "unheard_of"}',
            "model.safetensors": with_header(
                _entry().replace('"a"', '"' + "experts." * 10_000 + '"')
            ),
        },
        experts=3,
    ),
    # Cards
    "a billion laughs": _card(
        _levels("a0: &a0 [ha]\n", "a{i}: &a{i} [" + "*a{last}," * 9 + "]\n", 20)
    ),
    "a billion merges": _card(
        _levels("a0: &a0 {k: v}\n", "a{i}: &a{i} {{<<: [" + "*a{last}," * 9 + "]}}\n", 20)
    ),
    "a list in itself": _card("a: &a [*a]\ntags: *a\n"),
    "a number to the base of 60": _card("a: " + "1:" * 200_000 + "1\n"),
    "a fraction to the base of 60": _card("a: " + "1:" * 400 + "1.5\n"),
    "metadata of 3,000 arrays": _card("a: " + "[" * 3000 + "\n"),
    "many beginnings of metadata": _card("--- x\n" * 20_000),
    # State
    "factors of 900 arrays": partial(
        properties.factors_hold, b'{"0":' + b"[" * 900 + b"]" * 900 + b"}"
    ),
    "a provenance of 900 arrays": partial(properties.provenance_holds, b"[" * 900 + b"]" * 900),
    "a provenance of 900 objects": partial(
        properties.provenance_holds, b'{"a":' * 900 + b"1" + b"}" * 900
    ),
    "a journal of 100,000 arrays": partial(properties.journal_holds, b"[" * 100_000),
    "a journal of 900 objects": partial(
        properties.journal_holds, b'{"job":' * 900 + b"1" + b"}" * 900 + b"\n"
    ),
}


def _measured(case: Callable[[], object]) -> tuple[int, float, float]:
    """Run a case in a forked process; return status, seconds and peak MiB."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        try:
            case()
            os._exit(0)
        except BaseException as error:
            print(repr(error)[:500], file=sys.stderr, flush=True)
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


if __name__ == "__main__":
    results = {name: _measured(case) for name, case in CASES.items()}
    least = results["nothing"][2]
    json.dump({n: (s, t, m - least) for n, (s, t, m) in results.items()}, sys.stdout)
