"""Taking over a session that goes on: what its hosts say, put together to where it stands.

Nothing that hosts have computed is lost by the change of an owner: they keep every report that it may need, say them
again, and then say what the reports alone do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dcnr.ids import Incarnation, Instance, PeerId, SessionId
from dcnr.machine import Instant
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.session_log import SessionLog
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol import messages as m


@dataclass(slots=True, kw_only=True)
class Adoption:
    """Hosts that are asked, and what they have said. ``until``: whoever has not answered by then is lost."""

    waiting: set[PeerId]
    until: Instant
    answers: dict[PeerId, m.Adopted] = field(default_factory=dict)
    reports: list[tuple[PeerId, m.Message]] = field(default_factory=list)
    """In the order in which they came; each at least once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the hosts stand together."""

    done_step: int
    """Every report of later steps has been said again."""
    last_opened: tuple[int, int] | None
    """(step, microbatch); those before it were opened too."""
    losses: Mapping[int, float]
    """Of the steps since the newest commit, up to ``done_step``."""
    scales: Mapping[int, float]
    snapshot_at: int
    """The snapshot that every host plans or has stored; 0 = none."""


class Takeover:
    """Asks the hosts of a session whether they obey its new owner. ``whole`` is called when all of them do, ``lost`` when
    one is gone or never answers; after a start of this orchestrator they get a moment to come back."""

    def __init__(
        self,
        *,
        desk: Desk,
        log: SessionLog,
        id: SessionId,
        hosts: Mapping[PeerId, Incarnation],
        whole: Callable[[Adoption], None],
        lost: Callable[[], None],
    ) -> None:
        limits, now = desk.limits, desk.now
        patience_s = max(limits.red_after_s, desk.started_at + limits.recover_wait_s - now)
        self.over = False
        self._desk = desk
        self._log = log
        self._id = id
        self._hosts = hosts
        self._whole = whole
        self._lost = lost
        self._adoption = Adoption(waiting=set(hosts), until=Instant(now + patience_s))

    def begin(self) -> None:
        self._ask()
        self._look()

    def _ask(self) -> None:
        """Those that have not answered, again and again."""
        if self.over:
            return
        waiting = sorted(self._adoption.waiting)
        if self._desk.now >= self._adoption.until:
            self._desk.emit("not_adopted", self._id, {"peers": waiting})
            self._lost()
            return
        for peer in waiting:
            self._send(peer)
        self._desk.after(self._desk.limits.resend_after_s, self._ask)

    def _send(self, peer: PeerId) -> None:
        node = self._desk.node(peer)
        if node is not None and node.descriptor.incarnation == self._hosts[peer]:
            message = m.Adopt(
                session=self._id,
                epoch=self._log.fold.epoch,
                owner=self._desk.author.peer,
                acquire=self._log.acquired,
                token=self._desk.token(f"objects/{self._id}/read"),
            )
            self._desk.send(peer, message)

    def _look(self) -> None:
        """Is every host back or known to be gone, and one of them lost? Then it cannot be taken over as it is."""
        nodes = [self._desk.nodes.get(peer) for peer in self._hosts]
        here = all(node is not None and (node.usable or node.gone) for node in nodes)
        if here and any(self._desk.is_lost(peer, incarnation) for peer, incarnation in self._hosts.items()):
            self._lost()

    def link_up(self, peer: PeerId) -> None:
        if peer in self._adoption.waiting:
            self._send(peer)
            self._look()

    def answered(self, peer: PeerId, message: m.Adopted) -> None:
        adoption = self._adoption
        if self.over or message.epoch != self._log.fold.epoch or peer not in adoption.waiting:
            return
        if self._desk.nodes[peer].descriptor.incarnation != self._hosts[peer]:
            return
        adoption.waiting.discard(peer)
        adoption.answers[peer] = message
        if not adoption.waiting:
            self._whole(adoption)

    def report(self, peer: PeerId, message: m.Message) -> None:
        """What could not be read from the last owner is read again once a host has adopted."""
        unread = isinstance(message, m.TaskFailed) and message.cause in ("data", "state")
        if not (unread and peer in self._adoption.waiting):
            self._adoption.reports.append((peer, message))


def untouched(adoption: Adoption, instance: Instance, base_step: int) -> bool:
    """Whether none of the hosts that have their tickets has begun: then the others may still get theirs. Whoever has
    something to say, or was asked for a snapshot, has begun, and the others were told to let go since."""
    here = [a for a in adoption.answers.values() if a.instance == instance]
    begun = any(a.open_microbatches or a.snapshot_at or any(v != base_step for _, v in a.versions) for a in here)
    return not begun and not adoption.reports


def standing(
    adoption: Adoption, steps: StepMachine, committed_step: int, stateful: frozenset[PeerId]
) -> Standing | None:
    """``steps`` knows the session's costs. ``None`` where something is missing: then it goes back to its newest commit.

    ``stateful``: hosts of VNodes with parameters.
    """
    answers = adoption.answers
    done = max(committed_step, max(a.kept_from for a in answers.values()) - 1)
    if any(version < done for a in answers.values() for _, version in a.versions):
        return None
    said = [message for _, message in adoption.reports if isinstance(message, m.Loss)]
    losses = {step: steps.loss_of(step, said) for step in range(committed_step + 1, done + 1)}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if len(known) < len(losses):
        return None
    opened = [key for a in answers.values() for key in a.open_microbatches if key[0] > done]
    planned = {answers[peer].snapshot_at for peer in stateful}
    return Standing(
        done_step=done,
        last_opened=max(opened, default=None),
        losses=known,
        scales={step: scale for a in answers.values() for step, scale in a.scales},
        snapshot_at=planned.pop() if len(planned) == 1 else 0,
    )
