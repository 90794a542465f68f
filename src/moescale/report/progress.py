"""Progress: bars on a terminal, one line in a notebook, a line of text now and then elsewhere."""

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
from moescale.storage.base import Phase
from moescale.storage.base import Progress as ProgressCallback

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 30.0
"""Without a terminal, progress is one line this often."""

BAR_DELAY = 0.5
"""Seconds; what takes less time shows no bar."""

NARROW = 60
"""With fewer columns there is one bar, which says how long it will take, and little else."""

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_NAME_LENGTH = 34
_FIGURES = 50
"""Columns that a bar takes beside the name."""

_SHORT = "{desc} {percentage:.0f}%, {remaining} left"
_MANY = 1000


class Progress:
    """A bar for all and one a file on its way; without a terminal a line now and then.

    Each shows bytes, rate and remaining time; nothing is shown for what takes less than half a
    second. Each phase of a run has its own. What an earlier run has done counts as bytes, not for
    the rate. `stream` None says nothing.

    Attributes:
        seconds: how long each phase took.
        there: bytes that an earlier run had written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._columns = _columns(stream)
        self._most = _most_bars(stream, self._columns)
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        self._bars: dict[str, tqdm[Any]] = {}
        self._sizes: Mapping[str, int] = {}
        self._of: Counter[str] = Counter()
        self._phase = ""
        self._total = self._done = self.there = 0
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
        """Start a phase, in which this many bytes of each file are gone through."""
        self._end()
        self._phase, self._sizes, self._of = phase, sizes, Counter()
        self._total, self._done = sum(sizes.values()), 0
        self._start = self._last = time.monotonic()
        if self._most:
            self._bar = self._new_bar(phase, self._total, 0)

    def _new_bar(self, name: str, total: int, position: int) -> tqdm[Any]:
        bar: tqdm[Any] = self._kind()(
            total=total,
            desc=_label(name, self._columns),
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

    def _kind(self) -> Any:
        from tqdm import tqdm

        return tqdm

    def step(self, name: str, count: int) -> None:
        """Count bytes of a file; called from several threads."""
        with self._lock:
            # whole files before anything else has moved are those of an earlier run
            first = self._phase == "writing" and self.there == self._done
            there = first and count >= self._sizes.get(name, 0)
            self._done += count
            self._of[name] += count
            self.there += count * there
            if self._bar is not None:
                self._move(self._bar, count, there)
                if self._most > 1:
                    self._step_file(name, count)
                return
            now = time.monotonic()
            if self._stream is not None and now - self._last >= LINE_SECONDS:
                self._last = now
                print(self._line(now), file=self._stream, flush=True)

    @staticmethod
    def _move(bar: tqdm[Any], count: int, there: bool) -> None:
        if there:
            bar.initial += count
            bar.last_print_n += count
            bar.n += count
        else:
            bar.update(count)

    def _step_file(self, name: str, count: int) -> None:
        length = self._sizes.get(name, 0)
        bar = self._bars.pop(name, None)
        if bar is None:
            if count >= length:  # it was there already, or came in one piece
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
        new = self._done - (self.there if self._phase == "writing" else 0)
        rate = new / (now - self._start)
        left = _duration((self._total - self._done) / rate) if rate else "?"
        done = f"{bytes_text(self._done)} of {bytes_text(self._total)}"
        return f"{self._phase}: {done}, {bytes_text(rate)}/s, {left} left"

    def lost(self) -> str | None:
        """What has to be done again, were it interrupted now; None where nothing was begun."""
        if not self._done:
            return None
        if self._phase != "writing":
            return "All is written; only the proof has to be done again."
        whole = sum(length for name, length in self._sizes.items() if self._of[name] >= length)
        done, again = bytes_text(whole), bytes_text(self._done - whole)
        return (
            f"{done} of {bytes_text(self._total)} are finished; {again} of shards that were begun"
            " will be done again."
        )


class CellProgress(Progress):
    """One bar, as tqdm draws it best: in a notebook a widget where there are any, else text."""

    def __init__(self) -> None:
        super().__init__(None)
        self._columns, self._most = 80, 0 if _switched_off() else 1

    def _kind(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no widgets is no fault
            from tqdm.auto import tqdm
        return tqdm


@contextmanager
def shown(
    progress: ProgressCallback | bool | None, phase: Phase = lambda name, sizes: None
) -> Iterator[tuple[ProgressCallback, Phase]]:
    """Who is told of a run: the caller, or the bar that is shown for it.

    Args:
        progress: what the caller gave; True shows a bar, None shows one in a notebook.
        phase: told of phases in any case.
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
        yield (lambda name, count: None), phase


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def _most_bars(stream: TextIO | None, columns: int) -> int:
    """How many bars can move: none where nothing does, one in a cell of a notebook."""
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


def _label(name: str, columns: int) -> str:
    """As much of a file's name as leaves room for the figures; its end tells shards apart."""
    room = max(12, min(_NAME_LENGTH, columns - _FIGURES))
    return name if len(name) <= room else name.removesuffix(".safetensors")[-room:]


def _duration(seconds: float) -> str:
    """A time for people, in one unit or two."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_FEWEST_TOKENS = 2_048
"""No text that a model is run on is shorter, and no model has so many layers."""


def measuring(stream: TextIO | None) -> Callable[[int, int], None]:
    """What tells of a rule at work: on a terminal soon, else now and then."""
    start = last = time.monotonic()
    moves = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"

    def tell(done: int, total: int) -> None:
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

    return tell
