"""Virtual time, processes, and every effect of :mod:`dcnr.machine` performed by twins.

One event heap, one random generator. A process is a machine with its home, tensors, compute workers and links; it can
crash, restart as a new incarnation, be paused (then everything happens to it late and at once), or be told to end.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcnr.config import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Limits
from dcnr.ids import Incarnation, PeerId, SessionId, Sha256
from dcnr.machine import (
    Admit,
    Cancel,
    Close,
    Compute,
    Computed,
    ComputeFailed,
    Dial,
    Discard,
    Download,
    Effect,
    Emit,
    Event,
    Exit,
    Fetch,
    Instant,
    Keep,
    Kept,
    Persist,
    Persisted,
    PersistFailed,
    Plan,
    Planned,
    Release,
    Request,
    RequestGone,
    Respond,
    Send,
    Shutdown,
    StoreCheck,
    StoreCreate,
    StoreDelete,
    StoreGet,
    StoreHint,
    StoreList,
    Tick,
    TransferFailed,
    Upload,
)
from dcnr.pnode.pnode import FENCE
from dcnr.pnode.tasks import Task
from dcnr.protocol.messages import Capabilities, Descriptor, Refusal
from dcnr.sim.calm import Calm
from dcnr.sim.checkers import Watch
from dcnr.sim.compute import Oracle, State
from dcnr.sim.network import Network
from dcnr.sim.store import DataService, Habits, Store, StoreEffects
from dcnr.sim.tensors import Table
from dcnr.sim.trace import brief
from dcnr.sim.violation import Violation
from dcnr.sim.worker import ComputeError, Executor

Entry = tuple[int, str, str, Any]
"""Of the trace: microseconds, process, text, and what it is about."""
Reply = Callable[[Any, bool], None]
Planner = Callable[[Any], Any]

STORM = 5_000
"""This many events of one process within a tenth of a second: it wakes itself for ever."""
_STORM_US = 100_000


def written(entry: Entry) -> str:
    """An entry of the trace as a readable line."""
    time_us, name, text, thing = entry
    return f"{time_us / 1e6:12.6f} {name:14} {text}" + ("" if thing is None else f" {brief(thing)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a machine is built from when its process starts."""

    peer: PeerId
    incarnation: Incarnation
    address: str
    capabilities: Capabilities
    fence: bytes | None
    secret: bytes
    seed: int
    clock_s: float
    """What its monotonic clock showed when the world began."""


@dataclass(slots=True, eq=False, kw_only=True)
class Process:
    """A process over all its lives. What survives a crash: ``home``, ``snapshots``, ``guarded``, ``boot``."""

    name: str
    role: str
    peer: PeerId
    address: str
    capabilities: Capabilities
    build: Callable[[Start], Any]
    speed: float
    """Factor on every compute duration."""
    home: dict[str, bytes] = field(default_factory=dict)
    snapshots: dict[tuple[SessionId, Sha256], bytes] = field(default_factory=dict)
    guarded: dict[tuple[SessionId, Sha256], bytes] = field(default_factory=dict)
    """Kept for other PNodes."""
    admitted: dict[SessionId, tuple[str, ...]] = field(default_factory=dict)
    """The token that opens what is guarded."""
    boot: int = 0
    life: int = 0
    """Grows when a life begins and when it ends: what was meant for another life is dropped."""
    machine: Any = None
    incarnation: Incarnation = field(default_factory=lambda: Incarnation(boot=0, nonce=""))
    incarnations: dict[int, Incarnation] = field(default_factory=dict)
    """By life, for frames that arrive after their sender has died."""
    table: Table = field(default_factory=Table)
    executor: Executor | None = None
    secret: bytes = b""
    clock_us: int = 0
    """What its monotonic clock showed when the world began."""
    clock_ppm: int = 0
    """How much faster than the world's it runs, in millionths."""
    links: dict[PeerId, Any] = field(default_factory=dict)
    requests: dict[int, Reply] = field(default_factory=dict)
    queue: deque[tuple[int, Task]] = field(default_factory=deque)
    computing: bool = False
    paused: bool = False
    exiting: bool = False
    backlog: list[Callable[[], None]] = field(default_factory=list)
    timer: int = 0
    timer_us: int | None = None
    stay_down: bool = False
    handled_in: tuple[int, int] = (0, 0)
    """A tenth of a second, and how many events it brought."""
    fail_next: int = 0
    """Compute tasks that the fault plan lets fail."""
    full: bool = False
    """Its disk takes no states, its own or another's."""


class World:
    """See the module's docstring. Build it, add processes, :meth:`run`."""

    def __init__(
        self,
        *,
        seed: int,
        oracles: Sequence[Oracle],
        limits: Limits,
        planner: Planner,
        columns: dict[str, tuple[tuple[int, ...], str]],
        latency_us: tuple[int, int],
        store_delay_us: tuple[int, int],
        store_habits: Habits,
        compute_us: tuple[int, int],
        keep_us: tuple[int, int] = (500, 30_000),
        not_finite: tuple[Any, int] | None = None,
        disks_fail: bool = True,
        patience_us: int = 0,
        move_us: int = 0,
        trace: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.oracles = oracles
        self.limits = limits
        self.planner = planner
        self._columns = columns
        self._compute_us = compute_us
        self._keep_us = keep_us
        self._not_finite = not_finite
        self._disks_fail = disks_fail
        self.now_us = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.processes: list[Process] = []
        self.network = Network(self, latency_us)
        self.store = Store(self, store_delay_us, store_habits, seed)
        self._store_effects = StoreEffects(self, self.store)
        self.data = DataService(self, self.store)
        self.watch = Watch(self, oracles)
        self.calm = Calm(self, patience_us, move_us)
        self.on_entry: Callable[[str, int, str], None] = lambda session, index, kind: None
        self.on_effect: Callable[[Process, Effect], None] = lambda process, effect: None
        self._requests = 0
        self.handled = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._trace = trace
        self.lines: deque[Entry] = deque(maxlen=None if trace else 40)

    # --- time ----------------------------------------------------------------------------------------------

    def at_us(self, time_us: int, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (max(time_us, self.now_us), self._order, act))

    def after(self, delay_us: int, act: Callable[[], None], process: Process | None = None) -> None:
        """``process``: only if that life goes on, and when it is paused, afterwards."""
        if process is None:
            self.at_us(self.now_us + delay_us, act)
            return
        life = process.life
        self.at_us(self.now_us + delay_us, lambda: self.on(process, act, life))

    def on(self, process: Process, act: Callable[[], None], life: int | None = None) -> None:
        """Something happens to a process now; to a paused one when it goes on."""
        if process.machine is None or (life is not None and process.life != life):
            return
        if process.paused:
            process.backlog.append(act)
        else:
            act()

    def run(self, until_us: Callable[[], int], done: Callable[[], bool]) -> bool:
        """Until ``done``; ``False`` where the time came first. Raises :class:`Violation`."""
        while self._heap:
            if done():
                return True
            time_us, _, act = heapq.heappop(self._heap)
            if time_us > until_us():
                self.now_us = until_us()
                return False
            self.now_us = time_us
            act()
        return done()

    def local_s(self, process: Process) -> float:
        return (process.clock_us + self.now_us + self.now_us * process.clock_ppm // 1_000_000) / 1e6

    # --- lives ---------------------------------------------------------------------------------------------

    def add(self, process: Process) -> None:
        self.processes.append(process)

    def start(self, process: Process) -> None:
        """A new life: the boot counter is fsynced before anything else, so it always grows."""
        assert process.machine is None
        process.boot += 1
        process.life += 1
        process.incarnation = Incarnation(boot=process.boot, nonce=f"{self.random.getrandbits(128):032x}")
        process.incarnations[process.life] = process.incarnation
        process.secret = self.random.randbytes(32)
        process.clock_us = self.random.randint(0, 10**9)
        process.table = Table()
        process.executor = Executor(process.table, self.oracles, self._not_finite)
        process.queue.clear()
        process.computing = process.paused = process.exiting = False
        process.backlog = []
        process.links.clear()
        process.requests.clear()
        process.admitted.clear()
        process.timer_us = None
        process.fail_next = 0
        self.line(process, f"starts as boot {process.boot}")
        process.machine = process.build(
            Start(
                peer=process.peer,
                incarnation=process.incarnation,
                address=process.address,
                capabilities=process.capabilities,
                fence=process.home.get(FENCE),
                secret=process.secret,
                seed=self.random.getrandbits(32),
                clock_s=process.clock_us / 1e6,
            )
        )
        self.deliver(process, Tick())

    def stop(self, process: Process, reason: str, slow: bool = False, flush: bool = False) -> None:
        """The life ends, by a kill or by ``Exit``. What was not durable is lost."""
        if process.machine is None:
            return
        self.line(process, f"ends: {reason}")
        self.calm.trouble()
        if slow:
            # The power went: of what was never fsynced some is lost.
            for kept in (process.snapshots, process.guarded):
                for key in [key for key in kept if self.random.random() < 0.5]:
                    del kept[key]
        process.machine = None
        process.life += 1
        process.paused = False
        process.backlog = []
        callers = list(process.requests.values())
        process.requests.clear()
        self.network.died(process, slow=slow, flush=flush)
        for reply in callers:
            self.after(
                self.random.randint(1_000, 50_000),
                lambda reply=reply: reply(Refusal(kind="Unreachable", reason="connection lost"), True),  # type: ignore[misc]
            )

    def pause(self, process: Process) -> None:
        if process.machine is not None:
            self.line(process, "is paused")
            process.paused = True

    def unpause(self, process: Process) -> None:
        """Everything late, at once, in its order."""
        if process.machine is None or not process.paused:
            return
        self.line(process, "goes on")
        process.paused = False
        backlog, process.backlog = process.backlog, []
        life = process.life
        for act in backlog:
            self.on(process, act, life)

    def shutdown(self, process: Process, reason: str) -> None:
        self.on(process, lambda: self.deliver(process, Shutdown(reason=reason)))

    # --- events --------------------------------------------------------------------------------------------

    def deliver(self, process: Process, event: Event) -> None:
        """Hand one event to the machine and perform its effects. Raises :class:`Violation`."""
        if process.machine is None:
            return
        self.handled += 1
        period, count = process.handled_in
        process.handled_in = (self.now_us // _STORM_US, count + 1 if period == self.now_us // _STORM_US else 1)
        if count > STORM:
            raise self.blame(process, Violation("LiveAndCalm", f"a storm of events, the last is {brief(event)}"))
        self.line(process, "<-", event)
        try:
            self.watch.event(process, event)
            try:
                effects = process.machine.handle(Instant(self.local_s(process)), event)
            except Violation:
                raise
            except Exception as error:
                # A process boundary: the machine has a bug, and the seed has found it.
                text = f"{type(error).__name__}: {error} while handling {brief(event)}"
                raise Violation("NoException", text) from error
            for effect in effects:
                if process.machine is None:
                    return
                self._perform(process, effect)
        except Violation as violation:
            raise self.blame(process, violation) from violation.__cause__
        if process.machine is not None:
            self._arm(process)

    def blame(self, process: Process, violation: Violation) -> Violation:
        """Add time and process, once."""
        if violation.args and str(violation.args[0]).startswith("t="):
            return violation
        found = Violation(violation.invariant, violation.text)
        found.args = (f"t={self.now_us / 1e6:.6f} {process.name}: {violation.invariant}: {violation.text}",)
        return found

    def _arm(self, process: Process) -> None:
        deadline = process.machine.deadline()
        if deadline is None:
            process.timer += 1
            process.timer_us = None
            return
        local_us = math.ceil(deadline * 1e6)
        while local_us / 1e6 < deadline:
            local_us += 1
        time_us = local_us - process.clock_us
        if process.clock_ppm:
            # The first instant at which its clock shows the deadline.
            time_us = -(-time_us * 1_000_000 // (1_000_000 + process.clock_ppm))
        time_us = max(time_us, self.now_us + 1)
        if process.timer_us == time_us:
            return
        process.timer += 1
        process.timer_us = time_us
        timer = process.timer

        def fire() -> None:
            if process.timer == timer:
                process.timer_us = None
                self.deliver(process, Tick())

        life = process.life
        self.at_us(time_us, lambda: self.on(process, fire, life))

    def request(self, process: Process, message: Any, reply: Reply) -> int:
        """A call arrives at an orchestrator."""
        self._requests += 1
        id = self._requests
        process.requests[id] = reply
        self.on(process, lambda: self.deliver(process, Request(id=id, message=message)))
        return id

    def request_gone(self, process: Process, id: int, life: int) -> None:
        if process.life == life and process.requests.pop(id, None) is not None:
            self.on(process, lambda: self.deliver(process, RequestGone(id=id)), life)

    def descriptor(self, process: Process) -> Descriptor:
        return Descriptor(
            peer=process.peer,
            incarnation=process.incarnation,
            role=process.role,
            addresses=(process.address,),
            version_min=PROTOCOL_VERSION_MIN,
            version_max=PROTOCOL_VERSION_MAX,
        )

    def column(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape without the row axis, and dtype, of a column of the dataset."""
        return self._columns[name]

    def durable(self, key: str) -> None:
        """A key was created: tell the fault plan of log entries."""
        self.watch.durable_entry(key, self.on_entry)

    # --- effects -------------------------------------------------------------------------------------------

    def _perform(self, process: Process, effect: Effect) -> None:
        self.line(process, "->", effect)
        self.watch.effect(process, effect)
        self.on_effect(process, effect)
        match effect:
            case Send(peer=peer, message=message):
                self.network.send(process, peer, message)
            case Release(handles=handles):
                for handle in handles:
                    process.table.release(handle)
            case Compute(task=task, what=what):
                for handle in self._executor(process).handles(what):
                    process.table.get(handle)
                process.queue.append((task, what))
                self._compute(process)
            case Cancel(task=task):
                self._cancel(process, task)
            case Persist(key=key, data=data):
                self._persist(process, key, data)
            case Dial(peer=peer, addresses=addresses):
                self.network.dial(process, peer, addresses)
            case Close(peer=peer):
                self.network.close(process, peer)
            case Emit():
                pass
            case Exit(reason=reason):
                process.exiting = True
                self.stop(process, f"exit: {reason}", flush=True)
            case Download():
                self.data.download(process, effect)
            case Keep(id=id, session=session, handle=handle):
                self._keep(process, id, session, handle)
            case Upload():
                self.data.upload(process, effect)
            case Fetch(id=id, peer=peer, ref=ref):
                self.data.fetch(process, id, peer, ref)
            case Discard(session=session, keep=keep, guarded=guarded):
                self._discard(process, process.guarded if guarded else process.snapshots, session, keep)
            case Admit(session=session, token=token):
                before = process.admitted.pop(session, ())
                if token:  # As a real shelf: the one before is good as well.
                    process.admitted[session] = (*(t for t in before if t != token), token)[-2:]
            case StoreCreate(id=id, key=key, data=data):
                self._store_effects.create(process, id, key, data)
            case StoreGet(id=id, key=key):
                self._store_effects.get(process, id, key)
            case StoreList(id=id, prefix=prefix):
                self._store_effects.list(process, id, prefix)
            case StoreCheck(id=id, keys=keys):
                self._store_effects.check(process, id, keys)
            case StoreDelete(keys=keys):
                self.store.delete(process, keys)
            case StoreHint(key=key, data=data):
                self.store.hint(process, key, data)
            case Plan(id=id, problem=problem):
                answer = self.planner(problem)
                delay = self.random.randint(1_000, 50_000)
                self.after(delay, lambda: self.deliver(process, Planned(id=id, answer=answer)), process)
            case Respond(id=id, message=message, last=last):
                reply = process.requests.pop(id, None) if last else process.requests.get(id)
                if reply is not None:
                    reply(message, last)
            case _:
                raise AssertionError(f"unknown effect {effect!r:.200}")

    @staticmethod
    def _executor(process: Process) -> Executor:
        assert process.executor is not None
        return process.executor

    def _compute(self, process: Process) -> None:
        """One worker: tasks in the order given, one at a time."""
        if process.computing or not process.queue:
            return
        process.computing = True
        task, what = process.queue.popleft()
        low, high = self._compute_us
        delay = int(self.random.randint(low, high) * process.speed)

        def finish() -> None:
            process.computing = False
            event: Event
            executor = self._executor(process)
            try:
                for handle in executor.handles(what):
                    process.table.get(handle)
                if process.fail_next > 0:
                    process.fail_next -= 1
                    raise ComputeError("injected failure")
                self.watch.computing(process, what)
                event = Computed(task=task, result=executor.execute(what))
            except ComputeError as error:
                executor.failed(what)
                event = ComputeFailed(task=task, reason=str(error))
            except Violation as violation:
                raise self.blame(process, violation) from None
            self.watch.held(process)
            self._compute(process)
            self.after(self.random.randint(0, 300), lambda: self.deliver(process, event), process)

        self.after(delay, finish, process)

    def _cancel(self, process: Process, task: int) -> None:
        waiting = [entry for entry in process.queue if entry[0] == task]
        if waiting:
            process.queue.remove(waiting[0])
            event = ComputeFailed(task=task, reason="cancelled")
            self.after(0, lambda: self.deliver(process, event), process)

    def _persist(self, process: Process, key: str, data: bytes) -> None:
        """Durable at the drawn time; a crash before it loses the write, or not."""
        life = process.life
        lands_late = self.random.random() < 0.3
        fails = self.random.random() < 0.002 and self._disks_fail

        def land() -> None:
            if process.life != life:
                if lands_late:
                    process.home[key] = data
                return
            if fails:
                self.watch.causes += 1  # A ticket is refused for it.
                self.calm.trouble()
            else:
                process.home[key] = data

            def tell() -> None:
                failed = PersistFailed(key=key, reason="no space left on device")
                self.deliver(process, failed if fails else Persisted(key=key))

            self.after(self.random.randint(0, 2_000), tell, process)

        self.at_us(self.now_us + self.random.randint(200, 20_000), land)

    def _keep(self, process: Process, id: int, session: SessionId, handle: Any) -> None:
        state = process.table.get(handle)
        assert isinstance(state, State)
        fails = (self.random.random() < 0.005 and self._disks_fail) or process.full
        data = state.to_bytes()
        sha256 = Sha256(hashlib.sha256(data).hexdigest())

        def land() -> None:
            process.table.release(handle)
            if fails:
                self.calm.trouble()
                self.deliver(process, TransferFailed(id=id, reason="no space left on device"))
            else:
                process.snapshots[session, sha256] = data
                self.deliver(process, Kept(id=id, sha256=sha256, size_bytes=len(data)))

        self.after(self.random.randint(*self._keep_us), land, process)

    def _discard(
        self,
        process: Process,
        found: dict[tuple[SessionId, Sha256], bytes],
        session: SessionId,
        keep: tuple[Sha256, ...],
    ) -> None:
        life = process.life

        def land() -> None:
            if process.life == life:
                for key in [k for k in found if k[0] == session and k[1] not in keep]:
                    del found[key]

        self.at_us(self.now_us + self.random.randint(200, 5_000), land)

    # --- trace ---------------------------------------------------------------------------------------------

    def note(self, process: Process, what: str, thing: Any) -> None:
        self.line(process, f"({what})", thing)

    def line(self, process: Process | None, text: str, thing: Any = None) -> None:
        """Without a trace only kinds are hashed, and only the last lines are ever written out."""
        name = process.name if process else "world"
        entry = (self.now_us, name, text, thing)
        self.lines.append(entry)
        if self._trace:
            self._digest.update(written(entry).encode())
        else:
            inner = type(getattr(thing, "message", None)).__name__
            self._digest.update(f"{self.now_us} {name} {text} {type(thing).__name__} {inner}".encode())

    def trace_digest(self) -> str:
        return self._digest.hexdigest()

    def live_processes(self) -> list[Process]:
        return [p for p in self.processes if p.machine is not None]
