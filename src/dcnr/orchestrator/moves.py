"""A host is to give up its VNodes: it leaves, or its owner drains it, or it cannot reach another host.

No step is withdrawn for one that leaves: nothing beyond some step is opened until the state after that step is whole, on PNodes or
as a commit; then everything is placed anew from there, without whoever leaves.
"""

from __future__ import annotations

from collections.abc import Callable

from dcnr.ids import PeerId, SessionId
from dcnr.machine import Instant
from dcnr.orchestrator.checkpoints import Training
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.marks import Marks
from dcnr.orchestrator.placement import Placement, Problem
from dcnr.protocol import messages as m


class Moves:
    """See the module's docstring. ``problem`` is the placement as it would be now, without PNodes that leave."""

    def __init__(
        self, *, desk: Desk, id: SessionId, marks: Marks, training: Training, problem: Callable[[], Problem]
    ) -> None:
        self._desk = desk
        self._id = id
        self._marks = marks
        self._training = training
        self._problem = problem
        self._planning = False

    def leaving(self) -> list[PeerId]:
        """Hosts that are to give up their VNodes."""
        found = ((peer, self._desk.node(peer)) for peer in self._training.hosts())
        return sorted(peer for peer, node in found if node is not None and node.leaving)

    def look(self) -> None:
        """Does a host leave, and is nothing under way for it yet?"""
        if self._planning or self._marks.wanted or not self._training.running or not self.leaving():
            return
        self._planning = True
        self._desk.plan(self._problem(), self._planned)

    def _planned(self, answer: Placement | str) -> None:
        self._planning = False
        if not self._training.running or not self.leaving():
            return
        if isinstance(answer, str):
            self.refuse(answer)
        else:
            self._desk.emit("moving", self._id, {"from": self.leaving()})
            self._marks.wanted = True
            self._training.go_on()

    def part(self, peer: PeerId) -> bool:
        """Whether a host has not reached another one for long, though both are here: they are not to be neighbours."""
        desk, hosts = self._desk, self._training.hosts()
        for other, since in desk.nodes[peer].unreachable.items():
            waited = desk.now - since >= desk.limits.pair_patience_s
            if waited and peer in hosts and other in hosts and desk.node(other) is not None:
                desk.parted[frozenset((peer, other))] = Instant(desk.now + desk.limits.pair_memory_s)
                desk.emit("parted", self._id, {"peers": sorted((peer, other))})
                return True
        return False

    def refuse(self, reason: str) -> None:
        """There is no other place: whoever leaves need not wait for one."""
        for peer in self.leaving():
            self._desk.send(peer, m.MoveRefused(session=self._id, reason=reason))
