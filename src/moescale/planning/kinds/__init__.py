"""The kinds of checkpoint that a plan can be made for, behind one interface: `Checkpoint`."""

from __future__ import annotations

from moescale.options import Options
from moescale.planning.kinds.base import Checkpoint
from moescale.planning.kinds.safetensors import SafetensorsCheckpoint
from moescale.repos.base import Source


def open_checkpoint(source: Source, options: Options) -> Checkpoint:
    """What the source holds.

    Raises:
        SourceError: it is nothing that can be rescaled, is damaged, or cannot be read.
    """
    return SafetensorsCheckpoint(source, options)
