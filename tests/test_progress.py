"""Progress: a bar for all and one a file on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moescale.report import terminal

SIZES = {"model-1.safetensors": 4_000_000, "model-2.safetensors": 3_000_000, "tiny.json": 100}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show everything at once, as a slow run does."""
    monkeypatch.setattr(terminal, "BAR_DELAY", 0)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


def bars(progress: terminal.Progress) -> dict[str, Any]:
    """The bars of the files, by name."""
    return dict(progress._bars)


def test_a_terminal_shows_a_bar_for_all_and_one_a_file() -> None:
    """Each file on its way has a bar with bytes, rate and remaining time, beside that for all."""
    stream = Terminal()
    with terminal.Progress(stream) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        progress.step("model-2.safetensors", 1_000_000)
        assert [-bar.pos for bar in bars(progress).values()] == [1, 2]
        for bar in bars(progress).values():
            bar.refresh()
    text = stream.getvalue()
    assert re.search(r"all: +\d+%.*7\.00M", text)
    assert re.search(r"model-1\.safetensors: +25%.*1\.00M/4\.00M \[\d\d:\d\d<.*B/s\]", text)
    assert re.search(r"model-2\.safetensors: +33%", text)


def test_a_finished_file_makes_room() -> None:
    """There are never more bars than files on their way; a free line is used again."""
    with terminal.Progress(Terminal()) as progress:
        progress.expect(SIZES)
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
    """While the output is verified, each file is on its way once more."""
    with terminal.Progress(Terminal()) as progress:
        progress.expect(SIZES, passes=2)
        for _ in range(2):
            progress.step("model-1.safetensors", 1_000_000)
            assert bars(progress)["model-1.safetensors"].n == 1_000_000
            progress.step("model-1.safetensors", 3_000_000)
            assert not bars(progress)
        assert progress._bar is not None
        assert (progress._bar.n, progress._bar.total) == (8_000_000, 2 * sum(SIZES.values()))


def test_what_was_there_already_is_counted_without_a_bar() -> None:
    """The finished files of an earlier run are added to the bar for all at once."""
    with terminal.Progress(Terminal()) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 4_000_000)
        assert not bars(progress)
        assert progress._bar is not None
        assert progress._bar.n == 4_000_000


def test_threads_may_step_at_once() -> None:
    """No byte is lost when several files move at the same time."""
    sizes = {f"{number}.safetensors": 1000 for number in range(16)}
    with terminal.Progress(Terminal()) as progress:
        progress.expect(sizes)

        def one(name: str) -> None:
            for _ in range(100):
                progress.step(name, 10)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, sizes))
        assert not bars(progress)
        assert progress._bar is not None
        assert progress._bar.n == 16_000


def test_the_bars_go_when_a_run_fails() -> None:
    """An error in the middle leaves no bar behind."""
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), terminal.Progress(stream) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 1)
        raise ZeroDivisionError
    assert stream.getvalue().endswith("\r")


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_bars_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """HF_HUB_DISABLE_PROGRESS_BARS turns the bars into lines."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    stream = Terminal()
    with terminal.Progress(stream) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 1_000_000)
    assert stream.getvalue().startswith("1.0 MB of 7.0 MB, ")


def test_without_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log gets a line with bytes, rate and remaining time, and not more often than set."""
    stream = io.StringIO()
    with terminal.Progress(stream) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 1_000_000)
        monkeypatch.setattr(terminal, "LINE_SECONDS", 30)
        progress.step("model-1.safetensors", 1_000_000)
    assert re.fullmatch(r"1\.0 MB of 7\.0 MB, .*B/s, \d+ s left\n", stream.getvalue())


def test_silence_is_kept() -> None:
    """Without a stream nothing is shown, and steps are counted all the same."""
    with terminal.Progress(None) as progress:
        progress.expect(SIZES)
        progress.step("model-1.safetensors", 5)
        assert progress._done == 5


def test_a_rule_that_samples_routers_is_told_of_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At first nothing is shown; after that, layers done and in all."""
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "BAR_DELAY", 60)
        terminal.measuring(stream, "gates")(1, 58)
    assert stream.getvalue() == ""
    tell = terminal.measuring(stream, "gates")
    tell(3, 58)
    tell(58, 58)
    assert stream.getvalue() == "measuring: 3 of 58 layers\rmeasuring: 58 of 58 layers\n"
