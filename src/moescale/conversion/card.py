"""The output's ``README.md``: the source's card, brought up to date."""

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
"""As the Hub reads it: white space may stand before, and the block may be empty."""

_DROPPED = frozenset({"model-index"})
"""Metadata that is no longer true: the evaluation results are those of the source."""

_DEEPEST = 100
_LONGEST_NUMBER = 1000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BROKEN = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML raises for text that is no YAML, or for values that their tag does not allow."""

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
    old = match["yaml"] if match else ""
    metadata = _edit_metadata(old, plan.source.repo)
    if metadata is None:
        metadata = old
    body = text[match.end() :].lstrip("\n") if match else text.lstrip("\n")
    result = f"---\n{metadata}---\n\n{_section(plan)}"
    if body:
        result += f"\nThe card of the source model follows.\n\n{body}"
    return (result.replace("\n", "\r\n") if windows else result).encode()


def metadata_is_valid(source_card: bytes) -> bool:
    """Whether the card's metadata, if it has any, is a YAML mapping."""
    match = _FRONT_MATTER.match(source_card.decode(errors="replace").replace("\r\n", "\n"))
    return match is None or _edit_metadata(match["yaml"], None) is not None


def _edit_metadata(text: str, repo: str | None) -> str | None:
    """The metadata of the output; None if the source's are no YAML mapping.

    Lines are taken out and new ones added at the end, so that all others stay as they are. Where
    that is not possible (flow style, anchors), the whole block is written anew.
    """
    lines = text.splitlines(keepends=True)
    spans = _top_level_lines(text)
    if spans is None:
        return None
    if "*" in text and _has_aliases(text):
        return _written_anew(text, repo)
    added = {"tags", "base_model"} if repo else {"tags"}
    kept = "".join(
        line
        for number, line in enumerate(lines)
        if not any(first <= number < last for first, last in _lines_of(spans, _DROPPED | added))
    )
    tags = "".join("".join(lines[first:last]) for first, last in _lines_of(spans, {"tags"}))
    old, old_tags = _load(kept), _words(tags)
    if old is None or old_tags is None or _load(tags) is None:
        return _written_anew(text, repo)
    new = _new_metadata(old_tags.get("tags"), repo)
    if kept and not kept.endswith("\n"):
        kept += "\n"
    result = kept + yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
    return result if _load(result) == {**old, **new} else _written_anew(text, repo)


def _written_anew(text: str, repo: str | None) -> str | None:
    content = _words(text)
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


def _words(text: str) -> dict[str, Any] | None:
    """Metadata with every value as the word that stands there: `no` is Norwegian, not false."""
    return _load(text, yaml.BaseLoader)


def _top_level_lines(text: str) -> dict[str, tuple[int, int]] | None:
    """First and last line of each top-level key; None if this is no YAML, or made to cost much.

    Only events are read, without building anything: evaluation results can be long, and PyYAML
    follows nesting until the process dies, multiplies merged mappings (``<<``), and takes its time
    for numbers of any length.
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
    """Whether a value refers to another one, so that lines cannot be taken out one by one."""
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
        f"This is {_part(plan)}{link}{at}, {_count_change(experts.before, experts.after)} by"
        f" moescale {__version__}.",
        _what_changed(plan),
        "Nothing else was changed: every other tensor is the source's, bit for bit.",
        "",
        "| | |",
        "|---|---|",
        f"| routed experts per layer | {experts.total} |",
        f"| experts per token: trained, before, now | {_numbers(experts.trained)},"
        f" {_numbers(experts.before)}, {_numbers(experts.after)} |",
        f"| rule | `{plan.rule}`{made_by} |",
        *([f"| measured on | {measured_on(plan.calibration)} |"] if plan.calibration else []),
        f"| factor | {_factor_range(plan.factors)} |",
        *_gate_rows(plan),
        f"| tensors scaled | {len(plan.changed_tensors)} |",
        "",
        f"The factors, options and files are listed in {_listed(plan)}. Keeping the expected norm"
        " says nothing about quality: evaluate the model on your own task.",
        *_of_keys(plan),
    ]
    return "\n".join(lines) + "\n"


def _part(plan: Plan) -> str:
    """The file or the folder of the source's repo that this was made of."""
    inside = plan.source.name.removeprefix(f"{plan.source.repo}/")
    return f"`{inside}` of " if plan.source.repo and inside != plan.source.name else ""


def _listed(plan: Plan) -> str:
    named = f"`{plan.record}`"
    return named if plan.record == PROVENANCE else f"the keys `moescale.*` of {named}"


def _of_keys(plan: Plan) -> list[str]:
    """What users of a file have to know whose number can be overridden at run time."""
    if not plan.keys:
        return []
    return [
        "",
        f"A start script that has `--override-kv {next(iter(plan.keys))}=...` wins over the file:"
        " take it out, since the factors are made for the number in the file.",
    ]


def _count_change(before: int | tuple[int, ...], after: int | tuple[int, ...]) -> str:
    if before == after:
        return f"with {_numbers(after)} experts per token as before, rescaled"
    return f"set to **{_numbers(after)} experts per token** instead of {_numbers(before)}"


def _gate_rows(plan: Plan) -> list[str]:
    if not plan.router_scales:
        return []
    return [f"| router weights | multiplied by {_factor_range(plan.router_scales)} |"]


_AIMS = {
    "preserve": ", so that their expected size stays",
    "gates": ", so that their expected size stays",
    "measured": ", so that the mean size that they have on a text stays",
    "fitted": ", so that the mean size that they have on a text stays",
}


def _aim(plan: Plan) -> str:
    return _AIMS.get(plan.rule, "")


def _what_changed(plan: Plan) -> str:
    if plan.options.fold == "config":
        return (
            "The config's constant that multiplies the routed experts' output was multiplied by a"
            f" factor{_aim(plan)}; no weight was touched."
        )
    roles = {t.role for t in plan.changed_tensors}
    routers = ""
    if "router" in roles and len(roles) > 1:
        routers = " The routers' weights are multiplied by a number, too."
    if not roles:
        return "Only the config was edited; no weight was scaled."
    if roles == {"router"}:
        return "The routers' weights are multiplied by a number; the experts are as they were."
    if plan.options.fold == "residual":
        return (
            "The embedding and the attention outputs are divided by a factor, which the norms undo;"
            " the routed experts' weights are as they were, and count for the factor more."
        )
    experts = f"The down-projections of the routed experts are multiplied by a factor{_aim(plan)}."
    return experts + routers


def _numbers(count: int | tuple[int, ...]) -> str:
    if isinstance(count, int):
        return str(count)
    return f"{min(count)} to {max(count)}" if min(count) != max(count) else str(count[0])


def _factor_range(factors: Mapping[str, float]) -> str:
    low, high = min(factors.values()), max(factors.values())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}, by layer"
