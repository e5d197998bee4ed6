"""What the driver needs from the world. Adapters implement these; the simulator replaces them all at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dcnr.ids import Incarnation, PeerId, SessionId, Sha256
from dcnr.machine import Handle, TensorRef
from dcnr.protocol.messages import Message, RowsRef, TensorFrame


class TensorBackend(Protocol):
    """Makes tensors of one library (torch on a PNode, numpy on an orchestrator) from and into bytes."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A fresh, aligned, contiguous, uninitialised tensor."""
        ...

    def view(self, tensor: Any) -> memoryview:
        """Its bytes, writable, without a copy; little endian, row-major."""
        ...


class TensorTable(Protocol):
    """The driver's counted table behind handles. Thread-safe: compute threads put and get."""

    backend: TensorBackend

    def put(self, value: Any, count: int = 1) -> Handle: ...

    def get(self, handle: Handle) -> Any:
        """Raises ``KeyError`` for a handle that was released: our own bug."""
        ...

    def hold(self, handle: Handle) -> None:
        """One more count."""
        ...

    def release(self, handle: Handle) -> None:
        """One count less; the value is dropped with the last."""
        ...


class LinkEvents(Protocol):
    """What the link adapter tells the driver, on the loop's thread."""

    def link_up(self, peer: PeerId, incarnation: Incarnation, role: str, address: str) -> None: ...

    def link_down(self, peer: PeerId, reason: str) -> None: ...

    def received(self, peer: PeerId, incarnation: Incarnation, message: Message) -> None: ...

    def check_frame(self, peer: PeerId, frame: TensorFrame) -> str | None:
        """Asked with a frame's header (handle 0) before a byte of it is kept; a reason refuses its bytes.

        A refused frame is handed to :meth:`received` as it is, with handle 0, so that the machine answers it.
        """
        ...


class Links(Protocol):
    """One bidirectional stream per pair of peers. All methods return at once."""

    def send(self, peer: PeerId, message: Message) -> None:
        """Queue; control messages overtake tensor chunks; dropped where there is no link."""
        ...

    def dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None: ...

    def close(self, peer: PeerId, reason: str) -> None: ...

    async def stop(self) -> None:
        """Flush control frames for a moment, then end every link and the server."""
        ...


class Executor(Protocol):
    """Runs one compute task to its end on the calling thread (``dcnr.pnode.tasks``)."""

    def execute(self, task: Any) -> Any: ...


class ObjectTransfer(Protocol):
    """A PNode's or client's side of the data service. Raises the error tree; retries inside, within ``timeout_s``."""

    async def rows(self, peer: PeerId, ref: RowsRef) -> tuple[TensorRef, ...]: ...

    async def get_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, address: str = ""
    ) -> bytes:
        """Checked against its sha256. ``address``: of another PNode; there is no second try then."""
        ...

    async def put_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, data: bytes, address: str = ""
    ) -> None:
        """``address``: of another PNode; there is no second try then."""
        ...


class Home(Protocol):
    """A process's own folder: its name, boot counter, fences and kept snapshots. Calls block; the driver runs them in a thread."""

    def persist(self, key: str, data: bytes) -> None:
        """Atomic and fsynced (file and folder)."""
        ...

    def load(self, key: str) -> bytes | None: ...

    def keep_snapshot(self, session: SessionId, sha256: Sha256, data: bytes) -> None:
        """Whole or not at all; not fsynced."""
        ...

    def snapshot(self, session: SessionId, sha256: Sha256, *, checked: bool = True) -> bytes | None:
        """``None`` where it is missing or does not hash to its name (then it is deleted). Not ``checked``: for who
        hands it to somebody who does."""
        ...

    def discard_snapshots(self, session: SessionId, keep: frozenset[Sha256]) -> None: ...

    def keep_guarded(self, session: SessionId, sha256: Sha256, data: bytes) -> None: ...

    def guarded(self, session: SessionId, sha256: Sha256) -> bytes | None: ...

    def discard_guarded(self, session: SessionId, keep: frozenset[Sha256]) -> None:
        """Of what is kept for other PNodes."""
        ...


class Store(Protocol):
    """An S3-like object store. Names are '/'-separated. Raises the :class:`~dcnr.errors.StoreError` branch."""

    url: str

    async def create(self, key: str, data: bytes) -> None:
        """Create-only and durable. :class:`AlreadyExists` where the name is taken."""
        ...

    async def create_from(self, key: str, chunks: AsyncIterator[bytes], sha256: Sha256) -> None:
        """Like :meth:`create`, chunk by chunk: nothing can be seen before all bytes are there and hash to ``sha256``.

        :class:`CorruptObject` where they do not; what ``chunks`` raises passes through. Nothing is left of either.
        """
        ...

    async def size(self, key: str) -> int:
        """In bytes."""
        ...

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes: ...

    async def signed_get(self, key: str, valid_s: float) -> str | None:
        """An address where a GET gives the object to anybody, for so long; ``None`` where this store cannot sign."""
        ...

    async def put_hint(self, key: str, data: bytes) -> None:
        """Overwrite. For hints only."""
        ...

    async def delete(self, key: str) -> None: ...

    async def list(self, prefix: str) -> list[str]:
        """Names under a prefix, ascending. May lag; nothing that must be right depends on it."""
        ...


class ClientCalls(Protocol):
    """How an orchestrator's services hand clients' calls to its machine."""

    async def call(self, message: Message) -> Message: ...

    def stream(self, message: Message) -> AsyncIterator[Message]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnData:
    """A column of rows as bytes: what a data service answers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: bytes | memoryview


class ObjectService(Protocol):
    """What gives out and takes in objects, without a transport."""

    async def get_object(self, key: str, token: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Its size in bytes and its chunks; :class:`CorruptObject` after the last one where they are damaged.

        Keys as in the storage layout, ``sessions/<id>/objects/<sha256>.safetensors`` or a dataset's shard.
        """
        ...

    async def signed_object(self, key: str, token: str) -> tuple[int, str] | None:
        """Its size in bytes and a short-lived address that gives it; ``None`` where the store has no such addresses."""
        ...

    async def put_object(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        """Refuses bytes that do not hash to the sha256 in ``key``.

        An object that is there already is a success, and then ``chunks`` need not be read to the end.
        """
        ...


class DataService(ObjectService, Protocol):
    """The data service inside an orchestrator."""

    async def rows(self, ref: RowsRef) -> list[ColumnData]: ...

    async def create_dataset(self, manifest: bytes) -> str:
        """All shards must be there already. Returns the dataset's id (sha256 of ``manifest``)."""
        ...

    async def get_dataset(self, name: str) -> tuple[str, bytes]:
        """By id, unique prefix of it, or name (the newest of that name): id and manifest."""
        ...

    async def list_datasets(self) -> list[tuple[str, bytes]]: ...

    async def delete_dataset(self, name: str) -> str: ...


class EventSink(Protocol):
    """Where emitted events go besides clients: the structured log."""

    def emit(self, kind: str, session: str | None, data: Mapping[str, Any]) -> None: ...
