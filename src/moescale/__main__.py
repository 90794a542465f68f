"""The entry point of the command, and of ``python -m moescale``."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys

from moescale import interrupts


def main() -> None:
    """Run the command, and end the process; Ctrl-C prints one line even during imports."""
    interrupts.install_handlers()
    gc.set_threshold(100_000, 50, 100)  # imports and plans make many objects without cycles
    status = 1

    def end_process() -> None:
        """Exit without freeing every object first, which would take another 0.04 s."""
        interrupts.silence()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(status)

    if not atexit._ncallbacks():  # otherwise it would come before a handler that exists already
        atexit.register(end_process)
    try:
        from moescale import cli

        cli.main()
    except KeyboardInterrupt:
        interrupts.exit_now()
    except SystemExit as exit_:
        status = int(exit_.code or 0)
        raise


if __name__ == "__main__":
    main()
