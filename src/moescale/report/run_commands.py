"""The commands that run an output, or the source with other values, in each engine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from moescale.checkpoint.gguf.names import is_gguf, part_name
from moescale.errors import printable
from moescale.planning.plan import Plan
from moescale.storage.location import Location

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
"""Names of engines that differ from their keys."""


def commands_text(plan: Plan, written: bool) -> str:
    """The commands that run the output and, before it is written, the source with other values."""
    parts = []
    if plan.overrides and not written:
        parts.append("The same without rewriting:\n" + _engines(plan.overrides))
    if plan.location is not None and not plan.changes_nothing:
        parts.append("To run it:\n" + _engines(_to_run(plan, plan.location)))
    return "\n\n".join(parts)


def output_location(plan: Plan) -> str:
    """The location of the output, for scripts; for a split GGUF set, that of its first file."""
    assert plan.location is not None, "a plan without a destination has no output"
    return _first_file(plan.location, _parts(plan) if plan.loader is None else 1)


def _parts(plan: Plan) -> int:
    return sum(file.name.endswith(".gguf") for file in plan.files)


def _to_run(plan: Plan, location: Location) -> Mapping[str, str]:
    if plan.loader is None:
        return _gguf_to_run(location, plan.last_file, _parts(plan))
    return _folder_to_run(location, plan.loader)


def _folder_to_run(location: Location, loader: str) -> Mapping[str, str]:
    """For each engine, the command that runs a finished output."""
    name, branch = location.model_id, location.revision
    revision = f" --revision {shlex.quote(branch)}" if branch else ""
    more = f", revision={branch!r}" if branch else ""
    path = shlex.quote(name)
    return {
        "vllm": f"vllm serve {path}{revision}",
        "sglang": f"python -m sglang.launch_server --model-path {path}{revision}",
        "transformers": f"{loader}.from_pretrained({name!r}{more})",
    }


def _gguf_to_run(location: Location, first: str, parts: int) -> Mapping[str, str]:
    """The command of llama.cpp for a finished output, whose first file is `first`."""
    if location.on_hub:
        branch = f"@{location.revision}" if location.revision else ""
        return {"llama.cpp": f"llama-server -hf {shlex.quote(location.model_id + branch)}"}
    path = _first_file(location, parts)
    if not is_gguf(path):
        path = f"{path.rstrip('/')}/{first}"
    return {"llama.cpp": f"llama-server -m {shlex.quote(path)}"}


def _first_file(location: Location, parts: int) -> str:
    """The first file of a split GGUF output whose location is a file name; else the location."""
    text = location.text
    if parts < 2 or location.on_hub or not is_gguf(text):
        return text
    return f"{part_name(text).stem}-00001-of-{parts:05d}.gguf"


def _engines(lines: Mapping[str, str]) -> str:
    names = {engine: ENGINES.get(engine, engine) for engine in lines}
    width = max(map(len, names.values()))
    return "\n".join(f"  {names[e]:{width}}  {printable(line)}" for e, line in lines.items())
