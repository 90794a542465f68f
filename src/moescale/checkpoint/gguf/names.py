"""File names of GGUF models and split sets: ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SUFFIX = ".gguf"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.IGNORECASE)

_BESIDE = re.compile(r"mmproj|imatrix|^ggml-vocab", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PartName:
    """The parts of a GGUF file's name.

    Attributes:
        stem: the path without number and suffix.
        number: which file of the set it is, from 1; 1 if the model is not split.
        count: how many files the set has; None if the model is not split.
    """

    stem: str
    number: int = 1
    count: int | None = None


def part_name(name: str) -> PartName:
    """Split the name of a GGUF file into its parts."""
    if match := _PART.fullmatch(name):
        return PartName(match["stem"], int(match["number"]), int(match["count"]))
    return PartName(name[: -len(SUFFIX)] if is_gguf(name) else name)


def is_gguf(name: str) -> bool:
    """Whether a file is named like a GGUF file."""
    return name.lower().endswith(SUFFIX)


def is_beside(name: str) -> bool:
    """Whether a GGUF file is not a model: a projector, an importance matrix or a vocabulary."""
    return _BESIDE.search(name) is not None


def parts_of(name: str, names: Iterable[str]) -> list[str]:
    """All files of the set that `name` belongs to, in order."""
    own = part_name(name)
    of_set = [(part_name(other), other) for other in names if is_gguf(other)]
    same = [(p.number, n) for p, n in of_set if (p.stem, p.count) == (own.stem, own.count)]
    return [other for _, other in sorted(same)]


def first_of(names: Iterable[str]) -> str | None:
    """The file that a client opens, if all files are those of one model; None if there is none."""
    found = [(part_name(name), name) for name in names if is_gguf(name)]
    first = sorted(name for part, name in found if part.number == 1)
    return first[0] if first else None
