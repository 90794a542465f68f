"""What happens to each file of the source: which are shards, which stay, which are left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from moescale.checkpoint.index import SUFFIX
from moescale.errors import CheckpointError
from moescale.model.count import CONFIG
from moescale.repos.base import FileInfo

Action = Literal["rewrite", "copy", "edit", "create", "skip"]

CARD = "README.md"
PROVENANCE = "moescale.json"
"""What the output says about itself, for people and for programs."""

SKIPPED: Mapping[str, str] = MappingProxyType(
    {
        "*.bin": "weights in another form, not rescaled",
        "*.bin.index.json": "index of weights in another form",
        "*.pt": "weights in another form, not rescaled",
        "*.pth": "weights in another form, not rescaled",
        "*.ckpt": "weights in another form, not rescaled",
        "*.gguf": "weights in another form, not rescaled",
        "*.ggml": "weights in another form, not rescaled",
        "*.h5": "weights in another form, not rescaled",
        "*.h5.index.json": "index of weights in another form",
        "*.msgpack": "weights in another form, not rescaled",
        "*.msgpack.index.json": "index of weights in another form",
        "*.onnx": "weights in another form, not rescaled",
        "*.onnx_data": "weights in another form, not rescaled",
        "*.tflite": "weights in another form, not rescaled",
        "consolidated*": "weights in another form, not rescaled",
        "original/*": "weights in another form, not rescaled",
        ".eval_results/*": "evaluation results of the source model",
    }
)
"""File name patterns that do not belong into the output, each with the reason."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """What happens to one file; `size` is that of the source's file, None where it has none."""

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
) -> tuple[PlannedFile, ...]:
    """One row for each file of the source and for each that is made.

    Args:
        files: the source's files.
        shards: the names of the shards.
        changed: those of them in which a tensor changes.
        index: the name of the index of the output, None for a single shard.
        config_changes: whether the config's text changes.

    Raises:
        CheckpointError: the source has a folder under the name of a file that is made.
    """
    actions: dict[str, Action] = dict.fromkeys(shards, "copy")
    actions |= dict.fromkeys(changed, "rewrite")
    actions[CONFIG] = "edit" if config_changes else "copy"
    actions[CARD] = "edit" if CARD in files else "create"
    actions[PROVENANCE] = "create"
    if index is not None:
        actions[index] = "copy" if index in files else "create"
    rows = []
    for name in sorted(files.keys() | actions.keys()):
        size = files[name].size if name in files else None
        action, why = actions.get(name, "copy"), None
        if name not in actions and (why := _skip_reason(name)):
            action = "skip"
        rows.append(PlannedFile(name, size, action, why))
    _check_folders({row.name for row in rows if row.action != "skip"})
    return tuple(rows)


def _check_folders(names: Collection[str]) -> None:
    for name in names:
        for slash in re.finditer("/", name):
            if (folder := name[: slash.start()]) in names:
                raise CheckpointError(
                    f"{folder}: is a folder, and the output needs a file of this name",
                    hint="Remove or rename the folder.",
                )


def _skip_reason(name: str) -> str | None:
    for pattern, reason in SKIPPED.items():
        if fnmatch.fnmatchcase(name, pattern):
            return reason
    if name.endswith(SUFFIX):
        return "not part of the checkpoint: the index does not list it"
    if name.endswith(SUFFIX + ".index.json"):
        return "an index of files that are left out"
    return None
