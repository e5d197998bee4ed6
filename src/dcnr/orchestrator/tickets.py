"""The tickets of one PNode for a placement: everything that it needs to host its part of a training session."""

from __future__ import annotations

from collections.abc import Mapping

from dcnr.ids import PeerId, SessionId, Sha256, VNodeId
from dcnr.network.analysis import Network
from dcnr.network.graph import canonical_json
from dcnr.orchestrator.desk import Desk
from dcnr.protocol import messages as m
from dcnr.session.checkpoint import StoredState
from dcnr.session.log import Fold
from dcnr.session.record import Record


def tickets(
    desk: Desk,
    id: SessionId,
    record: Record,
    written: Network,
    fold: Fold,
    peer: PeerId,
    states: Mapping[VNodeId, StoredState | None],
    held: Mapping[VNodeId, tuple[m.Neighbour, str]],
) -> m.Tickets:
    """Of the placement in ``fold``, for ``peer``. ``states``: of every VNode that has one, where the base keeps it;
    ``None`` = it is drawn from the seed. ``held``: PNodes that keep them, where the store does not, and the token there."""
    token = desk.token(f"objects/{id}/read")
    refs = [
        m.StateRef(
            vnode=v,
            sha256=stored.sha256 if stored else Sha256(""),
            size_bytes=stored.size_bytes if stored else 0,
            token=held[v][1] if v in held else token if stored else "",
            holder=(held[v][0],) if v in held else (),
        )
        for v, spot in fold.placement.items()
        if spot.peer == peer and v in states
        for stored in [states[v]]
    ]
    return m.Tickets(
        session=id,
        epoch=fold.epoch,
        owner=desk.author.peer,
        instance=fold.instance,
        network=record.network,
        definition=canonical_json(written.definition),
        record=record.to_bytes(),
        placement=tuple(m.Location(vnode=v, peer=s.peer, worker=s.worker) for v, s in fold.placement.items()),
        neighbours=tuple(desk.neighbour(p) for p in sorted({s.peer for s in fold.placement.values()})),
        window=fold.window,
        base_step=fold.base.step,
        states=tuple(refs),
        rows=record.recipe.rows,
    )
