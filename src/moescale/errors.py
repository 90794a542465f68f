"""Everything that moescale raises on purpose.

::

    MoescaleError                  something failed
    ├── UsageError                 a value that is wrong by itself
    ├── SourceError                the source cannot be used, nothing was written
    │   ├── CheckpointError        a file of the checkpoint is not what it should be
    │   └── UnsupportedError       the checkpoint is well formed, but cannot be rescaled so
    ├── DestinationError           the destination holds something else or cannot take the output
    ├── RewriteError               a shard could not be rewritten
    ├── VerificationError          the output is not what the plan says
    ├── TemporaryError             a rerun of the same command resumes
    └── InterruptedRun             the user stopped the run; a rerun resumes
"""

from __future__ import annotations

from typing import ClassVar

LONGEST = 800
"""Characters of a message; names and values in it come from files that anybody wrote."""


def printable(text: str, most: int = LONGEST) -> str:
    """The text on one line, without what steers a terminal, its middle left out if it is long."""
    if len(text) > most:
        text = f"{text[: most * 3 // 4]} ... {text[len(text) - most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_text(count: float) -> str:
    """A number of bytes for people, in powers of 1,000 as the Hub shows them."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


class MoescaleError(Exception):
    """A failure that a user can act on: what and why in one line, what to do in a second."""

    advice: ClassVar[str | None] = None
    """What to do where an error has no hint of its own."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """`message` says what failed, on which object and why; `hint` what to do about it."""
        message = printable(message)
        super().__init__(message)
        self.message = message
        self.hint = printable(hint) if hint else self.advice

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UsageError(MoescaleError):
    """A value is wrong by itself, whatever the source, or two do not go together.

    Raised before anything is read; but for factors that are not those of the source's layers.
    """


class SourceError(MoescaleError):
    """The source cannot be used; nothing was written.

    Raised where it is not there, is not a checkpoint, or may not be read.
    """


class CheckpointError(SourceError):
    """A file of the checkpoint is malformed or does not fit the others.

    Raised while a plan is made: for a config, an index, a header, a missing shard or expert.
    """


class UnsupportedError(SourceError):
    """The checkpoint is well formed, but what was asked for cannot be done to it exactly.

    Raised while a plan is made: for a model type, a tensor format, a number of experts or a factor.
    """


class DestinationError(MoescaleError):
    """The destination holds something else, or cannot take the output.

    Raised before the first shard; what was there is untouched. `moescale.plan` says it as a
    warning.
    """


class RewriteError(MoescaleError):
    """A shard could not be rewritten as planned.

    Raised in the middle of a run: the source changed, a value would overflow, the disk is full.
    The output does not load; what is finished of it is used by the next run.
    """


class VerificationError(MoescaleError):
    """The output differs from what the plan says.

    Raised by `moescale.verify`, and by `moescale.convert` with ``verify=True``.

    Attributes:
        files: the names of all files that differ, are missing or do not belong there; empty where
            the output was made with other options.
    """

    advice = "--verify --overwrite writes the files that differ again, and proves the output."

    def __init__(
        self, message: str, *, hint: str | None = None, files: tuple[str, ...] = ()
    ) -> None:
        """See `MoescaleError`."""
        super().__init__(message, hint=hint)
        self.files = files


class TemporaryError(MoescaleError):
    """Something outside failed for now; the same command resumes.

    Raised where the Hub or a cluster does not answer after several attempts.
    """


class InterruptedRun(MoescaleError):  # noqa: N818 - it is an answer to the user, not a fault
    """The user stopped the run; the same command resumes.

    What the command makes of Ctrl-C. From Python that is a `KeyboardInterrupt`; this one comes out
    of a call only where somebody else stopped a part of it, such as a task of a cluster.
    """
