#!/usr/bin/env python3
"""Measures memory and traffic of moescale with a loopback Hub on this machine.

    PYTHON=.venv-test/bin/python
    $PYTHON scripts/benchmarks/hub_benchmark.py                # 1.4 GB in a temporary folder
    $PYTHON scripts/benchmarks/hub_benchmark.py --dir /mnt/disk --gigabytes 5
    $PYTHON scripts/benchmarks/hub_benchmark.py --runs 10      # min, median and max of each row

`scripts/test.sh` installs what it needs into `.venv-test`. The disk needs about four times the size
of the model. The Hub of the tests runs in a process of its own, so that only moescale's memory
counts. Each run has an empty HF_HOME, as on a new machine. Bytes are those of request and response
bodies. With xet the storage is a `local://` folder that hf_xet fills in its own process, and the
bytes sent are those that it reports; "xet over HTTP" sends the same to a server that counts them.
The exit code is 1 if a memory limit is exceeded or an output differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import SMALLEST, gigabytes, make_mixtral
from machine import describe_machine, in_child

TESTS = Path(__file__).resolve().parents[2] / "tests"
SRC, DST = "lab/model", "me/out"
PLACE, WORKING = f"hf://{DST}", "moescale-unfinished-main"
TO_DISK, TO_HUB = 150, 400
"""Memory limits in MiB."""

SENT = re.compile(r"([\d.]+ \w?B) of weights sent, ([\d.]+ \w?B) were already on the Hub")
HEADINGS = ("run", "seconds", "peak MiB", "limit", "received", "sent", "weights sent", "known")
SUMMARY = "{:34} {:>5} {:>8} {:>7} {:>7} {:>9}"
ROW = "{:34} {:>8} {:>9} {:>6} {:>14} {:>14} {:>14} {:>14}"


@dataclass(frozen=True)
class Figures:
    """The cost of one run: bytes as the Hub counts them, weights as the command reports them."""

    name: str
    seconds: float
    peak: float
    limit: int | None
    received: int
    sent: int
    weights: str
    known: str

    def __str__(self) -> str:
        counts = (f"{self.received:,}", f"{self.sent:,}", self.weights, self.known)
        return ROW.format(
            self.name, f"{self.seconds:.1f}", f"{self.peak:.0f}", self.limit or "", *counts
        )


def main() -> None:
    """Make the model, do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=gigabytes, default=SMALLEST)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="moescale-bench-") as folder:
        benchmark = Benchmark(Path(folder), arguments.gigabytes)
        print(f"{benchmark.size:,} bytes in {benchmark.shards} shards", end="\n\n", flush=True)
        print(ROW.format(*HEADINGS))
        for _ in range(arguments.runs):
            for case in (
                benchmark.to_disk,
                benchmark.all_new,
                benchmark.known,
                benchmark.over_http,
                benchmark.no_xet,
            ):
                case()
            benchmark.by_hand()
        if arguments.runs > 1:
            benchmark.summarise()
    sys.exit("\n".join(benchmark.complaints) or 0)


class Hub:
    """The loopback Hub in a process of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the Hub."""
        self._pipe.send((name, arguments))
        return self._pipe.recv()


@contextmanager
def hub(root: Path, model: Path, xet: bool | str) -> Iterator[Hub]:
    """Start a Hub with the model as `SRC`; remove its files afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, root, model, xet))
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        yield Hub(ours)
    finally:
        ours.close()
        process.join()
        shutil.rmtree(root)


def serve(pipe: Connection, root: Path, model: Path, xet: bool | str) -> None:
    """Serve as the Hub until the other end of the pipe is closed."""
    sys.path.insert(0, str(TESTS))
    from support import hub_server

    def digests() -> dict[str, str]:
        return {name: blob.sha256 for name, blob in hub.files(DST).items()}

    def finished() -> int:
        """Count the shards that a rerun would skip."""
        if not hub.has(DST) or WORKING not in hub.branches(DST):
            return 0
        return sum(name.endswith(".safetensors") for name in hub.files(DST, WORKING))

    with hub_server.Hub(root, xet=xet) as hub:
        hub.add_repo(SRC, {path.name: path for path in model.iterdir()})
        answers: dict[str, Callable[..., Any]] = {
            "env": hub.env,
            "traffic": hub.traffic,
            "digests": digests,
            "finished": finished,
            "forget": hub.log.clear,
        }
        pipe.send("ready")
        try:
            while True:
                name, arguments = pipe.recv()
                pipe.send(answers[name](*arguments))
        except EOFError:
            return


class Benchmark:
    """The model and the runs on it."""

    def __init__(self, root: Path, gigabytes: float) -> None:
        self.root, self.model, self.output = root, root / "model", root / "output"
        in_child(make_mixtral, self.model, gigabytes)
        weights = list(self.model.glob("*.safetensors"))
        self.shards, self.size = len(weights), sum(path.stat().st_size for path in weights)
        self.digests: dict[str, str] = {}
        self.complaints: list[str] = []
        self.figures: dict[str, list[Figures]] = {}
        self._homes = 0

    def hub(self, xet: bool | str) -> Any:
        """A new Hub."""
        return hub(self.root / "hub", self.model, xet)

    def to_disk(self) -> None:
        """Measure a dry run, and a run to disk whose digests all other outputs must have."""
        with self.hub(False) as server:
            self.measure(server, "dry run", TO_DISK, SRC, "--dry-run")
            self.measure(server, "Hub to disk", TO_DISK, SRC, str(self.output))
        counts = json.loads((self.output / "moescale.json").read_bytes())["counts"]
        print(f"  {counts['bytes_changed']:,} bytes are rescaled, the rest stays")
        for path in self.output.glob("*.safetensors"):
            with path.open("rb") as file:
                self.digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        shutil.rmtree(self.output)

    def all_new(self) -> None:
        """Measure Hub to Hub with an empty storage; again, killed at half and resumed."""
        with self.hub(True) as server:
            self.measure(server, "Hub to Hub, xet, all bytes new", TO_HUB, SRC, PLACE)
            self.check(server)
        with self.hub(True) as server:
            half = self.shards // 2
            self.measure(server, "  killed at half of the shards", TO_HUB, SRC, PLACE, stop=half)
            self.measure(server, "  resumed on another machine", TO_HUB, SRC, PLACE)
            self.check(server)

    def known(self) -> None:
        """Measure Hub to Hub with the source in the storage, as on the real Hub."""
        with self.hub(True) as server:
            self.upload_source(server)
            self.measure(server, "Hub to Hub, xet, source known", TO_HUB, SRC, PLACE)
            self.check(server)

    def over_http(self) -> None:
        """Measure the same with a storage that counts the bytes that arrive."""
        with self.hub("http") as server:
            self.upload_source(server)
            self.measure(server, "  the same, xet over HTTP", TO_HUB, SRC, PLACE)
            self.check(server)

    def no_xet(self) -> None:
        """Measure Hub to Hub through a temporary file."""
        with self.hub(False) as server:
            self.measure(server, "Hub to Hub, without xet", TO_HUB, SRC, PLACE)
            self.check(server)

    def by_hand(self) -> None:
        """Measure download, conversion and upload, which one run from Hub to Hub replaces."""
        source = self.root / "download"
        with self.hub(True) as server:
            self.upload_source(server)
            steps = {
                "By hand: hf download": [*HF, "download", SRC, "--local-dir", str(source)],
                "  convert": [*MOESCALE, str(source), str(self.output), "-k", "3"],
                "  hf upload": [*HF, "upload", DST, str(self.output)],
            }
            for name, command in steps.items():
                self.measure_command(server, name, None, command)  # no limit for other programs
        for folder in (source, self.output):
            shutil.rmtree(folder)

    def summarise(self) -> None:
        """Print a summary of each row over all runs."""
        print("\n" + SUMMARY.format("row", "runs", "MiB min", "median", "max", "median s"))
        for name, rows in self.figures.items():
            peaks = [f"{pick(row.peak for row in rows):.0f}" for pick in (min, median, max)]
            seconds = f"{median(row.seconds for row in rows):.1f}"
            print(SUMMARY.format(name, len(rows), *peaks, seconds))

    def upload_source(self, server: Hub) -> None:
        """Upload the source, so that the storage knows its content."""
        command = [*HF, "upload", "me/base", str(self.model)]
        environment = self.machine(server)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr}")

    def machine(self, server: Hub) -> dict[str, str]:
        """The environment of a machine with an empty cache."""
        self._homes += 1
        environment: dict[str, str] = server.ask("env", self.root / f"home-{self._homes}")
        return environment

    def measure(
        self, server: Hub, name: str, limit: int, *arguments: str, stop: int | None = None
    ) -> None:
        """Run moescale and print its figures; kill it once `stop` shards are finished."""
        self.measure_command(server, name, limit, [*MOESCALE, *arguments, "-k", "3"], stop)

    def measure_command(
        self, server: Hub, name: str, limit: int | None, command: list[str], stop: int | None = None
    ) -> None:
        """Do the same with any command."""
        server.ask("forget")
        environment, start = self.machine(server), time.perf_counter()
        if "download" in command:  # the Hub of the tests cannot send xet
            environment["HF_HUB_DISABLE_XET"] = "1"
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=said
            )
            while stop is not None and server.ask("finished") < stop:
                time.sleep(0.02)
            if stop is not None:
                child.send_signal(signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read()
        if child.returncode != (0 if stop is None else -signal.SIGKILL):
            sys.exit(f"{' '.join(command)} failed: {text}")
        peak = usage.ru_maxrss / ((1 << 20) if sys.platform == "darwin" else (1 << 10))
        sent, received = server.ask("traffic")
        figures = Figures(name, seconds, peak, limit, received, sent, *weights_sent(text))
        print(figures, flush=True)
        self.figures.setdefault(name, []).append(figures)
        if limit is not None and peak > limit:
            self.complaints.append(f"{name.strip()}: {peak:.0f} MiB are more than {limit}")

    def check(self, server: Hub) -> None:
        """Compare the digests on the Hub with those on disk."""
        found = server.ask("digests")
        if {name: found.get(name) for name in self.digests} != self.digests:
            self.complaints.append("an output on the Hub differs from that on disk")


MOESCALE = [sys.executable, "-m", "moescale"]
HF = [sys.executable, "-m", "huggingface_hub.cli.hf"]


def weights_sent(text: str) -> tuple[str, str]:
    """What the command reports: bytes that it sent, and bytes that were already on the Hub."""
    found = SENT.search(text)
    return (found[1], found[2]) if found else ("", "")


if __name__ == "__main__":
    main()
