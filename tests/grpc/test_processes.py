"""A link between two processes: tensors there and back, throughput, and what a SIGKILL looks like."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from dcnr.config import LIMITS
from dcnr.ids import PeerId
from tests.grpc.peers import DEADLINE_S, Peer, beat, frame_of

ROOT = Path(__file__).parents[2]
OTHER = PeerId("b" * 32)


@asynccontextmanager
async def remote() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.grpc.remote"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        async with asyncio.timeout(DEADLINE_S):
            await process.communicate()


def test_tensors_go_to_another_process_and_back() -> None:
    async def work() -> None:
        async with Peer("a") as a, remote() as (process, address):
            a.hub.dial(OTHER, (address,))
            await a.events.count("up", 1)
            value = np.random.default_rng(0).standard_normal((16 << 20) // 4).astype(np.float32)
            digest = hashlib.sha256(value.tobytes()).hexdigest()
            for number in range(3):
                started_s = time.perf_counter()
                handle = a.table.put(value)
                frame = frame_of(value, microbatch=number, digest=digest if number else None)
                a.hub.send(OTHER, replace(frame, tensor=replace(frame.tensor, handle=handle)))
                a.table.release(handle)
                await a.events.count("received", number + 1)
                passed_s = time.perf_counter() - started_s
                print(f"16 MiB there and back, sha256 {'on' if number else 'off'}: {32 / passed_s:.0f} MiB/s")  # noqa: T201
            for frame in a.events.messages():
                assert np.array_equal(a.value(frame), value)
            started_s = time.perf_counter()
            for number in range(200):
                a.hub.send(OTHER, beat(number))
                await a.events.count("received", 4 + number)
            print(f"round trip: {(time.perf_counter() - started_s) / 200 * 1e6:.0f} us")  # noqa: T201
            process.send_signal(signal.SIGKILL)
            await a.events.count("down", 1)
            assert "lost" in a.events.kinds("down")[0][2]

    asyncio.run(work())


@pytest.mark.skipif(
    grpc.__version__.startswith("1.76."), reason="grpcio 1.76 has no ping_timeout: heartbeats notice it"
)
def test_a_process_that_hangs_is_noticed_by_the_transport_alone() -> None:
    async def work() -> None:
        limits = replace(LIMITS, keepalive_interval_s=0.5, keepalive_timeout_s=0.5)
        async with Peer("a", limits=limits) as a, remote() as (process, address):
            a.hub.dial(OTHER, (address,))
            await a.events.count("up", 1)
            process.send_signal(signal.SIGSTOP)
            try:
                await a.events.count("down", 1)
            finally:
                process.send_signal(signal.SIGCONT)

    asyncio.run(work())


def test_a_process_that_ends_says_goodbye() -> None:
    async def work() -> None:
        async with Peer("a") as a:
            async with remote() as (process, address):
                a.hub.dial(OTHER, (address,))
                await a.events.count("up", 1)
                assert process.stdin is not None
                process.stdin.close()
                await a.events.count("down", 1)
                assert a.events.kinds("down")[0][2] == "closed by the peer: this process is stopping"
            assert process.returncode == 0

    asyncio.run(work())
