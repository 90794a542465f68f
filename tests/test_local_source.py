"""Directories that are read as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import checkpoints
import pytest

from moescale.errors import CheckpointError, RewriteError, SourceError
from moescale.repos import local_source
from moescale.repos.base import check_name
from moescale.repos.local_source import LocalSource


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
        "data.bin": len(checkpoints.DATA),
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
    assert source.read("data.bin") == checkpoints.DATA
    assert source.read("data.bin", 5, 7) == checkpoints.DATA[5:12]
    assert read(source, "data.bin", 300, 1000) == checkpoints.DATA[300:1300]


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
    assert read(LocalSource(folder), "data.bin", 3, 100) == checkpoints.DATA[3:103]


def test_a_file_that_ends_early_is_an_error(folder: Path) -> None:
    """Reading beyond the end names the file and the byte."""
    with pytest.raises(RewriteError, match=f"data.bin.*byte {len(checkpoints.DATA)}"):
        read(LocalSource(folder), "data.bin", len(checkpoints.DATA) - 5, 10)


@pytest.mark.parametrize("new", [b"short", checkpoints.DATA[::-1]])
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


# Links and other things ---------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_cache_is_a_source(tmp_path: Path) -> None:
    """Links into the blobs of the same repo are followed, and repo and commit are known."""
    repo, commit = tmp_path / "models--org--name-x", "0123456789" * 4
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / commit / "sub").mkdir(parents=True)
    (repo / "blobs" / "abc").write_bytes(checkpoints.DATA)
    (repo / "snapshots" / commit / "config.json").symlink_to("../../blobs/abc")
    (repo / "snapshots" / commit / "sub" / "x").symlink_to("../../../blobs/abc")
    source = LocalSource(repo / "snapshots" / commit)
    assert {name: info.size for name, info in source.files().items()} == {
        "config.json": len(checkpoints.DATA),
        "sub/x": len(checkpoints.DATA),
    }
    assert (source.identity.repo, source.identity.revision) == ("org/name-x", commit)
    assert source.identity.name == "org/name-x"
    assert read(source, "sub/x", 1, 5) == checkpoints.DATA[1:6]


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
    assert LocalSource(folder).read("copy.bin") == checkpoints.DATA


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
