"""How often to save: Young's interval, from what saving costs and how often something is lost."""

from __future__ import annotations

import math

from dcnr.machine import Instant


class Pace:
    """When the next save is worth its cost (J. W. Young, "A first order approximation to the optimum checkpoint
    interval", 1974): after sqrt(2 C M), where C is what the last one cost in seconds and M the mean time between losses
    as seen, with one loss per ``prior_s`` assumed before there is any."""

    def __init__(self, now: Instant, *, prior_s: float, least_s: float, cost_factor: float = math.inf) -> None:
        """Seconds. Never sooner than ``least_s``, nor later than ``cost_factor`` costs: then a loss is dear at most in
        proportion."""
        self._prior_s = prior_s
        self._least_s = least_s
        self._cost_factor = cost_factor
        self._began_at = now
        self._losses = 0
        self._next_at = Instant(now + least_s)

    def lost(self) -> None:
        """Something was lost that had to be computed again from the last save."""
        self._losses += 1

    def saved(self, now: Instant, cost_s: float) -> None:
        between_s = (now - self._began_at + self._prior_s) / (self._losses + 1)
        pause_s = math.sqrt(2 * cost_s * between_s)
        if cost_s:
            pause_s = min(pause_s, self._cost_factor * cost_s)
        self._next_at = Instant(now + max(pause_s, self._least_s))

    def put_off(self, until: Instant) -> None:
        """A save that failed is not tried again before."""
        self._next_at = until

    def due(self, now: Instant) -> bool:
        return now >= self._next_at
