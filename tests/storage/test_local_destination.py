"""Output directories: runs that resume, replace old content, and finish; one at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from moescale.errors import DestinationError, SourceError
from moescale.storage.local import destination as local_destination
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.journal import JOURNAL, STATE
from moescale.storage.local.source import LocalSource

JOB = {"job": "one"}


Begin = Callable[..., LocalDestination]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begin runs; each first ends the previous one as a crash would. Close them all at the end."""
    with contextlib.ExitStack() as stack:

        def begin(root: Path, job: Any = JOB, replace: bool = False) -> LocalDestination:
            stack.pop_all().close()
            destination = LocalDestination(root)
            stack.callback(destination.close)
            destination.begin(job, replace=replace)
            return destination

        yield begin


@pytest.fixture
def destination(tmp_path: Path, begin: Begin) -> LocalDestination:
    """A destination in which a run has begun."""
    return begin(tmp_path / "out")


# Resuming -----------------------------------------------------------------------------------------


def test_a_rerun_knows_what_is_finished(destination: LocalDestination, begin: Begin) -> None:
    """The journal lists finished files, which have not changed since."""
    destination.write_small("a.bin", b"aa")
    destination.write_small("sub/b.bin", b"b")
    found = begin(destination.root).finished_files()
    assert {name: written.size for name, written in found.items()} == {"a.bin": 2, "sub/b.bin": 1}


def test_leftovers_are_removed(destination: LocalDestination, begin: Begin) -> None:
    """Temporary files of a killed run are removed."""
    (destination.root / STATE / "x.bin.tmp").write_bytes(b"half")
    begin(destination.root)
    assert not list((destination.root / STATE).glob("*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"bb"),
        lambda path: path.write_bytes(b"longer"),
        lambda path: path.unlink(),
        lambda path: os.utime(path, (1, 1)),
        lambda path: (path.unlink(), path.symlink_to("/dev/null")),
        lambda path: (path.rename(path.with_name("old")), path.write_bytes(b"aa")),
    ],
    ids=["content", "size", "gone", "time", "link", "replaced"],
)
def test_a_file_that_was_altered_is_done_again(
    destination: LocalDestination, begin: Begin, change: Any
) -> None:
    """A file that differs from what the run wrote does not count as finished."""
    destination.write_small("a.bin", b"aa")
    destination.write_small("b.bin", b"b")
    change(destination.root / "a.bin")
    assert set(begin(destination.root).finished_files()) == {"b.bin"}


def test_a_torn_line_is_not_counted(destination: LocalDestination, begin: Begin) -> None:
    """The torn end of a journal is cut off, and later lines are complete."""
    destination.write_small("a.bin", b"a")
    destination.close()
    path = destination.root / STATE / JOURNAL
    whole = path.read_bytes()
    for cut in range(1, 40):
        torn = b'{"file": "b.bin", "size": 1, "sha256": null, "stamp": [1]}'[:cut]
        path.write_bytes(whole + torn)
        found = begin(destination.root)
        assert set(found.finished_files()) == {"a.bin"}
        found.write_small("c.bin", b"c")
        assert set(begin(destination.root).finished_files()) == {"a.bin", "c.bin"}
        (destination.root / "c.bin").unlink()


@pytest.mark.parametrize("line", [b"[]", b"5", b'{"file": "b"}', b"\xff\xff", b"", b'{"file": []}'])
def test_a_strange_line_is_passed_over(
    destination: LocalDestination, begin: Begin, line: bytes
) -> None:
    """An invalid line marks no file as finished, and does not end the run."""
    destination.write_small("a.bin", b"a")
    with open(destination.root / STATE / JOURNAL, "ab") as file:
        file.write(line + b"\n")
    assert set(begin(destination.root).finished_files()) == {"a.bin"}


def test_the_job_is_what_the_first_line_says(destination: LocalDestination) -> None:
    """An unfinished run states its job; without a run there is None."""
    assert destination.unfinished_job() == JOB
    assert LocalDestination(destination.root.parent / "elsewhere").unfinished_job() is None


def test_the_run_of_another_job_is_not_continued(
    destination: LocalDestination, begin: Begin
) -> None:
    """Finished files of one job are never taken for those of another."""
    destination.write_small("a.bin", b"a")
    with pytest.raises(DestinationError):
        begin(destination.root, {"job": "other"})


@pytest.mark.parametrize("content", [b"", b"hello\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 100_000])
def test_a_foreign_journal_is_not_ours(tmp_path: Path, begin: Begin, content: bytes) -> None:
    """A file of that name from another program is not a run to resume."""
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / JOURNAL).write_bytes(content)
    assert LocalDestination(tmp_path).unfinished_job() not in (None, JOB)
    with pytest.raises(DestinationError):
        begin(tmp_path)
    assert (tmp_path / STATE / JOURNAL).read_bytes() == content


def test_many_threads_note_their_files(destination: LocalDestination, begin: Begin) -> None:
    """Lines of shards that finish at the same time do not mix."""
    threads = [
        threading.Thread(target=destination.write_small, args=(f"{i}.bin", bytes(i)))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = begin(destination.root).finished_files()
    assert {name: written.size for name, written in found.items()} == {
        f"{i}.bin": i for i in range(12)
    }


# One run at a time --------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from moescale.storage.local.destination import LocalDestination
destination = LocalDestination(Path(sys.argv[1]))
destination.begin({"job": "one"}, replace=False)
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(tmp_path: Path, begin: Begin) -> None:
    """While one process writes, another is refused; once it dies, the next one resumes."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"holds\n"
        for replace in (False, True):
            with pytest.raises(DestinationError, match="another run"):
                begin(tmp_path / "out", replace=replace)
        assert LocalDestination(tmp_path / "out").unfinished_job() == JOB
    finally:
        child.kill()
        child.communicate()
    begin(tmp_path / "out")


def test_a_second_run_in_the_same_process_is_refused(destination: LocalDestination) -> None:
    """Two runs of one program do not share a destination either."""
    with pytest.raises(DestinationError, match="another run"):
        LocalDestination(destination.root).begin(JOB, replace=False)


def test_a_destination_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """A file in the way gives an error of one line and a hint."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DestinationError, match="cannot be written to") as caught:
        LocalDestination(tmp_path / "file" / "out").begin(JOB, replace=False)
    assert caught.value.hint


# Replacing ----------------------------------------------------------------------------------------


def test_existing_files_are_seen(folder: Path) -> None:
    """All files count as existing except those in the folders of tools."""
    for name in (".git", ".cache", STATE):
        (folder / name).mkdir()
        (folder / name / "x").write_bytes(b"x")
    assert LocalDestination(folder).existing() == {
        "config.json": 2,
        "data.bin": len(checkpoints.DATA),
        "sub/a.txt": 1,
    }
    assert LocalDestination(folder / "nothing").existing() == {}


def test_a_file_is_no_destination(folder: Path) -> None:
    """A file under the name of the destination is refused."""
    with pytest.raises(DestinationError, match="not a directory"):
        LocalDestination(folder / "config.json").existing()


@pytest.mark.parametrize("name", ["notes.txt", "sub/config.json", "photo.jpg", ".bashrc"])
def test_what_is_no_model_is_not_replaced(tmp_path: Path, name: str) -> None:
    """--overwrite does not delete a home folder."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DestinationError, match="does not look like a model"):
        LocalDestination(tmp_path).check_replaceable()


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "model.safetensors"),
        ("config.json", "pytorch_model.bin"),
        ("moescale.json",),
        (f"{STATE}/{JOURNAL}",),
        (f"{STATE}/lock",),
    ],
)
def test_a_model_may_be_replaced(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A checkpoint, an earlier output and an unfinished run may be replaced."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    LocalDestination(tmp_path).check_replaceable()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_model_is_none(tmp_path: Path, name: str) -> None:
    """A web project has a config.json too, and weights need a config beside them."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DestinationError, match="does not look like a model"):
        LocalDestination(tmp_path).check_replaceable()


def test_a_replaced_model_stops_to_load_at_once(folder: Path, begin: Begin) -> None:
    """Old content is removed before new files appear, so a mixture never loads."""
    (folder / "model.safetensors.index.json").write_bytes(b"{}")
    assert begin(folder, replace=True).existing() == {}


def test_replacing_a_run_forgets_its_files(destination: LocalDestination, begin: Begin) -> None:
    """Files of a run that is replaced count as old content."""
    destination.write_small("a.bin", b"a")
    new = begin(destination.root, {"job": "other"}, replace=True)
    assert new.finished_files() == {}
    assert new.unfinished_job() == {"job": "other"}


def test_a_replaced_run_is_continued_as_such(folder: Path, begin: Begin) -> None:
    """An interrupted --overwrite resumes without the option, and still removes the old content."""
    begin(folder, replace=True).write_small("data.bin", b"new")
    destination = begin(folder)
    assert set(destination.finished_files()) == {"data.bin"}
    destination.publish({"config.json": b"{1}"}, keep=frozenset({"data.bin", "config.json"}))
    assert LocalDestination(folder).existing() == {"config.json": 3, "data.bin": 3}


def test_an_overwrite_that_is_killed_at_its_start_can_be_begun_again(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment, the same command finds a model to replace or a run to resume."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local_destination, "Journal", killed)
        begin(folder, replace=True)
    LocalDestination(folder).check_replaceable()


@pytest.mark.parametrize("old", ["folder", "link"])
def test_old_content_in_the_way_is_replaced(tmp_path: Path, begin: Begin, old: str) -> None:
    """A new file may have the path of an old file in a folder, or one behind an old link."""
    root, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "config.json").write_bytes(b"{}")
    if old == "folder":
        (root / "x" / "y").mkdir(parents=True)
        (root / "x" / "y" / "z").write_bytes(b"old")
        new = "x/y"
    else:
        (root / "x").symlink_to(outside, target_is_directory=True)
        new = "x/y"
    destination = begin(root, replace=True)
    destination.write_small(new, b"new")
    destination.publish({"config.json": b"{}"}, keep=frozenset({new, "config.json"}))
    assert list(outside.iterdir()) == []
    assert LocalDestination(root).existing() == {"config.json": 2, new: 3}


def test_an_old_file_where_a_folder_is_needed_is_replaced(folder: Path, begin: Begin) -> None:
    """An old file may have the name of a new folder."""
    destination = begin(folder, replace=True)
    destination.write_small("data.bin/new.txt", b"new")
    destination.publish({"config.json": b"{}"}, keep=frozenset({"data.bin/new.txt", "config.json"}))
    assert LocalDestination(folder).existing() == {"config.json": 2, "data.bin/new.txt": 3}


def test_files_of_others_survive_a_run_without_overwrite(destination: LocalDestination) -> None:
    """Files that others add during the run are kept unless --overwrite is given."""
    (destination.root / "notes.txt").write_bytes(b"mine")
    destination.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    assert (destination.root / "notes.txt").read_bytes() == b"mine"


# The end of a run ---------------------------------------------------------------------------------


def test_nothing_loads_before_the_end(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last files appear in the given order: provenance, index, config."""
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b))[1])
    last = {"moescale.json": b"1", "model.safetensors.index.json": b"2", "config.json": b"3"}
    destination.publish(last, keep=frozenset(last))
    assert order == list(last)


def test_a_finished_output_has_no_state(destination: LocalDestination) -> None:
    """Journal, lock, temporary files and empty old folders are removed."""
    (destination.root / "old" / "deep").mkdir(parents=True)
    destination.write_small("a.bin", b"a")
    destination.publish({"config.json": b"{}"}, keep=frozenset({"a.bin", "config.json"}))
    assert sorted(path.name for path in destination.root.iterdir()) == ["a.bin", "config.json"]
    assert LocalSource(destination.root).files().keys() == {"a.bin", "config.json"}
    assert LocalDestination(destination.root).unfinished_job() is None


def test_git_and_cache_of_the_destination_stay(folder: Path, begin: Begin) -> None:
    """A clone stays a clone when its files are replaced."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_bytes(b"ref")
    (folder / ".cache" / "empty").mkdir(parents=True)
    destination = begin(folder, replace=True)
    destination.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    assert (folder / ".git" / "HEAD").read_bytes() == b"ref"
    assert (folder / ".cache" / "empty").is_dir()
    assert LocalDestination(folder).existing() == {"config.json": 2}


def test_a_finished_file_can_be_amended(destination: LocalDestination) -> None:
    """The provenance gets its digests later, atomically."""
    destination.publish({"moescale.json": b"old"}, keep=frozenset({"moescale.json"}))
    destination.replace_small("moescale.json", b"new")
    assert LocalDestination(destination.root).existing() == {"moescale.json": 3}
    assert destination.read_existing("moescale.json") == b"new"


def test_an_amendment_that_fails_leaves_the_old_file(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays, and no temporary file remains beside it."""
    destination.publish({"moescale.json": b"old"}, keep=frozenset({"moescale.json"}))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        destination.replace_small("moescale.json", b"new")
    assert LocalDestination(destination.root).existing() == {"moescale.json": 3}
    assert destination.read_existing("moescale.json") == b"old"


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "x.bin.tmp"]])
def test_what_a_kill_at_the_very_end_leaves_does_no_harm(
    destination: LocalDestination, left: list[str]
) -> None:
    """A state folder without a journal does not make an output unfinished."""
    destination.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    (destination.root / STATE).mkdir()
    for name in left:
        (destination.root / STATE / name).write_bytes(b"")
    assert set(LocalSource(destination.root).files()) == {"config.json"}
    assert LocalDestination(destination.root).unfinished_job() is None
    assert LocalDestination(destination.root).existing() == {"config.json": 2}


def test_the_lock_is_released_when_the_journal_cannot_be_used(
    destination: LocalDestination, begin: Begin
) -> None:
    """A run that could not begin does not block others for the life of its process."""
    destination.close()
    refused = LocalDestination(destination.root)
    with pytest.raises(DestinationError):
        refused.begin({"job": "other"}, replace=False)
    begin(destination.root)


def test_the_journal_is_one_line_a_file(destination: LocalDestination) -> None:
    """Each line is valid JSON, so a torn line does not damage the others."""
    destination.write_small("a.bin", b"a")
    lines = (destination.root / STATE / JOURNAL).read_bytes().splitlines()
    assert json.loads(lines[0]) == {"job": JOB}
    assert json.loads(lines[1])["file"] == "a.bin"


def test_an_unfinished_output_is_no_source(destination: LocalDestination) -> None:
    """An unfinished output cannot be rescaled."""
    with pytest.raises(SourceError, match="unfinished"):
        LocalSource(destination.root)
