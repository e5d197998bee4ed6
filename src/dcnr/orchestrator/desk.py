"""What every part of an orchestrator shares: effects on their way out, answers on their way in, timers, nodes."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dcnr.config import Limits
from dcnr.ids import Incarnation, PeerId, SessionId, VNodeId
from dcnr.machine import (
    Effect,
    Emit,
    Instant,
    Plan,
    Planned,
    Respond,
    Send,
    StoreCheck,
    StoreChecked,
    StoreCopy,
    StoreCreate,
    StoreCreated,
    StoreFailed,
    StoreGet,
    StoreGot,
    StoreTaken,
)
from dcnr.membership.liveness import Pulse
from dcnr.network.analysis import Network
from dcnr.network.graph import json_bytes
from dcnr.network.memory import memory
from dcnr.orchestrator.placement import Candidate, Placement, Problem, training_problem
from dcnr.protocol import messages as m
from dcnr.session import tokens
from dcnr.session.log import Author
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record

Age = tuple[float, str]
Placed = Callable[[Problem, Placement | str], bool]
Looking = tuple[Age, Callable[[], Problem | None], Placed]


@dataclass(slots=True, kw_only=True)
class Node:
    """A PNode as this orchestrator sees it."""

    descriptor: m.Descriptor
    capabilities: m.Capabilities
    pulse: Pulse
    linked: bool = False
    linked_at: Instant = Instant(0.0)
    gone: bool = False
    hung: str = ""
    """What its newest heartbeat says of a task that hangs: as long as that is so, it is not taken back."""
    rival: m.HomeCopied | None = None
    """Another process came with its identity and was refused; it is told of with the next heartbeat."""
    rival_nonce: str = ""
    """Of the newest such process: each is told of once."""
    leaving: bool = False
    """It is to give up what it hosts: nothing is placed there."""
    memory_free_bytes: int = 0
    tasks_done: int = 0
    reserved: dict[SessionId, int] = field(default_factory=dict)
    unreachable: dict[PeerId, Instant] = field(default_factory=dict)
    """PNodes that it cannot reach, as its heartbeats have said since then."""
    foreign_bytes: int = 0
    """Held there for sessions of other orchestrators, as its newest heartbeat says."""

    @property
    def usable(self) -> bool:
        return self.linked and not self.gone


class Desk:
    """Effects go to ``out``; an answer finds its way back to the one who asked by the effect's id."""

    def __init__(self, *, author: Author, secret: bytes, limits: Limits, unix_s_at_zero: float) -> None:
        self.author = author
        self.limits = limits
        self.now = Instant(0.0)
        self.started_at = Instant(0.0)
        self.out: list[Effect] = []
        self.nodes: dict[PeerId, Node] = {}
        self.events: deque[m.EventRecord] = deque(maxlen=limits.event_log_entries)
        self.on_event: Callable[[m.EventRecord], None] = lambda record: None
        self.parted: dict[frozenset[PeerId], Instant] = {}
        """Pairs of PNodes that cannot reach each other, until when that is believed."""
        self._lost_at: dict[PeerId, list[Instant]] = {}
        self._doubted: dict[PeerId, Instant] = {}
        self._secret = secret
        self._unix_s_at_zero = unix_s_at_zero
        self._last_id = 0
        self._nonces = 0
        self._events = 0
        self._pending: dict[int, Callable[[Any], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._to_place: list[Looking] = []
        self._placing = False
        """A plan of one that looks for a place is being made."""

    # --- asking and answering -------------------------------------------------------------------------------

    def ask(self, make: Callable[[int], Effect], then: Callable[[Any], None]) -> None:
        """Emit ``make(id)``; the event of that id goes to ``then``."""
        self._last_id += 1
        self._pending[self._last_id] = then
        self.out.append(make(self._last_id))

    def answer(self, id: int, event: Any) -> None:
        then = self._pending.pop(id, None)
        if then is not None:
            then(event)

    def create(
        self, key: str, data: bytes, then: Callable[[bytes | None], None], late: Callable[[str], None] | None = None
    ) -> None:
        """Create-only put, repeated with the same bytes until its outcome is known. ``then(None)`` = created;
        ``then(bytes)`` = the name was taken, by these bytes. ``late`` is told once what the store says where it has not
        taken them for ``create_patience_s``; they are still offered to it."""
        failed, over = "", False

        def ask() -> None:
            self.ask(lambda id: StoreCreate(id=id, key=key, data=data), answered)

        def answered(event: StoreCreated | StoreTaken | StoreFailed) -> None:
            nonlocal failed, over
            match event:
                case StoreFailed(reason=reason):
                    failed = reason
                    self.after(self.limits.store_retry_s, ask)
                case StoreCreated():
                    over = True
                    then(None)
                case StoreTaken(data=found):
                    over = True
                    then(found)

        ask()
        if late is not None:
            told = late
            self.after(self.limits.create_patience_s, lambda: None if over else told(failed or "the store is silent"))

    def get(self, key: str, then: Callable[[bytes | None], None]) -> None:
        """Read, repeated while the store is away. ``None`` = nothing is there."""

        def answered(event: StoreGot | StoreFailed) -> None:
            match event:
                case StoreGot(data=data):
                    then(data)
                case StoreFailed():
                    self.after(self.limits.store_retry_s, lambda: self.get(key, then))

        self.ask(lambda id: StoreGet(id=id, key=key), answered)

    def check(self, keys: tuple[str, ...], then: Callable[[Mapping[str, str]], None]) -> None:
        """Read back and hash, repeated while the store is away. ``then`` gets the damaged keys with reasons."""
        found: dict[str, str] = {}

        def check(position: int) -> None:
            # One by one: a store that drops every fifth call would hardly ever answer for many at once.
            if position == len(keys):
                then(found)
            else:
                self.ask(
                    lambda id: StoreCheck(id=id, keys=keys[position : position + 1]),
                    lambda event: answered(event, position),
                )

        def answered(event: StoreChecked | StoreFailed, position: int) -> None:
            match event:
                case StoreChecked(damaged=damaged):
                    found.update(damaged)
                    check(position + 1)
                case StoreFailed():
                    self.after(self.limits.store_retry_s, lambda: check(position))

        check(0)

    def copy(self, pairs: tuple[tuple[str, str], ...], then: Callable[[Mapping[str, str]], None]) -> None:
        """Copy (source, target) objects, repeated while the store is away. ``then`` gets what could not be read, and why."""

        def answered(event: StoreChecked | StoreFailed) -> None:
            match event:
                case StoreChecked(damaged=damaged):
                    then(damaged)
                case StoreFailed():
                    self.after(self.limits.store_retry_s, lambda: self.copy(pairs, then))

        self.ask(lambda id: StoreCopy(id=id, pairs=pairs), answered)

    def plan(self, problem: Problem, then: Callable[[Placement | str], None]) -> None:
        def answered(event: Planned) -> None:
            then(event.answer)

        self.ask(lambda id: Plan(id=id, problem=problem), answered)

    def place(self, age: Age, problem: Callable[[], Problem | None], then: Placed) -> None:
        """Plan for a session that looks for a place: one after the other and the oldest first, so that it reserves first.

        ``problem`` is asked when its turn comes; ``None`` = it looks no more. ``then`` reserves, or waits; true = things
        have changed, and it looks again.
        """
        self._to_place.append((age, problem, then))
        if not self._placing:
            self._place_oldest()

    def _place_oldest(self) -> None:
        while self._to_place and not self._placing:
            oldest = min(self._to_place, key=lambda looking: looking[0])
            self._to_place.remove(oldest)
            found = oldest[1]()
            if found is not None:
                self._placing = True
                self.plan(found, partial(self._planned, oldest, found))

    def _planned(self, looking: Looking, problem: Problem, answer: Placement | str) -> None:
        if looking[2](problem, answer):
            self._to_place.append(looking)
        self._placing = False
        self._place_oldest()

    # --- time -----------------------------------------------------------------------------------------------

    def after(self, delay_s: float, then: Callable[[], None]) -> None:
        self._last_id += 1
        heapq.heappush(self._timers, (self.now + delay_s, self._last_id, then))

    def run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()

    def next_timer(self) -> Instant | None:
        return Instant(self._timers[0][0]) if self._timers else None

    def share(self, name: str) -> float:
        """A number in [0, 1) that differs by name and by orchestrator."""
        word = hashlib.blake2b(f"{self.author.peer}/{name}".encode(), digest_size=4).digest()
        return int.from_bytes(word, "little") / 2**32

    def shift(self, gap_s: float) -> None:
        """This process was paused: every deadline moves by the gap."""
        self._timers = [(at + gap_s, number, then) for at, number, then in self._timers]
        for node in self.nodes.values():
            node.pulse.shift(gap_s)

    # --- saying ---------------------------------------------------------------------------------------------

    def send(self, peer: PeerId, message: m.Message) -> None:
        self.out.append(Send(peer=peer, message=message))

    def respond(self, request: int, message: m.Message, *, last: bool = True) -> None:
        self.out.append(Respond(id=request, message=message, last=last))

    def emit(self, kind: str, session: SessionId | None, data: Mapping[str, Any]) -> None:
        """An entry of the event log, for operators and for followers."""
        self._events += 1
        record = m.EventRecord(
            sequence=self._events,
            unix_s=self.unix_s(),
            kind=kind,
            session=session or "",
            data=json_bytes(dict(data)).decode(),
        )
        self.events.append(record)
        self.out.append(Emit(kind=kind, session=session, data=data))
        self.on_event(record)

    def unix_s(self) -> float:
        """Wall time, for people to read; never compared."""
        return self._unix_s_at_zero + self.now

    def nonce(self) -> str:
        """Never used twice: this start's own nonce and a counter."""
        self._nonces += 1
        return f"{self.author.incarnation.nonce}-{self._nonces}"

    def token(self, scope: str) -> str:
        return tokens.mint(self._secret, scope, self.now + self.limits.token_ttl_s)

    # --- nodes ----------------------------------------------------------------------------------------------

    def node(self, peer: PeerId) -> Node | None:
        """A PNode that may be commanded now."""
        node = self.nodes.get(peer)
        return node if node is not None and node.usable else None

    def lost(self, peer: PeerId) -> None:
        """A PNode went without a word while it was of use."""
        self._lost_at.setdefault(peer, []).append(self.now)

    def doubt(self, peer: PeerId) -> None:
        """A PNode did not answer another one: if it is dead, that is heard within ``red_after_s``."""
        self._doubted[peer] = Instant(self.now + self.limits.red_after_s)

    def in_doubt(self, peer: PeerId) -> bool:
        return self._doubted.get(peer, self.now) > self.now

    def on_probation(self, peer: PeerId) -> bool:
        """Whether others are to be preferred to a PNode: it is in doubt, or has been lost often of late."""
        limits = self.limits
        if self.in_doubt(peer):
            return True
        recent = [at for at in self._lost_at.get(peer, ()) if self.now - at < limits.probation_most_s]
        self._lost_at[peer] = recent
        if len(recent) < 2:
            return False
        lasts_s = min(limits.probation_first_s * 2.0 ** (len(recent) - 2), limits.probation_most_s)
        return self.now - recent[-1] < lasts_s

    def _parted(self) -> set[PeerId]:
        """Of two that cannot reach each other only the stronger is used."""
        self.parted = {pair: until for pair, until in self.parted.items() if until > self.now}
        left_out: set[PeerId] = set()
        for pair in sorted(self.parted, key=sorted):
            here = sorted(p for p in pair if p in self.nodes and self.nodes[p].usable)
            if len(here) == 2 and not left_out & pair:
                left_out.add(min(here, key=lambda p: (self.nodes[p].capabilities.gflops, p)))
        return left_out

    def is_leaving(self, peer: PeerId) -> bool:
        return peer in self.nodes and self.nodes[peer].leaving

    def is_lost(self, peer: PeerId, incarnation: Incarnation) -> bool:
        """Whether this start of a PNode is gone for good."""
        node = self.nodes.get(peer)
        return node is None or node.gone or node.descriptor.incarnation != incarnation

    def neighbour(self, peer: PeerId) -> m.Neighbour:
        descriptor = self.nodes[peer].descriptor
        return m.Neighbour(peer=peer, incarnation=descriptor.incarnation, addresses=descriptor.addresses)

    def problem(
        self, network: Network, record: Record, room: Callable[[PeerId, Node], int], *, last_resort: bool = True
    ) -> Problem:
        """The placement of ``network`` for a session's training on the PNodes that are here; ``room``: bytes that each
        offers. ``last_resort``: also on those that are on probation."""
        left_out = {p for p in self.nodes if not last_resort and self.on_probation(p)} | self._parted()
        candidates = (
            Candidate(
                peer=peer,
                numeric_class=node.capabilities.numeric_class,
                gflops=node.capabilities.gflops,
                memory_bytes=room(peer, node),
                catalogue=node.capabilities.catalogue,
            )
            for peer, node in sorted(self.nodes.items())
            if node.usable and not node.leaving and peer not in left_out
        )
        return training_problem(
            network, record.recipe, candidates, window_extra=self.limits.window_extra, catalogue=record.catalogue
        )

    def needs(
        self, network: Network, recipe: Recipe, window: int, spots: Mapping[VNodeId, PeerId]
    ) -> dict[PeerId, int]:
        """Bytes that a placement takes on each PNode."""
        return {
            peer: memory(
                network,
                [v for v, place in spots.items() if place == peer],
                rows=recipe.rows,
                window=window,
                training=True,
                delay=recipe.delay,
                optimizer=recipe.optimizer.kind,
                momentum=recipe.optimizer.momentum,
            ).total
            for peer in dict.fromkeys(spots.values())
        }

    def reserve(self, session: SessionId, needs: Mapping[PeerId, int]) -> None:
        """What a session takes on each PNode; what it had before is free."""
        self.release(session)
        for peer, size in needs.items():
            self.nodes[peer].reserved[session] = size

    def release(self, session: SessionId) -> None:
        for node in self.nodes.values():
            node.reserved.pop(session, None)

    def cede(self, session: SessionId) -> None:
        """Another orchestrator commands it now: what it has is foreign, until heartbeats say that it is no more."""
        for node in self.nodes.values():
            node.foreign_bytes += node.reserved.pop(session, 0)

    def free_bytes(self, node: Node, session: SessionId | None) -> int:
        """What a PNode could give to ``session``: its memory less what others have there."""
        others = sum(size for owner, size in node.reserved.items() if owner != session)
        return max(0, node.capabilities.memory_bytes - others - node.foreign_bytes)
