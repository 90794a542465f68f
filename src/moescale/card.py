"""The output's ``README.md``: the source's card, brought up to date."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from moescale.plan import Plan
from moescale.version import __version__

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?P<yaml>.*?)(?:^|\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
_DROPPED = ("model-index",)
"""Metadata that is no longer true: the evaluation results are those of the source."""

TAG = "moescale"


def render(plan: Plan, source_card: bytes | None) -> bytes:
    """The card of the output.

    Metadata stays as the source wrote it, but for the evaluation results, which are dropped, and
    base model and tags, which are added. Metadata that is no YAML is left alone.

    Args:
        plan: what is done.
        source_card: the source's card; None makes a new one.
    """
    text = "" if source_card is None else source_card.decode(errors="replace")
    windows = "\r\n" in text
    text = text.replace("\r\n", "\n")
    match = _FRONT_MATTER.match(text)
    metadata = _edit_metadata(match["yaml"] if match else "", plan)
    body = text[match.end() :].lstrip("\n") if match else text.lstrip("\n")
    result = f"---\n{metadata}---\n\n{_section(plan)}"
    if body:
        result += f"\nThe card of the source model follows.\n\n{body}"
    return (result.replace("\n", "\r\n") if windows else result).encode()


def metadata_is_valid(source_card: bytes) -> bool:
    """Whether the card's metadata, if it has any, is a YAML mapping."""
    match = _FRONT_MATTER.match(source_card.decode(errors="replace").replace("\r\n", "\n"))
    return match is None or _top_level(match["yaml"]) is not None


def _edit_metadata(text: str, plan: Plan) -> str:
    keys = _top_level(text)
    if keys is None:
        return text.rstrip("\n") + "\n"
    new: dict[str, Any] = {}
    if plan.source.repo is not None:
        new["base_model"] = [plan.source.repo]
    tags = _as_list(keys.get("tags", (None, 0, 0))[0])
    new["tags"] = tags if TAG in tags else [*tags, TAG]
    lines = text.splitlines(keepends=True)
    for key in (*_DROPPED, *new):
        if key in keys:
            _, first, last = keys[key]
            lines[first:last] = [""] * (last - first)
    kept = "".join(lines)
    if kept and not kept.endswith("\n"):
        kept += "\n"
    return kept + yaml.safe_dump(new, sort_keys=False, allow_unicode=True)


def _top_level(text: str) -> dict[str, tuple[Any, int, int]] | None:
    """Each top-level key with its value and its lines; None if this is no block of YAML keys."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(text, Loader=loader)
        values = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or node.flow_style or not isinstance(values, dict):
        return None
    starts = [key.start_mark.line for key, _ in node.value]
    ends = [*starts[1:], len(text.splitlines())]
    return {
        str(key.value): (values.get(key.value), start, end)
        for (key, _), start, end in zip(node.value, starts, ends, strict=True)
    }


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _section(plan: Plan) -> str:
    source = plan.source.repo or plan.source.name
    link = f"[{source}](https://huggingface.co/{source})" if plan.source.repo else f"`{source}`"
    at = f" at commit `{plan.source.revision}`" if plan.source.revision else ""
    experts = plan.experts
    lines = [
        "## Rescaled mixture of experts",
        "",
        f"This is {link}{at}, set to **{_numbers(experts.after)} experts per token** instead of"
        f" {_numbers(experts.before)} by moescale {__version__}.",
        _what_changed(plan),
        "Nothing else was changed: every other tensor is the source's, bit for bit.",
        "",
        "| | |",
        "|---|---|",
        f"| routed experts per layer | {experts.total} |",
        f"| experts per token: trained, before, now | {_numbers(experts.trained)},"
        f" {_numbers(experts.before)}, {_numbers(experts.after)} |",
        f"| rule | `{plan.options.method}` |",
        f"| factor | {_factor_range(plan.factors)} |",
        f"| tensors scaled | {len(plan.changed_tensors)} |",
        "",
        "The factors, options and files are listed in `moescale.json`. Keeping the expected norm"
        " says nothing about quality: evaluate the model on your own task.",
    ]
    return "\n".join(lines) + "\n"


def _what_changed(plan: Plan) -> str:
    if plan.options.fold == "config":
        return (
            "The config's constant that multiplies the routed experts' output was multiplied by a"
            " factor, so that it keeps its expected size; no weight was touched."
        )
    if not plan.changed_tensors:
        return "Only the config was edited; no weight was scaled."
    return (
        "The down-projections of the routed experts are multiplied by a factor, so that their"
        " outputs keep their expected size."
    )


def _numbers(count: int | tuple[int, ...]) -> str:
    if isinstance(count, int):
        return str(count)
    return f"{min(count)} to {max(count)}" if min(count) != max(count) else str(count[0])


def _factor_range(factors: Mapping[str, float]) -> str:
    low, high = min(factors.values()), max(factors.values())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}, by layer"
