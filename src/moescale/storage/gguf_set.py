"""The file names of one GGUF model, a file or a split set, in a folder that has others."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.checkpoint.gguf.names import is_gguf, part_name


@dataclass(frozen=True, slots=True)
class GgufSet:
    """Translates between the names in the plan and those in the folder.

    Attributes:
        planned_stem: the path in the plan without number and suffix: ``folder/X`` of
            ``folder/X.gguf``.
        stem: the same for the name in the folder.
        count: how many files the set has; None for a single file.
    """

    planned_stem: str
    stem: str
    count: int | None

    @property
    def state(self) -> str:
        """The folder for the state of an unfinished run."""
        return f".{self.stem}.moescale"

    def name_in_folder(self, name: str) -> str:
        """The name in the folder, of a file of the plan."""
        return self.stem + name[len(self.planned_stem) :]

    def name_in_plan(self, name: str) -> str | None:
        """The name in the plan, of a file of the folder; None if it is not of this model."""
        part = part_name(name)
        if not is_gguf(name) or (part.stem, part.count) != (self.stem, self.count):
            return None
        return self.planned_stem + name[len(self.stem) :]
