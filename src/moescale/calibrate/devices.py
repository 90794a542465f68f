"""Checks what running a model needs: libraries, memory, a device."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from typing import NamedTuple

from moescale.errors import UsageError, one_line
from moescale.options import DEVICES

_NEEDED = ("torch", "transformers", "accelerate")

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def check_installed(what: str) -> None:
    """Refuse early if the libraries that run a model are missing; `what` needs them.

    Raises:
        UsageError: a library is missing or broken.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{what} needs {', '.join(missing)} to run the model",
            hint="Install them with pip install '.[measure]' in the clone, or: pip install "
            + " ".join(_NEEDED),
        )
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # such as a missing CUDA library or an incompatible version
            raise UsageError(
                f"{what} needs {name}, which cannot be imported: {one_line(error)}",
                hint=f"Reinstall {name}; --rule gates does not need it.",
            ) from None


def parse_memory(text: str) -> int:
    """Bytes, from ``8GiB`` or ``8GB``.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]i?)?b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(f"--max-memory is {text!r}: it must be a size such as 8GiB")
    return int(size)


class Running(NamedTuple):
    """How a model is run.

    Attributes:
        max_memory: bytes of main memory for weights; the rest stays on disk. None: no limit.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
    """

    max_memory: int | None = None
    device: str = "auto"


ANYWHERE = Running()


def running(max_memory: str | int | None, device: str | None) -> Running:
    """How a model is run, from the options.

    Raises:
        UsageError: an option is invalid.
    """
    if device not in (None, *DEVICES):
        raise UsageError(f"--device is {device!r}: it must be one of {', '.join(DEVICES)}")
    memory = parse_memory(str(max_memory)) if max_memory is not None else None
    return Running(memory, device or "auto")
