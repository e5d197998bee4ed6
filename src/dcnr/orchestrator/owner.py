"""One session, as its owner: the log first, then the action.

The owner appends to the session's log and does what the entries say: places VNodes, hands out tickets, opens
microbatches, rolls back. Appending itself is :mod:`dcnr.orchestrator.session_log`, checkpoints are
:mod:`dcnr.orchestrator.checkpoints`. Whatever it knows beyond the log is rebuilt after a restart from record, log and
what the hosts say again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dcnr.ids import Epoch, Incarnation, Instance, LogIndex, PeerId, SessionId, VNodeId
from dcnr.machine import Instant
from dcnr.network.analysis import Network
from dcnr.network.rewrite import SERVING, rewritten
from dcnr.orchestrator.adoption import Adoption, Standing, Takeover, standing, untouched
from dcnr.orchestrator.checkpoints import Checkpoints
from dcnr.orchestrator.desk import Desk, Node
from dcnr.orchestrator.evaluations import Evaluations
from dcnr.orchestrator.marks import Marks
from dcnr.orchestrator.moves import Moves
from dcnr.orchestrator.opens import Opens
from dcnr.orchestrator.placement import Placement, Problem
from dcnr.orchestrator.session_log import SessionLog
from dcnr.orchestrator.step import StepMachine
from dcnr.orchestrator.targets import Targets
from dcnr.orchestrator.telling import Recovery, placement_events, why_it_waits
from dcnr.orchestrator.tickets import tickets
from dcnr.protocol import messages as m
from dcnr.session import events
from dcnr.session.log import PLACING, Base, Fold, Kind, Spot, placed
from dcnr.session.record import Record

Evaluate = Callable[["Owner", Base, int, Callable[[float, int, str], None]], None]
"""(session, commit, rows at most, what to call with loss, rows and a reason where there is none)."""
ENDED = frozenset({"stopped", "suspended", "finished", "failed"})
ENDING = frozenset({"stopping", "suspending", "finishing", "failing"})
"""The entry that ends the session is being written: nothing may be written behind it that makes it run again."""


class Owner:
    """See the module's docstring. ``evaluate`` is asked to compute a validation loss of a commit, and calls back.
    ``superseded`` is told that another orchestrator owns the session."""

    def __init__(
        self,
        *,
        desk: Desk,
        id: SessionId,
        record: Record,
        network: Network,
        state: Fold,
        targets: Targets,
        evaluate: Evaluate,
        superseded: Callable[[Owner], None],
    ) -> None:
        self.desk = desk
        self.id = id
        self.record = record
        self.recipe = record.recipe
        self.written = network
        """As the file has it; ``network`` is what is trained, ``served`` what gives outputs."""
        self.network = rewritten(network, record.rewrites)
        self.served = rewritten(network, [name for name in record.rewrites if name in SERVING])
        self.phase = "starting"
        self.reason = ""
        self.history: list[events.StepDone] = []
        self.placed: events.Placed | None = None
        """What was told of the newest placement: told again to who begins to follow later."""
        self.steps: StepMachine | None = None
        self.times: dict[int, m.SegmentTime] = {}
        """What segments have measured since the newest ticket, also when no more steps are made."""
        self._log = SessionLog(desk=desk, id=id, state=state, superseded=self._step_down)
        self.checkpoints = Checkpoints(
            desk=desk, log=self._log, id=id, network=self.network, record=record, training=self
        )
        self.marks = Marks(
            desk=desk, log=self._log, id=id, network=self.network, checkpoints=self.checkpoints, training=self
        )
        self.moves = Moves(
            desk=desk,
            log=self._log,
            id=id,
            marks=self.marks,
            training=self,
            problem=lambda: self.problem(last_resort=True),
            move=self._move,
        )
        self.opens = Opens(desk=desk, id=id, network=self.network, record=record, targets=targets)
        self.evaluations = Evaluations(
            recipe=self.recipe,
            compute=lambda base, rows, then: evaluate(self, base, rows, then),
            told=lambda base, loss, rows: self.emit(events.Evaluated(step=base.step, loss=loss, rows=rows)),
            over=self.finish_if_done,
        )
        self._attempt = 0
        self._ticketed = -1
        """The attempt at placing whose tickets are out: an older one's answers start nothing."""
        self._next_kind = Kind.ROLLBACK
        self._holders: dict[VNodeId, m.Neighbour] = {}
        """Where hosts were told to get states that the store does not have."""
        self._released = False
        """It waits, and its hosts were told to let go."""
        self._unticketed: set[PeerId] = set()
        self._unwithdrawn: set[PeerId] = set()
        self._holding: set[PeerId] = set()
        self._with_snapshots: set[PeerId] = set()
        """PNodes that have hosted something since this start: they forget it when the session is finished."""
        self._unloaded: set[PeerId] = set()
        self._recovery: Recovery | None = None
        self.takeover: Takeover | None = None
        self._superseded = superseded
        self._pending_failures: list[tuple[int, str]] = []
        self._refused: dict[PeerId, tuple[int, str]] = {}
        """Who refused tickets: the room that there is after all, and what other reason it gave."""
        self._stateful = tuple(v for v, info in self.network.vnodes.items() if info.parameters)

    # --- small facts ----------------------------------------------------------------------------------------

    @property
    def fold(self) -> Fold:
        """What the log adds up to."""
        return self._log.fold

    @property
    def epoch(self) -> Epoch:
        return self.fold.epoch

    @property
    def running(self) -> bool:
        return self.phase == "running"

    @property
    def active(self) -> bool:
        """It goes on, and this orchestrator is the one that commands it."""
        return self.phase not in ENDED and self.phase != "followed"

    @property
    def state(self) -> str:
        """The phase, as clients know it."""
        return {"starting": "starting", "acquiring": "starting", "finishing": "running", "stopping": "running",
                "failing": "running", "suspending": "running", "adopting": "recovering", "followed": "running"}.get(self.phase, self.phase)  # fmt: skip

    def hosts(self) -> dict[PeerId, Incarnation]:
        """PNodes of the current placement."""
        return {s.peer: s.incarnation for s in self.fold.placement.values()}

    def done_step(self) -> int:
        return self.history[-1].step if self.history else 0

    def emit(self, event: events.SessionEvent) -> None:
        self.desk.emit(event.kind, self.id, event.data())

    # --- acquiring ------------------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the session: a new one is placed, an interrupted one rolled back to its newest whole commit."""
        self.phase = "acquiring"
        self._log.acquire(self._acquired)

    def _acquired(self, index: LogIndex) -> None:
        if self.fold.state in ENDED:
            self.phase = self.fold.state
            self.reason = self.fold.reason
            return
        if self.phase != "acquiring":
            return  # It was stopped meanwhile.
        if self.done_step() < self.fold.furthest().step:
            self.load_history(self._go_on_from_log)
        else:
            self._go_on_from_log()

    def _go_on_from_log(self) -> None:
        if self.phase != "acquiring":
            return
        newly = self.fold.since in ("", Kind.RESUME)
        self._next_kind = Kind.PLACE if newly else Kind.ROLLBACK
        if newly:
            self._place()
            return
        newest = self.fold.newest()

        def loaded() -> None:
            if self.phase != "acquiring":
                return
            self.marks.recall()
            if self.fold.newest() == newest and self.checkpoints.has_losses(self.fold.base.step):
                self._adopt()
            else:
                self._roll_back()  # Hosts have forgotten what a commit held, so a damaged one cannot be gone on from.

        self.checkpoints.load_base(loaded)

    # --- taking over ----------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Its hosts go on as they are; only whom they obey changes."""
        self.phase = "adopting"
        self._attempt += 1
        self.takeover = Takeover(
            desk=self.desk,
            log=self._log,
            id=self.id,
            hosts=self.hosts(),
            whole=self._adopted_by_all,
            lost=self._roll_back,
        )
        self.takeover.begin()

    def _end_takeover(self) -> None:
        if self.takeover is not None:
            self.takeover.over = True
            self.takeover = None

    def _adopted_by_all(self, adoption: Adoption) -> None:
        if self.phase != "adopting":
            return
        self._end_takeover()
        base, instance, answers = self.fold.base, self.fold.instance, adoption.answers
        late = sorted(p for p, a in answers.items() if a.instance != instance)
        if late and not (self.fold.since in PLACING and untouched(adoption, instance, base.step)):
            self._roll_back()
            return
        if not self.checkpoints.has_losses(base.step) or (late and self.fold.on_pnodes() and self.marks.base() is None):
            self._roll_back()  # Nobody has the base's states any more.
            return
        self._placed_anew(base.step)
        if late:
            # Its last owner had placed it and did not come to tell them all.
            self.phase = "recovering" if self.done_step() else "starting"
            self._unticketed, self._holders = set(late), self.marks.holders()
            self.checkpoints.load(lambda: self._send_missing_tickets(instance))
            return
        steps = self.steps
        assert steps is not None
        stateful = frozenset(s.peer for v, s in self.fold.placement.items() if v in self._stateful)
        found = standing(adoption, steps, self.fold.furthest().step, stateful)
        if found is None:
            self._roll_back()
            return
        self.desk.emit("adopted", self.id, {"step": found.done_step, "hosts": len(answers), "instance": instance})
        self._continue(found, adoption)

    def _send_missing_tickets(self, instance: Instance) -> None:
        if self.fold.instance == instance and self._ticketed == self._attempt:
            for peer in sorted(self._unticketed):
                self._send_tickets(peer)

    def _continue(self, found: Standing, adoption: Adoption) -> None:
        """Where the last owner was: with its steps, its open microbatches, and the snapshot that it had asked for."""
        self.steps = steps = self._step_machine(found.done_step)
        self.times = steps.times
        steps.reopen(found.last_opened)
        opened_step = found.last_opened[0] if found.last_opened is not None else found.done_step
        self.checkpoints.adopt(adoption.answers, found.snapshot_at, opened_step)
        self.evaluations.go_on_from(self.checkpoints.newest_due())
        self.phase = "running"
        for step, loss in sorted(found.losses.items()):
            scale = found.scales.get(step, 1.0)
            self.checkpoints.step_known(step, loss, scale)
            self._tell_step(self._step_done(step, loss, scale, {}))
        for peer, message in adoption.reports:
            if isinstance(message, m.TaskFailed):
                self.task_failed(message.vnode, message.step, message.reason, cause=message.cause)
            else:
                self._take(peer, message)
            if not self.running:
                return
        self._finish_steps()
        if self.running:
            for key in steps.still_open():
                self._open(*key)  # Again, to all: whoever has it knows that.
            self.finish_if_done()
            self.go_on()

    def load_history(self, then: Callable[[], None]) -> None:
        """What was done before this start: the steps up to the newest commit, with their losses."""

        def loaded() -> None:
            known = self.checkpoints
            self.history = [
                self._step_done(step, loss, known.scales.get(step, 1.0), {})
                for step, loss in sorted(known.losses.items())
            ]
            then()

        self.checkpoints.load_losses(loaded)

    # --- placing --------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Plan, append ``Place`` or ``Rollback``, hand out tickets. Newer calls overtake older ones."""
        if not self.active or self.phase in ENDING:
            return
        self._end_takeover()
        self._attempt += 1
        attempt = self._attempt
        if self.phase != "starting" and self.phase != "acquiring":
            self.phase = "recovering"

        def loaded() -> None:
            # What is known of the past may come from a manifest that is a commit no more: then there was nothing.
            if self.done_step() < self.fold.newest().step:
                self.load_history(plan)
            else:
                plan()

        hopeless: list[Problem] = []

        def plan() -> None:
            if attempt != self._attempt:
                return
            if self.record.init is not None and self.checkpoints.initial is None and not self.fold.commits:
                self._suspend(0, "the weights that the session begins with cannot be read")
                return
            self.desk.place(self.record.age, problem, planned)

        def problem() -> Problem | None:
            if attempt != self._attempt:
                return None
            found = self.problem()
            return found if found not in hopeless else self.problem(last_resort=True)

        def planned(problem: Problem, answer: Placement | str) -> bool:
            if attempt != self._attempt:
                return False
            everybody = self.problem(last_resort=True)
            if isinstance(answer, str):
                hopeless.append(problem)
                if problem != everybody:
                    return True  # There are others, or somebody came meanwhile and found nobody waiting.
                self._wait(why_it_waits(answer, self.desk.nodes, self.id, self._refused))
                return False
            needs = self.desk.needs(self.network, self.recipe, answer.window, answer.spots)
            if not everybody.has_room(needs):
                return True  # A session of another orchestrator was placed there meanwhile, or a PNode went.
            self.desk.reserve(self.id, needs)
            self._phase("decided")
            self._log_placement(attempt, answer)
            return False

        self.checkpoints.load(loaded)

    def _wait(self, reason: str) -> None:
        if self.reason != reason:
            self.emit(events.Waiting(reason=reason))
        self.phase = "waiting"
        self.reason = reason
        self.moves.refuse(reason)
        if self.checkpoints.wanted:
            self._suspend(self.fold.newest().step, "it was asked for")
            return
        if not self._released:
            # Whoever waits holds nothing that another session, of this orchestrator or another, may be waiting for.
            self._released = True
            for peer in sorted(self._holding):
                self._send_withdraw(peer)
            self.desk.release(self.id)

    def problem(self, *, last_resort: bool = False) -> Problem:
        """The placement problem as it stands now. ``last_resort``: with PNodes that are on probation."""
        classes = [s.numeric_class for s in self.fold.placement.values()]

        def free_bytes(peer: PeerId, node: Node) -> int:
            room, _ = self._refused.get(peer, (node.capabilities.memory_bytes, ""))
            return min(self.desk.free_bytes(node, self.id), room)

        return replace(
            self.desk.problem(self.network, self.record, free_bytes, last_resort=last_resort),
            prefer_class=max(sorted(set(classes)), key=classes.count, default=""),
            current=self.fold.spots(),
        )

    def _move(self, answer: Placement, base: Base) -> None:
        """Everything is placed anew from ``base``, which withdraws no step."""
        self._attempt += 1
        self.phase = "recovering"
        self._next_kind = Kind.MOVE
        self._log_placement(self._attempt, answer, base)

    def _log_placement(self, attempt: int, answer: Placement, base: Base | None = None) -> None:
        """``base``: ``None`` = the newest that is to be had."""
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

        def logged(index: LogIndex) -> None:
            self._pending_failures = []
            self._next_kind = Kind.ROLLBACK
            self._phase("logged")
            self._tell_placement(index, before, answer)
            if attempt != self._attempt:
                return
            gone = any(self.desk.is_lost(peer, incarnation) for peer, incarnation in self.hosts().items())
            if gone or (self.fold.on_pnodes() and self.marks.gone()):
                self._place()  # It went while the entry was written, when nobody knew it as a host or keeper yet.
            else:
                self._ticket()

        def append(base: Base) -> None:
            if attempt != self._attempt:
                return

            def body(index: LogIndex) -> dict[str, Any]:
                state = placed(self.fold, index=index, placement=spots, window=answer.window, base=base)
                return {"folded": replace(state, failures=failures, keepers=self.marks.logged(base)).to_json()}

            if self.fold.last - self.fold.epoch >= self.desk.limits.acquire_every:
                # Only here, where tickets follow: hosts obey the epoch of their tickets and ignore another's commands.
                self._log.acquire(lambda index: None)
            if self._next_kind is Kind.MOVE and base.step < self.done_step():
                self._next_kind = Kind.ROLLBACK  # Who kept the newest state is gone meanwhile.
            self._log.append(self._next_kind, body, logged)

        if base is None:
            self.marks.choose_base(append)
        else:
            append(base)

    def _tell_placement(self, index: LogIndex, before: Mapping[VNodeId, Spot], answer: Placement) -> None:
        told = placement_events(index, before, self.fold, answer)
        self.placed = told[-1]
        for event in told:
            self.emit(event)

    def _ticket(self) -> None:
        """Everything older ends: no effect of an earlier instance counts from here on."""
        self.phase = "recovering" if self.done_step() or self.fold.instance > 2 else "starting"
        base = self.fold.base
        self._placed_anew(base.step)
        self._holders = self.marks.holders()
        hosts = self.hosts()
        self._unticketed = set(hosts)
        self._unwithdrawn = {
            peer
            for peer, node in self.desk.nodes.items()
            if node.usable and peer in self._holding and peer not in hosts
        }
        self._holding |= set(hosts)
        self._released = False
        for peer in sorted(hosts):
            self._send_tickets(peer)
        for peer in sorted(self._unwithdrawn):
            self._send_withdraw(peer)
        if self.done_step() > base.step:
            self.emit(events.Replaying(first=base.step + 1, last=self.done_step()))
            self.checkpoints.fell_back()

    def _step_machine(self, base_step: int) -> StepMachine:
        return StepMachine(
            network=self.network,
            segments=self.network.segments({v: str(peer) for v, peer in self.fold.spots().items()}),
            recipe=self.recipe,
            base_step=base_step,
            window=self.fold.window,
        )

    def _placed_anew(self, base_step: int) -> None:
        """What follows from the placement in the log alone, whoever wrote it."""
        self._ticketed = self._attempt
        self.checkpoints.begin(base_step)
        self.marks.begin()
        self.opens.clear()
        hosts = self.hosts()
        self.steps = self._step_machine(base_step)
        self.times = self.steps.times
        self.desk.reserve(self.id, self.desk.needs(self.network, self.recipe, self.fold.window, self.fold.spots()))
        self._unticketed = set()
        self._unwithdrawn = set()
        self._unloaded = {s.peer for v, s in self.fold.placement.items() if v in self._stateful}
        self._with_snapshots |= set(hosts)

    def _send_tickets(self, peer: PeerId) -> None:
        base = self.fold.base
        manifest = self.checkpoints.manifests[base.manifest] if base.manifest else self.checkpoints.initial
        states = {v: manifest.states.get(v) if manifest else None for v in self._stateful}
        held = {v: (holder, self.marks.token) for v, holder in self._holders.items()}
        self.desk.send(peer, tickets(self.desk, self.id, self.record, self.written, self.fold, peer, states, held))

    def _send_withdraw(self, peer: PeerId, *, forget: bool = False) -> None:
        self.desk.send(
            peer,
            m.Withdraw(
                session=self.id,
                epoch=self.epoch,
                before=self.fold.instance if self.active and not self._released else Instance(self.fold.last + 1),
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
            room = node.reserved.get(self.id, 0) - answer.missing_bytes
            self._refused[peer] = (room, "") if answer.missing_bytes else (0, answer.reason)

            def forget() -> None:
                # Memory is freed and disks are cleared: what was refused once is asked again.
                self._refused.pop(peer, None)
                self.poke()

            # Not all at once: sessions of two orchestrators that were in each other's way must not meet again.
            self.desk.after(self.desk.limits.recover_wait_s * (0.5 + self.desk.share(self.id)), forget)
            self._place()
            return
        self._unticketed.discard(peer)
        self._start_if_ready()

    def withdrawn(self, peer: PeerId, message: m.Withdrawn) -> None:
        if message.epoch != self.epoch or message.before < self.fold.instance:
            return  # It answers what was said before it got newer tickets.
        if not self.active:
            self._with_snapshots.discard(peer)
        self._unwithdrawn.discard(peer)
        if peer not in self.hosts() or not self.active:
            self._holding.discard(peer)
        self._start_if_ready()

    def _start_if_ready(self) -> None:
        if self._unticketed or self._unwithdrawn or self._ticketed != self._attempt:
            return
        if self.phase not in ("recovering", "starting"):
            return
        self.phase = "running"
        self.reason = ""
        self._phase("ticketed")
        self.moves.began(self.fold.base.step)
        self.finish_if_done()  # The base may be the last step already.
        self.go_on()

    # --- recovery phases ------------------------------------------------------------------------------------

    def _phase(self, name: str) -> None:
        """The end of a phase of the recovery under way, if there is one."""
        if self._recovery is not None:
            self.emit(self._recovery.phase(name, self.desk.now))
            if name == "regained":
                self._recovery = None

    # --- running --------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Open what the window allows."""
        steps = self.steps
        while steps is not None and self.running and steps.may_open():
            step = steps.next_step
            # The state after a step is asked for once: as a mark or as a commit.
            stored = steps.starts_step and not self.marks.takes(step)
            if stored and not self.checkpoints.gate(step):
                return
            if steps.starts_step and not self.marks.gate(step):
                return
            self._open(*steps.open())

    def _open(self, step: int, microbatch: int) -> None:
        assert self.steps is not None
        self.opens.open(self.fold, step, microbatch, done_step=self.steps.closed_step)

    def report(self, peer: PeerId, message: m.Message) -> None:
        """What hosts of the current instance say about steps."""
        if self.takeover is not None:
            self.takeover.report(peer, message)
        elif isinstance(message, m.TaskFailed):
            self.task_failed(message.vnode, message.step, message.reason, cause=message.cause)
        elif self.running:
            self._take(peer, message)
            self._finish_steps()
            self.go_on()

    def _take(self, peer: PeerId, message: m.Message) -> None:
        steps = self.steps
        if steps is None:
            return
        match message:
            case m.Done():
                steps.squares(message.step, message.microbatch, ((v.name, v.value) for v in message.squares))
                took = message.forward_s, message.backward_s
                if steps.done(message.segment, message.step, message.microbatch, *took):
                    self.opens.done(message.step, message.microbatch)
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
                steps.metrics(message.step, ((v.name, v.value) for v in message.metrics))
                self._check_finite(message.step)
            case m.Loaded():
                self._loaded(peer, message)
            case _:
                raise AssertionError(f"no report: {type(message).__name__}")

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
        for done in steps.finish_steps():
            self.checkpoints.step_known(done.step, done.loss, done.scale)
            self._tell_step(self._step_done(done.step, done.loss, done.scale, done.metrics))
            if self._recovery is not None and done.step >= self._recovery.regain_step:
                self._phase("regained")
        self.checkpoints.step_done()
        self.marks.step_done()
        self._check_finite(steps.done_step + 1)

    def _tell_step(self, event: events.StepDone) -> None:
        """Once: replayed steps are silent."""
        if event.step > self.done_step():
            self.history.append(event)
            self.emit(event)

    def _step_done(self, step: int, loss: float, scale: float, metrics: Mapping[str, float]) -> events.StepDone:
        return events.StepDone(
            step=step,
            loss=loss,
            learning_rate=self.recipe.learning_rate(step),
            grad_scale=scale,
            tokens=sum(t.count for t in self.opens.valid_targets(step)),
            metrics=metrics,
        )

    # --- finishing ------------------------------------------------------------------------------------------

    def finish_if_done(self) -> None:
        last = self.recipe.steps
        if self.running and self.fold.newest().step < self.fold.base.step == last and not self.checkpoints.busy:
            # The last commit was found damaged when it was this placement's base already: nothing would open, so
            # nobody would load it and notice.
            self._roll_back()
            return
        if not self.running or self.fold.newest().step != last or self.evaluations.busy or self.checkpoints.busy:
            return
        self.phase = "finishing"

        def finished(index: LogIndex) -> None:
            self._end("finished", "")
            self.emit(events.Finished(step=last, loss=self.checkpoints.losses[last]))

        self._log.append(Kind.FINISH, lambda index: {}, finished)

    # --- trouble --------------------------------------------------------------------------------------------

    def node_lost(self, peer: PeerId, heard_at: Instant, reason: str) -> None:
        """A PNode of the placement is lost, with its VNodes."""
        self._unwithdrawn.discard(peer)
        self._holding.discard(peer)
        self._refused.pop(peer, None)
        if not self.active or self.phase == "acquiring" or self.phase in ENDING:
            return
        hosted = tuple(v for v, s in self.fold.placement.items() if s.peer == peer)
        if not hosted:
            if self._unloaded and any(holder.peer == peer for holder in self._holders.values()):
                self._roll_back()  # Somebody was to get a state from it.
            else:
                self._start_if_ready()
                self.marks.node_lost(peer)
            return
        self.marks.lost()
        self.emit(events.PNodeLost(peer=peer, reason=reason, vnodes=hosted))
        if self._recovery is None:
            self._recovery = Recovery(since=heard_at, regain_step=self.done_step() + 1)
            self._phase("detected")
        if self.phase == "waiting" and not self.fold.instance:
            return
        self._roll_back()

    def _roll_back(self) -> None:
        """Everything since the newest whole commit is computed again."""
        if self._next_kind is Kind.MOVE:
            self._next_kind = Kind.ROLLBACK
        if self.checkpoints.committing:
            # Its objects are all there: Commit goes before Rollback. ``place_if_needed`` goes on from there.
            self.phase = "recovering"
            self._attempt += 1
            return
        self.checkpoints.forget()
        self._place()

    def place_if_needed(self) -> None:
        if self.phase == "recovering":
            self._place()
        elif self.running and self.checkpoints.held():
            self._suspend(self.fold.newest().step, "it was asked for")
        elif self.running and self.marks.held() and not self.checkpoints.committing:
            self.moves.place()

    def task_failed(self, vnode: VNodeId, step: int, reason: str, *, cause: str = "compute") -> None:
        """A VNode failed on a living PNode: one Rollback tries again; the second failure at a step is the end."""
        if not self.running:
            return
        self.desk.emit("task_failed", self.id, {"vnode": vnode, "step": step, "cause": cause, "reason": reason})
        if cause == "state":
            self._state_unreadable(vnode, reason)
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

    def _state_unreadable(self, vnode: VNodeId, reason: str) -> None:
        """A host could not read its state: is the commit damaged, or was it the moment?"""
        base = self.fold.base
        if base.manifest is None and self.record.init is not None:
            self._suspend(0, f"the weights that the session begins with cannot be read: {reason}")
            return
        if self.fold.on_pnodes():
            if vnode in self._holders:
                self.marks.drop_keeper(vnode, self._holders[vnode])
            else:
                self.marks.forget()
        if base.manifest is None or base.manifest not in self.checkpoints.manifests or self.fold.on_pnodes():
            self._roll_back()
            return
        self.phase = "recovering"
        self._attempt += 1
        self.steps = None
        self.checkpoints.check(base, self._place)

    def _fail(self, step: int, vnode: VNodeId, reason: str) -> None:
        self.phase = "failing"
        where = f"VNode {vnode}: "
        text = f"step {step}, {where}{reason.removeprefix(where)}"

        def failed(index: LogIndex) -> None:
            self._end("failed", text)
            self.emit(events.Failed(step=step, vnode=vnode, reason=text))

        self._log.append(Kind.FAIL, lambda index: {"step": step, "vnode": vnode, "reason": text}, failed)

    def _suspend(self, step: int, reason: str) -> None:
        self.phase = "suspending"

        def suspended(index: LogIndex) -> None:
            self._end("suspended", reason)
            self.emit(events.Suspended(step=self.fold.newest().step, reason=reason))

        self._log.append(Kind.SUSPEND, lambda index: {"step": step, "reason": reason}, suspended)

    def _step_down(self, reason: str) -> None:
        self.desk.cede(self.id)
        self._leave("followed", reason)
        self.desk.emit("stepped_down", self.id, {"reason": reason})
        self._superseded(self)

    def stale_epoch(self, current: Epoch) -> None:
        """A host obeys somebody newer: is there one in the log?"""
        if self.active and current > self.epoch:
            self._log.look()

    def look(self) -> None:
        """Has somebody else written into the log?"""
        self._log.look()

    def follow(self, state: Fold) -> None:
        """Another orchestrator owns it, or it has ended: ``state`` is what the log says now."""
        self._log.fold = state
        self.phase = state.state if state.state in ENDED else "followed"
        self.reason = state.reason

    def _leave(self, phase: str, reason: str) -> None:
        """It is commanded no more from here."""
        self.phase = phase
        self.reason = reason
        self._attempt += 1
        self.steps = None
        self.checkpoints.end()
        self.marks.end()
        self._recovery = None
        self._end_takeover()
        self.opens.clear()
        self._unwithdrawn = set()
        self.desk.release(self.id)

    def _end(self, phase: str, reason: str) -> None:
        """Release every host. Nothing of this session is left running."""
        self._leave(phase, reason)
        finished = phase == "finished"
        self._with_snapshots |= self.marks.guards
        if not finished:
            self.marks.let_go()
        told = {peer for peer, node in self.desk.nodes.items() if finished and node.usable}
        for peer in sorted(self._holding | told):
            self._send_withdraw(peer, forget=finished)

    # --- clients and links ----------------------------------------------------------------------------------

    def stop(self, then: Callable[[str], None]) -> None:
        """``then`` gets '' or the reason of a refusal. A suspended session is stopped too: whoever asks wants its end."""
        if self.phase == "suspended" and self.fold.owner != self.desk.author:
            self._log.acquire(lambda index: None)
        elif self.phase != "suspended" and (not self.active or self.phase in ENDING - {"stopping"}):
            then(f"the session is {self.phase}")
            return
        self.phase = "stopping"
        self._attempt += 1
        self._end_takeover()

        def stopped(index: LogIndex) -> None:
            if self.phase == "stopping":  # Whoever asked twice finds it stopped, or even resumed since.
                self._end("stopped", "")
                self.emit(events.Stopped(step=self.fold.newest().step))
            then("")

        self._log.append(Kind.STOP, lambda index: {}, stopped)

    def suspend(self, then: Callable[[str], None]) -> None:
        """Store the state after the next step, then end so that :meth:`resume` goes on from there. A session that stands
        still ends at its newest commit. ``then`` gets '' or the reason of a refusal."""
        if not self.active or self.phase in ENDING:
            then(f"the session is {self.phase}")
            return
        if self.running:
            self.checkpoints.wanted = True
        else:
            self._attempt += 1
            self._end_takeover()
            self._suspend(self.fold.newest().step, "it was asked for")
        then("")
        self.go_on()

    def resume(self, then: Callable[[str], None]) -> None:
        """``Resume``, then ``Place`` on the newest commit."""
        if self.phase not in ("stopped", "suspended", "failed"):
            then(f"the session is {self.phase}: only a stopped, suspended or failed one is resumed")
            return
        self.phase = "acquiring"  # Nothing is placed before the entry is there, whoever is lost meanwhile.

        def resumed(index: LogIndex) -> None:
            self.phase = "starting" if self.phase == "acquiring" else self.phase
            self.emit(events.Resumed(step=self.fold.newest().step))
            self._next_kind = Kind.PLACE
            self._pending_failures = []
            self._refused = {}
            then("")
            self._place()

        if self.fold.owner != self.desk.author:
            # It ended under an earlier start of this orchestrator, which left it unowned.
            self._log.acquire(lambda index: None)
        self._log.append(Kind.RESUME, lambda index: {}, resumed)

    def node_up(self, peer: PeerId, node: Node) -> None:
        """A link is new: say again what an older one may have lost, and look whether a waiting session can go on."""
        if self.phase == "followed":
            return  # What it once held is its successor's now.
        if not self.active:
            finished = self.phase == "finished"
            if peer in self._holding or (finished and peer in self._with_snapshots):
                self._send_withdraw(peer, forget=finished)
            return
        if self.phase == "waiting":
            self._place()
            return
        if self.takeover is not None:
            self.takeover.link_up(peer)
            return
        hosts = self.hosts()
        if peer in hosts and hosts[peer] != node.descriptor.incarnation:
            return
        if peer in self._unticketed:
            self._send_tickets(peer)
        if peer in self._unwithdrawn:
            self._send_withdraw(peer)
        if not self.running or self.steps is None or peer not in hosts:
            return
        self.checkpoints.say_again(peer)
        self.marks.link_up(peer)
        for step, scale in self.steps.closed():
            self._send_close(peer, step, scale)
        self.opens.say_again(peer)

    def hosting(self, peer: PeerId) -> None:
        """A heartbeat says that a PNode hosts this session: if it should not, it has missed a ``Withdraw``. If it is to
        give it up, that is seen to."""
        if self.phase == "waiting":
            self.moves.refuse(self.reason)
            if self._released:
                self._send_withdraw(peer)
        self.moves.look()
        if self.running and self.moves.part(peer):
            self.desk.after(self.desk.limits.pair_memory_s, self.poke)
            self._roll_back()
        if self.phase in ("starting", "acquiring", "followed") or (self.active and peer in self.hosts()):
            return
        if self.active and not self.running:
            return  # A placement is on its way, and with it what is said to those that it leaves out.
        self._send_withdraw(peer, forget=self.phase == "finished")

    def poke(self) -> None:
        """Memory was freed or a node changed: a waiting session tries again."""
        if self.phase == "waiting":
            self._place()
