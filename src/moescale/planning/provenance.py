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
from typing import Any, NamedTuple, TypeGuard

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.json_text import parse_lenient
from moescale.errors import UsageError
from moescale.options import RUN_RULES, Options, factors_of, is_calibration, options_of
from moescale.planning.factors import KnownFactors
from moescale.planning.plan import Plan
from moescale.storage.base import FileRecord
from moescale.version import __version__


def provenance(plan: Plan, written: Mapping[str, FileRecord]) -> dict[str, Any]:
    """The content of ``moescale.json``; `written` has all other files of the output.

    If it is stored in a shard, it lists neither that shard nor files that are written later.
    """
    shards = {file.name for file in plan.large_files}
    listed = written.keys() & (
        shards - {plan.provenance_file} if plan.provenance_file in shards else written
    )
    return {
        "moescale": __version__,
        "source": _source(plan),
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


def options_given(options: Options) -> dict[str, Any]:
    """The options that the user gave."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in given.items() if value is not None}


def _source(plan: Plan) -> dict[str, Any]:
    source = plan.source
    return {"kind": source.kind, "id": source.name, "revision": source.revision}


def _source_with_files(plan: Plan) -> dict[str, Any]:
    return {**_source(plan), "files": dict(plan.states)}


def decided(plan: Plan) -> str:
    """SHA-256 of everything that decides the output's bytes, however the options were spelled.

    The contents of card and provenance are excluded: they hold the options as given.
    """
    digest = hashlib.sha256(plan.config or b"")
    if plan.keys:
        digest.update(json.dumps(dict(plan.keys)).encode())
    for name, data in sorted(plan.edited_files.items()):
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
        "source": _source_with_files(plan),
        "options": options_given(plan.options),
        **_measured(plan),
        "plan": decided(plan),
    }


def _measured(plan: Plan) -> dict[str, Any]:
    """The results that a resumed run reuses: a second measurement may differ in a digit."""
    if plan.rule not in RUN_RULES:
        return {}
    return {
        "factors": dict(plan.factors),
        "router_scales": dict(plan.router_scales),
        "calibration": dict(plan.calibration),
    }


class PreviousRun(NamedTuple):
    """The record of a run: the provenance of an output, or the job of an unfinished run.

    Anybody may have edited it: whatever is missing or malformed is None or empty.

    Attributes:
        content: the whole record.
        finished: whether it is that of an output.
        version: the version of moescale.
        source: the facts of the source.
        options: the options that were given.
        plan: the digest of the plan; see `decided`.
        rule: the rule, even if it was not given.
        known: the factors and router scales.
        calibration: the text, and how much of it was used.
        files: the size and SHA-256 of each file as recorded, even if malformed.
    """

    content: Mapping[str, object]
    finished: bool
    version: str | None
    source: Mapping[str, object]
    options: Options | None
    plan: str | None
    rule: str | None
    known: KnownFactors | None
    calibration: Mapping[str, Any]
    files: Mapping[str, tuple[object, object]]


def decode(data: bytes) -> PreviousRun:
    """The record in a ``moescale.json``."""
    try:
        content = parse_lenient(data.decode())
    except ValueError:
        content = None
    return _decoded(content, finished=True)


def decode_job(job: object) -> PreviousRun:
    """The record in the job of an unfinished run."""
    return _decoded(job, finished=False)


def _decoded(record: object, finished: bool) -> PreviousRun:
    content = _mapping(record)
    calibration = content.get("calibration")
    return PreviousRun(
        content,
        finished,
        version=_text(content.get("moescale" if finished else "version")),
        source=_mapping(content.get("source")),
        options=_options(content),
        plan=_text(content.get("plan")),
        rule=_text(content.get("rule")),
        known=_known(content),
        calibration=calibration if is_calibration(calibration) else {},
        files=_files(content.get("files")),
    )


def _mapping(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _text(found: object) -> str | None:
    return found if isinstance(found, str) else None


def _options(content: Mapping[str, Any]) -> Options | None:
    given = content.get("options")
    if not isinstance(given, dict) or not given.keys() <= {f.name for f in fields(Options)}:
        return None
    if any(type(given[name]) is not str for name in _TEXTS & given.keys()):
        return None
    words: Any = {name: value for name, value in given.items() if name != "calibrate"}
    try:
        if "factors" in words:
            words["factors"] = factors_of({**content, "factors": words["factors"]}, "moescale.json")
        return options_of(words, given.get("calibrate"))
    except (UsageError, TypeError, ValueError, OverflowError):
        return None


_TEXTS = frozenset({"rule", "calibrate", "fold", "part", "arch", "pattern", "experts_key"})


def _known(content: Mapping[str, Any]) -> KnownFactors | None:
    factors, scales = content.get("factors"), content.get("router_scales", {})
    if _are_factors(factors) and _are_factors(scales):
        return KnownFactors(factors, scales)
    return None


def _are_factors(found: object) -> TypeGuard[Mapping[str, float]]:
    if not isinstance(found, dict):
        return False
    return all(type(value) in (float, int) and 0 < value < 1e30 for value in found.values())


def _files(found: object) -> dict[str, tuple[object, object]]:
    entries = map(_mapping, found if isinstance(found, list) else [])
    return {
        name: (entry.get("size"), entry.get("sha256"))
        for entry in entries
        if isinstance(name := entry.get("name"), str)
    }


def same_job(found: PreviousRun, content: Mapping[str, Any]) -> bool:
    """Whether a record has this content, without digests, which one of them may lack."""
    return bool(_without_digests(found.content) == _without_digests(content))


def _without_digests(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without_digests(v) for k, v in content.items() if k != "sha256"}
    if isinstance(content, (list, tuple)):  # JSON has no tuples
        return [_without_digests(item) for item in content]
    return content


def same_source(found: PreviousRun, plan: Plan) -> bool:
    """Whether this version made it from this source, with the same files if it is unfinished."""
    wanted = _source(plan) if found.finished else _source_with_files(plan)
    return found.version == __version__ and found.source == wanted


def same_decisions(found: PreviousRun, plan: Plan) -> bool:
    """Whether it has the source and the decisions of this plan."""
    return same_source(found, plan) and found.plan == decided(plan)


def job_difference(found: PreviousRun, wanted: Mapping[str, Any]) -> str:
    """The difference between two jobs, in words."""
    if not found.content:
        return "another program"
    if found.version != wanted["version"]:
        return "another version"
    if found.source != wanted["source"]:
        return "another source, or one that has changed"
    return f"other options ({in_words(found.options)})" if found.options else "other options"


def in_words(options: Options) -> str:
    """The options as in the API."""
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


def measured_on(calibration: Mapping[str, Any]) -> str:
    """The calibration text, in words."""
    unit = "tokens" if "tokens" in calibration else "bytes"
    first = "the first " if calibration.get("cut") else ""
    what = "text that the model generated" if calibration.get("own") else "text"
    return (
        f"{first}{calibration[unit]:,} {unit} of {what}, SHA-256 {calibration['text_sha256'][:12]}…"
    )
