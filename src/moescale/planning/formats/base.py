"""The interface between planning and a checkpoint of any format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.tensor import Header, Tensor
from moescale.families.config import CONFIG
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.experts import Experts
from moescale.planning.files import PROVENANCE, PlannedFile
from moescale.planning.overrides import ConfigOverrides
from moescale.planning.plan import NewHeader, Plan


@dataclass(frozen=True, slots=True)
class Output:
    """The files of the output, apart from scaled tensors.

    Attributes:
        files: every file and its action.
        config: the config of the output; None if it is not a separate file.
        index: the name of the index, and its content if it is new; None without an index.
        new_headers: replacements of the headers of shards.
        edited_files: other small files that change, with their new content.
        keys: values set in the header of a shard, by key.
        provenance_file: name of the file that holds the provenance.
        last_file: name of the file without which the output does not load; it is written last.
        warnings: warnings for the user.
        config_overrides: the alternative without rewriting; None if there is none.
        fold_key: the config key that ``--fold config`` multiplies; None if there is none.
    """

    files: tuple[PlannedFile, ...]
    config: bytes | None = None
    index: tuple[str, bytes | None] | None = None
    new_headers: Mapping[str, NewHeader] = field(default_factory=dict)
    edited_files: Mapping[str, bytes] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    provenance_file: str = PROVENANCE
    last_file: str = CONFIG
    warnings: Sequence[str] = ()
    config_overrides: ConfigOverrides | None = None
    fold_key: str | None = None


class Checkpoint(Protocol):
    """A checkpoint whose config and headers have been read.

    Attributes:
        moe: the MoE that it holds.
        headers: headers of all shards, by name; tensor positions are offsets in the file.
        tensors: all tensors.
        loader: class of transformers that loads it; None for GGUF.
        warnings: warnings for the user.
    """

    moe: Moe
    headers: Mapping[str, Header]
    tensors: Sequence[Tensor]
    loader: str | None
    warnings: Sequence[str]

    def edits(self, factors: Mapping[Layer, float]) -> list[TensorEdit]:
        """The edit of every tensor that is scaled."""

    def remarks(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Iterable[str]:
        """Warnings about the planned changes.

        Raises:
            UnsupportedError: the format cannot hold the changes.
        """

    def output(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Output:
        """The files of the output.

        Raises:
            UnsupportedError: the format cannot hold the changes.
        """

    def completed(self, plan: Plan) -> Plan:
        """The plan, completed with what depends on all other decisions."""
