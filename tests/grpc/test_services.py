"""The unary and streaming calls, the data service, health and reflection, over a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dcnr import errors
from dcnr.adapters.grpc.client import DataClient, OrchestratorClient
from dcnr.adapters.grpc.generated import services_pb2
from dcnr.adapters.grpc.server import Server, serve
from dcnr.config import Limits
from dcnr.errors import CorruptObject, DCNRError, InvalidNetwork, NotFound, Refused, Unreachable, VersionMismatch
from dcnr.ids import DatasetId, PeerId, SessionId, Sha256
from dcnr.protocol.messages import (
    Capabilities,
    CreateNetwork,
    EventRecord,
    FollowEvents,
    GetStatus,
    ListNetworks,
    Message,
    NetworkCreated,
    NetworkList,
    Refusal,
    Register,
    Registered,
    RowsRef,
)
from dcnr.runtime.ports import ColumnData
from dcnr.runtime.tensors import CountedTable, NumpyBackend
from tests.grpc.peers import DEADLINE_S, Peer

SHA256_OF_X = Sha256(hashlib.sha256(b"x").hexdigest())
SHORT = Limits(request_timeout_s=5.0, transfer_timeout_s=0.5, redial_first_s=0.01)


class Calls:
    """Answers with what the test prepared."""

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.answer: Callable[[Message], Message] = lambda _: NetworkList(networks=())
        self.closed = asyncio.Event()

    async def call(self, message: Message) -> Message:
        self.asked.append(message)
        return self.answer(message)

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        self.asked.append(message)
        try:
            for number in range(3):
                yield EventRecord(sequence=number, unix_s=0.5, kind="k", session="", data="{}")
            if isinstance(message, FollowEvents) and message.follow:
                await asyncio.Event().wait()
            yield Refusal(kind="NotFound", reason="the end")
        finally:
            self.closed.set()


@dataclass
class Data:
    """Objects in a dict. ``failures`` are raised first, one per object read or written; ``late`` after its chunks."""

    objects: dict[str, bytes] = field(default_factory=dict)
    datasets: dict[str, bytes] = field(default_factory=dict)
    columns: list[ColumnData] = field(default_factory=list)
    failures: list[DCNRError] = field(default_factory=list)
    late: DCNRError | None = None
    signed: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def signed_object(self, key: str, token: str) -> tuple[int, str] | None:
        self.asked.append("signed")
        return (len(self.objects[key]), self.signed[key]) if key in self.signed else None

    async def rows(self, ref: RowsRef) -> list[ColumnData]:
        if ref.token != "right":
            raise Refused("data token has expired")
        return self.columns

    async def get_object(self, key: str, token: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        self.asked.append("stream")
        if self.failures:
            raise self.failures.pop(0)
        if key not in self.objects:
            raise NotFound(f"no object {key}")
        return len(self.objects[key]), self._chunks(self.objects[key])

    async def _chunks(self, data: bytes) -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), 1 << 20):
            yield data[start : start + (1 << 20)]
        if self.late is not None:
            raise self.late

    async def put_object(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        if self.failures:
            await anext(chunks)
            raise self.failures.pop(0)
        if key not in self.objects:
            self.objects[key] = b"".join([chunk async for chunk in chunks])

    async def create_dataset(self, manifest: bytes) -> str:
        if self.failures:
            raise self.failures.pop(0)
        name = hashlib.sha256(manifest).hexdigest()
        self.datasets[name] = manifest
        return name

    async def get_dataset(self, name: str) -> tuple[str, bytes]:
        if name not in self.datasets:
            raise NotFound(f"no dataset {name}")
        return name, self.datasets[name]

    async def list_datasets(self) -> list[tuple[str, bytes]]:
        return list(self.datasets.items())

    async def delete_dataset(self, name: str) -> str:
        self.datasets.pop(name)
        return name


@dataclass(kw_only=True)
class Service:
    calls: Calls
    data: Data
    server: Server

    @property
    def address(self) -> str:
        return self.server.address


def run(test: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
    async def work() -> None:
        calls, data = Calls(), Data()
        hub = Peer("a").hub
        server = await serve("127.0.0.1:0", hub, calls, data)
        try:
            async with asyncio.timeout(60):
                await test(Service(calls=calls, data=data, server=server))
        finally:
            await hub.stop()

    asyncio.run(work())


# --- orchestrator ------------------------------------------------------------------------------------------


def test_a_call_reaches_the_machine_and_its_reply_comes_back() -> None:
    async def test(service: Service) -> None:
        definition = b"x" * (4 << 20)
        service.calls.answer = lambda _: NetworkCreated(network="n")  # type: ignore[arg-type]
        async with OrchestratorClient(service.address) as client:
            assert await client.call(CreateNetwork(definition=definition)) == NetworkCreated(network="n")  # type: ignore[arg-type]
        assert service.calls.asked == [CreateNetwork(definition=definition)]

    run(test)


@pytest.mark.parametrize(
    "kind", [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, DCNRError)]
)
def test_every_error_comes_back_as_its_class_with_its_reason(kind: str) -> None:
    async def test(service: Service) -> None:
        service.calls.answer = lambda _: Refusal(kind=kind, reason="première ligne\nsecond line")
        async with OrchestratorClient(service.address) as client:
            with pytest.raises(DCNRError) as caught:
                await client.call(ListNetworks())
        assert type(caught.value) is getattr(errors, kind)
        assert str(caught.value) == "première ligne\nsecond line"

    run(test)


def test_a_hundred_problems_arrive_whole_and_an_unknown_kind_is_a_refusal() -> None:
    async def test(service: Service) -> None:
        problems = tuple(f"node {number}: expected 512, found 511, and much more to say" for number in range(500))
        service.calls.answer = lambda _: Refusal(kind="InvalidNetwork", reason="\n".join(problems))
        async with OrchestratorClient(service.address) as client:
            with pytest.raises(InvalidNetwork) as caught:
                await client.call(ListNetworks())
            assert caught.value.problems == problems
            service.calls.answer = lambda _: Refusal(kind="FromTheFuture", reason="because")
            with pytest.raises(Refused, match="because"):
                await client.call(ListNetworks())

    run(test)


def test_a_stream_ends_with_the_error_that_ended_it() -> None:
    async def test(service: Service) -> None:
        seen = []
        async with OrchestratorClient(service.address) as client:
            records = client.stream(FollowEvents(after=7))
            for _ in range(3):
                seen.append((await anext(records)).sequence)
            with pytest.raises(NotFound, match="the end"):
                await anext(records)
        assert seen == [0, 1, 2]
        assert service.calls.asked == [FollowEvents(after=7)]

    run(test)


def test_a_stream_that_is_left_or_cancelled_ends_at_the_server() -> None:
    async def test(service: Service) -> None:
        async with OrchestratorClient(service.address) as client:
            records = client.stream(FollowEvents(follow=True))
            assert (await anext(records)).sequence == 0
            await records.aclose()
            async with asyncio.timeout(DEADLINE_S):
                await service.calls.closed.wait()
            service.calls.closed.clear()
            got = asyncio.Event()

            async def follow() -> None:
                async for record in client.stream(FollowEvents(follow=True)):
                    if record.sequence == 2:
                        got.set()

            task = asyncio.create_task(follow())
            async with asyncio.timeout(DEADLINE_S):
                await got.wait()
                task.cancel()
                await asyncio.wait({task})
                await service.calls.closed.wait()
            assert task.cancelled()

    run(test)


def test_nothing_at_the_address_says_what_to_check() -> None:
    async def work() -> None:
        async with OrchestratorClient("127.0.0.1:1", SHORT) as client:
            with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 .*check that it runs"):
                await client.call(GetStatus())
            with pytest.raises(Unreachable):
                await anext(client.stream(FollowEvents()))

    asyncio.run(work())


def test_a_call_that_is_not_answered_ends_at_its_deadline() -> None:
    async def test(service: Service) -> None:
        async def never(message: Message) -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        service.calls.call = never  # type: ignore[method-assign]
        async with OrchestratorClient(service.address) as client:
            with pytest.raises(Unreachable, match="Deadline"):
                await client.call(GetStatus(), timeout_s=0.1)

    run(test)


def test_registration_checks_versions_and_names_both_ranges() -> None:
    async def test(service: Service) -> None:
        capabilities = Capabilities(
            cores=1, memory_bytes=1, architecture="x", numeric_class="c", class_facts=(), gflops=1.0, threads=1
        )
        welcome = Registered(descriptor=Peer("a").hub.descriptor, heartbeat_interval_s=0.5)
        service.calls.answer = lambda _: welcome
        async with OrchestratorClient(service.address) as client:
            register = Register(descriptor=Peer("b").hub.descriptor, capabilities=capabilities)
            assert await client.call(register) == welcome
            late = Register(descriptor=Peer("b", versions=(7, 9)).hub.descriptor, capabilities=capabilities)
            with pytest.raises(VersionMismatch, match=r"1 to 1.*7 to 9"):
                await client.call(late)

    run(test)


# --- data --------------------------------------------------------------------------------------------------


def _shard(data: bytes) -> str:
    return f"datasets/shards/{hashlib.sha256(data).hexdigest()}.bin"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_objects_go_up_and_come_down_equal(size: int) -> None:
    async def test(service: Service) -> None:
        data = np.random.default_rng(0).bytes(size)
        async with DataClient(service.address) as client:
            await client.put_dataset_object(_shard(data), data)
            assert service.data.objects == {_shard(data): data}
            assert await client.get_dataset_object(_shard(data)) == data

    run(test)


def test_session_objects_are_found_under_their_storage_key_at_the_peer_resolved() -> None:
    async def test(service: Service) -> None:
        data, sha256 = b"weights", Sha256(hashlib.sha256(b"weights").hexdigest())
        async with DataClient(lambda peer: {"p": service.address}[peer]) as client:
            await client.put_object(PeerId("p"), SessionId("s"), sha256, "token", data)
            assert list(service.data.objects) == [f"sessions/s/objects/{sha256}.safetensors"]
            assert await client.get_object(PeerId("p"), SessionId("s"), sha256, "token") == data

    run(test)


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Gives out the files of a folder."""
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


def test_a_state_comes_from_its_signed_address(tmp_path: Path) -> None:
    async def test(service: Service) -> None:
        data = bytes(3 << 20)
        sha256 = Sha256(hashlib.sha256(data).hexdigest())
        key = f"sessions/s/objects/{sha256}.safetensors"
        (tmp_path / "object").write_bytes(data)
        with web_server(tmp_path) as url:
            service.data.objects[key], service.data.signed[key] = data, f"{url}/object?X-Amz-Signature=0"
            async with DataClient(lambda peer: service.address) as client:
                assert await client.get_object(PeerId("p"), SessionId("s"), sha256, "token") == data
                assert service.data.asked == ["signed"]
            async with DataClient(service.address) as client:
                assert await client.get_dataset_object(key) == data
                assert service.data.asked == ["signed", "stream"], "clients may be far from the store"

    run(test)


@pytest.mark.parametrize("wrong", ["missing", "other bytes", "longer", "shorter", "nobody listens", "a file"])
def test_a_signed_address_that_does_not_give_the_state_is_not_asked_for_again(tmp_path: Path, wrong: str) -> None:
    async def test(service: Service) -> None:
        data, sha256 = b"weights", Sha256(hashlib.sha256(b"weights").hexdigest())
        key = f"sessions/s/objects/{sha256}.safetensors"
        other = {"other bytes": b"WEIGHTS", "longer": b"weights and more", "shorter": b"weigh", "a file": b"weights"}
        if wrong in other:
            (tmp_path / "object").write_bytes(other[wrong])
        with web_server(tmp_path) as url, socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            where = {"nobody listens": f"http://127.0.0.1:{taken.getsockname()[1]}", "a file": tmp_path.as_uri()}
            service.data.objects[key], service.data.signed[key] = data, f"{where.get(wrong, url)}/object"
            async with DataClient(lambda peer: service.address) as client:
                for _ in range(2):
                    assert await client.get_object(PeerId("p"), SessionId("s"), sha256, "token") == data
        assert service.data.asked == ["signed", "stream", "stream"]

    run(test)


def test_bytes_that_do_not_hash_to_their_name_are_refused() -> None:
    async def test(service: Service) -> None:
        service.data.objects[_shard(b"right")] = b"wrong"
        async with DataClient(service.address) as client:
            with pytest.raises(CorruptObject):
                await client.get_dataset_object(_shard(b"right"))

    run(test)


def test_what_goes_wrong_behind_the_last_chunk_is_the_error() -> None:
    async def test(service: Service) -> None:
        data = bytes(3 << 20)
        service.data.objects[_shard(data)] = data
        service.data.late = CorruptObject(f"{_shard(data)} is damaged")
        async with DataClient(service.address) as client:
            with pytest.raises(CorruptObject, match=f"{_shard(data)} is damaged"):
                await client.get_dataset_object(_shard(data))

    run(test)


def test_an_upload_that_is_refused_or_not_needed_before_its_end_says_so() -> None:
    async def test(service: Service) -> None:
        data = bytes(20 << 20)
        async with DataClient(service.address) as client:
            service.data.failures = [errors.StoreUnavailable("full"), Refused("no right to it")]
            with pytest.raises(Refused, match="no right to it"):
                await client.put_dataset_object(_shard(data), data)
            assert service.data.failures == []
            await client.put_dataset_object(_shard(data), data)
            await client.put_dataset_object(_shard(data), data)  # Not a byte of this one is asked for.
        assert service.data.objects == {_shard(data): data}

    run(test)


@pytest.mark.parametrize(("size", "came"), [(10, 9), (10, 11), (-1, 0), (9 << 30, 1)])
def test_an_upload_of_another_length_than_announced_is_refused(size: int, came: int) -> None:
    async def test(service: Service) -> None:
        async with grpc.aio.insecure_channel(service.address, [("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.stream_unary("/dcnr.v1.Data/PutObject", lambda proto: proto.SerializeToString())
            chunks = [services_pb2.PutChunk(key="k", size=size), services_pb2.PutChunk(data=bytes(came))]
            with pytest.raises(grpc.aio.AioRpcError, match="announced"):
                await call(iter(chunks))
        assert service.data.objects == {}

    run(test)


def test_what_is_unavailable_is_tried_again_and_what_is_refused_is_not() -> None:
    async def test(service: Service) -> None:
        service.data.objects[_shard(b"x")] = b"x"
        service.data.failures = [errors.StoreUnavailable("away"), Unreachable("away")]
        async with DataClient(service.address, limits=SHORT) as client:
            assert await client.get_dataset_object(_shard(b"x")) == b"x"
            service.data.failures = [Refused("no"), Refused("never asked")]
            with pytest.raises(Refused, match="no"):
                await client.get_dataset_object(_shard(b"x"))
            assert [str(left) for left in service.data.failures] == ["never asked"]
            service.data.failures = []
            with pytest.raises(NotFound):
                await client.get_dataset_object("datasets/shards/none.bin")
            service.data.failures = [errors.StoreUnavailable("away")] * 1000
            with pytest.raises(errors.StoreUnavailable):
                await client.get_dataset_object(_shard(b"x"))

    run(test)


def test_a_full_store_is_told_to_a_client_at_once_and_waited_for_by_a_pnode() -> None:
    async def test(service: Service) -> None:
        async with DataClient(service.address, limits=SHORT) as client:
            for call in (client.put_dataset_object(_shard(b"x"), b"x"), client.create_dataset(b"{}")):
                service.data.failures = [errors.StoreFull("no room"), Refused("never asked")]
                with pytest.raises(errors.StoreFull, match="no room"):
                    await call
                assert [str(left) for left in service.data.failures] == ["never asked"]
        async with DataClient(lambda peer: service.address, limits=SHORT) as pnode:
            service.data.failures = [errors.StoreFull("no room")]
            await pnode.put_object(PeerId("orchestrator"), SessionId("s1"), SHA256_OF_X, "right", b"x")
            assert service.data.failures == []

    run(test)


def test_the_connection_to_a_pnode_that_nobody_asks_any_more_is_closed() -> None:
    async def test(service: Service) -> None:
        host, _, port = service.address.rpartition(":")
        other = f"{'localhost' if host == '127.0.0.1' else host}:{port}"  # A second address of the same service.
        assert other != service.address
        service.data.objects[object_key := f"sessions/s1/objects/{SHA256_OF_X}.safetensors"] = b"x"
        for idle_s, left in ((3600.0, {service.address, other}), (0.0, {other})):
            limits = replace(SHORT, channel_idle_s=idle_s)
            async with DataClient(lambda peer: "", limits=limits) as pnode:
                for address in (service.address, other):
                    got = await pnode.get_object(PeerId("p"), SessionId("s1"), SHA256_OF_X, "right", address)
                    assert got == service.data.objects[object_key]
                assert set(pnode._channels) == left

    run(test)


def test_a_connection_that_is_being_used_is_not_closed() -> None:
    async def test(service: Service) -> None:
        async with DataClient(lambda peer: "", limits=replace(SHORT, channel_idle_s=0.0)) as pnode:
            async with pnode._connected(service.address):
                async with pnode._connected("127.0.0.1:1"):
                    pass
                assert service.address in pnode._channels
            async with pnode._connected("127.0.0.1:1"):
                assert service.address not in pnode._channels

    run(test)


def test_nothing_at_the_data_services_address_is_an_error_at_the_deadline() -> None:
    async def work() -> None:
        async with DataClient("127.0.0.1:1", limits=SHORT) as client:
            with pytest.raises(Unreachable):
                await client.list_datasets()

    asyncio.run(work())


def test_datasets() -> None:
    async def test(service: Service) -> None:
        async with DataClient(service.address) as client:
            name = await client.create_dataset(b"{}")
            assert name == hashlib.sha256(b"{}").hexdigest()
            assert await client.get_dataset(name) == (name, b"{}")
            assert await client.list_datasets() == [(name, b"{}")]
            assert await client.delete_dataset(name) == name
            assert await client.list_datasets() == []
            with pytest.raises(NotFound, match="no dataset"):
                await client.get_dataset("nothing")

    run(test)


def _ref(rows: int, *columns: str, token: str = "right") -> RowsRef:
    return RowsRef(
        dataset=DatasetId("d"), split="train", context=4, rows=tuple(range(rows)), columns=columns, token=token
    )


def test_rows_become_tensors_in_the_order_of_the_columns() -> None:
    async def test(service: Service) -> None:
        tokens = np.arange(400_000, dtype=np.int64).reshape(2, -1)
        targets = np.arange(8, dtype=np.int64).reshape(2, 4)
        service.data.columns = [
            ColumnData(name=name, shape=value.shape, dtype="int64", data=value.tobytes())
            for name, value in (("tokens", tokens), ("targets", targets))
        ]
        table = CountedTable(NumpyBackend())
        async with DataClient(lambda _: service.address, table) as client:
            refs = await client.rows(PeerId("p"), _ref(2, "tokens", "targets"))
            for ref, value in zip(refs, (tokens, targets), strict=True):
                assert (ref.shape, ref.dtype) == (value.shape, "int64")
                assert ref.digest == hashlib.sha256(value.tobytes()).hexdigest()
                assert np.array_equal(table.get(ref.handle), value)
            for wrong in (_ref(3, "tokens", "targets"), _ref(2, "tokens"), _ref(2, "targets", "tokens")):
                with pytest.raises(errors.WireError):
                    await client.rows(PeerId("p"), wrong)
            with pytest.raises(errors.WireError, match="too early"):
                await client.rows(PeerId("p"), _ref(2, "tokens", "targets", "more"))
            with pytest.raises(Refused, match="expired"):
                await client.rows(PeerId("p"), _ref(2, "tokens", token="old"))
        assert table.live() == 2

    run(test)


# --- what operators' hands already know --------------------------------------------------------------------


def test_health_and_reflection_answer() -> None:
    async def test(service: Service) -> None:
        async with grpc.aio.insecure_channel(service.address, [("grpc.enable_http_proxy", 0)]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "dcnr.v1.PNode", "dcnr.v1.Orchestrator", "dcnr.v1.Membership", "dcnr.v1.Data"):
                reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {found.name for found in (await call.read()).list_services_response.service}
            assert {"dcnr.v1.PNode", "dcnr.v1.Orchestrator", "dcnr.v1.Data", "grpc.health.v1.Health"} <= names
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="dcnr.v1.Orchestrator"))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
            call.cancel()

    run(test)


def test_a_pnode_serves_neither_clients_nor_data() -> None:
    async def work() -> None:
        async with Peer("a") as pnode, OrchestratorClient(pnode.address) as client:
            with pytest.raises(Refused, match="no orchestrator"):
                await client.call(GetStatus())

    asyncio.run(work())


def test_a_reply_of_another_protocol_is_an_error_and_no_crash() -> None:
    """grpcio hands on ``None`` for bytes that are no message: some other program listens there."""

    async def garbage(_: Any, __: Any) -> bytes:
        return b"\xff\xff\xff"

    async def garbages(_: Any, __: Any) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    class Anything(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            if details.method.endswith(("FollowEvents", "GetRows")):
                return grpc.unary_stream_rpc_method_handler(garbages)
            return grpc.unary_unary_rpc_method_handler(garbage)

    async def work() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Anything(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        try:
            async with OrchestratorClient(address, SHORT) as client:
                with pytest.raises(errors.WireError, match="no message of this protocol"):
                    await client.call(GetStatus())
                with pytest.raises(errors.WireError, match="no message of this protocol"):
                    await anext(client.stream(FollowEvents(after=0, follow=False)))
            async with DataClient(address, CountedTable(NumpyBackend()), SHORT) as data:
                with pytest.raises(errors.WireError, match="no message of this protocol"):
                    await data.list_datasets()
                rows = RowsRef(dataset=DatasetId("d"), split="train", context=4, rows=(0,), columns=("x",), token="")
                with pytest.raises(errors.WireError, match="no message of this protocol"):
                    await data.rows(PeerId(""), rows)
        finally:
            await server.stop(None)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
