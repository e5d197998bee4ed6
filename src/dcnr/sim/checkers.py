"""The invariants of the design's section 9, watched at the borders of processes: events in, effects out, what is durable.

VersionRule and UpdateOnce are seen where they can be broken, in :mod:`dcnr.sim.worker`; ClientView in
:mod:`dcnr.sim.client`; the count of handles in :mod:`dcnr.sim.tensors`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dcnr.errors import ProtocolError
from dcnr.ids import SessionId, Sha256, VNodeId
from dcnr.machine import Compute, Effect, Emit, Event, Handle, Received, Respond, Send, Shutdown
from dcnr.pnode.pnode import FENCE
from dcnr.pnode.tasks import Backward, Forward, Task, Update
from dcnr.protocol import messages as m
from dcnr.protocol.messages import Direction
from dcnr.session.checkpoint import Manifest
from dcnr.session.log import PLACING, Base, Entry, Fold, Kind, fold, manifest_key, object_key
from dcnr.session.record import Record
from dcnr.sim.compute import Oracle, State
from dcnr.sim.violation import Violation

if TYPE_CHECKING:
    from dcnr.sim.world import Process, World

OnEntry = Callable[[str, int, str], None]


def _serving(session: str) -> bool:
    """Serving instances are in no log."""
    return session.startswith("serve-")


class Watch:
    """All sessions, each with its checkers, and what concerns a process as a whole. Methods raise :class:`Violation`."""

    def __init__(self, world: World, oracles: Sequence[Oracle]) -> None:
        self._world = world
        self.causes = 0
        """Faults so far that may cost a rollback, one of each session that they meet. That an owner dies, or is
        succeeded, is none: its hosts go on."""
        self.sessions = [Checkers(world, self, oracle) for oracle in oracles]
        self._by_seed = {oracle.recipe.seed: each for oracle, each in zip(oracles, self.sessions, strict=True)}
        self._by_id: dict[str, Checkers] = {}
        self._frames: dict[tuple[str, int, Handle], m.TensorFrame] = {}
        """By (process, life) and handle: whatever came and was not consumed yet."""
        self._age: dict[Checkers, tuple[float, str]] = {}
        """The older session's is less."""
        self._waiting: dict[Checkers, tuple[str, int]] = {}
        """Sessions that wait for a place, and the (process, life) that commands them."""
        self._overtaken: dict[Checkers, Checkers] = {}
        """Whoever waits, and a younger one that waited beside it and has got a place since."""

    def of(self, session: str) -> Checkers:
        """Those of a session that has a record."""
        if session not in self._by_id:
            raise Violation("LogLinear", f"there is no session {session}")
        return self._by_id[session]

    def created(self, key: str, data: bytes) -> None:
        """A create became durable."""
        if key.endswith("/record.json"):
            session, record = SessionId(key.split("/")[1]), Record.from_bytes(data)
            checkers = self._by_seed.get(record.recipe.seed)
            if checkers is None or checkers in self._age:
                raise Violation("LogLinear", f"a second session {session} has the recipe of seed {record.recipe.seed}")
            self._by_id[session] = checkers
            self._age[checkers] = record.age
        elif "/log/" in key:
            session = SessionId(key.split("/")[1])
            checkers = self.of(session)
            checkers.session = session
            checkers.created(key, data)
            self._world.calm.entry(session, checkers.log[-1])
            self._waits_no_more(checkers)

    # --- the older first -----------------------------------------------------------------------------------

    def _waits(self, process: Process, checkers: Checkers) -> None:
        """OlderFirst: of two that wait at one orchestrator, the older gets what both could use."""
        other = self._overtaken.pop(checkers, None)
        refused_us = self._world.limits.recover_wait_s * 1.5e6
        was_refused = self._world.now_us - checkers.refused_us <= refused_us
        alike = other is not None and checkers.oracle.recipe.rows == other.oracle.recipe.rows
        if other is not None and alike and not was_refused and other not in self._waiting:
            raise Violation(
                "OlderFirst", f"session {checkers.session} waits while the younger {other.session} is placed"
            )
        self._waiting[checkers] = (process.name, process.life)

    def _waits_no_more(self, checkers: Checkers) -> None:
        """It is placed, or has ended, or a new owner begins anew with it."""
        where = self._waiting.pop(checkers, None)
        self._overtaken.pop(checkers, None)
        for other, there in self._waiting.items():
            if where == there and checkers.log[-1].kind in PLACING and self._age[other] < self._age[checkers]:
                self._overtaken[other] = checkers

    # --- processes -----------------------------------------------------------------------------------------

    def durable_entry(self, key: str, tell: OnEntry) -> None:
        if "/log/" in key:
            session = key.split("/")[1]
            log = self.of(session).log
            tell(session, len(log), log[-1].kind.value)

    def deleted(self, key: str) -> None:
        self.of(key.split("/")[1]).deleted(key)

    def event(self, process: Process, event: Event) -> None:
        if not isinstance(event, Received):
            if isinstance(event, Shutdown) and process.role == "pnode":
                self._world.calm.told_to_end(process)
            return
        message = event.message
        if isinstance(message, m.TensorFrame):
            self._frames[process.name, process.life, message.tensor.handle] = message
        elif isinstance(message, m.Done) and process.role == "orchestrator" and not _serving(message.session):
            self.of(message.session).done(message)
        elif isinstance(message, m.MoveRefused):
            self._world.calm.move_refused(process, message.session)
        elif isinstance(message, m.Drain):
            self._world.calm.drain(process, on=message.on)

    def effect(self, process: Process, effect: Effect) -> None:
        match effect:
            case Send(message=m.Heartbeat() as beat):
                self._world.calm.heartbeat(process, beat)
            case Send(message=message):
                session = getattr(message, "session", "serve-")
                if not _serving(session):
                    self.of(session).sent(process, message)
                    self._world.calm.sent(process, message)
            case Compute(what=Forward() | Backward() as task):
                self._consumed(process, task)
            case Emit(kind="waiting", session=session, data=data) if session is not None:
                if not data["reason"]:
                    raise Violation("ClientView", f"session {session} waits without a reason")
                self._waits(process, self.of(session))
            case Emit(kind="move_given_up", session=session) if session is not None:
                self._world.calm.move_given_up(session)
            case Respond(message=m.EventRecord(kind="step_done") as record):
                self.of(record.session).told(int(json.loads(record.data)["step"]))

    def _consumed(self, process: Process, task: Forward | Backward) -> None:
        """FrameFence: every frame that a task consumes was meant for exactly this session's instance of this process."""
        segment = task.segment
        if isinstance(task, Forward):
            if not task.training:
                return
            refs = dict(zip(segment.in_edges, task.inputs, strict=False))
            direction = Direction.FORWARD
        else:
            refs = dict(zip(segment.grads_in, task.grads, strict=True))
            direction = Direction.BACKWARD
        assert process.executor is not None
        oracle = process.executor.of_task(task)
        assert oracle is not None
        checkers = self._by_seed[oracle.recipe.seed]
        current = checkers.ticket.get((process.name, process.life), 0)
        for edge, ref in refs.items():
            frame = self._frames.pop((process.name, process.life, ref.handle), None)
            if frame is None:
                continue
            if frame.session != checkers.session:
                raise Violation("FrameFence", f"{frame} is consumed in session {checkers.session}")
            if (frame.edge, frame.direction, frame.step, frame.microbatch) != (
                edge,
                direction,
                task.step,
                task.microbatch,
            ):
                raise Violation("FrameFence", f"{frame} is consumed as {edge} {task.step}/{task.microbatch}")
            if frame.target_incarnation != process.incarnation:
                raise Violation("FrameFence", f"a frame for {frame.target_incarnation} is consumed")
            if frame.target_instance != current or frame.source_instance != current:
                raise Violation(
                    "FrameFence",
                    f"a frame from instance {frame.source_instance} to {frame.target_instance} is consumed in {current}",
                )

    def computing(self, process: Process, task: Task) -> None:
        """A task ends now, and well."""
        if isinstance(task, Update):
            versions = self._by_seed[task.recipe.seed].versions
            for vnode, _ in task.states:
                versions[vnode] = max(versions.get(vnode, 0), task.step)

    def held(self, process: Process) -> None:
        if process.table.held_bytes > process.capabilities.memory_bytes:
            raise Violation(
                "BoundedConserved", f"{process.table.held_bytes} bytes held of {process.capabilities.memory_bytes}"
            )

    def at_end(self, world: World) -> None:
        """The sessions are over and everything has settled."""
        for checkers in self.sessions:
            for base in checkers.fold.commits[-1:]:
                checkers.restorable(base)
            kept = [p.name for p in world.live_processes() if any(s == checkers.session for s, _ in p.guarded)]
            told = (
                checkers.fold.state == "finished"
                and checkers.acquires == 1
                and all(p.boot == 1 for p in world.processes)
            )
            if kept and told:
                raise Violation("ShelfBounded", f"{kept} keep states of session {checkers.session}, which is finished")
        for process in world.live_processes():
            held = process.table.live()
            if held:
                raise Violation("BoundedConserved", f"{process.name} still holds {held[:5]} ({len(held)} in all)")


class Checkers:
    """One session's invariants. Methods raise :class:`Violation`."""

    def __init__(self, world: World, watch: Watch, oracle: Oracle) -> None:
        self._world = world
        self._watch = watch
        self.oracle = self._oracle = oracle
        self.log: list[Entry] = []
        self.fold = Fold()
        self.session: SessionId | None = None
        """Since it has a log."""
        self.manifests: dict[Sha256, Manifest] = {}
        self.rollbacks = 0
        self._told = 0
        """The newest step that clients were told of."""
        self.moves = 0
        self.marks_used = 0
        """Rollbacks that began from a state which only PNodes hold."""
        self._no_room = 0
        """Tickets that were refused because another session has the memory: each costs a placement, and no step."""
        self.refused_us = -math.inf
        """When a PNode refused it last: it is not asked again for a while."""
        self._acquires: dict[int, Entry] = {}
        self._placements: dict[int, Fold] = {}
        self._accepted_epoch: dict[str, int] = {}
        self.ticket: dict[tuple[str, int], int] = {}
        """(process, life) to the instance of the newest ticket it acknowledged."""
        self._open: dict[tuple[int, int], set[int]] = {}
        self._open_of = 0
        self._segments = 0
        self.versions: dict[VNodeId, int] = {}

    # --- the log and the store -----------------------------------------------------------------------------

    def created(self, key: str, data: bytes) -> None:
        """An entry became durable."""
        number = int(key.rsplit("/", 1)[-1])
        if number != len(self.log) + 1:
            raise Violation("LogLinear", f"entry {number} became durable after entry {len(self.log)}")
        try:
            entry = Entry.from_bytes(data)
            if entry.index != number:
                raise ProtocolError(f"entry {number} says it is {entry.index}")
            after = fold(self.fold, entry)
        except ProtocolError as error:
            raise Violation("LogLinear", str(error)) from error
        if entry.kind is not Kind.ACQUIRE:
            newest = self._acquires[max(self._acquires)] if self._acquires else None
            if newest is None or newest.author != entry.author or int(entry.epoch) != int(newest.index):
                raise Violation("LogLinear", f"entry {number} ({entry.kind}) is not by the owner of the newest Acquire")
        self.log.append(entry)
        before, self.fold = self.fold, after
        match entry.kind:
            case Kind.ACQUIRE:
                self._acquires[entry.index] = entry
            case Kind.PLACE | Kind.ROLLBACK | Kind.MOVE:
                self._placed(entry)
            case Kind.COMMIT:
                self._committed(before, entry)

    def _placed(self, entry: Entry) -> None:
        if entry.kind is Kind.ROLLBACK:
            self.rollbacks += 1
            causes = self._watch.causes + self._no_room
            if self.rollbacks > causes:
                raise Violation("LiveAndCalm", f"rollback {self.rollbacks} after {causes} faults that may cost one")
        if entry.kind is Kind.MOVE:
            self.moves += 1
            if self.fold.base.step < self._told:
                raise Violation("LiveAndCalm", f"Move at {entry.index} withdraws steps after {self.fold.base.step}")
        missing = [v for v in self._oracle.network.order if v not in self.fold.placement]
        if missing:
            raise Violation("LogLinear", f"{entry.kind} at {entry.index} does not place {missing}")
        if self.fold.base.manifest is not None and self.fold.base.manifest not in self.manifests:
            self._marked(self.fold.base)
        self._placements[entry.index] = self.fold

    def _marked(self, base: Base) -> None:
        """A base that was never committed is newer than every commit, and PNodes keep the oracle's states of it."""
        assert self.session is not None
        assert base.manifest is not None
        data = self._world.store.objects.get(manifest_key(self.session, base.manifest))
        if data is None or base.step <= self.fold.newest().step:
            raise Violation("CheckpointAtomic", f"base {base} is no commit and no newer manifest")
        try:
            manifest = Manifest.from_bytes(data, base.manifest)
        except ProtocolError as error:
            raise Violation("CheckpointAtomic", str(error)) from error
        expected, newest = self._oracle.state(base.step), self.fold.newest()
        for vnode in self._oracle.kernels.stateful:
            version = self._oracle.version(vnode, base.step)
            right = State(vnode=vnode, weights=expected[vnode], version=version).to_bytes()
            stored = manifest.states.get(vnode)
            if stored is None:
                if vnode in self._oracle.kernels.updated:
                    raise Violation("CheckpointAtomic", f"base {base} has no state of {vnode}")
                continue
            if stored.sha256 != hashlib.sha256(right).hexdigest() or stored.version != version:
                raise Violation("Oracle", f"state of {vnode} in base {base} is not the oracle's")
            key = (self.session, stored.sha256)
            if vnode in self._oracle.kernels.updated and not any(
                key in p.snapshots or key in p.guarded for p in self._world.processes
            ):
                raise Violation("CheckpointAtomic", f"nobody keeps the state of {vnode} of base {base}")
        if manifest.losses != tuple((t, self._oracle.loss(t)) for t in range(newest.step + 1, base.step + 1)):
            raise Violation("Oracle", f"losses of base {base} are {manifest.losses}")
        self.marks_used += 1

    @property
    def acquires(self) -> int:
        """How often the session changed hands, its first owner included."""
        return len(self._acquires)

    def _committed(self, before: Fold, entry: Entry) -> None:
        """Everything that a commit names is there, hashes right, and is the oracle's."""
        assert self.session is not None
        base = self.fold.commits[-1]
        assert base.manifest is not None
        objects = self._world.store.objects
        data = objects.get(manifest_key(self.session, base.manifest))
        if data is None:
            raise Violation("CheckpointAtomic", f"Commit({base.step}) names a manifest that is not stored")
        try:
            manifest = Manifest.from_bytes(data, base.manifest)
        except ProtocolError as error:
            raise Violation("CheckpointAtomic", str(error)) from error
        self.manifests[base.manifest] = manifest
        self.restorable(base)
        for vnode, stored in manifest.states.items():
            moved = vnode in self._oracle.kernels.updated
            if moved and stored.instance != before.instance:
                raise Violation(
                    "CheckpointAtomic",
                    f"{vnode} of Commit({base.step}) is of instance {stored.instance}, not {before.instance}",
                )
        previous = before.newest()
        if manifest.previous is not None and manifest.previous not in self.manifests:
            raise Violation("CheckpointAtomic", f"manifest {base.step} names an unknown previous one")
        steps = [s for s, _ in manifest.losses]
        if manifest.previous == previous.manifest and steps != list(range(previous.step + 1, base.step + 1)):
            raise Violation("CheckpointAtomic", f"manifest {base.step} after {previous.step} has losses of {steps}")
        for step, loss in manifest.losses:
            if loss != self._oracle.loss(step):
                raise Violation(
                    "Oracle", f"loss of step {step} in a manifest is {loss!r}, not {self._oracle.loss(step)!r}"
                )

    def restorable(self, base: Base) -> None:
        """Every object of a commit that no fault has damaged is there, whole, and the oracle's state."""
        assert self.session is not None
        assert base.manifest is not None
        manifest = self.manifests[base.manifest]
        expected = self._oracle.state(base.step)
        if sorted(manifest.states) != sorted(self._oracle.kernels.stateful):
            raise Violation("CheckpointAtomic", f"manifest {base.step} has states of {sorted(manifest.states)}")
        for vnode, stored in manifest.states.items():
            key = object_key(self.session, stored.sha256)
            if key in self._world.store.damaged:
                continue
            data = self._world.store.objects.get(key)
            if data is None or hashlib.sha256(data).hexdigest() != stored.sha256:
                raise Violation("CheckpointAtomic", f"state of {vnode} in Commit({base.step}) is missing or damaged")
            version = self._oracle.version(vnode, base.step)
            right = State(vnode=vnode, weights=expected[vnode], version=version).to_bytes()
            if data != right or stored.version != version:
                raise Violation("Oracle", f"state of {vnode} in Commit({base.step}) is not the oracle's: {data!r}")

    def deleted(self, key: str) -> None:
        """Nothing that an undropped commit or the base names may go."""
        assert self.session is not None
        for base in (*self.fold.commits, self.fold.base):
            if base.manifest is None or base.manifest not in self.manifests:
                continue
            names = {object_key(self.session, s.sha256) for s in self.manifests[base.manifest].states.values()}
            if key in names or key == manifest_key(self.session, base.manifest):
                raise Violation("CheckpointAtomic", f"{key} of Commit({base.step}) is deleted")

    # --- processes -----------------------------------------------------------------------------------------

    def done(self, message: m.Done) -> None:
        """An orchestrator hears it."""
        if message.instance == self._open_of:
            done = self._open.get((message.step, message.microbatch))
            if done is not None:
                done.add(message.segment)
                if len(done) == self._segments:
                    del self._open[message.step, message.microbatch]

    def told(self, step: int) -> None:
        """A client is told that a step is done."""
        self._told = max(self._told, step)
        behind = [v for v in self._oracle.kernels.updated if self.versions.get(v, 0) < step]
        if behind:
            raise Violation("ClientView", f"StepDone({step}) while {behind} have not updated")

    def sent(self, process: Process, message: Any) -> None:
        self._named(message)
        self._sent(process, message)

    def _named(self, message: Any) -> None:
        """What a message names is durable."""
        epoch = getattr(message, "epoch", None)
        if epoch is not None and epoch not in self._acquires:
            raise Violation("LogLinear", f"{type(message).__name__} names epoch {epoch}, no durable Acquire")
        for name in ("instance", "source_instance", "target_instance"):
            instance = getattr(message, name, None)
            if instance is not None and instance not in self._placements and not isinstance(message, m.Adopted):
                raise Violation("LogLinear", f"{type(message).__name__} names {name} {instance}, not durable")

    def _sent(self, process: Process, message: Any) -> None:
        oracle = self._oracle
        match message:
            case m.TensorFrame():
                oracle.state(message.step)
                key = (message.edge, message.direction, message.step, message.microbatch)
                if message.tensor.digest != oracle.tensors[key]:
                    raise Violation("Oracle", f"frame {key} carries {message.tensor.digest}, not {oracle.tensors[key]}")
            case m.Loss():
                oracle.state(message.step)
                expected = oracle.losses[message.vnode, message.step, message.microbatch]
                if message.loss != expected:
                    raise Violation("Oracle", f"{message} is not {expected!r}")
            case m.StepSummaries():
                oracle.state(message.step)
                for s in message.summaries:
                    if s.grad_sq != oracle.grad_squares[s.vnode, message.step]:
                        raise Violation("Oracle", f"{s} of step {message.step} is not the oracle's")
            case m.StepClose():
                oracle.state(message.step)
                if message.grad_scale != oracle.scales[message.step]:
                    raise Violation(
                        "Oracle",
                        f"StepClose({message.step}) has {message.grad_scale!r}, not {oracle.scales[message.step]!r}",
                    )
            case m.TicketAnswer(accepted=True):
                self._accepted(process, message)
            case m.TicketAnswer(missing_bytes=missing):
                self.refused_us = self._world.now_us
                # Another session may have taken it meanwhile: alone nobody is asked for more than there is.
                self._no_room += missing > 0 and len(self._watch.sessions) > 1
            case m.OpenMicrobatch():
                self._opened(message)

    def _accepted(self, process: Process, answer: m.TicketAnswer) -> None:
        """CommandFence: what is acknowledged is in the home already, and never lower than before, across restarts."""
        highest = self._accepted_epoch.get(process.name, 0)
        if answer.epoch < highest:
            raise Violation("CommandFence", f"epoch {answer.epoch} is accepted after {highest}")
        self._accepted_epoch[process.name] = answer.epoch
        fence = json.loads(process.home.get(FENCE, b"{}")).get(answer.session)
        if fence is None or fence[0] < answer.epoch or fence[2] < answer.instance:
            raise Violation(
                "CommandFence",
                f"epoch {answer.epoch}, instance {answer.instance} acknowledged, but the home has {fence}",
            )
        self.ticket[process.name, process.life] = answer.instance

    def _opened(self, message: m.OpenMicrobatch) -> None:
        """BoundedConserved: never more open microbatches than the window."""
        if message.instance != self._open_of:
            self._open_of, self._open = message.instance, {}
            placement = {v: str(s.peer) for v, s in self._placements[message.instance].placement.items()}
            self._segments = len(self._oracle.network.segments(placement))
            self._ever: set[tuple[int, int]] = set()
        key = (message.step, message.microbatch)
        if key not in self._ever:
            self._ever.add(key)
            self._open[key] = set()
        window = self._placements[message.instance].window
        if len(self._open) > window:
            raise Violation("BoundedConserved", f"{len(self._open)} microbatches are open in a window of {window}")
