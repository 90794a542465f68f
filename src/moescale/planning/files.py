"""The action for each file of the source: rewrite, edit, copy or leave out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moescale.checkpoint.stored_provenance import PROVENANCE as PROVENANCE
from moescale.errors import CheckpointError
from moescale.families.config import CONFIG
from moescale.storage.base import FileInfo

Action = Literal["rewrite", "copy", "edit", "create", "skip"]

CARD = "README.md"
"""The output's description for people; `PROVENANCE` is the one for programs."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """The action for one file.

    Attributes:
        name: path in the checkpoint.
        size: bytes of the file in the source; None if it is new.
        action: what a run does with it.
        why: the reason why it is left out; None for other actions.
    """

    name: str
    size: int | None
    action: Action
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The file as ``--dry-run --json`` prints it."""
        return {"name": self.name, "size": self.size, "action": self.action, "why": self.why}


def plan_files(
    files: Mapping[str, FileInfo],
    shards: Iterable[str],
    changed: Iterable[str],
    index: str | None,
    config_changes: bool,
    edited: Collection[str],
    left_out: Mapping[str, str],
) -> tuple[PlannedFile, ...]:
    """One row for each file of the source and each new file.

    Args:
        files: the source's files.
        shards: the names of the shards.
        changed: those of them in which a tensor changes.
        index: the name of the output's index; None for a single shard.
        config_changes: whether the config's text changes.
        edited: other small files that change.
        left_out: files that do not belong in the output, each with the reason.

    Raises:
        CheckpointError: the source has a folder with the name of a new file.
    """
    actions: dict[str, Action] = dict.fromkeys(shards, "copy")
    actions |= dict.fromkeys(changed, "rewrite")
    actions[CONFIG] = "edit" if config_changes else "copy"
    actions |= dict.fromkeys(edited, "edit")
    actions[CARD] = "edit" if CARD in files else "create"
    actions[PROVENANCE] = "create"
    if index is not None:
        actions[index] = "copy" if index in files else "create"
    rows = []
    for name in sorted(files.keys() | actions.keys()):
        size = files[name].size if name in files else None
        why = left_out.get(name)
        rows.append(PlannedFile(name, size, "skip" if why else actions.get(name, "copy"), why))
    _check_folders({row.name for row in rows if row.action != "skip"})
    return tuple(rows)


def _check_folders(names: Collection[str]) -> None:
    for name in names:
        for slash in re.finditer("/", name):
            if (folder := name[: slash.start()]) in names:
                raise CheckpointError(
                    f"{folder}: is a folder, but the output needs a file of this name",
                    hint="Remove or rename the folder.",
                )


def left_out_warnings(files: Iterable[PlannedFile]) -> list[str]:
    """Warnings about the files left out, one for each reason."""
    names: dict[str, list[str]] = {}
    for file in files:
        if file.action == "skip":
            names.setdefault(file.why or "", []).append(file.name)
    return [f"left out: {_some(found)}: {why}" for why, found in names.items()]


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
