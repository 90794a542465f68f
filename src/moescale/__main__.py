"""The entry point, also of ``python -m moescale``."""

from __future__ import annotations

from moescale import interrupts


def main() -> None:
    """Run the command; Ctrl-C is one line from the first moment on, while imports go on too."""
    interrupts.install_handlers()
    try:
        from moescale import cli
    except KeyboardInterrupt:
        interrupts.exit_now()
    cli.main()


if __name__ == "__main__":
    main()
