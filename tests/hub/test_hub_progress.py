"""What a user sees during a run with the Hub, and the summary at its end."""

from __future__ import annotations

import io
import os
import pty
import re
import termios
from collections import Counter

import pytest
from support.hub_checkpoints import PLACE, SHARDS, SRC, Lab
from support.hub_faults import reset_upload, run, status, throttle

from moescale import convert
from moescale.errors import DestinationError
from moescale.report import progress as progress_module
from moescale.report.progress import Progress
from moescale.storage.hub.upload import CountedFile, MonotonicProgress


class Counts:
    """Sums the progress that a run reports."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def __call__(self, name: str, count: int) -> None:
        """Add a step of a file; steps are never negative."""
        assert count >= 0
        self.of[name] += count


@pytest.mark.parametrize("xet", [True, "http", False])
def test_every_byte_is_counted_once(lab: Lab, xet: bool | str) -> None:
    """The steps of a file sum up to its size, for every kind of upload and in a resumed run."""
    hub = lab.start(xet=xet)
    sizes = {name: len(data) for name, data in lab.source.items()}
    counts, resumed = Counts(), Counts()
    fault = hub.fault(("POST", "/commit/main"), status(403))
    with pytest.raises(DestinationError):
        convert(SRC, PLACE, experts=3, progress=counts)
    convert(SRC, PLACE, experts=3, progress=resumed)
    assert fault.fired == 1
    for found in (counts.of, resumed.of):
        assert found.keys() >= set(SHARDS)
        assert found == {name: sizes[name] for name in found}


def test_a_shard_is_half_done_when_its_upload_starts(lab: Lab) -> None:
    """Without xet, half of a byte counts when it is rewritten, the other half when it is sent."""
    hub = lab.start(xet=False)
    counts, seen = Counts(), []
    hub.fault(("PUT", "^cdn"), run(lambda: seen.append(dict(counts.of))), times=None)
    convert(SRC, PLACE, experts=3, jobs=1, progress=counts)
    sizes = [len(lab.source[name]) for name in SHARDS]
    assert len(seen) == len(SHARDS)
    for number, name in enumerate(SHARDS):
        assert sizes[number] // 2 <= seen[number][name] <= sizes[number]
        assert all(name not in earlier for earlier in seen[:number])


def test_an_upload_that_starts_again_is_counted_once(lab: Lab) -> None:
    """A part that is sent twice does not move the bar past its end."""
    hub = lab.start(xet=False, part_size=100_000)
    fault = hub.fault(("PUT", "^cdn"), reset_upload(50_000), nth=3)
    counts = Counts()
    convert(SRC, PLACE, experts=3, progress=counts)
    assert fault.fired == 1
    assert {n: counts.of[n] for n in SHARDS} == {n: len(lab.source[n]) for n in SHARDS}


def test_a_file_tells_how_far_it_was_read() -> None:
    """Bytes that are read again after a seek are not reported again."""
    steps: list[int] = []
    file = CountedFile(io.BytesIO(b"0123456789"), steps.append)
    assert (file.read(4), file.tell()) == (b"0123", 4)
    assert (file.seek(2), file.read()) == (2, b"23456789")
    assert (file.seek(0), file.read(None)) == (0, b"0123456789")
    assert steps == [4, 6]
    mark = MonotonicProgress(steps.append)
    for position in (0, 3, 2, 5):
        mark.advance_to(position)
    assert steps[2:] == [3, 2]


def test_a_terminal_shows_the_bars_until_the_upload_is_done(lab: Lab) -> None:
    """One bar per shard and one for all, with bytes, rate and remaining time; then the summary."""
    hub = lab.start(xet="http")
    figures = r" +\d+%\|.*\| [\d.]+[kM]/[\d.]+[kM] \[\d\d:\d\d<\d\d:\d\d, [\d.]+[kM]?B/s\]"
    bars = ["writing:" + figures, re.escape(SHARDS[0]) + ":" + figures]
    for number, rate in enumerate((500_000, 50_000)):  # a busy machine may miss a short download
        hub.log.clear()
        hub.fault(
            lambda r: r.host == "cdn" and r.headers["range"] != "bytes=0-32767",
            throttle(rate),
            times=None,
        )
        place = f"{PLACE}-{number}"
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (40, 120))
        with lab.start_child(SRC, place, "-k", "3", terminal=theirs, TERM="xterm") as process:
            os.close(theirs)
            shown = read_all(ours)
        assert process.returncode == 0, shown
        if all(re.search(bar, shown) for bar in bars):
            break
    for bar in bars:
        assert re.search(bar, shown), shown
    after = shown[shown.rindex(f"{place} written: ") :]
    assert "\x1b[A" not in after  # no bar moves any more
    assert re.search(r"[\d.]+ [kM]?B received\r\n", after)
    assert re.search(
        r"[\d.]+ [kM]?B of weights sent, [\d.]+ [kM]?B were already on the Hub\r\n", after
    )
    assert f"{hub.endpoint}/{place.removeprefix('hf://')}/commit/" in after


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, "model-00001-of-00002.safetensors: "),
        (80, "model-00001-of-00002: "),
        (60, "001-of-00002: "),
    ],
)
def test_a_narrow_terminal_shows_the_figures(
    monkeypatch: pytest.MonkeyPatch, columns: int, shown: str
) -> None:
    """Names are shortened to make room for bytes, rate and remaining time."""
    monkeypatch.setattr(progress_module, "BAR_DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (10, columns))
    with open(theirs, "w") as stream, Progress(stream) as progress:
        progress.begin("writing", {"model-00001-of-00002.safetensors": 8_000_000_000})
        progress.step("model-00001-of-00002.safetensors", 1_000_000_000)
        next(iter(progress._bars.values())).refresh()
    text = read_all(ours)
    assert shown in text
    assert re.search(r"1\.00G/8\.00G \[\d\d:\d\d<[\d:?]+, [\d.?]+\w?B/s\]", text)


def test_a_very_narrow_terminal_shows_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 40 columns one line gives the bytes done, the percentage and the remaining time."""
    monkeypatch.setattr(progress_module, "BAR_DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (10, 40))
    with open(theirs, "w") as stream, Progress(stream) as progress:
        progress.begin("verifying", {"model-00001-of-00002.safetensors": 8_000_000_000})
        progress.step("model-00001-of-00002.safetensors", 1_000_000_000)
        assert progress._bar is not None
        progress._bar.refresh()
    lines = read_all(ours).split("\r")
    assert any(re.match(r"verifying 12%, [\d:?]+ left", line) for line in lines), lines
    assert max(map(len, lines)) <= 40
    assert "\n" not in "".join(lines)


def read_all(fd: int) -> str:
    """Everything that is written to a terminal until its other end is closed."""
    found = b""
    try:
        while piece := os.read(fd, 1 << 16):
            found += piece
    except OSError:  # how Linux reports it
        pass
    os.close(fd)
    return found.decode()


def test_what_an_earlier_run_did_is_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards of an earlier run are shown, but do not count in the rate."""
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0)
    clock = iter([0.0, 0.0, 10.0, 20.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(stream)
    progress.begin("writing", {"a": 6_000_000, "b": 4_000_000})
    progress.step("a", 6_000_000)
    progress.step("b", 1_000_000)
    assert stream.getvalue().splitlines() == [
        "writing: 6.0 MB of 10.0 MB, 0 B/s, ? left",
        "writing: 7.0 MB of 10.0 MB, 50.0 kB/s, 60 s left",
    ]


def test_the_bar_for_all_knows_what_an_earlier_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, the total rate is that of this run alone."""
    monkeypatch.setattr(progress_module, "BAR_DELAY", 0)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with Progress(Terminal()) as progress:
        progress.begin("writing", {"a": 6_000_000_000, "b": 4_000_000})
        progress.step("a", 6_000_000_000)
        progress.step("b", 1_000_000)
        bar = progress._bar
        assert bar is not None
        assert (bar.n, bar.initial) == (6_001_000_000, 6_000_000_000)
