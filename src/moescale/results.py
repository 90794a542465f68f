"""The results of `convert`, `verify` and `record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moescale.checkpoint.rounding import Rounding
from moescale.errors import printable
from moescale.planning.plan import Plan

Status = Literal[
    "new", "resume", "replace", "repair", "done", "stale", "changed", "outdated", "nothing"
]
"""What a run finds and does; `Result` explains each value."""


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The result of a run.

    Attributes:
        plan: the plan.
        status: ``new``: the destination was empty. ``resume``: an unfinished run was continued.
            ``replace``: existing content was replaced. ``repair``: files that differed were
            rewritten. ``done``: nothing was left to do. ``nothing``: the output would equal the
            source, so nothing was written. Three only occur in a verification: ``stale``: done,
            but the source has changed since, or at least its modification times. ``changed``:
            done, but a file of the output, perhaps its provenance, was changed or lost since.
            ``outdated``: made with the same options, but from other files than the source has now;
            the verification names them.
        verified: whether the output was read again and compared.
        url: the page of the output, if it is on the Hub.
        remarks: notes for the user.
        rounding: the effect of rounding block scales, by tensor, if this run wrote any (GGUF).
        warnings: problems found in the weights while writing.
    """

    plan: Plan
    status: Status
    verified: bool
    url: str | None = None
    remarks: tuple[str, ...] = ()
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The outcome, and the plan in a few lines."""
        return f"<Result {self._outcome()}\n{self.plan!r}>"

    def _repr_html_(self) -> str | None:
        """The HTML for a notebook."""
        import html  # only notebooks need it

        shown = self.plan._repr_html_()
        return shown and f"<p><b>{html.escape(self._outcome())}</b></p>\n{shown}"

    def _outcome(self) -> str:
        words = (self.status, "verified" if self.verified else "not verified", self.url or "")
        return printable(", ".join(filter(None, words)), 150)


@dataclass(frozen=True, slots=True)
class Record:
    """How an output was made, according to its provenance.

    Attributes:
        output: its location.
        content: the content of its provenance.
        options: its options, spelled as in the API; None if they are malformed.
        differences: the files that have changed since they were written, and how.
        read: how many files were compared by SHA-256.
        sized: how many files were compared by size only.
    """

    output: str
    content: Mapping[str, Any]
    options: str | None
    differences: Mapping[str, str]
    read: int
    sized: int

    def as_json(self) -> dict[str, Any]:
        """As ``--dry-run --json`` prints it for an output."""
        words = {key: value for key, value in self.content.items() if key != "files"}
        files = {"differ": dict(self.differences), "read": self.read, "sized": self.sized}
        return {"output": self.output, "record": words, "files": files}
