"""The simulated store keeps the contract that the folder and a real S3 server keep, as far as it has the calls."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from dcnr.errors import AlreadyExists, NotFound
from dcnr.ids import Sha256
from dcnr.runtime import ports
from dcnr.sim.store import Store
from dcnr.sim.world import Process, World
from tests.contracts.store_contract import ObjectContract


class Checkers:
    def created(self, key: str, data: bytes) -> None: ...

    def deleted(self, key: str) -> None: ...


class Virtual:
    """As much of the world as the twin needs: time, chance, and checkers that say nothing."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.checkers = Checkers()
        self.life = 0
        self._now_us = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def after(self, delay_us: int, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self._now_us + delay_us, self._order, act))

    def durable(self, key: str) -> None: ...

    def settle(self) -> None:
        """Everything that is under way lands."""
        while self._heap:
            self._now_us, _, act = heapq.heappop(self._heap)
            act()

    async def until(self, answered: Callable[[], bool]) -> None:
        """Virtual time passes, and others on the loop have their turn, as long as an answer is missing."""
        while not answered():
            await asyncio.sleep(0)
            if not answered():
                self._now_us, _, act = heapq.heappop(self._heap)
                act()


class TwinStore:
    """The twin's calls with answers as the port's. It answers neither deletions nor hints: what is under way lands first."""

    url = "sim://"

    def __init__(self, seed: int) -> None:
        self._world = Virtual(seed)
        self._owner = cast(Process, self._world)
        self._twin = Store(cast(World, self._world), (1, 50_000), 0.0)

    async def _answered(self, call: Callable[[Callable[[Any], None]], None]) -> Any:
        answers: list[Any] = []
        call(answers.append)
        await self._world.until(lambda: bool(answers))
        return answers[0]

    async def create(self, key: str, data: bytes) -> None:
        if await self._answered(lambda answer: self._twin.create(self._owner, key, data, answer)) is not None:
            raise AlreadyExists(key)

    async def create_from(self, key: str, chunks: AsyncIterator[bytes], sha256: Sha256) -> None:
        raise NotImplementedError("the simulator's states are small")

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        found = await self._answered(lambda answer: self._twin.get(key, answer))
        if found is None:
            raise NotFound(key)
        data: bytes = found[start:]
        return data if length is None else data[:length]

    async def size(self, key: str) -> int:
        return len(await self.get(key))

    async def signed_get(self, key: str, valid_s: float) -> None: ...

    async def put_hint(self, key: str, data: bytes) -> None:
        self._twin.hint(self._owner, key, data)
        self._world.settle()

    async def delete(self, key: str) -> None:
        self._twin.delete(self._owner, (key,))
        self._world.settle()

    async def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self._twin.objects if key.startswith(prefix))


@pytest.mark.parametrize("seed", range(5))
class TestSimulatedStore(ObjectContract):
    @pytest.fixture
    def store(self, seed: int) -> ports.Store:
        return TwinStore(seed)
