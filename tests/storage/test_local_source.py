"""Directories as a source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import checkpoints

from moescale.errors import CheckpointError, RewriteError, SourceError
from moescale.storage import reader as files
from moescale.storage.base import check_name
from moescale.storage.local.source import LocalSource


def read(source: LocalSource, name: str, start: int, size: int) -> bytes:
    """Read a part of a file through its reader."""
    buffer = memoryview(bytearray(size))
    with source.open(name) as reader:
        reader.read_into(buffer, start)
    return bytes(buffer)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "a/b.txt", ".gitattributes", "a..b", "caf\u00e9", "xy:z", "..."]
)
def test_plain_names_pass(name: str) -> None:
    """Any relative path inside the repo is valid."""
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
    """Bytes that are not UTF-8 cannot go into the provenance, so they are an error at once."""
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
    """Tool folders at the top are not read, and their links not checked; deeper ones are files."""
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
    """A missing path and a file are refused, each with its reason."""
    with pytest.raises(SourceError, match=f"{name}: {why}"):
        LocalSource(folder.parent / name)


def test_reads_stretches_and_whole_files(folder: Path) -> None:
    """`read` and the reader both give the bytes of the file."""
    source = LocalSource(folder)
    assert source.read("data.bin") == checkpoints.DATA
    assert source.read("data.bin", 5, 7) == checkpoints.DATA[5:12]
    assert read(source, "data.bin", 300, 1000) == checkpoints.DATA[300:1300]


def test_a_large_file_is_not_read_whole(folder: Path) -> None:
    """A config of many gigabytes is refused without reading it."""
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="too many"):
        LocalSource(folder).read("config.json")


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system returns fewer bytes than requested, the rest is requested again."""
    whole = files._read_at
    monkeypatch.setattr(files, "_read_at", lambda fd, buffer, at: whole(fd, buffer[:7], at))
    assert read(LocalSource(folder), "data.bin", 3, 100) == checkpoints.DATA[3:103]


def test_a_file_that_ends_early_is_an_error(folder: Path) -> None:
    """Reading beyond the end gives an error with the file and the byte."""
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
    """The file is checked again at the end."""
    source = LocalSource(folder)
    with pytest.raises(RewriteError, match="changed"), source.open("data.bin"):
        os.utime(folder / "data.bin", (1, 1))


# Links and special files --------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_cache_is_a_source(tmp_path: Path) -> None:
    """Links to the blobs of the same repo are followed, and repo and commit are known."""
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


def test_links_into_another_repo_of_the_cache_are_not_published(tmp_path: Path) -> None:
    """Only blobs of the same repo belong to it; other links lead to the user's own files."""
    for name in ("models--a--a", "models--b--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
    (tmp_path / "models--b--b" / "blobs" / "x").write_bytes(b"secret")
    snapshot = tmp_path / "models--a--a" / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../../models--b--b/blobs/x")
    assert LocalSource(snapshot).read("config.json") == b"secret"
    with pytest.raises(CheckpointError, match=r"'config\.json' is a link out"):
        LocalSource(snapshot, follow_links=False).files()


def test_blobs_may_lie_on_another_disk(tmp_path: Path) -> None:
    """The folder of blobs or a blob may be a link; a linked folder belongs to the cache."""
    cache, disk = tmp_path / "models--org--x", tmp_path / "disk"
    (cache / "snapshots" / "c").mkdir(parents=True)
    disk.mkdir()
    (disk / "abc").write_bytes(checkpoints.DATA)
    (cache / "blobs").symlink_to(disk)
    (cache / "snapshots" / "c" / "config.json").symlink_to("../../blobs/abc")
    strict = LocalSource(cache / "snapshots" / "c", follow_links=False)
    assert strict.read("config.json") == checkpoints.DATA
    (disk / "abc").rename(tmp_path / "far")
    (disk / "abc").symlink_to(tmp_path / "far")
    assert LocalSource(cache / "snapshots" / "c").read("config.json") == checkpoints.DATA


def test_links_inside_the_directory_are_files(folder: Path) -> None:
    """A link to a file of the same checkpoint is read as that file."""
    (folder / "copy.bin").symlink_to("data.bin")
    assert LocalSource(folder).read("copy.bin") == checkpoints.DATA


def test_a_source_that_is_itself_a_link_is_fine(folder: Path) -> None:
    """The path of the directory may be a link."""
    (folder.parent / "link").symlink_to(folder)
    assert len(LocalSource(folder.parent / "link").files()) == 3


@pytest.mark.parametrize("target", ["../outside", "{absolute}", "sub/../../outside"])
def test_links_out_of_the_directory_are_followed(folder: Path, target: str) -> None:
    """They are read as every loader does, but published only with --follow-links."""
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    (folder / "x").symlink_to(target.format(absolute=outside))
    source = LocalSource(folder)
    assert (source.read("x"), source.links) == (b"secret", {"x": outside})
    with pytest.raises(CheckpointError, match="'x' is a link out") as caught:
        LocalSource(folder, follow_links=False).files()
    assert "--follow-links" in str(caught.value)


def test_a_linked_shard_may_be_published(folder: Path) -> None:
    """A linked shard is part of the model; other content under a shard's name is not."""
    outside, link = folder.parent / "blob", folder / "model.safetensors"
    outside.write_bytes(checkpoints.shard({"a": checkpoints.values("F32", (2,))}))
    link.symlink_to(outside)
    assert LocalSource(folder, follow_links=False).read(link.name) == outside.read_bytes()
    outside.write_bytes(b"a private key, say")
    with pytest.raises(CheckpointError, match="published"):
        LocalSource(folder, follow_links=False).files()


@pytest.mark.parametrize("target", ["gone", "", "data.bin/x"])
@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00002.safetensors", "vocab.txt", "sub/tokenizer.model"]
)
def test_a_link_that_a_loader_needs_must_lead_somewhere(
    folder: Path, name: str, target: str
) -> None:
    """A dangling link and a link to itself are an incomplete checkpoint."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target or (folder / name).name)
    with pytest.raises(CheckpointError, match=f"{name!r} is a link that leads nowhere"):
        LocalSource(folder).files()


@pytest.mark.parametrize("name", [".#config.json", "gone.lock", "notes.txt", ".x.safetensors"])
def test_a_link_to_nothing_that_nobody_needs_is_left_out(folder: Path, name: str) -> None:
    """An editor's lock is not part of a model; a remark tells the user."""
    (folder / name).symlink_to("user@host.1234:99")
    source = LocalSource(folder)
    assert len(source.files()) == 3
    assert [name in remark for remark in source.remarks] == [True]


def test_linked_folders_are_followed(folder: Path) -> None:
    """Links inside and outside are followed; files outside need --follow-links to be published."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "b.txt").write_bytes(b"b")
    (folder / "x").symlink_to("sub", target_is_directory=True)
    (folder / "y").symlink_to(outside, target_is_directory=True)
    assert {"x/a.txt", "y/b.txt"} < LocalSource(folder).files().keys()
    with pytest.raises(CheckpointError, match="'y' is a link out"):
        LocalSource(folder, follow_links=False).files()


def test_folders_that_lead_round_in_a_circle_are_left_out(folder: Path) -> None:
    """A folder is not listed again inside itself, directly or through another link."""
    for name, target in (("sub/up", ".."), ("sub/z", "../other"), ("sub/self", ".")):
        (folder / name).symlink_to(target, target_is_directory=True)
    (folder / "other").mkdir()
    (folder / "other" / "back").symlink_to("../sub", target_is_directory=True)
    source = LocalSource(folder)
    names = source.files().keys()
    assert names == {"config.json", "data.bin", "sub/a.txt", "other/back/a.txt"}
    assert all("circle" in remark for remark in source.remarks)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(folder: Path) -> None:
    """Opening a pipe would block forever, so it is refused first."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(CheckpointError, match="'pipe' is not a regular file"):
        LocalSource(folder).files()
