#!/usr/bin/env python3
"""Measures time, peak memory, new blocks and start-up of moescale, against other tools.

    cd scripts/benchmarks
    python benchmark.py                    # 3 GB in a temporary folder
    python benchmark.py --dir /mnt/disk --gigabytes 10 --pairs 9
    python benchmark.py --mergekit ENV/bin/mergekit-yaml --transformers ENV/bin/python
    python benchmark.py --planning         # dry runs of 200 GB to 1 TB, as sparse files
    python benchmark.py --running          # rules and losses that run the model, in torch

The Python that runs it needs moescale; the disk needs three times the size. The page cache is warm.
The commands of a round take turns in changing order, so that a drifting machine affects all of
them. moescale syncs every file before it gets its name, and `cp -r` does not wait for the disk, so
a third row has `cp -r` followed by a sync. How much a plain `cp -r` leaves in memory depends on
whether the model fits there. mergekit 0.1.5 scales with `passthrough` and `scale`; transformers
loads, scales and saves. Both need torch, and environments of their own. Blocks that a file system
shares between source and output (XFS, Btrfs) do not count as new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from checkpoints import (
    SIZES,
    block_fp8,
    gigabytes,
    make_for_torch,
    make_mixtral,
    make_sparse,
    make_stacked,
    nbytes,
)
from machine import describe_machine, file_system, in_child, timed, timed_twice

SETTLE = 3.0
"""Seconds between runs, since a removed file keeps the disk busy even after a sync."""


def main() -> None:
    """Make the models, run the pairs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=gigabytes, default=3.0)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--mergekit", metavar="PROGRAM", help="compare with this mergekit-yaml")
    parser.add_argument("--transformers", metavar="PYTHON", help="compare with its transformers")
    parser.add_argument("--planning", action="store_true", help="measure dry runs only")
    parser.add_argument("--running", action="store_true", help="measure what runs the model only")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="moescale-bench-") as folder:
        root = Path(folder)
        print(f"{describe_machine()}; {file_system(root)}")
        if arguments.planning:
            measure_plans(root, arguments.pairs)
            return
        if arguments.running:
            measure_runs(root, arguments.gigabytes)
            return
        many, stacked = root / "many", root / "stacked"
        in_child(make_mixtral, many, arguments.gigabytes)
        in_child(make_stacked, stacked, arguments.gigabytes / 2)
        start_up()
        output = root / "output"
        others = other_tools(many, output, arguments.mergekit, arguments.transformers)
        compare(many, output, "4 shards", arguments.pairs, others)
        compare(stacked, output, "one stacked tensor", arguments.pairs, {})


def start_up() -> None:
    """Print the wall time of the smallest commands."""
    for option in ("--version", "--help"):
        command = [sys.executable, "-m", "moescale", option]
        seconds = [timed(command)[0] for _ in range(9)]
        print(
            f"moescale {option}: median {statistics.median(seconds):.3f} s of {len(seconds)} runs"
        )


def other_tools(
    source: Path, output: Path, mergekit: str | None, transformers: str | None
) -> dict[str, list[str]]:
    """The commands that do the same with the other tools that were given."""
    commands = {}
    if mergekit is not None:
        recipe = output.parent / "mergekit.yml"
        layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
        recipe.write_text(MERGEKIT.format(source=source, layers=layers))
        commands["mergekit"] = [mergekit, str(recipe), str(output), "--copy-tokenizer"]
    if transformers is not None:
        script = output.parent / "transformers_scale.py"
        script.write_text(TRANSFORMERS)
        commands["transformers"] = [transformers, str(script), str(source), str(output)]
    return commands


MERGEKIT = """\
merge_method: passthrough
dtype: bfloat16
slices:
- sources:
  - model: {source}
    layer_range: [0, {layers}]
    parameters:
      scale:
      - filter: w2
        value: 1.224744871391589
      - value: 1.0
"""
TRANSFORMERS = """\
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.mul_(1.224744871391589)
model.config.num_experts_per_tok = 3
model.save_pretrained(sys.argv[2])
"""


def compare(
    source: Path, output: Path, label: str, pairs: int, others: dict[str, list[str]]
) -> None:
    """Run moescale, `cp -r`, `cp -r` with a sync, and others in turn; print a table of medians."""
    size = sum(f.stat().st_size for f in source.iterdir())
    copy = ["cp", "-r", str(source), str(output)]
    commands = {
        "moescale": [
            *(sys.executable, "-m", "moescale", str(source), str(output), "-k", "3", "-q")
        ],
        "cp -r": copy,
        "cp -r, synced": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', *copy[2:]],
        **others,
    }
    results: dict[str, list[Run]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(pairs + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            time.sleep(SETTLE)
            result = measured(commands[name], output.parent)
            if number:  # the first round warms the page cache
                results[name].append(result)
    shutil.rmtree(output, ignore_errors=True)
    print(f"\n{label}, {size / 1e9:.2f} GB, {pairs} runs each, in turn\n")
    print("| | min, median, max s | time against moescale's | peak MiB | new MB on the disk |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        print(row(name, runs, results["moescale"]))


class Run(NamedTuple):
    """What one run of a command took."""

    seconds: float
    peak_mib: float
    new_bytes: int


def row(name: str, runs: list[Run], ours: list[Run]) -> str:
    """One line of the table; the ratio is the median of the rounds."""
    seconds = sorted(run.seconds for run in runs)
    ratio = statistics.median(
        one.seconds / own.seconds for one, own in zip(runs, ours, strict=True)
    )
    return (
        f"| {name} | {seconds[0]:.2f}, {statistics.median(seconds):.2f}, {seconds[-1]:.2f}"
        f" | {ratio:.2f} | {max(run.peak_mib for run in runs):.0f}"
        f" | {statistics.median(run.new_bytes for run in runs) / 1e6:,.0f} |"
    )


def measured(command: list[str], folder: Path) -> Run:
    """Run a command, and count the bytes that it took on its file system."""
    before = shutil.disk_usage(folder).used
    seconds, peak = timed(command)
    os.sync()
    return Run(seconds, peak, shutil.disk_usage(folder).used - before)


# Planning -----------------------------------------------------------------------------------------


def measure_plans(root: Path, runs: int) -> None:
    """Print median time and memory of dry runs on sparse checkpoints with many tensors."""
    print("\n| dry run | tensors | shards | GB | wall s | processor s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        folder = root / name.replace(" ", "-")
        in_child(make_sparse, folder, size)
        tensors = sum(1 for _ in block_fp8(size))
        gigabytes = sum(map(nbytes, block_fp8(size))) / 1e9
        for option in ([], ["--json"]):
            command = [sys.executable, "-m", "moescale", str(folder), "-k", "16", "--dry-run"]
            figures = [timed_twice([*command, *option]) for _ in range(runs)]
            wall, busy, peak = (statistics.median(f) for f in zip(*figures, strict=True))
            label = " ".join([name, *option])
            print(
                f"| {label} | {tensors:,} | {size.shards} | {gigabytes:,.0f} | {wall:.2f}"
                f" | {busy:.2f} | {peak:.0f} |"
            )


# Running ------------------------------------------------------------------------------------------

TOKENS = 2048
"""Length of the texts to calibrate and to evaluate on; the model's tokens are bytes."""

ONCE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.tensor(list(open(sys.argv[2], "rb").read())).reshape(-1, 256)
with torch.no_grad():
    for rows in ids.split(4):
        model(input_ids=rows, labels=rows)
"""
"""Loads a model and runs it once over a text."""


def measure_runs(root: Path, gigabytes: float) -> None:
    """Compare rules and losses that run a model with loading it and running it once."""
    source = root / "source"
    in_child(make_for_torch, source, gigabytes)
    files = [root / name for name in ("calibrate.bin", "evaluate.bin")]
    for file, first in zip(files, (0, 7), strict=True):
        file.write_bytes(bytes((first + i * i // 3) % 256 for i in range(TOKENS)))
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    half = ["--max-memory", str(size // 2)]
    fit = ["--rule", "fitted", "--calibrate", str(files[0])]
    loss = ["--evaluate", str(files[1])]
    rows = {
        "transformers: load, and run once": [],
        "--rule measured": ["--rule", "measured", "--calibrate", str(files[0])],
        "--rule fitted": fit,
        "--rule gates --evaluate": ["--rule", "gates", *loss],
        "--rule fitted --evaluate": [*fit, *loss],
        "--rule fitted, half of the model on disk": [*fit, *half],
    }
    print(f"\n{size / 1e9:.2f} GB; {TOKENS:,} tokens to calibrate on, as many to evaluate on")
    print("\n| | s | peak MiB |\n|---|---|---|")
    for name, options in rows.items():
        command = [sys.executable, "-c", ONCE, str(source), str(files[0])]
        if options:
            command = [sys.executable, "-m", "moescale", str(source), "-k", "3", "--dry-run"]
        seconds, peak = timed([*command, *options])
        print(f"| {name} | {seconds:.1f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
