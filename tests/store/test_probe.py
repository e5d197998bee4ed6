"""Stores that are not fit, each in its own way, are refused by name and reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dcnr.adapters.store.probe import CREATORS, probe
from dcnr.errors import AlreadyExists, NotFound, StoreUnavailable
from dcnr.ids import Sha256


class Memory:
    """A fit store, to be spoilt by a subclass."""

    url = "memory://here"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def create(self, key: str, data: bytes) -> None:
        await asyncio.sleep(0)
        if key in self.objects:
            raise AlreadyExists(key)
        self.objects[key] = data

    async def create_from(self, key: str, chunks: AsyncIterator[bytes], sha256: Sha256) -> None:
        raise NotImplementedError

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key][start:][: length if length is not None else None]

    async def size(self, key: str) -> int:
        return len(await self.get(key))

    async def signed_get(self, key: str, valid_s: float) -> None: ...

    async def put_hint(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))


class IgnoresConditions(Memory):
    async def create(self, key: str, data: bytes) -> None:
        self.objects[key] = data


class LooksThenWrites(Memory):
    async def create(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise AlreadyExists(key)
        await asyncio.sleep(0)
        self.objects[key] = data


class OverwritesAndRefuses(Memory):
    async def create(self, key: str, data: bytes) -> None:
        there = key in self.objects
        self.objects[key] = data
        if there:
            raise AlreadyExists(key)


class LosesEveryRace(Memory):
    async def create(self, key: str, data: bytes) -> None:
        if data.startswith(b"creator"):
            raise AlreadyExists(key)
        await super().create(key, data)


class ShowsLater(Memory):
    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        raise NotFound(key)


class ListsNothing(Memory):
    async def list(self, prefix: str) -> list[str]:
        return []


class IgnoresRanges(Memory):
    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await super().get(key)


class KeepsHints(Memory):
    async def put_hint(self, key: str, data: bytes) -> None:
        self.objects.setdefault(key, data)


class DeletesNothing(Memory):
    async def delete(self, key: str) -> None: ...


class MayNotDelete(Memory):
    async def delete(self, key: str) -> None:
        raise StoreUnavailable("store memory://here cannot be used: no right to delete")


def test_a_fit_store_passes_and_is_left_empty() -> None:
    store = Memory()
    asyncio.run(probe(store))
    assert store.objects == {}


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (IgnoresConditions(), "ignores If-None-Match"),
        (LooksThenWrites(), f"lets {CREATORS} of {CREATORS} creators of one name win"),
        (OverwritesAndRefuses(), "overwrites an object and says that it refused to"),
        (LosesEveryRace(), f"lets 0 of {CREATORS} creators"),
        (ShowsLater(), "does not show what was just written"),
        (ListsNothing(), "does not list what was just written"),
        (IgnoresRanges(), "does not give back parts"),
        (KeepsHints(), "gives back the old bytes after an overwrite"),
        (DeletesNothing(), "gives back what was deleted"),
        (MayNotDelete(), "no right to delete"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Memory) else "",
)
def test_an_unfit_store_is_refused_by_name_and_reason(store: Memory, reason: str) -> None:
    with pytest.raises(StoreUnavailable, match=f"store memory://here .*{reason}"):
        asyncio.run(probe(store))
    if not isinstance(store, DeletesNothing | MayNotDelete):
        assert store.objects == {}, "nothing is left behind"
