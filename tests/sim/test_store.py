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
from dcnr.sim.store import Habits, Store
from dcnr.sim.world import Process, World
from tests.contracts.store_contract import ObjectContract


class Watch:
    def created(self, key: str, data: bytes) -> None: ...

    def deleted(self, key: str) -> None: ...


class Virtual:
    """As much of the world as the twin needs: time, chance, and checkers that say nothing."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.watch = Watch()
        self.life = 0
        self.name = "caller"
        self.now_us = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def after(self, delay_us: int, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now_us + delay_us, self._order, act))

    def durable(self, key: str) -> None: ...

    def step(self) -> None:
        """The next thing that is under way lands."""
        self.now_us, _, act = heapq.heappop(self._heap)
        act()

    def settle(self) -> None:
        """Everything that is under way lands."""
        while self._heap:
            self.step()

    async def until(self, answered: Callable[[], bool]) -> None:
        """Virtual time passes, and others on the loop have their turn, as long as an answer is missing."""
        while not answered():
            await asyncio.sleep(0)
            if not answered():
                self.step()


class TwinStore:
    """The twin's calls with answers as the port's. It answers neither deletions nor hints: what is under way lands first."""

    url = "sim://"

    def __init__(self, seed: int) -> None:
        self._world = Virtual(seed)
        self._owner = cast(Process, self._world)
        self._twin = Store(cast(World, self._world), (1, 50_000), Habits())

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
        found = await self._answered(lambda answer: self._twin.get(self._owner, key, answer))
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
        return list(self._twin.listed(prefix))


def _creates(habits: Habits, *bodies: bytes) -> tuple[Virtual, Store, list[Any]]:
    """One key, created with each body in turn by a caller that dies at once; and their answers."""
    world = Virtual(1)
    twin = Store(cast(World, world), (1, 10), habits)
    answers: list[Any] = []
    for body in bodies:
        twin.create(cast(Process, world), "k", body, answers.append)
    world.life += 1
    return world, twin, answers


def test_a_ghost_lands_although_its_caller_heard_of_a_failure_and_died() -> None:
    world, twin, answers = _creates(Habits(ghost_share=1.0, ghost_us=1_000_000), b"first")
    while not answers:
        world.step()
    assert answers == ["the store did not answer"]
    assert twin.objects == {}
    world.settle()
    assert twin.objects == {"k": b"first"}
    assert answers == ["the store did not answer"]


def test_a_ghost_overwrites_nothing_and_a_retry_finds_its_own_bytes() -> None:
    seen = set()
    for seed in range(60):
        world = Virtual(seed)
        owner = cast(Process, world)
        twin = Store(cast(World, world), (1, 10), Habits(ghost_share=0.5, ghost_us=20), seed)
        answers: list[Any] = []
        for number, body in enumerate((b"own", b"own", b"other"), start=1):
            twin.create(owner, "k", body, answers.append)
            while len(answers) < number:
                world.step()
        world.settle()
        seen.add((answers[0], answers[1]))
        assert len(answers) == 3
        assert answers.count(None) <= 1
        if None in answers[:2]:
            assert twin.objects == {"k": b"own"}
    failed = "the store did not answer"
    assert seen >= {(None, b"own"), (failed, None), (failed, b"own"), (failed, failed)}


def test_a_store_that_takes_no_writes_is_read_and_nothing_lands_late() -> None:
    world, twin, answers = _creates(Habits(), b"first")
    world.life -= 1
    world.settle()
    twin.read_only = True
    owner = cast(Process, world)
    twin.create(owner, "k2", b"second", answers.append)
    twin.hint(owner, "k", b"changed")
    twin.delete(owner, ("k",))
    twin.get(owner, "k", answers.append)
    world.settle()
    twin.read_only = False
    world.settle()
    assert twin.objects == {"k": b"first"}
    assert sorted(map(str, answers[1:])) == ["b'first'", "the store takes no writes"]


def test_a_process_that_is_cut_from_the_store_is_the_only_one() -> None:
    world, twin, _ = _creates(Habits(), b"first")
    world.settle()
    twin.objects["k"] = b"first"
    twin.cut_from.add("caller")
    answers: list[Any] = []
    twin.get(cast(Process, world), "k", answers.append)
    world.name = "another"
    twin.get(cast(Process, world), "k", answers.append)
    world.settle()
    assert sorted(map(str, answers)) == ["b'first'", "the store did not answer"]


def test_lists_lag_behind_creates_and_deletions_for_a_while_and_reads_do_not() -> None:
    shown = set()
    for _ in range(2):
        world, twin, _ = _creates(Habits(list_lag_us=1_000), b"first")
        world.life -= 1
        world.settle()
        assert twin.objects == {"k": b"first"}
        shown |= {("new", twin.listed("")) for _ in range(20)}
        world.now_us += 1_000
        assert {twin.listed("") for _ in range(20)} == {("k",)}
        twin.delete(cast(Process, world), ("k",))
        world.settle()
        shown |= {("deleted", twin.listed("")) for _ in range(20)}
        world.now_us += 1_000
        assert {twin.listed("") for _ in range(20)} == {()}
    assert shown == {("new", ()), ("new", ("k",)), ("deleted", ()), ("deleted", ("k",))}


@pytest.mark.parametrize("seed", range(5))
class TestSimulatedStore(ObjectContract):
    @pytest.fixture
    def store(self, seed: int) -> ports.Store:
        return TwinStore(seed)
