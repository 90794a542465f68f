"""The command, also as ``python -m moescale``."""

import os
import sys


def main() -> None:
    """Import what takes time where Ctrl-C is heard, and run the command."""
    try:
        from moescale.cli import main as command
    except KeyboardInterrupt:
        print("moescale: interrupted before anything was done", file=sys.stderr, flush=True)
        os._exit(130)  # what is half imported may fail on its way out
    command()


if __name__ == "__main__":
    main()
