"""The asyncio shell around one machine: it queues events, performs effects and arms one timer.

Everything that decides is in the machine; nothing here does. The driver owns the loop's side of a process:
an ordered queue of events, one :class:`~dcnr.machine.Tick` timer, the tasks that perform effects, and the futures of
clients that wait. Events that effects cause while the machine's answer is being performed wait their turn in the queue, so
that a machine is never entered twice.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dcnr.config import Limits
from dcnr.errors import AlreadyExists, CorruptObject, DCNRError, NotFound, StoreError, Unreachable
from dcnr.ids import Incarnation, PeerId, SessionId, Sha256
from dcnr.machine import (
    Admit,
    Cancel,
    Close,
    Compute,
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
    Machine,
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
    StoreCopy,
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
from dcnr.protocol.messages import InlineTensor, Message, Refusal, Registered, RowsRef, TensorFrame
from dcnr.runtime.ports import EventSink, Home, Links, ObjectTransfer, Store
from dcnr.runtime.tensors import CountedTable
from dcnr.runtime.worker import ThreadWorker

logger = logging.getLogger(__name__)

EXIT_BUG = 70
"""Exit code after an exception in a machine or in the driver itself (EX_SOFTWARE of sysexits.h)."""


def _unchanged(message: Message) -> Message:
    return message


def _accept(peer: PeerId, frame: TensorFrame) -> str | None:
    return None


@dataclass(slots=True, kw_only=True)
class Ports:
    """The world of one role. What a role has no effect for is left out; using it would be our own bug."""

    links: Links
    home: Home
    sink: EventSink
    workers: Sequence[ThreadWorker] = ()
    check_frame: Callable[[PeerId, TensorFrame], str | None] = _accept
    complete: Callable[[Message], Message] = _unchanged
    """Fills in of a reply what a machine cannot know: resident memory."""
    # A PNode's.
    transfer: ObjectTransfer | None = None
    serialise: Callable[[Any], bytes] | None = None
    """Bytes of a snapshot copy, the same for the same tensors."""
    return_memory: Callable[[], None] | None = None
    """Called when a session has ended here: what it held goes back to the machine."""
    admit: Callable[[SessionId, str], None] | None = None
    """Lets other PNodes leave states of a session here, and get them back, with a token."""
    register: Callable[[str], Awaitable[Registered]] | None = None
    """The unary call ``Membership.Register`` at an address."""
    # An orchestrator's.
    store: Store | None = None
    plan: Callable[[Any], Any] | None = None
    """The pure planner, run in a thread."""


@dataclass(slots=True)
class _Stream:
    """A streaming client. The queue's bound is what makes a slow client its own problem."""

    queue: asyncio.Queue[tuple[Message, bool]]
    overrun: bool = False


@dataclass(slots=True)
class _Waiting:
    calls: dict[int, asyncio.Future[Message]] = field(default_factory=dict)
    streams: dict[int, _Stream] = field(default_factory=dict)


class Driver:
    """Runs one machine until it emits ``Exit``. Implements ``LinkEvents`` and ``ClientCalls``.

    Built before the adapters that report to it, and before the machine, which must know the address that they bound;
    :meth:`run` gets all of them. What is reported earlier waits.
    """

    def __init__(self, table: CountedTable, limits: Limits) -> None:
        self.table = table
        self._limits = limits
        self._events: deque[Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = _Waiting()
        self._last_request = 0
        self._hints: dict[str, bytes] = {}
        self._orchestrators: dict[PeerId, str] = {}
        """Those that answered, and the address where they last did."""
        self._linked: dict[PeerId, LinkUp] = {}
        self._asked_for: dict[PeerId, list[tuple[PeerId, str]]] = {}
        """Orchestrators that are being dialled: the names and addresses under which the machine asked for each."""
        self.joined = asyncio.Event()
        """Set at the first link to an orchestrator: a PNode is of use from then on."""
        self._ports: Ports | None = None
        self._exit: asyncio.Future[Exit] | None = None

    # --- life ----------------------------------------------------------------------------------------------

    async def run(self, machine: Machine, ports: Ports) -> int:
        """Drive the machine to its ``Exit``; returns the process's exit code, 70 after a bug."""
        self._machine = machine
        self._ports = ports
        self._loop = asyncio.get_running_loop()
        self._exit = self._loop.create_future()
        # One thread each, so that writes keep their order; two, so that a fence never waits behind a snapshot.
        self._fences = concurrent.futures.ThreadPoolExecutor(1, "fences")
        self._snapshots = concurrent.futures.ThreadPoolExecutor(1, "snapshots")
        try:
            for worker in ports.workers:
                worker.start(self._loop, self.post)
            self._events.appendleft(Tick())
            self._wake()
            last = await self._exit
        finally:
            await self._end(ports)
        logger.info("exit %d: %s", last.code, last.reason)
        return last.code

    async def _end(self, ports: Ports) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for future in self._waiting.calls.values():
            if not future.done():
                future.set_result(Refusal(kind="Unavailable", reason="the process is ending"))
        for stream in self._waiting.streams.values():
            _offer_last(stream, Refusal(kind="Unavailable", reason="the process is ending"))
        await ports.links.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in ports.workers:
            if not await asyncio.to_thread(worker.stop, self._limits.link_grace_s):
                logger.warning("a compute task was still running at the end")
        self._fences.shutdown(wait=True)
        self._snapshots.shutdown(wait=True, cancel_futures=True)

    def shutdown(self, reason: str) -> None:
        """Ask the machine to end (SIGTERM, Ctrl-C). Call it on the loop's thread."""
        self.post(Shutdown(reason=reason))

    # --- events in -----------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Queue an event. Call it on the loop's thread."""
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._exit is not None and not self._draining:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        # Only what is there now: what comes meanwhile gets the next turn, so that the loop's other work goes on.
        for _ in range(len(self._events)):
            if self._exit is None or self._exit.done():
                self._events.clear()
                break
            event = self._events.popleft()
            try:
                for effect in self._machine.handle(Instant(self._loop.time()), event):
                    self._perform(effect)
            except Exception as error:  # A machine never goes on after a bug; nor does its driver.
                self._crash(f"handling {event!r:.2000}", error)
                break
        self._draining = False
        if self._events:
            self._wake()
        else:
            self._arm()

    def _arm(self) -> None:
        """Keep one timer at or before the machine's deadline. A later deadline leaves the timer: it re-arms when it fires."""
        deadline = self._machine.deadline()
        if deadline is None or self._exit is None or self._exit.done():
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._fire)

    def _fire(self) -> None:
        self._timer = None
        deadline = self._machine.deadline()
        if deadline is not None and deadline <= self._loop.time():
            self.post(Tick())
        else:
            self._arm()

    def _crash(self, context: str, error: BaseException) -> None:
        logger.critical("bug while %s", context, exc_info=error)
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(Exit(code=EXIT_BUG, reason=f"{type(error).__name__} while {context:.200}"))

    # --- LinkEvents ----------------------------------------------------------------------------------------

    def link_up(self, peer: PeerId, incarnation: Incarnation, role: str, address: str) -> None:
        up = LinkUp(peer=peer, incarnation=incarnation, role=role, address=address)
        self._linked[peer] = up
        if role == "orchestrator":
            self._orchestrators[peer] = address
            self.joined.set()
        self.post(up)
        for _, asked in self._asked_for.pop(peer, ()):
            if asked != address:  # Two addresses of one orchestrator: both dials end here.
                self.post(replace(up, address=asked))

    def link_down(self, peer: PeerId, reason: str) -> None:
        # A failed dial is reported under the name that the machine used: it may not know the real one yet.
        self._linked.pop(peer, None)
        for name, address in self._asked_for.pop(peer, [(peer, "")]):
            self.post(LinkDown(peer=name, reason=reason, address=address))

    def received(self, peer: PeerId, incarnation: Incarnation, message: Message) -> None:
        self.post(Received(peer=peer, incarnation=incarnation, message=message))

    def check_frame(self, peer: PeerId, frame: TensorFrame) -> str | None:
        return "the process is starting" if self._ports is None else self._ports.check_frame(peer, frame)

    def orchestrator_address(self, peer: PeerId) -> str:
        """Where an orchestrator was last met; :class:`Unreachable` for one that never was."""
        if peer not in self._orchestrators:
            raise Unreachable(f"the address of orchestrator {peer} is not known")
        return self._orchestrators[peer]

    # --- ClientCalls ---------------------------------------------------------------------------------------

    async def call(self, message: Message) -> Message:
        """Answered by one ``Respond``; a machine that stays silent for ``request_timeout_s`` counts as unavailable."""
        id = self._next_request()
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting.calls[id] = future
        self.post(Request(id=id, message=message))
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                return await future
        except TimeoutError:
            reason = f"no answer to {type(message).__name__} within {self._limits.request_timeout_s:g} s"
            return Refusal(kind="Unavailable", reason=reason)
        finally:
            del self._waiting.calls[id]

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        """Ends after the message that ``Respond.last`` marks, or with a Refusal for a client that reads too slowly."""
        id = self._next_request()
        stream = _Stream(asyncio.Queue(self._limits.client_queue + 1))  # + 1: room for the farewell.
        self._waiting.streams[id] = stream
        self.post(Request(id=id, message=message))
        ended = False
        try:
            while not ended:
                reply, ended = await stream.queue.get()
                yield reply
        finally:
            del self._waiting.streams[id]
            if not ended or stream.overrun:
                self.post(RequestGone(id=id))

    def _next_request(self) -> int:
        self._last_request += 1
        return self._last_request

    def _respond(self, id: int, message: Message, last: bool) -> None:
        message = self._world.complete(message)
        future = self._waiting.calls.get(id)
        if future is not None:
            if not future.done():
                future.set_result(message)
            return
        stream = self._waiting.streams.get(id)
        if stream is None or stream.overrun:
            return  # The client went away; RequestGone is on its way.
        if stream.queue.qsize() >= self._limits.client_queue:
            stream.overrun = True
            reason = f"the client is more than {self._limits.client_queue} messages behind"
            _offer_last(stream, Refusal(kind="Unavailable", reason=reason))
            return
        stream.queue.put_nowait((message, last))

    # --- effects out ---------------------------------------------------------------------------------------

    @property
    def _world(self) -> Ports:
        assert self._ports is not None, "run() has not begun"
        return self._ports

    def _perform(self, effect: Effect) -> None:
        ports = self._world
        match effect:
            case Send(peer=peer, message=message):
                ports.links.send(peer, message)
            case Release(handles=handles):
                for handle in handles:
                    self.table.release(handle)
            case Compute(task=task, worker=number, what=what):
                ports.workers[number].submit(task, what)
            case Cancel(task=task):
                for worker in ports.workers:
                    worker.cancel(task)
            case Emit(kind=kind, session=session, data=data):
                ports.sink.emit(kind, session, data)
            case Dial(peer=peer, addresses=addresses):
                if peer == "" or peer in self._orchestrators:
                    self._start(self._register_and_dial(peer, addresses), effect)
                else:
                    ports.links.dial(peer, addresses)
            case Close(peer=peer, reason=reason):
                self._linked.pop(peer, None)
                self._asked_for.pop(peer, None)
                ports.links.close(peer, reason)
            case Persist(key=key, data=data):
                self._start(self._persist(key, data), effect)
            case Exit():
                assert self._exit is not None
                if not self._exit.done():
                    self._exit.set_result(effect)
            case Download():
                self._start(self._download(effect), effect)
            case Keep():
                self._start(self._keep(effect), effect)
            case Upload():
                self._start(self._upload(effect), effect)
            case Fetch(id=id, peer=peer, ref=RowsRef() as rows):
                self._start(self._fetch(id, peer, rows), effect)
            case Fetch(id=id, ref=tuple() as values):
                self._fetch_inline(id, values)
            case Discard(session=session, keep=keep, guarded=guarded):
                self._start(self._discard(session, frozenset(keep), guarded), effect)
            case Admit(session=session, token=token):
                assert ports.admit is not None
                ports.admit(session, token)
            case StoreCreate(id=id, key=key, data=data):
                self._start(self._store_create(id, key, data), effect)
            case StoreGet(id=id, key=key):
                self._start(self._store_get(id, key), effect)
            case StoreList(id=id, prefix=prefix):
                self._start(self._store_list(id, prefix), effect)
            case StoreCheck(id=id, keys=keys):
                self._start(self._store_check(id, keys), effect)
            case StoreCopy(id=id, pairs=pairs):
                self._start(self._store_copy(id, pairs), effect)
            case StoreDelete(keys=keys):
                self._start(self._store_delete(keys), effect)
            case StoreHint(key=key, data=data):
                self._store_hint(key, data, effect)
            case Plan(id=id, problem=problem):
                self._start(self._plan(id, problem), effect)
            case Respond(id=id, message=message, last=last):
                self._respond(id, message, last)
            case _:
                raise AssertionError(f"unknown effect {effect!r:.500}")

    def _start(self, work: Coroutine[Any, Any, None], effect: Effect) -> None:
        """The driver owns the task: an exception that the work does not map to an event is a bug of ours."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._crash(f"performing {type(effect).__name__}", error)

        task.add_done_callback(ended)

    # --- a PNode's effects ---------------------------------------------------------------------------------

    async def _register_and_dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Register at the first address that answers, then dial the orchestrator that answered there."""
        register = self._world.register
        assert register is not None
        reason = "no address"
        for address in addresses:
            try:
                orchestrator = (await register(address)).descriptor.peer
            except DCNRError as error:
                reason = f"{address}: {error}"
                continue
            self._orchestrators[orchestrator] = address
            if peer not in ("", orchestrator):
                reason = f"{address} is now orchestrator {orchestrator}"
                self.post(LinkDown(peer=peer, reason=reason))
            elif orchestrator in self._linked:
                # Another address of an orchestrator whose link is open: a dial ends in LinkUp or LinkDown.
                self.post(replace(self._linked[orchestrator], address=address))
                return
            else:
                self._asked_for.setdefault(orchestrator, []).append((peer, address))
            self._world.links.dial(orchestrator, (address,))
            return
        self.post(LinkDown(peer=peer, reason=reason, address=addresses[0] if addresses else ""))

    async def _persist(self, key: str, data: bytes) -> None:
        try:
            await self._loop.run_in_executor(self._fences, self._world.home.persist, key, data)
        except OSError as error:
            self.post(PersistFailed(key=key, reason=str(error)))
        else:
            self.post(Persisted(key=key))

    async def _download(self, effect: Download) -> None:
        ports = self._world
        assert ports.transfer is not None
        try:
            data = await asyncio.to_thread(self._at_home, effect)
            local = data is not None
            if data is None:
                data = await ports.transfer.get_object(
                    effect.peer, effect.session, effect.sha256, effect.token, effect.address
                )
        except (DCNRError, OSError) as error:
            self.post(TransferFailed(id=effect.id, reason=str(error)))
        else:
            self.post(Downloaded(id=effect.id, handle=self.table.put(data), local=local))

    def _at_home(self, effect: Download) -> bytes | None:
        home = self._world.home
        found = home.snapshot(effect.session, effect.sha256)
        return home.guarded(effect.session, effect.sha256) if found is None else found

    async def _keep(self, effect: Keep) -> None:
        ports, id, handle = self._world, effect.id, effect.handle
        serialise = ports.serialise
        assert serialise is not None

        def keep() -> tuple[Sha256, int]:
            try:
                data = serialise(self.table.get(handle))
            finally:
                self.table.release(handle)
            sha256 = Sha256(hashlib.sha256(data).hexdigest())
            ports.home.keep_snapshot(effect.session, sha256, data)
            return sha256, len(data)

        try:
            sha256, size_bytes = await self._loop.run_in_executor(self._snapshots, keep)
        except (DCNRError, OSError) as error:
            self.post(TransferFailed(id=id, reason=str(error)))
        else:
            self.post(Kept(id=id, sha256=sha256, size_bytes=size_bytes))

    async def _upload(self, effect: Upload) -> None:
        ports = self._world
        assert ports.transfer is not None
        try:
            # Whoever takes it hashes it.
            read = partial(ports.home.snapshot, effect.session, effect.sha256, checked=False)
            data = await asyncio.to_thread(read)
            if data is None:
                raise CorruptObject(f"the kept snapshot {effect.sha256} is missing")
            await ports.transfer.put_object(
                effect.peer, effect.session, effect.sha256, effect.token, data, effect.address
            )
        except (DCNRError, OSError) as error:
            self.post(TransferFailed(id=effect.id, reason=str(error)))
        else:
            self.post(Uploaded(id=effect.id))

    def _fetch_inline(self, id: int, values: tuple[InlineTensor, ...]) -> None:
        try:
            tensors = tuple(self._inline(value) for value in values)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            self.post(TransferFailed(id=id, reason=f"malformed inline tensor: {error}"))
        else:
            self.post(Fetched(id=id, tensors=tensors))

    def _inline(self, value: InlineTensor) -> TensorRef:
        tensor = self.table.backend.empty(value.shape, value.dtype)
        self.table.backend.view(tensor)[:] = value.data
        return TensorRef(handle=self.table.put(tensor), shape=value.shape, dtype=value.dtype)

    async def _fetch(self, id: int, peer: PeerId, ref: RowsRef) -> None:
        transfer = self._world.transfer
        assert transfer is not None
        try:
            tensors = await transfer.rows(peer, ref)
        except DCNRError as error:
            self.post(TransferFailed(id=id, reason=str(error)))
        else:
            self.post(Fetched(id=id, tensors=tensors))

    async def _discard(self, session: SessionId, keep: frozenset[Sha256], guarded: bool) -> None:
        home = self._world.home
        discard = home.discard_guarded if guarded else home.discard_snapshots
        try:
            await self._loop.run_in_executor(self._snapshots, discard, session, keep)
        except OSError as error:
            logger.warning("snapshots of session %s were not discarded: %s", session, error)
        if not keep and not guarded and self._world.return_memory is not None:
            await self._loop.run_in_executor(self._snapshots, self._world.return_memory)

    # --- an orchestrator's effects -------------------------------------------------------------------------

    @property
    def _store(self) -> Store:
        store = self._world.store
        assert store is not None
        return store

    async def _store_create(self, id: int, key: str, data: bytes) -> None:
        try:
            await self._store.create(key, data)
        except AlreadyExists:
            await self._store_taken(id, key)
        except StoreError as error:
            self.post(StoreFailed(id=id, reason=str(error)))
        else:
            self.post(StoreCreated(id=id))

    async def _store_taken(self, id: int, key: str) -> None:
        try:
            self.post(StoreTaken(id=id, data=await self._store.get(key)))
        except StoreError as error:
            self.post(StoreFailed(id=id, reason=f"{key} is taken and cannot be read: {error}"))

    async def _store_get(self, id: int, key: str) -> None:
        try:
            self.post(StoreGot(id=id, data=await self._store.get(key)))
        except NotFound:
            self.post(StoreGot(id=id, data=None))
        except StoreError as error:
            self.post(StoreFailed(id=id, reason=str(error)))

    async def _store_list(self, id: int, prefix: str) -> None:
        try:
            self.post(StoreListed(id=id, keys=tuple(await self._store.list(prefix))))
        except StoreError as error:
            self.post(StoreFailed(id=id, reason=str(error)))

    async def _store_check(self, id: int, keys: tuple[str, ...]) -> None:
        damaged: dict[str, str] = {}
        for key in keys:
            name = key.rsplit("/", 1)[-1].split(".", 1)[0]
            try:
                found = await self._hash_object(key)
            except NotFound:
                damaged[key] = "missing"
            except CorruptObject as error:
                damaged[key] = str(error)
            except StoreError as error:  # A store that is away has damaged nothing.
                self.post(StoreFailed(id=id, reason=str(error)))
                return
            else:
                if found != name:
                    damaged[key] = f"its bytes hash to {found}"
        self.post(StoreChecked(id=id, damaged=damaged))

    async def _store_copy(self, id: int, pairs: tuple[tuple[str, str], ...]) -> None:
        damaged: dict[str, str] = {}
        for source, target in pairs:
            name = Sha256(target.rsplit("/", 1)[-1].split(".", 1)[0])
            try:
                await self._store.create_from(target, self._pieces(source), name)
            except AlreadyExists:
                continue  # Of the same bytes: a name is its hash.
            except NotFound:
                damaged[source] = "missing"
            except CorruptObject as error:
                damaged[source] = str(error)
            except StoreError as error:
                self.post(StoreFailed(id=id, reason=str(error)))
                return
        self.post(StoreChecked(id=id, damaged=damaged))

    async def _pieces(self, key: str) -> AsyncGenerator[bytes, None]:
        start = 0
        while piece := await self._store.get(key, start, self._limits.chunk_bytes):
            yield piece
            start += len(piece)

    async def _hash_object(self, key: str) -> str:
        """Read piece by piece: an orchestrator has no room for a whole state object."""
        digest = hashlib.sha256()
        start = 0
        while True:
            piece = await self._store.get(key, start, self._limits.chunk_bytes)
            await asyncio.to_thread(digest.update, piece)
            start += len(piece)
            if len(piece) < self._limits.chunk_bytes:
                return digest.hexdigest()

    async def _store_delete(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            try:
                await self._store.delete(key)
            except StoreError as error:
                logger.warning("%s was not deleted: %s", key, error)

    def _store_hint(self, key: str, data: bytes, effect: Effect) -> None:
        """One write per key at a time; of those that wait only the newest is written."""
        under_way = key in self._hints
        self._hints[key] = data
        if not under_way:
            self._start(self._write_hint(key), effect)

    async def _write_hint(self, key: str) -> None:
        written: bytes | None = None
        while (data := self._hints[key]) is not written:
            written = data
            try:
                await self._store.put_hint(key, data)
            except StoreError as error:
                logger.info("hint %s was not written: %s", key, error)
        del self._hints[key]

    async def _plan(self, id: int, problem: Any) -> None:
        plan = self._world.plan
        assert plan is not None
        self.post(Planned(id=id, answer=await asyncio.to_thread(plan, problem)))


def _offer_last(stream: _Stream, message: Message) -> None:
    with contextlib.suppress(asyncio.QueueFull):  # Its farewell is in the queue already.
        stream.queue.put_nowait((message, True))
