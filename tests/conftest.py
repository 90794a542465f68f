"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import known_faults
import pytest
from hypothesis import settings

settings.register_profile("moescale", deadline=None)  # a busy machine is no failure
settings.load_profile("moescale")

SET_BY_THE_COMMAND = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY", "OPENBLAS_NUM_THREADS")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What meets a fault of another project fails as that fault does, and nothing else."""
    for fault in known_faults.HERE:
        mark = pytest.mark.xfail(raises=fault.raises, reason=str(fault), strict=True)
        for item in items:
            if fault.is_met_by(item.nodeid):
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Whatever the command sets for its own process is gone when the next test starts."""
    before = {name: os.environ.get(name) for name in SET_BY_THE_COMMAND}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with some files of a checkpoint."""
    root = tmp_path / "model"
    files = {"config.json": b"{}", "data.bin": checkpoints.DATA, "sub/a.txt": b"a"}
    checkpoints.write_files(root, files)
    return root
