"""What a plan costs as checkpoints grow: in proportion, and within the limits for the largest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import sparse_checkpoints as sparse

from moescale import api
from moescale.report import terminal

LARGE = sparse.qwen3(layers=65, experts=512, shards=200)
"""100,000 tensors of 209 GB, as many as DeepSeek-V3 has with its scales."""

MEASURED = """
import re, sys, time
from moescale import cli
try:
    cli.main()
finally:
    status = open("/proc/self/status").read()
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024
    print(time.process_time(), peak, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The large checkpoint, whose shards are a header and a hole."""
    return sparse.write(tmp_path_factory.mktemp("large") / "source", LARGE)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read in /proc")
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_large_checkpoint_is_planned_within_the_limits(large: Path, form: list[str]) -> None:
    """A dry run of 100,000 tensors in 200 shards takes less than 3 seconds and 100 MiB."""
    command = [sys.executable, "-c", MEASURED, str(large), "-k", "16", "--dry-run", *form]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if form:
        plan = json.loads(done.stdout)
        assert len(plan["tensors"]) == 65 * 512
        assert plan["bytes"]["read"] > 200e9
    else:
        assert "65 MoE layers of 512 routed experts" in done.stdout
    seconds, peak = map(float, done.stderr.split())
    assert seconds < 3  # of processor time, so that a busy machine makes no difference
    assert 20 < peak < 100


def cost(folder: Path) -> tuple[float, float]:
    """Processor seconds and peak bytes of a plan and its page, the least of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        terminal.plan_text(api.plan(folder, experts=16))
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    try:
        api.plan(folder, experts=16)
        return min(seconds), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_time_and_memory_grow_with_the_tensors(tmp_path: Path) -> None:
    """Eight times as many tensors, by layers or by experts, cost about eight times as much."""
    small = cost(sparse.write(tmp_path / "small", sparse.qwen3(8, 64, 4)))
    more_layers = cost(sparse.write(tmp_path / "layers", sparse.qwen3(64, 64, 32)))
    more_experts = cost(sparse.write(tmp_path / "experts", sparse.qwen3(8, 512, 4)))
    for seconds, memory in (more_layers, more_experts):
        assert seconds < 3 * 8 * small[0] + 0.1
        assert memory < 1.5 * 8 * small[1] + (1 << 20)
        assert memory < 1000 * 8 * 64 * 64 * 3
