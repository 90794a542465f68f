"""Run a mixture-of-experts checkpoint with another number of active experts.

The public names are here: `plan`, `convert` and `verify` with `Options`, and the errors of
`moescale.errors`. They are imported on first use, so that ``import moescale`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moescale.version import __version__

if TYPE_CHECKING:
    from moescale.api import convert, plan, verify
    from moescale.options import Options
    from moescale.planning.plan import Plan

__all__ = ["Options", "Plan", "__version__", "convert", "plan", "verify"]

_HOMES = {
    "Options": "moescale.options",
    "Plan": "moescale.planning.plan",
    "convert": "moescale.api",
    "plan": "moescale.api",
    "verify": "moescale.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
