#!/usr/bin/env python3
"""Measures moescale on this machine: time against `cp -r`, peak memory, start-up.

    python scripts/benchmark.py                    # 3 GB in a temporary folder
    python scripts/benchmark.py --dir /mnt/disk --gigabytes 10 --pairs 9

Needs moescale installed in the Python that runs it, and three times the size on the disk. The
page cache is warm; the runs of a round follow one another in changing order, so that a drifting
machine shows in all of them. `cp -r` does not wait for the disk; moescale does (every file is
synced before it gets its name), so a third row has `cp -r` followed by a sync of what it wrote.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HIDDEN, INNER, EXPERTS = 2048, 3584, 8
PIECE = 16 << 20
SETTLE = 3.0
"""Seconds between runs: a removed file keeps a disk busy for a while after the sync."""


def main() -> None:
    """Make the models, run the pairs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="moescale-bench-") as folder:
        root = Path(folder)
        print(f"{describe_machine()}; {file_system(root)}")
        many, stacked = root / "many", root / "stacked"
        # In processes of their own, whose memory does not count as that of the measured ones.
        in_child(make_mixtral, many, arguments.gigabytes)
        in_child(make_stacked, stacked, arguments.gigabytes / 2)
        start_up()
        for source, label in ((many, "4 shards"), (stacked, "one stacked tensor")):
            compare(source, root / "output", label, arguments.pairs)


def in_child(function: Callable[[Path, float], None], folder: Path, gigabytes: float) -> None:
    """Run a function in a new process."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=(folder, gigabytes))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit("the model could not be made")


def describe_machine() -> str:
    """Processor, cores, memory and system, as a reader needs them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB,"
        f" Python {platform.python_version()}"
    )


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on."""
    answer = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown file system"


def make_mixtral(folder: Path, gigabytes: float) -> None:
    """A Mixtral of random bf16 numbers in 4 shards of equal size."""
    layer_bytes = EXPERTS * 3 * HIDDEN * INNER * 2
    layers = max(4, round(gigabytes * 1e9 / layer_bytes))
    shards: list[dict[str, list[int]]] = [{} for _ in range(4)]
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        shards[layer * 4 // layers][f"{block}.gate.weight"] = [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            for name, shape in (
                ("w1", [INNER, HIDDEN]),
                ("w2", [HIDDEN, INNER]),
                ("w3", [INNER, HIDDEN]),
            ):
                shards[layer * 4 // layers][f"{block}.experts.{expert}.{name}.weight"] = shape
    folder.mkdir()
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-00004.safetensors"
        write_shard(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, layers)


def make_stacked(folder: Path, gigabytes: float) -> None:
    """One shard with one tensor that holds all down-projections of the only layer."""
    inner = round(gigabytes * 1e9 / (EXPERTS * HIDDEN * 2))
    folder.mkdir()
    shapes = {"model.layers.0.mlp.experts.down_proj": [EXPERTS, HIDDEN, inner]}
    write_shard(folder / "model.safetensors", shapes)
    write_config(folder, 1)


def write_config(folder: Path, layers: int) -> None:
    """As much of a Mixtral config as moescale reads."""
    config = {
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_local_experts": EXPERTS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_shard(path: Path, shapes: dict[str, list[int]]) -> None:
    """A shard of random bytes; bf16, exponents kept small so that nothing overflows."""
    import numpy as np

    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    generator = np.random.default_rng(list(path.name.encode()))  # no two files are alike
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while position:
            size = min(position, PIECE)
            block = generator.integers(0, 1 << 16, size // 2, dtype=np.uint16) & np.uint16(0xBFFF)
            file.write(memoryview(block).cast("B"))
            position -= size


def start_up() -> None:
    """Wall time of the smallest commands."""
    for option in ("--version", "--help"):
        command = [sys.executable, "-m", "moescale", option]
        seconds = [timed(command)[0] for _ in range(9)]
        print(
            f"moescale {option}: median {statistics.median(seconds):.3f} s of {len(seconds)} runs"
        )


def compare(source: Path, output: Path, label: str, pairs: int) -> None:
    """Run moescale, `cp -r`, and `cp -r` with a sync in turn; print medians and ratios."""
    size = sum(f.stat().st_size for f in source.iterdir())
    rewrite = [sys.executable, "-m", "moescale", str(source), str(output), "-k", "3", "-q"]
    copy = ["cp", "-r", str(source), str(output)]
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "moescale": lambda: timed(rewrite),
        "cp -r": lambda: timed(copy),
        "cp -r, synced": lambda: timed(["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', *copy[2:]]),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(pairs + 1):
        for name in names[number % 3 :] + names[: number % 3]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            time.sleep(SETTLE)
            result = runs[name]()
            if number:  # the first round warms the page cache
                results[name].append(result)
    shutil.rmtree(output, ignore_errors=True)
    print(f"\n{label}, {size / 1e9:.2f} GB, {pairs} runs each, in turn")
    ours = results["moescale"]
    for name, figures in results.items():
        seconds = [wall for wall, _ in figures]
        ratios = [a[0] / b[0] for a, b in zip(ours, figures, strict=True)]
        print(
            f"  {name:14} {min(seconds):6.2f} {statistics.median(seconds):6.2f}"
            f" {max(seconds):6.2f} s (min, median, max); peak"
            f" {max(memory for _, memory in figures):6.1f} MiB;"
            f" moescale / this: median {statistics.median(ratios):.2f}"
        )


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of a whole process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    message = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed: {message.decode()}")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return seconds, usage.ru_maxrss / unit


if __name__ == "__main__":
    main()
