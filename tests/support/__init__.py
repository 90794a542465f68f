"""What several tests share: checkpoints made in code, a loopback Hub, references."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def environment(**variables: str) -> dict[str, str]:
    """The environment of a Python process that can import what this one can, and this package."""
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, **variables}
