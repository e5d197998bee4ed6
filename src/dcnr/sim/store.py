"""The twins of the object store and of the data service in front of it.

Create-only and durable at a drawn time; a failed call may have landed or not, or land seconds later, whatever has become
of its caller; reads see what is durable, lists what was durable a while ago.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcnr.errors import Refused
from dcnr.ids import PeerId
from dcnr.machine import (
    Download,
    Downloaded,
    Event,
    Fetched,
    StoreChecked,
    StoreCreated,
    StoreFailed,
    StoreGot,
    StoreListed,
    StoreTaken,
    TransferFailed,
    Upload,
    Uploaded,
)
from dcnr.protocol.messages import RowsRef
from dcnr.session.log import object_key
from dcnr.session.tokens import check
from dcnr.sim.compute import rows_digest

if TYPE_CHECKING:
    from dcnr.sim.world import Process, World

Answer = Callable[[Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a store may do and stay within its contract."""

    failure_share: float = 0.0
    """Of calls that fail though the store is there."""
    ghost_share: float = 0.0
    """Of creates and hints whose caller hears of a failure at once, and which land up to ``ghost_us`` later."""
    ghost_us: int = 0
    list_lag_us: int = 0
    """A list may miss what was created this short a time ago, and show what was deleted since."""


class Store:
    """What is durable, and the calls under way."""

    def __init__(self, world: World, delay_us: tuple[int, int], habits: Habits, seed: int = 0) -> None:
        self._world = world
        self.delay_us = delay_us
        self._habits = habits
        # Of its own, so that a store without these habits leaves the world's chances as they are.
        self._chance = random.Random(f"store habits {seed}")
        self.away = self.read_only = False
        self.cut_from: set[str] = set()
        """Processes that do not reach it."""
        self.ghosts = self.list_lags = 0
        """Ghosts that landed, and lists that were behind."""
        self._born_us: dict[str, int] = {}
        self._gone_us: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}
        self.damaged: set[str] = set()
        """Keys that a fault has damaged: no checker blames a machine for them."""

    def _delay(self) -> int:
        low, high = self.delay_us
        tail = self._world.random.random()
        return self._world.random.randint(low, high) + (10 * high if tail < 0.02 else 0)

    def fails(self, caller: Process) -> bool:
        """Whether a call made now fails."""
        if self.away or caller.name in self.cut_from:
            return True
        return self._habits.failure_share > 0 and self._world.random.random() < self._habits.failure_share

    def _ghost_us(self) -> int:
        """How much later a write lands whose caller hears of a failure now; 0 = it is no ghost."""
        if self._habits.ghost_share == 0 or self._chance.random() >= self._habits.ghost_share:
            return 0
        return self._chance.randint(1, self._habits.ghost_us)

    def create(self, owner: Process, key: str, data: bytes, answer: Answer) -> None:
        """``answer`` gets ``None`` (created), the bytes that are there, or a reason as ``str`` (outcome unknown)."""
        if self.read_only:
            self._world.after(self._delay(), lambda: answer("the store takes no writes"))
            return
        fails = self.fails(owner)
        lands = not fails or (self._world.random.random() < 0.5 and owner.name not in self.cut_from)
        survives = self._world.random.random() < 0.5
        ghost_us = self._ghost_us()
        life = owner.life
        outcome: list[Any] = ["the store did not answer"]

        def land() -> None:
            # A process that dies takes some of its calls along.
            if not lands or (owner.life != life and not survives):
                return
            put()

        def put() -> None:
            there = self.objects.get(key)
            if there is None:
                self._write(key, data)
                self.damaged.discard(key)
                self._world.watch.created(key, data)
                self._world.durable(key)
                outcome[0] = None
            else:
                outcome[0] = there

        delay = self._delay()
        if ghost_us and lands:
            self._ghost(delay + ghost_us, put)
            lands, fails = False, True
        self._world.after(delay, land)
        self._world.after(delay + self._delay(), lambda: answer("the store did not answer" if fails else outcome[0]))

    def _ghost(self, delay_us: int, put: Callable[[], None]) -> None:
        """It is in the store's hands: neither its caller's death nor a closed door stops it."""

        def land() -> None:
            self.ghosts += 1
            put()

        self._world.after(delay_us, land)

    def _write(self, key: str, data: bytes) -> None:
        if key not in self.objects:
            self._born_us[key] = self._world.now_us
        self.objects[key] = data

    def _remove(self, key: str) -> None:
        del self.objects[key]
        self._gone_us[key] = self._world.now_us

    def listed(self, prefix: str) -> tuple[str, ...]:
        """Names under a prefix, ascending, as a list made now shows them."""
        names = {k for k in self.objects if k.startswith(prefix)}
        lag_us = self._habits.list_lag_us
        if lag_us:
            since = self._world.now_us - lag_us
            late = [k for k in sorted(names) if self._born_us.get(k, -lag_us) > since and self._chance.random() < 0.5]
            still = [
                k
                for k, gone_us in self._gone_us.items()
                if k.startswith(prefix) and k not in names and gone_us > since and self._chance.random() < 0.5
            ]
            self.list_lags += bool(late or still)
            names = names.difference(late).union(still)
        return tuple(sorted(names))

    def get(self, caller: Process, key: str, answer: Answer) -> None:
        """``answer`` gets bytes, ``None`` (nothing there) or a reason as ``str``."""
        fails = self.fails(caller)
        found: list[Any] = [None]
        delay = self._delay()

        def read() -> None:
            found[0] = "the store did not answer" if fails else self.objects.get(key)

        self._world.after(delay, read)
        self._world.after(delay + self._delay(), lambda: answer(found[0]))

    def delete(self, owner: Process, keys: tuple[str, ...]) -> None:
        life = owner.life

        def land() -> None:
            if owner.life == life or self._world.random.random() < 0.5:
                for key in keys:
                    if not self.read_only and not self.fails(owner) and key in self.objects:
                        self._remove(key)
                        self._world.watch.deleted(key)

        self._world.after(self._delay(), land)

    def hint(self, owner: Process, key: str, data: bytes) -> None:
        if self.read_only:
            return
        life = owner.life
        ghost_us = self._ghost_us()

        def land() -> None:
            if owner.life == life and not self.fails(owner):
                self._write(key, data)

        if ghost_us and owner.name not in self.cut_from:
            self._ghost(ghost_us, lambda: self._write(key, data))
        else:
            self._world.after(self._delay(), land)

    def damage(self, key: str, missing: bool) -> None:
        """A fault: an object is lost or its bytes change."""
        self.damaged.add(key)
        if missing:
            self._remove(key)
        else:
            self.objects[key] = self.objects[key][:-1] + bytes([self.objects[key][-1] ^ 1])

    def mend(self, key: str, damaged: bytes) -> None:
        """Remove what a fault has damaged, if it is still there."""
        if self.objects.get(key) == damaged:
            self._remove(key)


class StoreEffects:
    """An orchestrator's store effects as events."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._store = store

    def create(self, process: Process, id: int, key: str, data: bytes) -> None:
        def answer(outcome: Any) -> None:
            event: Event
            if outcome is None:
                event = StoreCreated(id=id)
            elif isinstance(outcome, bytes):
                event = StoreTaken(id=id, data=outcome)
            else:
                event = StoreFailed(id=id, reason=outcome)
            deliver(event)

        deliver = self._deliverer(process)
        self._store.create(process, key, data, answer)

    def get(self, process: Process, id: int, key: str) -> None:
        deliver = self._deliverer(process)

        def answer(outcome: Any) -> None:
            deliver(StoreFailed(id=id, reason=outcome) if isinstance(outcome, str) else StoreGot(id=id, data=outcome))

        self._store.get(process, key, answer)

    def list(self, process: Process, id: int, prefix: str) -> None:
        deliver = self._deliverer(process)

        def answer(outcome: Any) -> None:
            if isinstance(outcome, str):
                deliver(StoreFailed(id=id, reason=outcome))
                return
            deliver(StoreListed(id=id, keys=self._store.listed(prefix)))

        self._store.get(process, prefix, answer)

    def check(self, process: Process, id: int, keys: tuple[str, ...]) -> None:
        deliver = self._deliverer(process)
        damaged: dict[str, str] = {}

        def next_key(position: int) -> None:
            if position == len(keys):
                deliver(StoreChecked(id=id, damaged=damaged))
                return
            key = keys[position]

            def answer(outcome: Any) -> None:
                if isinstance(outcome, str):
                    deliver(StoreFailed(id=id, reason=outcome))
                    return
                name = key.rsplit("/", 1)[-1].split(".", 1)[0]
                if outcome is None:
                    damaged[key] = "missing"
                elif hashlib.sha256(outcome).hexdigest() != name:
                    damaged[key] = "its bytes hash to another name"
                next_key(position + 1)

            self._store.get(process, key, answer)

        next_key(0)

    def _deliverer(self, process: Process) -> Callable[[Event], None]:
        life = process.life

        def deliver(event: Event) -> None:
            if process.life == life:
                self._world.on(process, lambda: self._world.deliver(process, event))

        return deliver


_TRY_AGAIN_US = 300_000


@dataclass(frozen=True, slots=True)
class Passing:
    """A failure that may pass: the adapter tries again until its time is up."""

    reason: str


class DataService:
    """Rows and objects, through an orchestrator, against its tokens. Answers are values, or reasons as ``str``."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._store = store

    def _call(
        self,
        process: Process,
        peer: PeerId,
        serve: Callable[[Process, Answer], None],
        end: Callable[[Any], Event],
        once: bool = False,
    ) -> None:
        """``serve`` runs at the process that is asked; ``end`` makes the event at the one that asks. ``once``: there is
        no second try."""
        world = self._world
        life = process.life
        target = next((p for p in world.processes if p.peer == peer), None)
        give_up_us = world.now_us + int(world.limits.transfer_timeout_s * 1e6)

        def finish(outcome: Any) -> None:
            if process.life == life:
                world.on(process, lambda: world.deliver(process, end(outcome)), life)

        def failed(failure: Passing) -> None:
            if once or world.now_us + _TRY_AGAIN_US > give_up_us:
                finish(failure.reason)
            else:
                world.after(_TRY_AGAIN_US, attempt)

        def attempt() -> None:
            if process.life != life:
                return
            if target is None or target.machine is None or not world.network.reachable(process.name, target.name):
                failed(Passing("the data service cannot be reached"))
                return
            target_life = target.life
            answered = [False]

            def answer(outcome: Any) -> None:
                if answered[0]:
                    return
                answered[0] = True
                if target.life != target_life or not world.network.reachable(process.name, target.name):
                    failed(Passing("the data service went away"))
                elif isinstance(outcome, Passing):
                    failed(outcome)
                else:
                    world.after(world.network.latency(process.name, target.name), lambda: finish(outcome))

            def arrive() -> None:
                if target.life != target_life:
                    answer(None)
                else:
                    world.on(target, lambda: serve(target, answer), target_life)

            world.after(world.network.latency(process.name, target.name), arrive)
            # A process that dies with the call in its hands.
            world.after(20_000_000, lambda: None if target.life == target_life else answer(None))

        attempt()

    def _refused(self, service: Process, token: str, scope: str) -> str | None:
        try:
            check(service.secret, token, scope, self._world.local_s(service))
        except Refused as error:
            return str(error)
        return None

    def download(self, process: Process, effect: Download) -> None:
        id, session, sha256, token = effect.id, effect.session, effect.sha256, effect.token
        kept = process.snapshots.get((session, sha256)) or process.guarded.get((session, sha256))
        world = self._world
        if kept is not None:
            event = Downloaded(id=id, handle=process.table.put(kept, "local snapshot", len(kept)), local=True)
            world.after(world.random.randint(100, 5_000), lambda: world.deliver(process, event), process)
            return

        def serve(service: Process, answer: Answer) -> None:
            if effect.address:
                right = token in service.admitted.get(session, ())
                data = service.guarded.get((session, sha256)) or service.snapshots.get((session, sha256))
                answer((data or "it is not kept here") if right else "the token gives no access")
                return
            refusal = self._refused(service, token, f"objects/{session}/read")
            if refusal is not None:
                answer(refusal)
                return

            def got(data: Any) -> None:
                if isinstance(data, str):
                    answer(Passing(data))
                elif data is None:
                    answer("no such object")
                elif hashlib.sha256(data).hexdigest() != sha256:
                    answer("the object does not hash to its name")
                else:
                    answer(data)

            self._store.get(service, object_key(session, sha256), got)

        def end(outcome: Any) -> Event:
            if isinstance(outcome, str):
                return TransferFailed(id=id, reason=outcome)
            return Downloaded(id=id, handle=process.table.put(outcome, "downloaded", len(outcome)), local=False)

        self._call(process, effect.peer, serve, end, once=bool(effect.address))

    def upload(self, process: Process, effect: Upload) -> None:
        id, session, sha256, token = effect.id, effect.session, effect.sha256, effect.token

        def serve(service: Process, answer: Answer) -> None:
            data = process.snapshots.get((session, sha256))
            if effect.address:
                if token not in service.admitted.get(session, ()) or data is None:
                    answer("the token gives no access" if data else "the kept snapshot is missing")
                elif service.full:
                    answer("no space left on device")
                else:
                    service.guarded[session, sha256] = data
                    self._world.calm.shelved(service, session)
                    answer(True)
                return
            refusal = self._refused(service, token, f"objects/{session}/write")
            if refusal is not None or data is None:
                answer(refusal or "the kept snapshot is missing")
                return
            key = object_key(session, sha256)

            def created(outcome: Any) -> None:
                if isinstance(outcome, str):
                    answer(Passing(outcome))
                elif outcome is not None and hashlib.sha256(outcome).hexdigest() != sha256:
                    # Damaged bytes under the object's name are nobody's: they make room for the right ones.
                    self._store.mend(key, outcome)
                    answer(Passing("the object was damaged"))
                else:
                    answer(True)

            self._store.create(service, key, data, created)

        def end(outcome: Any) -> Event:
            return TransferFailed(id=id, reason=outcome) if isinstance(outcome, str) else Uploaded(id=id)

        self._call(process, effect.peer, serve, end, once=bool(effect.address))

    def fetch(self, process: Process, id: int, peer: PeerId, ref: RowsRef) -> None:
        world = self._world

        def serve(service: Process, answer: Answer) -> None:
            refusal = self._refused(service, ref.token, f"rows/{ref.dataset}")
            if refusal is not None:
                answer(refusal)
            else:
                away = self._store.fails(service)
                world.after(1_000, lambda: answer(Passing("the store did not answer") if away else True))

        def end(outcome: Any) -> Event:
            if isinstance(outcome, str):
                return TransferFailed(id=id, reason=outcome)
            tensors = []
            for column in ref.columns:
                value = rows_digest(ref.dataset, ref.split, ref.rows, column)
                shape, dtype = world.column(column)
                tensors.append(process.table.tensor(value, f"rows {column}", (len(ref.rows), *shape), dtype, None))
            return Fetched(id=id, tensors=tuple(tensors))

        self._call(process, peer, serve, end)
