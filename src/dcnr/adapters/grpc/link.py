"""One open link: a writer, a reader, and the tensors on their way. Opening and choosing links is ``links.py``.

Frames are written and parsed here, from and to bytes: gRPC only carries them. Malformed bytes thus end this link with
a reason that the peer is told, and a chunk is copied once on its way out.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc

from dcnr.adapters.grpc.codec import MESSAGE_CLASSES, from_proto, parse, proto_class, tensor_bytes, to_proto
from dcnr.adapters.grpc.generated import link_pb2
from dcnr.adapters.grpc.transport import EOF, cancelled_from_outside, message_bytes
from dcnr.config import Limits
from dcnr.errors import WireError
from dcnr.protocol.messages import Descriptor, Message, TensorFrame
from dcnr.runtime.ports import LinkEvents, TensorTable

BROKEN = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What grpc.aio raises from a read or write once the call has ended."""
HASH_INLINE_BYTES = 256 << 10
"""Below this a hand-over to a thread costs more than the hash."""

_KINDS = {
    message: field.name
    for field in link_pb2.Frame.DESCRIPTOR.oneofs_by_name["kind"].fields
    for message in MESSAGE_CLASSES
    if proto_class(message).DESCRIPTOR is field.message_type
}
"""Control messages, and the field of ``Frame`` that carries each."""
_CHUNK_TAG = bytes([link_pb2.Frame.DESCRIPTOR.fields_by_name["chunk"].number << 3 | 2])
_DATA_TAG = bytes([link_pb2.Chunk.DESCRIPTOR.fields_by_name["data"].number << 3 | 2])


class Stream(Protocol):
    """What a client's call and a server's context have in common. Messages are bytes."""

    async def read(self) -> Any: ...

    async def write(self, message: bytes) -> None: ...


def control_frame(message: Message) -> bytes:
    """A control message as a frame's bytes. :class:`WireError` for a class that does not travel on links."""
    kind = _KINDS.get(type(message))
    if kind is None:
        raise WireError(f"{type(message).__name__} is no control message of the link")
    return link_pb2.Frame(**{kind: to_proto(message)}).SerializeToString()


def chunk_frames(number: int, frame: TensorFrame, data: memoryview, chunk_bytes: int) -> Iterator[bytes]:
    """The frames of one tensor, each with at most ``chunk_bytes`` of it.

    Equal to ``Frame(chunk=Chunk(..., data=...)).SerializeToString()``, which would copy the bytes twice.
    """
    size = len(data)
    for offset in range(0, max(size, 1), chunk_bytes):
        piece = data[offset : offset + chunk_bytes]
        chunk = link_pb2.Chunk(frame=number, offset=offset, last=offset + len(piece) == size)
        if offset == 0:
            chunk.size = size
            chunk.header.CopyFrom(to_proto(frame))
        head = chunk.SerializeToString() + _DATA_TAG + _varint(len(piece))
        yield b"".join((_CHUNK_TAG, _varint(len(head) + len(piece)), head, piece))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass(slots=True, kw_only=True)
class _Partial:
    """A tensor that is arriving. ``view`` is ``None`` where the driver refused it: its chunks are skipped."""

    number: int
    frame: TensorFrame
    size: int
    tensor: Any = None
    view: memoryview | None = None
    offset: int = 0
    hasher: Any = None
    hashing: asyncio.Future[None] | None = None

    async def take(self, data: bytes) -> None:
        """Copy the next bytes in; hash them while the next ones arrive."""
        start, self.offset = self.offset, self.offset + len(data)
        if self.view is None:
            return
        self.view[start : self.offset] = data
        if self.hasher is None:
            return
        await self.hashed()
        if self.size <= HASH_INLINE_BYTES:
            self.hasher.update(data)
        else:
            self.hashing = asyncio.get_running_loop().run_in_executor(None, self.hasher.update, data)

    async def hashed(self) -> None:
        """Wait for the hash of what has been taken so far."""
        if self.hashing is not None:
            await self.hashing
            self.hashing = None


class Link:
    """A link after its handshake. ``dialled`` = by this side; ``nonce`` names it at both ends.

    ``ended`` is called once, synchronously, with the link, the reason, and whether the driver should hear of it.
    """

    def __init__(
        self,
        *,
        remote: Descriptor,
        nonce: str,
        dialled: bool,
        stream: Stream,
        table: TensorTable,
        events: LinkEvents,
        limits: Limits,
        ended: Callable[[Link, str, bool], None],
        first: bytes | None = None,
    ) -> None:
        self.remote = remote
        self.nonce = nonce
        self.dialled = dialled
        self.wire_errors = 0
        """Malformed frames that this link was sent: the first one ends it."""
        self._stream = stream
        self._table = table
        self._events = events
        self._limits = limits
        self._ended = ended
        self._control: deque[bytes] = deque() if first is None else deque([first])
        self._tensors: deque[TensorFrame] = deque()
        self._chunks: Iterator[bytes] | None = None
        """Of ``_tensors[0]``, once its first chunk was asked for."""
        self._numbers = 0
        self._partial: _Partial | None = None
        self._wake = asyncio.Event()
        self._over = asyncio.Event()
        self._bye: str | None = None

    # --- out -----------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message. A queue that is full, or a frame that is too large, ends the link."""
        if self._over.is_set():
            return
        if len(self._control) + len(self._tensors) >= self._limits.link_queue:
            self.end(f"the peer does not read: {self._limits.link_queue} frames are waiting", bye=False)
        elif isinstance(message, TensorFrame):
            self._table.hold(message.tensor.handle)
            self._tensors.append(message)
        else:
            data = control_frame(message)
            if len(data) > message_bytes(self._limits):
                self.end(f"{type(message).__name__} of {len(data)} bytes is larger than any frame may be")
            else:
                self._control.append(data)
        self._wake.set()

    def end(self, reason: str, *, tell: bool = True, bye: bool = True) -> None:
        """The link is over, now. ``bye``: the peer is told why, after the control frames that are queued."""
        if self._over.is_set():
            return
        self._over.set()
        self._bye = reason if bye else None
        for frame in self._tensors:
            self._table.release(frame.tensor.handle)
        self._tensors.clear()
        self._chunks = None
        self._partial = None
        self._wake.set()
        self._ended(self, reason, tell)

    async def _write(self) -> None:
        while True:
            if self._over.is_set() and self._bye is None:
                return
            if self._control:
                await self._stream.write(self._control.popleft())
            elif self._over.is_set():
                await self._stream.write(link_pb2.Frame(bye=link_pb2.Bye(reason=self._bye or "")).SerializeToString())
                return
            elif self._tensors:
                await self._write_chunk()
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _write_chunk(self) -> None:
        """One chunk of the oldest tensor; its handle is given back once the last one is written."""
        frame = self._tensors[0]
        if self._chunks is None:
            self._numbers += 1
            data = self._table.backend.view(self._table.get(frame.tensor.handle))
            self._chunks = chunk_frames(self._numbers, frame, data, self._limits.chunk_bytes)
        chunk = next(self._chunks, None)
        if chunk is None:
            self._chunks = None
            self._tensors.popleft()
            self._table.release(frame.tensor.handle)
        else:
            await self._stream.write(chunk)

    # --- in ------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            data = await self._stream.read()
            if data is EOF:
                self.end("the connection was lost", bye=False)
                return
            if self._over.is_set():
                continue
            try:
                await self._take(data)
            except WireError as error:
                self.wire_errors += 1
                self.end(f"malformed frame: {error}")

    async def _take(self, data: bytes) -> None:
        frame = parse(link_pb2.Frame, data)
        kind = frame.WhichOneof("kind")
        match kind:
            case "chunk":
                await self._take_chunk(frame.chunk)
            case "bye":
                self.end(f"closed by the peer: {frame.bye.reason}", bye=False)
            case "hello" | None:
                raise WireError(f"a frame of kind {kind} on an open link")
            case _:
                self._events.received(self.remote.peer, self.remote.incarnation, from_proto(getattr(frame, kind)))

    async def _take_chunk(self, chunk: link_pb2.Chunk) -> None:
        if chunk.HasField("header"):
            if self._partial is not None:
                raise WireError("a tensor began before the one before it had ended")
            self._partial = self._begin(chunk)
        partial = self._partial
        if partial is None or chunk.frame != partial.number or chunk.offset != partial.offset:
            raise WireError(f"chunk {chunk.frame} at {chunk.offset} belongs to no tensor")
        if partial.offset + len(chunk.data) > partial.size or not (chunk.data or chunk.last):
            raise WireError(f"chunk of {len(chunk.data)} bytes at {chunk.offset} of {partial.size}")
        await partial.take(chunk.data)
        if chunk.last:
            if partial.offset != partial.size:
                raise WireError(f"a tensor of {partial.size} bytes ended after {partial.offset}")
            await self._finish(partial)

    def _begin(self, chunk: link_pb2.Chunk) -> _Partial:
        """Check a header before a byte of the tensor is kept, then make room for it."""
        frame: TensorFrame = from_proto(chunk.header)
        expected = tensor_bytes(frame.tensor)
        if chunk.size != expected or expected > self._limits.object_bytes:
            raise WireError(
                f"{frame.tensor.dtype}{list(frame.tensor.shape)} is {expected} bytes (at most "
                f"{self._limits.object_bytes}), but {chunk.size} are announced"
            )
        partial = _Partial(number=chunk.frame, frame=frame, size=expected)
        if self._events.check_frame(self.remote.peer, frame) is not None:
            # The machine answers it, by its header alone (handle 0): stale, duplicate, no ticket yet, or refused.
            self._events.received(self.remote.peer, self.remote.incarnation, frame)
            return partial
        partial.tensor = self._table.backend.empty(frame.tensor.shape, frame.tensor.dtype)
        partial.view = self._table.backend.view(partial.tensor)
        if frame.tensor.digest is not None:
            partial.hasher = hashlib.sha256()
        return partial

    async def _finish(self, partial: _Partial) -> None:
        await partial.hashed()
        if self._over.is_set():
            return
        self._partial = None
        if partial.view is None:
            return
        ref = partial.frame.tensor
        if partial.hasher is not None and partial.hasher.hexdigest() != ref.digest:
            raise WireError(f"a tensor's bytes hash to {partial.hasher.hexdigest()}, not to {ref.digest}")
        handle = self._table.put(partial.tensor)
        self._events.received(
            self.remote.peer,
            self.remote.incarnation,
            replace(partial.frame, tensor=replace(ref, handle=handle)),
        )

    # --- both ----------------------------------------------------------------------------------------------

    def start(self) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
        """The reader and the writer. They end by themselves once the call is over; they are never cancelled."""
        return (
            asyncio.create_task(self._guarded(self._read()), name=f"read {self.remote.peer}"),
            asyncio.create_task(self._guarded(self._write()), name=f"write {self.remote.peer}"),
        )

    async def over(self) -> None:
        """Returns when the link has ended; its writer may still be telling the peer why."""
        await self._over.wait()

    async def _guarded(self, work: Any) -> None:
        try:
            await work
        except BROKEN as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            self.end(f"the connection was lost: {details}", bye=False)
        except asyncio.CancelledError:
            # Raised by a call that was cancelled, which happens only to links that have ended.
            if cancelled_from_outside():
                raise
        finally:
            # Nothing unless the reader or writer ended first: then the link must not live on without it.
            self.end("the call has ended", bye=False)
