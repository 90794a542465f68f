"""Finds the shards of a repo, with or without an index."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import NamedTuple

from moescale.checkpoint.json_faults import decoded, not_json
from moescale.checkpoint.json_text import parse_strict
from moescale.checkpoint.tensor import Header
from moescale.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = "model" + INDEX_SUFFIX
SINGLE = "model" + SUFFIX

_PART = re.compile(
    r"(?<![0-9])(?P<number>[0-9]{1,9})(?P<of>[-_. ]{0,2}of[-_. ]{0,2})(?P<total>[0-9]{1,9})"
    r"(?![0-9])",
    re.IGNORECASE,
)
"""The number of a part and of all parts in a file name, in any spelling."""
_ANEW = "Write a new index, or remove this one; the output gets one."
_OTHER_WEIGHTS = re.compile(r"(consolidated|adapter_)")


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of a checkpoint.

    Attributes:
        names: in order.
        index: the name of the index that lists them; None if there is none.
    """

    names: tuple[str, ...]
    index: str | None = None


def index_name(files: Iterable[str]) -> str | None:
    """The index that loaders read: ``model.safetensors.index.json``, else the only index.

    Raises:
        CheckpointError: there are several indexes, and none has the usual name.
    """
    found = [name for name in files if name.endswith(INDEX_SUFFIX) and "/" not in name]
    found = [name for name in found if not _OTHER_WEIGHTS.match(name)]
    if INDEX in found or not found:
        return INDEX if found else None
    if len(found) > 1:
        raise CheckpointError(
            f"several indexes and no {INDEX}: {', '.join(sorted(found))}",
            hint=f"Rename the index of the model to {INDEX}, or remove the others.",
        )
    return found[0]


def parse_index(data: bytes, where: str) -> Mapping[str, str]:
    """The weight map of an index: tensor name to shard name.

    Raises:
        CheckpointError: the file is not an index.
    """
    try:
        content = parse_strict(decoded(data))
    except ValueError as error:
        raise not_json(where, error) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map", hint=_ANEW)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{where}: the shard of tensor {tensor!r} is not a file name", hint=_ANEW
            )
    return weight_map


def shards_without_index(files: Iterable[str]) -> Shards:
    """The shards of a repo that has no index.

    Loaders read only ``model.safetensors`` if it exists, else all safetensors files in the top
    folder. If these are numbered, each set must be complete.

    Raises:
        CheckpointError: there are no shards, or a part of a set is missing.
    """
    names = sorted(
        name
        for name in files
        if name.endswith(SUFFIX) and "/" not in name and not _OTHER_WEIGHTS.match(name)
    )
    if SINGLE in names:
        return Shards((SINGLE,))
    if not names:
        raise CheckpointError(
            "no safetensors weights found",
            hint="Convert other formats (*.bin) to safetensors; name a GGUF file itself.",
        )
    check_parts(names)
    return Shards(tuple(names))


def set_of(name: str) -> str:
    """The name of the set that a numbered file belongs to, or else the file's own name."""
    return _PART.sub(lambda part: f"#{part['of']}{part['total']}", name)


def check_parts(names: Iterable[str]) -> None:
    """Refuse an incomplete set of files; numbers start at 1 or 0.

    Raises:
        CheckpointError: a file is missing; the error names the first.
    """
    sets: dict[tuple[str, str, str], dict[int, tuple[str, int, str]]] = {}
    for name in names:
        for part in _PART.finditer(name):
            before, after = name[: part.start()], name[part.end("number") :]
            spelling = before, len(part["number"]), after
            sets.setdefault((before, part["total"], after), {})[int(part["number"])] = spelling
    for (_, total, _), parts in sets.items():
        first = 0 if 0 in parts else 1
        numbers = range(first, first + int(total))
        if (lost := next((i for i in numbers if i not in parts), None)) is not None:
            before, digits, after = next(iter(parts.values()))
            raise CheckpointError(
                f"{before}{lost:0{digits}}{after}: part {lost} of {int(total)} is missing, and"
                " there is no index",
                hint="The download is incomplete; fetch the missing files.",
            )


def by_shard(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """The tensor names of each shard."""
    listed: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        listed.setdefault(shard, []).append(tensor)
    return listed


class Absent(NamedTuple):
    """A tensor that is not in the shard where the index lists it.

    Attributes:
        name: the tensor.
        shard: that shard.
    """

    name: str
    shard: str


class Doubled(NamedTuple):
    """A tensor in two shards.

    Attributes:
        name: the tensor.
        kept: the shard that the index lists; the last shard if it lists neither.
        other: the other shard.
    """

    name: str
    kept: str
    other: str


@dataclass(frozen=True, slots=True)
class Faults:
    """Differences between an index and the headers of its shards.

    Attributes:
        index: the name of the index; None if there is none.
        absent: tensors that are not where the index lists them.
        doubled: tensors in several shards.
        unlisted: names of tensors that the index does not list.
    """

    index: str | None
    absent: tuple[Absent, ...] = ()
    doubled: tuple[Doubled, ...] = ()
    unlisted: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of absent and doubled tensors."""
        return [*(absent.name for absent in self.absent), *(two.name for two in self.doubled)]

    def check(self, scaled: Collection[str]) -> list[str]:
        """Warnings for the user.

        Raises:
            CheckpointError: an absent or doubled tensor is in `scaled`; loaders may read another
                copy than the scaled one.
        """
        for absent in self.absent:
            if absent.name in scaled:
                raise CheckpointError(
                    f"{self.index}: lists {absent.name!r} in {absent.shard}, which does not hold"
                    " it",
                    hint="The index is stale: write a new one, or remove it; the output gets one.",
                )
        for doubled in self.doubled:
            if doubled.name in scaled:
                raise self._two_copies(doubled)
        return list(self._remarks())

    def _two_copies(self, doubled: Doubled) -> CheckpointError:
        listed = f" (where {self.index} lists it)" if self.index else ""
        why = f"{self.index} is stale, or the" if self.index else "The"
        return CheckpointError(
            f"{doubled.name!r}: is in {doubled.kept}{listed} and in {doubled.other}",
            hint=f"{why} shard {doubled.other} was reused or is part of another set: remove the"
            " copy that does not belong, since loaders differ in which one they read.",
        )

    def _remarks(self) -> Iterator[str]:
        if self.absent:
            first = self.absent[0]
            yield (
                f"{self.index} lists {first.name!r} in {first.shard}, which does not hold it"
                f"{_more(self.absent)}; no scaled tensor is affected"
            )
        if self.doubled:
            kept = self.doubled[0]
            yield (
                f"{kept.name!r} is in {kept.kept} and in {kept.other}{_more(self.doubled)}; the one"
                f" in {kept.kept} is used, and both are copied"
            )
        if self.unlisted:
            yield f"{self.index} does not list {self.unlisted[0]!r}{_more(self.unlisted)}"


def _more(found: Sized) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def check_against_headers(
    shards: Shards, listed: dict[str, list[str]] | None, headers: Iterable[tuple[str, Header]]
) -> tuple[dict[str, Header], Faults]:
    """Find tensors that are in several shards, or not where the index lists them.

    Args:
        shards: the shards and the name of their index.
        listed: the tensors that the index lists, by shard. It is consumed shard by shard: with
            100,000 tensors, it and the headers are large, and are never in memory together.
        headers: the header of each shard, read lazily.

    Returns:
        All headers by shard, without the copies that are not kept; and the faults.
    """
    taken: dict[str, Header] = {}
    absent: list[Absent] = []
    unlisted: dict[str, set[str]] = {}
    for shard, header in headers:
        taken[shard] = header
        if listed is not None:
            there, names = {t.name for t in header.tensors}, listed.pop(shard)
            absent += [Absent(name, shard) for name in names if name not in there]
            if surplus := there.difference(names):
                unlisted[shard] = surplus
    doubled = []
    if listed is None or unlisted:  # otherwise no name occurs twice: the index lists each once
        doubled = list(_doubled(taken, None if listed is None else unlisted))
        taken = _single(taken, doubled)
    copies = {(two.other, two.name) for two in doubled}
    alone = [
        name for shard, names in unlisted.items() for name in names if (shard, name) not in copies
    ]
    return taken, Faults(shards.index, tuple(absent), tuple(doubled), tuple(sorted(alone)))


def _doubled(
    headers: Mapping[str, Header], unlisted: Mapping[str, Collection[str]] | None
) -> Iterator[Doubled]:
    """Tensors in several shards; the listed copy is kept, else the last one, as in loaders."""
    first_shards: dict[str, str] = {}
    copies: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if (first := first_shards.setdefault(tensor.name, shard)) != shard:
                copies.setdefault(tensor.name, [first]).append(shard)
    for name, shards in copies.items():
        listed = [s for s in shards if unlisted is not None and name not in unlisted.get(s, ())]
        kept = listed[0] if listed else shards[-1]
        yield from (Doubled(name, kept, other) for other in shards if other != kept)


def _single(headers: Mapping[str, Header], doubled: Iterable[Doubled]) -> dict[str, Header]:
    """The headers without the copies that are not kept."""
    dropped = {(d.other, d.name) for d in doubled}
    shards = {shard for shard, _ in dropped}
    return {
        shard: h._replace(tensors=tuple(t for t in h.tensors if (shard, t.name) not in dropped))
        if shard in shards
        else h
        for shard, h in headers.items()
    }


def make_index(headers: Mapping[str, Header]) -> bytes:
    """An index in the layout of huggingface_hub: the total size, then the sorted weight map."""
    weight_map = {t.name: shard for shard, header in headers.items() for t in header.tensors}
    size = sum(t.nbytes for header in headers.values() for t in header.tensors)
    content = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
