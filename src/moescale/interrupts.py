"""Ctrl-C and SIGTERM: the first ends the run in order, the second at once; one line either way.

Nothing is lost by leaving at once: whatever the moment, the same command resumes.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from typing import NoReturn

MESSAGE = "interrupted; the same command resumes from what was finished"

EXIT_CODE = 130

GRACE_SECONDS = 2.0
"""How long an interrupted run may take to end by itself."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_exiting = threading.Lock()
_silenced = threading.Event()


def install_handlers() -> None:
    """Turn the signals into `KeyboardInterrupt`; where SIGINT is ignored (nohup), it stays so."""
    _silenced.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    """End the run; a thread that hangs in a request holds it up for a moment only."""
    for number in _NUMBERS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, exit_now)
    # Not by `threading`: the signal may have come while its lock for new threads was held.
    _thread.start_new_thread(_exit_later, ())
    raise KeyboardInterrupt


def _exit_later() -> NoReturn:
    time.sleep(GRACE_SECONDS)
    exit_now()


def exit_now(*_: object) -> NoReturn:
    """Say so, unless it is being said, and end the process."""
    _ignore()
    _exiting.acquire()  # for ever, where another thread is leaving already
    if not _silenced.is_set():
        with contextlib.suppress(OSError):  # past Python's buffers, which may be in use just now
            os.write(2, f"moescale: {MESSAGE}\n".encode())
    os._exit(EXIT_CODE)


def silence() -> None:
    """Leave the last word to the caller: further signals change nothing."""
    _ignore()
    _silenced.set()


def _ignore() -> None:
    if threading.get_ident() == threading.main_thread().ident:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)
