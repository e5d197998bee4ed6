"""Links over real sockets: what is told, in what order, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from dcnr.adapters.grpc import links
from dcnr.adapters.grpc.server import serve
from dcnr.config import LIMITS
from dcnr.errors import AddressInUse, UsageError
from dcnr.protocol.messages import Heartbeat, Leave, TensorFrame
from tests.grpc.peers import DEADLINE_S, Peer, beat, frame_of


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test, and demand that no task of ours is left when it has ended."""

    async def clean() -> None:
        before = asyncio.all_tasks()
        async with asyncio.timeout(60):
            await work
        async with asyncio.timeout(DEADLINE_S):
            while left := {task for task in asyncio.all_tasks() - before if _ours(task)}:
                await asyncio.wait(left)

    asyncio.run(clean())


def _ours(task: asyncio.Task[Any]) -> bool:
    return task.get_name().startswith(("read ", "write ", "dial ", "handshake"))


def test_messages_arrive_in_order_both_ways() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            for number in range(500):
                a.hub.send(b.id, beat(number))
                b.hub.send(a.id, beat(-number))
            await a.events.count("received", 500)
            await b.events.count("received", 500)
            assert [m.sequence for m in b.events.messages()] == list(range(500))
            assert [m.sequence for m in a.events.messages()] == [-n for n in range(500)]

    run(work())


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 1000), (3, 1 << 20)])
def test_tensors_arrive_equal_and_nothing_is_held(shape: tuple[int, ...]) -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            value = np.asarray(np.random.default_rng(1).standard_normal(shape), dtype=np.float32)
            digest = hashlib.sha256(value.tobytes()).hexdigest()
            a.send_tensor(b, frame_of(value, digest=digest), value)
            await b.events.count("received", 1)
            (frame,) = b.events.messages()
            assert replace(frame, tensor=replace(frame.tensor, handle=0)) == frame_of(value, digest=digest)
            assert np.array_equal(b.value(frame), value)
            b.table.release(frame.tensor.handle)
            a.hub.close(b.id, "done")
            await b.events.count("down", 1)
            assert (a.table.live(), b.table.live()) == (0, 0)

    run(work())


def test_control_overtakes_chunks() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            value = np.zeros(64 << 20, np.uint8)
            a.send_tensor(b, frame_of(value), value)
            a.hub.send(b.id, beat(1))
            await b.events.count("received", 2)
            assert isinstance(b.events.messages()[0], Heartbeat)
            assert isinstance(b.events.messages()[1], TensorFrame)

    run(work())


def test_a_broken_link_is_told_once_and_can_be_dialled_again() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            await a.hub.stop()
            await b.events.count("down", 1)
            assert a.events.kinds("down") == []
            async with Peer("a") as again:
                await again.linked(b)
                assert [kind for kind, *_ in b.events.told] == ["up", "down", "up"]
                b.hub.close(again.id, "enough")
                await again.events.count("down", 1)
                assert "enough" in again.events.kinds("down")[0][2]
                again.hub.send(b.id, beat(1))
                await again.linked(b)
                assert len(b.events.kinds("down")) == 1, "a link that we close ourselves is not told"

    run(work())


def test_a_close_flushes_control_frames() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            for number in range(200):
                a.hub.send(b.id, beat(number))
            a.hub.send(b.id, Leave(reason="SIGTERM"))
            await a.hub.stop()
            await b.events.count("down", 1)
            assert b.events.messages()[-1] == Leave(reason="SIGTERM")
            assert len(b.events.messages()) == 201

    run(work())


@pytest.mark.parametrize("round_", range(20))
def test_crossing_dials_make_one_link(round_: int) -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            first, second = (a, b) if round_ % 2 else (b, a)
            first.dial(second)
            for _ in range(round_ % 7):
                await asyncio.sleep(0)
            second.dial(first)
            await a.events.count("up", 1)
            await b.events.count("up", 1)
            a.hub.send(b.id, beat(1))
            b.hub.send(a.id, beat(2))
            await a.events.count("received", 1)
            await b.events.count("received", 1)
            assert [kind for kind, *_ in a.events.told] == ["up", "received"]
            assert [kind for kind, *_ in b.events.told] == ["up", "received"]

    run(work())


def test_the_lower_peer_answers_a_crossing_dial_when_its_own_fails() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            connections: list[asyncio.StreamWriter] = []
            silent = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
            port = silent.sockets[0].getsockname()[1]
            a.hub.dial(b.id, (f"127.0.0.1:{port}",))
            b.dial(a)
            await a.events.count("up", 1)
            await b.events.count("up", 1)
            assert [kind for kind, *_ in a.events.told] == ["up"]
            for connection in connections:
                connection.close()
            silent.close()
            await silent.wait_closed()

    run(work())


def test_addresses_are_tried_in_turn_and_a_failed_dial_is_told() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b, Peer("c") as c:
            a.hub.dial(b.id, ("127.0.0.1:1", c.address, b.address))
            await a.events.count("up", 1)
            a.hub.dial(c.id, ("127.0.0.1:1", b.address))
            await a.events.count("down", 1)
            (_, peer, reason) = a.events.kinds("down")[0]
            assert peer == c.id
            assert "127.0.0.1:1: " in reason
            assert f"this is pnode {b.id}" in reason
            assert c.events.told == []

    run(work())


def test_a_new_start_replaces_the_old_one_and_an_old_one_is_refused() -> None:
    async def work() -> None:
        async with Peer("b") as b, Peer("a", boot=5) as old, Peer("a", boot=6) as new, Peer("a", boot=4) as stale:
            await old.linked(b)
            new.dial(b)
            await new.events.count("up", 1)
            await old.events.count("down", 1)
            assert [what[0] for what in b.events.told] == ["up", "down", "up"]
            assert b.events.told[-1][2].boot == 6
            for refused in (old, stale):
                downs = len(refused.events.kinds("down"))
                refused.dial(b)
                await refused.events.count("down", downs + 1)
                assert "is old: start 6 is known" in refused.events.told[-1][2]
            assert len(b.events.told) == 3

    run(work())


def test_two_processes_of_one_home_are_noticed() -> None:
    async def work() -> None:
        async with Peer("b") as b, Peer("a") as a, Peer("a") as copy:
            descriptor = copy.hub.descriptor
            copy.hub.descriptor = replace(descriptor, incarnation=replace(descriptor.incarnation, nonce="other"))
            await a.linked(b)
            copy.dial(b)
            await copy.events.count("down", 1)
            assert "two processes" in copy.events.told[-1][2]
            assert len(b.events.told) == 1

    run(work())


def test_version_ranges_must_overlap_and_both_are_named() -> None:
    async def work() -> None:
        async with Peer("a", versions=(1, 2)) as a, Peer("b", versions=(3, 4)) as b, Peer("c", versions=(2, 3)) as c:
            a.dial(b)
            await a.events.count("down", 1)
            assert "1 to 2" in a.events.told[0][2]
            assert "3 to 4" in a.events.told[0][2]
            assert b.events.told == []
            await a.linked(c)
            await c.linked(b)

    run(work())


def test_a_redial_replaces_a_link_whose_break_was_not_noticed() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            # What b would do after a break that a has not seen: forget its end, and dial.
            link = b.hub._links.pop(a.id)
            b.dial(a)
            await b.events.count("up", 2)
            assert [kind for kind, *_ in a.events.told] == ["up", "down", "up"]
            link.end("forgotten", tell=False, bye=False)

    run(work())


def test_a_peer_that_does_not_read_costs_its_link_and_not_our_memory() -> None:
    async def work() -> None:
        async with Peer("a", limits=replace(LIMITS, link_queue=10)) as a, Peer("b") as b:
            await a.linked(b)
            value = np.zeros(4, np.uint8)
            for number in range(11):
                a.send_tensor(b, frame_of(value, microbatch=number), value)
            assert [kind for kind, *_ in a.events.told] == ["up", "down"]
            assert "does not read: 10 frames" in a.events.told[-1][2]
            assert a.table.live() == 0
            await b.events.count("down", 1)

    run(work())


def test_a_frame_that_is_too_large_is_not_sent() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            a.hub.send(b.id, Leave(reason="x" * (6 << 20)))
            await b.events.count("down", 1)
            assert "Leave of 6291466 bytes" in b.events.told[-1][2]

    run(work())


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_dialled_closed_and_broken_ups_and_downs_alternate(seed: int) -> None:
    """Dials of both sides, closes and broken calls in any order; then one more link, which must work."""

    async def work() -> None:
        random = np.random.default_rng(seed)
        async with Peer("a") as a, Peer("b") as b:
            for _ in range(25):
                me, other = (a, b) if random.integers(2) else (b, a)
                link = me.hub._links.get(other.id)
                match random.integers(4):
                    case 0 | 1:
                        me.dial(other)
                    case 2:
                        me.hub.close(other.id, "at random")
                        if link is not None:
                            me.events.told.append(("down", other.id, "closed here"))
                    case 3 if link is not None and link.dialled:
                        link._stream.cancel()  # type: ignore[attr-defined]
                for _ in range(random.choice([0, 1, 3, 10, 50])):
                    await asyncio.sleep(0)
            for me, other in ((a, b), (b, a)):
                if me.hub._links.get(other.id) is not None:
                    me.events.told.append(("down", other.id, "closed here"))
                me.hub.close(other.id, "to begin anew")
            while a.hub._tasks | b.hub._tasks:
                await asyncio.wait(a.hub._tasks | b.hub._tasks)
            for peer in (a, b):
                states = [kind for kind, *_ in peer.events.told]
                assert states == ["up", "down"] * (len(states) // 2) + ["up"] * (len(states) % 2)
            await a.linked(b)
            a.hub.send(b.id, beat(1))
            await b.events.count("received", 1)

    run(work())


def test_links_that_were_closed_leave_no_calls_behind() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            for number in range(1, 21):
                await a.linked(b)
                closer, other = (a, b) if number % 2 else (b, a)
                downs = len(other.events.kinds("down"))
                closer.hub.close(other.id, "again")
                await other.events.count("down", downs + 1)
            async with asyncio.timeout(DEADLINE_S):
                while a.hub._tasks | b.hub._tasks:
                    await asyncio.wait(a.hub._tasks | b.hub._tasks)
            gc.collect()
            calls = [thing for thing in gc.get_objects() if issubclass(type(thing), grpc.aio.Call) and not thing.done()]
            assert calls == []

    run(work())


# --- tensors that are wrong --------------------------------------------------------------------------------


def test_a_corrupted_tensor_closes_the_link_and_is_not_delivered() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            link = b.hub._links[a.id]
            value = np.ones(1 << 20, np.float32)
            a.send_tensor(b, frame_of(value, digest="0" * 64), value)
            await b.events.count("down", 1)
            await a.events.count("down", 1)
            assert "hash to" in b.events.kinds("down")[0][2]
            assert "hash to" in a.events.kinds("down")[0][2]
            assert link.wire_errors == 1
            assert b.events.messages() == []
            assert (a.table.live(), b.table.live()) == (0, 0)

    run(work())


def test_of_a_refused_tensor_only_the_header_is_handed_on() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            b.events.refuse = "edge 3 carries float64"
            value = np.ones(1 << 20, np.float32)
            a.send_tensor(b, frame_of(value, microbatch=4), value)
            await b.events.count("received", 1)
            assert b.events.messages() == [frame_of(value, microbatch=4)]
            b.events.refuse = None
            a.send_tensor(b, frame_of(value, microbatch=5), value)
            await b.events.count("received", 2)
            frame = b.events.messages()[1]
            assert (frame.microbatch, b.table.live()) == (5, 1)
            assert np.array_equal(b.value(frame), value)

    run(work())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "complex64"}, "dtype 'complex64'"),
        ({"shape": (5,)}, "is 20 bytes"),
        ({"shape": (1 << 40, 1 << 40)}, "are announced"),
    ],
)
def test_a_header_that_does_not_fit_its_bytes_closes_the_link(change: dict[str, Any], reason: str) -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            value = np.ones(4, np.float32)
            frame = frame_of(value)
            a.send_tensor(b, replace(frame, tensor=replace(frame.tensor, **change)), value)
            await b.events.count("down", 1)
            assert reason in b.events.kinds("down")[0][2]

    run(work())


def test_a_tensor_that_dies_with_its_link_leaves_nothing() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            value = np.ones(64 << 20, np.uint8)
            a.send_tensor(b, frame_of(value), value)
            b.events.refuse = None
            started = asyncio.Event()
            b.events.check_frame = lambda peer, frame: started.set()  # type: ignore[method-assign]
            async with asyncio.timeout(DEADLINE_S):
                await started.wait()
            a.hub.close(b.id, "changed my mind")
            await b.events.count("down", 1)
            assert b.events.messages() == []
            assert (a.table.live(), b.table.live()) == (0, 0)
            await a.linked(b)

    run(work())


# --- what strangers send -----------------------------------------------------------------------------------


async def _stranger(address: str, *messages: bytes) -> tuple[grpc.StatusCode, str]:
    """Send raw bytes as frames; how the call ended."""
    async with grpc.aio.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.stream_stream(links.METHOD)()
        try:
            for message in messages:
                await call.write(message)
            while await call.read() is not grpc.aio.EOF:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        finally:
            call.cancel()
        return await call.code(), await call.details()


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"\x0a\x03abc", beat.__name__.encode()])
def test_garbage_instead_of_a_hello_ends_only_that_call(garbage: bytes) -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            code, _ = await _stranger(b.address, garbage)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            a.hub.send(b.id, beat(1))
            await b.events.count("received", 1)
            assert len(b.events.told) == 2

    run(work())


def test_garbage_on_an_open_link_closes_that_link_with_a_reason() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b, Peer("c") as c:
            await a.linked(b)
            await c.linked(b)
            await a.hub._links[b.id]._stream.write(b"\xff\xff\xff")
            await a.events.count("down", 1)
            assert "malformed frame" in a.events.kinds("down")[0][2]
            c.hub.send(b.id, beat(1))
            await b.events.count("received", 1)

    run(work())


def test_a_stranger_that_says_nothing_is_dropped_after_the_handshake_deadline() -> None:
    async def work() -> None:
        async with Peer("b", limits=replace(LIMITS, dial_timeout_s=0.2)) as b:
            code, details = await _stranger(b.address)
            assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "no Hello")

    run(work())


# --- ports and proxies -------------------------------------------------------------------------------------


def test_a_taken_port_is_an_error_and_the_first_is_undisturbed() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            with pytest.raises(AddressInUse, match=b.address):
                await serve(b.address, Peer("c").hub, None, None)
            a.hub.send(b.id, beat(1))
            await b.events.count("received", 1)

    run(work())


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", ":50050", "localhost:http", "h:-1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    async def work() -> None:
        with pytest.raises(UsageError, match="no address"):
            await serve(address, Peer("c").hub, None, None)

    run(work())


def test_a_dead_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)

    run(work())


def test_throughput_of_64_mib_is_printed() -> None:
    async def work() -> None:
        async with Peer("a") as a, Peer("b") as b:
            await a.linked(b)
            value = np.ones(16 << 20, np.float32)
            for digest in (None, hashlib.sha256(value.tobytes()).hexdigest()):
                before = len(b.events.messages())
                started_s = time.perf_counter()
                a.send_tensor(b, frame_of(value, digest=digest), value)
                await b.events.count("received", before + 1)
                passed_s = time.perf_counter() - started_s
                print(f"64 MiB, {'with' if digest else 'without'} sha256: {64 / passed_s:.0f} MiB/s")  # noqa: T201

    run(work())
