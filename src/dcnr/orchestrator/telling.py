"""What whoever watches a session is told of its placements, and of what a recovery spends its time on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcnr.ids import LogIndex, PeerId, SessionId, VNodeId
from dcnr.machine import Instant
from dcnr.orchestrator.desk import Node
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


def why_it_waits(
    planned: str, nodes: Mapping[PeerId, Node], session: SessionId, refused: Mapping[PeerId, tuple[int, str]]
) -> str:
    """``planned``: what the placement says is missing. Beside it, who has what is missing, and who refused, with why."""
    here = {peer: node for peer, node in nodes.items() if node.usable}
    parts = [planned]
    holding = sorted({other for node in here.values() for other in node.reserved if other != session})
    if holding:
        held = sum(size for node in here.values() for other, size in node.reserved.items() if other != session)
        parts.append(f"{held / 2**20:,.1f} MiB are held by session {', '.join(holding)}: it goes on when that ends")
    if foreign := sum(node.foreign_bytes for node in here.values()):
        text = "are held by sessions of other orchestrators: it goes on when they end"
        parts.append(f"{foreign / 2**20:,.1f} MiB {text}")
    for peer, (_, reason) in sorted(refused.items()):
        if reason and peer in here:
            parts.append(f"PNode {peer[:12]} on {here[peer].capabilities.hostname} refused it: {reason}")
    return "; ".join(parts)
