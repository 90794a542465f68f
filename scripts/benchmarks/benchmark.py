#!/usr/bin/env python3
"""Measures moescale on this machine: time, peak memory and new blocks against others, start-up.

    cd scripts/benchmarks
    python benchmark.py                    # 3 GB in a temporary folder
    python benchmark.py --dir /mnt/disk --gigabytes 10 --pairs 9
    python benchmark.py --mergekit ENV/bin/mergekit-yaml --transformers ENV/bin/python
    python benchmark.py --planning         # dry runs of 200 GB to 1 TB, as sparse files
    python benchmark.py --running          # rules and losses that run the model, in torch

Needs moescale installed in the Python that runs it, and three times the size on the disk. The
page cache is warm; the runs of a round follow one another in changing order, so that a drifting
machine shows in all of them. `cp -r` does not wait for the disk; moescale does (every file is
synced before it gets its name), so a third row has `cp -r` followed by a sync of what it wrote.
What a plain `cp -r` leaves in memory shows with a model that fits there, less with a larger one.
mergekit 0.1.5 scales with `passthrough` and `scale`, transformers loads, scales and saves; both
need torch and live in environments of their own. Blocks that a file system shares between source
and output (XFS, btrfs) are not new.
"""

from __future__ import annotations

import argparse
import json
import math
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HIDDEN, INNER, EXPERTS, HEADS, VOCABULARY = 2048, 3584, 8, 16, 1024
NORMS = ("input", "post_attention")
SMALLEST = 1.4
PIECE = 16 << 20
SETTLE = 3.0
"""Seconds between runs: a removed file keeps a disk busy for a while after the sync."""


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


def gigabytes(text: str) -> float:
    """The size of the model; the smallest one has a layer in each of its 4 shards."""
    if (size := float(text)) < SMALLEST:
        raise argparse.ArgumentTypeError(f"is {text}: the smallest model has {SMALLEST}")
    return size


def in_child(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a new process, whose memory is not that of the measured ones."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
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
    """A complete Mixtral of random bf16 numbers in 4 shards of equal size."""
    layer_bytes = EXPERTS * 3 * HIDDEN * INNER * 2
    layers = max(4, round(gigabytes * 1e9 / layer_bytes))
    shards: list[dict[str, list[int]]] = [{} for _ in range(4)]
    for layer in range(layers):
        shards[layer * 4 // layers] |= layer_shapes(f"model.layers.{layer}")
    shards[0]["model.embed_tokens.weight"] = [VOCABULARY, HIDDEN]
    shards[-1] |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    folder.mkdir()
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-00004.safetensors"
        write_shard(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, layers)


def layer_shapes(layer: str) -> dict[str, list[int]]:
    """The tensors of one decoder layer."""
    shapes = {f"{layer}.self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
    shapes |= {f"{layer}.{name}_layernorm.weight": [HIDDEN] for name in NORMS}
    block = f"{layer}.block_sparse_moe"
    shapes[f"{block}.gate.weight"] = [EXPERTS, HIDDEN]
    for expert in range(EXPERTS):
        for name, shape in (
            ("w1", [INNER, HIDDEN]),
            ("w2", [HIDDEN, INNER]),
            ("w3", [INNER, HIDDEN]),
        ):
            shapes[f"{block}.experts.{expert}.{name}.weight"] = shape
    return shapes


def make_stacked(folder: Path, gigabytes: float) -> None:
    """One shard with one tensor that holds all down-projections of the only layer."""
    inner = round(gigabytes * 1e9 / (EXPERTS * HIDDEN * 2))
    folder.mkdir()
    shapes = {"model.layers.0.mlp.experts.down_proj": [EXPERTS, HIDDEN, inner]}
    write_shard(folder / "model.safetensors", shapes)
    write_config(folder, 1)


def write_config(folder: Path, layers: int) -> None:
    """The config of a Mixtral."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": "mixtral",
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "num_local_experts": EXPERTS,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
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


def other_tools(
    source: Path, output: Path, mergekit: str | None, transformers: str | None
) -> dict[str, list[str]]:
    """The commands that do the same with other tools, as far as they are there."""
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
    """One line of the table; the ratio is the median over the rounds."""
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
    """Run a command; how many bytes are less free afterwards than before, on its file system."""
    before = shutil.disk_usage(folder).used
    seconds, peak = timed(command)
    os.sync()
    return Run(seconds, peak, shutil.disk_usage(folder).used - before)


# Planning -----------------------------------------------------------------------------------------


class Size(NamedTuple):
    """How large a checkpoint is, in the layout of DeepSeek-V3: FP8 with a scale for each block."""

    layers: int
    dense: int
    experts: int
    hidden: int
    inner: int
    shards: int


SIZES = {
    "DeepSeek-V3": Size(61, 3, 256, 7168, 2048, 163),
    "Kimi-K2": Size(61, 1, 384, 7168, 2048, 62),
    "200 GB": Size(68, 3, 256, 4096, 1024, 200),
}
BLOCK = 128
"""Elements on a side of the square that shares a scale."""

Shape = tuple[str, str, list[int]]
"""Name, dtype and shape of a tensor."""


def measure_plans(root: Path, runs: int) -> None:
    """Dry runs of sparse checkpoints with many tensors; print medians of time, and peak memory."""
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


def timed_twice(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak MiB of a whole process."""
    before = os.times()
    wall, peak = timed(command)
    after = os.times()
    busy = after.children_user + after.children_system
    return wall, busy - before.children_user - before.children_system, peak


def make_sparse(folder: Path, size: Size) -> None:
    """Write config, index, and shards that are a header and a hole."""
    tensors = list(block_fp8(size))
    total, done = sum(map(nbytes, tensors)), 0
    shards: list[list[Shape]] = [[] for _ in range(size.shards)]
    for tensor in tensors:
        shards[done * size.shards // total].append(tensor)
        done += nbytes(tensor)
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{size.shards:06}.safetensors"
        write_hole(folder / name, shard)
        weight_map |= dict.fromkeys((tensor[0] for tensor in shard), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": size.layers,
        "n_routed_experts": size.experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "first_k_dense_replace": size.dense,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def block_fp8(size: Size) -> Iterator[Shape]:
    """Every tensor of the checkpoint, in the order of the shards."""

    def pair(name: str, rows: int, columns: int) -> Iterator[Shape]:
        yield f"{name}.weight", "F8_E4M3", [rows, columns]
        yield f"{name}.weight_scale_inv", "F32", [-(-rows // BLOCK), -(-columns // BLOCK)]

    def gated(name: str, inner: int) -> Iterator[Shape]:
        yield from pair(f"{name}.down_proj", size.hidden, inner)
        yield from pair(f"{name}.gate_proj", inner, size.hidden)
        yield from pair(f"{name}.up_proj", inner, size.hidden)

    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, size.hidden]
    for layer in range(size.layers):
        block = f"model.layers.{layer}"
        for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            yield from pair(f"{block}.self_attn.{part}", size.hidden, 1536)
        for norm in NORMS:
            yield f"{block}.{norm}_layernorm.weight", "BF16", [size.hidden]
        if layer < size.dense:
            yield from gated(f"{block}.mlp", 9 * size.inner)
            continue
        yield f"{block}.mlp.gate.weight", "BF16", [size.experts, size.hidden]
        yield from gated(f"{block}.mlp.shared_experts", size.inner)
        for expert in range(size.experts):
            yield from gated(f"{block}.mlp.experts.{expert}", size.inner)
    yield "lm_head.weight", "BF16", [VOCABULARY, size.hidden]


def nbytes(tensor: Shape) -> int:
    """Bytes of its data."""
    return {"F8_E4M3": 1, "BF16": 2, "F32": 4}[tensor[1]] * math.prod(tensor[2])


def write_hole(path: Path, tensors: list[Shape]) -> None:
    """Write a shard without its data, which take no room on the disk."""
    header, position = {}, 0
    for tensor in tensors:
        name, dtype, shape = tensor
        offsets = [position, position := position + nbytes(tensor)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


# Running ------------------------------------------------------------------------------------------

TOKENS = 2048
"""Bytes of a text to calibrate on, and of one to evaluate on; the model's tokens are bytes."""

ONCE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.tensor(list(open(sys.argv[2], "rb").read())).reshape(-1, 256)
with torch.no_grad():
    for rows in ids.split(4):
        model(input_ids=rows, labels=rows)
"""
"""Loads a model, and runs it once over a text."""


def measure_runs(root: Path, gigabytes: float) -> None:
    """Rules and losses that run a model of random weights, against loading and running it once."""
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


def make_for_torch(folder: Path, gigabytes: float) -> None:
    """A Mixtral of bytes with the weights that transformers begins a training with."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=round(gigabytes * 1e9 / (EXPERTS * 3 * HIDDEN * INNER * 2)),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        max_position_embeddings=256,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)


# Processes ----------------------------------------------------------------------------------------


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
