"""Whichever call fails, falls short or is the last: no partial output, and a rerun resumes.

Every run is repeated with a fault at a different call each time. The runs and the checks are in
`crash_lab`; ``MOESCALE_EVERY_CRASH=1`` includes every call of every scenario.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import TESTS, checkpoints, environment
from support.crash_lab import small_mixtral

from moescale.api import convert

RESUMES = "moescale: interrupted; the same command resumes\n"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A folder in memory if there is one: no test here has to wait for a disk."""
    memory = Path("/dev/shm")
    place = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    os.chmod(place, 0o755)
    yield Path(place)
    shutil.rmtree(place)


Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(base: Path) -> Iterator[Ask]:
    """Have the warm process run a task."""
    command = [sys.executable, "-m", "support.crash_lab"]
    env = environment(OPENBLAS_NUM_THREADS="1")
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    assert child.stdin is not None
    assert child.stdout is not None

    def ask(**task: Any) -> dict[str, Any]:
        print(json.dumps({"base": str(base), **task}), file=child.stdin, flush=True)
        return dict(json.loads(child.stdout.readline()))

    yield ask
    child.stdin.close()
    child.wait()
    child.stdout.close()


# Every call ---------------------------------------------------------------------------------------

MATRIX: tuple[tuple[str, str, int, int], ...] = (
    ("new", "killed before", 4, 25),
    ("new", "killed after", 1, 100),
    ("new", "power cut", 1, 100),
    ("new", "power cut, except names", 4, 25),
    ("new", "disk full", 1, 100),
    ("new", "disk full for good", 4, 20),
    ("new", "bad disk", 3, 90),
    ("new", "bad disk for good", 9, 30),
    ("new", "read-only for good", 4, 25),
    ("new", "interrupted call", 6, 40),
    ("new", "failed though done", 1, 60),
    ("new", "short", 1, 40),
    ("overwrite", "killed after", 2, 60),
    ("overwrite", "power cut", 3, 40),
    ("overwrite", "disk full", 3, 30),
    ("overwrite", "failed though done", 3, 25),
    ("over another run", "killed after", 7, 15),
    ("verify", "killed after", 4, 30),
    ("verify", "bad disk", 9, 40),
    ("verified later", "killed after", 1, 30),
    ("verified later", "power cut", 1, 30),
    ("verified later", "disk full", 2, 15),
    ("promoted headers", "killed after", 4, 25),
    ("promoted headers", "short", 1, 40),
    ("stacked", "killed after", 2, 25),
    ("stacked", "power cut", 4, 10),
    ("no kernel copies", "killed after", 4, 20),
    ("no kernel copies", "short", 1, 40),
    ("past the cache", "killed after", 2, 30),
    ("past the cache", "power cut", 4, 20),
    ("past the cache", "disk full", 1, 60),
    ("past the cache", "bad disk", 5, 30),
    ("past the cache", "interrupted call", 6, 20),
    ("past the cache", "failed though done", 2, 30),
    ("past the cache", "short", 1, 40),
    ("resumed", "killed after", 4, 20),
    ("resumed", "power cut", 7, 10),
    ("gguf", "killed after", 1, 60),
    ("gguf", "power cut", 2, 30),
    ("gguf", "disk full", 3, 20),
    ("gguf", "bad disk", 7, 10),
    ("gguf", "short", 2, 5),
    ("gguf, added tensors", "killed after", 4, 15),
    ("gguf, verify", "killed after", 5, 8),
    ("gguf, overwrite", "killed after", 2, 30),
    ("gguf, overwrite", "power cut", 4, 15),
    ("gguf, over another run", "killed after", 5, 8),
)
"""Scenario, fault, step between the calls that are hit, and the fewest points expected.

Being killed before a call leaves the same files as being killed after the previous one. A sample of
one is enough if the other is tried at every call.
"""


@pytest.mark.parametrize(("scenario", "mode", "step", "least"), MATRIX)
def test_any_call_may_be_hit(ask: Ask, scenario: str, mode: str, step: int, least: int) -> None:
    """Nothing loads before it is complete, no content mixes, and a rerun gives the same bytes."""
    step = 1 if os.environ.get("MOESCALE_EVERY_CRASH") else step
    report = ask(scenario=scenario, mode=mode, step=step)
    print(f"{report['points']} points: {report['outcomes']}")
    assert report["unseen"] == [], "calls that no fault can hit"
    assert report["problems"] == []
    assert report["points"] >= least


def test_nothing_listens_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an audit hook, threads that coverage traces fail to start before Python 3.12."""
    hooks: list[object] = []
    monkeypatch.setattr(sys, "addaudithook", hooks.append)
    for name in ("faulty_calls", "crash_lab"):
        runpy.run_path(str(TESTS / "support" / f"{name}.py"))
    assert hooks == []


# A real process -----------------------------------------------------------------------------------

PAUSED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support import signals
from support.faulty_calls import CHANGING, Calls, Fault
from moescale import interrupts
told = signals.told()
interrupts.install_handlers()
at, marker, folder = int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
def stand():
    marker.touch()
    told.wait(100)
    time.sleep(0.2)
Calls(folder, Fault("act", CHANGING, at, act=stand)).install()
sys.argv[:5] = ["moescale"]
from moescale.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def whole(base: Path) -> dict[str, bytes]:
    """The output of an uninterrupted run."""
    small_mixtral(base / "real" / "source")
    convert(base / "real" / "source", base / "real" / "whole", experts=3)
    return checkpoints.tree(base / "real" / "whole")


def paused(base: Path, at: int) -> tuple[subprocess.Popen[str], Path]:
    """The real command, which waits at a call until a signal comes, and its destination."""
    place, output = base / "real", base / "real" / f"out{at}"
    shutil.rmtree(output, ignore_errors=True)
    marker = base / f"marker{at}"
    marker.unlink(missing_ok=True)
    command = [sys.executable, "-c", PAUSED, TESTS, str(at), marker, place]
    command += [place / "source", output, "-k", "3", "-q", "-j", "1"]
    pipe, traced = subprocess.PIPE, {**os.environ, "PYTHONFAULTHANDLER": "1"}
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=traced)
    while not marker.exists() and child.poll() is None:
        time.sleep(0.005)
    assert marker.exists(), child.communicate()
    return child, output


def check_resumed(base: Path, output: Path, whole: dict[str, bytes]) -> None:
    """Assert that nothing loads, and that the same run then writes the complete output."""
    found = {n: d for n, d in checkpoints.tree(output).items() if not n.startswith(".moescale/")}
    assert "config.json" not in found or found == whole
    assert convert(base / "real" / "source", output, experts=3).status in ("new", "resume")
    assert checkpoints.tree(output) == whole
    assert not (output / ".moescale").exists()


@pytest.mark.parametrize("at", [8, 20, 35, 50, 65, 80, 95, 100, 108])
def test_a_run_that_is_killed(base: Path, whole: dict[str, bytes], at: int) -> None:
    """SIGKILL of the real command at one of its calls."""
    child, output = paused(base, at)
    child.kill()
    child.communicate()
    check_resumed(base, output, whole)


@pytest.mark.parametrize(
    ("at", "signals"),
    [
        (3, [signal.SIGINT]),
        (30, [signal.SIGTERM]),
        (40, [signal.SIGINT, signal.SIGINT]),
        (55, [signal.SIGTERM, signal.SIGTERM]),
        (70, [signal.SIGINT] * 20),
        (100, [signal.SIGINT]),
        (108, [signal.SIGTERM, signal.SIGINT]),
    ],
)
def test_a_run_that_is_interrupted(
    base: Path, whole: dict[str, bytes], at: int, signals: list[signal.Signals]
) -> None:
    """Exit code 130 and a line or two in every phase, even if interrupted twice; resumable."""
    child, output = paused(base, at)
    for number in signals:
        child.send_signal(number)
        time.sleep(0.01)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (130, ""), err
    assert err.startswith(RESUMES)
    assert len(err.splitlines()) <= 2  # the second message says what has to be done again
    check_resumed(base, output, whole)


def test_an_interrupt_while_a_thread_is_being_started() -> None:
    """The library's lock for new threads is locked at that point; the program still ends."""
    code = (
        "import os, signal, threading, time\n"
        "from moescale import interrupts\n"
        "interrupts.install_handlers()\n"
        "try:\n"
        "    with threading._active_limbo_lock:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(300)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(300)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, RESUMES)


def test_an_interrupt_while_the_program_starts(base: Path, whole: dict[str, bytes]) -> None:
    """The signal comes during imports: one line, no traceback."""
    code = (
        "import sys, os, signal, moescale\n"
        "class Find:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Find())\n"
        "from moescale.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, base / "real" / "source", base / "none", "-k", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", RESUMES)
    assert not (base / "none").exists()


STORM = """
import signal, sys
from moescale.api import convert
hits = []
signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
convert(sys.argv[1], sys.argv[2], experts=3, jobs=2, verify=True)
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(hits) > 10, hits
"""


def test_a_storm_of_signals_changes_nothing(base: Path) -> None:
    """Calls that are really interrupted, some halfway, continue at the right offset."""
    tensors = checkpoints.fused_mixtral_tensors()
    big = {"big": ("U8", (24 << 20,), os.urandom(1 << 20) * 24)}
    checkpoints.write_shards(base / "big", {**big, **tensors}, 2)
    (base / "big" / "config.json").write_text(checkpoints.MIXTRAL_CONFIG)
    for name, code in (("storm", STORM), ("calm", STORM.replace("0.0005, 0.0005", "0"))):
        code = code if name == "storm" else code.replace("> 10", "== 0")
        command = [sys.executable, "-c", code, base / "big", base / name]
        assert subprocess.run(command, check=False).returncode == 0
    assert checkpoints.tree(base / "storm") == checkpoints.tree(base / "calm")
    for name in ("big", "storm", "calm"):
        shutil.rmtree(base / name)


# A source that changes ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shrinks", "grows", "is rewritten", "is replaced"])
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "README.md"])
def test_a_source_that_changes_at_any_moment(ask: Ask, name: str, change: str) -> None:
    """The output is that of the source as planned, or there is an error and no output."""
    step = 1 if os.environ.get("MOESCALE_EVERY_CRASH") else 13
    report = ask(change=change, name=name, step=step)
    print(f"{report['points']} points: {report['outcomes']}")
    assert report["problems"] == []
    assert report["points"] >= 25
    assert {"done", "error"} <= report["outcomes"].keys()


# A destination that is not writable ---------------------------------------------------------------

NOBODY = """
import os, sys
from moescale import api
from moescale.errors import DestinationError
source, warm, output = sys.argv[1:]
api.convert(source, warm, experts=3)
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    api.convert(source, output, experts=3, overwrite=True)
except DestinationError as error:
    assert "cannot be written to: Permission denied" in str(error), str(error)
    assert error.hint
else:
    raise AssertionError("written")
"""


@pytest.mark.parametrize("what", ["nothing", "a model", "a finished output"])
def test_a_read_only_destination(base: Path, whole: dict[str, bytes], what: str) -> None:
    """One line says so before anything is written or removed; existing files stay."""
    output = base / "read-only"
    content = {"config.json": b"{}", "x.safetensors": b"old"}
    checkpoints.write_files(output, whole if what == "a finished output" else content)
    if what == "nothing":
        shutil.rmtree(output)
        output.mkdir()
    if what == "a finished output":
        (output / "tokenizer.json").write_bytes(b"changed since")
        (output / "config.json").write_bytes(b"{}")
    before = checkpoints.tree(output)
    output.chmod(0o555)
    try:
        command = [sys.executable, "-c", NOBODY, base / "real" / "source", base / "warm", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert checkpoints.tree(output) == before
    finally:
        output.chmod(0o755)
        shutil.rmtree(output)
        shutil.rmtree(base / "warm")
