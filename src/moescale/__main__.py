"""The entry point of the command, and of ``python -m moescale``."""

from __future__ import annotations

import atexit
import gc

from moescale import interrupts


def main() -> None:
    """Run the command; Ctrl-C prints one line even during imports."""
    atexit.register(gc.freeze)  # the last collection finds nothing of use, and takes 0.03 s
    interrupts.install_handlers()
    try:
        from moescale import cli
    except KeyboardInterrupt:
        interrupts.exit_now()
    cli.main()


if __name__ == "__main__":
    main()
