"""What a plan has to know of a checkpoint, whatever format it is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moescale.checkpoint.edit import TensorEdit
from moescale.checkpoint.safetensors.header import Header
from moescale.checkpoint.tensor import Tensor
from moescale.families.config import CONFIG
from moescale.families.find import Moe
from moescale.families.projections import Layer
from moescale.planning.experts import Experts
from moescale.planning.files import PROVENANCE, PlannedFile
from moescale.planning.instead import Instead
from moescale.planning.plan import NewHeader, Plan


@dataclass(frozen=True, slots=True)
class Output:
    """What becomes of the files, besides the tensors that are scaled.

    Attributes:
        files: every file, and what is done with it.
        config: the config of the output, where it is a file of its own.
        index: the name of the index, and its content where it has to be made.
        new_headers: what is written in place of the beginnings of shards.
        edits: other small files that change.
        keys: what is set in the header of a shard, by key.
        record: the file that has the provenance.
        opens: the file without which nothing loads; it is written last.
        warnings: what the user should know.
        instead: what does the same without rewriting, where anything does.
        fold_key: the config key that ``--fold config`` multiplies, where there is one.
    """

    files: tuple[PlannedFile, ...]
    config: bytes | None = None
    index: tuple[str, bytes | None] | None = None
    new_headers: Mapping[str, NewHeader] = field(default_factory=dict)
    edits: Mapping[str, bytes] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    record: str = PROVENANCE
    opens: str = CONFIG
    warnings: Sequence[str] = ()
    instead: Instead | None = None
    fold_key: str | None = None


class Checkpoint(Protocol):
    """A checkpoint that was read as far as a plan needs it: config and headers.

    Attributes:
        moe: the MoE that it holds.
        headers: of all shards, by name; places of tensors are offsets in the file.
        tensors: all of them.
        warnings: what the user should know of it.
    """

    moe: Moe
    headers: Mapping[str, Header]
    tensors: Sequence[Tensor]
    warnings: Sequence[str]

    def edits(self, factors: Mapping[Layer, float]) -> list[TensorEdit]:
        """What happens to every tensor that is scaled for the factors."""

    def remarks(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Iterable[str]:
        """What the user should know of what is going to be done.

        Raises:
            UnsupportedError: it cannot be done so.
        """

    def output(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Output:
        """What becomes of the files.

        Raises:
            UnsupportedError: it cannot be done so.
        """

    def sealed(self, plan: Plan) -> Plan:
        """The plan with what can only be said once all else is decided."""
