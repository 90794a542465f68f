"""``moescale.json``: a record of the job, enough to redo it or to reuse its factors.

A GGUF file has it in its header. It is equal for two runs of the same job: it holds no time, host,
path or number of threads.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from typing import Any

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.json_text import parse_lenient
from moescale.errors import UsageError
from moescale.options import RUN_RULES, Options, factors_of, options_of
from moescale.planning.plan import Plan
from moescale.storage.base import FileRecord
from moescale.version import __version__


def provenance(plan: Plan, written: Mapping[str, FileRecord]) -> dict[str, Any]:
    """The content of ``moescale.json``; `written` has all other files of the output.

    If it is stored in a shard, it lists neither that shard nor files that are written later.
    """
    shards = {file.name for file in plan.large_files}
    listed = written.keys() & (shards - {plan.record} if plan.record in shards else written)
    return {
        "moescale": __version__,
        "source": {
            "kind": plan.source.kind,
            "id": plan.source.name,
            "revision": plan.source.revision,
        },
        "options": options_given(plan.options),
        "plan": decided(plan),
        **plan.decisions(),
        "counts": {
            "moe_layers": len(plan.factors),
            "tensors": len(plan.changed_tensors),
            "bytes_changed": plan.bytes_changed,
        },
        "files": [
            {"name": name, "size": written[name].size, "sha256": written[name].sha256}
            for name in sorted(listed)
        ],
    }


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of ``moescale.json``."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def decode(data: bytes) -> Any:
    """The content of a ``moescale.json``; None if the bytes are not one."""
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
    """Whether two provenances are of the same job.

    Digests are ignored, since one of them may lack them.
    """
    return bool(_without_digests(one) == _without_digests(other))


def _without_digests(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without_digests(v) for k, v in content.items() if k != "sha256"}
    if isinstance(content, (list, tuple)):  # JSON has no tuples
        return [_without_digests(item) for item in content]
    return content


def decided(plan: Plan) -> str:
    """SHA-256 of everything that decides the output's bytes, however the options were spelled.

    The contents of card and provenance are excluded: they hold the options as given.
    """
    digest = hashlib.sha256(plan.config or b"")
    if plan.keys:
        digest.update(json.dumps(dict(plan.keys)).encode())
    for name, data in sorted(plan.edits.items()):
        digest.update(json.dumps([name, data.decode()]).encode())
    files = ([f.name, f.action] for f in plan.files)
    tensors = map(_as_applied, plan.changed_tensors)
    for part in chain(files, tensors):  # one by one: there may be many
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def _as_applied(edit: TensorEdit) -> dict[str, Any]:
    """An edit with its factor as applied: in float32 for BF16, F16 and F32; see `scaling`."""
    in_f32 = edit.operation == "multiply" and edit.tensor.dtype in _IN_F32
    factor = struct.unpack("<f", struct.pack("<f", edit.factor))[0] if in_f32 else edit.factor
    return {**edit.as_json(), "factor": factor}


_IN_F32 = frozenset({"BF16", "F16", "F32"})


def job(plan: Plan) -> dict[str, Any]:
    """The facts that must be the same in an unfinished run for this one to resume it."""
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
        "plan": decided(plan),
    }


def same_decisions(found: Any, plan: Plan) -> bool:
    """Whether a provenance or an unfinished job has the decisions and the source of this plan."""
    if not isinstance(found, dict):
        return False
    wanted = job(plan) if "version" in found else provenance(plan, {})
    alike = ("version", "moescale", "source", "plan")
    return all(found.get(key) == wanted.get(key) for key in alike)


def made_with(found: Any) -> Options | None:
    """The options in a provenance or in the job of an unfinished run.

    None if they are invalid: the file is untrusted input.
    """
    given = found.get("options") if isinstance(found, dict) else None
    if not isinstance(given, dict) or not given.keys() <= {f.name for f in fields(Options)}:
        return None
    if any(type(given[name]) is not str for name in _TEXTS & given.keys()):
        return None
    words: Any = {name: value for name, value in given.items() if name != "calibrate"}
    try:
        if "factors" in words:
            words["factors"] = factors_of({**found, "factors": words["factors"]}, "moescale.json")
        return options_of(words, given.get("calibrate"))
    except (UsageError, TypeError, ValueError):
        return None


_TEXTS = frozenset({"rule", "calibrate", "fold", "part", "arch", "pattern", "experts_key"})


def in_words(found: Any) -> str | None:
    """The options of a provenance or a job, in words; None if they are missing or invalid."""
    options = made_with(found)
    if options is None:
        return None
    given = {**options_given(options), "rule": options.rule}
    shown = {name: value for name, value in given.items() if isinstance(value, int | float | str)}
    if options.factors is not None:
        shown["factors"] = "..."
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def described(options: Options, rule: str) -> str:
    """A job in words: the number of experts, the rule, and other options."""
    count = options.experts
    what = f"{count} experts per token" if count is not None else "the config's experts per token"
    stated = {"experts", "rule", "factors", "calibrate"}
    others = {k: v for k, v in options_given(options).items() if k not in stated}
    text = []
    if options.rule in RUN_RULES:
        text = [f"on text {options.calibrate[:12]}…" if options.calibrate else "on its own text"]
    words = [rule, *text, *(f"{name}={value}" for name, value in others.items())]
    return f"{what} ({', '.join(words)})"


def _measured(plan: Plan) -> dict[str, Any]:
    """The results that a resumed run reuses: a second measurement may differ in a digit."""
    if plan.rule not in RUN_RULES:
        return {}
    return {
        "factors": dict(plan.factors),
        "router_scales": dict(plan.router_scales),
        "calibration": dict(plan.calibration),
    }


def job_difference(one: Any, other: Mapping[str, Any]) -> str:
    """The difference between two jobs, in words."""
    if not isinstance(one, dict):
        return "another program"
    names = {"version": "another version", "source": "another source, or one that has changed"}
    for key, name in names.items():
        if one.get(key) != other[key]:
            return name
    words = in_words(one)
    return f"other options ({words})" if words else "other options"


def measured_on(calibration: Mapping[str, Any]) -> str:
    """The calibration text, in words."""
    unit = "tokens" if "tokens" in calibration else "bytes"
    first = "the first " if calibration.get("cut") else ""
    what = "text that the model generated" if calibration.get("own") else "text"
    return (
        f"{first}{calibration[unit]:,} {unit} of {what}, SHA-256 {calibration['text_sha256'][:12]}…"
    )
