"""Loads a model once per API call. Does not import torch."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moescale.calibrate.devices import Running
from moescale.families.find import Moe

if TYPE_CHECKING:
    from moescale.calibrate.measure import LoadedModel


class Loader:
    """Keeps the last loaded model until the end of the `with` block."""

    def __init__(self, how: Running) -> None:
        self._how = how
        self._open = ExitStack()
        self._folder: Path | None = None
        self._model: LoadedModel | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def model(self, folder: Path, config: Any, moe: Moe) -> LoadedModel:
        """The model of a folder; reuses the loaded model for the same folder.

        Args:
            folder: the checkpoint.
            config: its config, as `moescale.calibrate.runner.read_config` gives it.
            moe: the MoE of the checkpoint.

        Raises:
            UnsupportedError: transformers cannot load it here, or has no module for its experts.
        """
        from moescale.calibrate.measure import open_model

        if self._model is None or folder != self._folder:
            self._close()  # two models may not fit into memory
            self._model = self._open.enter_context(open_model(folder, config, moe, self._how))
            self._folder = folder
        return self._model

    def _close(self) -> None:
        if self._model is not None:
            self._model = None
            self._open.close()
            gc.collect()  # a model has reference cycles
