"""All errors that moescale raises on purpose.

::

    MoescaleError                  something failed
    ├── UsageError                 a value is invalid, or two options exclude each other
    ├── SourceError                the source cannot be used; nothing was written
    │   ├── CheckpointError        a file of the checkpoint is malformed
    │   └── UnsupportedError       the checkpoint is well formed, but cannot be rescaled this way
    ├── DestinationError           the destination has other content, or cannot take the output
    ├── RewriteError               a shard could not be rewritten
    ├── VerificationError          the output differs from the plan
    ├── TemporaryError             a rerun of the same command resumes
    └── InterruptedRun             the run was stopped; a rerun resumes
"""

from __future__ import annotations

from typing import ClassVar

LONGEST = 800
"""Characters of a message; it may quote names and values from foreign files."""

LEAVE_FOLD_OUT = "Leave --fold out; the weights are scaled then."
"""The hint for a ``--fold`` that the model does not allow."""


def printable(text: str, most: int = LONGEST) -> str:
    """The text on one line, without control characters; the middle of a long text is left out."""
    if len(text) > most:
        text = f"{text[: most * 3 // 4]} ... {text[len(text) - most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_UNITS = ("B", "kB", "MB", "GB", "TB")


def one_line(error: BaseException) -> str:
    """An exception's message as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def bytes_text(count: float) -> str:
    """A number of bytes with a unit, in powers of 1,000 as on the Hub."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


class MoescaleError(Exception):
    """A failure that a user can act on.

    Attributes:
        message: one line: what failed, on which object and why.
        hint: one line: what to do; None if there is nothing to add.
        advice: the default hint of the class.
    """

    advice: ClassVar[str | None] = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Make both lines printable."""
        message = printable(message)
        super().__init__(message)
        self.message = message
        self.hint = printable(hint) if hint else self.advice

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UsageError(MoescaleError):
    """A value is wrong for any source, or two options exclude each other.

    Usually raised before anything is read; later if a value does not fit the source, such as
    factors for layers that it does not have.
    """


class SourceError(MoescaleError):
    """The source cannot be used.

    Raised if it does not exist, is not a checkpoint, or is not accessible. Nothing was written,
    unless it became inaccessible during a run; then the next run continues.
    """


class CheckpointError(SourceError):
    """A file of the checkpoint is malformed, or does not match the others.

    Usually raised during planning: for a config, an index, a header, a missing shard or expert.
    Scales of a Hub source are only read during a run.
    """


class UnsupportedError(SourceError):
    """The checkpoint is well formed, but cannot be rescaled exactly as requested.

    Raised during planning: for a model type, a tensor format, a number of experts or a factor.
    """


class DestinationError(MoescaleError):
    """The destination has other content, or cannot take the output.

    Usually raised before the first shard; existing content is untouched. Raised during a run if
    something else has changed the destination. `moescale.plan` turns it into a warning.
    """


class RewriteError(MoescaleError):
    """A shard could not be rewritten as planned.

    Raised during a run: the source changed, a value would overflow, the disk is full. The output
    does not load; the next run continues with its finished files.
    """


class VerificationError(MoescaleError):
    """The output differs from the plan.

    Raised by `moescale.verify`, and by `moescale.convert` with ``verify=True``.

    Attributes:
        files: the names of all files that differ, are missing or do not belong there; empty if the
            output was made with other options.
    """

    advice = "--verify --overwrite rewrites the files that differ, and verifies the output."

    def __init__(
        self, message: str, *, hint: str | None = None, files: tuple[str, ...] = ()
    ) -> None:
        """See `MoescaleError`."""
        super().__init__(message, hint=hint)
        self.files = files


class TemporaryError(MoescaleError):
    """The Hub or a cluster failed for now; the same command resumes.

    Raised if it does not answer after several attempts.
    """


class InterruptedRun(MoescaleError):  # noqa: N818 - an answer to the user, not a fault
    """The run was stopped; the same command resumes.

    The command raises it for Ctrl-C. In Python, Ctrl-C is a `KeyboardInterrupt`; a call raises this
    error only if somebody else stopped a part of it, such as a task of a cluster.
    """
