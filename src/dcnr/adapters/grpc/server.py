"""The server: binds what a process serves to one port. Services are bound from the descriptors, method by method."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dcnr.adapters.grpc import status, transport
from dcnr.adapters.grpc.codec import from_proto, to_proto
from dcnr.adapters.grpc.generated import link_pb2, messages_pb2, services_pb2
from dcnr.adapters.grpc.links import LinkHub, check_versions
from dcnr.config import Limits
from dcnr.errors import AddressInUse, DCNRError, UsageError, WireError
from dcnr.protocol.messages import Refusal, Register
from dcnr.runtime.ports import ClientCalls, DataService, ObjectService

_LINK = link_pb2.DESCRIPTOR.services_by_name["PNode"]
_MEMBERSHIP = services_pb2.DESCRIPTOR.services_by_name["Membership"]
_ORCHESTRATOR = services_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
_DATA = services_pb2.DESCRIPTOR.services_by_name["Data"]


class Server:
    """A bound and serving server. ``address`` is where it listens, with the port that was given or found."""

    def __init__(self, server: Any, address: str) -> None:
        self.address = address
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """New calls are refused at once; those under way end within ``grace_s``. May be called again."""
        await self._server.stop(grace_s)


def parse_address(address: str) -> tuple[str, int]:
    """``host:port`` taken apart (``[::1]:50050`` too); :class:`UsageError` for anything else.

    gRPC itself would take port 99999 and listen on another one.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{address!r} is no address: expected host:port with a port from 0 to 65535")
    return host, int(port)


async def serve(
    listen: str, hub: LinkHub, calls: ClientCalls | None, data: DataService | None, objects: ObjectService | None = None
) -> Server:
    """Serve the link, and what else is given, on ``listen`` (port 0 = a free one). :class:`AddressInUse` if it is taken.

    Fills ``hub.descriptor.addresses`` with the bound address where it names none.
    """
    host, port = parse_address(listen)
    options = transport.server_options(hub.limits)
    if data is not None or objects is not None:
        options += transport.upload_options(hub.limits)
    server = grpc.aio.server(options=options)
    services = [_LINK]
    handlers = [_link_handler(hub)]
    if calls is not None:
        services += [_MEMBERSHIP, _ORCHESTRATOR]
        handlers += [
            _handler(_MEMBERSHIP, {"Register": _register(hub, calls)}),
            _handler(_ORCHESTRATOR, {method.name: _call(calls, method) for method in _ORCHESTRATOR.methods}),
        ]
    if data is not None:
        services.append(_DATA)
        handlers.append(_handler(_DATA, {**_dataset_methods(data, hub.limits), **_object_methods(data, hub.limits)}))
    elif objects is not None:
        services.append(_DATA)
        handlers.append(_handler(_DATA, _object_methods(objects, hub.limits)))
    server.add_generic_rpc_handlers(tuple(handlers))
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [service.full_name for service in services] + [health.SERVICE_NAME]
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise AddressInUse(f"{listen} cannot be listened on: another program uses port {port}") from error
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    address = f"{host}:{bound}"
    if not hub.descriptor.addresses:
        hub.descriptor = replace(hub.descriptor, addresses=(address,))
    hub.server = bound_server = Server(server, address)
    return bound_server


def _link_handler(hub: LinkHub) -> Any:
    # Without serializers the handler sees bytes, and malformed ones end one link with a reason.
    return grpc.method_handlers_generic_handler(
        _LINK.full_name, {"Link": grpc.stream_stream_rpc_method_handler(hub.serve)}
    )


def _handler(service: ServiceDescriptor, methods: dict[str, Callable[..., Any]]) -> Any:
    """A service whose methods take and give protobuf messages; their errors become statuses."""
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
    }
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {
            method.name: makers[method.client_streaming, method.server_streaming](
                _guarded_stream(methods[method.name]) if method.server_streaming else _guarded(methods[method.name]),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in service.methods
            if method.name in methods
        },
    )


def _guarded(work: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handler(request: Any, context: Any) -> Any:
        try:
            return await work(request, context)
        except DCNRError as error:
            await status.abort(context, error)

    return handler


def _guarded_stream(work: Callable[[Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def handler(request: Any, context: Any) -> AsyncIterator[Any]:
        replies = work(request)
        try:
            async for reply in replies:
                yield reply
        except DCNRError as error:
            await status.abort(context, error)
        finally:
            await replies.aclose()  # type: ignore[attr-defined]

    return handler


# --- membership and orchestrator: messages handed to the machine -------------------------------------------


def _register(hub: LinkHub, calls: ClientCalls) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handler(request: messages_pb2.Register, _context: Any) -> Any:
        register: Register = from_proto(request)
        check_versions(hub.descriptor, register.descriptor)
        return _reply(await calls.call(register))

    return handler


def _call(calls: ClientCalls, method: Any) -> Callable[..., Any]:
    async def unary(request: Any, _context: Any) -> Any:
        return _reply(await calls.call(from_proto(request)))

    async def stream(request: Any) -> AsyncIterator[Any]:
        replies = calls.stream(from_proto(request))
        try:
            async for reply in replies:
                yield _reply(reply)
        finally:
            close = getattr(replies, "aclose", None)
            if close is not None:
                await close()

    return stream if method.server_streaming else unary


def _reply(message: Any) -> Any:
    if isinstance(message, Refusal):
        raise status.make_error(message.kind, message.reason)
    return to_proto(message)


# --- data --------------------------------------------------------------------------------------------------


def _dataset_methods(data: DataService, limits: Limits) -> dict[str, Callable[..., Any]]:
    async def create_dataset(request: services_pb2.CreateDataset, _context: Any) -> Any:
        return services_pb2.DatasetCreated(dataset=await data.create_dataset(request.manifest))

    async def get_dataset(request: services_pb2.GetDataset, _context: Any) -> Any:
        dataset, manifest = await data.get_dataset(request.name)
        return services_pb2.DatasetManifest(dataset=dataset, manifest=manifest)

    async def list_datasets(_request: services_pb2.ListDatasets) -> AsyncIterator[Any]:
        for dataset, manifest in await data.list_datasets():
            yield services_pb2.DatasetManifest(dataset=dataset, manifest=manifest)

    async def delete_dataset(request: services_pb2.DeleteDataset, _context: Any) -> Any:
        return services_pb2.DatasetDeleted(dataset=await data.delete_dataset(request.name))

    async def get_rows(request: messages_pb2.RowsRef) -> AsyncIterator[Any]:
        for column in await data.rows(from_proto(request)):
            content = memoryview(column.data).cast("B")
            digest = await asyncio.to_thread(lambda held: hashlib.sha256(held).hexdigest(), content)
            header = messages_pb2.Tensor(shape=column.shape, dtype=column.dtype, digest=digest)
            for offset in _offsets(len(content), limits):
                piece = bytes(content[offset : offset + limits.chunk_bytes])
                if offset == 0:
                    yield services_pb2.RowsChunk(column=column.name, tensor=header, size=len(content), data=piece)
                else:
                    yield services_pb2.RowsChunk(data=piece)

    return {
        "CreateDataset": create_dataset,
        "GetDataset": get_dataset,
        "ListDatasets": list_datasets,
        "DeleteDataset": delete_dataset,
        "GetRows": get_rows,
    }


def _object_methods(data: ObjectService, limits: Limits) -> dict[str, Callable[..., Any]]:
    async def put_object(_requests: Any, context: Any) -> Any:
        first = await transport.read(context)
        if first is transport.EOF or not first.key:
            raise WireError("an upload begins with its key")
        if not 0 <= first.size <= limits.object_bytes:
            raise WireError(f"{first.key}: {first.size} bytes announced, at most {limits.object_bytes} are taken")
        async with aclosing(_uploaded(first, context)) as chunks:
            try:
                await data.put_object(first.key, first.token, chunks)
            except DCNRError:
                await _read_rest(chunks)
                raise
            await _read_rest(chunks)
        return services_pb2.ObjectStored()

    async def get_object(request: services_pb2.GetObject) -> AsyncIterator[Any]:
        if request.signed and (signed := await data.signed_object(request.key, request.token)) is not None:
            yield services_pb2.DataChunk(size=signed[0], url=signed[1])
            return
        size, chunks = await data.get_object(request.key, request.token)
        async with aclosing(chunks):
            yield services_pb2.DataChunk(size=size)
            async for chunk in chunks:
                yield services_pb2.DataChunk(data=chunk)

    return {"PutObject": put_object, "GetObject": get_object}


async def _uploaded(first: Any, context: Any) -> AsyncGenerator[bytes, None]:
    """The bytes of an upload, of which ``first`` was read already. :class:`WireError` unless as many come as announced."""
    chunk, size = first, 0
    while chunk is not transport.EOF:
        size += len(chunk.data)
        if size > first.size:
            raise WireError(f"{first.key}: more than the {first.size} bytes announced")
        yield chunk.data
        chunk = await transport.read(context)
    if size != first.size:
        raise WireError(f"{first.key}: {size} bytes came, {first.size} were announced")


async def _read_rest(chunks: AsyncIterator[bytes]) -> None:
    """grpc.aio's client takes a call that ends while it writes for a broken one: it never sees the status."""
    async for _ in chunks:
        pass


def _offsets(size: int, limits: Limits) -> range:
    """Starts of the chunks of ``size`` bytes; one empty chunk for none."""
    return range(0, max(size, 1), limits.chunk_bytes)
