"""Directories: what is read as a checkpoint, and how files come to stand under their names."""

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

from moescale.errors import CheckpointError, DestinationError, RewriteError, SourceError
from moescale.repos import disk, journal, local_sink, local_source
from moescale.repos.base import Written, check_name
from moescale.repos.journal import JOURNAL, STATE
from moescale.repos.local_sink import LocalSink
from moescale.repos.local_source import LocalSource

kernel_copies = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="this system has no copies inside the kernel"
)

JOB = {"job": "one"}
DATA = bytes(range(256)) * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with some files of a checkpoint."""
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_bytes(b"{}")
    (root / "data.bin").write_bytes(DATA)
    (root / "sub" / "a.txt").write_bytes(b"a")
    return root


Begin = Callable[..., LocalSink]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begins runs, each of which ends the one before as a crash would, and closes them all."""
    with contextlib.ExitStack() as stack:

        def begin(root: Path, job: Any = JOB, replace: bool = False) -> LocalSink:
            stack.pop_all().close()
            sink = LocalSink(root)
            stack.callback(sink.close)
            sink.begin(job, replace=replace)
            return sink

        yield begin


@pytest.fixture
def sink(tmp_path: Path, begin: Begin) -> LocalSink:
    """A sink in which a run has begun."""
    return begin(tmp_path / "out")


def read(source: LocalSource, name: str, start: int, size: int) -> bytes:
    """A stretch of a file through its reader."""
    buffer = memoryview(bytearray(size))
    with source.open(name) as reader:
        reader.read_into(buffer, start)
    return bytes(buffer)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "a/b.txt", ".gitattributes", "a..b", "caf\u00e9", "xy:z", "..."]
)
def test_plain_names_pass(name: str) -> None:
    """Any path inside the repo is a name."""
    assert check_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a//b",
        "../a",
        "a/../b",
        "a/..",
        ".",
        "./a",
        "a/",
        "C:a",
        "c:/a",
        "a\\b",
        "a\nb",
        "\0",
    ],
)
def test_names_that_could_leave_the_repo_are_refused(name: str) -> None:
    """Absolute, upward, empty or foreign paths never reach the file system."""
    with pytest.raises(CheckpointError, match="not a plain path"):
        check_name(name, "x")


def test_a_name_that_is_no_text_is_refused() -> None:
    """Bytes that are no UTF-8 cannot stand in the provenance, so they are an error at once."""
    with pytest.raises(CheckpointError):
        check_name("caf\udce9.txt", "x")


# The source ---------------------------------------------------------------------------------------


def test_a_source_has_all_files_of_the_directory(folder: Path) -> None:
    """Names are relative with forward slashes, with the sizes of the files."""
    files = LocalSource(folder).files()
    assert {name: info.size for name, info in files.items()} == {
        "config.json": 2,
        "data.bin": len(DATA),
        "sub/a.txt": 1,
    }


def test_git_and_cache_are_no_part_of_it(folder: Path) -> None:
    """Folders of tools at the top are not read, not even for links; deeper ones are files."""
    for name in (".git", ".cache"):
        (folder / name).mkdir()
        (folder / name / "link").symlink_to("/nowhere")
    (folder / "sub" / ".git").mkdir()
    (folder / "sub" / ".git" / "x").write_bytes(b"")
    assert set(LocalSource(folder).files()) == {
        "config.json",
        "data.bin",
        "sub/a.txt",
        "sub/.git/x",
    }


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "does not exist"), ("model/config.json", "is not a directory")]
)
def test_what_is_no_directory_is_no_source(folder: Path, name: str, why: str) -> None:
    """A missing place and a file are refused, each with its reason."""
    with pytest.raises(SourceError, match=f"{name}: {why}"):
        LocalSource(folder.parent / name)


def test_reads_stretches_and_whole_files(folder: Path) -> None:
    """Both the small reads and the reader give the bytes of the file."""
    source = LocalSource(folder)
    assert source.read("data.bin") == DATA
    assert source.read("data.bin", 5, 7) == DATA[5:12]
    assert read(source, "data.bin", 300, 1000) == DATA[300:1300]


def test_a_large_file_is_not_read_whole(folder: Path) -> None:
    """A config of many gigabytes is refused instead of read."""
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="too many"):
        LocalSource(folder).read("config.json")


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that returns fewer bytes than asked for is asked again."""
    whole = local_source._read_at
    monkeypatch.setattr(local_source, "_read_at", lambda fd, buffer, at: whole(fd, buffer[:7], at))
    assert read(LocalSource(folder), "data.bin", 3, 100) == DATA[3:103]


def test_a_file_that_ends_early_is_an_error(folder: Path) -> None:
    """Reading beyond the end names the file and the byte."""
    with pytest.raises(RewriteError, match=f"data.bin.*byte {len(DATA)}"):
        read(LocalSource(folder), "data.bin", len(DATA) - 5, 10)


@pytest.mark.parametrize("new", [b"short", DATA[::-1]])
def test_a_file_that_changed_since_the_plan_is_an_error(folder: Path, new: bytes) -> None:
    """A source that is being written to does not become a mixture of two checkpoints."""
    source = LocalSource(folder)
    source.files()
    (folder / "data.bin").write_bytes(new)
    os.utime(folder / "data.bin", (1, 1))
    with pytest.raises(RewriteError, match="changed"):
        read(source, "data.bin", 0, 1)


def test_a_file_that_changes_while_it_is_read_is_an_error(folder: Path) -> None:
    """The check is made again at the end."""
    source = LocalSource(folder)
    with pytest.raises(RewriteError, match="changed"), source.open("data.bin"):
        os.utime(folder / "data.bin", (1, 1))


def test_an_unfinished_output_is_no_source(sink: LocalSink) -> None:
    """What a run left behind is not rescaled again as if it were whole."""
    with pytest.raises(SourceError, match="unfinished"):
        LocalSource(sink.root)


# Links and other things ---------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_cache_is_a_source(tmp_path: Path) -> None:
    """Links into the blobs of the same repo are followed, and repo and commit are known."""
    repo, commit = tmp_path / "models--org--name-x", "0123456789" * 4
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / commit / "sub").mkdir(parents=True)
    (repo / "blobs" / "abc").write_bytes(DATA)
    (repo / "snapshots" / commit / "config.json").symlink_to("../../blobs/abc")
    (repo / "snapshots" / commit / "sub" / "x").symlink_to("../../../blobs/abc")
    source = LocalSource(repo / "snapshots" / commit)
    assert {name: info.size for name, info in source.files().items()} == {
        "config.json": len(DATA),
        "sub/x": len(DATA),
    }
    assert (source.identity.repo, source.identity.revision) == ("org/name-x", commit)
    assert source.identity.name == "org/name-x"
    assert read(source, "sub/x", 1, 5) == DATA[1:6]


def test_links_into_another_repo_of_the_cache_are_refused(tmp_path: Path) -> None:
    """Only the blobs of the same repo are its own."""
    for name in ("models--a--a", "models--b--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
    (tmp_path / "models--b--b" / "blobs" / "x").write_bytes(b"secret")
    snapshot = tmp_path / "models--a--a" / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../../models--b--b/blobs/x")
    with pytest.raises(CheckpointError, match="link out"):
        LocalSource(snapshot).files()


def test_links_inside_the_directory_are_files(folder: Path) -> None:
    """A link to a file of the same checkpoint is that file."""
    (folder / "copy.bin").symlink_to("data.bin")
    assert LocalSource(folder).read("copy.bin") == DATA


def test_a_source_that_is_itself_a_link_is_fine(folder: Path) -> None:
    """The directory may be given through a link."""
    (folder.parent / "link").symlink_to(folder)
    assert len(LocalSource(folder.parent / "link").files()) == 3


@pytest.mark.parametrize("target", ["../outside", "{absolute}", "sub/../../outside"])
def test_links_out_of_the_directory_are_refused(folder: Path, target: str) -> None:
    """What such a link points to would be published with the output."""
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    (folder / "x").symlink_to(target.format(absolute=outside))
    with pytest.raises(CheckpointError, match="'x' is a link"):
        LocalSource(folder).files()


@pytest.mark.parametrize("target", ["gone", "x"])
def test_links_that_lead_nowhere_are_refused(folder: Path, target: str) -> None:
    """A dangling link and a link to itself are an incomplete checkpoint."""
    (folder / "x").symlink_to(target)
    with pytest.raises(CheckpointError, match="'x' is a link that leads nowhere"):
        LocalSource(folder).files()


def test_links_to_directories_are_refused(folder: Path) -> None:
    """A linked folder could hold itself; it is no file."""
    (folder / "x").symlink_to("sub", target_is_directory=True)
    with pytest.raises(CheckpointError, match="'x'"):
        LocalSource(folder).files()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(folder: Path) -> None:
    """Opening a pipe would wait for ever, so it is refused before."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(CheckpointError, match="'pipe' is not a regular file"):
        LocalSource(folder).files()


# Writing a file -----------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_complete(sink: LocalSink) -> None:
    """Until then it lies under a temporary name in the state folder."""
    with sink.bench.shard("sub/x.bin", 3) as writer:
        writer.write(memoryview(b"abc"))
        assert not (sink.root / "sub").exists()
        [temporary] = (sink.root / STATE).glob("*.tmp")
        made = writer.finish()
    assert not (sink.root / "sub").exists()
    assert sink.commit_file("sub/x.bin", made) == Written(3)
    assert (sink.root / "sub" / "x.bin").read_bytes() == b"abc"
    assert not temporary.exists()


def test_a_file_that_is_not_finished_is_discarded(sink: LocalSink) -> None:
    """Leaving without `finish`, by an error say, leaves nothing behind."""
    with pytest.raises(KeyboardInterrupt), sink.bench.shard("x.bin", 3) as writer:
        writer.write(memoryview(b"ab"))
        raise KeyboardInterrupt
    assert sink.existing() == {}
    assert not list((sink.root / STATE).glob("*.tmp"))


def test_a_file_is_synced_before_it_is_renamed(
    sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sync, rename, sync of the directory, then the line in the journal: in this order."""
    steps: list[str] = []
    fsync, replace, add = os.fsync, os.replace, journal.Journal.add
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    monkeypatch.setattr(
        local_sink, "sync_directory", lambda path: steps.append(f"sync {Path(path).name}")
    )
    monkeypatch.setattr(journal.Journal, "add", lambda *a: (steps.append("note"), add(*a))[1])
    sink.put("x.bin", b"abc")
    assert steps == ["sync", "rename", "sync out", "note", "sync"]


def test_new_folders_are_durable_too(sink: LocalSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a new folder survives a power cut only if the folder's own entry is synced."""
    synced: list[Path] = []
    for module in (disk, local_sink):
        monkeypatch.setattr(module, "sync_directory", lambda path: synced.append(Path(path)))
    sink.put("a/b/x.bin", b"abc")
    assert {sink.root, sink.root / "a", sink.root / "a" / "b"} <= set(synced)


def test_a_file_of_another_size_than_planned_is_not_finished(sink: LocalSink) -> None:
    """A writer knows how long its file will be, so a fault elsewhere cannot pass for a shard."""
    with pytest.raises(RewriteError), sink.bench.shard("x.bin", 4) as writer:
        writer.write(memoryview(b"abcde"))
        writer.finish()
    assert sink.existing() == {}


def test_long_paths_can_be_written(sink: LocalSink) -> None:
    """A path that the file system allows is written, however long the temporary name gets."""
    name = "/".join(["folder" * 10] * 5 + ["x.bin"])
    sink.put(name, b"abc")
    assert (sink.root / name).read_bytes() == b"abc"


def test_names_with_odd_characters_do_not_collide(sink: LocalSink) -> None:
    """Names that look alike once slashes are gone are written side by side."""
    names = ["a/b", "a%-b", "a-b", "a%b", "a%%-b"]
    writers = [sink.bench.shard(name, len(name)) for name in names]
    opened = [writer.__enter__() for writer in writers]
    for name, writer in zip(names, opened, strict=True):
        writer.write(memoryview(name.encode()))
        sink.commit_file(name, writer.finish())
    for writer in writers:
        writer.__exit__(None, None, None)
    assert {name: (sink.root / name).read_text() for name in names} == {n: n for n in names}


# Copies -------------------------------------------------------------------------------------------


def copied(folder: Path, sink: LocalSink, start: int = 0, stop: int = len(DATA)) -> bytes:
    """A file that was written as: two bytes, a copied stretch, two bytes."""
    source = LocalSource(folder)
    size = stop - start + 4
    with sink.bench.shard("copy.bin", size) as writer, source.open("data.bin") as reader:
        writer.write(memoryview(b"<<"))
        sizes = list(writer.copy_from(reader, start, stop))
        writer.write(memoryview(b">>"))
        sink.commit_file("copy.bin", writer.finish())
    assert sum(sizes) == stop - start
    result = (sink.root / "copy.bin").read_bytes()
    assert (result[:2], result[-2:]) == (b"<<", b">>")
    return result[2:-2]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (5, 4096), (4096, 8192), (4095, 9001), (0, len(DATA))]
)
def test_a_stretch_is_copied(folder: Path, sink: LocalSink, start: int, stop: int) -> None:
    """Whatever its start and length, and with other writes before and after."""
    assert copied(folder, sink, start, stop) == DATA[start:stop]


def test_copies_without_help_of_the_kernel(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems without `copy_file_range` read and write."""
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert copied(folder, sink, 3, 20_000) == DATA[3:20_000]


@kernel_copies
@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]
)
@pytest.mark.parametrize("after", [0, 1])
def test_copies_that_the_kernel_refuses(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    """Across file systems, or halfway through, the rest is read and written."""
    copy, calls = os.copy_file_range, []

    def refuse(*args: Any) -> int:
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return copy(*args)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copied(folder, sink, 3, 20_000) == DATA[3:20_000]
    assert len(calls) == after + 1


@kernel_copies
def test_short_copies_are_continued(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that copies less than asked for is asked again, at the right place."""
    copy = os.copy_file_range
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, count, *rest: copy(a, b, min(count, 997), *rest)
    )
    assert copied(folder, sink, 3, 20_000) == DATA[3:20_000]


@kernel_copies
def test_a_kernel_that_copies_nothing_is_not_believed(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems answer 0 though there is more: the bytes are then read and written."""
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
    assert copied(folder, sink, 3, 20_000) == DATA[3:20_000]


@kernel_copies
def test_other_errors_of_a_copy_are_errors(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk does not become a slow copy to a full disk."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        copied(folder, sink)
    assert sink.existing() == {}


def test_short_writes_are_continued(
    folder: Path, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system that writes less than asked for is asked again."""
    write = os.write
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:999]))
    assert copied(folder, sink, 1, 9000) == DATA[1:9000]


def test_a_source_that_ends_early_ends_the_copy(folder: Path, sink: LocalSink) -> None:
    """Both ways of copying say so, and nothing appears under the name."""
    with pytest.raises(RewriteError, match="ended early"):
        copied(folder, sink, 0, len(DATA) + 1)
    assert sink.existing() == {}


# Resuming -----------------------------------------------------------------------------------------


def test_a_rerun_knows_what_is_finished(sink: LocalSink, begin: Begin) -> None:
    """The journal lists finished files, and they are still as they were written."""
    sink.put("a.bin", b"aa")
    sink.put("sub/b.bin", b"b")
    found = begin(sink.root).finished()
    assert {name: written.size for name, written in found.items()} == {"a.bin": 2, "sub/b.bin": 1}


def test_leftovers_are_removed(sink: LocalSink, begin: Begin) -> None:
    """Temporary files of a killed run do not stay."""
    (sink.root / STATE / "x.bin.tmp").write_bytes(b"half")
    begin(sink.root)
    assert not list((sink.root / STATE).glob("*.tmp"))


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
def test_a_file_that_was_altered_is_done_again(sink: LocalSink, begin: Begin, change: Any) -> None:
    """A file that is not as the run left it is not trusted."""
    sink.put("a.bin", b"aa")
    sink.put("b.bin", b"b")
    change(sink.root / "a.bin")
    assert set(begin(sink.root).finished()) == {"b.bin"}


def test_a_torn_line_is_not_counted(sink: LocalSink, begin: Begin) -> None:
    """What a crash leaves at the end of the journal is cut off, and later lines are whole."""
    sink.put("a.bin", b"a")
    sink.close()
    path = sink.root / STATE / JOURNAL
    whole = path.read_bytes()
    for cut in range(1, 40):
        torn = b'{"file": "b.bin", "size": 1, "sha256": null, "stamp": [1]}'[:cut]
        path.write_bytes(whole + torn)
        found = begin(sink.root)
        assert set(found.finished()) == {"a.bin"}
        found.put("c.bin", b"c")
        assert set(begin(sink.root).finished()) == {"a.bin", "c.bin"}
        (sink.root / "c.bin").unlink()


@pytest.mark.parametrize("line", [b"[]", b"5", b'{"file": "b"}', b"\xff\xff", b"", b'{"file": []}'])
def test_a_strange_line_is_passed_over(sink: LocalSink, begin: Begin, line: bytes) -> None:
    """A line that says nothing finishes nothing, and does not end the run."""
    sink.put("a.bin", b"a")
    with open(sink.root / STATE / JOURNAL, "ab") as file:
        file.write(line + b"\n")
    assert set(begin(sink.root).finished()) == {"a.bin"}


def test_the_job_is_what_the_first_line_says(sink: LocalSink) -> None:
    """An unfinished run tells which job it was; without one there is none."""
    assert sink.unfinished() == JOB
    assert LocalSink(sink.root.parent / "elsewhere").unfinished() is None


def test_the_run_of_another_job_is_not_continued(sink: LocalSink, begin: Begin) -> None:
    """Finished files of one job are never taken for those of another."""
    sink.put("a.bin", b"a")
    with pytest.raises(DestinationError):
        begin(sink.root, {"job": "other"})


@pytest.mark.parametrize("content", [b"", b"hello\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 100_000])
def test_a_foreign_journal_is_not_ours(tmp_path: Path, begin: Begin, content: bytes) -> None:
    """A file of that name that we did not write is no run to continue."""
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / JOURNAL).write_bytes(content)
    assert LocalSink(tmp_path).unfinished() not in (None, JOB)
    with pytest.raises(DestinationError):
        begin(tmp_path)
    assert (tmp_path / STATE / JOURNAL).read_bytes() == content


def test_many_threads_note_their_files(sink: LocalSink, begin: Begin) -> None:
    """Lines of shards that finish at once do not mix."""
    threads = [threading.Thread(target=sink.put, args=(f"{i}.bin", bytes(i))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = begin(sink.root).finished()
    assert {name: written.size for name, written in found.items()} == {
        f"{i}.bin": i for i in range(12)
    }


# One run at a time --------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from moescale.repos.local_sink import LocalSink
sink = LocalSink(Path(sys.argv[1]))
sink.begin({"job": "one"}, replace=False)
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(tmp_path: Path, begin: Begin) -> None:
    """While one process writes, another is told so; when it dies, the next one goes on."""
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
        assert LocalSink(tmp_path / "out").unfinished() == JOB
    finally:
        child.kill()
        child.communicate()
    begin(tmp_path / "out")


def test_a_second_run_in_the_same_process_is_refused(sink: LocalSink) -> None:
    """Two runs of one program do not share a destination either."""
    with pytest.raises(DestinationError, match="another run"):
        LocalSink(sink.root).begin(JOB, replace=False)


def test_a_destination_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """A file in the way is said in one line, with what to do."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DestinationError, match="cannot be written to") as caught:
        LocalSink(tmp_path / "file" / "out").begin(JOB, replace=False)
    assert caught.value.hint


# Replacing ----------------------------------------------------------------------------------------


def test_existing_files_are_seen(folder: Path) -> None:
    """Everything but the folders of tools counts as something else."""
    for name in (".git", ".cache", STATE):
        (folder / name).mkdir()
        (folder / name / "x").write_bytes(b"x")
    assert LocalSink(folder).existing() == {"config.json": 2, "data.bin": len(DATA), "sub/a.txt": 1}
    assert LocalSink(folder / "nothing").existing() == {}


def test_a_file_is_no_destination(folder: Path) -> None:
    """A file under the name of the destination is refused."""
    with pytest.raises(DestinationError, match="not a directory"):
        LocalSink(folder / "config.json").existing()


@pytest.mark.parametrize("name", ["notes.txt", "sub/config.json", "photo.jpg", ".bashrc"])
def test_what_is_no_model_is_not_replaced(tmp_path: Path, name: str) -> None:
    """--overwrite is no way to lose a home folder."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DestinationError, match="does not look like a model"):
        LocalSink(tmp_path).check_replaceable()


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
    """A checkpoint, an output of ours, and an unfinished run."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    LocalSink(tmp_path).check_replaceable()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_model_is_none(tmp_path: Path, name: str) -> None:
    """A web project has a config.json too; weights need a config beside them."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DestinationError, match="does not look like a model"):
        LocalSink(tmp_path).check_replaceable()


def test_a_replaced_model_stops_to_load_at_once(folder: Path, begin: Begin) -> None:
    """Old content is gone before the new is there, so no mixture of both ever loads."""
    (folder / "model.safetensors.index.json").write_bytes(b"{}")
    assert begin(folder, replace=True).existing() == {}


def test_replacing_a_run_forgets_its_files(sink: LocalSink, begin: Begin) -> None:
    """Files of a run that is replaced count as old content."""
    sink.put("a.bin", b"a")
    new = begin(sink.root, {"job": "other"}, replace=True)
    assert new.finished() == {}
    assert new.unfinished() == {"job": "other"}


def test_a_replaced_run_is_continued_as_such(folder: Path, begin: Begin) -> None:
    """An interrupted --overwrite goes on without the option, and the old content still goes."""
    begin(folder, replace=True).put("data.bin", b"new")
    sink = begin(folder)
    assert set(sink.finished()) == {"data.bin"}
    sink.publish({"config.json": b"{1}"}, keep=frozenset({"data.bin", "config.json"}))
    assert LocalSink(folder).existing() == {"config.json": 3, "data.bin": 3}


def test_an_overwrite_that_is_killed_at_its_start_can_be_begun_again(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment, the same command finds a model to replace or a run to continue."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local_sink, "Journal", killed)
        begin(folder, replace=True)
    LocalSink(folder).check_replaceable()


@pytest.mark.parametrize("old", ["folder", "link"])
def test_old_content_in_the_way_is_replaced(tmp_path: Path, begin: Begin, old: str) -> None:
    """A new file may have the name of an old folder's file, or lie where an old link leads out."""
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
    sink = begin(root, replace=True)
    sink.put(new, b"new")
    sink.publish({"config.json": b"{}"}, keep=frozenset({new, "config.json"}))
    assert list(outside.iterdir()) == []
    assert LocalSink(root).existing() == {"config.json": 2, new: 3}


def test_an_old_file_where_a_folder_is_needed_is_replaced(folder: Path, begin: Begin) -> None:
    """The other way round: an old file has the name of a new folder."""
    sink = begin(folder, replace=True)
    sink.put("data.bin/new.txt", b"new")
    sink.publish({"config.json": b"{}"}, keep=frozenset({"data.bin/new.txt", "config.json"}))
    assert LocalSink(folder).existing() == {"config.json": 2, "data.bin/new.txt": 3}


def test_files_of_others_survive_a_run_without_overwrite(sink: LocalSink) -> None:
    """What somebody puts into the destination meanwhile is not removed unless they said so."""
    (sink.root / "notes.txt").write_bytes(b"mine")
    sink.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    assert (sink.root / "notes.txt").read_bytes() == b"mine"


# The end ------------------------------------------------------------------------------------------


def test_nothing_loads_before_the_end(sink: LocalSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last files come in the order that is given: provenance, index, config."""
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b))[1])
    last = {"moescale.json": b"1", "model.safetensors.index.json": b"2", "config.json": b"3"}
    sink.publish(last, keep=frozenset(last))
    assert order == list(last)


def test_a_finished_output_has_no_state(sink: LocalSink) -> None:
    """Journal, lock and temporary files are gone, and so are empty folders of old content."""
    (sink.root / "old" / "deep").mkdir(parents=True)
    sink.put("a.bin", b"a")
    sink.publish({"config.json": b"{}"}, keep=frozenset({"a.bin", "config.json"}))
    assert sorted(path.name for path in sink.root.iterdir()) == ["a.bin", "config.json"]
    assert LocalSource(sink.root).files().keys() == {"a.bin", "config.json"}
    assert LocalSink(sink.root).unfinished() is None


def test_git_and_cache_of_the_destination_stay(folder: Path, begin: Begin) -> None:
    """A clone that is replaced is still a clone."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_bytes(b"ref")
    (folder / ".cache" / "empty").mkdir(parents=True)
    sink = begin(folder, replace=True)
    sink.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    assert (folder / ".git" / "HEAD").read_bytes() == b"ref"
    assert (folder / ".cache" / "empty").is_dir()
    assert LocalSink(folder).existing() == {"config.json": 2}


def test_a_finished_file_can_be_amended(sink: LocalSink) -> None:
    """The provenance gets its digests later, whole or not at all."""
    sink.publish({"moescale.json": b"old"}, keep=frozenset({"moescale.json"}))
    sink.amend("moescale.json", b"new")
    assert LocalSink(sink.root).existing() == {"moescale.json": 3}
    assert sink.read("moescale.json") == b"new"


def test_an_amendment_that_fails_leaves_the_old_file(
    sink: LocalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, and nothing is left beside it that would not belong into the output."""
    sink.publish({"moescale.json": b"old"}, keep=frozenset({"moescale.json"}))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sink.amend("moescale.json", b"new")
    assert LocalSink(sink.root).existing() == {"moescale.json": 3}
    assert sink.read("moescale.json") == b"old"


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "x.bin.tmp"]])
def test_what_a_kill_at_the_very_end_leaves_does_no_harm(sink: LocalSink, left: list[str]) -> None:
    """A state folder without a journal is a finished output all the same."""
    sink.publish({"config.json": b"{}"}, keep=frozenset({"config.json"}))
    (sink.root / STATE).mkdir()
    for name in left:
        (sink.root / STATE / name).write_bytes(b"")
    assert set(LocalSource(sink.root).files()) == {"config.json"}
    assert LocalSink(sink.root).unfinished() is None
    assert LocalSink(sink.root).existing() == {"config.json": 2}


def test_the_lock_is_released_when_the_journal_cannot_be_used(
    sink: LocalSink, begin: Begin
) -> None:
    """A run that could not begin does not keep others out for the life of its process."""
    sink.close()
    refused = LocalSink(sink.root)
    with pytest.raises(DestinationError):
        refused.begin({"job": "other"}, replace=False)
    begin(sink.root)


def test_the_journal_is_one_line_a_file(sink: LocalSink) -> None:
    """Each line is JSON by itself, so that a torn one harms no other."""
    sink.put("a.bin", b"a")
    lines = (sink.root / STATE / JOURNAL).read_bytes().splitlines()
    assert json.loads(lines[0]) == {"job": JOB}
    assert json.loads(lines[1])["file"] == "a.bin"
