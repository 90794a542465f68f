"""The formats of checkpoints, behind one interface: `Checkpoint`."""

from __future__ import annotations

from moescale.options import Options
from moescale.planning.formats.base import Checkpoint
from moescale.planning.formats.safetensors import SafetensorsCheckpoint
from moescale.storage.base import Source
from moescale.storage.location import Location


def open_checkpoint(source: Source, options: Options, location: Location | None) -> Checkpoint:
    """The checkpoint of the source.

    Raises:
        SourceError: it cannot be rescaled, is damaged, or cannot be read.
    """
    if source.gguf_set is not None:
        from moescale.planning.formats.gguf import GgufCheckpoint  # it has tables of its own

        published = location is not None and location.on_hub
        return GgufCheckpoint(source, options, published)
    return SafetensorsCheckpoint(source, options)
