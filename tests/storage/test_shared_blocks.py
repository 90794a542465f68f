"""A file system with shared blocks: untouched bytes take no new blocks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import checkpoints

from moescale import convert

MIB = 1 << 20
IMAGE = 512 * MIB
PADDINGS, PADDING = 6, ("BF16", (4 * MIB,), b"\x3c" * (8 * MIB))
EXPERT = (MIB // 4,)
SLACK = 4 * MIB
"""Bytes for journals, directories, and blocks at the boundaries of tensors."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty XFS on a loop device."""
    maker = shutil.which("mkfs.xfs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if maker is None or sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs mkfs.xfs and the right to mount: no file system with shared blocks")
    image = tmp_path_factory.mktemp("image") / "xfs"
    with open(image, "wb") as file:
        file.truncate(IMAGE)
    subprocess.run([maker, "-q", str(image)], check=True)
    place = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a loop device here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
    image.unlink()


def used(place: Path) -> int:
    """The bytes in use on the file system of a path."""
    os.sync()
    return shutil.disk_usage(place).used


def test_new_blocks_are_those_of_the_changed_bytes(disk: Path) -> None:
    """If 4 of 52 MiB change, only about 4 MiB are new, and the bytes are right."""
    tensors = checkpoints.mixtral_tensors(layers=2, experts=4)
    routed = checkpoints.routed(tensors)
    for name in routed:
        tensors[name] = checkpoints.values("BF16", EXPERT)
    tensors |= {f"model.padding.{number}": PADDING for number in range(PADDINGS)}
    source = checkpoints.mixtral(disk / "source")
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    checkpoints.write_shards(source, tensors, 3)
    changed = sum(len(tensors[name][2]) for name in routed)
    before = used(disk)
    convert(source, disk / "output", experts=3)
    assert changed <= used(disk) - before < changed + SLACK
    for shard in source.glob("*.safetensors"):
        expected = checkpoints.rescaled(shard.read_bytes(), dict.fromkeys(routed, 1.5**0.5))
        assert (disk / "output" / shard.name).read_bytes() == expected
