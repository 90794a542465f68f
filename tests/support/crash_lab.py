"""A warm process that runs conversions which fail at each call in turn, and checks what they leave.

Forked from a process that has imported everything, a run takes a few milliseconds. The process
reads one line of JSON for each task from stdin and answers with one line, a `Report`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints, quantised_checkpoints
from support.faulty_calls import CHANGING, KILLED, READING, SIZED, Calls, Fault, watch

Tree = Mapping[str, bytes]

DEADLY = frozenset({"before", "after", "cut", "names"})
"""Faults that a process does not survive; the others are tried in this process."""

SECONDS = 600
"""Seconds after which a run counts as hanging."""


def small_mixtral(folder: Path) -> None:
    """Write a Mixtral with three shards, an index, a card, and a file in a folder."""
    checkpoints.mixtral(folder, extras=False)
    checkpoints.write_files(folder, {"extra/a.txt": b"a\n", "README.md": b"# Tiny\n"})


def promoted(folder: Path) -> None:
    """Write a block FP8 checkpoint whose scales become F32, so that headers change."""
    cases = (case for case in quantised_checkpoints.EXACT if case.id == "block FP8, BF16 scales")
    quantised_checkpoints.write(next(cases), folder)


def split_gguf(folder: Path) -> None:
    """Write a GGUF model in four files; clients open the first."""
    from support.gguf_models import write_model

    folder.mkdir(parents=True)
    assert len(write_model(folder / "m.gguf", kind="Q4_0", split=3)) == 4


FIRST_PART = "m-00001-of-00004.gguf"

OLD = {
    "a_config.json": b"old",
    "config.json": b"{}",
    "extra/old.txt": b"old",
    "model-00001-of-00003.safetensors": b"old",
    "model.safetensors": b"old",
    "model.safetensors.index.json": b"{}",
    "sub/deep/old.bin": b"old",
    "z.txt": b"old",
}
"""Another model in the destination; it shares some file names with the new one."""


@dataclass(frozen=True)
class Scenario:
    """A source, the previous content of the destination, and the options of the conversion."""

    source: Callable[[Path], Any] = small_mixtral
    old: Tree = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()  # calls that this system does not have
    piece: int = 0  # write past the page cache, in pieces of this size
    prelude: Callable[[Lab], Any] = lambda lab: None  # what was done to the destination before
    opens: str = "config.json"  # the file that a client opens

    def convert(self, source: Path, output: Path) -> str:
        """Run the conversion to its end in this process."""
        from moescale.api import convert
        from moescale.storage.local import writer as local_writer

        with pytest.MonkeyPatch.context() as patch:
            if self.piece:
                patch.setattr(local_writer, "BUFFER", self.piece)
                patch.setattr(local_writer, "_BLOCK", self.piece // 4)
                patch.setattr(local_writer, "set_direct_io", lambda fd, on: on)
            return convert(source, output, jobs=1, **{"experts": 3, **self.options}).status


SCENARIOS: Mapping[str, Scenario] = {
    "new": Scenario(),
    "overwrite": Scenario(old=OLD, options={"overwrite": True}),
    "verify": Scenario(options={"verify": True}),
    "promoted headers": Scenario(source=promoted, options={"experts": 2}),
    "stacked": Scenario(source=checkpoints.fused_mixtral),
    "no kernel copies": Scenario(without=frozenset({"copy_file_range"})),
    "past the cache": Scenario(piece=256),
    "resumed": Scenario(prelude=lambda lab: lab.kill_another(45)),
    "verified later": Scenario(
        options={"verify": True}, prelude=lambda lab: lab.finish(verify=False)
    ),
    "over another run": Scenario(
        options={"overwrite": True}, prelude=lambda lab: lab.kill_another(60, experts=4)
    ),
    "gguf": Scenario(source=split_gguf, options={"rule": "preserve"}, opens=FIRST_PART),
    "gguf, added tensors": Scenario(
        source=split_gguf, options={"fold": "scale", "rule": "preserve"}, opens=FIRST_PART
    ),
    "gguf, verify": Scenario(
        source=split_gguf, options={"verify": True, "rule": "preserve"}, opens=FIRST_PART
    ),
    "gguf, overwrite": Scenario(
        source=split_gguf,
        options={"overwrite": True, "rule": "preserve"},
        prelude=lambda lab: lab.finish(experts=4),
        opens=FIRST_PART,
    ),
    "gguf, over another run": Scenario(
        source=split_gguf,
        options={"overwrite": True, "rule": "preserve"},
        prelude=lambda lab: lab.kill_another(40, experts=4),
        opens=FIRST_PART,
    ),
}


@dataclass(frozen=True)
class Mode:
    """A kind of fault and the calls that it can hit."""

    kind: str
    names: frozenset[str] = CHANGING
    code: int = errno.EIO
    lasting: bool = False


MODES: Mapping[str, Mode] = {
    "killed before": Mode("before"),
    "killed after": Mode("after"),
    "power cut": Mode("cut"),
    "power cut, except names": Mode("names"),
    "disk full": Mode("error", CHANGING, errno.ENOSPC),
    "disk full for good": Mode("error", CHANGING - {"unlink", "rmdir"}, errno.ENOSPC, True),
    "bad disk": Mode("error", CHANGING | READING),
    "bad disk for good": Mode("error", CHANGING | READING, lasting=True),
    "read-only for good": Mode("error", CHANGING, errno.EROFS, True),
    "interrupted call": Mode("error", CHANGING | READING, errno.EINTR),
    "failed though done": Mode("failed", CHANGING - {"open"}),
    "short": Mode("short", SIZED),
}


@dataclass
class Report:
    """The result of a task: calls that were hit, problems, and other observations."""

    points: int = 0
    problems: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


class Lab:
    """A folder with a source and, for each case, a destination."""

    def __init__(self, base: Path, name: str) -> None:
        self.scenario = SCENARIOS[name]
        self.place = base / name.replace(" ", "-")
        self.source, self.output = self.place / "source", self.place / "work" / "out"
        if not self.source.exists():
            self.scenario.source(self.source)
        self.whole = self._whole()
        self.stamps = self._stamps()
        self.old: Tree = {}

    def _whole(self) -> list[Tree]:
        """The trees that may load: the finished one, with digests or without, and the old one."""
        found = []
        for options in ({"verify": False}, self.scenario.options):
            shutil.rmtree(self.output.parent, ignore_errors=True)
            self.output.parent.mkdir(parents=True)
            self.finish(**options)
            found.append(checkpoints.tree(self.output))
        return found

    def finish(self, **options: Any) -> None:
        """Run the scenario to its end, with some other options."""
        wanted = {**self.scenario.options, **options}
        Scenario(options=wanted).convert(self.source, self.output)

    def kill_another(self, at: int, **options: Any) -> None:
        """Leave the files of a killed run, which may belong to another job."""
        wanted = Scenario(options={**self.scenario.options, **options})
        code, _ = self.run(Fault("before", CHANGING, at), wanted)
        assert code == KILLED

    def reset(self) -> None:
        """Restore the destination to its state at the start of a case."""
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir(parents=True)
        checkpoints.write_files(self.output, self.scenario.old)
        self.scenario.prelude(self)
        # Every time: the progress of a killed run depends on the order of its threads.
        self.old = visible(self.output)

    def _stamps(self) -> list[tuple[str, int, int, int]]:
        infos = [(path, path.stat()) for path in sorted(self.source.rglob("*"))]
        return [(str(path), i.st_ino, i.st_size, i.st_mtime_ns) for path, i in infos]

    # A case ---------------------------------------------------------------------------------------

    def run(self, fault: Fault, scenario: Scenario | None = None) -> tuple[int, str]:
        """Run a scenario with a fault; return its exit code and output."""
        scenario = scenario or self.scenario
        if fault.kind not in DEADLY:
            return self._attempt(Calls(self.place, fault), scenario)
        child = os.fork()
        if child == 0:
            code, calls = 8, Calls(self.place, fault)
            with contextlib.suppress(BaseException):
                code, _ = self._attempt(calls, scenario)
            with calls.turn:  # stays locked if another thread cuts the power
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ""

    def _attempt(self, calls: Calls, scenario: Scenario) -> tuple[int, str]:
        from moescale.errors import MoescaleError

        signal.alarm(SECONDS)
        calls.install(scenario.without)
        try:
            scenario.convert(self.source, self.output)
        except MoescaleError as error:
            return 1, str(error)
        except BaseException as error:
            return 7, f"{type(error).__name__}: {error}"
        finally:
            calls.remove()
            signal.alarm(0)
        return 0, ""

    def log(self) -> tuple[list[tuple[str, str]], list[str]]:
        """The calls of a run without a fault, and the calls that `Calls` does not see."""
        self.reset()
        calls = Calls(self.place, Fault())
        code, text = self._attempt(calls, self.scenario)
        assert code == 0, text
        return calls.log, calls.unseen

    def case(self, fault: Fault) -> tuple[str, list[str]]:
        """Run with a fault and then again; report everything that is wrong after either."""
        self.reset()
        files = open_files()
        code, text = self.run(fault)
        outcome = {0: "done", 1: "error", KILLED: "killed"}.get(code, f"{code}: {text}")
        problems = [] if code in (0, 1, KILLED) else [f"ended with {outcome}"]
        names = {self.source.name, self.output.name, str(self.place), *self.whole[-1]}
        if code == 1 and not is_useful(text, names):
            problems.append(f"an error that says too little: {text!r}")
        if open_files() != files:
            problems.append("files are left open")
        problems += self._mixed(code == 0)
        try:
            self.scenario.convert(self.source, self.output)
        except BaseException as error:
            problems.append(f"rerun: {type(error).__name__}: {error}")
        else:
            problems += self._not_whole("rerun")
        if self._stamps() != self.stamps:
            problems.append("the source was touched")
        return outcome, problems

    def _not_whole(self, when: str) -> Iterator[str]:
        found, wanted = checkpoints.tree(self.output), self.whole[-1]
        folders = {path.name for path in self.output.iterdir() if path.is_dir()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                yield f"{when}: {name} is not as in an uninterrupted run"
        if surplus := folders - {name.split("/")[0] for name in wanted}:
            yield f"{when}: the folder {surplus} is left"

    def _mixed(self, done: bool) -> Iterator[str]:
        """Yield the problems that must not exist at any moment."""
        found = visible(self.output)
        allowed = [*self.whole, self.old]
        if self.scenario.opens in found and found not in allowed:
            yield "it loads and is not whole"
        for name, data in found.items():
            if data not in [tree.get(name) for tree in allowed]:
                yield f"{name} is incomplete under its own name"
        known = {name: [tree.get(name) for tree in self.whole] for name in found}
        old = [name for name, data in found.items() if data not in known[name]]
        new = [n for n, d in found.items() if d in known[n] and d != self.old.get(n)]
        if new and old:
            yield f"old {old} beside new {new}"
        if done:
            yield from self._not_whole("at once")


def open_files() -> int:
    """The number of files that this process has open, if the system tells."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def visible(output: Path) -> Tree:
    """The files of a destination, without the state of an unfinished run."""
    found = checkpoints.tree(output) if output.exists() else {}
    hidden = re.compile(r"\.(?:.+\.)?moescale/")
    return {name: data for name, data in found.items() if not hidden.match(name)}


def is_useful(text: str, names: Iterable[str]) -> bool:
    """Whether an error has one or two lines and names the object and the reason."""
    lines = text.splitlines()
    return 1 <= len(lines) <= 2 and any(name in lines[0] for name in names) and "None" not in text


def matrix(base: Path, scenario: str, mode: str, step: int = 1) -> Report:
    """Try a kind of fault at every `step`-th call that it can hit."""
    lab, kind = Lab(base, scenario), MODES[mode]
    log, unseen = lab.log()
    hit = [call for call in log if call[0] in kind.names]
    report = Report(unseen=unseen)
    for at in range(0, len(hit), step):
        fault = Fault(kind.kind, kind.names, at, kind.code, kind.lasting)
        outcome, problems = lab.case(fault)
        report.points += 1
        report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
        name, path = hit[at]
        where = f"{mode} at {name} number {at} of {os.path.relpath(path, lab.place)}"
        report.problems += [f"{where}: {problem}" for problem in problems]
    return report


CHANGES: Mapping[str, Callable[[Path, bytes], Any]] = {
    "shrinks": lambda path, data: os.truncate(path, len(data) // 2),
    "grows": lambda path, data: path.write_bytes(data + b" "),
    "is rewritten": lambda path, data: path.write_bytes(data[::-1]),
    "is replaced": lambda path, data: (path.unlink(), path.write_bytes(data[::-1])),
}


def changed_source(base: Path, name: str, change: str, step: int) -> Report:
    """Change a file of the source at every `step`-th call of a run."""
    lab, report = Lab(base, "new"), Report()
    path = lab.source / name
    data, act = path.read_bytes(), CHANGES[change]
    log, _ = lab.log()
    planned = log.index(("scandir", str(lab.source)))  # before, a change makes another source
    for at in range(planned + 1, len(log), step):
        lab.reset()
        fault = Fault("act", CHANGING | READING, at, act=lambda: act(path, data))
        code, text = lab.run(fault)
        found = visible(lab.output)
        outcome = {0: "done", 1: "error"}.get(code, f"{code}: {text}")
        if code not in (0, 1) or (code == 1 and not is_useful(text, {name, lab.source.name})):
            report.problems.append(f"call {at}: ended with {outcome}: {text}")
        if (code == 0 or "config.json" in found) and found not in lab.whole:
            report.problems.append(f"call {at}: an output of a source that there never was")
        report.points += 1
        report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
        path.write_bytes(data)
        with contextlib.suppress(Exception):  # a run that continues when it must not
            lab.finish()
            if visible(lab.output) not in lab.whole:
                report.problems.append(f"call {at}: a rerun went on with another source")
    return report


def serve() -> None:
    """Answer tasks until the input ends."""
    from moescale import api  # noqa: F401 - warm before the first fork
    from moescale.conversion import verify as verification  # noqa: F401 - likewise

    watch()
    for line in sys.stdin:
        task = json.loads(line)
        do = changed_source if "change" in task else matrix
        print(json.dumps(asdict(do(Path(task.pop("base")), **task))), flush=True)


if __name__ == "__main__":
    serve()
