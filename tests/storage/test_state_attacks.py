"""The content of a destination is not trusted: torn or hostile state, planted links, races."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from moescale.api import convert
from moescale.errors import DestinationError, InterruptedRun, MoescaleError, VerificationError
from moescale.storage.local import journal
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.journal import JOURNAL, STATE

FIRST, SECOND, THIRD = (f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))
Tree = dict[str, bytes]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Mixtral with a card and a file in a folder."""
    folder = checkpoints.mixtral(tmp_path / "source", extras=False)
    checkpoints.write_files(folder, {"extra/a.txt": b"a\n", "README.md": b"# Tiny\n"})
    return folder


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Tree:
    """The output of an undisturbed run."""
    convert(source, tmp_path / "whole", experts=3)
    return checkpoints.tree(tmp_path / "whole")


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A run interrupted in its third shard; ``extra/a.txt`` and two shards are finished."""
    interrupt(source, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside of the run, in which nothing may change."""
    folder = tmp_path / "outside"
    checkpoints.write_files(folder, {"file": b"theirs", "sub/file": b"theirs"})
    before = checkpoints.tree(folder)
    yield folder
    assert checkpoints.tree(folder) == before
    assert sorted(path.name for path in folder.rglob("*")) == ["file", "file", "sub"]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A read that blocks on a pipe ends the test, not the whole suite."""

    def hangs(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(600)  # a loaded machine can take a minute without hanging
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def interrupt(source: Path, out: Path, at: str = THIRD, **options: Any) -> None:
    """Leave a run that was interrupted while writing the file `at`."""

    def stop(name: str, size: int) -> None:
        if name == at:
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        convert(source, out, **{"experts": 3, "jobs": 1, "progress": stop, **options})


def lines(out: Path) -> list[bytes]:
    """The lines of the journal."""
    return (out / STATE / JOURNAL).read_bytes().splitlines(keepends=True)


def check_resumes(source: Path, out: Path, whole: Tree) -> None:
    """Assert that the same command completes the output, and leaves nothing else."""
    assert convert(source, out, experts=3).status == "resume"
    assert checkpoints.tree(out) == whole


def check_refused_or_whole(source: Path, out: Path, whole: Tree) -> str:
    """Assert that the command is refused or completes the output, and that --overwrite works."""
    try:
        status = convert(source, out, experts=3).status
    except DestinationError:
        assert not (out / "config.json").exists()
        status = convert(source, out, experts=3, overwrite=True).status
    assert checkpoints.tree(out) == whole
    return status


# The journal --------------------------------------------------------------------------------------


def test_the_fixture_is_a_run_to_resume(source: Path, out: Path, whole: Tree) -> None:
    """Two shards and a small file are finished, listed in the journal, and not written again."""
    names = [json.loads(line)["file"] for line in lines(out)[1:]]
    assert names == ["extra/a.txt", FIRST, SECOND]
    before = (out / FIRST).stat().st_ino
    check_resumes(source, out, whole)
    assert (out / FIRST).stat().st_ino == before


def test_a_journal_that_is_torn_anywhere(source: Path, tmp_path: Path, whole: Tree) -> None:
    """Cut at any byte, the journal gives the right output or is refused."""
    interrupt(source, tmp_path / "model")
    content = (tmp_path / "model" / STATE / JOURNAL).read_bytes()
    seen = set()
    for cut in {*range(0, len(content), 53), *range(len(content) - 3, len(content))}:
        out = tmp_path / f"cut{cut}"
        interrupt(source, out)
        (out / STATE / JOURNAL).write_bytes((out / STATE / JOURNAL).read_bytes()[:cut])
        seen.add(check_refused_or_whole(source, out, whole))
    assert seen == {"resume", "replace"}


def test_a_job_without_its_line_end_is_torn(source: Path, out: Path, whole: Tree) -> None:
    """A line without its end does not count, not even the first."""
    (out / STATE / JOURNAL).write_bytes(lines(out)[0].rstrip(b"\n"))
    assert check_refused_or_whole(source, out, whole) == "replace"


def test_a_journal_with_flipped_bits(source: Path, tmp_path: Path, whole: Tree) -> None:
    """Whatever bits a bad disk flips, the output is right or the run is refused."""
    for at in range(0, 2000, 83):
        out = tmp_path / f"flip{at}"
        interrupt(source, out)
        data = bytearray((out / STATE / JOURNAL).read_bytes())
        data[at % len(data)] ^= 1 << (at % 8)
        (out / STATE / JOURNAL).write_bytes(data)
        check_refused_or_whole(source, out, whole)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda entry: [entry],
    "a number": lambda entry: 5,
    "null": lambda entry: None,
    "name is a number": lambda entry: {**entry, "file": 5},
    "name is null": lambda entry: {**entry, "file": None},
    "name is a list": lambda entry: {**entry, "file": [FIRST]},
    "name leads out": lambda entry: {**entry, "file": "../../outside/file"},
    "name is absolute": lambda entry: {**entry, "file": "/etc/passwd"},
    "name with a zero": lambda entry: {**entry, "file": "a\0b"},
    "name is no text": lambda entry: {**entry, "file": "\ud800"},
    "name is long": lambda entry: {**entry, "file": "x" * 100_000},
    "size is larger": lambda entry: {**entry, "size": entry["size"] + 1},
    "size is smaller": lambda entry: {**entry, "size": 0},
    "size is negative": lambda entry: {**entry, "size": -1, "stamp": [-1, 0, 0]},
    "size is text": lambda entry: {**entry, "size": str(entry["size"])},
    "size is a float": lambda entry: {**entry, "size": float(entry["size"])},
    "size is true": lambda entry: {**entry, "size": True},
    "size is missing": lambda entry: {k: v for k, v in entry.items() if k != "size"},
    "size is null": lambda entry: {**entry, "size": None},
    "digest is a number": lambda entry: {**entry, "sha256": 5},
    "digest is short": lambda entry: {**entry, "sha256": "abc"},
    "digest is a list": lambda entry: {**entry, "sha256": ["0" * 64]},
    "stamp is null": lambda entry: {**entry, "stamp": None},
    "stamp is empty": lambda entry: {**entry, "stamp": []},
    "stamp is text": lambda entry: {**entry, "stamp": "abc"},
    "stamp is of another time": lambda entry: {**entry, "stamp": [entry["size"], 0, 0]},
    "stamp is infinite": lambda entry: {**entry, "stamp": [float("inf")] * 3},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_entry(
    source: Path, out: Path, whole: Tree, outside: Path, change: Callable[[Any], Any]
) -> None:
    """An invalid entry is skipped, and its file is written again."""
    entries = lines(out)
    hostile = json.dumps(change(json.loads(entries[2]))).encode() + b"\n"
    (out / STATE / JOURNAL).write_bytes(entries[0] + entries[1] + hostile + entries[3])
    check_resumes(source, out, whole)


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"file": 1' + b"0" * 5000 + b"}", b"\xff", b"\0"]
)
def test_a_line_that_is_hard_to_read(source: Path, out: Path, whole: Tree, line: bytes) -> None:
    """Deep nesting, a huge number or invalid text: the run resumes without the line."""
    with open(out / STATE / JOURNAL, "ab") as file:
        file.write(line + b"\n")
    check_resumes(source, out, whole)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "empty", "text", "binary"])
def test_a_foreign_journal(source: Path, out: Path, whole: Tree, kind: str) -> None:
    """A journal of another program is refused without blocking, and is kept."""
    path = out / STATE / JOURNAL
    path.unlink()
    make = {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}
    content = {"empty": b"", "text": b"hello\n", "binary": os.urandom(100)}
    make.get(kind, lambda: path.write_bytes(content[kind]))()
    with pytest.raises(DestinationError, match="another program"):
        convert(source, out, experts=3)
    assert path.exists()
    assert not (out / "config.json").exists()


# Files that are not what they were ----------------------------------------------------------------


def truncate(path: Path) -> None:
    """Cut a file to half of its size."""
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    """Flip a bit near the end in place, and restore size and time."""
    info = path.stat()
    with open(path, "r+b") as file:
        file.seek(max(0, info.st_size - 10))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)


def replace(path: Path) -> None:
    """Put another file of the same size and time under the name."""
    info, new = path.stat(), path.with_name("new")
    new.write_bytes(path.read_bytes()[::-1])
    os.utime(new, ns=(info.st_atime_ns, info.st_mtime_ns))
    new.rename(path)


def link_to_source(path: Path) -> None:
    """Put a link to the unscaled shard in its place."""
    path.unlink()
    path.symlink_to(Path("..") / "source" / path.name)


@pytest.mark.parametrize("damage", [truncate, alter, replace, link_to_source, os.unlink])
def test_a_finished_shard_that_is_damaged(
    source: Path, out: Path, whole: Tree, damage: Callable[[Path], Any]
) -> None:
    """Size, times and type of a finished file are compared, not only its name."""
    before = checkpoints.tree(source)
    damage(out / FIRST)
    check_resumes(source, out, whole)
    assert not (out / FIRST).is_symlink()
    assert checkpoints.tree(source) == before


def test_a_shard_of_another_run_under_the_right_name(
    source: Path, out: Path, whole: Tree, tmp_path: Path
) -> None:
    """A file that the journal does not list is overwritten."""
    convert(source, tmp_path / "other", experts=4)
    (tmp_path / "other" / THIRD).rename(out / THIRD)
    check_resumes(source, out, whole)


def test_verification_finds_a_change_with_a_forged_journal(source: Path, out: Path) -> None:
    """If the journal is forged too, --verify finds the file and the tensor."""
    alter(out / FIRST)
    info = (out / FIRST).stat()
    content = lines(out)
    entry = json.loads(content[2])
    entry["stamp"] = [info.st_size, info.st_mtime_ns, info.st_ctime_ns]
    content[2] = json.dumps(entry).encode() + b"\n"
    (out / STATE / JOURNAL).write_bytes(b"".join(content))
    with pytest.raises(VerificationError, match=FIRST):
        convert(source, out, experts=3, verify=True)


@pytest.mark.parametrize("damage", [alter, replace])
def test_a_finished_output_that_is_damaged(
    source: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    """Size and time are the same; --verify finds the damage, and writes nothing."""
    convert(source, tmp_path / "out", experts=3)
    damage(tmp_path / "out" / SECOND)
    before = checkpoints.tree(tmp_path / "out")
    with pytest.raises(VerificationError, match=SECOND):
        convert(source, tmp_path / "out", experts=3, verify=True)
    assert checkpoints.tree(tmp_path / "out") == before


# Another job --------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "experts": {"experts": 4},
    "rule": {"rule": "published"},
    "rho": {"rho": 0.25},
    "trained": {"trained_experts": 1},
    "factor": {"factor": 1.5},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_options_do_not_go_on(
    source: Path, out: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """They are refused and change nothing; --overwrite keeps nothing of the first run."""
    before, other = checkpoints.tree(out), {"experts": 3, **options}
    with pytest.raises(DestinationError, match="other options"):
        convert(source, out, **other)
    assert checkpoints.tree(out) == before
    convert(source, out, overwrite=True, **other)
    convert(source, tmp_path / "fresh", **other)
    assert checkpoints.tree(out) == checkpoints.tree(tmp_path / "fresh")


CHANGED = [
    (name, damage)
    for name in (FIRST, THIRD, "config.json", "README.md", "extra/a.txt")
    for damage in (alter, replace)
]


@pytest.mark.parametrize(("name", "damage"), CHANGED)
def test_a_source_that_changed_meanwhile(
    source: Path, out: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    """With size and time restored it is still another source, and the run is not resumed."""
    damage(source / name)
    with pytest.raises(MoescaleError):
        convert(source, out, experts=3)
    assert not (out / "config.json").exists()


def test_a_finished_run_of_a_changed_source_is_replaced_whole(
    source: Path, out: Path, tmp_path: Path
) -> None:
    """Shards of two versions of a source are never mixed."""
    alter(source / FIRST)
    with pytest.raises(DestinationError, match="one that has changed"):
        convert(source, out, experts=3)
    convert(source, out, experts=3, overwrite=True)
    convert(source, tmp_path / "fresh", experts=3)
    assert checkpoints.tree(out) == checkpoints.tree(tmp_path / "fresh")


# Links --------------------------------------------------------------------------------------------


def plant(path: Path, target: Path) -> None:
    """Put a link in place of whatever exists, which may be a folder."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + "-was"))
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


PLACES = {
    "state": STATE,
    "lock": f"{STATE}/lock",
    "journal": f"{STATE}/{JOURNAL}",
    "new journal": f"{STATE}/journal.tmp",
    "another file": f"{STATE}/x.tmp",
    "folder": "extra",
    "shard": FIRST,
    "next shard": THIRD,
    "config": "config.json",
    "card": "README.md",
    "provenance": "moescale.json",
    "amendment": ".moescale.json.tmp",
}


@pytest.mark.parametrize("target", ["file", "sub", "nothing", "sub/nothing"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_link_in_an_unfinished_run(
    source: Path, out: Path, whole: Tree, outside: Path, place: str, target: str
) -> None:
    """Nothing is written, removed or created through it; it is refused, or replaced by the file."""
    plant(out / place, outside / target)
    try:
        convert(source, out, experts=3)
    except DestinationError as error:
        assert len(str(error).splitlines()) <= 2
        assert not (out / "config.json").is_file() or place == "config.json"
    else:
        assert {name: checkpoints.tree(out)[name] for name in whole} == whole
        assert not any((out / name).is_symlink() for name in (*whole, "extra"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["file", "sub", "nothing"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_link_in_a_finished_output(
    source: Path, tmp_path: Path, outside: Path, place: str, target: str, overwrite: bool
) -> None:
    """Verification and replacement do not write through it either."""
    convert(source, tmp_path / "out", experts=3)
    plant(tmp_path / "out" / place, outside / target)
    options = {"overwrite": True, "experts": 4} if overwrite else {"verify": True}
    with contextlib.suppress(MoescaleError):
        convert(source, tmp_path / "out", **{"experts": 3, **options})


@pytest.mark.parametrize("target", ["file", "sub", "nothing"])
def test_links_that_are_planted_during_the_run(
    source: Path, tmp_path: Path, outside: Path, target: str
) -> None:
    """A link at a name that the run uses ends the run or is replaced."""
    out = tmp_path / "out"
    names = [FIRST, SECOND, THIRD, "config.json", "moescale.json", "README.md"]
    planted = []

    def plant_all(name: str, size: int) -> None:
        if not planted:
            planted.append(name)
            for path in (
                *(LocalDestination(out)._temporary(n) for n in names),
                *(out / n for n in names),
            ):
                if not path.exists():
                    path.symlink_to(outside / target)

    with contextlib.suppress(MoescaleError):
        convert(source, out, experts=3, jobs=1, progress=plant_all)
    assert planted
    finished = (out / "config.json").is_file() and not (out / "config.json").is_symlink()
    assert not finished or not any((out / name).is_symlink() for name in names)


def test_a_folder_that_was_moved_away_is_not_finished(
    source: Path, out: Path, whole: Tree, tmp_path: Path
) -> None:
    """A link to the files that the run has written is not the output."""
    (out / "extra").rename(tmp_path / "elsewhere")
    (out / "extra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DestinationError, match="behind a link"):
        convert(source, out, experts=3)
    (out / "extra").unlink()
    check_resumes(source, out, whole)


def test_the_destination_itself_may_be_a_link(source: Path, tmp_path: Path, whole: Tree) -> None:
    """The user gave that path, for instance to use another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert convert(source, tmp_path / "link", experts=3).status == "new"
    assert checkpoints.tree(tmp_path / "disk") == whole
    assert convert(source, tmp_path / "link", experts=3).status == "done"


# Pipes and folders where files should be ----------------------------------------------------------


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["moescale.json", "config.json", "README.md", FIRST])
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"overwrite": True, "experts": 4}])
def test_a_pipe_or_folder_in_a_finished_output(
    source: Path, tmp_path: Path, name: str, make: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    """A run does not block on a pipe; --overwrite removes it."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    (out / name).unlink()
    make(out / name)
    if "overwrite" in options:
        assert convert(source, out, **options).status == "replace"
        assert (out / name).is_file()
    else:
        with pytest.raises(MoescaleError):
            convert(source, out, **{"experts": 3, **options})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"1234")])
def test_a_lock_that_is_something_else(
    source: Path, out: Path, whole: Tree, make: Callable[[Path], Any]
) -> None:
    """A pipe or a folder is an error; a file that a dead process left is reused."""
    (out / STATE / "lock").unlink()
    make(out / STATE / "lock")
    if (out / STATE / "lock").is_file():
        check_resumes(source, out, whole)
    else:
        with pytest.raises(DestinationError, match="lock: cannot be written to"):
            convert(source, out, experts=3)


# Two runs at once ---------------------------------------------------------------------------------


def test_a_disk_without_locks_is_said_as_such(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without locks is not reported as another run."""

    def none(fd: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal, "_lock_file", none)
    with pytest.raises(DestinationError, match="No locks available"):
        convert(source, tmp_path / "out", experts=3)


def test_verification_does_not_write_where_another_run_does(source: Path, tmp_path: Path) -> None:
    """While another run holds the destination, verification does not write digests there."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    destination = LocalDestination(out)
    destination.begin({"job": "another"}, replace=True)
    before = checkpoints.tree(out)
    with pytest.raises(DestinationError, match="another run"):
        LocalDestination(out).replace_small("moescale.json", b"{}")
    assert checkpoints.tree(out) == before
    destination.close()


def test_the_end_of_a_run_leaves_the_next_one_alone(source: Path, tmp_path: Path) -> None:
    """A run that begins while another one ends keeps its journal, or is refused."""
    out = tmp_path / "out"
    first = LocalDestination(out)
    first.begin({"job": "one"}, replace=False)
    release, second = first._lock.release, LocalDestination(out)

    def begin_at_once() -> None:
        release()
        first._lock.release = release  # type: ignore[method-assign]
        with contextlib.suppress(DestinationError):
            second.begin({"job": "two"}, replace=True)

    first._lock.release = begin_at_once  # type: ignore[method-assign]
    first.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    if second._journal is not None:
        assert LocalDestination(out).unfinished_job() == {"job": "two"}
        second.write_small("a", b"a")
        second.publish({"config.json": b"{}"}, keep=frozenset())
    assert not (out / STATE).exists()


def test_a_run_that_ends_between_look_and_lock(source: Path, tmp_path: Path, whole: Tree) -> None:
    """A destination that another run fills before the lock is refused."""
    out = tmp_path / "out"
    begin = LocalDestination.begin

    def late(self: LocalDestination, job: Any, replace: bool, keep: Any) -> None:
        patch.undo()
        convert(source, out, experts=3)
        begin(self, job, replace, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDestination, "begin", late)
        with pytest.raises(DestinationError, match="just ended"):
            convert(source, out, experts=4)
    assert checkpoints.tree(out) == whole


@pytest.mark.parametrize("same", [True, False])
def test_many_runs_at_once(source: Path, tmp_path: Path, whole: Tree, same: bool) -> None:
    """Each run succeeds or is refused with 3, and the output is that of one of them."""
    out, children = tmp_path / "out", []
    for number in range(4):
        experts = "3" if same or number % 2 else "4"
        command = [sys.executable, "-m", "moescale", source, out, "-k", experts, "-q"]
        command += [] if same else ["--overwrite"]
        children.append(subprocess.Popen(command, stdout=-3, stderr=subprocess.PIPE, text=True))
    ends = [(child.communicate(timeout=300)[1], child.returncode) for child in children]
    assert {code for _, code in ends} <= {0, 3}, ends
    assert 0 in {code for _, code in ends}
    convert(source, tmp_path / "four", experts=4)
    assert checkpoints.tree(out) in (whole, checkpoints.tree(tmp_path / "four"))
