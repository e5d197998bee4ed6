"""The root machine of a PNode: who it is linked to, what it may host, what runs next on its worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dcnr.config import Limits
from dcnr.errors import DCNRError, ProtocolError
from dcnr.ids import Epoch, Incarnation, Instance, NetworkId, PeerId, SessionId
from dcnr.machine import (
    Admit,
    Compute,
    Computed,
    ComputeFailed,
    Dial,
    Discard,
    Downloaded,
    Effect,
    Emit,
    Event,
    Exit,
    Fetched,
    Handle,
    Instant,
    Kept,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    PersistFailed,
    Received,
    Release,
    Send,
    Shutdown,
    Tick,
    TransferFailed,
    Uploaded,
)
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import from_canonical_json, json_bytes
from dcnr.network.memory import memory
from dcnr.network.rewrite import SERVING, rewritten
from dcnr.pnode import tasks
from dcnr.pnode.host import Host
from dcnr.pnode.jobs import Ids, Job
from dcnr.protocol import messages as m
from dcnr.protocol.messages import FrameStatus
from dcnr.session.log import Entry, Kind
from dcnr.session.record import Record

FENCE = "fence.json"
"""The home's key of the fence: per session the highest epoch accepted, its owner, and the newest ticket."""


@dataclass(slots=True, kw_only=True)
class Link:
    """What is known of a peer, or (``peer`` empty) of a bootstrap address."""

    addresses: tuple[str, ...]
    up: bool = False
    incarnation: Incarnation | None = None
    dialling: bool = False
    dial_at: Instant | None = None
    pause_s: float
    missed_since: Instant | None = None
    """A frame has waited for it since then, and there was no link."""


@dataclass(slots=True, kw_only=True)
class Running:
    host: Host
    job: Job
    since: Instant


@dataclass(slots=True, kw_only=True)
class FenceEntry:
    epoch: Epoch
    owner: PeerId
    instance: int


@dataclass(slots=True, kw_only=True)
class Usual:
    """Slowest finished task of each rank of a session: what is usual there."""

    seconds: dict[int, float] = field(default_factory=dict)


class PNodeMachine:
    """Decides for one PNode. See :mod:`dcnr.machine`.

    ``fence`` is what the home holds under :data:`FENCE`. ``bootstrap`` are addresses of orchestrators.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        incarnation: Incarnation,
        addresses: tuple[str, ...],
        capabilities: m.Capabilities,
        bootstrap: tuple[str, ...],
        fence: bytes | None,
        limits: Limits,
        seed: int,
    ) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.addresses = addresses
        self.capabilities = capabilities
        self.limits = limits
        self._seed = seed
        self._draws = 0
        self._out: list[Effect] = []
        self._now = Instant(0.0)
        self._handled_at: Instant | None = None
        self._ids = Ids()
        self._hosts: dict[SessionId, Host] = {}
        self._retired: list[Host] = []
        self._networks: dict[tuple[NetworkId, tuple[str, ...]], Network] = {}
        self._running: dict[int, Running] = {}
        self._usual: dict[SessionId, Usual] = {}
        self._turn = 0
        self._served: dict[SessionId, int] = {}
        self._expiry: dict[SessionId, Instant] = {}
        self._bootstrap: dict[str, PeerId | None] = dict.fromkeys(bootstrap)
        self._bootstrap_links = {a: self._link((a,), Instant(0.0)) for a in bootstrap}
        self._away: set[str] = set()
        """Bootstrap addresses where nobody answers, and that was said."""
        self._links: dict[PeerId, Link] = {}
        self._given = frozenset(bootstrap)
        """What the owner named: dialled for ever. What orchestrators say of each other is dialled while they say it."""
        self._heartbeat_at: Instant | None = None
        self._heartbeats = 0
        self._repeat_at: Instant | None = None
        self._frames_at: Instant | None = None
        self._leaving = False
        """The process is ending."""
        self._departing = ""
        """Why this PNode gives up what it hosts, and then ends."""
        self._depart_by: Instant | None = None
        self._draining = False
        """It gives up what it hosts, and stays."""
        self._let_go: set[SessionId] = set()
        """Sessions that have no other place: they are not waited for."""
        self._guarded: dict[SessionId, Epoch] = {}
        """Sessions of which this PNode keeps states for others, and by which owner's word."""
        self._fence: dict[SessionId, FenceEntry] = self._read_fence(fence)
        self._persisting: list[Callable[[str | None], None]] | None = None
        self._persist_next: list[Callable[[str | None], None]] = []

    def _link(self, addresses: tuple[str, ...], dial_at: Instant | None) -> Link:
        return Link(addresses=addresses, dial_at=dial_at, pause_s=self.limits.redial_first_s)

    @staticmethod
    def _read_fence(data: bytes | None) -> dict[SessionId, FenceEntry]:
        if data is None:
            return {}
        return {
            SessionId(session): FenceEntry(epoch=Epoch(epoch), owner=PeerId(owner), instance=instance)
            for session, (epoch, owner, instance) in json.loads(data).items()
        }

    # --- the machine's interface ----------------------------------------------------------------------------

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        gap = now - (now if self._handled_at is None else self._handled_at)
        if gap > 2 * self.limits.heartbeat_interval_s:
            # This process was paused, its worker with it: that makes no task old and no instance unused.
            for running in self._running.values():
                running.since = Instant(running.since + gap)
            self._expiry = {session: Instant(at + gap) for session, at in self._expiry.items()}
        self._now = self._handled_at = now
        match event:
            case Tick():
                pass
            case Received():
                self._received(event)
            case LinkUp():
                self._link_up(event)
            case LinkDown():
                self._link_down(event)
            case Computed():
                self._computed(event)
            case ComputeFailed():
                self._compute_failed(event)
            case Persisted():
                self._persisted(None)
            case PersistFailed(reason=reason):
                self._persisted(reason)
            case Downloaded(id=id, handle=handle, local=local):
                if (owner := self._owner_of(id)) is None:
                    self._out.append(Release(handles=(handle,)))
                else:
                    owner.downloaded(id, handle, local)
            case Fetched(id=id, tensors=tensors):
                if (owner := self._owner_of(id)) is None:
                    self._out.append(Release(handles=tuple(t.handle for t in tensors)))
                else:
                    owner.fetched(id, tensors)
            case Kept(id=id, sha256=sha256, size_bytes=size_bytes):
                if (owner := self._owner_of(id)) is not None:
                    owner.snapshots.kept(id, sha256, size_bytes)
            case Uploaded(id=id):
                if (owner := self._owner_of(id)) is not None:
                    owner.snapshots.uploaded(id)
            case TransferFailed(id=id, reason=reason):
                if (owner := self._owner_of(id)) is not None:
                    owner.transfer_failed(id, reason)
            case Shutdown(reason=reason):
                self._depart(reason)
            case _:
                raise AssertionError(f"a PNode knows no {type(event).__name__}")
        self._time_passed()
        self._dispatch()
        out, self._out[:] = list(self._out), []
        return out

    def deadline(self) -> Instant | None:
        times = [self._heartbeat_at, self._repeat_at, self._frames_at, self._depart_by, *self._expiry.values()]
        wanted = self._wanted()
        times += [x.dial_at for p, x in self._links.items() if p in wanted and not x.up and not x.dialling]
        times += [x.dial_at for a, x in self._bootstrap_links.items() if not x.dialling and not self._linked(a)]
        known = [t for t in times if t is not None]
        return min(known) if known else None

    def check_frame(self, peer: PeerId, frame: m.TensorFrame) -> str | None:
        """A reason not to keep the frame's bytes. The frame is then delivered with handle 0 and answered."""
        status, reason = self._status(frame)
        return None if status is FrameStatus.ACCEPTED else f"{status.name}: {reason}"

    # --- time -----------------------------------------------------------------------------------------------

    def _time_passed(self) -> None:
        now = self._now
        if self._leaving:
            return
        self._look_for_hopeless()
        self._look_whether_free()
        if self._leaving:
            return
        self._dial_due()
        if self._heartbeat_at is None or self._heartbeat_at <= now:
            self._heartbeat_at = Instant(now + self.limits.heartbeat_interval_s)
            self._heartbeat()
        if self._repeat_at is not None and self._repeat_at <= now:
            for host in self._hosts.values():
                host.snapshots.repeat_stored()
            self._repeat_at = None
        if self._repeat_at is None and any(h.snapshots.stored for h in self._hosts.values()):
            self._repeat_at = Instant(now + self.limits.stored_repeat_s)
        soonest = [t for h in self._hosts.values() if (t := h.send_again(now)) is not None]
        self._frames_at = min(soonest) if soonest else None
        for session in [s for s, t in self._expiry.items() if t <= now]:
            del self._expiry[session]
            if session in self._hosts:
                self._drop(self._hosts[session])

    def _draw(self) -> float:
        """A number in [0, 1) from the seeded counter-based generator."""
        self._draws += 1
        word = hashlib.blake2b(f"{self._seed}/{self._draws}".encode(), digest_size=8).digest()
        return int.from_bytes(word, "little") / 2**64

    def _wanted(self) -> set[PeerId]:
        """Peers that a frame waits for; orchestrators are dialled at their bootstrap addresses."""
        return {p.peer for h in self._hosts.values() for p in h.unacknowledged.values()}

    def _dial_due(self) -> None:
        now = self._now
        wanted = self._wanted()
        for peer, link in self._links.items():
            if link.up or peer not in wanted:
                link.missed_since = None
            elif link.missed_since is None:
                link.missed_since = now
            if link.up or link.dialling or peer not in wanted or not link.addresses:
                continue
            if link.dial_at is None or link.dial_at <= now:
                link.dialling = True
                self._out.append(Dial(peer=peer, addresses=link.addresses))
        for address, link in self._bootstrap_links.items():
            due = link.dial_at is not None and link.dial_at <= now
            if due and not link.dialling and not self._linked(address):
                link.dialling = True
                self._out.append(Dial(peer=PeerId(""), addresses=(address,)))

    def _linked(self, address: str) -> bool:
        peer = self._bootstrap[address]
        return peer is not None and peer in self._links and self._links[peer].up

    def _back_off(self, link: Link) -> None:
        link.dial_at = Instant(self._now + link.pause_s * (0.5 + 0.5 * self._draw()))
        link.pause_s = min(2 * link.pause_s, self.limits.redial_most_s)

    def _orchestrators(self) -> list[PeerId]:
        return [p for p in self._bootstrap.values() if p is not None and p in self._links and self._links[p].up]

    def _heartbeat(self) -> None:
        self._heartbeats += 1
        # Also of hosts that are accepted only when a task returns, and of those that it keeps from being released.
        progress = tuple(self._progress(h) for h in (*self._hosts.values(), *self._retired))
        message = m.Heartbeat(
            sequence=self._heartbeats,
            memory_free_bytes=self._free_bytes(),
            progress=progress,
            leaving=self._draining or bool(self._departing),
            unreachable=tuple(p for p, x in self._links.items() if self._misses(x)),
        )
        for peer in dict.fromkeys(self._orchestrators()):
            self._out.append(Send(peer=peer, message=message))

    def _misses(self, link: Link) -> bool:
        return link.missed_since is not None and self._now - link.missed_since >= self.limits.link_grace_s

    def _progress(self, host: Host) -> m.Progress:
        """With the oldest task of the whole worker, whosever it is: all sessions wait for it."""
        oldest = min(self._running.values(), key=lambda r: r.since, default=None)
        return m.Progress(
            session=host.session,
            epoch=host.epoch,
            tasks_done=host.tasks_done,
            task_age_s=0.0 if oldest is None else self._now - oldest.since,
            task_usual_s=0.0 if oldest is None else self._usual_s(oldest),
            owner=host.owner,
            reserved_bytes=host.reserved_bytes,
        )

    def _usual_s(self, running: Running) -> float:
        usual = self._usual.get(running.host.session)
        return usual.seconds.get(running.job.rank, 0.0) if usual else 0.0

    def _look_for_hopeless(self) -> None:
        """A kernel that hangs cannot be ended, and whatever is placed here waits behind it: only a new process helps."""
        limits = self.limits
        for running in self._running.values():
            hanging_s = max(limits.task_age_factor * self._usual_s(running), limits.task_age_floor_s)
            if running.host.dropped and self._now - running.since > limits.task_hopeless_factor * hanging_s:
                self._leave(f"a task of session {running.host.session} never returned", code=1)
                return

    # --- links ----------------------------------------------------------------------------------------------

    def _link_up(self, event: LinkUp) -> None:
        known = self._bootstrap_links.get(event.address) if event.role == "orchestrator" else None
        if known is not None:
            known.dialling = False
            known.pause_s = self.limits.redial_first_s
            self._away.discard(event.address)
            self._bootstrap[event.address] = event.peer
            self._out.append(Emit(kind="joined", data={"address": event.address, "orchestrator": event.peer}))
        link = self._links.setdefault(event.peer, self._link((event.address,) if event.address else (), None))
        link.up = True
        link.dialling = False
        link.incarnation = event.incarnation
        link.pause_s = self.limits.redial_first_s
        if event.role == "orchestrator":
            self._heartbeat()
        for host in self._hosts.values():
            neighbour = host.neighbours.get(event.peer)
            if neighbour is None or neighbour.incarnation == event.incarnation:
                host.link_up(event.peer)

    def _link_down(self, event: LinkDown) -> None:
        failed = self._bootstrap_links.get(event.address) if event.peer == "" else None
        if failed is not None:
            failed.dialling = False
            self._back_off(failed)
            if event.address not in self._away:
                # Once, not at every attempt: a PNode may wait for its orchestrator for days.
                self._away.add(event.address)
                data = {"address": event.address, "reason": event.reason, "next": "it is dialled until it answers"}
                self._out.append(Emit(kind="orchestrator_away", data=data))
            return
        for address, peer in self._bootstrap.items():
            if peer == event.peer:
                self._bootstrap_links[address].dial_at = self._now
        link = self._links.get(event.peer)
        if link is None:
            return
        link.up = False
        link.dialling = False
        self._back_off(link)

    def _meet(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Keep links to the orchestrators that one names: whichever owns a session, another can take it over."""
        if peer not in self._orchestrators():
            return
        for address in [a for a in self._bootstrap if a not in self._given and a not in addresses]:
            if not self._linked(address) and not self._bootstrap_links[address].dialling:
                del self._bootstrap[address], self._bootstrap_links[address]
        for address in addresses:
            if address not in self._bootstrap and len(self._bootstrap) < self.limits.orchestrators_known:
                self._bootstrap[address] = None
                self._bootstrap_links[address] = self._link((address,), self._now)

    # --- the fence ------------------------------------------------------------------------------------------

    def _raise_fence(
        self, session: SessionId, epoch: Epoch, owner: PeerId, instance: int, then: Callable[[str | None], None]
    ) -> None:
        """Persist, then call ``then`` with None or the reason why it failed. One write is under way at a time."""
        self._fence[session] = FenceEntry(epoch=epoch, owner=owner, instance=instance)
        self._persist_next.append(then)
        if self._persisting is None:
            self._persist()

    def _persist(self) -> None:
        self._persisting, self._persist_next = self._persist_next, []
        data = json_bytes({s: [e.epoch, e.owner, e.instance] for s, e in self._fence.items()})
        self._out.append(Persist(key=FENCE, data=data))

    def _persisted(self, reason: str | None) -> None:
        waiting, self._persisting = self._persisting or [], None
        if self._persist_next:
            self._persist()
        for then in waiting:
            then(reason)

    def _is_stale(self, session: SessionId, epoch: Epoch) -> bool:
        fence = self._fence.get(session)
        return fence is not None and epoch < fence.epoch

    def _stale(self, peer: PeerId, session: SessionId, epoch: Epoch) -> bool:
        """Answers a stale command with what is current."""
        if not self._is_stale(session, epoch):
            return False
        fence = self._fence[session]
        message = m.StaleEpoch(session=session, current=fence.epoch, owner=fence.owner)
        self._out.append(Send(peer=peer, message=message))
        return True

    # --- messages -------------------------------------------------------------------------------------------

    def _received(self, event: Received) -> None:
        peer, message = event.peer, event.message
        match message:
            case m.TensorFrame():
                self._frame(peer, message)
            case m.FrameAck():
                host = self._hosts.get(message.session)
                if host is not None and message.source_instance == host.instance:
                    host.acknowledged(self._now, peer, message)
            case m.Tickets():
                self._tickets(peer, message)
            case m.Withdraw():
                self._withdraw(peer, message)
            case m.Adopt():
                self._adopt(peer, message)
            case m.Orchestrators(addresses=addresses):
                self._meet(peer, addresses)
            case m.OpenMicrobatch():
                if (host := self._commanded(peer, message.session, message.epoch, message.instance)) is not None:
                    self._used(host)
                    host.open(message)
                elif not self._is_stale(message.session, message.epoch):
                    self._out.append(
                        Send(
                            peer=peer,
                            message=m.TaskAnswer(
                                session=message.session,
                                instance=message.instance,
                                step=message.step,
                                microbatch=message.microbatch,
                                accepted=False,
                                reason="no ticket for this instance here",
                            ),
                        )
                    )
            case m.StepClose():
                if (host := self._commanded(peer, message.session, message.epoch, message.instance)) is not None:
                    host.step_close(message)
            case m.SnapshotAt():
                if (host := self._commanded(peer, message.session, message.epoch, None)) is not None:
                    reason = host.snapshots.plan(message)
                    answer = m.SnapshotAnswer(
                        session=message.session,
                        epoch=message.epoch,
                        step=message.step,
                        accepted=not reason,
                        reason=reason,
                    )
                    self._out.append(Send(peer=peer, message=answer))
            case m.Drain(on=on):
                if peer in self._orchestrators():
                    self._draining = on
                    self._heartbeat()
            case m.MoveRefused(session=session):
                if (found := self._hosts.get(session)) is not None and found.owner == peer:
                    self._let_go.add(session)
            case m.Guard():
                self._guard(peer, message)
            case m.HomeCopied():
                data = {
                    "host": message.hostname,
                    "address": ",".join(message.addresses),
                    "reason": "a process with a copy of this home was refused: give it a home of its own",
                }
                self._out.append(Emit(kind="home_copied", data=data))
            case m.Marked(session=session, epoch=epoch):
                if peer in self._orchestrators() and not self._stale(peer, session, epoch):
                    if self._guarded.get(session) == epoch:
                        self._out.append(Discard(session=session, keep=message.keep, guarded=True))
                    if (host := self._commanded(peer, session, epoch, None)) is not None:
                        host.snapshots.marked(message.step)
            case m.Committed():
                if (host := self._commanded(peer, message.session, message.epoch, None)) is not None:
                    host.committed(message.step)
            case m.Abandoned():
                if (host := self._commanded(peer, message.session, message.epoch, None)) is not None:
                    host.snapshots.abandoned(message.step)
            case _:
                self._out.append(
                    Emit(kind="unexpected_message", data={"peer": peer, "message": type(message).__name__})
                )

    def _guard(self, peer: PeerId, message: m.Guard) -> None:
        """States of other PNodes are kept for whoever owns the session now; an older owner has no say."""
        session, epoch = message.session, message.epoch
        if peer not in self._orchestrators() or not _is_name(session) or self._stale(peer, session, epoch):
            return
        if epoch >= self._guarded.get(session, epoch):
            self._guarded[session] = epoch
            self._out.append(Admit(session=session, token=message.token))

    def _commanded(self, peer: PeerId, session: SessionId, epoch: Epoch, instance: int | None) -> Host | None:
        """The accepted host that a command is for; answers ``StaleEpoch`` where it deserves that."""
        if self._stale(peer, session, epoch):
            return None
        host = self._hosts.get(session)
        if host is None or not host.accepted or host.epoch != epoch:
            return None
        return host if instance is None or host.instance == instance else None

    def _status(self, frame: m.TensorFrame) -> tuple[FrameStatus, str]:
        host = self._hosts.get(frame.session)
        if frame.target_incarnation != self.incarnation:
            return FrameStatus.STALE, "meant for another start of this PNode"
        if host is None:
            fence = self._fence.get(frame.session)
            if fence is not None and frame.target_instance < fence.instance:
                return FrameStatus.STALE, f"instance {fence.instance} is current here"
            return FrameStatus.NO_TICKET, "no ticket for this session"
        if frame.target_instance < host.instance or frame.source_instance < host.instance:
            return FrameStatus.STALE, f"instance {host.instance} is current here"
        if not host.accepted or frame.target_instance > host.instance or frame.source_instance > host.instance:
            return FrameStatus.NO_TICKET, f"instance {frame.target_instance} is not known here yet"
        return host.status(frame)

    def _frame(self, peer: PeerId, frame: m.TensorFrame) -> None:
        status, reason = self._status(frame)
        kept = frame.tensor.handle != 0
        if status is FrameStatus.ACCEPTED and not kept:
            status, reason = FrameStatus.NO_TICKET, "the ticket came while the frame was refused"
        host = self._hosts.get(frame.session)
        if status is FrameStatus.DUPLICATE and host is not None and host.diverges(frame):
            edge = host.network.definition.edges[frame.edge]
            host.fail(
                edge.source,
                frame.step,
                frame.microbatch,
                "divergence",
                f"{peer} sent other bytes for edge {frame.edge} ({edge.source} to {edge.target}) than came before",
            )
        self._out.append(
            Send(
                peer=peer,
                message=m.FrameAck(
                    session=frame.session,
                    edge=frame.edge,
                    direction=frame.direction,
                    step=frame.step,
                    microbatch=frame.microbatch,
                    source_instance=frame.source_instance,
                    target_instance=frame.target_instance,
                    status=status,
                    reason=reason,
                ),
            )
        )
        if status is FrameStatus.ACCEPTED:
            assert host is not None
            self._used(host)
            host.frame(frame)
        elif kept:
            self._out.append(Release(handles=(frame.tensor.handle,)))

    def _used(self, host: Host) -> None:
        """Serving instances that nobody uses expire. One between two others hears of frames alone."""
        if host.serving:
            self._expiry[host.session] = Instant(self._now + host.tickets.time_to_live_s)

    # --- tickets --------------------------------------------------------------------------------------------

    def _tickets(self, peer: PeerId, tickets: m.Tickets) -> None:
        if self._stale(peer, tickets.session, tickets.epoch):
            return
        old = self._hosts.get(tickets.session)
        if old is not None:
            if old.instance == tickets.instance and old.epoch == tickets.epoch:
                if old.accepted:
                    self._answer(peer, tickets)
                return
            if old.instance > tickets.instance:
                self._answer(peer, tickets, f"instance {old.instance} is current here")
                return
            self._drop(old)
        try:
            host = self._build(tickets)
        except (DCNRError, ValueError, KeyError, TypeError) as error:
            # What an orchestrator sent cannot be hosted; it is told why, and this PNode goes on.
            self._answer(peer, tickets, f"the ticket cannot be used: {error}")
            return
        if old is not None:
            host.snapshots.inherit(old.snapshots)
        # It is accepted only when its predecessors have returned what they hold.
        before = sum(h.reserved_bytes for h in self._retired if h.session == host.session)
        missing = host.reserved_bytes - self._free_bytes() - before
        if missing > 0:
            self._answer(
                peer,
                tickets,
                f"needs {host.reserved_bytes} bytes, {host.reserved_bytes - missing} are free",
                missing,
            )
            return
        self._hosts[tickets.session] = host
        for neighbour in tickets.neighbours:
            if neighbour.peer != self.peer:
                link = self._links.setdefault(neighbour.peer, self._link(neighbour.addresses, None))
                link.addresses = neighbour.addresses
        if host.serving:
            self._used(host)
            self._accept(host)
            return

        def persisted(reason: str | None) -> None:
            if host.dropped:
                return
            if reason is not None:
                self._drop(host)
                self._out.append(Emit(kind="fence_not_written", data={"session": tickets.session, "reason": reason}))
                self._answer(peer, tickets, f"the fence could not be written: {reason}")
                return
            host.fence_written = True
            self._accept_ready()

        self._raise_fence(tickets.session, tickets.epoch, tickets.owner, tickets.instance, persisted)

    def _build(self, tickets: m.Tickets) -> Host:
        for name in (tickets.session, tickets.trained if tickets.serving else tickets.session):
            if not _is_name(name):
                raise ValueError(f"{name!r} is no name of a session")
        for state in tickets.states:
            if state.holder and not state.holder[0].addresses:
                raise ValueError(f"whoever keeps the state of {state.vnode} has no address")
            if state.sha256 and (len(state.sha256) != 64 or set(state.sha256) - set("0123456789abcdef")):
                raise ValueError(f"{state.sha256!r} is no sha256")
        record = Record.from_bytes(tickets.record)
        # Outputs exist in the network as it serves; losses alone are computed as in training.
        outputs = tickets.serving and tickets.results
        rewrites = tuple(name for name in record.rewrites if name in SERVING or not outputs)
        network = self._networks.get((tickets.network, rewrites))
        if network is None:
            written = analyse(from_canonical_json(tickets.definition))
            if written.id != tickets.network:
                raise ValueError("the definition does not hash to the network's id")
            network = rewritten(written, rewrites)
            self._networks = {
                n: v for n, v in self._networks.items() if any(h.network is v for h in self._hosts.values())
            }
            self._networks[tickets.network, rewrites] = network
        host = Host(
            tickets=tickets,
            network=network,
            recipe=record.recipe,
            me=self.peer,
            incarnation=self.incarnation,
            ids=self._ids,
            limits=self.limits,
            out=self._out,
        )
        host.reserved_bytes = memory(
            network,
            [place.vnode for place in tickets.placement if place.peer == self.peer],
            rows=tickets.rows,
            window=tickets.window,
            training=not tickets.serving,
            delay=record.recipe.delay,
            optimizer=record.recipe.optimizer.kind,
            momentum=record.recipe.optimizer.momentum,
        ).total
        return host

    def _free_bytes(self) -> int:
        held = sum(h.reserved_bytes for h in self._hosts.values())
        return self.capabilities.memory_bytes - held - sum(h.reserved_bytes for h in self._retired)

    def _accept_ready(self) -> None:
        """Accept hosts whose fence is written and whose predecessors' tasks have returned."""
        busy = {h.session for h in self._retired}
        for host in self._hosts.values():
            if not host.accepted and host.fence_written and host.session not in busy:
                self._accept(host)

    def _accept(self, host: Host) -> None:
        host.accepted = True
        self._answer(host.owner, host.tickets)

    def _answer(self, peer: PeerId, tickets: m.Tickets, reason: str = "", missing: int = 0) -> None:
        self._out.append(
            Send(
                peer=peer,
                message=m.TicketAnswer(
                    session=tickets.session,
                    epoch=tickets.epoch,
                    instance=tickets.instance,
                    accepted=not reason,
                    reason=reason,
                    missing_bytes=missing,
                ),
            )
        )

    def _withdraw(self, peer: PeerId, message: m.Withdraw) -> None:
        if self._stale(peer, message.session, message.epoch):
            return
        host = self._hosts.get(message.session)
        if host is not None and host.instance < message.before:
            self._drop(host)
        if message.forget_snapshots and message.session in self._fence and message.session not in self._hosts:
            # The session has ended: its snapshots are of no more use, also those of a host that is long gone.
            self._out.append(Discard(session=message.session, keep=()))
        if message.forget_snapshots and _is_name(message.session):
            self._guarded.pop(message.session, None)
            self._out.append(Admit(session=message.session, token=""))
            self._out.append(Discard(session=message.session, keep=(), guarded=True))
        answer = m.Withdrawn(session=message.session, epoch=message.epoch, before=message.before)

        def persisted(reason: str | None) -> None:
            if reason is None:
                self._out.append(Send(peer=peer, message=answer))

        fence = self._fence.get(message.session)
        if fence is not None and message.epoch > fence.epoch:
            self._raise_fence(message.session, message.epoch, peer, fence.instance, persisted)
        else:
            persisted(None)

    def _adopt(self, peer: PeerId, message: m.Adopt) -> None:
        """A new owner asks. What it commands from here on counts, and nothing that the old one still says."""
        session, epoch = message.session, message.epoch
        if self._stale(peer, session, epoch):
            return
        reason = _no_acquire(message)
        if reason:
            self._out.append(Emit(kind="unexpected_message", data={"peer": peer, "message": "Adopt", "reason": reason}))
            return

        def persisted(reason: str | None) -> None:
            host = self._hosts.get(session)
            if reason is not None or self._is_stale(session, epoch):
                return  # It is asked again, or a newer owner asks.
            if host is not None and not host.accepted and host.epoch == epoch:
                return  # It has sent tickets of its own meanwhile.
            if host is not None and not host.accepted:
                self._drop(host)  # Nobody was told that it is here: the new owner sends tickets of its own.
                host = None
            if host is None:
                self._out.append(Send(peer=peer, message=m.Adopted(session=session, epoch=epoch, instance=Instance(0))))
            else:
                host.adopt(epoch, message.owner, message.token)

        host, fence = self._hosts.get(session), self._fence.get(session)
        if host is not None and host.accepted and host.epoch == epoch:
            persisted(None)
        else:
            self._raise_fence(session, epoch, message.owner, fence.instance if fence else 0, persisted)

    def _drop(self, host: Host) -> None:
        host.retire()
        del self._hosts[host.session]
        self._expiry.pop(host.session, None)
        self._served.pop(host.session, None)
        self._retired.append(host)
        self._settle()

    def _settle(self) -> None:
        """Release retired hosts none of whose tasks is under way."""
        busy = [r.host for r in self._running.values()]
        done = [h for h in self._retired if h not in busy]
        self._retired = [h for h in self._retired if h in busy]
        for host in done:
            host.release()
            if host.session not in self._hosts:
                self._usual.pop(host.session, None)
        if done:
            self._accept_ready()

    # --- compute --------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while len(self._running) < self.limits.compute_queue:
            waiting = [h for h in self._hosts.values() if h.accepted and h.has_job()]
            if not waiting:
                return
            host = min(waiting, key=lambda h: self._served.get(h.session, 0))
            self._turn += 1
            self._served[host.session] = self._turn
            job = host.next_job()
            assert job is not None
            task = self._ids.next()
            self._running[task] = Running(host=host, job=job, since=self._now)
            self._out.append(Compute(task=task, worker=0, what=job.build()))

    def _finish(self, task: int) -> Running:
        running = self._running.pop(task)
        spent = self._now - running.since
        if not running.host.dropped:
            usual = self._usual.setdefault(running.host.session, Usual()).seconds
            usual[running.job.rank] = max(usual.get(running.job.rank, 0.0), spent)
        running.host.tasks_done += 1
        # The next one begins on the worker only now: it was queued behind this one.
        for other in self._running.values():
            other.since = self._now
        return running

    def _computed(self, event: Computed) -> None:
        running = self._finish(event.task)
        if running.host.dropped:
            handles = _handles_of(event.result)
            if handles:
                self._out.append(Release(handles=handles))
            self._settle()
        else:
            running.job.done(event.result)

    def _compute_failed(self, event: ComputeFailed) -> None:
        running = self._finish(event.task)
        if running.host.dropped:
            self._settle()
        else:
            job = running.job
            running.host.fail(event.vnode or job.vnode, job.step, job.microbatch, "compute", event.reason)

    def _owner_of(self, id: int) -> Host | None:
        return next((h for h in self._hosts.values() if h.owns(id)), None)

    # --- leaving --------------------------------------------------------------------------------------------

    def _depart(self, reason: str) -> None:
        """Leave as soon as what is trained here is elsewhere; asked twice, at once."""
        if self._departing:
            self._leave(reason)
            return
        self._departing = reason
        self._let_go = set()
        self._depart_by = Instant(self._now + self.limits.leave_patience_s)
        if self._waits_for():
            self._out.append(Emit(kind="departing", data={"reason": reason, "waits_for": sorted(self._waits_for())}))
        self._heartbeat()

    def _waits_for(self) -> set[SessionId]:
        """Sessions that are still to move away."""
        return {h.session for h in self._hosts.values() if not h.serving} - self._let_go

    def _look_whether_free(self) -> None:
        by = self._depart_by
        if by is not None and (by <= self._now or not self._waits_for() or not self._orchestrators()):
            self._leave(self._departing)

    def _leave(self, reason: str, code: int = 0) -> None:
        if self._leaving:
            return
        self._leaving = True
        for peer in dict.fromkeys(self._orchestrators()):
            self._out.append(Send(peer=peer, message=m.Leave(reason=reason)))
        self._out.append(Exit(code=code, reason=reason))


def _is_name(session: SessionId) -> bool:
    """Names of sessions become names of folders."""
    return bool(session) and all(c.isascii() and (c.isalnum() or c in "-_") for c in session)


def _no_acquire(message: m.Adopt) -> str:
    """Why an ``Adopt`` is not believed, or ''. Its epoch must be that of an ``Acquire`` of the one who says it."""
    try:
        entry = Entry.from_bytes(message.acquire)
    except ProtocolError as error:
        return str(error)
    right = entry.kind is Kind.ACQUIRE and int(entry.index) == int(message.epoch) and entry.author.peer == message.owner
    return "" if right else f"entry {entry.index} ({entry.kind.value}) is no Acquire of epoch {message.epoch}"


def _handles_of(result: Any) -> tuple[Handle, ...]:
    """Every count that a compute result carries."""
    match result:
        case tasks.Loaded(state=state):
            return (state,)
        case tasks.ForwardDone(outputs=outputs, results=results, saved=saved):
            handles = tuple(t.handle for t in (*outputs, *results))
            return handles if saved is None else (*handles, saved)
        case tasks.BackwardDone(grads=grads):
            return tuple(t.handle for t in grads)
        case tasks.SnapshotDone(copies=copies):
            return tuple(handle for _, handle in copies)
        case _:
            return ()
