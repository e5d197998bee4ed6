"""Liveness as a pure function of time: green, yellow, red."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dcnr.config import Limits
from dcnr.machine import Instant


class Colour(StrEnum):
    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"
    GONE = "gone"


@dataclass(slots=True, kw_only=True)
class Pulse:
    """When a peer was last heard, and since when its link is down (``None`` = it is up)."""

    heard_at: Instant
    down_since: Instant | None = None

    def colour(self, now: Instant, limits: Limits) -> Colour:
        """Red = lost: silent too long, or its link closed and was not dialled again."""
        silent_s = now - self.heard_at
        if silent_s > limits.red_after_s:
            return Colour.RED
        if self.down_since is not None and now - self.down_since > limits.link_grace_s:
            return Colour.RED
        if self.down_since is not None or silent_s > limits.yellow_after_s:
            return Colour.YELLOW
        return Colour.GREEN

    def deadline(self, limits: Limits) -> Instant:
        """Just after it turns red if nothing is heard."""
        red = self.heard_at + limits.red_after_s
        if self.down_since is not None:
            red = min(red, self.down_since + limits.link_grace_s)
        return Instant(red + 0.001)

    def shift(self, gap_s: float) -> None:
        """The observer was paused for ``gap_s``: a paused observer condemns nobody."""
        self.heard_at = Instant(self.heard_at + gap_s)
        if self.down_since is not None:
            self.down_since = Instant(self.down_since + gap_s)
