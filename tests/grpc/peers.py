"""Two or more hubs in one process, over real loopback sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dcnr.adapters.grpc.links import LinkHub
from dcnr.adapters.grpc.server import Server, serve
from dcnr.config import LIMITS, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Limits
from dcnr.ids import Incarnation, Instance, PeerId, SessionId
from dcnr.machine import TensorRef
from dcnr.protocol.messages import Descriptor, Direction, Heartbeat, Message, TensorFrame
from dcnr.runtime.tensors import CountedTable, NumpyBackend

DEADLINE_S = 20.0
"""Of every wait: reached only by a failing test."""


class Recorder:
    """What a hub told its driver, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.refuse: str | None = None
        self._changed = asyncio.Event()

    def link_up(self, peer: PeerId, incarnation: Incarnation, role: str, address: str) -> None:
        self._tell("up", peer, incarnation)

    def link_down(self, peer: PeerId, reason: str) -> None:
        self._tell("down", peer, reason)

    def received(self, peer: PeerId, incarnation: Incarnation, message: Message) -> None:
        self._tell("received", peer, message)

    def check_frame(self, peer: PeerId, frame: TensorFrame) -> str | None:
        return self.refuse

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        self._changed.set()

    def kinds(self, *wanted: str) -> list[tuple[Any, ...]]:
        return [what for what in self.told if what[0] in wanted]

    def messages(self) -> list[Any]:
        return [what[2] for what in self.kinds("received")]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def count(self, kind: str, number: int) -> None:
        await self.until(lambda: len(self.kinds(kind)) >= number)


class Peer:
    """A hub with its server, table and recorder."""

    def __init__(
        self,
        name: str,
        *,
        boot: int = 1,
        limits: Limits = LIMITS,
        versions: tuple[int, int] | None = None,
        events: Recorder | None = None,
    ) -> None:
        low, high = versions or (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX)
        self.id = PeerId(name * 32)
        self.events = events or Recorder()
        self.table = CountedTable(NumpyBackend())
        self.hub = LinkHub(
            descriptor=Descriptor(
                peer=self.id,
                incarnation=Incarnation(boot=boot, nonce=f"{boot:032x}"),
                role="pnode",
                addresses=(),
                version_min=low,
                version_max=high,
            ),
            table=self.table,
            events=self.events,
            limits=limits,
        )
        self.server: Server

    async def __aenter__(self) -> Peer:
        self.server = await serve("127.0.0.1:0", self.hub, None, None)
        return self

    async def __aexit__(self, *_details: object) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.hub.stop()

    @property
    def address(self) -> str:
        return self.server.address

    def dial(self, other: Peer) -> None:
        self.hub.dial(other.id, (other.address,))

    async def linked(self, other: Peer) -> None:
        """Dial, and wait until both ends have been told."""
        ups, others = len(self.events.kinds("up")), len(other.events.kinds("up"))
        self.dial(other)
        await self.events.count("up", ups + 1)
        await other.events.count("up", others + 1)

    def send_tensor(self, other: Peer, frame: TensorFrame, value: np.ndarray[Any, Any]) -> None:
        """Send, and give our own count back at once, as a machine does."""
        handle = self.table.put(value)
        self.hub.send(other.id, replace(frame, tensor=replace(frame.tensor, handle=handle)))
        self.table.release(handle)

    def value(self, frame: TensorFrame) -> Any:
        """The tensor of a frame that was received."""
        return self.table.get(frame.tensor.handle)


def beat(sequence: int) -> Heartbeat:
    return Heartbeat(sequence=sequence, memory_free_bytes=1, progress=())


def frame_of(value: np.ndarray[Any, Any], *, microbatch: int = 0, digest: str | None = None) -> TensorFrame:
    return TensorFrame(
        session=SessionId("s"),
        edge=3,
        direction=Direction.BACKWARD,
        step=7,
        microbatch=microbatch,
        source_instance=Instance(1),
        target_instance=Instance(1),
        target_incarnation=Incarnation(boot=1, nonce="n"),
        tensor=TensorRef(handle=0, shape=value.shape, dtype=str(value.dtype), digest=digest),  # type: ignore[arg-type]
    )
