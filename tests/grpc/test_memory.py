"""What a data service keeps in memory, measured in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from dcnr.adapters.grpc.client import DataClient
from dcnr.ids import PeerId, SessionId, Sha256
from dcnr.session import tokens
from tests.grpc.data_server import SECRET
from tests.grpc.peers import DEADLINE_S

ROOT = Path(__file__).parents[2]
OBJECT_BYTES = 200 << 20
GROWTH_BYTES_MOST = 40 << 20
MANY_BYTES_MOST = 80 << 20
"""Half of what the eight objects have; measured are 30 MB."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory comes from /proc")
def test_objects_larger_than_an_orchestrator_pass_through_it(tmp_path: Path) -> None:
    async def work() -> None:
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.grpc.data_server", str(tmp_path / "store")),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert server.stdin is not None
        assert server.stdout is not None

        async def peak_bytes() -> int:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(b"\n")
            return int(await server.stdout.readline())

        try:
            address = (await server.stdout.readline()).decode().strip()
            async with DataClient(lambda _: address) as client:

                async def there_and_back(size: int) -> None:
                    data = np.random.default_rng(size).bytes(size)
                    sha256 = Sha256(hashlib.sha256(data).hexdigest())
                    peer, session = PeerId("p"), SessionId("s")
                    write, read = (tokens.mint(SECRET, f"objects/s/{right}", 100.0) for right in ("write", "read"))
                    await client.put_object(peer, session, sha256, write, data)
                    await client.put_object(peer, session, sha256, write, data)
                    assert await client.get_object(peer, session, sha256, read) == data

                await there_and_back(2 << 20)  # What is loaded and made once.
                before = await peak_bytes()
                await there_and_back(OBJECT_BYTES)
                assert await peak_bytes() - before < GROWTH_BYTES_MOST
                await asyncio.gather(*(there_and_back((20 << 20) + n) for n in range(8)))
                assert await peak_bytes() - before < MANY_BYTES_MOST, "eight at a time"
        finally:
            server.stdin.close()
            async with asyncio.timeout(DEADLINE_S):
                await server.communicate()

    asyncio.run(work())
