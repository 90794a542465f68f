"""Run a mixture-of-experts checkpoint with another number of active experts.

The public names are here: `plan`, `compare`, `convert`, `verify`, `record` and `model_types`, the
types of their arguments and results, and the exceptions in `moescale.errors`. They are imported on
first use, so that ``import moescale`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moescale import errors
from moescale.version import __version__

if TYPE_CHECKING:
    from moescale.api import Measuring, compare, convert, model_types, plan, record, verify
    from moescale.options import Options, Rescaling
    from moescale.planning.plan import Plan
    from moescale.planning.plan_table import PlanTable
    from moescale.results import Record, Result
    from moescale.storage.base import Phase, Progress

__all__ = [
    "Measuring",
    "Options",
    "Phase",
    "Plan",
    "PlanTable",
    "Progress",
    "Record",
    "Rescaling",
    "Result",
    "__version__",
    "compare",
    "convert",
    "errors",
    "model_types",
    "plan",
    "record",
    "verify",
]

_MODULES = {
    "Measuring": "moescale.api",
    "Options": "moescale.options",
    "Phase": "moescale.storage.base",
    "Plan": "moescale.planning.plan",
    "Progress": "moescale.storage.base",
    "Record": "moescale.results",
    "Rescaling": "moescale.options",
    "Result": "moescale.results",
    "PlanTable": "moescale.planning.plan_table",
    "compare": "moescale.api",
    "convert": "moescale.api",
    "model_types": "moescale.api",
    "plan": "moescale.api",
    "record": "moescale.api",
    "verify": "moescale.api",
}


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
