"""One session, as its owner: the log first, then the action.

The owner appends to the session's log, one entry at a time, and does what the entries say: places VNodes, hands
out tickets, opens microbatches, commits checkpoints, rolls back. Whatever it knows beyond the log is rebuilt
after a restart from record, log and what the hosts say again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dcnr.errors import ProtocolError
from dcnr.ids import Epoch, Incarnation, Instance, LogIndex, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Instant, StoreDelete, StoreHint
from dcnr.network.analysis import Network
from dcnr.network.graph import canonical_json
from dcnr.network.memory import memory
from dcnr.orchestrator.desk import Desk, Node
from dcnr.orchestrator.placement import Candidate, Placement, Problem
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol import messages as m
from dcnr.session import events
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.log import (
    Base,
    Entry,
    Fold,
    Kind,
    Spot,
    fold,
    head_key,
    log_key,
    manifest_key,
    object_key,
    placed,
)
from dcnr.session.record import Record
from dcnr.session.rows import microbatch_rows

ENDED = frozenset({"stopped", "suspended", "finished", "failed"})


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """The snapshot in flight."""

    step: int
    waiting: set[PeerId]
    """Hosts that have not acknowledged ``SnapshotAt``."""
    stored: dict[VNodeId, StoredState] = field(default_factory=dict)
    committing: bool = False


@dataclass(slots=True, kw_only=True)
class Recovery:
    """Instants of a recovery, for its phases."""

    heard_at: Instant
    last_at: Instant
    regain_step: int


@dataclass(slots=True, kw_only=True)
class Append:
    kind: Kind
    body: Callable[[LogIndex], Mapping[str, Any]]
    then: Callable[[LogIndex], None]


class Owner:
    """See the module's docstring. ``evaluate`` is asked to compute a validation loss of a commit, and calls back."""

    def __init__(
        self,
        *,
        desk: Desk,
        id: SessionId,
        record: Record,
        network: Network,
        state: Fold,
        evaluate: Callable[[Owner, Base, Callable[[float, int], None]], None],
    ) -> None:
        self.desk = desk
        self.id = id
        self.record = record
        self.recipe = record.recipe
        self.network = network
        self.fold = state
        self.phase = "starting"
        self.reason = ""
        self.history: list[events.StepDone] = []
        self.manifests: dict[Sha256, Manifest] = {}
        self.steps: StepMachine | None = None
        self._evaluate = evaluate
        self._losses: dict[int, float] = {}
        self._appends: deque[Append] = deque()
        self._appending = False
        self._attempt = 0
        self._next_kind = Kind.ROLLBACK
        self._unticketed: set[PeerId] = set()
        self._unwithdrawn: set[PeerId] = set()
        self._holding: set[PeerId] = set()
        self._unloaded: set[PeerId] = set()
        self._opened: dict[tuple[int, int], dict[PeerId, m.OpenMicrobatch]] = {}
        self._opens_waiting: dict[tuple[int, int], set[PeerId]] = {}
        self._checkpoint: Checkpoint | None = None
        self._checkpoint_busy = False
        """A commit is being verified or older ones dropped: no snapshot meanwhile."""
        self._gated = 0
        self._verified: set[int] = set()
        self._garbage: set[str] = set()
        self._next_eval = self.recipe.eval_every
        self._evaluating = False
        self._recovery: Recovery | None = None
        self._pending_failures: list[tuple[int, str]] = []
        self._refused_bytes: dict[PeerId, int] = {}
        self._columns = self._needed_columns()
        self._stateful = tuple(v for v, info in network.vnodes.items() if info.parameters)

    # --- small facts ----------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        return self.fold.epoch

    @property
    def running(self) -> bool:
        return self.phase == "running"

    @property
    def active(self) -> bool:
        return self.phase not in ENDED and self.phase != "stepped down"

    def hosts(self) -> dict[PeerId, Incarnation]:
        """PNodes of the current placement."""
        return {s.peer: s.incarnation for s in self.fold.placement.values()}

    def done_step(self) -> int:
        return self.history[-1].step if self.history else 0

    def _emit(self, event: events.SessionEvent) -> None:
        self.desk.emit(event.kind, self.id, event.data())

    def _needed_columns(self) -> dict[VNodeId, tuple[str, ...]]:
        """Columns by VNode: what its inputs and costs take from the dataset."""
        found: dict[VNodeId, tuple[str, ...]] = {}
        for entry in self.network.definition.inputs:
            found[entry.node_id] = (*found.get(entry.node_id, ()), entry.column)
        for cost in self.network.definition.costs:
            found[cost.node_id] = (*found.get(cost.node_id, ()), cost.target)
        return found

    # --- the log --------------------------------------------------------------------------------------------

    def _append(
        self,
        kind: Kind,
        body: Callable[[LogIndex], Mapping[str, Any]],
        then: Callable[[LogIndex], None],
    ) -> None:
        self._appends.append(Append(kind=kind, body=body, then=then))
        self._append_next()

    def _append_next(self) -> None:
        if self._appending or not self._appends:
            return
        self._appending = True
        append = self._appends[0]
        index = LogIndex(self.fold.last + 1)
        entry = Entry(
            index=index,
            kind=append.kind,
            author=self.desk.author,
            epoch=Epoch(index) if append.kind is Kind.ACQUIRE else self.fold.epoch,
            nonce=self.desk.nonce(),
            body=append.body(index),
        )

        def answered(found: bytes | None) -> None:
            self._appending = False
            if found is None or self._is_mine(found, entry):
                self._appends.popleft()
                self.fold = fold(self.fold, entry)
                self.desk.out.append(StoreHint(key=head_key(self.id), data=str(index).encode()))
                append.then(index)
                self._append_next()
            else:
                self._foreign(found, append)

        self.desk.create(log_key(self.id, index), entry.to_bytes(), answered)

    @staticmethod
    def _is_mine(found: bytes, entry: Entry) -> bool:
        try:
            return Entry.from_bytes(found).nonce == entry.nonce
        except ProtocolError:
            return False

    def _foreign(self, found: bytes, append: Append) -> None:
        """Another has written here. Before our own ``Acquire`` that is a late entry of an older owner: read on.
        After it, only a newer owner can have: step down."""
        try:
            self.fold = fold(self.fold, Entry.from_bytes(found))
        except ProtocolError as error:
            self._step_down(f"log entry {self.fold.last + 1} cannot be read: {error}")
            return
        if append.kind is Kind.ACQUIRE:
            self._append_next()
        else:
            self._step_down("another orchestrator has acquired the session")

    def _step_down(self, reason: str) -> None:
        self.phase = "stepped down"
        self.reason = reason
        self._appends.clear()
        self._attempt += 1
        self.steps = None
        self.desk.emit("stepped_down", self.id, {"reason": reason})

    def _folded(self, state: Fold) -> dict[str, Any]:
        return {"folded": state.to_json()}

    # --- acquiring ------------------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the session: a new one is placed, an interrupted one rolled back to its newest whole commit."""
        self.phase = "acquiring"
        self._append(Kind.ACQUIRE, lambda index: self._folded(self.fold), self._acquired)

    def _acquired(self, index: LogIndex) -> None:
        if self.fold.state in ENDED:
            self.phase = self.fold.state
            self.reason = self.fold.reason
            return
        if self.fold.instance:
            self._next_kind = Kind.ROLLBACK
            self._await_hosts()
        else:
            self._next_kind = Kind.PLACE
            self._place()

    def _await_hosts(self) -> None:
        """After a restart: give the hosts of the placement a moment to come back before VNodes go elsewhere."""
        self.phase = "recovering"
        self._attempt += 1
        attempt = self._attempt

        def over() -> None:
            if attempt == self._attempt:
                self._place()

        self.desk.after(self.desk.limits.recover_wait_s, over)
        self._place_if_back()

    def _place_if_back(self) -> None:
        if all(self.desk.node(peer) for peer in self.hosts()):
            self._place()

    def load_manifests(self, then: Callable[[], None]) -> None:
        """Read the manifests of all commits, the newest first, and the losses of their chain."""
        wanted = [c for c in reversed(self.fold.commits) if c.manifest and c.manifest not in self.manifests]
        if not wanted:
            then()
            return
        base = wanted[0]
        assert base.manifest is not None
        sha256 = base.manifest

        def got(data: bytes | None) -> None:
            try:
                if data is None:
                    raise ProtocolError("it is missing")
                self.manifests[sha256] = Manifest.from_bytes(data, sha256)
            except ProtocolError as error:
                self._invalidate(base.step, f"its manifest cannot be used: {error}", lambda: self.load_manifests(then))
                return
            self.load_manifests(then)

        self.desk.get(manifest_key(self.id, sha256), got)

    def load_history(self, sha256: Sha256 | None, later: list[tuple[int, float]], then: Callable[[], None]) -> None:
        """Losses of all steps up to a commit, from its manifest back to the first."""
        if sha256 is None:
            self._losses.update(dict(later))
            self.history = [self._step_done(step, loss, 1.0) for step, loss in sorted(self._losses.items())]
            then()
            return
        known = self.manifests.get(sha256)
        if known is not None:
            self.load_history(known.previous, [*known.losses, *later], then)
            return

        def got(data: bytes | None) -> None:
            try:
                manifest = Manifest.from_bytes(data or b"", sha256)
            except ProtocolError:
                # Losses are history, not state: a gap here must not stop a session.
                self.load_history(None, later, then)
                return
            self.load_history(manifest.previous, [*manifest.losses, *later], then)

        self.desk.get(manifest_key(self.id, sha256), got)

    def _invalidate(self, step: int, reason: str, then: Callable[[], None]) -> None:
        """This commit is damaged: never a base again."""
        self._emit(events.CheckpointDamaged(step=step, reason=reason))
        self._verified.discard(step)
        self._append(Kind.INVALIDATE, lambda index: {"step": step, "reason": reason}, lambda index: then())

    # --- placing --------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Plan, append ``Place`` or ``Rollback``, hand out tickets. Newer calls overtake older ones."""
        self._attempt += 1
        attempt = self._attempt
        if self.phase != "starting" and self.phase != "acquiring":
            self.phase = "recovering"

        def loaded() -> None:
            if attempt == self._attempt:
                problem = self.problem()
                self.desk.plan(problem, lambda answer: planned(problem, answer))

        def planned(problem: Problem, answer: Placement | str) -> None:
            if attempt != self._attempt:
                return
            if isinstance(answer, str):
                if problem == self.problem():
                    self._wait(answer)
                else:
                    # Whoever came meanwhile found nobody waiting.
                    self._place()
                return
            self._phase("decided")
            self._log_placement(attempt, answer)

        self.load_manifests(loaded)

    def _wait(self, reason: str) -> None:
        if self.phase != "waiting" or self.reason != reason:
            self._emit(events.Waiting(reason=reason))
        self.phase = "waiting"
        self.reason = reason

    def problem(self) -> Problem:
        """The placement problem as it stands now."""
        classes = [s.numeric_class for s in self.fold.placement.values()]
        return Problem(
            network=self.network,
            candidates=tuple(
                Candidate(
                    peer=peer,
                    numeric_class=node.capabilities.numeric_class,
                    gflops=node.capabilities.gflops,
                    memory_bytes=min(
                        self.desk.free_bytes(node, self.id),
                        self._refused_bytes.get(peer, node.capabilities.memory_bytes),
                    ),
                )
                for peer, node in sorted(self.desk.nodes.items())
                if node.usable
            ),
            rows=self.recipe.rows,
            training=True,
            optimizer=self.recipe.optimizer.kind,
            momentum=self.recipe.optimizer.momentum,
            delay=self.recipe.delay,
            prefer_class=max(sorted(set(classes)), key=classes.count, default=""),
            window_extra=self.desk.limits.window_extra,
        )

    def _log_placement(self, attempt: int, answer: Placement) -> None:
        nodes = {peer: self.desk.node(peer) for peer in answer.spots.values()}
        if any(node is None for node in nodes.values()):
            self._place()
            return
        spots = {
            v: Spot(
                peer=peer,
                incarnation=self.desk.nodes[peer].descriptor.incarnation,
                worker=0,
                numeric_class=self.desk.nodes[peer].capabilities.numeric_class,
            )
            for v, peer in answer.spots.items()
        }
        before = self.fold.placement
        failures = (*self.fold.failures, *self._pending_failures)

        def body(index: LogIndex) -> dict[str, Any]:
            state = placed(self.fold, index=index, placement=spots, window=answer.window, base=self.fold.newest())
            return self._folded(
                Fold(
                    state=state.state,
                    reason=state.reason,
                    instance=state.instance,
                    placement=state.placement,
                    window=state.window,
                    base=state.base,
                    commits=state.commits,
                    failures=failures,
                )
            )

        def logged(index: LogIndex) -> None:
            self._pending_failures = []
            self._next_kind = Kind.ROLLBACK
            self._phase("logged")
            self._tell_placement(index, before, answer)
            if attempt != self._attempt:
                return
            if any(self._is_lost(peer, incarnation) for peer, incarnation in self.hosts().items()):
                # It went while the entry was written, when nobody yet knew it as a host.
                self._place()
            else:
                self._ticket()

        self._append(self._next_kind, body, logged)

    def _is_lost(self, peer: PeerId, incarnation: Incarnation) -> bool:
        node = self.desk.nodes.get(peer)
        return node is None or node.gone or node.descriptor.incarnation != incarnation

    def _tell_placement(self, index: LogIndex, before: Mapping[VNodeId, Spot], answer: Placement) -> None:
        placement = self.fold.placement
        for v, spot in placement.items():
            if v in before and before[v].peer != spot.peer:
                self._emit(
                    events.VNodeMoved(vnode=v, source=before[v].peer, target=spot.peer, index=index, why=answer.why[v])
                )
        old = sorted({s.numeric_class for s in before.values()})
        new = sorted({s.numeric_class for s in placement.values()})
        if old and old != new:
            self._emit(events.ExactnessLost(index=index, old=",".join(old), new=",".join(new)))
        self._emit(
            events.Placed(
                index=index,
                base_step=self.fold.base.step,
                window=self.fold.window,
                vnodes={v: s.peer for v, s in placement.items()},
                why=dict(answer.why.items()),
                numeric_class=",".join(new),
            )
        )

    def _ticket(self) -> None:
        """Everything older ends: no effect of an earlier instance counts from here on."""
        self.phase = "recovering" if self.done_step() or self.fold.instance > 2 else "starting"
        self._checkpoint = None
        self._opened = {}
        self._opens_waiting = {}
        hosts = self.hosts()
        base = self.fold.base
        placement = {v: str(s.peer) for v, s in self.fold.placement.items()}
        self.steps = StepMachine(
            network=self.network,
            segments=self.network.segments(placement),
            recipe=self.recipe,
            base_step=base.step,
            window=self.fold.window,
        )
        self._gated = base.step
        for node in self.desk.nodes.values():
            node.reserved.pop(self.id, None)
        for peer in hosts:
            hosted = [v for v, s in self.fold.placement.items() if s.peer == peer]
            self.desk.nodes[peer].reserved[self.id] = memory(
                self.network,
                hosted,
                rows=self.recipe.rows,
                window=self.fold.window,
                training=True,
                delay=self.recipe.delay,
                optimizer=self.recipe.optimizer.kind,
                momentum=self.recipe.optimizer.momentum,
            ).total
        self._unticketed = set(hosts)
        self._unloaded = {s.peer for v, s in self.fold.placement.items() if v in self._stateful}
        self._unwithdrawn = {
            peer
            for peer, node in self.desk.nodes.items()
            if node.usable and peer in self._holding and peer not in hosts
        }
        self._holding |= set(hosts)
        for peer in sorted(hosts):
            self._send_tickets(peer)
        for peer in sorted(self._unwithdrawn):
            self._send_withdraw(peer)
        if self.done_step() > base.step:
            self._emit(events.Replaying(first=base.step + 1, last=self.done_step()))

    def _send_tickets(self, peer: PeerId) -> None:
        base = self.fold.base
        states = self.manifests[base.manifest].states if base.manifest else {}
        token = self.desk.token(f"objects/{self.id}/read")
        refs = []
        for v, spot in self.fold.placement.items():
            if spot.peer != peer or v not in self._stateful:
                continue
            stored = states.get(v)
            refs.append(
                m.StateRef(
                    vnode=v,
                    sha256=stored.sha256 if stored else Sha256(""),
                    size_bytes=stored.size_bytes if stored else 0,
                    token=token if stored else "",
                )
            )
        self.desk.send(
            peer,
            m.Tickets(
                session=self.id,
                epoch=self.epoch,
                owner=self.desk.author.peer,
                instance=self.fold.instance,
                network=self.network.id,
                definition=canonical_json(self.network.definition),
                record=self.record.to_bytes(),
                placement=tuple(
                    m.Location(vnode=v, peer=s.peer, worker=s.worker) for v, s in self.fold.placement.items()
                ),
                neighbours=tuple(self.desk.neighbour(p) for p in sorted(self.hosts())),
                window=self.fold.window,
                base_step=base.step,
                states=tuple(refs),
                rows=self.recipe.rows,
            ),
        )

    def _send_withdraw(self, peer: PeerId, *, forget: bool = False) -> None:
        self.desk.send(
            peer,
            m.Withdraw(
                session=self.id,
                epoch=self.epoch,
                before=Instance(self.fold.last + 1) if forget or not self.active else self.fold.instance,
                forget_snapshots=forget,
            ),
        )

    def ticket_answer(self, peer: PeerId, answer: m.TicketAnswer) -> None:
        if answer.instance != self.fold.instance or peer not in self._unticketed or not self.active:
            return
        if not answer.accepted:
            self.desk.emit(
                "ticket_refused",
                self.id,
                {"peer": peer, "reason": answer.reason, "missing_bytes": answer.missing_bytes},
            )
            node = self.desk.nodes[peer]
            self._refused_bytes[peer] = (
                node.reserved.get(self.id, 0) - answer.missing_bytes if answer.missing_bytes else 0
            )

            def forget() -> None:
                # Memory is freed and disks are cleared: what was refused once is asked again.
                self._refused_bytes.pop(peer, None)
                self.poke()

            self.desk.after(self.desk.limits.recover_wait_s, forget)
            self._place()
            return
        self._unticketed.discard(peer)
        self._start_if_ready()

    def withdrawn(self, peer: PeerId) -> None:
        self._unwithdrawn.discard(peer)
        if peer not in self.hosts() or not self.active:
            self._holding.discard(peer)
        self._start_if_ready()

    def _start_if_ready(self) -> None:
        if self._unticketed or self._unwithdrawn or self.steps is None or self.phase == "running" or not self.active:
            return
        if self.phase not in ("recovering", "starting"):
            return
        self.phase = "running"
        self.reason = ""
        self._phase("ticketed")
        self._finish_if_done()  # The base may be the last step already.
        self._go_on()

    # --- recovery phases ------------------------------------------------------------------------------------

    def _phase(self, name: str) -> None:
        """The end of a phase of the recovery under way, if there is one."""
        recovery = self._recovery
        if recovery is None:
            return
        since = recovery.heard_at if name == "detected" else recovery.last_at
        self._emit(events.RecoveryPhase(phase=name, ms=round(1000 * (self.desk.now - since), 3)))
        recovery.last_at = self.desk.now
        if name == "regained":
            self._recovery = None

    # --- running --------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Open what the window allows."""
        steps = self.steps
        while steps is not None and self.running and steps.may_open():
            if steps.starts_step and not self._gate(steps.next_step):
                return
            self._open(*steps.open())

    def _gate(self, step: int) -> bool:
        """Before a step is opened: is it one whose state is to be kept? Then every host must have heard of it."""
        checkpoint = self._checkpoint
        if checkpoint is not None and checkpoint.step == step:
            return not checkpoint.waiting
        last = step == self.recipe.steps
        due = last or (self.recipe.checkpoint_every > 0 and step % self.recipe.checkpoint_every == 0)
        if not due or step <= self._gated:
            return True
        if checkpoint is not None or self._checkpoint_busy:
            # A slow store makes checkpoints rarer. Only the last must not be missed, so it waits.
            return not last
        self._gated = step
        self._snapshot_at(step)
        return False

    def _snapshot_at(self, step: int) -> None:
        self._checkpoint = Checkpoint(step=step, waiting=set(self.hosts()))
        for peer in sorted(self.hosts()):
            self._send_snapshot_at(peer, step)

    def _send_snapshot_at(self, peer: PeerId, step: int) -> None:
        token = self.desk.token(f"objects/{self.id}/write")
        self.desk.send(peer, m.SnapshotAt(session=self.id, epoch=self.epoch, step=step, token=token))

    def _open(self, step: int, microbatch: int) -> None:
        """Send references to the hosts of sources and costs; data never passes through here."""
        recipe, record = self.recipe, self.record
        rows = microbatch_rows(
            step=step,
            microbatch=microbatch,
            batch_size=recipe.batch_size,
            rows=recipe.rows,
            total=record.rows_train,
            seed=recipe.seed,
        )
        token = self.desk.token(f"rows/{record.dataset}")
        by_peer: dict[PeerId, dict[str, None]] = {}
        for vnode, columns in self._columns.items():
            spot = self.fold.placement[vnode]
            by_peer.setdefault(spot.peer, {}).update(dict.fromkeys(columns))
        valid = self._valid_targets()
        steps = self.steps
        assert steps is not None
        messages = {
            peer: m.OpenMicrobatch(
                session=self.id,
                epoch=self.epoch,
                instance=self.fold.instance,
                step=step,
                microbatch=microbatch,
                rows=(
                    m.RowsRef(
                        dataset=record.dataset,
                        split="train",
                        context=record.context,
                        rows=rows,
                        columns=tuple(columns),
                        token=token,
                    ),
                ),
                valid_targets=valid,
                done_step=steps.done_step,
            )
            for peer, columns in by_peer.items()
        }
        self._opened[(step, microbatch)] = messages
        self._opens_waiting[(step, microbatch)] = set(messages)
        for peer, message in messages.items():
            self.desk.send(peer, message)

    def _valid_targets(self) -> tuple[m.CostTargets, ...]:
        """Known beforehand: one constant per row of text, or the elements of the target's shape."""
        network, record = self.network, self.record
        return tuple(
            m.CostTargets(
                vnode=cost.node_id,
                count=self.recipe.batch_size * (record.valid_targets_per_row or target.elements),
            )
            for cost, target in zip(network.definition.costs, network.cost_targets(), strict=True)
        )

    def task_answer(self, peer: PeerId, answer: m.TaskAnswer) -> None:
        if answer.instance != self.fold.instance:
            return
        waiting = self._opens_waiting.get((answer.step, answer.microbatch))
        if waiting is None:
            return
        if answer.accepted:
            waiting.discard(peer)
        else:
            self.desk.emit("task_refused", self.id, {"peer": peer, "reason": answer.reason})

    def report(self, peer: PeerId, message: m.Message) -> None:
        """What hosts of the current instance say about steps."""
        steps = self.steps
        if steps is None or not self.running:
            return
        match message:
            case m.Done():
                if steps.done(message.segment, message.step, message.microbatch):
                    self._opened.pop((message.step, message.microbatch), None)
                    self._opens_waiting.pop((message.step, message.microbatch), None)
            case m.Loss():
                steps.loss(message.vnode, message.step, message.microbatch, message.loss)
                self._check_finite(message.step)
            case m.StepSummaries():
                for summary in message.summaries:
                    steps.summary(message.step, summary.vnode, summary.grad_sq, summary.finite)
                scale = steps.close(message.step)
                if scale is not None:
                    for host in sorted(self.hosts()):
                        self._send_close(host, message.step, scale)
                self._check_finite(message.step)
            case m.Updated():
                for vnode in message.vnodes:
                    steps.updated(message.step, vnode, vnode not in message.not_finite)
                self._check_finite(message.step)
            case m.Loaded():
                self._loaded(peer, message)
            case _:
                raise AssertionError(f"no report: {type(message).__name__}")
        self._finish_steps()
        self._go_on()

    def _send_close(self, peer: PeerId, step: int, scale: float) -> None:
        self.desk.send(
            peer,
            m.StepClose(session=self.id, epoch=self.epoch, instance=self.fold.instance, step=step, grad_scale=scale),
        )

    def _loaded(self, peer: PeerId, message: m.Loaded) -> None:
        self.desk.emit(
            "states_loaded",
            self.id,
            {"vnodes": list(message.vnodes), "local": message.local, "base_step": self.fold.base.step},
        )
        self._unloaded.discard(peer)
        if self._recovery is not None and not self._unloaded:
            self._phase("loaded")

    def _check_finite(self, step: int) -> None:
        steps = self.steps
        vnode = steps.not_finite(step) if steps is not None else None
        if vnode is not None:
            self.task_failed(vnode, step, "its loss, gradients or weights are not finite (NaN or infinity)")

    def _finish_steps(self) -> None:
        steps = self.steps
        if steps is None:
            return
        for step, loss, scale in steps.finish_steps():
            self._losses[step] = loss
            if step == self.done_step() + 1:
                event = self._step_done(step, loss, scale)
                self.history.append(event)
                self._emit(event)
            if self._recovery is not None and step >= self._recovery.regain_step:
                self._phase("regained")
        self._commit_if_stored()
        self._keep_last()

    def _step_done(self, step: int, loss: float, scale: float) -> events.StepDone:
        return events.StepDone(
            step=step,
            loss=loss,
            learning_rate=self.recipe.learning_rate(step),
            grad_scale=scale,
            tokens=sum(t.count for t in self._valid_targets()),
        )

    # --- checkpoints ----------------------------------------------------------------------------------------

    def snapshot_answer(self, peer: PeerId, answer: m.SnapshotAnswer) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.step != answer.step or answer.epoch != self.epoch:
            return
        if not answer.accepted:
            self._abandon(f"{peer}: {answer.reason}")
            return
        checkpoint.waiting.discard(peer)
        self._go_on()

    def snapshot_failed(self, message: m.SnapshotFailed) -> None:
        checkpoint = self._checkpoint
        if checkpoint is not None and checkpoint.step == message.step and message.instance == self.fold.instance:
            self._abandon(message.reason)

    def _abandon(self, reason: str) -> None:
        checkpoint = self._checkpoint
        assert checkpoint is not None
        if checkpoint.committing:
            return
        self._checkpoint = None
        self._emit(events.CheckpointAbandoned(step=checkpoint.step, reason=reason))
        for peer in sorted(self.hosts()):
            self.desk.send(peer, m.Abandoned(session=self.id, epoch=self.epoch, step=checkpoint.step))
        if checkpoint.step == self.recipe.steps:
            # The last state must be kept: it is asked for again, from hosts that stand still by then.
            instance = self.fold.instance

            def again() -> None:
                if self.fold.instance == instance:
                    self._keep_last()

            self.desk.after(self.desk.limits.resend_after_s, again)
        self._go_on()

    def _keep_last(self) -> None:
        """All steps are done and no whole commit holds the last state: it stands still, so it is asked for once more."""
        last = self.recipe.steps
        done = self.steps is not None and self.steps.done_step == last
        idle = self._checkpoint is None and not self._checkpoint_busy
        if self.running and done and idle and self.fold.newest().step != last:
            self._snapshot_at(last)

    def stored(self, peer: PeerId, message: m.Stored) -> None:
        if message.instance != self.fold.instance or not self.active:
            return
        if any(c.step == message.step for c in self.fold.commits):
            self._send_committed(peer, message.step)
            return
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.step != message.step:
            if self.running:
                self.desk.send(peer, m.Abandoned(session=self.id, epoch=self.epoch, step=message.step))
            return
        checkpoint.stored[message.vnode] = StoredState(
            sha256=message.sha256,
            size_bytes=message.size_bytes,
            version=message.step if self.network.uses(message.vnode) else 0,
            instance=message.instance,
        )
        self._commit_if_stored()

    def _commit_if_stored(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.committing or not self.running:
            return
        if self.steps is None or self.steps.done_step < checkpoint.step:
            return
        if any(v not in checkpoint.stored for v in self._stateful):
            return
        checkpoint.committing = True
        previous = self.fold.newest()
        manifest = Manifest(
            step=checkpoint.step,
            states={v: checkpoint.stored[v] for v in self._stateful},
            losses=tuple((t, self._losses[t]) for t in range(previous.step + 1, checkpoint.step + 1)),
            previous=previous.manifest,
        )
        sha256 = manifest.sha256
        self.manifests[sha256] = manifest

        def created(found: bytes | None) -> None:
            # The name is its hash: whoever wrote it wrote these bytes.
            self._append(
                Kind.COMMIT,
                lambda index: {"step": manifest.step, "manifest": sha256},
                lambda index: self._committed(index, manifest, sha256),
            )

        self.desk.create(manifest_key(self.id, sha256), manifest.to_bytes(), created)

    def _send_committed(self, peer: PeerId, step: int) -> None:
        base = next(c for c in self.fold.commits if c.step == step)
        assert base.manifest is not None
        self.desk.send(peer, m.Committed(session=self.id, epoch=self.epoch, step=step, manifest=base.manifest))

    def _committed(self, index: LogIndex, manifest: Manifest, sha256: Sha256) -> None:
        base = Base(step=manifest.step, manifest=sha256)
        if self._checkpoint is not None and self._checkpoint.step == manifest.step:
            self._checkpoint = None
        for peer in sorted(self.hosts()):
            self._send_committed(peer, manifest.step)
        self._emit(
            events.CheckpointCommitted(
                step=manifest.step,
                manifest=sha256,
                index=index,
                size_bytes=sum(s.size_bytes for s in manifest.states.values()),
            )
        )
        self._checkpoint_busy = True
        self._evaluate_if_due(base)
        self._verify(base, manifest)
        self._place_if_lost()

    def _verify(self, base: Base, manifest: Manifest) -> None:
        """Read the commit back; then drop what two verified commits make superfluous."""
        keys = tuple(dict.fromkeys(object_key(self.id, s.sha256) for s in manifest.states.values()))

        def checked(damaged: Mapping[str, str]) -> None:
            if damaged:
                key, reason = next(iter(sorted(damaged.items())))
                self._invalidate(base.step, f"{key}: {reason}", over)
            else:
                self._verified.add(base.step)
                self._drop_old(over)

        def over() -> None:
            self._checkpoint_busy = False
            self._finish_if_done()
            self._keep_last()
            self._go_on()

        self.desk.check(keys, checked)

    def _drop_old(self, then: Callable[[], None]) -> None:
        commits = self.fold.commits
        verified = [c.step for c in commits if c.step in self._verified]
        if len(verified) <= self.desk.limits.commits_kept:
            then()
            return
        oldest_kept = verified[-self.desk.limits.commits_kept]
        victim = commits[0]
        if victim.step >= oldest_kept:
            then()
            return

        def dropped(index: LogIndex) -> None:
            self._emit(events.CheckpointDropped(step=victim.step))
            self._verified.discard(victim.step)
            self._delete(victim)
            self._drop_old(then)

        self._append(Kind.DROP, lambda index: {"step": victim.step}, dropped)

    def _delete(self, victim: Base) -> None:
        """Delete what no undropped commit and no base names; manifests stay, for they carry the losses."""
        kept = {
            object_key(self.id, s.sha256)
            for c in (*self.fold.commits, self.fold.base)
            if c.manifest in self.manifests and c.manifest is not None
            for s in self.manifests[c.manifest].states.values()
        }
        assert victim.manifest is not None
        gone = self.manifests.get(victim.manifest)
        if gone is not None:
            self._garbage |= {object_key(self.id, s.sha256) for s in gone.states.values()}
            if victim != self.fold.base:
                del self.manifests[victim.manifest]
        delete = tuple(sorted(self._garbage - kept))
        self._garbage &= kept
        if delete:
            self.desk.out.append(StoreDelete(keys=delete))

    def _evaluate_if_due(self, base: Base) -> None:
        every = self.recipe.eval_every
        due = every > 0 and (base.step >= self._next_eval or base.step == self.recipe.steps)
        if not due or self._evaluating:
            return
        self._next_eval = (base.step // every + 1) * every
        self._evaluating = True

        def evaluated(loss: float, rows: int) -> None:
            self._evaluating = False
            if rows:
                self._emit(events.Evaluated(step=base.step, loss=loss, rows=rows))
            self._finish_if_done()

        self._evaluate(self, base, evaluated)

    def _finish_if_done(self) -> None:
        last = self.recipe.steps
        if not self.running or self.fold.newest().step != last or self._evaluating or self._checkpoint_busy:
            return
        self.phase = "finishing"

        def finished(index: LogIndex) -> None:
            self._end("finished", "")
            self._emit(events.Finished(step=last, loss=self._losses.get(last, self.history[-1].loss)))

        self._append(Kind.FINISH, lambda index: {}, finished)

    # --- trouble --------------------------------------------------------------------------------------------

    def node_lost(self, peer: PeerId, heard_at: Instant, reason: str) -> None:
        """A PNode of the placement is lost, with its VNodes."""
        self._unwithdrawn.discard(peer)
        self._holding.discard(peer)
        self._refused_bytes.pop(peer, None)
        if not self.active or self.phase in ("acquiring", "finishing"):
            return
        hosted = tuple(v for v, s in self.fold.placement.items() if s.peer == peer)
        if not hosted:
            self._start_if_ready()
            return
        self._emit(events.PNodeLost(peer=peer, reason=reason, vnodes=hosted))
        if self._recovery is None:
            self._recovery = Recovery(heard_at=heard_at, last_at=self.desk.now, regain_step=self.done_step() + 1)
            self._phase("detected")
        if self.phase == "waiting" and not self.fold.instance:
            return
        self._roll_back()

    def _roll_back(self) -> None:
        """Everything since the newest whole commit is computed again."""
        if self._checkpoint is not None and self._checkpoint.committing:
            # Its objects are all there: Commit goes before Rollback. ``_place_if_lost`` goes on from there.
            self.phase = "recovering"
            return
        self._checkpoint = None
        self._place()

    def _place_if_lost(self) -> None:
        if self.phase == "recovering":
            self._place()

    def task_failed(self, vnode: VNodeId, step: int, reason: str, *, cause: str = "compute") -> None:
        """A VNode failed on a living PNode: one Rollback tries again; the second failure at a step is the end."""
        if not self.running:
            return
        self.desk.emit("task_failed", self.id, {"vnode": vnode, "step": step, "cause": cause, "reason": reason})
        if cause == "state":
            self._state_unreadable(reason)
            return
        known = {s for s, _ in (*self.fold.failures, *self._pending_failures)}
        if step in known or cause == "divergence":
            self._fail(step, vnode, reason)
            return
        if cause == "data":
            # A row is never skipped: rows that cannot be read end the session in a state that can be resumed.
            self._suspend(step, reason)
            return
        self._pending_failures.append((step, vnode))
        self._roll_back()

    def _state_unreadable(self, reason: str) -> None:
        """A host could not read its state: is the commit damaged, or was it the moment?"""
        base = self.fold.base
        if base.manifest is None or base.manifest not in self.manifests:
            self._roll_back()
            return
        self.phase = "recovering"
        self.steps = None
        states = self.manifests[base.manifest].states.values()

        def checked(damaged: Mapping[str, str]) -> None:
            if not self.active:
                return
            if damaged and any(c.step == base.step for c in self.fold.commits):
                key, found = next(iter(sorted(damaged.items())))
                self._invalidate(base.step, f"{key}: {found}", self._place)
            else:
                self._place()

        self.desk.check(tuple(dict.fromkeys(object_key(self.id, s.sha256) for s in states)), checked)

    def _fail(self, step: int, vnode: VNodeId, reason: str) -> None:
        self.phase = "failing"
        text = f"step {step}, VNode {vnode}: {reason}"

        def failed(index: LogIndex) -> None:
            self._end("failed", text)
            self._emit(events.Failed(step=step, vnode=vnode, reason=text))

        self._append(Kind.FAIL, lambda index: {"step": step, "vnode": vnode, "reason": text}, failed)

    def _suspend(self, step: int, reason: str) -> None:
        self.phase = "suspending"

        def suspended(index: LogIndex) -> None:
            self._end("suspended", reason)
            self._emit(events.Suspended(step=self.fold.newest().step, reason=reason))

        self._append(Kind.SUSPEND, lambda index: {"step": step, "reason": reason}, suspended)

    def _end(self, phase: str, reason: str) -> None:
        """Release every host. Nothing of this session is left running."""
        self.phase = phase
        self.reason = reason
        self._attempt += 1
        self.steps = None
        self._checkpoint = None
        self._recovery = None
        self._checkpoint_busy = False
        self._opened = {}
        self._opens_waiting = {}
        self._unwithdrawn = set()
        for node in self.desk.nodes.values():
            node.reserved.pop(self.id, None)
        for peer in sorted(self._holding):
            self._send_withdraw(peer, forget=phase == "finished")

    # --- clients and links ----------------------------------------------------------------------------------

    def stop(self, then: Callable[[str], None]) -> None:
        """``then`` gets '' or the reason of a refusal."""
        if not self.active or self.phase in ("finishing", "failing", "suspending"):
            then(f"the session is {self.phase}")
            return
        self.phase = "stopping"
        self._attempt += 1

        def stopped(index: LogIndex) -> None:
            self._end("stopped", "")
            self._emit(events.Stopped(step=self.fold.newest().step))
            then("")

        self._append(Kind.STOP, lambda index: {}, stopped)

    def resume(self, then: Callable[[str], None]) -> None:
        """``Resume``, then ``Place`` on the newest commit."""
        if self.phase not in ("stopped", "suspended", "failed"):
            then(f"the session is {self.phase}: only a stopped, suspended or failed one is resumed")
            return
        self.phase = "starting"

        def resumed(index: LogIndex) -> None:
            self._emit(events.Resumed(step=self.fold.newest().step))
            self._next_kind = Kind.PLACE
            self._pending_failures = []
            self._refused_bytes = {}
            then("")
            self._place()

        if self.fold.owner != self.desk.author:
            # It ended under an earlier start of this orchestrator, which left it unowned.
            self._append(Kind.ACQUIRE, lambda index: self._folded(self.fold), lambda index: None)
        self._append(Kind.RESUME, lambda index: {}, resumed)

    def node_up(self, peer: PeerId, node: Node) -> None:
        """A link is new: say again what an older one may have lost, and look whether a waiting session can go on."""
        if not self.active:
            if peer in self._holding:
                self._send_withdraw(peer, forget=self.phase == "finished")
            return
        if self.phase == "waiting":
            self._place()
            return
        hosts = self.hosts()
        if peer in hosts and hosts[peer] != node.descriptor.incarnation:
            return
        if self.phase == "recovering" and self.steps is None and not self._appending:
            self._place_if_back()
            return
        if peer in self._unticketed:
            self._send_tickets(peer)
        if peer in self._unwithdrawn:
            self._send_withdraw(peer)
        if not self.running or self.steps is None or peer not in hosts:
            return
        if self._checkpoint is not None and peer in self._checkpoint.waiting:
            self._send_snapshot_at(peer, self._checkpoint.step)
        for step, scale in self.steps.closed():
            self._send_close(peer, step, scale)
        for key, messages in self._opened.items():
            if peer in messages and peer in self._opens_waiting.get(key, ()):
                self.desk.send(peer, messages[peer])

    def hosting(self, peer: PeerId) -> None:
        """A heartbeat says that a PNode hosts this session: if it should not, it has missed a ``Withdraw``."""
        if self.phase in ("starting", "acquiring", "stepped down") or (self.active and peer in self.hosts()):
            return
        if self.active and not self.running:
            return  # A placement is on its way, and with it what is said to those that it leaves out.
        self._send_withdraw(peer, forget=self.phase == "finished")

    def poke(self) -> None:
        """Memory was freed or a node changed: a waiting session tries again."""
        if self.phase == "waiting":
            self._place()

    def info(self) -> m.SessionInfo:
        state = {"starting": "starting", "acquiring": "starting", "finishing": "running", "stopping": "running",
                 "failing": "running", "suspending": "running"}.get(self.phase, self.phase)  # fmt: skip
        return m.SessionInfo(
            session=self.id,
            network=self.network.id,
            network_name=self.record.network_name,
            dataset=self.record.dataset,
            state=state,
            reason=self.reason,
            step=self.done_step(),
            steps=self.recipe.steps,
            loss=self.history[-1].loss if self.history else float("nan"),
            committed_step=self.fold.newest().step,
            epoch=self.epoch,
            created_unix_s=self.record.created_unix_s,
            placement=tuple(m.Location(vnode=v, peer=s.peer, worker=s.worker) for v, s in self.fold.placement.items()),
            record=self.record.to_bytes(),
        )
