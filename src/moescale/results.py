"""What `convert` and `record` give back."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moescale.checkpoint.rounding import Rounding
from moescale.errors import printable
from moescale.planning.plan import Plan

Status = Literal[
    "new", "resume", "replace", "repair", "done", "stale", "changed", "outdated", "nothing"
]
"""What a run finds and does.

``new``: nothing was there. ``resume``: an unfinished run was continued. ``replace``: what was there
was written over. ``repair``: files that differed were written again. ``done``: there was nothing
left to do. ``nothing``: the output would be the source again, so nothing was written. ``stale``:
done, but the source has changed since, or at least its times have. ``changed``: done, but a file of
the output, perhaps the provenance, was changed or lost since. ``outdated``: made with the same
options of other files than the source has now, which a proof names.
"""


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """What came of a run.

    Attributes:
        plan: what was to be done.
        status: see `Status`; ``stale`` and ``changed`` only after a proof that all is right.
        verified: the output was read again and compared.
        url: where the output can be looked at, if it is on the Hub.
        remarks: what else there is to know.
        rounding: what the rounding of block scales did, by tensor, where this run wrote any (GGUF).
        warnings: what was found in the weights while they were written.
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
        """What a notebook shows."""
        shown = self.plan._repr_html_()
        return shown and f"<p><b>{html.escape(self._outcome())}</b></p>\n{shown}"

    def _outcome(self) -> str:
        said = (self.status, "verified" if self.verified else "not verified", self.url or "")
        return printable(", ".join(filter(None, said)), 150)


@dataclass(frozen=True, slots=True)
class Record:
    """What was done to an output, as its provenance has it.

    Attributes:
        place: where it is.
        content: of its provenance.
        options: in words, as the API takes them; None where they make no sense.
        differences: names of files, and how each is other than it was written.
        read: files that were read and compared with their SHA-256.
        sized: files of which only the size was compared.
    """

    place: str
    content: Mapping[str, Any]
    options: str | None
    differences: Mapping[str, str]
    read: int
    sized: int

    def as_json(self) -> dict[str, Any]:
        """As ``--dry-run --json`` prints it for an output."""
        said = {key: value for key, value in self.content.items() if key != "files"}
        files = {"differ": dict(self.differences), "read": self.read, "sized": self.sized}
        return {"output": self.place, "record": said, "files": files}
