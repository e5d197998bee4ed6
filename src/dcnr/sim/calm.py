"""What is owed where nothing disturbs: hosts that are to leave give up what they host or hear why not, marks become whole.

A fault excuses everybody until it is over, and what is late is counted from then on.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcnr.ids import SessionId
from dcnr.protocol import messages as m
from dcnr.session.log import Entry, Kind
from dcnr.sim.violation import Violation

if TYPE_CHECKING:
    from dcnr.sim.world import Process, World

MOVE_STEPS = 8
"""Those of the time in which a place is looked for, those beside a mark or a commit that was under way, and the one that
is kept."""
SHELVED = 3
"""Steps of which a PNode keeps states for others at most: the newest mark, one that is being taken, and one that it was
not told of in time, or that was given up while a state was on its way."""


@dataclass(slots=True)
class _Marking:
    """How it stands with the marks of one session, since its owner or its placement has changed."""

    began_us: float = math.inf
    """When its first step was opened."""
    asked_us: int | None = None
    """When the one that is being taken was asked for."""
    asked_step: int = 0
    step: int = 0
    """The newest step that was asked for, or would have been."""
    asked: bool = False
    """One was asked for, whatever became of it."""


class Calm:
    """See the module's docstring. ``patience_us``: for how long a mark may be late; 0 = nobody looks. ``move_us``: for how
    long a move may, if :data:`MOVE_STEPS` were opened meanwhile."""

    def __init__(self, world: World, patience_us: int, move_us: int) -> None:
        self._world = world
        self._patience_us = patience_us
        self._move_us = move_us
        self.troubled_until_us = 0
        self._drained: set[tuple[str, int]] = set()
        self._hosted: dict[tuple[str, int], dict[SessionId, tuple[int, int]]] = {}
        """By (process, life) that is to leave: sessions that it hosts, since when they are late, and their step then."""
        self._opened_step: dict[SessionId, int] = {}
        self._marking: dict[SessionId, _Marking] = {}
        self._no_marks: set[SessionId] = set()
        """Sessions of which a host or a guard has said that it could not keep something: they may be tried less often."""
        self.whole = 0
        """Marks that became whole."""

    def trouble(self, lasts_us: int = 0) -> None:
        self.troubled_until_us = max(self.troubled_until_us, self._world.now_us + lasts_us)

    # --- who leaves ----------------------------------------------------------------------------------------

    def is_leaving(self, process: Process) -> bool:
        """It was told to, or its newest heartbeat says so."""
        key = (process.name, process.life)
        return key in self._drained or key in self._hosted

    def drain(self, process: Process, *, on: bool) -> None:
        """It hears that it is drained, or no more."""
        if on:
            self._drained.add((process.name, process.life))
        else:
            self._drained.discard((process.name, process.life))

    def told_to_end(self, process: Process) -> None:
        """Nobody waits for ever to get rid of what it hosts."""
        life, limits = process.life, self._world.limits

        def look() -> None:
            if process.life == life:
                raise Violation("Leaver", f"{process.name} was told to end {limits.leave_patience_s:g} s ago and more")

        self._world.after(int(1.1e6 * limits.leave_patience_s) + 1_000_000, look, process)

    def heartbeat(self, process: Process, beat: m.Heartbeat) -> None:
        key, now_us = (process.name, process.life), self._world.now_us
        before = self._hosted.pop(key, {})
        if not beat.leaving and key not in self._drained:
            return
        hosted = self._hosted[key] = {}
        for session in (p.session for p in beat.progress if not p.session.startswith("serve-")):
            step = self._opened_step.get(session, 0)
            since_us, since_step = hosted[session] = before.get(session, (now_us, step))
            if since_us <= self.troubled_until_us:
                hosted[session] = (now_us, step)
            elif self._patience_us and now_us - since_us > self._move_us and step - since_step >= MOVE_STEPS:
                raise Violation("Leaver", f"session {session} opens {step - since_step} more steps and says nothing")

    def move_refused(self, process: Process, session: SessionId) -> None:
        """It hears why it still hosts the session."""
        self._hosted.get((process.name, process.life), {}).pop(session, None)

    def move_given_up(self, session: SessionId) -> None:
        """Its owner says that the session stood still for too long; it tries again."""
        for hosted in self._hosted.values():
            hosted.pop(session, None)

    # --- marks ---------------------------------------------------------------------------------------------

    def entry(self, session: SessionId, entry: Entry) -> None:
        """What was being taken counts no more for whoever owns the session now, or in another place."""
        if entry.kind not in (Kind.COMMIT, Kind.DROP, Kind.INVALIDATE):
            self._marking[session] = _Marking()

    def sent(self, process: Process, message: m.Message) -> None:
        match message:
            case m.SnapshotAt(session=session, step=step, guard=guard):
                marking = self._marking[session]
                marking.step = max(marking.step, step)
                if guard and marking.asked_us is None:
                    marking.asked, marking.asked_us, marking.asked_step = True, self._world.now_us, step
            case m.Marked(session=session, step=step) if process.role == "orchestrator":
                marking = self._marking[session]
                if step and marking.asked_us is not None and step >= marking.asked_step:
                    self.whole += 1
                    marking.asked_us = None
            case m.Abandoned(session=session):
                self._marking[session].asked_us = None
                self._no_marks.add(session)
            case m.SnapshotFailed(session=session) | m.SnapshotAnswer(session=session, accepted=False):
                self._no_marks.add(session)
            case m.OpenMicrobatch(session=session, step=step):
                self._opened(process, session, step)

    def _opened(self, owner: Process, session: SessionId, step: int) -> None:
        """MarksWhole: one that was asked for becomes whole, and one is asked for as soon as it may be."""
        marking, world = self._marking[session], self._world
        self._opened_step[session] = step
        if marking.began_us == math.inf:
            marking.began_us, marking.step = world.now_us, max(marking.step, step)
            return
        late_us = world.now_us - max(marking.asked_us or 0, self.troubled_until_us)
        if marking.asked_us is not None and 0 < self._patience_us < late_us:
            raise Violation("MarksWhole", f"a mark of session {session} is neither whole nor given up")
        recipe = world.watch.of(session).oracle.recipe
        due = step == recipe.steps or (recipe.checkpoint_every > 0 and step % recipe.checkpoint_every == 0)
        if step <= marking.step or due:
            return
        marking.step = step
        calm = self._patience_us > 0 and self.troubled_until_us < marking.began_us and session not in self._no_marks
        least_us = 1.1e6 * world.limits.mark_least_s
        hosts = [p for p in world.processes if p.role == "pnode"]
        ready = len(hosts) > 1 and all(p.machine is not None and owner.peer in p.links for p in hosts)
        ready = ready and not any(self.is_leaving(p) for p in hosts)
        if calm and ready and not marking.asked and world.now_us - marking.began_us > least_us:
            raise Violation("MarksWhole", f"step {step} of session {session} is opened, and no mark was asked for yet")

    def shelved(self, keeper: Process, session: SessionId) -> None:
        """ShelfBounded: what is superseded is dropped where it was kept for others."""
        steps = {json.loads(data)["version"] for (of, _), data in keeper.guarded.items() if of == session}
        if self._patience_us > 0 and len(steps) > SHELVED:
            raise Violation("ShelfBounded", f"{keeper.name} keeps states of steps {sorted(steps)} for others")
