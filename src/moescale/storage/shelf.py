"""Files that are one model in a folder that has others: a GGUF file, or a split set."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.checkpoint.gguf.names import is_gguf, part_name


@dataclass(frozen=True, slots=True)
class Shelf:
    """One model among others, perhaps under another name than in the plan.

    Attributes:
        source: the path in the plan without number and suffix: ``folder/X`` of ``folder/X.gguf``.
        stem: the name in the folder, without them.
        count: how many files the set has; None for a single file.
    """

    source: str
    stem: str
    count: int | None

    @property
    def state(self) -> str:
        """The folder of the state of an unfinished run."""
        return f".{self.stem}.moescale"

    def there(self, name: str) -> str:
        """The name in the folder of a file of the plan."""
        return self.stem + name[len(self.source) :]

    def planned(self, name: str) -> str | None:
        """The name in the plan of a file of the folder; None for a file of something else."""
        part = part_name(name)
        if not is_gguf(name) or (part.stem, part.count) != (self.stem, self.count):
            return None
        return self.source + name[len(self.stem) :]
