"""What whoever watches a session is told of its placements, and of what a recovery spends its time on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcnr.ids import LogIndex, VNodeId
from dcnr.machine import Instant
from dcnr.orchestrator.placement import Placement
from dcnr.session import events
from dcnr.session.log import Fold, Spot


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


def placement_events(
    index: LogIndex, before: Mapping[VNodeId, Spot], fold: Fold, answer: Placement
) -> tuple[*tuple[events.VNodeMoved | events.ExactnessLost, ...], events.Placed]:
    """What changed with log entry ``index``, then where everything is now."""
    found: list[events.VNodeMoved | events.ExactnessLost] = [
        events.VNodeMoved(vnode=v, source=before[v].peer, target=spot.peer, index=index, why=answer.why[v])
        for v, spot in fold.placement.items()
        if v in before and before[v].peer != spot.peer
    ]
    old = sorted({s.numeric_class for s in before.values()})
    new = sorted({s.numeric_class for s in fold.placement.values()})
    if (old and old != new) or (not old and len(new) > 1):
        found.append(events.ExactnessLost(index=index, old=",".join(old), new=",".join(new)))
    return (
        *found,
        events.Placed(
            index=index,
            base_step=fold.base.step,
            window=fold.window,
            vnodes={v: s.peer for v, s in fold.placement.items()},
            why=dict(answer.why.items()),
            numeric_class=",".join(new),
        ),
    )
