"""How files of an output directory are written and get their names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from moescale.errors import RewriteError
from moescale.storage.base import FileRecord
from moescale.storage.local import destination as local_destination
from moescale.storage.local import filesystem as disk
from moescale.storage.local import journal
from moescale.storage.local import writer as local_writer
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.journal import STATE
from moescale.storage.local.source import LocalSource

kernel_copies = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="this system has no copies inside the kernel"
)


@pytest.fixture
def through_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write through the page cache, as on a file system without a block device."""
    monkeypatch.setattr(local_writer, "set_direct_io", lambda fd, on: False)


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write as on a file system that shares blocks, and requires whole ones."""

    def share(source: int, start: int, size: int, target: int, offset: int) -> bool:
        assert size
        assert (start % 4096, size % 4096, offset % 4096) == (0, 0, 0)
        if start + size > os.fstat(source).st_size:
            return False
        return os.pwrite(target, os.pread(source, size, start), offset) == size

    monkeypatch.setattr(local_writer, "set_direct_io", lambda fd, on: on)
    monkeypatch.setattr(local_writer, "clone_blocks", share)


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[LocalDestination]:
    """A destination in which a run has begun."""
    with contextlib.closing(LocalDestination(tmp_path / "out")) as destination:
        destination.begin({"job": "one"}, replace=False)
        yield destination


# Writing a file -----------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_complete(destination: LocalDestination) -> None:
    """Before that it has a temporary name in the state folder."""
    with destination.writers.open("sub/x.bin", 3) as writer:
        writer.write(memoryview(b"abc"))
        assert not (destination.root / "sub").exists()
        [temporary] = (destination.root / STATE).glob("*.tmp")
        made = writer.finish()
    assert not (destination.root / "sub").exists()
    assert destination.commit_file("sub/x.bin", made) == FileRecord(3)
    assert (destination.root / "sub" / "x.bin").read_bytes() == b"abc"
    assert not temporary.exists()


def test_a_file_that_is_not_finished_is_discarded(destination: LocalDestination) -> None:
    """Leaving without `finish`, for instance by an error, leaves nothing behind."""
    with pytest.raises(KeyboardInterrupt), destination.writers.open("x.bin", 3) as writer:
        writer.write(memoryview(b"ab"))
        raise KeyboardInterrupt
    assert destination.existing() == {}
    assert not list((destination.root / STATE).glob("*.tmp"))


def test_a_file_is_synced_before_it_is_renamed(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is: sync, rename, sync of the directory, line in the journal."""
    steps: list[str] = []
    fsync, replace, add = os.fsync, os.replace, journal.Journal.add
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    monkeypatch.setattr(
        local_destination, "sync_directory", lambda path: steps.append(f"sync {Path(path).name}")
    )
    monkeypatch.setattr(journal.Journal, "add", lambda *a: (steps.append("note"), add(*a))[1])
    destination.write_small("x.bin", b"abc")
    assert steps == ["sync", "rename", "sync out", "note", "sync"]


def test_new_folders_are_durable_too(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a new folder survives a power cut only if the folder's own entry is synced."""
    synced: list[Path] = []
    for module in (disk, local_destination):
        monkeypatch.setattr(module, "sync_directory", lambda path: synced.append(Path(path)))
    destination.write_small("a/b/x.bin", b"abc")
    assert {destination.root, destination.root / "a", destination.root / "a" / "b"} <= set(synced)


def test_a_file_of_another_size_than_planned_is_not_finished(destination: LocalDestination) -> None:
    """A writer knows the length of its file, so a file of another length is never published."""
    with pytest.raises(RewriteError), destination.writers.open("x.bin", 4) as writer:
        writer.write(memoryview(b"abcde"))
        writer.finish()
    assert destination.existing() == {}


def test_long_paths_can_be_written(destination: LocalDestination) -> None:
    """Any path that the file system allows is written, despite the longer temporary name."""
    name = "/".join(["folder" * 10] * 5 + ["x.bin"])
    destination.write_small(name, b"abc")
    assert (destination.root / name).read_bytes() == b"abc"


def test_names_with_odd_characters_do_not_collide(destination: LocalDestination) -> None:
    """Names that are equal without their slashes are written side by side."""
    names = ["a/b", "a%-b", "a-b", "a%b", "a%%-b"]
    writers = [destination.writers.open(name, len(name)) for name in names]
    opened = [writer.__enter__() for writer in writers]
    for name, writer in zip(names, opened, strict=True):
        writer.write(memoryview(name.encode()))
        destination.commit_file(name, writer.finish())
    for writer in writers:
        writer.__exit__(None, None, None)
    assert {name: (destination.root / name).read_text() for name in names} == {n: n for n in names}


# Copies -------------------------------------------------------------------------------------------


def copied(
    folder: Path, destination: LocalDestination, start: int = 0, stop: int = len(checkpoints.DATA)
) -> bytes:
    """The copied part of a file that is written as: two bytes, the copied range, two bytes."""
    source = LocalSource(folder)
    size = stop - start + 4
    with destination.writers.open("copy.bin", size) as writer, source.open("data.bin") as reader:
        writer.write(memoryview(b"<<"))
        sizes = list(writer.copy_from(reader, start, stop))
        writer.write(memoryview(b">>"))
        destination.commit_file("copy.bin", writer.finish())
    assert sum(sizes) == stop - start
    result = (destination.root / "copy.bin").read_bytes()
    assert (result[:2], result[-2:]) == (b"<<", b">>")
    return result[2:-2]


@pytest.mark.parametrize("way", ["as it is", "through_cache", "sharing"])
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (0, 1), (5, 4096), (4096, 8192), (4095, 9001), (0, len(checkpoints.DATA))],
)
def test_a_stretch_is_copied(
    request: pytest.FixtureRequest,
    folder: Path,
    destination: LocalDestination,
    start: int,
    stop: int,
    way: str,
) -> None:
    """The bytes are right for any start and length, and with other writes before and after."""
    if way != "as it is":
        request.getfixturevalue(way)
    assert copied(folder, destination, start, stop) == checkpoints.DATA[start:stop]


def test_copies_without_help_of_the_kernel(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems without `copy_file_range` use reads and writes."""
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert copied(folder, destination, 3, 20_000) == checkpoints.DATA[3:20_000]


@kernel_copies
@pytest.mark.usefixtures("through_cache")
@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]
)
@pytest.mark.parametrize("after", [0, 1])
def test_copies_that_the_kernel_refuses(
    folder: Path,
    destination: LocalDestination,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    after: int,
) -> None:
    """If it refuses at once, or halfway through, the rest is read and written."""
    copy, calls = os.copy_file_range, []

    def refuse(*args: Any) -> int:
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        source, target, count, *rest = args
        return copy(source, target, min(count, 997), *rest)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copied(folder, destination, 3, 20_000) == checkpoints.DATA[3:20_000]
    assert len(calls) == after + 1


@kernel_copies
@pytest.mark.usefixtures("through_cache")
def test_short_copies_are_continued(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the kernel copies less than requested, the rest is requested at the right offset."""
    copy = os.copy_file_range
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, count, *rest: copy(a, b, min(count, 997), *rest)
    )
    assert copied(folder, destination, 3, 20_000) == checkpoints.DATA[3:20_000]


@kernel_copies
@pytest.mark.usefixtures("through_cache")
def test_a_kernel_that_copies_nothing_is_not_believed(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems return 0 before the end; the bytes are then read and written."""
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
    assert copied(folder, destination, 3, 20_000) == checkpoints.DATA[3:20_000]


@kernel_copies
@pytest.mark.usefixtures("through_cache")
def test_other_errors_of_a_copy_are_errors(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full, the copy is not tried again by reads and writes."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        copied(folder, destination)
    assert destination.existing() == {}


def test_short_writes_are_continued(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system writes less than requested, the rest is written again."""
    write = os.write
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:999]))
    assert copied(folder, destination, 1, 9000) == checkpoints.DATA[1:9000]


def test_a_source_that_ends_early_ends_the_copy(
    folder: Path, destination: LocalDestination
) -> None:
    """Both ways of copying raise an error, and no file appears under the name."""
    with pytest.raises(RewriteError, match="ended early"):
        copied(folder, destination, 0, len(checkpoints.DATA) + 1)
    assert destination.existing() == {}


# Past the page cache ------------------------------------------------------------------------------

FULL = bytes(range(256)) * (local_writer.BUFFER // 256)


def refuses_direct(folder: Path) -> str:
    """The reason why files in a folder cannot bypass the page cache; empty if they can."""
    if not hasattr(os, "O_DIRECT") or not os.major(folder.stat().st_dev):
        return f"{folder} is on no disk of its own, or the system cannot pass its page cache"
    try:
        fd = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        os.write(fd, mmap.mmap(-1, 4096))
        os.close(fd)
    except OSError as error:
        return f"{folder} cannot be written past the page cache: {error}"
    return ""


def test_buffers_are_in_huge_pages() -> None:
    """Each buffer of 2 MiB fills one huge page, where the system has any; none overlap."""
    buffers = disk.make_buffers(3, 2 << 20)
    for number, buffer in enumerate(buffers):
        buffer[:] = bytes([number]) * len(buffer)
    assert [set(buffer[:: 1 << 12]) for buffer in buffers] == [{0}, {1}, {2}]
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this system has no huge pages")
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    assert [address % (2 << 20) for address in addresses] == [0, 0, 0]
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    holding = next(text for text in mappings if holds(text, addresses[0]))
    assert "hg" in mappings[mappings.index(holding) + 1].split("\n")[0].split()


def holds(mapping: str, address: int) -> bool:
    """Whether an address is in the mapping at the end of a part of ``/proc/self/smaps``."""
    found = re.search(r"^([0-9a-f]+)-([0-9a-f]+) ", mapping, re.MULTILINE)
    return found is not None and int(found[1], 16) <= address < int(found[2], 16)


@pytest.mark.parametrize("tail", [b"", b"x", b"x" * 4096])
def test_a_disk_is_written_past_the_page_cache(
    tmp_path: Path, destination: LocalDestination, tail: bytes
) -> None:
    """The file has O_DIRECT set; only the piece with the last bytes may be written without it."""
    if why := refuses_direct(tmp_path):
        pytest.skip(why)
    import fcntl

    with destination.writers.open("x.bin", 2 * local_writer.BUFFER + len(tail)) as writer:
        writer.write(memoryview(FULL + FULL))
        assert fcntl.fcntl(writer.fd, fcntl.F_GETFL) & os.O_DIRECT
        writer.write(memoryview(tail))
        destination.commit_file("x.bin", writer.finish())
    assert (destination.root / "x.bin").read_bytes() == FULL + FULL + tail


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked for room")
@pytest.mark.parametrize("fails", [False, True])
def test_a_file_asks_for_its_room_at_once(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Files that grow in parallel would fragment; a refusal is not an error."""
    reserve, asked = os.posix_fallocate, []

    def ask(fd: int, offset: int, size: int) -> None:
        asked.append((offset, size))
        if fails:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        reserve(fd, offset, size)
        assert os.fstat(fd).st_size == 9004

    monkeypatch.setattr(local_writer, "set_direct_io", lambda fd, on: on)
    monkeypatch.setattr(local_writer, "clone_blocks", lambda *_: False)
    monkeypatch.setattr(os, "posix_fallocate", ask)
    assert copied(folder, destination, 0, 9000) == checkpoints.DATA[:9000]
    assert not asked, "the stretch does not begin where a block does"
    with (
        destination.writers.open("x.bin", 9004) as writer,
        LocalSource(folder).open("data.bin") as reader,
    ):
        list(writer.copy_from(reader, 0, 9000))
        assert asked == [(0, 9004)]
        writer.write(memoryview(b"tail"))
        destination.commit_file("x.bin", writer.finish())
    assert (destination.root / "x.bin").read_bytes() == checkpoints.DATA[:9000] + b"tail"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_write_that_fails_before_a_copy(
    folder: Path, destination: LocalDestination, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """An error of a write is not taken for the kernel's refusal to copy."""
    write, calls = os.write, []

    def refuse(fd: int, data: memoryview) -> int:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code))
        return write(fd, data)

    monkeypatch.setattr(local_writer, "set_direct_io", lambda fd, on: False)
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        copied(folder, destination, 3, 20_000)
    assert destination.existing() == {}


@pytest.mark.parametrize("largest", [0, 512, 999])
def test_a_disk_that_refuses_such_writes(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """If its blocks are larger, or a write is short, the page cache is used."""
    state = {"uncached": False}

    def switch(fd: int, on: bool) -> bool:
        state["uncached"] = on
        return on

    def write(fd: int, data: memoryview) -> int:
        if state["uncached"] and not largest:
            raise OSError(errno.EINVAL, "Invalid argument")
        assert not (state["uncached"] and len(data) % 4096)
        return real(fd, data[:largest] if state["uncached"] else data)

    real = os.write
    monkeypatch.setattr(local_writer, "set_direct_io", switch)
    monkeypatch.setattr(os, "write", write)
    with destination.writers.open("x.bin", 2 * local_writer.BUFFER + 5) as writer:
        writer.write(memoryview(FULL + FULL + b"12345"))
        made = writer.finish()
    monkeypatch.undo()
    destination.commit_file("x.bin", made)
    assert (destination.root / "x.bin").read_bytes() == FULL + FULL + b"12345"


def test_what_fails_in_the_writing_thread_ends_the_file(
    destination: LocalDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next write raises the error, and no file or thread is left."""

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(OSError, match="No space"),
        destination.writers.open("x.bin", 9 * local_writer.BUFFER) as writer,
    ):
        for _ in range(3):  # the first is in progress, and the second waits for it
            writer.write(memoryview(FULL))
        pytest.fail("nobody noticed")
    assert not [t for t in threading.enumerate() if t.name.startswith("moescale-write")]
    assert not list((destination.root / STATE).glob("*.tmp"))


def test_a_digest_is_that_of_all_bytes(destination: LocalDestination) -> None:
    """The writing thread computes it, piece by piece."""
    with destination.writers.open("x.bin", 2 * local_writer.BUFFER + 3, digest=True) as writer:
        writer.write(memoryview(FULL + FULL + b"123"))
        made = writer.finish()
    assert made.record.sha256 == hashlib.sha256(FULL + FULL + b"123").hexdigest()
