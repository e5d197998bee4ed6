"""A TCP proxy on loopback that drops and holds connections, for tests of what a bad network or server does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What befalls one connection: so many bytes pass in each direction (``None`` = all), then both ends are closed.

    ``hold``: then nothing more passes, and both ends stay open.
    """

    up: int | None = None
    down: int | None = None
    hold: bool = False


REFUSE = Fault(up=0)
LOSE_ANSWER = Fault(down=0)
SILENT = Fault(up=0, hold=True)


class Proxy:
    """``async with Proxy(port, faults) as proxy``: connections to ``proxy.port`` go to ``port``.

    Each meets the next of ``faults``, which may be without end; when they are over, none.
    """

    def __init__(self, target: int, faults: Iterable[Fault] = ()) -> None:
        self.port = 0
        self.connections = 0
        self._target = target
        self._faults: Iterator[Fault] = iter(faults)
        self._open: set[asyncio.StreamWriter] = set()
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        fault = next(self._faults, Fault())
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        ends = {writer, other_writer}
        self._open |= ends
        directions = [
            asyncio.create_task(self._pump(reader, other_writer, fault.up, fault.hold)),
            asyncio.create_task(self._pump(other_reader, writer, fault.down, fault.hold)),
        ]
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for task in directions:
            task.cancel()
        for end in ends:
            end.transport.abort()
        self._open -= ends

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, budget: int | None, hold: bool
    ) -> None:
        try:
            while data := await source.read(PIECE_BYTES):
                passed = data if budget is None else data[:budget]
                sink.write(passed)
                await sink.drain()
                if budget is not None:
                    budget -= len(passed)
                    if len(passed) < len(data) or budget == 0:
                        if hold:
                            await self._ended.wait()
                        return
        except OSError:
            return
