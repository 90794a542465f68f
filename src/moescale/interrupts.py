"""Ctrl-C and SIGTERM: the first signal shuts the run down cleanly, the second at once.

Both print one line. An immediate exit is safe at any time, since the same command resumes.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from typing import NoReturn

MESSAGE = "interrupted; the same command resumes"

EXIT_CODE = 130

GRACE_SECONDS = 2.0
"""How long an interrupted run may take to shut down cleanly."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_exiting = threading.Lock()
_silenced = threading.Event()


def install_handlers() -> None:
    """Turn the signals into `KeyboardInterrupt`; an ignored SIGINT (nohup) stays ignored."""
    _silenced.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    """End the run; a thread that hangs in a request delays it for `GRACE_SECONDS` at most."""
    for number in _NUMBERS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, exit_now)
    # Not with `threading`: the signal may arrive while its lock for new threads is held.
    _thread.start_new_thread(_exit_later, ())
    raise KeyboardInterrupt


def _exit_later() -> NoReturn:
    time.sleep(GRACE_SECONDS)
    exit_now()


def exit_now(*_: object) -> NoReturn:
    """Print the message, unless silenced, and end the process."""
    _ignore()
    _exiting.acquire()  # blocks forever if another thread already exits
    if not _silenced.is_set():
        with contextlib.suppress(OSError):  # bypasses Python's buffers, which may be in use
            os.write(2, f"moescale: {MESSAGE}\n".encode())
    os._exit(EXIT_CODE)


def silence() -> None:
    """Ignore further signals; the caller prints the message."""
    _ignore()
    _silenced.set()


def _ignore() -> None:
    if threading.get_ident() == threading.main_thread().ident:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)
