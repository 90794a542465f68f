"""Checks before a run: free space, and what a run would refuse."""

from __future__ import annotations

from dataclasses import replace

from moescale.errors import DestinationError, bytes_text
from moescale.planning.plan import Plan
from moescale.storage.base import Destination


def with_space_warning(plan: Plan, destination: Destination) -> Plan:
    """The plan, with a warning if the disk may be too small.

    It is only a warning if blocks can be shared with the source, since cloned blocks take no space.

    Raises:
        DestinationError: the disk is too small, and no blocks can be shared.
    """
    try:
        if (room := destination.available_bytes()) is None:
            return plan
        missing = plan.bytes_written - room
        may_share = missing <= 0 or destination.may_share_blocks(plan.source)
    except OSError:  # unknown free space, or a destination that the run will refuse
        return plan
    if missing <= 0:
        return plan
    free = plan.bytes_written - missing
    needed, available = bytes_text(plan.bytes_written), bytes_text(free)
    less = f"{destination.identity}: the output needs {needed}, but {available} are free"
    if not may_share:
        raise DestinationError(less, hint="Free some space, or give another destination.")
    warning = f"{less}; that is only enough if it can share blocks with the source"
    return replace(plan, warnings=(*plan.warnings, warning))


def with_refusal(plan: Plan, error: DestinationError) -> Plan:
    """The plan, with a warning that a run would be refused."""
    refusal = f"a run would be refused: {error}".replace("\n", ". ")
    return replace(plan, warnings=(*plan.warnings, refusal))
