"""Progress: bars on a terminal, one bar in a notebook, otherwise lines of text now and then."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from moescale.errors import bytes_text
from moescale.storage.base import Phase, ignore
from moescale.storage.base import Progress as ProgressCallback

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 30.0
"""How often to print a line of progress without a terminal."""

BAR_DELAY = 0.5
"""Seconds before a bar appears."""

NARROW = 60
"""With fewer columns there is a single bar, with little more than the remaining time."""

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_NAME_LENGTH = 34
_FIGURES = 50
"""Columns that a bar needs besides the name."""

_SHORT = "{desc} {percentage:.0f}%, {remaining} left"
_MANY = 1000


class Progress:
    """A bar for each phase of a run and for each file in it; without a terminal, lines of text.

    Bars show bytes, rate and remaining time, and only appear after `BAR_DELAY`. Files of an earlier
    run count as bytes, but not for the rate. Without a `stream` nothing is shown.

    Attributes:
        seconds: the duration of each phase.
        resumed: bytes that an earlier run had written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._columns = _columns(stream)
        self._bar_limit = _find_bar_limit(stream, self._columns)
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        self._bars: dict[str, tqdm[Any]] = {}
        self._sizes: Mapping[str, int] = {}
        self._by_file: Counter[str] = Counter()
        self._phase = ""
        self._total = self._done = self.resumed = 0
        self._start = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for bar in (*self._bars.values(), *([self._bar] if self._bar else [])):
            bar.close()
        self._bar, self._bars = None, {}
        if self._phase:
            took = time.monotonic() - self._start
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + took

    def begin(self, phase: str, sizes: Mapping[str, int]) -> None:
        """Start a phase, given the number of bytes of each file in it."""
        self._end()
        self._phase, self._sizes, self._by_file = phase, sizes, Counter()
        self._total, self._done = sum(sizes.values()), 0
        self._start = self._last = time.monotonic()
        if self._bar_limit:
            self._bar = self._new_bar(phase, self._total, 0)

    def _new_bar(self, name: str, total: int, position: int) -> tqdm[Any]:
        bar: tqdm[Any] = self._bar_class()(
            total=total,
            desc=_bar_label(name, self._columns),
            position=position,
            unit="B",
            unit_scale=True,
            file=self._stream,
            delay=BAR_DELAY,
            leave=False,
            dynamic_ncols=True,
            bar_format=_SHORT if self._columns < NARROW else None,
        )
        return bar

    def _bar_class(self) -> Any:
        from tqdm import tqdm

        return tqdm

    def step(self, name: str, count: int) -> None:
        """Count bytes of a file; called from several threads."""
        with self._lock:
            # Complete files that come first are those of an earlier run.
            first = self._phase == "writing" and self.resumed == self._done
            resumed = first and count >= self._sizes.get(name, 0)
            self._done += count
            self._by_file[name] += count
            self.resumed += count * resumed
            if self._bar is not None:
                self._move(self._bar, count, resumed)
                if self._bar_limit > 1:
                    self._step_file(name, count)
                return
            now = time.monotonic()
            if self._stream is not None and now - self._last >= LINE_SECONDS:
                self._last = now
                print(self._line(now), file=self._stream, flush=True)

    @staticmethod
    def _move(bar: tqdm[Any], count: int, resumed: bool) -> None:
        if resumed:
            bar.initial += count
            bar.last_print_n += count
            bar.n += count
        else:
            bar.update(count)

    def _step_file(self, name: str, count: int) -> None:
        length = self._sizes.get(name, 0)
        bar = self._bars.pop(name, None)
        if bar is None:
            if count >= length:  # of an earlier run, or done in one piece
                return
            used = {-other.pos for other in self._bars.values()}
            free = next(number for number in itertools.count(1) if number not in used)
            bar = self._new_bar(name, length, free)
        bar.update(count)
        if bar.n >= length:
            bar.close()
        else:
            self._bars[name] = bar

    def _line(self, now: float) -> str:
        new = self._done - (self.resumed if self._phase == "writing" else 0)
        rate = new / (now - self._start)
        left = _duration((self._total - self._done) / rate) if rate else "?"
        done = f"{bytes_text(self._done)} of {bytes_text(self._total)}"
        return f"{self._phase}: {done}, {bytes_text(rate)}/s, {left} left"

    def unfinished_text(self) -> str | None:
        """The work that would be lost by interrupting now; None if nothing was begun."""
        if not self._done:
            return None
        if self._phase != "writing":
            return "All files are written; only the verification has to be repeated."
        whole = sum(length for name, length in self._sizes.items() if self._by_file[name] >= length)
        done, again = bytes_text(whole), bytes_text(self._done - whole)
        return (
            f"{done} of {bytes_text(self._total)} are finished; {again} of unfinished shards will"
            " be written again."
        )


class CellProgress(Progress):
    """One bar as `tqdm.auto` draws it: a widget in a notebook that supports it, otherwise text."""

    def __init__(self) -> None:
        super().__init__(None)
        self._columns, self._bar_limit = 80, 0 if _switched_off() else 1

    def _bar_class(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing widgets
            from tqdm.auto import tqdm
        return tqdm


@contextmanager
def progress_callbacks(
    progress: ProgressCallback | bool | None, phase: Phase = ignore
) -> Iterator[tuple[ProgressCallback, Phase]]:
    """The callbacks of a run: those of the caller, or of a bar.

    Args:
        progress: a callback; True shows a bar, None shows one in a notebook only.
        phase: the caller's callback, called in any case.
    """
    if callable(progress):
        yield progress, phase
    elif progress or (progress is None and in_notebook()):
        with CellProgress() as bar:

            def begin(name: str, sizes: Mapping[str, int]) -> None:
                bar.begin(name, sizes)
                phase(name, sizes)

            yield bar.step, begin
    else:
        yield ignore, phase


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def _find_bar_limit(stream: TextIO | None, columns: int) -> int:
    """How many bars the stream can show: none without a terminal, one in a notebook."""
    if stream is None or not stream.isatty() or _switched_off() or os.environ.get("TERM") == "dumb":
        return 0
    cell = "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")
    return 1 if cell or columns < NARROW else _MANY


def _switched_off() -> bool:
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in _TRUE


def _columns(stream: TextIO | None) -> int:
    try:
        return (os.get_terminal_size(stream.fileno()).columns if stream else 0) or 80
    except (OSError, ValueError):
        return 80


def _bar_label(name: str, columns: int) -> str:
    """The name of a file, shortened to its end, which distinguishes shards."""
    room = max(12, min(_NAME_LENGTH, columns - _FIGURES))
    return name if len(name) <= room else name.removesuffix(".safetensors")[-room:]


def _duration(seconds: float) -> str:
    """A duration in one or two units."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_FEWEST_TOKENS = 2_048
"""The shortest text for a run of the model, and more than the layers of any model."""


def measuring_printer(stream: TextIO | None) -> Callable[[int, int], None]:
    """A callback that prints the progress of a rule: continuously on a terminal, else rarely."""
    start = last = time.monotonic()
    moves = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if stream is None or now - start < BAR_DELAY:
            return
        if now - last < LINE_SECONDS and not moves:
            return
        last = now
        unit = "layers" if total < _FEWEST_TOKENS else "tokens"
        end = "\n" if done == total or not moves else "\r"
        print(f"measuring: {done:,} of {total:,} {unit}", end=end, file=stream, flush=True)

    return report
