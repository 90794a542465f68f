"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support import checkpoints, known_faults
from support.command import Command, Done, exit_code
from support.hub_checkpoints import Lab, laboratory

settings.register_profile("moescale", deadline=None)  # a busy machine must not fail a test
settings.load_profile("moescale")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as after & or nohup
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # otherwise child processes would ignore it too

TORCH = ("torch", "transformers", "bitsandbytes")
"""Modules that an environment without torch lacks."""

SET_BY_THE_COMMAND = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY", "OPENBLAS_NUM_THREADS")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--no-torch`, which skips whatever imports torch and lists it."""
    parser.addoption("--no-torch", action="store_true", help="leave out the files that need torch")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `--no-torch`, skip a file that cannot be imported without torch."""
    report = yield
    if re.search(rf"No module named '({'|'.join(TORCH)})'", str(report.longrepr)):
        _leave_out(collector, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test that imports torch later."""
    report = yield
    if call.excinfo and getattr(call.excinfo.value, "name", "") in TORCH:
        _leave_out(item, report)
    return report


def _leave_out(
    node: pytest.Item | pytest.Collector, report: pytest.TestReport | pytest.CollectReport
) -> None:
    if node.config.getoption("--no-torch"):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 1, "Skipped: needs torch, and --no-torch was given")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect a test to fail with a known fault of another project."""
    for fault in known_faults.HERE:
        mark = pytest.mark.xfail(raises=fault.raises, reason=str(fault), strict=True)
        for item in items:
            if fault.is_met_by(item.nodeid):
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Reset the environment variables that the command sets for its process."""
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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach the Hub or get coloured output."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")  # which the command sets otherwise
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def moescale(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process."""

    def run(*arguments: object) -> Done:
        code = exit_code(monkeypatch, *arguments)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A Hub lab without a Hub so far."""
    with laboratory(tmp_path, monkeypatch) as lab:
        yield lab


@pytest.fixture
def one_thread() -> None:
    """Keep torch on one thread: several would wait for each other on a busy machine."""
    import torch  # imported here, since most tests do not need it

    torch.set_num_threads(1)
