"""The root machine of an orchestrator: who is there, which sessions it owns, and what clients ask."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dcnr.config import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Limits
from dcnr.errors import (
    CorruptObject,
    DCNRError,
    InvalidNetwork,
    NotOwner,
    ProtocolError,
    StoreUnavailable,
    Unavailable,
    UnknownName,
    UsageError,
)
from dcnr.ids import DatasetId, Incarnation, LogIndex, PeerId, SessionId
from dcnr.machine import (
    Computed,
    ComputeFailed,
    Effect,
    Event,
    Exit,
    Instant,
    LinkDown,
    LinkUp,
    Planned,
    Received,
    Release,
    Request,
    RequestGone,
    Shutdown,
    StoreChecked,
    StoreCreated,
    StoreFailed,
    StoreGot,
    StoreListed,
    StoreTaken,
    Tick,
)
from dcnr.membership.liveness import Colour, Pulse
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import canonical_json, from_canonical_json
from dcnr.network.types import catalogue_digest
from dcnr.orchestrator.beats import Beats
from dcnr.orchestrator.creation import Creation
from dcnr.orchestrator.desk import Desk, Node
from dcnr.orchestrator.naming import begun
from dcnr.orchestrator.owner import Owner
from dcnr.orchestrator.serving import Serving
from dcnr.orchestrator.session_log import add_up, read_entries
from dcnr.orchestrator.sessions import Sessions
from dcnr.orchestrator.targets import Targets, load_targets
from dcnr.protocol import messages as m
from dcnr.session import dataset, events
from dcnr.session.log import Author, Fold
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record


@dataclass(slots=True, kw_only=True)
class Follower:
    """A client's event stream; ``session`` None = all. ``seen``: the newest step that it has been told."""

    session: SessionId | None
    seen: int = 0


class OrchestratorMachine:
    """Decides for one orchestrator. See :mod:`dcnr.machine`.

    ``secret`` signs data tokens (16 to 64 random bytes of this start). ``unix_s_at_zero``: wall time of instant 0, for
    the event log's display only.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        incarnation: Incarnation,
        addresses: tuple[str, ...],
        secret: bytes,
        limits: Limits,
        seed: int,
        unix_s_at_zero: float = 0.0,
        store: str = "",
    ) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.addresses = addresses
        self.limits = limits
        self.seed = seed
        self._store = store
        self._desk = Desk(
            author=Author(peer=peer, incarnation=incarnation),
            secret=secret,
            limits=limits,
            unix_s_at_zero=unix_s_at_zero,
        )
        self._desk.on_event = self._tell
        self._serving = Serving(self._desk)
        self._beats = Beats(desk=self._desk, seed=seed, addresses=addresses, told=self._heard_of_others)
        self._sessions = Sessions(desk=self._desk, beats=self._beats, evaluate=self._serving.evaluate)
        self._sessions.superseded = self._ask_again
        self._beats.owned = lambda: [o.id for o in self._sessions.owners.values() if o.active]
        self._creation = Creation(self._desk, self._sessions)
        self._others: tuple[str, ...] = ()
        """Addresses of other orchestrators, as the PNodes were told."""
        self._initial: dict[SessionId, Owner] = {}
        """What serves the initial weights of networks without a session."""
        self._followers: dict[int, Follower] = {}
        self._writing: dict[int, tuple[SessionId, Callable[[], None]]] = {}
        """Requests whose answer waits for an entry of a session's log, and how to begin with them anew."""
        self._started_at: Instant | None = None
        self._last_at = Instant(0.0)

    # --- the machine's interface ----------------------------------------------------------------------------

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        desk = self._desk
        desk.now = now
        if self._started_at is None:
            self._started_at = self._last_at = desk.started_at = now
            self._sessions.boot()
            self._beats.go_round()
        gap = now - self._last_at
        if gap > 2 * self.limits.heartbeat_interval_s:
            desk.shift(gap)
        self._last_at = now
        match event:
            case Tick():
                pass
            case Received():
                self._received(event)
            case Request():
                self._request(event)
            case RequestGone(id=id):
                self._followers.pop(id, None)
                self._serving.gone(id)
            case LinkUp():
                self._link_up(event)
            case LinkDown(peer=peer):
                node = desk.nodes.get(peer)
                if node is not None and node.linked:
                    node.linked = False
                    node.pulse.down_since = now
            case Planned(id=id) | StoreCreated(id=id) | StoreTaken(id=id) | StoreFailed(id=id) | StoreGot(id=id):
                desk.answer(id, event)
            case StoreChecked(id=id) | StoreListed(id=id):
                desk.answer(id, event)
            case Computed(task=id) | ComputeFailed(task=id):
                desk.answer(id, event)
            case Shutdown(reason=reason):
                desk.out.append(Exit(code=0, reason=reason))
            case _:
                raise AssertionError(f"an orchestrator knows no {type(event).__name__}")
        desk.run_timers()
        self._look()
        out, desk.out[:] = list(desk.out), []
        return out

    def deadline(self) -> Instant | None:
        """At least every heartbeat interval: a longer silence of this process itself must be noticed."""
        times = [self._last_at + self.limits.heartbeat_interval_s]
        times += [n.pulse.deadline(self.limits) for n in self._desk.nodes.values() if not n.gone]
        timer = self._desk.next_timer()
        if timer is not None:
            times.append(timer)
        return Instant(min(times))

    def check_frame(self, peer: PeerId, frame: m.TensorFrame) -> str | None:
        return self._serving.check_frame(frame)

    # --- who is there ---------------------------------------------------------------------------------------

    def _register(self, request: int, message: m.Register) -> None:
        desk = self._desk
        descriptor, capabilities = message.descriptor, message.capabilities
        if descriptor.version_max < PROTOCOL_VERSION_MIN or descriptor.version_min > PROTOCOL_VERSION_MAX:
            desk.respond(
                request,
                m.Refusal(
                    kind="VersionMismatch",
                    reason=f"this orchestrator speaks protocol {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}, "
                    f"the PNode {descriptor.version_min} to {descriptor.version_max}",
                ),
            )
            return
        if not (math.isfinite(capabilities.gflops) and capabilities.gflops > 0):
            reason = f"a PNode must measure a finite speed above 0 GFLOP/s, found {capabilities.gflops}"
            desk.respond(request, m.Refusal(kind="Refused", reason=reason))
            return
        addresses = descriptor.addresses
        if len(addresses) > self.limits.addresses_most or any(
            len(address) > self.limits.address_characters for address in addresses
        ):
            reason = (
                f"a PNode names at most {self.limits.addresses_most} addresses of {self.limits.address_characters} "
                f"characters, found {len(addresses)}, the longest of {max(map(len, addresses))}"
            )
            desk.respond(request, m.Refusal(kind="Refused", reason=reason))
            return
        known = desk.nodes.get(descriptor.peer)
        if known is not None and (reason := self._other_process(known, descriptor)):
            if known.rival_nonce != descriptor.incarnation.nonce:  # It dials again and again, and is told of once.
                known.rival = m.HomeCopied(hostname=capabilities.hostname, addresses=descriptor.addresses)
                known.rival_nonce = descriptor.incarnation.nonce
            desk.respond(request, m.Refusal(kind="Refused", reason=reason))
            return
        if known is None or known.descriptor.incarnation != descriptor.incarnation:
            if known is not None and not known.gone:
                self._lost(descriptor.peer, "it has started anew")
            desk.nodes[descriptor.peer] = Node(
                descriptor=descriptor,
                capabilities=capabilities,
                pulse=Pulse(heard_at=desk.now),
                memory_free_bytes=capabilities.memory_bytes,
            )
            desk.emit(
                "pnode_registered",
                None,
                {
                    "peer": descriptor.peer,
                    "host": capabilities.hostname,
                    "gflops": capabilities.gflops,
                    "memory_bytes": capabilities.memory_bytes,
                    "class": capabilities.numeric_class,
                },
            )
        else:
            known.descriptor = descriptor
            known.capabilities = capabilities
        desk.respond(
            request, m.Registered(descriptor=self._descriptor(), heartbeat_interval_s=self.limits.heartbeat_interval_s)
        )

    def _other_process(self, known: Node, descriptor: m.Descriptor) -> str:
        """Why this start of a known PNode is refused; '' = nothing is against it.

        A home has a lock, so two processes that are there at once have two copies of it. The one that came first stays:
        it has VNodes. Whether it is there still, only its next heartbeat proves, so nobody is accused before.
        """
        here, there = known.descriptor.incarnation, descriptor.incarnation
        at_work = known.usable and known.pulse.colour(self._desk.now, self.limits) is Colour.GREEN
        if here == there or (there.boot > here.boot and not at_work):
            return ""
        what = "is at work" if at_work else "was here"
        where = ", ".join((known.capabilities.hostname, *known.descriptor.addresses))
        return (
            f"start {here.boot} of PNode {descriptor.peer[:12]} {what} on {where}, and this is start {there.boot}: one of "
            "them runs in a copy of the other's home. Give this one a home of its own with --home, or end the other one"
        )

    def _descriptor(self) -> m.Descriptor:
        return m.Descriptor(
            peer=self.peer,
            incarnation=self.incarnation,
            role="orchestrator",
            addresses=self.addresses,
            version_min=PROTOCOL_VERSION_MIN,
            version_max=PROTOCOL_VERSION_MAX,
        )

    def _link_up(self, event: LinkUp) -> None:
        node = self._desk.nodes.get(event.peer)
        if event.role != "pnode" or node is None or node.descriptor.incarnation != event.incarnation:
            return
        if not node.linked:
            node.linked_at = self._desk.now
        node.linked = True
        node.pulse.heard_at = self._desk.now
        if self._others:
            self._desk.send(event.peer, m.Orchestrators(addresses=self._others))
        node.pulse.down_since = None
        if not node.hung:
            self._back(event.peer, node)

    def _back(self, peer: PeerId, node: Node) -> None:
        if node.gone:
            # It was given up and is back: what it held is not valid any more, and it is told so by its next heartbeat.
            node.gone = False
            self._desk.emit("pnode_back", None, {"peer": peer})
        for owner in self._oldest_first():
            owner.node_up(peer, node)
        self._serving.node_up(peer)

    def _tell_of_rival(self, peer: PeerId, node: Node, rival: m.HomeCopied) -> None:
        """Two processes with one identity are proven: both owners hear of it, here and in their own logs."""
        node.rival = None
        reason = "a process with a copy of this PNode's home was refused: give it a home of its own"
        data = {"peer": peer, "refused_host": rival.hostname, "refused_at": ",".join(rival.addresses), "reason": reason}
        self._desk.emit("home_copied", None, data)
        self._desk.send(peer, rival)

    def _heard_of_others(self, owned: frozenset[SessionId]) -> None:
        """A round of orchestrators' hints is read."""
        others = self._beats.others()
        if others != self._others:
            self._others = others
            for peer, node in self._desk.nodes.items():
                if node.usable:
                    self._desk.send(peer, m.Orchestrators(addresses=others))
        if not self._sessions.reading:
            self._sessions.look_around(owned)

    def _look(self) -> None:
        """Is anybody red, or gone for good?"""
        for peer, node in list(self._desk.nodes.items()):
            if node.gone:
                silent_s = self._desk.now - node.pulse.heard_at
                placed = any(owner.active and peer in owner.hosts() for owner in self._sessions.owners.values())
                if silent_s > self.limits.node_forgotten_s and not placed:
                    del self._desk.nodes[peer]
                continue
            if node.pulse.colour(self._desk.now, self.limits) is Colour.RED:
                silent_ms = round(1000 * (self._desk.now - node.pulse.heard_at))
                closed = node.pulse.down_since is not None
                reason = "its link closed and was not dialled again" if closed else f"silent for {silent_ms} ms"
                self._lost(peer, reason)
        self._serving.expire()

    def _lost(self, peer: PeerId, reason: str) -> None:
        node = self._desk.nodes[peer]
        if not node.leaving:
            self._desk.lost(peer)
        node.gone = True
        heard_at = node.pulse.heard_at
        node.reserved = {}
        self._desk.emit("pnode_gone", None, {"peer": peer, "reason": reason})
        for owner in self._oldest_first():
            owner.node_lost(peer, heard_at, reason)
        self._serving.node_lost(peer)

    # --- messages of PNodes ---------------------------------------------------------------------------------

    def _received(self, event: Received) -> None:
        peer, message = event.peer, event.message
        node = self._desk.nodes.get(peer)
        if node is None or node.descriptor.incarnation != event.incarnation:
            if isinstance(message, m.TensorFrame) and message.tensor.handle != 0:
                self._desk.out.append(Release(handles=(message.tensor.handle,)))
            return
        node.pulse.heard_at = self._desk.now
        if isinstance(message, m.TensorFrame):
            self._serving.frame(peer, message)
            return
        if isinstance(message, m.Heartbeat):
            node.hung = self._hung(message)
        if node.hung and not node.gone:
            self._lost(peer, node.hung)
        elif node.gone and node.linked and not node.hung:
            # It was silent for too long, over a link that held: it is back as if it had dialled again.
            self._back(peer, node)
        match message:
            case m.Heartbeat():
                if node.rival is not None:
                    self._tell_of_rival(peer, node, node.rival)
                node.memory_free_bytes = message.memory_free_bytes
                since = node.unreachable
                node.unreachable = {p: since.get(p, self._desk.now) for p in message.unreachable}
                if node.leaving != message.leaving:
                    node.leaving = message.leaving
                    self._desk.emit("leaving" if node.leaving else "of_use_again", None, {"peer": peer})
                    if not node.leaving:
                        self._poke()
                node.tasks_done = sum(p.tasks_done for p in message.progress)
                before, node.foreign_bytes = node.foreign_bytes, 0
                for progress in message.progress:
                    owner = self._sessions.owners.get(progress.session)
                    if progress.owner not in ("", self.peer) and not (owner is not None and owner.active):
                        # What was taken over is not foreign, even where that is not known yet: its place is its own.
                        node.foreign_bytes += progress.reserved_bytes
                    if owner is not None:
                        owner.hosting(peer)
                    elif not progress.session.startswith("serve-") and not self._sessions.reading:
                        self._sessions.read(progress.session)
                if node.foreign_bytes < before:
                    self._poke()
                return
            case m.Leave(reason=reason):
                node.linked = False  # Whatever else comes on this link is no sign of life.
                self._lost(peer, f"it left: {reason}")
                return
            case m.FrameAck():
                return
            case _:
                pass
        session = SessionId(getattr(message, "session", ""))
        if session.startswith("serve-"):
            if isinstance(message, m.TicketAnswer):
                self._serving.ticket_answer(peer, message)
            else:
                self._serving.report(peer, message)
            return
        owner = self._sessions.owners.get(session)
        if owner is None:
            return
        match message:
            case m.TicketAnswer():
                owner.ticket_answer(peer, message)
            case m.Withdrawn():
                owner.withdrawn(peer, message)
                self._poke()
            case m.TaskAnswer():
                if message.instance == owner.fold.instance:
                    owner.opens.answered(peer, message)
            case m.SnapshotAnswer():
                if not owner.marks.answered(peer, message):
                    owner.checkpoints.answered(peer, message)
            case m.Stored():
                if not owner.marks.stored(peer, message):
                    owner.checkpoints.stored(peer, message)
            case m.SnapshotFailed():
                if not owner.marks.failed(peer, message):
                    owner.checkpoints.failed(message)
            case m.StaleEpoch(current=current):
                self._desk.emit("stale_epoch", session, {"peer": peer, "current": current, "ours": owner.epoch})
                owner.stale_epoch(current)
            case m.Adopted():
                if owner.takeover is not None:
                    owner.takeover.answered(peer, message)
            case m.TaskFailed() | m.Done() | m.Loss() | m.StepSummaries() | m.Updated() | m.Loaded():
                if message.instance == owner.fold.instance and peer in owner.hosts():
                    owner.report(peer, message)
            case _:
                self._desk.emit("unexpected_message", None, {"peer": peer, "message": type(message).__name__})

    def _hung(self, heartbeat: m.Heartbeat) -> str:
        """A task far older than usual: its PNode is given up, until the task has returned. '' = none."""
        limits = self.limits
        for progress in heartbeat.progress:
            most_s = max(limits.task_age_factor * progress.task_usual_s, limits.task_age_floor_s)
            if progress.task_age_s > most_s:
                return f"a task on its worker has hung for {progress.task_age_s:.1f} s"
        return ""

    def _poke(self) -> None:
        """Whoever waits tries again."""
        for owner in self._oldest_first():
            owner.poke()

    def _oldest_first(self) -> list[Owner]:
        """The order in which sessions get what there is."""
        return sorted(self._sessions.owners.values(), key=lambda o: o.record.age)

    # --- clients --------------------------------------------------------------------------------------------

    def _request(self, event: Request) -> None:
        request, message = event.id, event.message
        self._attempt(request, message, lambda: self._answer(request, message))

    def _attempt(self, request: int, message: Any, work: Callable[[], None]) -> None:
        try:
            work()
        except UnknownName:
            # Another orchestrator may have made it a moment ago.
            name = next((str(n) for f in ("session", "target", "network") if (n := getattr(message, f, ""))), "")
            self._sessions.look(name, lambda: self._guarded(request, work))
        except DCNRError as error:
            self._refuse(request, error)

    def _guarded(self, request: int, work: Callable[[], None]) -> None:
        try:
            work()
        except DCNRError as error:
            self._refuse(request, error)

    def _refuse(self, request: int, error: DCNRError) -> None:
        self._desk.respond(request, m.Refusal(kind=type(error).__name__, reason=str(error)))

    def _from_logs(self, request: int, message: Any, work: Callable[[], None]) -> None:
        """Answer from what the logs say now, of others' sessions too."""
        self._sessions.all_fresh(lambda: self._attempt(request, message, work))

    def _with_owned(self, request: int, name: str, then: Callable[[Owner], None]) -> None:
        """``then`` gets the session if it is owned here or by nobody; else the client is told who owns it."""

        def fresh(owner: Owner) -> None:
            def work() -> None:
                if owner.phase == "followed":
                    peer, addresses = self._whose(owner)
                    where = f" at {', '.join(addresses)}" if addresses else ", which nobody has seen for a while"
                    raise NotOwner(f"session {owner.id} is owned by orchestrator {peer}{where}")
                then(owner)

            self._guarded(request, work)

        self._sessions.fresh(self._sessions.find(name), fresh)

    def _ask_again(self, session: SessionId) -> None:
        """The log turned out to be another's, so what was to be written never will be: clients are told whose it is."""
        for request, (name, again) in list(self._writing.items()):
            if name == session:
                del self._writing[request]
                again()

    def _whose(self, owner: Owner) -> tuple[PeerId, tuple[str, ...]]:
        peer = owner.fold.owner.peer if owner.fold.owner is not None else PeerId("")
        return peer, self._beats.addresses(peer)

    def _info(self, owner: Owner) -> m.SessionInfo:
        peer, addresses = self._whose(owner)
        fold = owner.fold
        return m.SessionInfo(
            session=owner.id,
            network=owner.network.id,
            network_name=owner.record.network_name,
            dataset=owner.record.dataset,
            state=owner.state,
            reason=owner.reason,
            # Of a session that is followed the log tells no more than its commits.
            step=max(owner.done_step(), fold.newest().step),
            steps=owner.recipe.steps,
            loss=owner.history[-1].loss if owner.history else float("nan"),
            committed_step=fold.newest().step,
            epoch=owner.epoch,
            created_unix_s=owner.record.created_unix_s,
            placement=tuple(m.Location(vnode=v, peer=s.peer, worker=s.worker) for v, s in fold.placement.items()),
            record=owner.record.to_bytes(),
            measured=tuple(owner.times.values()),
            owner=peer,
            owner_addresses=addresses,
        )

    def _answer(self, request: int, message: Any) -> None:
        desk = self._desk
        match message:
            case m.Register():
                self._register(request, message)
            case m.ListNodes():
                desk.respond(request, m.NodeList(nodes=tuple(self._node_info(p, n) for p, n in desk.nodes.items())))
            case m.DrainNode(peer=name, on=on):
                peer = self._find_node(name)
                desk.send(peer, m.Drain(on=on))
                desk.respond(request, m.Draining(peer=peer, on=on))
            case m.GetStatus():
                desk.respond(request, self._status())
            case _ if self._sessions.reading:
                raise Unavailable("the orchestrator has just started and is still reading what its store holds")
            case m.CreateNetwork():
                self._create_network(request, message)
            case m.ListNetworks():
                self._soon(lambda then: self._sessions.look("", then), lambda: self._list_networks(request))
            case m.GetNetwork(network=name):
                network = self._sessions.find_network(name)
                data = self._definition(network)
                desk.respond(request, m.NetworkDefinition(network=network.id, definition=data))
            case m.CreateSession():
                self._from_logs(request, message, lambda: self._creation.create(request, message))
            case m.SessionQuery(session=""):
                self._soon(lambda then: self._sessions.all_fresh(then), lambda: self._list_sessions(request))
            case m.SessionQuery(session=name):

                def fresh(owner: Owner) -> None:
                    desk.respond(request, m.SessionList(sessions=(self._info(owner),)))

                self._sessions.fresh(self._sessions.find(name), fresh)
            case m.ControlSession(session=name, action=action):
                self._with_owned(request, name, lambda owner: self._control(request, owner, action))
            case m.CollectGarbage(session=name, delete=delete):
                self._with_owned(request, name, lambda owner: self._collect(request, owner, delete))
            case m.FollowSession(session=name, after_step=after):
                self._with_owned(request, name, lambda owner: self._follow(request, owner, after))
            case m.FollowEvents(after=after, follow=follow):
                records = [r for r in desk.events if r.sequence > after]
                for record in records:
                    desk.respond(request, record, last=not follow and record is records[-1])
                if follow:
                    self._followers[request] = Follower(session=None)
                elif not records:
                    desk.respond(request, m.EventRecord(sequence=after, unix_s=0.0, kind="", session="", data="{}"))
            case m.Locate(session=name, vnode=vnode):
                self._from_logs(request, message, lambda: self._locate(request, self._sessions.find(name), vnode))
            case m.ReadSession(session=name):
                self._from_logs(request, message, lambda: self._read(request, self._sessions.find(name)))
            case m.ValidateSession(session=name):
                self._from_logs(request, message, lambda: self._serving.validate(request, self._sessions.find(name)))
            case m.Generate(target=target):
                self._from_logs(
                    request, message, lambda: self._serving.generate(request, message, self._trained(target))
                )
            case m.Forward(target=target):
                self._from_logs(request, message, lambda: self._serving.forward(request, message, self._served(target)))
            case _:
                raise UsageError(f"an orchestrator does not answer {type(message).__name__}")

    def _soon(self, read: Callable[[Callable[[], None]], None], work: Callable[[], None]) -> None:
        """Answer when the logs are read; where the store does not give them, from what is known."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                work()

        self._desk.after(self.limits.answer_within_s, once)
        read(once)

    def _list_networks(self, request: int) -> None:
        infos = tuple(self._network_info(n) for n in self._sessions.networks.values())
        self._desk.respond(request, m.NetworkList(networks=infos))

    def _list_sessions(self, request: int) -> None:
        self._desk.respond(request, m.SessionList(sessions=tuple(self._info(o) for o in self._oldest_first())))

    def _create_network(self, request: int, message: m.CreateNetwork) -> None:
        try:
            network = analyse(from_canonical_json(message.definition))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidNetwork([f"not a network definition: {error}"]) from error
        if self._definition(network) != message.definition:
            raise InvalidNetwork(["the definition is not in its canonical form"])

        key = f"networks/{network.id}/definition.json"

        def created(found: bytes | None) -> None:
            if found not in (None, message.definition):
                reason = f"{key} is damaged in the store: delete it there, then create the network again"
                self._desk.respond(request, m.Refusal(kind=CorruptObject.__name__, reason=reason))
                return
            self._sessions.networks[network.id] = network
            self._desk.respond(request, m.NetworkCreated(network=network.id))

        def late(reason: str) -> None:
            self._desk.respond(
                request, m.Refusal(kind=StoreUnavailable.__name__, reason=f"{key} is not stored: {reason}")
            )

        self._desk.create(key, message.definition, created, late)

    @staticmethod
    def _definition(network: Network) -> bytes:
        return canonical_json(network.definition)

    @staticmethod
    def _network_info(network: Network) -> m.NetworkInfo:
        return m.NetworkInfo(
            network=network.id,
            name=network.definition.name,
            parameters=sum(p.elements for v in network.vnodes.values() for p in v.parameters),
            vnodes=len(network.vnodes),
        )

    def _trained(self, target: str) -> Owner:
        """A session by id, or a network's newest session with a commit."""
        try:
            return self._sessions.find(target)
        except UnknownName:
            network = self._sessions.find_network(target)
        owners = [o for o in self._sessions.owners.values() if o.network.id == network.id and o.fold.commits]
        if not owners:
            raise Unavailable(f"network {target!r} has no session with a checkpoint: train it first")
        return max(owners, key=lambda o: (o.record.created_unix_s, o.id))

    def _served(self, target: str) -> Owner:
        """A session by id, or a network's newest session with a commit, else its newest, else its initial weights."""
        if (initial := self._initial.get(SessionId(target))) is not None:
            return initial
        try:
            return self._sessions.find(target)
        except UnknownName:
            network = self._sessions.find_network(target)
        owners = [o for o in self._sessions.owners.values() if o.network.id == network.id]
        if owners:
            return max(owners, key=lambda o: (bool(o.fold.commits), o.record.created_unix_s, o.id))
        record = Record(
            network=network.id,
            network_name=network.definition.name,
            dataset=DatasetId(""),
            tokenizer="",
            context=0,
            rows_train=0,
            rows_validation=0,
            valid_targets_per_row=0,
            recipe=Recipe(steps=1),
            groups=tuple(tuple(str(v) for v in g.vnodes) for g in network.groups),
            catalogue=catalogue_digest(),
            created_unix_s=0.0,
            nonce="initial weights",
        )
        # It is no session: nothing of it is written, and it trains nothing.
        initial = Owner(
            desk=self._desk,
            id=record.id,
            record=record,
            network=network,
            state=Fold(),
            targets=Targets({}),
            evaluate=self._serving.evaluate,
            superseded=lambda owner: None,
        )
        self._initial[record.id] = initial
        return initial

    # --- sessions -------------------------------------------------------------------------------------------

    def _control(self, request: int, owner: Owner, action: str) -> None:
        def again() -> None:
            self._with_owned(request, owner.id, lambda owner: self._control(request, owner, action))

        def done(refusal: str) -> None:
            self._writing.pop(request, None)
            if refusal:
                self._desk.respond(request, m.Refusal(kind="Refused", reason=refusal))
            else:
                self._desk.respond(request, m.Controlled(session=owner.id, state=owner.state))
                self._poke()

        self._writing[request] = owner.id, again
        if action == "stop":
            owner.stop(done)
        elif action == "suspend":
            owner.suspend(done)
        elif action == "resume":

            def got_manifest(data: bytes | None) -> None:
                if data is None:
                    done(f"its dataset {owner.record.dataset[:12]} was deleted: add the same data again first")
                else:
                    load_targets(self._desk, owner.network, owner.record, got_targets, done)

            def got_targets(targets: Targets) -> None:
                owner.opens.targets = targets
                owner.resume(done)

            self._desk.get(dataset.manifest_key(owner.record.dataset), got_manifest)
        else:
            del self._writing[request]
            raise UsageError(f"unknown action {action!r}: stop, suspend or resume")

    def _collect(self, request: int, owner: Owner, delete: bool) -> None:
        def again() -> None:
            self._with_owned(request, owner.id, lambda owner: self._collect(request, owner, delete))

        def found(answer: tuple[str, ...] | str) -> None:
            self._writing.pop(request, None)
            if isinstance(answer, str):
                self._refuse(request, Unavailable(answer))
            else:
                self._desk.emit("garbage_collected", owner.id, {"objects": len(answer), "deleted": delete})
                self._desk.respond(request, m.Garbage(session=owner.id, keys=answer))

        self._writing[request] = owner.id, again
        owner.checkpoints.collect(delete=delete, then=found)

    def _follow(self, request: int, owner: Owner, after_step: int) -> None:
        """Where it is (to a new follower), steps done so far, in order; then everything as it happens. An ended session
        tells its end at once."""
        if after_step == 0 and owner.placed is not None:
            self._desk.respond(request, self._record_of(owner, owner.placed.kind, owner.placed.data()), last=False)
        follower = Follower(session=owner.id, seen=after_step)
        self._catch_up(request, follower, owner)
        if owner.phase == "waiting":
            waiting = events.Waiting(reason=owner.reason)
            self._desk.respond(request, self._record_of(owner, waiting.kind, waiting.data()), last=False)
        if owner.active:
            self._followers[request] = follower
            return
        step = owner.fold.newest().step
        data: dict[str, Any] = {"step": step}
        if owner.phase == "finished":
            data["loss"] = owner.history[-1].loss if owner.history else 0.0
        elif owner.phase == "failed":
            data |= {"vnode": "", "reason": owner.reason}
        elif owner.phase == "suspended":
            data["reason"] = owner.reason
        self._desk.respond(request, self._record_of(owner, owner.phase, data))

    def _record_of(self, owner: Owner, kind: str, data: dict[str, Any]) -> m.EventRecord:
        return m.EventRecord(sequence=0, unix_s=self._desk.unix_s(), kind=kind, session=owner.id, data=json.dumps(data))

    def _catch_up(self, request: int, follower: Follower, owner: Owner) -> None:
        """Steps that it has not been told: whoever comes while a new owner reads the past hears of it afterwards."""
        missed = list(takewhile(lambda event: event.step > follower.seen, reversed(owner.history)))
        for event in reversed(missed):
            self._desk.respond(request, self._record_of(owner, event.kind, event.data()), last=False)
            follower.seen = event.step

    def _tell(self, record: m.EventRecord) -> None:
        """Followers of a session hear its events; its last one ends their streams."""
        last = record.kind in ("finished", "failed", "stopped", "suspended", "stepped_down")
        for request, follower in list(self._followers.items()):
            if follower.session is None:
                self._desk.respond(request, record, last=False)
            elif follower.session == record.session:
                self._catch_up(request, follower, self._sessions.owners[follower.session])
                if record.kind == "step_done":
                    continue  # It is in its history.
                self._desk.respond(request, record, last=last)
                if last:
                    del self._followers[request]

    def _locate(self, request: int, owner: Owner, vnode: Any) -> None:
        spot = owner.fold.placement.get(vnode)
        if spot is None:
            raise UsageError(f"session {owner.id} has no VNode {vnode!r} placed")
        node = self._desk.nodes.get(spot.peer)
        self._desk.respond(
            request,
            m.Located(
                peer=spot.peer,
                addresses=node.descriptor.addresses if node else (),
                instance=owner.fold.instance,
                log_index=LogIndex(owner.fold.instance),
            ),
        )

    def _read(self, request: int, owner: Owner) -> None:
        """The whole log, for whoever wants to see for themselves."""

        def read(found: list[bytes]) -> None:
            try:
                commits = add_up(found).commits
            except ProtocolError as error:
                self._desk.respond(request, m.Refusal(kind="StoreError", reason=f"session {owner.id}: {error}"))
                return
            self._desk.respond(
                request,
                m.SessionFiles(
                    session=owner.id,
                    record=owner.record.to_bytes(),
                    definition=self._definition(owner.written),
                    entries=tuple(found),
                    commits=tuple(
                        m.CommitInfo(step=c.step, manifest=c.manifest) for c in commits if c.manifest is not None
                    ),
                    token=self._desk.token(f"objects/{owner.id}/read"),
                    rows_token=self._desk.token(f"rows/{owner.record.dataset}"),
                ),
            )

        read_entries(self._desk, owner.id, 1, read)

    # --- status ---------------------------------------------------------------------------------------------

    def _node_info(self, peer: PeerId, node: Node) -> m.NodeInfo:
        hosted = [
            f"{owner.id}/{v}"
            for owner in self._sessions.owners.values()
            if (owner.active and owner.phase != "waiting") or owner.phase == "followed"
            for v, s in owner.fold.placement.items()
            if s.peer == peer and s.incarnation == node.descriptor.incarnation
        ]
        colour = Colour.GONE if node.gone else node.pulse.colour(self._desk.now, self.limits)
        return m.NodeInfo(
            descriptor=node.descriptor,
            capabilities=node.capabilities,
            colour=colour.value,
            silent_s=self._desk.now - node.pulse.heard_at,
            memory_free_bytes=node.memory_free_bytes,
            vnodes=tuple(hosted) if not node.gone else (),
            tasks_done=node.tasks_done,
            leaving=node.leaving,
        )

    def _find_node(self, name: str) -> PeerId:
        """A PNode that is here, by peer or unique prefix of it. Raises :class:`UnknownName`."""
        here = [peer for peer, node in self._desk.nodes.items() if node.usable]
        return PeerId(begun(name, here, "PNode", "dcnr nodes"))

    def _status(self) -> m.Status:
        desk = self._desk
        return m.Status(
            descriptor=self._descriptor(),
            uptime_s=desk.now - (self._started_at or desk.now),
            nodes=sum(n.usable for n in desk.nodes.values()),
            sessions_running=sum(o.running for o in self._sessions.owners.values()),
            sessions=len(self._sessions.owners),
            store=self._store,
            resident_bytes=0,
            others=self._others,
        )
