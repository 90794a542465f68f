"""The small files of an output: card, config, index, and edited files."""

from __future__ import annotations

import hashlib

from moescale.families.config import CONFIG
from moescale.planning.files import CARD
from moescale.planning.plan import Plan
from moescale.storage.base import FileRecord, Source


def small_files(plan: Plan, source: Source) -> dict[str, bytes]:
    """The generated and edited files, and the index."""
    index, made = plan.index or ("", b"")
    first = {} if made is not None else {index: source.read(index)}
    return {**first, **generated_files(plan, source)}


def generated_files(plan: Plan, source: Source) -> dict[str, bytes]:
    """The generated and edited files: card, config, and an index if the source has none."""
    result = {}
    if (row := next((f for f in plan.files if f.name == CARD), None)) is not None:
        from moescale.conversion import card  # imported here: YAML slows start-up

        result[CARD] = card.render(plan, source.read(CARD) if row.action == "edit" else None)
    if plan.index is not None and plan.index[1] is not None:
        result[plan.index[0]] = plan.index[1]
    return {**result, **plan.edited_files, **({} if plan.config is None else {CONFIG: plan.config})}


def record_of(data: bytes) -> FileRecord:
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())
