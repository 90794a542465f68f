"""The entry point of the command, and of ``python -m moescale``."""

from __future__ import annotations

from moescale import interrupts


def main() -> None:
    """Run the command; Ctrl-C prints one line even during imports."""
    interrupts.install_handlers()
    try:
        from moescale import cli
    except KeyboardInterrupt:
        interrupts.exit_now()
    cli.main()


if __name__ == "__main__":
    main()
