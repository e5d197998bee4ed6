"""What a tensor frame says about itself, and what is answered to it."""

from __future__ import annotations

from enum import IntEnum


class Direction(IntEnum):
    FORWARD = 0
    BACKWARD = 1


class FrameStatus(IntEnum):
    ACCEPTED = 0
    DUPLICATE = 1
    STALE = 2
    """Older than what the receiver's log says: dropped."""
    NO_TICKET = 3
    """The receiver knows no such session or VNode: sent again later, for a ticket may be under way."""
    REFUSED = 4
    """Malformed: wrong dtype, shape or edge."""
