"""The demo's story: follow the session, kill a PNode halfway, keep the facts.

One queue brings events, keys and finished background work to the one thread that tells it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcnr.cli.display import Meter, Teller
from dcnr.cli.screen import PNodeRow, Screen
from dcnr.errors import DCNRError
from dcnr.ids import VNodeId
from dcnr.session.events import (
    CheckpointCommitted,
    Evaluated,
    Finished,
    Placed,
    RecoveryPhase,
    Replaying,
    SessionEvent,
    StepDone,
)

if TYPE_CHECKING:
    from dcnr.cli.verify import Evidence, Verdict
    from dcnr.client.blocking import Client, Run
    from dcnr.network.analysis import Network
    from dcnr.runtime.supervisor import LocalNetwork

PROMPT = "def "
SAMPLE_TOKENS = 48
POLL_INTERVAL_S = 0.5
"""How often the display asks for the PNodes' colours and memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key was pressed."""

    character: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The session tells nothing more; ``error`` says why where it did not finish."""

    error: DCNRError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Background work is done: ``then`` takes its result on the telling thread."""

    then: Callable[[Any], None]
    result: Any
    error: DCNRError | None


News = SessionEvent | Key | Ended | Work | None
"""``None`` = nothing new in time."""


class Newsroom:
    """Threads bring news into one queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue[News] = queue.Queue()

    def next(self, timeout_s: float = POLL_INTERVAL_S) -> News:
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def follow(self, run: Run, after_step: int = 0) -> None:
        """``StepDone`` of steps up to ``after_step`` is no news."""

        def reading() -> None:
            error: DCNRError | None = None
            try:
                for event in run.events(after_step):
                    self._queue.put(event)
            except DCNRError as found:
                error = found
            except CancelledError:
                # The client was closed under us: nobody listens any more.
                return
            self._queue.put(Ended(error=error))

        threading.Thread(target=reading, daemon=True).start()

    def work(self, what: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run ``what`` in the background; its result comes back as news."""

        def working() -> None:
            try:
                self._queue.put(Work(then=then, result=what(), error=None))
            except DCNRError as found:
                self._queue.put(Work(then=then, result=None, error=found))
            except CancelledError:
                return

        threading.Thread(target=working, daemon=True).start()

    @contextmanager
    def keys(self) -> Iterator[bool]:
        """Keys as they are pressed, if there is a terminal; gives whether there is one."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.name != "posix" or not _in_foreground():
            yield False
            return
        import termios
        import tty

        def reading() -> None:
            while character := os.read(sys.stdin.fileno(), 1):
                self._queue.put(Key(character=character.decode(errors="replace")))

        before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        try:
            threading.Thread(target=reading, daemon=True).start()
            yield True
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@dataclass(slots=True, kw_only=True)
class Facts:
    """What happened, for the summary."""

    losses: dict[int, float] = field(default_factory=dict)
    validations: list[tuple[int, float]] = field(default_factory=list)
    killed: int | None = None
    killed_at_step: int = 0
    placed_again: bool = False
    base_step: int = 0
    recovery: list[RecoveryPhase] = field(default_factory=list)
    replayed: int = 0
    finished: bool = False
    train_s: float = 0.0
    tokens: int = 0
    text_early: str = ""
    text: str = ""
    evidence: Evidence | None = None
    verdict: Verdict | None = None

    @property
    def loss_fell(self) -> bool:
        """Mean of the last tenth below that of the first tenth; validation, where measured twice, fell too."""
        losses = [self.losses[step] for step in sorted(self.losses)]
        tenth = max(1, len(losses) // 10)
        fell = len(losses) > 1 and sum(losses[-tenth:]) < sum(losses[:tenth])
        return fell and (len(self.validations) < 2 or self.validations[-1][1] < self.validations[0][1])

    @property
    def survived(self) -> bool:
        return self.killed is not None and self.placed_again and self.finished

    @property
    def equal(self) -> bool:
        return self.verdict is not None and self.verdict.equal


class Story:
    """Follows one session to its end, kills a PNode on the way, and keeps the facts."""

    def __init__(self, local: LocalNetwork, net: Client, run: Run, network: Network, steps: int) -> None:
        self._local, self._net, self._run, self._network = local, net, run, network
        self._news = Newsroom()
        self._meter = Meter(steps)
        self._teller = Teller()
        self._rows = [
            PNodeRow(number=number, peer=child.peer, pid=child.pid) for number, child in enumerate(local.pnodes, 1)
        ]
        self._screen = Screen(self._meter, self._rows)
        self._choosing = False
        self._collecting = False
        self._sampled = False
        self._polling = False
        self._ended = False
        self._pending = 0
        self.facts = Facts()

    def tell(self) -> Facts:
        """Returns when the session has ended and all background work is in. Raises what ended it otherwise."""
        begun = time.monotonic()
        self._news.follow(self._run)
        with self._screen, self._news.keys() as keyboard:
            self._keyboard = keyboard
            while not self._ended or self._pending:
                self._hint()
                self._poll()
                match self._news.next():
                    case Key(character=character):
                        self._key(character)
                    case Ended(error=None):
                        self._ended = True
                        self.facts.train_s = time.monotonic() - begun
                    case Ended(error=DCNRError() as error):
                        raise error
                    case Work(error=DCNRError() as error):
                        self._pending -= 1
                        self._screen.line(f"could not: {error}", "red")
                    case Work(then=then, result=result):
                        self._pending -= 1
                        then(result)
                    case SessionEvent() as event:
                        self._event(event)
                    case _:
                        pass
        return self.facts

    def _background(self, what: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._pending += 1
        self._news.work(what, then)

    # --- events --------------------------------------------------------------------------------------------

    def _event(self, event: SessionEvent) -> None:
        self._meter.take(event)
        facts = self.facts
        match event:
            case StepDone():
                facts.losses[event.step] = event.loss
                facts.tokens += event.tokens
                self._screen.stepped()
                if event.step >= self._meter.steps // 2 and facts.killed is None:
                    self._kill(self._busiest())
            case Placed():
                self._placed(event)
            case RecoveryPhase():
                facts.recovery.append(event)
            case Replaying():
                facts.replayed = event.last - event.first + 1
            case Evaluated():
                facts.validations.append((event.step, event.loss))
            case CheckpointCommitted():
                self._committed(event)
            case Finished():
                facts.finished = True
            case _:
                pass
        for line in self._teller.lines(event):
            style = "bold yellow" if isinstance(event, RecoveryPhase | Replaying) else "dim"
            self._screen.line(line, style)

    def _placed(self, event: Placed) -> None:
        placement = {VNodeId(vnode): peer for vnode, peer in event.vnodes.items()}
        by_peer: dict[str, list[str]] = {}
        for vnode, peer in placement.items():
            by_peer.setdefault(peer, []).append(vnode)
        hosts = [segment.host for segment in self._network.segments(placement)]
        for row in self._rows:
            row.vnodes = by_peer.get(row.peer, [])
            row.segments = hosts.count(row.peer)
        if self.facts.killed is not None and not self.facts.placed_again:
            self.facts.placed_again = True
            self.facts.base_step = event.base_step
        self._screen.moved()

    def _committed(self, event: CheckpointCommitted) -> None:
        if not self._sampled:
            self._sampled = True
            self._background(self._sample, self._early)
        if self.facts.placed_again and not self._collecting and event.step > self.facts.base_step:
            # Now, while the commit before the kill is still kept: older ones are deleted as training goes on.
            self._collecting = True
            self._background(lambda: self._collect(event.step), self._collected)

    def _collect(self, step: int) -> Evidence:
        from dcnr.cli.verify import collect

        return collect(self._net, self._run, self.facts.base_step, step)

    def _collected(self, evidence: Evidence) -> None:
        self.facts.evidence = evidence

    def _sample(self) -> str:
        return "".join(self._net.generate(self._run.id, PROMPT, SAMPLE_TOKENS, 0.8, 0.95, 1))

    def _early(self, text: str) -> None:
        self.facts.text_early = text

    # --- the kill ------------------------------------------------------------------------------------------

    def _busiest(self) -> PNodeRow:
        return max(self._rows, key=lambda row: (len(row.vnodes), -row.number))

    def _key(self, character: str) -> None:
        if character == "k" and self.facts.killed is None:
            self._choosing = True
        elif self._choosing and character.isdigit() and 1 <= int(character) <= len(self._rows):
            self._choosing = False
            if self.facts.killed is None:
                self._kill(self._rows[int(character) - 1])
        else:
            self._choosing = False

    def _kill(self, row: PNodeRow) -> None:
        self._local.kill(row.number - 1)
        self.facts.killed, self.facts.killed_at_step = row.number, self._meter.step
        row.state, row.vnodes, row.segments = "dead", (), 0
        self._choosing = False
        self._screen.line(f"SIGKILL to PNode {row.number} (process {row.pid}) at step {self._meter.step}", "bold red")

    def _hint(self) -> None:
        if self._choosing:
            self._screen.hint = f"which PNode shall die? 1 to {len(self._rows)}"
        elif self._keyboard and self.facts.killed is None:
            self._screen.hint = f"k then a number kills a PNode; PNode {self._busiest().number} dies halfway otherwise"
        else:
            self._screen.hint = ""

    # --- colours and memory --------------------------------------------------------------------------------

    def _poll(self) -> None:
        if self._polling or self._ended:
            return
        self._polling = True
        self._background(self._net.nodes, self._polled)

    def _polled(self, nodes: Any) -> None:
        import psutil

        self._polling = False
        colours = {node.descriptor.peer: node.colour for node in nodes}
        for row in self._rows:
            if row.state == "dead":
                continue
            row.state = colours.get(row.peer, "gone")
            try:
                row.memory_bytes = psutil.Process(row.pid).memory_info().rss
            except psutil.NoSuchProcess:
                row.state = "dead"


def _in_foreground() -> bool:
    """A job in the background that touches its terminal's settings is stopped by the kernel, without a word."""
    return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
