"""What a recovery spends its time on, for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass

from dcnr.machine import Instant
from dcnr.session import events


@dataclass(slots=True, kw_only=True)
class Recovery:
    """From the last sign of life of a lost PNode until the step that was running is done again."""

    since: Instant
    """The end of the newest phase; first the last sign of life."""
    regain_step: int

    def phase(self, name: str, now: Instant) -> events.RecoveryPhase:
        """The phase ``name`` ends now."""
        took_s, self.since = now - self.since, now
        return events.RecoveryPhase(phase=name, ms=round(1000 * took_s, 3))
