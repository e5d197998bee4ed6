"""A host is to give up its VNodes: it leaves, or its owner drains it, or it cannot reach another host, or a better
placement has become possible.

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
from dcnr.orchestrator.placement import Placement, Problem, predicted
from dcnr.orchestrator.session_log import SessionLog
from dcnr.protocol import messages as m
from dcnr.session.log import Base


class Moves:
    """See the module's docstring. ``problem`` is the placement as it would be now, without PNodes that leave."""

    def __init__(
        self,
        *,
        desk: Desk,
        log: SessionLog,
        id: SessionId,
        marks: Marks,
        training: Training,
        problem: Callable[[], Problem],
        move: Callable[[Placement, Base], None],
    ) -> None:
        self._desk = desk
        self._log = log
        self._id = id
        self._marks = marks
        self._training = training
        self._problem = problem
        self._move = move
        self._planning = False
        self._found: Problem | None = None
        """There is another place in this one, and a move is under way for it."""
        self._hopeless: tuple[Problem, str] | None = None
        """There is none in this one, and why."""
        self._weighed: Problem | None = None
        """Nothing better was found in this one."""
        self._look_at = desk.now
        self._since = (desk.now, 0)
        """When the placement began to run, and with which step done."""

    def began(self, done_step: int) -> None:
        """A placement runs."""
        self._since = (self._desk.now, done_step)
        self._look_at = Instant(self._desk.now + self._desk.limits.rebalance_every_s)

    def leaving(self) -> list[PeerId]:
        """Hosts that are to give up their VNodes."""
        found = ((peer, self._desk.node(peer)) for peer in self._training.hosts())
        return sorted(peer for peer, node in found if node is not None and node.leaving)

    def look(self) -> None:
        """Does a host leave, or would another placement be better by far, and is nothing under way for it yet?"""
        if self._planning or not self._training.running:
            return
        if self.leaving():
            self._find_place(self._problem())
        elif self._desk.now >= self._look_at and not self._marks.wanted:
            self._look_at = Instant(self._desk.now + self._desk.limits.rebalance_every_s)
            problem = self._problem()
            if problem != self._weighed:
                self._planning = True
                self._desk.plan(problem, lambda answer: self._weigh(problem, answer))

    def _find_place(self, problem: Problem) -> None:
        """Is there another place for what whoever leaves hosts? The same question is not asked twice."""
        if self._hopeless is not None and self._hopeless[0] == problem:
            self.refuse(self._hopeless[1])
        elif not (self._marks.wanted and self._found == problem):
            self._planning = True
            self._desk.plan(problem, lambda answer: self._planned(problem, answer))

    def _planned(self, problem: Problem, answer: Placement | str) -> None:
        self._planning = False
        if not self._training.running or not self.leaving():
            return
        if problem != self._problem():
            self.look()  # Others leave too, or somebody has come.
        elif isinstance(answer, str):
            self._hopeless = problem, answer
            self._desk.emit("no_place_to_move", self._id, {"from": self.leaving(), "reason": answer})
            self._marks.release()
            self.refuse(answer)
            self._training.go_on()
        else:
            self._found = problem
            if not self._marks.wanted:
                self._desk.emit("moving", self._id, {"from": self.leaving()})
            self._marks.wanted = True
            self._training.go_on()

    def place(self) -> None:
        """Nothing is under way beyond the state that was waited for. Until a place is found and written down the session
        could still go on as it is."""
        if self._planning:
            return
        self._planning = True
        problem, instance = self._problem(), self._log.fold.instance

        def still() -> bool:
            return self._training.running and self._marks.held() and self._log.fold.instance == instance

        def planned(answer: Placement | str) -> None:
            if not still():
                self._planning = False
            elif isinstance(answer, str):
                self._planning = False
                self._marks.release()
                self.refuse(answer)
                self._training.go_on()
            else:
                self._marks.choose_base(lambda base: chosen(answer, base))

        def chosen(answer: Placement, base: Base) -> None:
            self._planning = False
            if still():
                self._move(answer, base)

        self._desk.plan(problem, planned)

    def _weigh(self, problem: Problem, answer: Placement | str) -> None:
        """Move only where the prediction, at the pace that is seen, gains far more than a move costs."""
        self._planning = False
        steps, fold, limits = self._training.steps, self._log.fold, self._desk.limits
        classes = {c.peer: c.numeric_class for c in problem.candidates}
        now = {v: spot.peer for v, spot in fold.placement.items()}
        if (
            isinstance(answer, str)
            or steps is None
            or not self._training.running
            or not set(now.values()) <= set(classes)
        ):
            return
        if {classes[p] for p in now.values()} != {classes[p] for p in answer.spots.values()}:
            return  # Another class would cost exactness.
        since, first = self._since
        done = steps.done_step - first
        if done < limits.rebalance_steps or steps.done_step < self._training.done_step():
            return  # Its pace is not known yet, or it computes again what clients have been told.
        self._weighed = problem
        before_s = max(stage.seconds for stage in predicted(problem, now).values())
        after_s = max((stage.seconds for stage in answer.stages.values()), default=before_s)
        step_s = (self._desk.now - since) / done
        gain_s = (1.0 - after_s / before_s) * step_s * (steps.recipe.steps - steps.next_step) if before_s > 0 else 0.0
        if after_s > limits.rebalance_share * before_s or gain_s < limits.rebalance_factor * limits.move_cost_s:
            return
        self._desk.emit(
            "rebalancing",
            self._id,
            {"gain_s": round(gain_s, 3), "cost_s": limits.move_cost_s, "stage_s": [before_s, after_s]},
        )
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
