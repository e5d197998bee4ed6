"""States from PNode to PNode, over a real socket: two calls of the data service and no other one."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from dcnr.adapters.files import HomeFolder
from dcnr.adapters.grpc.client import DataClient
from dcnr.adapters.grpc.generated import services_pb2
from dcnr.adapters.grpc.server import serve
from dcnr.config import Limits
from dcnr.dataservice.pacer import Pacer
from dcnr.dataservice.shelf import Shelf
from dcnr.errors import CorruptObject, NotFound, Refused, Unavailable, Unreachable
from dcnr.ids import PeerId, SessionId, Sha256
from tests.grpc.peers import Peer

SESSION, TOKEN = SessionId("s" * 32), "the session's"
DATA = bytes(range(256)) * 5000
SHA256 = Sha256(hashlib.sha256(DATA).hexdigest())
NOBODY = PeerId("whom nobody resolves")
LIMITS = Limits(transfer_timeout_s=20.0)


class Guard:
    """A PNode, as far as it serves others."""

    def __init__(self, path: Path) -> None:
        self.home = HomeFolder(path)
        self.shelf = Shelf(self.home, LIMITS)
        self.shelf.admit(SESSION, TOKEN)
        self.address = ""
        self.asked = 0


def resolved(peer: PeerId) -> str:
    raise AssertionError(f"{peer}: the address was given")


def run(path: Path, test: Callable[[Guard, DataClient], Coroutine[Any, Any, None]]) -> None:
    async def work() -> None:
        guard = await asyncio.to_thread(Guard, path)
        hub = Peer("a").hub
        server = await serve("127.0.0.1:0", hub, None, None, guard.shelf)
        guard.address = server.address
        try:
            async with asyncio.timeout(60), DataClient(resolved, LIMITS) as client:
                await test(guard, client)
        finally:
            await hub.stop()

    asyncio.run(work())


def test_a_state_is_put_and_got(tmp_path: Path) -> None:
    async def test(guard: Guard, client: DataClient) -> None:
        await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA, guard.address)
        assert await asyncio.to_thread(guard.home.guarded, SESSION, SHA256) == DATA
        await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA, guard.address)  # Once more is no error.
        assert await client.get_object(NOBODY, SESSION, SHA256, TOKEN, guard.address) == DATA

    run(tmp_path, test)


def test_states_leave_no_faster_than_the_owner_allows(tmp_path: Path) -> None:
    """In both directions that they leave by, together. All but the first chunk wait for their turn."""

    async def test(guard: Guard, client: DataClient) -> None:
        client._pacer = guard.shelf._pacer = Pacer(20 * len(DATA))
        begun = time.monotonic()
        await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA, guard.address)
        assert await client.get_object(NOBODY, SESSION, SHA256, TOKEN, guard.address) == DATA
        waits = (2 * len(DATA) - LIMITS.object_chunk_bytes) / (20 * len(DATA))
        assert time.monotonic() - begun >= waits

    run(tmp_path, test)


def test_refusals_come_back_with_their_reasons(tmp_path: Path) -> None:
    async def test(guard: Guard, client: DataClient) -> None:
        with pytest.raises(NotFound, match="not kept here"):
            await client.get_object(NOBODY, SESSION, SHA256, TOKEN, guard.address)
        with pytest.raises(Refused, match="no access"):
            await client.get_object(NOBODY, SESSION, SHA256, "another", guard.address)
        with pytest.raises(Refused, match="no access"):
            await client.put_object(NOBODY, SESSION, SHA256, "another", DATA, guard.address)
        with pytest.raises(CorruptObject):
            await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA[1:], guard.address)
        assert await asyncio.to_thread(guard.home.guarded, SESSION, SHA256) is None

    run(tmp_path, test)


def test_a_full_disk_is_told_after_one_try(tmp_path: Path) -> None:
    """An orchestrator would be asked again until the deadline; who keeps states for others is not worth the wait."""

    async def test(guard: Guard, client: DataClient) -> None:
        def full(session: SessionId, sha256: Sha256, data: bytes) -> None:
            guard.asked += 1
            raise OSError(28, "No space left on device")

        guard.home.keep_guarded = full  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="No space left"):
            await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA, guard.address)
        assert guard.asked == 1

    run(tmp_path, test)


def test_where_nobody_listens_there_is_no_second_try(tmp_path: Path) -> None:
    async def test(guard: Guard, client: DataClient) -> None:
        tries = 0
        real = client._connected

        def counted(address: str) -> Any:
            nonlocal tries
            tries += 1
            return real(address)

        client._connected = counted  # type: ignore[method-assign]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(Unreachable):
                await client.put_object(NOBODY, SESSION, SHA256, TOKEN, DATA, address)
            with pytest.raises(Unreachable):
                await client.get_object(NOBODY, SESSION, SHA256, TOKEN, address)
        assert tries == 2

    run(tmp_path, test)


@pytest.mark.parametrize("service", ["Data", "Orchestrator", "Membership"])
def test_a_pnode_answers_nothing_else(tmp_path: Path, service: str) -> None:
    async def test(guard: Guard, client: DataClient) -> None:
        descriptor = services_pb2.DESCRIPTOR.services_by_name[service]
        served = {"GetObject", "PutObject"}
        found = set()
        async with grpc.aio.insecure_channel(guard.address) as channel:
            for method in descriptor.methods:
                path = f"/{descriptor.full_name}/{method.name}"
                if method.client_streaming:
                    call: Any = channel.stream_unary(path)(iter([b""]))
                elif method.server_streaming:
                    call = channel.unary_stream(path)(b"")
                else:
                    call = channel.unary_unary(path)(b"")
                if await call.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    found.add(method.name)
        assert found == (served if service == "Data" else set())

    run(tmp_path, test)
