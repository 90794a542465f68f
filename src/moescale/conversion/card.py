"""The output's ``README.md``: the source's card, updated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from moescale.planning.files import PROVENANCE
from moescale.planning.plan import Plan
from moescale.planning.provenance import measured_on
from moescale.version import __version__

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(?P<yaml>(?:.*?\n)??)---[ \t]*(?:\n|\Z)", re.DOTALL)
"""As the Hub reads it: white space may precede it, and the block may be empty."""

_DROPPED = frozenset({"model-index"})
"""Metadata that does not apply to the output: the evaluation results of the source."""

_DEEPEST = 100
_LONGEST_NUMBER = 1000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BROKEN = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""The errors of PyYAML for text that is not YAML, and for values that their tag does not allow."""

TAG = "moescale"


def render(plan: Plan, source_card: bytes | None) -> bytes:
    """The card of the output.

    The metadata keeps the source's text, without its evaluation results and with base model and
    tags added. Metadata that is not valid YAML stays unchanged.

    Args:
        plan: the plan.
        source_card: the source's card; None if it has none.
    """
    text = "" if source_card is None else source_card.decode(errors="replace")
    windows = "\r\n" in text
    text = text.replace("\r\n", "\n")
    match = _FRONT_MATTER.match(text)
    old = match["yaml"] if match else ""
    metadata = _edit_metadata(old, plan.source.repo)
    if metadata is None:
        metadata = old
    body = text[match.end() :].lstrip("\n") if match else text.lstrip("\n")
    result = f"---\n{metadata}---\n\n{_section(plan)}"
    if body:
        result += f"\nThe card of the source model follows.\n\n{body}"
    return (result.replace("\n", "\r\n") if windows else result).encode()


def _edit_metadata(text: str, repo: str | None) -> str | None:
    """The metadata of the output; None if that of the source is not a YAML mapping.

    Lines are removed, and new ones added at the end, so that all others stay as they are. If that
    is impossible (flow style, anchors), the whole block is rewritten.
    """
    lines = text.splitlines(keepends=True)
    spans = _top_level_lines(text)
    if spans is None:
        return None
    if "*" in text and _has_aliases(text):
        return _rewrite_metadata(text, repo)
    added = {"tags", "base_model"} if repo else {"tags"}
    kept = "".join(
        line
        for number, line in enumerate(lines)
        if not any(first <= number < last for first, last in _lines_of(spans, _DROPPED | added))
    )
    tags = "".join("".join(lines[first:last]) for first, last in _lines_of(spans, {"tags"}))
    old, old_tags = _load(kept), _load_as_text(tags)
    if old is None or old_tags is None or _load(tags) is None:
        return _rewrite_metadata(text, repo)
    new = _new_metadata(old_tags.get("tags"), repo)
    if kept and not kept.endswith("\n"):
        kept += "\n"
    result = kept + yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
    return result if _load(result) == {**old, **new} else _rewrite_metadata(text, repo)


def _rewrite_metadata(text: str, repo: str | None) -> str | None:
    content = _load_as_text(text)
    if content is None or _load(text) is None:
        return None
    new = _new_metadata(content.get("tags"), repo)
    kept = {key: value for key, value in content.items() if key not in {*_DROPPED, *new}}
    return yaml.safe_dump({**kept, **new}, sort_keys=False, allow_unicode=True)


def _new_metadata(tags: Any, repo: str | None) -> dict[str, Any]:
    listed = [] if tags in ("", "~", "null") else _as_list(tags)
    new = {"tags": listed if TAG in listed else [*listed, TAG]}
    return {"base_model": [repo], **new} if repo else new


def _load(text: str, loader: Any = _LOADER) -> dict[Any, Any] | None:
    try:
        content = yaml.load(text, Loader=loader)
    except _BROKEN:
        return None
    return {} if content is None else content if isinstance(content, dict) else None


def _load_as_text(text: str) -> dict[str, Any] | None:
    """The metadata with every value as text: `no` is Norwegian, not false."""
    return _load(text, yaml.BaseLoader)


def _top_level_lines(text: str) -> dict[str, tuple[int, int]] | None:
    """First and last line of each top-level key; None if the text is not YAML, or too costly.

    Only parser events are read and no objects built: evaluation results can be long, and PyYAML
    follows nesting until the process dies, multiplies merged mappings (``<<``), and is slow for
    long numbers.
    """
    starts: list[tuple[str, int]] = []
    depth, is_key = 0, True
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
            closes = isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
            depth -= closes
            if depth == 1 and not isinstance(event, yaml.DocumentEndEvent):
                if is_key and isinstance(event, yaml.ScalarEvent) and event.start_mark:
                    starts.append((event.value, event.start_mark.line))
                if not opens:
                    is_key = not is_key
            depth += opens
            if depth > _DEEPEST or _is_costly(event):
                return None
    except _BROKEN:
        return None
    ends = [*(line for _, line in starts), len(text.splitlines())][1:]
    return {key: (line, end) for (key, line), end in zip(starts, ends, strict=False)}


def _is_costly(event: Any) -> bool:
    if not isinstance(event, yaml.ScalarEvent) or not event.implicit[0]:
        return False
    return event.value == "<<" or (
        len(event.value) > _LONGEST_NUMBER and event.value.lstrip("+-")[:1].isdigit()
    )


def _has_aliases(text: str) -> bool:
    """Whether a value refers to another one, so that lines cannot be removed separately."""
    return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER))


def _lines_of(spans: Mapping[str, tuple[int, int]], keys: Iterable[str]) -> list[tuple[int, int]]:
    return [spans[key] for key in keys if key in spans]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _section(plan: Plan) -> str:
    source = plan.source.repo or plan.source.name
    link = f"[{source}](https://huggingface.co/{source})" if plan.source.repo else f"`{source}`"
    at = f" at commit `{plan.source.revision}`" if plan.source.revision else ""
    experts = plan.experts
    made_by = f", made by `{plan.factors_rule}`" if plan.factors_rule else ""
    lines = [
        "## Rescaled mixture of experts",
        "",
        f"This is {_file_in_repo(plan)}{link}{at},"
        f" {_count_change(experts.before, experts.after)} by moescale {__version__}.",
        _changes(plan),
        "Nothing else was changed: every other tensor is the source's, bit for bit.",
        "",
        "| | |",
        "|---|---|",
        f"| routed experts per layer | {experts.total} |",
        f"| experts per token: trained, before, now | {_count_text(experts.trained)},"
        f" {_count_text(experts.before)}, {_count_text(experts.after)} |",
        f"| rule | `{plan.rule}`{made_by} |",
        *([f"| measured on | {measured_on(plan.calibration)} |"] if plan.calibration else []),
        f"| factor | {_factor_range(plan.factors)} |",
        *_gate_rows(plan),
        f"| tensors scaled | {len(plan.changed_tensors)} |",
        "",
        f"The factors, options and files are listed in {_provenance_location(plan)}. Keeping the"
        " expected norm says nothing about quality: evaluate the model on your own task.",
        *_override_note(plan),
    ]
    return "\n".join(lines) + "\n"


def _file_in_repo(plan: Plan) -> str:
    """The file or folder of the source's repo, if the source is not the whole repo."""
    inside = plan.source.name.removeprefix(f"{plan.source.repo}/")
    return f"`{inside}` of " if plan.source.repo and inside != plan.source.name else ""


def _provenance_location(plan: Plan) -> str:
    named = f"`{plan.provenance_file}`"
    return named if plan.provenance_file == PROVENANCE else f"the keys `moescale.*` of {named}"


def _override_note(plan: Plan) -> list[str]:
    """A warning for users who override the number of experts at run time."""
    if not plan.keys:
        return []
    return [
        "",
        f"Remove `--override-kv {next(iter(plan.keys))}=...` from any start script: it overrides"
        " the number in the file, for which the factors are made.",
    ]


def _count_change(before: int | tuple[int, ...], after: int | tuple[int, ...]) -> str:
    if before == after:
        return f"with {_count_text(after)} experts per token as before, rescaled"
    return f"set to **{_count_text(after)} experts per token** instead of {_count_text(before)}"


def _gate_rows(plan: Plan) -> list[str]:
    if not plan.router_scales:
        return []
    return [f"| router weights | multiplied by {_factor_range(plan.router_scales)} |"]


_AIMS = {
    "preserve": ", which keeps their expected size",
    "gates": ", which keeps their expected size",
    "measured": ", which keeps their mean size on a text",
    "fitted": ", which keeps their mean size on a text",
}


def _aim(plan: Plan) -> str:
    return _AIMS.get(plan.rule, "")


def _changes(plan: Plan) -> str:
    if plan.options.fold == "config":
        return (
            "The config's constant that scales the routed experts' output was multiplied by a"
            f" factor{_aim(plan)}; no weight was changed."
        )
    roles = {t.role for t in plan.changed_tensors}
    routers = ""
    if "router" in roles and len(roles) > 1:
        routers = " The routers' weights are multiplied by a number as well."
    if not roles:
        return "Only the config was edited; no weight was scaled."
    if roles == {"router"}:
        return "The routers' weights are multiplied by a number; the experts are unchanged."
    if plan.options.fold == "residual":
        return (
            "The embedding and the attention outputs are divided by a factor, which the norms undo;"
            " the routed experts' weights are unchanged, and so weigh more by that factor."
        )
    experts = f"The down-projections of the routed experts are multiplied by a factor{_aim(plan)}."
    return experts + routers


def _count_text(count: int | tuple[int, ...]) -> str:
    if isinstance(count, int):
        return str(count)
    return f"{min(count)} to {max(count)}" if min(count) != max(count) else str(count[0])


def _factor_range(factors: Mapping[str, float]) -> str:
    low, high = min(factors.values()), max(factors.values())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}, by layer"
