"""``moescale.json``: what was done to which files, enough to redo it or to use its factors again.

It holds nothing that differs between two runs of the same job: no time, host, path or thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from typing import Any

from moescale.checkpoint.json_text import parse_lenient
from moescale.options import Options
from moescale.planning.plan import Plan
from moescale.repos.base import Written
from moescale.version import __version__


def provenance(plan: Plan, written: Mapping[str, Written]) -> dict[str, Any]:
    """The content of ``moescale.json``; `written` has all other files of the output."""
    return {
        "moescale": __version__,
        "source": {
            "kind": plan.source.kind,
            "id": plan.source.name,
            "revision": plan.source.revision,
        },
        "options": options_given(plan.options),
        **plan.decisions(),
        "counts": {
            "moe_layers": len(plan.factors),
            "tensors": len(plan.changed_tensors),
            "bytes_changed": plan.bytes_changed,
        },
        "files": [
            {"name": name, "size": written[name].size, "sha256": written[name].sha256}
            for name in sorted(written)
        ],
    }


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of ``moescale.json``."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def decode(data: bytes) -> Any:
    """What a ``moescale.json`` says; None if it is none."""
    try:
        content = parse_lenient(data.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def options_given(options: Options) -> dict[str, Any]:
    """The options that the user gave."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in given.items() if value is not None}


def same_job(one: Any, other: Mapping[str, Any]) -> bool:
    """Whether two provenances are of the same job; digests may be known in one of them only."""
    return bool(_without_digests(one) == _without_digests(other))


def _without_digests(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without_digests(v) for k, v in content.items() if k != "sha256"}
    if isinstance(content, (list, tuple)):  # JSON has no tuples
        return [_without_digests(item) for item in content]
    return content


def job(plan: Plan) -> dict[str, Any]:
    """What an unfinished run must have in common with this one to be continued."""
    digest = hashlib.sha256(plan.config)
    files, tensors = (f.as_json() for f in plan.files), (t.as_json() for t in plan.tensors)
    parts = chain([plan.decisions()], files, tensors)
    for part in parts:  # piece by piece, since they are many
        digest.update(json.dumps(part, sort_keys=True).encode())
    return {
        "version": __version__,
        "source": {
            "kind": plan.source.kind,
            "id": plan.source.name,
            "revision": plan.source.revision,
            "files": dict(plan.states),
        },
        "options": options_given(plan.options),
        **_measured(plan),
        "plan": digest.hexdigest(),
    }


def _measured(plan: Plan) -> dict[str, Any]:
    """What a run that goes on takes from here, since measuring again may give another digit."""
    if plan.options.method != "measured":
        return {}
    return {"factors": dict(plan.factors), "calibration": dict(plan.calibration)}


def job_difference(one: Any, other: Mapping[str, Any]) -> str:
    """Which part of two jobs differs, in words."""
    if not isinstance(one, dict):
        return "another program"
    names = {"version": "another version", "source": "another source, or it changed since"}
    for key in ("version", "source", "options"):
        if one.get(key) != other[key]:
            return names.get(key, "other options")
    return "another plan"
