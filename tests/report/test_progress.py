"""Progress: one bar in total and one per file on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moescale.report import progress as progress_module
from moescale.report.progress import CellProgress, Progress, measuring_printer

SIZES = {"model-1.safetensors": 4_000_000, "model-2.safetensors": 3_000_000, "tiny.json": 100}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show everything without a delay, on a usual terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setattr(progress_module, "BAR_DELAY", 0)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


def bars(progress: Progress) -> dict[str, Any]:
    """The bars of the files, by name."""
    return dict(progress._bars)


def test_a_terminal_shows_a_bar_for_all_and_one_a_file() -> None:
    """Each file in progress has a bar with bytes, rate and remaining time, below the total."""
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        progress.step("model-2.safetensors", 1_000_000)
        assert [-bar.pos for bar in bars(progress).values()] == [1, 2]
        for bar in bars(progress).values():
            bar.refresh()
    text = stream.getvalue()
    assert re.search(r"writing: +\d+%.*7\.00M", text)
    assert re.search(r"model-1\.safetensors: +25%.*1\.00M/4\.00M \[\d\d:\d\d<.*B/s\]", text)
    assert re.search(r"model-2\.safetensors: +33%", text)


def test_a_finished_file_makes_room() -> None:
    """There are never more bars than files in progress; a free line is reused."""
    with Progress(Terminal()) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1)
        progress.step("model-2.safetensors", 1)
        progress.step("model-1.safetensors", 3_999_999)
        assert set(bars(progress)) == {"model-2.safetensors"}
        progress.step("tiny.json", 1)
        assert -bars(progress)["tiny.json"].pos == 1
        progress.step("model-2.safetensors", 2_999_999)
        progress.step("tiny.json", 99)
        assert not bars(progress)


def test_a_second_pass_has_bars_again() -> None:
    """Verification shows each file again, with its own rate."""
    with Progress(Terminal()) as progress:
        for phase in ("writing", "verifying"):
            progress.begin(phase, SIZES)
            progress.step("model-1.safetensors", 1_000_000)
            assert bars(progress)["model-1.safetensors"].n == 1_000_000
            progress.step("model-1.safetensors", 3_000_000)
            assert not bars(progress)
            assert progress._bar is not None
            assert (progress._bar.n, progress._bar.total) == (4_000_000, sum(SIZES.values()))
    assert progress.seconds.keys() == {"writing", "verifying"}


def test_what_was_there_already_is_counted_without_a_bar() -> None:
    """Finished files of an earlier run are added to the total at once."""
    with Progress(Terminal()) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 4_000_000)
        assert not bars(progress)
        assert progress._bar is not None
        assert progress._bar.n == 4_000_000


def test_threads_may_step_at_once() -> None:
    """No byte is lost if several files progress at the same time."""
    sizes = {f"{number}.safetensors": 1000 for number in range(16)}
    with Progress(Terminal()) as progress:
        progress.begin("writing", sizes)

        def one(name: str) -> None:
            for _ in range(100):
                progress.step(name, 10)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, sizes))
        assert not bars(progress)
        assert progress._bar is not None
        assert progress._bar.n == 16_000


def test_the_bars_go_when_a_run_fails() -> None:
    """An error during the run leaves no bar on the screen."""
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Progress(stream) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1)
        raise ZeroDivisionError
    assert stream.getvalue().endswith("\r")


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_bars_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """HF_HUB_DISABLE_PROGRESS_BARS turns the bars into lines."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
    assert stream.getvalue().startswith("writing: 1.0 MB of 7.0 MB, ")


def test_without_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log gets lines with bytes, rate and remaining time, at most one per interval."""
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        monkeypatch.setattr(progress_module, "LINE_SECONDS", 30)
        progress.step("model-1.safetensors", 1_000_000)
    assert re.fullmatch(r"writing: 1\.0 MB of 7\.0 MB, .*B/s, \d+ s left\n", stream.getvalue())


def test_a_dumb_terminal_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal that cannot move the cursor, such as an editor's shell, nothing moves."""
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin("verifying", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
    assert stream.getvalue().startswith("verifying: 1.0 MB of 7.0 MB, ")
    tell = measuring_printer(stream)
    tell(1, 2)
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [("JPY_PARENT_PID", "1"), ("MPLBACKEND", "module://matplotlib_inline.backend_inline")],
)
def test_a_cell_of_a_notebook_has_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the cursor cannot move up, only the total is shown, however many files are in progress."""
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        progress.step("model-2.safetensors", 1_000_000)
        assert not bars(progress)
    assert "writing: " in stream.getvalue()
    assert "\n" not in stream.getvalue() and "\x1b[A" not in stream.getvalue()


def test_the_api_has_one_line() -> None:
    """`moescale.convert` shows one bar of tqdm.auto, which is a widget where possible."""
    with CellProgress() as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        assert not bars(progress)
        assert progress._bar is not None and progress._bar.n == 1_000_000


def test_what_an_interruption_costs_is_said() -> None:
    """The text gives the finished bytes, and those of unfinished files that must be repeated."""
    with Progress(None) as progress:
        progress.begin("writing", SIZES)
        assert progress.unfinished_text() is None
        progress.step("model-1.safetensors", 4_000_000)
        progress.step("model-2.safetensors", 1_000_000)
        assert progress.unfinished_text() == (
            "4.0 MB of 7.0 MB are finished; 1.0 MB of unfinished shards will be written again."
        )
        progress.begin("verifying", SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        assert (
            progress.unfinished_text()
            == "All files are written; only the verification has to be repeated."
        )


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.6, "60 s"), (300, "5 min"), (7199, "2 h 0 min"), (9000, "2 h 30 min")]
)
def test_a_long_time_is_shown_in_minutes_and_hours(seconds: float, text: str) -> None:
    """Times above a minute or so are not given in seconds."""
    assert progress_module._duration(seconds) == text


def test_silence_is_kept() -> None:
    """Without a stream nothing is shown, but steps are counted."""
    with Progress(None) as progress:
        progress.begin("writing", SIZES)
        progress.step("model-1.safetensors", 5)
        assert progress._done == 5


def test_a_rule_that_takes_long_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output starts after a delay, and gives the layers done and their total."""
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(progress_module, "BAR_DELAY", 60)
        measuring_printer(stream)(1, 58)
    assert stream.getvalue() == ""
    tell = measuring_printer(stream)
    tell(3, 58)
    tell(58, 58)
    assert stream.getvalue() == "measuring: 3 of 58 layers\rmeasuring: 58 of 58 layers\n"
