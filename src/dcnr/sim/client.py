"""The client twin: creates a network and a session, follows it across lost connections, and checks what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dcnr.ids import DatasetId
from dcnr.network.graph import json_bytes
from dcnr.protocol import messages as m
from dcnr.session.events import LAST_KINDS, CheckpointCommitted, Evaluated, ExactnessLost, Placed, StepDone, parse
from dcnr.sim.violation import Violation

if TYPE_CHECKING:
    from dcnr.sim.checkers import Checkers
    from dcnr.sim.world import Process, World

_RETRY_US = 400_000
_TIMEOUT_US = 30_000_000


class Client:
    """One user. ``ended`` is the kind of the event that ended the session, empty before."""

    def __init__(
        self,
        world: World,
        orchestrators: list[Process],
        definition: bytes,
        dataset: DatasetId,
        checkers: Checkers,
        nonce: str = "the-only-session",
        asked: int = 0,
    ) -> None:
        """``checkers``: those of the session that it will create. ``asked``: the orchestrator that it begins with."""
        self._world = world
        self.checkers = checkers
        self._orchestrators = orchestrators
        self._asked = asked
        """The one that answered last; where it does not, or is not the owner, the next one is asked."""
        self._definition = definition
        self._nonce = nonce
        self._dataset = dataset
        self._oracle = checkers.oracle
        self._recipe = json_bytes(self._oracle.recipe.to_json())
        self.steps = self._oracle.recipe.steps
        self._session = ""
        self.seen = 0
        self.index = 0
        self.ended = ""
        self.reason = ""
        self.events: list[str] = []
        self._stream = 0

    def start(self) -> None:
        self._call(m.CreateNetwork(definition=self._definition), self._network_created)

    def control(self, action: str) -> None:
        """Ask for ``stop``, ``suspend`` or ``resume``, once the session exists and until it is answered."""
        if not self._session:
            self._world.after(_RETRY_US, lambda: self.control(action))
        elif action == "resume" or not self.ended:
            self._call(m.ControlSession(session=self._session, action=action), lambda reply: self._controlled(action))

    def _controlled(self, action: str) -> None:
        if action == "resume":
            self.ended = ""
            self._follow()

    def _network_created(self, reply: Any) -> None:
        assert isinstance(reply, m.NetworkCreated), reply
        message = m.CreateSession(network=reply.network, dataset=self._dataset, recipe=self._recipe, nonce=self._nonce)
        self._call(message, self._session_created)

    def _session_created(self, reply: Any) -> None:
        assert isinstance(reply, m.SessionCreated), reply
        self._session = reply.session
        self._follow()

    # --- calls ---------------------------------------------------------------------------------------------

    def _call(self, message: Any, then: Callable[[Any], None]) -> None:
        """Until it is answered by something other than a refusal that may pass."""
        world, orchestrator = self._world, self._orchestrator
        settled = [False]

        def again() -> None:
            if not settled[0]:
                settled[0] = True
                self._asked += 1
                world.after(_RETRY_US, lambda: self._call(message, then))

        def answer(reply: Any) -> None:
            if settled[0]:
                return
            if isinstance(reply, m.Refusal) and reply.kind == "Refused" and isinstance(message, m.ControlSession):
                # It came too late, or was said twice: the session is no longer, or already, where it is asked to go.
                if reply.reason.startswith("no session"):
                    raise Violation("ClientView", f"a session that exists is denied: {reply.reason}")
                settled[0] = True
            elif isinstance(reply, m.Refusal):
                world.line(None, f"client is refused {type(message).__name__}: {reply.kind}: {reply.reason}")
                passing = ("Unavailable", "Unreachable", "NotOwner", "NoCapacity", "StoreUnavailable", "StoreError")
                if reply.kind not in passing:
                    raise Violation("ClientView", f"{type(message).__name__} is refused: {reply.kind}: {reply.reason}")
                again()
            else:
                settled[0] = True
                then(reply)

        def arrive() -> None:
            if orchestrator.machine is None:
                again()
            else:
                world.request(
                    orchestrator, message, lambda reply, last: world.after(self._latency(), lambda: answer(reply))
                )

        world.after(self._latency(), arrive)
        world.after(_TIMEOUT_US, again)

    @property
    def _orchestrator(self) -> Process:
        return self._orchestrators[self._asked % len(self._orchestrators)]

    def _latency(self) -> int:
        return self._world.network.latency("client", self._orchestrator.name)

    # --- following -----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Open a stream; whatever ends it without a last word is followed by another."""
        world, orchestrator = self._world, self._orchestrator
        self._stream += 1
        stream = self._stream
        arrivals = [0]
        order = [0]

        def receive(reply: Any, last: bool) -> None:
            # A stream keeps its order.
            arrivals[0] = max(world.now_us + self._latency(), arrivals[0] + 1)
            world.at_us(arrivals[0], lambda: take(reply, last))

        def take(reply: Any, last: bool) -> None:
            if stream != self._stream:
                return
            if isinstance(reply, m.EventRecord):
                self._event(reply, order)
            if last and not self.ended:
                again()

        def again() -> None:
            if stream == self._stream and not self.ended:
                self._stream += 1
                self._asked += 1
                world.after(_RETRY_US, self._follow)

        def arrive() -> None:
            if orchestrator.machine is None:
                again()
            else:
                world.request(orchestrator, m.FollowSession(session=self._session, after_step=self.seen), receive)

        world.after(self._latency(), arrive)

    def _event(self, record: m.EventRecord, order: list[int]) -> None:
        """ClientView: steps once each and in order with the oracle's loss; indexes durable and ascending."""
        oracle = self._oracle
        event = parse(record.kind, record.data)
        self.events.append(record.kind)
        if isinstance(event, StepDone):
            if event.step <= self.seen:
                return
            if event.step != self.seen + 1:
                raise Violation("ClientView", f"StepDone({event.step}) is told after {self.seen}")
            expected = oracle.loss(event.step)
            if event.loss != expected:
                raise Violation("ClientView", f"StepDone({event.step}) has loss {event.loss!r}, not {expected!r}")
            scale = oracle.scales[event.step]
            if event.grad_scale != scale:
                raise Violation("ClientView", f"StepDone({event.step}) has scale {event.grad_scale!r}, not {scale!r}")
            self.seen = event.step
        elif isinstance(event, Evaluated):
            expected = oracle.evaluation(event.step, event.rows)
            if event.loss != expected:
                raise Violation("ClientView", f"Evaluated({event.step}) has loss {event.loss!r}, not {expected!r}")
        elif isinstance(event, Placed | CheckpointCommitted | ExactnessLost):
            if not 1 <= event.index <= len(self.checkers.log):
                raise Violation("ClientView", f"{record.kind} names index {event.index}, which is not durable")
            if event.index < order[0]:
                raise Violation("ClientView", f"{record.kind} names index {event.index} after {order[0]}")
            order[0] = event.index
        if record.kind in LAST_KINDS:
            self.ended = record.kind
            self.reason = str(getattr(event, "reason", ""))
            if record.kind == "finished" and self.seen != self.steps:
                raise Violation("ClientView", f"the session finished, but only {self.seen} steps were told")
