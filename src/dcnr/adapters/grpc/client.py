"""The calling sides: an orchestrator's unary and streaming calls, and its data service."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message_factory import GetMessageClass

from dcnr.adapters.grpc import status, transport
from dcnr.adapters.grpc.codec import MESSAGE_CLASSES, decode_tensor, from_proto, proto_class, tensor_bytes, to_proto
from dcnr.adapters.grpc.generated import services_pb2
from dcnr.adapters.grpc.signed import fetch
from dcnr.config import LIMITS, Limits
from dcnr.dataservice.pacer import Pacer
from dcnr.errors import CorruptObject, DCNRError, StoreFull, StoreUnavailable, Unreachable, WireError
from dcnr.ids import PeerId, SessionId, Sha256
from dcnr.machine import TensorRef
from dcnr.network.node_type import AXES_MOST
from dcnr.protocol.messages import Message, RowsRef
from dcnr.runtime.ports import TensorTable

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_METHODS = {
    message: (f"/{service.full_name}/{method.name}", GetMessageClass(method.output_type))
    for service in (services_pb2.DESCRIPTOR.services_by_name[name] for name in ("Membership", "Orchestrator"))
    for method in service.methods
    for message in MESSAGE_CLASSES
    if proto_class(message).DESCRIPTOR is method.input_type
}
"""Requests, and the path and reply of the rpc that carries each."""


def _decoded(reply: Any) -> Any:
    """grpcio gives ``None`` for bytes that its deserializer refused, and says so nowhere."""
    if reply is None:
        raise WireError("the reply is no message of this protocol: is it an orchestrator that listens there?")
    return reply


class OrchestratorClient:
    """Calls to the orchestrator at ``address``. Use it on one asyncio loop, and ``close`` it there.

    Failures are raised as the class of the error tree that the orchestrator named; :class:`Unreachable` where nothing
    answers.
    """

    def __init__(self, address: str, limits: Limits = LIMITS, http_proxy: str = "") -> None:
        self.address = address
        self._limits = limits
        self._http_proxy = http_proxy
        self._channel: Any = None

    async def __aenter__(self) -> OrchestratorClient:
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def call(self, message: Message, timeout_s: float | None = None) -> Any:
        """The reply to a unary call; ``timeout_s`` defaults to ``request_timeout_s``."""
        path, reply = _METHODS[type(message)]
        call = self._connected().unary_unary(path, _serialize, reply.FromString)(
            to_proto(message), timeout=timeout_s or self._limits.request_timeout_s
        )
        try:
            return from_proto(_decoded(await call))
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, self.address) from error
        finally:
            call.cancel()

    async def stream(self, message: Message) -> AsyncGenerator[Any, None]:
        """The replies of a streaming call, until it ends. Leaving the iteration ends the call (``aclose``)."""
        path, reply = _METHODS[type(message)]
        call = self._connected().unary_stream(path, _serialize, reply.FromString)(to_proto(message))
        try:
            while (record := await transport.read(call)) is not transport.EOF:
                yield from_proto(_decoded(record))
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, self.address) from error
        finally:
            call.cancel()

    def _connected(self) -> Any:
        if self._channel is None:
            self._channel = transport.open_channel(
                self.address, self._limits, self._limits.reply_bytes, self._http_proxy
            )
        return self._channel


class DataClient:
    """The data service of one address, or of the peers that ``resolve`` finds: :class:`ObjectTransfer` and datasets.

    What is unavailable is tried again, with growing pauses, until ``transfer_timeout_s`` has passed; then the last
    error is raised. ``resolve`` may raise :class:`Unreachable`, which is tried again as well.
    """

    def __init__(
        self,
        resolve: Callable[[PeerId], str] | str,
        table: TensorTable | None = None,
        limits: Limits = LIMITS,
        http_proxy: str = "",
        pacer: Pacer | None = None,
    ) -> None:
        """``pacer``: how fast objects are sent."""
        self._resolve = resolve
        self._pacer = pacer or Pacer()
        self._table = table
        self._limits = limits
        self._http_proxy = http_proxy
        self._channels: dict[str, _Channel] = {}
        self._streaming: set[str] = set()
        """Services whose signed addresses lead nowhere from here: they are asked for no more of them."""

    async def __aenter__(self) -> DataClient:
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection."""
        while self._channels:
            _, kept = self._channels.popitem()
            await kept.channel.close()

    # --- objects and rows of sessions: ObjectTransfer ------------------------------------------------------

    async def rows(self, peer: PeerId, ref: RowsRef) -> tuple[TensorRef, ...]:
        """One tensor of shape [rows, ...] per column of ``ref``, each checked against its sha256."""
        return await self._retried(peer, lambda address, left_s: self._rows(address, ref, left_s))

    async def get_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, address: str = ""
    ) -> bytes:
        """A state object; :class:`CorruptObject` where the bytes do not hash to ``sha256``.

        It comes from the store itself where that can be reached, else through the data service.
        """
        key = _object_key(session, sha256)
        if address:
            return await self._get(address, key, sha256, token, self._limits.transfer_timeout_s)

        async def attempt(address: str, left_s: float) -> bytes:
            if address not in self._streaming:
                try:
                    return await self._get(address, key, sha256, token, left_s, signed=True)
                except _Elsewhere as error:
                    logger.info("%s is streamed instead: %s", key, error)
                    self._streaming.add(address)
            return await self._get(address, key, sha256, token, left_s)

        return await self._retried(peer, attempt)

    async def put_object(
        self, peer: PeerId, session: SessionId, sha256: Sha256, token: str, data: bytes, address: str = ""
    ) -> None:
        """Upload a state object; one that is there already is a success."""
        key = _object_key(session, sha256)
        if address:
            await self._put(address, key, token, data, self._limits.transfer_timeout_s)
            return
        await self._retried(peer, lambda address, left_s: self._put(address, key, token, data, left_s))

    # --- datasets, with a fixed address --------------------------------------------------------------------

    async def create_dataset(self, manifest: bytes) -> str:
        """The dataset's id. All its shards must have been put."""
        reply = await self._unary("CreateDataset", services_pb2.CreateDataset(manifest=manifest))
        return str(reply.dataset)

    async def get_dataset(self, name: str) -> tuple[str, bytes]:
        """Id and manifest by id, unique prefix of it, or name."""
        reply = await self._unary("GetDataset", services_pb2.GetDataset(name=name))
        return reply.dataset, reply.manifest

    async def list_datasets(self) -> list[tuple[str, bytes]]:
        """Id and manifest of all."""

        async def listed(address: str, left_s: float) -> list[tuple[str, bytes]]:
            request = services_pb2.ListDatasets()
            async with aclosing(self._streamed(address, "ListDatasets", request, left_s)) as replies:
                return [(reply.dataset, reply.manifest) async for reply in replies]

        return await self._retried(None, listed)

    async def delete_dataset(self, name: str) -> str:
        """The id of what was deleted."""
        reply = await self._unary("DeleteDataset", services_pb2.DeleteDataset(name=name))
        return str(reply.dataset)

    async def put_dataset_object(self, key: str, data: bytes) -> None:
        """Upload a shard under its key, which contains its sha256."""
        await self._retried(None, lambda address, left_s: self._put(address, key, "", data, left_s))

    async def get_dataset_object(self, key: str, token: str = "") -> bytes:
        """An object by its key, whose last part begins with its sha256. Those of sessions need a token."""
        sha256 = key.rpartition("/")[2].partition(".")[0]
        return await self._retried(None, lambda address, left_s: self._get(address, key, sha256, token, left_s))

    # --- one attempt ---------------------------------------------------------------------------------------

    async def _unary(self, name: str, request: Any) -> Any:
        path, reply = _data_method(name)

        async def attempt(address: str, left_s: float) -> Any:
            async with self._connected(address) as channel:
                call = channel.unary_unary(path, _serialize, reply.FromString)(request, timeout=left_s)
                try:
                    return _decoded(await call)
                except grpc.aio.AioRpcError as error:
                    raise status.from_rpc_error(error, address) from error
                finally:
                    call.cancel()

        # Whoever asks waits: an address where nobody listens is told at once.
        return await self._retried(None, attempt, again=(StoreUnavailable,))

    async def _streamed(self, address: str, name: str, request: Any, left_s: float) -> AsyncGenerator[Any, None]:
        path, reply = _data_method(name)
        async with self._connected(address) as channel:
            call = channel.unary_stream(path, _serialize, reply.FromString)(request, timeout=left_s)
            try:
                while (chunk := await transport.read(call)) is not transport.EOF:
                    yield _decoded(chunk)
            except grpc.aio.AioRpcError as error:
                raise status.from_rpc_error(error, address) from error
            finally:
                call.cancel()

    async def _get(self, address: str, key: str, sha256: str, token: str, left_s: float, signed: bool = False) -> bytes:
        """Raises :class:`_Elsewhere` where the object has a signed address that does not give it."""
        request = services_pb2.GetObject(key=key, token=token, signed=signed)
        size: int | None = None
        url = ""
        content = io.BytesIO()
        async with aclosing(self._streamed(address, "GetObject", request, left_s)) as chunks:
            async for chunk in chunks:
                if size is None:
                    size = chunk.size
                    if not 0 <= size <= self._limits.object_bytes:
                        raise WireError(f"{key}: {size} bytes announced")
                    url = chunk.url if signed else ""
                content.write(chunk.data)
                if content.tell() > size:
                    raise WireError(f"{key}: more than the {size} bytes announced")
        if url and size is not None:
            return await asyncio.to_thread(_from_elsewhere, url, size, sha256)
        if content.tell() != size:
            raise WireError(f"{key} ended after {content.tell()} bytes")
        # Hands out its own buffer, so that an object is in memory once.
        data = content.getvalue()
        found = await asyncio.to_thread(_sha256, data)
        if found != sha256:
            raise CorruptObject(f"{key} from {address} hashes to {found}")
        return data

    async def _put(self, address: str, key: str, token: str, data: bytes, left_s: float) -> None:
        path, reply = _data_method("PutObject")
        view = memoryview(data)
        step = self._limits.object_chunk_bytes
        async with self._connected(address) as channel:
            call = channel.stream_unary(path, _serialize, reply.FromString)(timeout=left_s)
            try:
                await self._pacer.take(len(view[:step]))
                first = services_pb2.PutChunk(key=key, token=token, size=len(data), data=bytes(view[:step]))
                await call.write(first)
                for offset in range(step, len(data), step):
                    await self._pacer.take(len(view[offset : offset + step]))
                    await call.write(services_pb2.PutChunk(data=bytes(view[offset : offset + step])))
                await call.done_writing()
                _decoded(await call)
            except asyncio.InvalidStateError:
                # The server ended the call while we were writing; awaiting it raises its reason.
                await self._raise_reason(call, address)
            except grpc.aio.AioRpcError as error:
                raise status.from_rpc_error(error, address) from error
            finally:
                call.cancel()

    async def _raise_reason(self, call: Any, address: str) -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, address) from error

    async def _rows(self, address: str, ref: RowsRef, left_s: float) -> tuple[TensorRef, ...]:
        assert self._table is not None, "rows need a table to put tensors into"
        columns: list[tuple[TensorRef, Any]] = []
        view = memoryview(b"")
        offset = 0
        async with aclosing(self._streamed(address, "GetRows", to_proto(ref), left_s)) as chunks:
            async for chunk in chunks:
                if chunk.HasField("tensor"):
                    if offset != len(view) or len(columns) == len(ref.columns):
                        raise WireError(f"column {chunk.column} was not expected")
                    tensor = self._expected_column(ref, ref.columns[len(columns)], chunk)
                    try:
                        value = self._table.backend.empty(tensor.shape, tensor.dtype)
                    except (RuntimeError, ValueError, MemoryError) as error:
                        raise WireError(f"column {chunk.column}{list(tensor.shape)}: {error}") from error
                    view, offset = self._table.backend.view(value), 0
                    columns.append((tensor, value))
                offset = _fill(chunk.column, view, offset, chunk.data)
        if offset != len(view) or len(columns) != len(ref.columns):
            raise WireError(f"rows of {ref.dataset} ended too early")
        for tensor, value in columns:
            found = await asyncio.to_thread(_sha256, self._table.backend.view(value))
            if found != tensor.digest:
                raise WireError(f"rows of {ref.dataset} from {address} hash to {found}")
        return tuple(
            TensorRef(handle=self._table.put(value), shape=tensor.shape, dtype=tensor.dtype, digest=tensor.digest)
            for tensor, value in columns
        )

    def _expected_column(self, ref: RowsRef, name: str, chunk: Any) -> TensorRef:
        tensor: TensorRef = decode_tensor(chunk.tensor)
        if chunk.column != name or tensor.shape[:1] != (len(ref.rows),):
            raise WireError(f"expected {len(ref.rows)} rows of {name}, found {chunk.column}{list(tensor.shape)}")
        if len(tensor.shape) > AXES_MOST + 1 or min(tensor.shape) < 1:
            raise WireError(f"column {name}: found shape {list(tensor.shape)}, expected sizes of at least 1")
        if chunk.size != tensor_bytes(tensor) or chunk.size > self._limits.object_bytes:
            raise WireError(f"column {name}: {chunk.size} bytes announced for {tensor.dtype}{list(tensor.shape)}")
        return tensor

    # --- retries -------------------------------------------------------------------------------------------

    async def _retried(
        self,
        peer: PeerId | None,
        attempt: Callable[[str, float], Awaitable[_T]],
        again: tuple[type[DCNRError], ...] = (Unreachable, StoreUnavailable),
    ) -> _T:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.transfer_timeout_s
        pause_s = self._limits.redial_first_s
        while True:
            try:
                return await attempt(self._address(peer), end - loop.time())
            except again as error:
                # A PNode can wait until there is room; a client's user is the one who can make it.
                full = isinstance(error, StoreFull) and peer is None
                if full or loop.time() + pause_s >= end:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._limits.redial_most_s)

    def _address(self, peer: PeerId | None) -> str:
        if isinstance(self._resolve, str):
            return self._resolve
        assert peer is not None, "datasets need a client of one address"
        return self._resolve(peer)

    @asynccontextmanager
    async def _connected(self, address: str) -> AsyncIterator[Any]:
        """A channel, kept for the next call. Those that nobody uses any more are closed: their PNodes may be gone."""
        now = asyncio.get_running_loop().time()
        idle = [
            other
            for other, kept in self._channels.items()
            if other != address and not kept.calls and now - kept.used_at >= self._limits.channel_idle_s
        ]
        for kept in [self._channels.pop(other) for other in idle]:
            await kept.channel.close()
        if address not in self._channels:
            receive_bytes = transport.message_bytes(self._limits)
            channel = transport.open_channel(address, self._limits, receive_bytes, self._http_proxy)
            self._channels[address] = _Channel(channel=channel)
        used = self._channels[address]
        used.calls += 1
        try:
            yield used.channel
        finally:
            used.calls -= 1
            used.used_at = asyncio.get_running_loop().time()


@dataclass(slots=True, kw_only=True)
class _Channel:
    channel: Any
    calls: int = 0
    """Under way."""
    used_at: float = 0.0
    """When the last one ended, in seconds of the loop."""


class _Elsewhere(Exception):
    """A signed address did not give its object."""


def _from_elsewhere(url: str, size: int, sha256: str) -> bytes:
    try:
        data = fetch(url, size)
    except Unreachable as error:
        raise _Elsewhere(str(error)) from error
    if _sha256(data) != sha256:
        raise _Elsewhere("its bytes hash to another name")
    return data


def _serialize(proto: Any) -> bytes:
    data: bytes = proto.SerializeToString()
    return data


def _data_method(name: str) -> tuple[str, Any]:
    service = services_pb2.DESCRIPTOR.services_by_name["Data"]
    return f"/{service.full_name}/{name}", GetMessageClass(service.methods_by_name[name].output_type)


def _object_key(session: SessionId, sha256: Sha256) -> str:
    return f"sessions/{session}/objects/{sha256}.safetensors"


def _fill(name: str, view: memoryview, offset: int, data: bytes) -> int:
    """Copy a chunk in; the offset behind it."""
    end = offset + len(data)
    if end > len(view):
        raise WireError(f"{name}: more than the {len(view)} bytes announced")
    view[offset:end] = data
    return end


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
