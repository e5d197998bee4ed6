"""The driver against a scripted machine and worlds in memory: each effect ends in the event that it promises."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcnr.adapters.files import HomeFolder
from dcnr.config import LIMITS, Limits
from dcnr.errors import AlreadyExists, CorruptObject, NotFound, StoreUnavailable, Unreachable
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
    Downloaded,
    Effect,
    Emit,
    Event,
    Exit,
    Fetch,
    Fetched,
    Instant,
    Keep,
    Kept,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    PersistFailed,
    Plan,
    Planned,
    Received,
    Release,
    Request,
    RequestGone,
    Respond,
    Send,
    Shutdown,
    StoreCheck,
    StoreChecked,
    StoreCreate,
    StoreCreated,
    StoreDelete,
    StoreFailed,
    StoreGet,
    StoreGot,
    StoreHint,
    StoreList,
    StoreListed,
    StoreTaken,
    TensorRef,
    Tick,
    TransferFailed,
    Upload,
    Uploaded,
)
from dcnr.protocol.messages import (
    Controlled,
    Descriptor,
    GetStatus,
    InlineTensor,
    Leave,
    Message,
    Refusal,
    Registered,
    RowsRef,
    Status,
)
from dcnr.runtime.driver import EXIT_BUG, Driver, Ports
from dcnr.runtime.tensors import CountedTable, NumpyBackend
from dcnr.runtime.worker import ThreadWorker

ME = Incarnation(boot=1, nonce="00")
SESSION = SessionId("session")


class Script:
    """A machine that answers from a function and remembers what it was told."""

    def __init__(self, answer: Callable[[Event], list[Effect]] = lambda event: []) -> None:
        self.answer = answer
        self.told: list[Event] = []
        self.times: list[float] = []
        self.due: float | None = None
        self.busy = False

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        assert not self.busy, "the machine was entered twice"
        self.busy = True
        self.told.append(event)
        self.times.append(now)
        if isinstance(event, Shutdown):
            effects: list[Effect] = [Exit(code=0, reason=event.reason)]
        else:
            effects = self.answer(event)
        self.busy = False
        return effects

    def deadline(self) -> Instant | None:
        return None if self.due is None else Instant(self.due)


class FakeLinks:
    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []

    def send(self, peer: PeerId, message: Message) -> None:
        self.done.append((f"send {peer}", message))

    def dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        self.done.append((f"dial {peer}", addresses))

    def close(self, peer: PeerId, reason: str) -> None:
        self.done.append((f"close {peer}", reason))

    async def stop(self) -> None:
        self.done.append(("stop", None))


class FakeSink:
    def __init__(self) -> None:
        self.emitted: list[tuple[str, str | None, dict[str, Any]]] = []

    def emit(self, kind: str, session: str | None, data: Mapping[str, Any]) -> None:
        self.emitted.append((kind, session, dict(data)))


class FakeStore:
    url = "memory:"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.away = False
        self.hints: list[bytes] = []

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("the store is away")

    async def create(self, key: str, data: bytes) -> None:
        self._check()
        if key in self.objects:
            raise AlreadyExists(key)
        self.objects[key] = data

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self._check()
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key][start:][:length]

    async def put_hint(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(int)
        self.hints.append(data)
        self.objects[key] = data

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def list(self, prefix: str) -> list[str]:
        self._check()
        return sorted(k for k in self.objects if k.startswith(prefix))


class FakeTransfer:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.addresses: list[str] = []
        """Where objects were put: at PNodes, or '' for an orchestrator."""

    async def rows(self, peer: PeerId, ref: RowsRef) -> tuple[TensorRef, ...]:
        raise Unreachable("no data service")

    async def get_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, address: str = ""
    ) -> bytes:
        if sha256 not in self.objects:
            raise CorruptObject("it does not hash to its name")
        return self.objects[sha256]

    async def put_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, data: bytes, address: str = ""
    ) -> None:
        self.addresses.append(address)
        self.objects[sha256] = data


class World:
    """One driver over fakes. ``after`` drives it, then the machine is told to shut down."""

    def __init__(self, path: Path, answer: Callable[[Event], list[Effect]] = lambda event: []) -> None:
        self.limits = LIMITS
        self.machine = Script(answer)
        self.table = CountedTable(NumpyBackend())
        self.links = FakeLinks()
        self.sink = FakeSink()
        self.store = FakeStore()
        self.transfer = FakeTransfer()
        self.home = HomeFolder(path)
        self.ports: dict[str, Any] = {}

    def run(self, after: Callable[["World"], Awaitable[None]]) -> int:
        async def main() -> int:
            self.driver = Driver(self.table, self.limits)
            ports = Ports(
                links=self.links,
                home=self.home,
                sink=self.sink,
                store=self.store,
                transfer=self.transfer,
                serialise=lambda copy: bytes(copy),
                **self.ports,
            )
            running = asyncio.create_task(self.driver.run(self.machine, ports))
            await self.until(lambda: self.machine.told)
            await asyncio.wait_for(after(self), 20)
            self.driver.shutdown("test ends")
            return await asyncio.wait_for(running, 20)

        try:
            return asyncio.run(main())
        finally:
            self.home.close()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.to_thread(int)  # A turn of the loop and of the threads that perform effects.

    async def ends_in(self, effect: Effect, *kinds: type[Event]) -> Event:
        """Perform one effect as the machine's answer to a tick, and wait for an event of ``kinds``."""
        seen = len(self.machine.told)
        self.machine.answer = lambda event: [effect] if isinstance(event, Tick) else []
        self.driver.post(Tick())
        await self.until(lambda: any(isinstance(e, kinds) for e in self.machine.told[seen:]))
        return next(e for e in self.machine.told[seen:] if isinstance(e, kinds))


async def nothing(world: World) -> None:
    return None


def test_a_run_begins_with_a_tick_and_ends_with_flushed_links(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.run(nothing) == 0
    assert world.machine.told == [Tick(), Shutdown(reason="test ends")]
    assert world.links.done == [("stop", None)]


def test_events_keep_their_order_and_never_enter_the_machine_twice(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def post(world: World) -> None:
        # A send that reports a broken link at once must not re-enter the machine.
        world.machine.answer = lambda e: [Send(peer=PeerId("b"), message=Leave(reason="x"))] * isinstance(e, LinkUp)
        world.links.send = lambda peer, message: world.driver.link_down(peer, "broken")  # type: ignore[method-assign]
        world.driver.link_up(PeerId("a"), ME, "pnode", "addr")
        world.driver.received(PeerId("a"), ME, Leave(reason="1"))
        world.driver.received(PeerId("a"), ME, Leave(reason="2"))
        await world.until(lambda: any(isinstance(e, LinkDown) for e in world.machine.told))

    assert world.run(post) == 0
    assert world.machine.told[1:-1] == [
        LinkUp(peer=PeerId("a"), incarnation=ME, role="pnode", address="addr"),
        Received(peer=PeerId("a"), incarnation=ME, message=Leave(reason="1")),
        Received(peer=PeerId("a"), incarnation=ME, message=Leave(reason="2")),
        LinkDown(peer=PeerId("b"), reason="broken"),
    ]


def test_the_timer_follows_the_machines_deadline_both_ways(tmp_path: Path) -> None:
    world = World(tmp_path)
    dues: list[float] = []

    def answer(event: Event) -> list[Effect]:
        match event:
            case Received(message=Leave(reason=delay)):
                world.machine.due = world.machine.times[-1] + float(delay)
            case Tick() if world.machine.due is not None:
                dues.append(world.machine.due)
                world.machine.due = None
        return []

    world.machine.answer = answer

    async def drive(world: World) -> None:
        for delay in ("1000", "0.02", "0.05"):  # Far, then sooner, then a little later than the armed timer.
            world.driver.received(PeerId("a"), ME, Leave(reason=delay))
        await world.until(lambda: dues)

    world.run(drive)
    tick = max(i for i, e in enumerate(world.machine.told) if isinstance(e, Tick))
    assert world.machine.times[tick] >= dues[0], "never early"
    assert len(dues) == 1


@pytest.mark.parametrize("broken", ["handle", "effect", "task"])
def test_a_bug_ends_the_process_with_code_70(tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path)

    def answer(event: Event) -> list[Effect]:
        if not isinstance(event, LinkUp):
            return []
        match broken:
            case "handle":
                raise ValueError("planted")
            case "effect":
                return [Effect()]
            case _:
                return [Plan(id=1, problem="p")]

    def plan(problem: Any) -> Any:
        raise ValueError("planted")

    world.machine.answer = answer
    world.ports["plan"] = plan

    async def drive(world: World) -> None:
        world.driver.link_up(PeerId("a"), ME, "pnode", "addr")
        await world.until(lambda: ("stop", None) in world.links.done)

    assert world.run(drive) == EXIT_BUG
    assert not any(isinstance(e, Shutdown) for e in world.machine.told), "no event reaches a machine after a bug"
    assert any(r.levelno == logging.CRITICAL and r.exc_info for r in caplog.records)


def test_links_handles_and_events_are_passed_on(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def drive(world: World) -> None:
        handle = world.table.put("x")
        world.machine.answer = lambda e: (
            [
                Send(peer=PeerId("a"), message=Leave(reason="r")),
                Dial(peer=PeerId("a"), addresses=("h:1",)),
                Close(peer=PeerId("a"), reason="enough"),
                Release(handles=(handle,)),
                Emit(kind="placed", session=SESSION, data={"why": "speed"}),
            ]
            if isinstance(e, LinkUp)
            else []
        )
        world.driver.link_up(PeerId("a"), ME, "pnode", "addr")
        await world.until(lambda: world.sink.emitted)

    world.run(drive)
    assert world.links.done[:3] == [
        ("send a", Leave(reason="r")),
        ("dial a", ("h:1",)),
        ("close a", "enough"),
    ]
    assert world.table.live() == 0
    assert world.sink.emitted == [("placed", "session", {"why": "speed"})]


def test_compute_goes_to_the_named_worker(tmp_path: Path) -> None:
    class Echo:
        def __init__(self, name: str) -> None:
            self.name = name

        def execute(self, task: Any) -> Any:
            return self.name, task

    world = World(tmp_path)
    world.ports["workers"] = (ThreadWorker(Echo("first")), ThreadWorker(Echo("second")))

    async def drive(world: World) -> None:
        assert await world.ends_in(Compute(task=5, worker=1, what="t"), Computed) == Computed(
            task=5, result=("second", "t")
        )

    world.run(drive)


def test_a_queued_task_can_be_cancelled(tmp_path: Path) -> None:
    opened = threading.Event()

    class Gate:
        def execute(self, task: Any) -> Any:
            assert opened.wait(20)

    world = World(tmp_path)
    world.ports["workers"] = (ThreadWorker(Gate()),)

    async def drive(world: World) -> None:
        effects: list[Effect] = [Compute(task=n, worker=0, what="t") for n in (1, 2)]
        world.machine.answer = lambda e: [*effects, Cancel(task=2)] if isinstance(e, LinkUp) else []
        world.driver.link_up(PeerId("a"), ME, "pnode", "addr")
        await world.until(lambda: ComputeFailed(task=2, reason="cancelled") in world.machine.told)
        opened.set()
        await world.until(lambda: Computed(task=1, result=None) in world.machine.told)

    world.run(drive)


def test_a_pnode_registers_before_it_dials_and_keeps_the_name_it_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    answers = {"h:2": "orch", "h:3": "other"}

    async def register(address: str) -> Registered:
        if address not in answers:
            raise Unreachable(f"nobody at {address}")
        descriptor = Descriptor(
            peer=PeerId(answers[address]),
            incarnation=ME,
            role="orchestrator",
            addresses=(address,),
            version_min=1,
            version_max=1,
        )
        return Registered(descriptor=descriptor, heartbeat_interval_s=0.5)

    world.ports["register"] = register
    orchestrator = PeerId("orch")

    async def drive(world: World) -> None:
        down = await world.ends_in(Dial(peer=PeerId(""), addresses=("h:1",)), LinkDown)
        assert down == LinkDown(peer=PeerId(""), reason="h:1: nobody at h:1", address="h:1")
        world.machine.answer = lambda e: [Dial(peer=PeerId(""), addresses=("h:1", "h:2"))] * isinstance(e, Tick)
        world.driver.post(Tick())
        await world.until(lambda: ("dial orch", ("h:2",)) in world.links.done)
        world.machine.answer = lambda e: []
        world.driver.link_down(orchestrator, "refused")
        await world.until(lambda: LinkDown(peer=PeerId(""), reason="refused", address="h:2") in world.machine.told)
        # Once it is known, a dial by its own name registers again; a stranger at its address is reported.
        world.driver.link_up(orchestrator, ME, "orchestrator", "h:2")
        down = await world.ends_in(Dial(peer=orchestrator, addresses=("h:3",)), LinkDown)
        assert down == LinkDown(peer=orchestrator, reason="h:3 is now orchestrator other")
        # A second bootstrap address of a linked orchestrator opens nothing and changes nothing about the link's name.
        up = await world.ends_in(Dial(peer=PeerId(""), addresses=("h:2",)), LinkUp)
        assert up == LinkUp(peer=orchestrator, incarnation=ME, role="orchestrator", address="h:2")
        world.machine.answer = lambda e: []
        world.driver.link_down(orchestrator, "broken")
        await world.until(lambda: LinkDown(peer=orchestrator, reason="broken") in world.machine.told)

    world.run(drive)
    assert ("dial other", ("h:3",)) in world.links.done


def test_what_a_pnode_persists_and_keeps(tmp_path: Path) -> None:
    world = World(tmp_path)
    data = b"state"
    sha256 = Sha256(hashlib.sha256(data).hexdigest())
    common: dict[str, Any] = {"id": 1, "peer": PeerId("o"), "session": SESSION, "sha256": sha256, "token": "t"}
    ended = Persisted, PersistFailed, Kept, Uploaded, Downloaded, TransferFailed

    async def drive(world: World) -> None:
        assert await world.ends_in(Persist(key="fence.json", data=b"{}"), *ended) == Persisted(key="fence.json")
        handle = world.table.put(bytearray(data))
        kept = await world.ends_in(Keep(id=1, session=SESSION, handle=handle), *ended)
        assert kept == Kept(id=1, sha256=sha256, size_bytes=5)
        assert world.table.live() == 0, "Keep takes over its handle's count"
        assert await world.ends_in(Upload(size_bytes=5, **common), *ended) == Uploaded(id=1)
        got = await world.ends_in(Download(size_bytes=5, **common), *ended)
        assert isinstance(got, Downloaded)
        assert got.local
        world.machine.answer = lambda e: [Discard(session=SESSION, keep=())] * isinstance(e, Tick)
        world.driver.post(Tick())
        while await asyncio.to_thread(world.home.snapshot, SESSION, sha256) is not None:
            pass
        got = await world.ends_in(Download(size_bytes=5, **common), *ended)
        assert isinstance(got, Downloaded)
        assert not got.local
        assert world.table.get(got.handle) == data
        world.transfer.objects.clear()
        for effect in (Download(size_bytes=5, **common), Upload(size_bytes=5, **common)):
            assert isinstance(await world.ends_in(effect, *ended), TransferFailed)

    world.run(drive)
    assert (tmp_path / "fence.json").read_bytes() == b"{}"


def test_what_is_kept_for_others_is_found_at_home_and_discarded_by_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    own, foreign = b"own", b"foreign"
    names = {data: Sha256(hashlib.sha256(data).hexdigest()) for data in (own, foreign)}
    common: dict[str, Any] = {"id": 1, "peer": PeerId("o"), "session": SESSION, "token": "t"}
    ended = Kept, Uploaded, Downloaded, TransferFailed
    admitted: list[tuple[SessionId, str]] = []
    world.ports["admit"] = lambda session, token: admitted.append((session, token))

    async def drive(world: World) -> None:
        keep = Keep(id=1, session=SESSION, handle=world.table.put(bytearray(own)))
        assert await world.ends_in(keep, *ended) == Kept(id=1, sha256=names[own], size_bytes=3)
        await asyncio.to_thread(world.home.keep_guarded, SESSION, names[foreign], foreign)
        got = await world.ends_in(Download(size_bytes=7, sha256=names[foreign], address="p:1", **common), *ended)
        assert isinstance(got, Downloaded)
        assert got.local
        put = Upload(size_bytes=3, sha256=names[own], address="p:1", **common)
        assert await world.ends_in(put, *ended) == Uploaded(id=1)
        effects: list[Effect] = [Admit(session=SESSION, token="t"), Discard(session=SESSION, keep=(), guarded=True)]
        world.machine.answer = lambda e: effects * isinstance(e, Tick)
        world.driver.post(Tick())
        while await asyncio.to_thread(world.home.guarded, SESSION, names[foreign]) is not None:
            pass

    world.run(drive)
    assert world.transfer.addresses == ["p:1"]
    assert admitted == [(SESSION, "t")]
    assert world.home.snapshot(SESSION, names[own]) == own


def test_a_failed_write_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)

    def full(key: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    world.home.persist = full  # type: ignore[method-assign]

    async def drive(world: World) -> None:
        failed = await world.ends_in(Persist(key="fence.json", data=b""), Persisted, PersistFailed)
        assert isinstance(failed, PersistFailed)
        assert "No space left" in failed.reason

    world.run(drive)


def test_rows_by_reference_and_by_value(tmp_path: Path) -> None:
    world = World(tmp_path)
    inline = InlineTensor(column="tokens", shape=(1, 2), dtype="int64", data=(7).to_bytes(8, "little") * 2)
    short = InlineTensor(column="tokens", shape=(1, 2), dtype="int64", data=b"123")
    ref: Any = RowsRef(dataset="d", split="train", context=2, rows=(0,), columns=("tokens",), token="t")  # type: ignore[arg-type]

    async def drive(world: World) -> None:
        fetched = await world.ends_in(Fetch(id=1, peer=PeerId("o"), ref=(inline,)), Fetched, TransferFailed)
        assert isinstance(fetched, Fetched)
        assert world.table.get(fetched.tensors[0].handle).tolist() == [[7, 7]]
        huge, unknown = replace(inline, shape=(1 << 40, 1 << 40)), replace(inline, dtype="complex3")
        for bad in (ref, (short,), (huge,), (replace(inline, shape=(-1, 2)),), (unknown,)):
            failed = await world.ends_in(Fetch(id=2, peer=PeerId("o"), ref=bad), Fetched, TransferFailed)
            assert isinstance(failed, TransferFailed)

    world.run(drive)


def test_store_effects(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limits = Limits(chunk_bytes=4)
    ended = StoreCreated, StoreTaken, StoreFailed, StoreGot, StoreListed, StoreChecked
    good = b"12345678"
    keys = [f"s/objects/{hashlib.sha256(b).hexdigest()}.safetensors" for b in (good, b"damaged", b"missing")]

    async def drive(world: World) -> None:
        create = StoreCreate(id=1, key="log/1", data=b"mine")
        assert await world.ends_in(create, *ended) == StoreCreated(id=1)
        again = StoreCreate(id=2, key="log/1", data=b"other")
        assert await world.ends_in(again, *ended) == StoreTaken(id=2, data=b"mine")
        assert await world.ends_in(StoreGet(id=3, key="log/1"), *ended) == StoreGot(id=3, data=b"mine")
        assert await world.ends_in(StoreGet(id=4, key="log/2"), *ended) == StoreGot(id=4, data=None)
        assert await world.ends_in(StoreList(id=5, prefix="log/"), *ended) == StoreListed(id=5, keys=("log/1",))
        world.store.objects |= {keys[0]: good, keys[1]: b"other bytes"}
        checked = await world.ends_in(StoreCheck(id=6, keys=tuple(keys)), *ended)
        assert isinstance(checked, StoreChecked)
        assert dict(checked.damaged) == {
            keys[1]: f"its bytes hash to {hashlib.sha256(b'other bytes').hexdigest()}",
            keys[2]: "missing",
        }
        world.machine.answer = lambda e: [StoreDelete(keys=("log/1", "log/9"))] * isinstance(e, Tick)
        world.driver.post(Tick())
        await world.until(lambda: "log/1" not in world.store.objects)
        world.store.away = True
        for effect in (create, StoreGet(id=7, key="x"), StoreList(id=8, prefix="x"), StoreCheck(id=9, keys=(keys[0],))):
            assert isinstance(await world.ends_in(effect, *ended), StoreFailed), "a store that is away damages nothing"

    world.run(drive)


def test_of_the_hints_that_wait_only_the_newest_is_written(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def drive(world: World) -> None:
        hints: list[Effect] = [StoreHint(key="log/HEAD", data=b"%d" % n) for n in range(50)]
        world.machine.answer = lambda e: hints if isinstance(e, LinkUp) else []
        world.driver.link_up(PeerId("a"), ME, "pnode", "addr")
        await world.until(lambda: world.store.objects.get("log/HEAD") == b"49")

    world.run(drive)
    assert len(world.store.hints) <= 2


def test_the_planner_runs_outside_the_loop(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.ports["plan"] = lambda problem: f"{problem} solved"

    async def drive(world: World) -> None:
        assert await world.ends_in(Plan(id=1, problem="p"), Planned) == Planned(id=1, answer="p solved")

    world.run(drive)


def test_client_calls(tmp_path: Path) -> None:
    world = World(tmp_path)
    status = Status(
        descriptor=Descriptor(
            peer=PeerId("o"), incarnation=ME, role="orchestrator", addresses=(), version_min=1, version_max=1
        ),
        uptime_s=0.0,
        nodes=0,
        sessions_running=0,
        sessions=0,
        store="",
        resident_bytes=0,
    )
    answered = Controlled(session=SESSION, state="stopped")
    world.ports["complete"] = lambda message: answered if message == status else message
    world.machine.answer = lambda e: [Respond(id=e.id, message=status)] if isinstance(e, Request) else []

    async def drive(world: World) -> None:
        assert await world.driver.call(GetStatus()) == answered
        world.machine.answer = lambda e: []
        waiting = asyncio.create_task(world.driver.call(GetStatus()))
        await world.until(lambda: sum(isinstance(e, Request) for e in world.machine.told) == 2)
        world.driver.shutdown("while a call waits")
        assert await waiting == Refusal(kind="Unavailable", reason="the process is ending")

    world.run(drive)


def test_a_call_that_nobody_answers_ends(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limits = Limits(request_timeout_s=0.01)

    async def drive(world: World) -> None:
        reply = await world.driver.call(GetStatus())
        assert reply == Refusal(kind="Unavailable", reason="no answer to GetStatus within 0.01 s")

    world.run(drive)


def test_streams_end_with_their_last_message_or_with_their_client(tmp_path: Path) -> None:
    world = World(tmp_path)

    def numbers(event: Event) -> list[Effect]:
        if not isinstance(event, Request):
            return []
        return [Respond(id=event.id, message=Leave(reason=str(n)), last=n == 2) for n in range(3)]

    world.machine.answer = numbers

    async def drive(world: World) -> None:
        assert [m async for m in world.driver.stream(GetStatus())] == [Leave(reason=str(n)) for n in range(3)]
        assert not any(isinstance(e, RequestGone) for e in world.machine.told)
        stream = world.driver.stream(GetStatus())
        assert await anext(stream) == Leave(reason="0")
        await stream.aclose()  # type: ignore[attr-defined]
        await world.until(lambda: RequestGone(id=2) in world.machine.told)

    world.run(drive)


def test_a_client_that_reads_too_slowly_is_dropped_with_a_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limits = Limits(client_queue=3)
    world.machine.answer = lambda e: (
        [Respond(id=e.id, message=Leave(reason="x"), last=False) for _ in range(10)] if isinstance(e, Request) else []
    )

    async def drive(world: World) -> None:
        got = [m async for m in world.driver.stream(GetStatus())]
        assert len(got) == 4
        assert got[-1] == Refusal(kind="Unavailable", reason="the client is more than 3 messages behind")
        await world.until(lambda: RequestGone(id=1) in world.machine.told)

    world.run(drive)


def test_memory_goes_back_when_a_session_has_ended(tmp_path: Path) -> None:
    """Only then: a running one would fault its pages in again at once."""
    world = World(tmp_path)
    returned: list[str] = []
    world.ports["return_memory"] = lambda: returned.append("now")

    async def discarded(world: World, keep: tuple[Sha256, ...]) -> None:
        world.machine.answer = lambda e: [Discard(session=SESSION, keep=keep)] * isinstance(e, Tick)
        world.driver.post(Tick())
        await asyncio.to_thread(int)
        await world.ends_in(Keep(id=1, session=SESSION, handle=world.table.put(bytearray(b"x"))), Kept)

    async def drive(world: World) -> None:
        await discarded(world, (Sha256("0" * 64),))
        await discarded(world, ())
        await world.until(lambda: returned)
        await discarded(world, (Sha256("0" * 64),))

    world.run(drive)
    assert returned == ["now"]
