"""What a PNode gives to others: to whom, of what, and what it takes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnr.adapters.files import HomeFolder
from dcnr.config import Limits
from dcnr.dataservice.shelf import Shelf
from dcnr.errors import CorruptObject, InvalidData, NotFound, Refused, Unavailable
from dcnr.ids import SessionId, Sha256
from dcnr.session.log import object_key

SESSION, OTHER = SessionId("s" * 32), SessionId("t" * 32)
DATA = bytes(range(256)) * 3
SHA256 = Sha256(hashlib.sha256(DATA).hexdigest())
KEY = object_key(SESSION, SHA256)


async def chunks_of(data: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


class Bench:
    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.home = HomeFolder(path)
        self.shelf = Shelf(self.home, limits or Limits(object_chunk_bytes=100))

    def put(self, key: str, token: str, data: bytes) -> None:
        asyncio.run(self.shelf.put_object(key, token, chunks_of(data)))

    def get(self, key: str, token: str) -> bytes:
        async def got() -> bytes:
            size, chunks = await self.shelf.get_object(key, token)
            found = [chunk async for chunk in chunks]
            assert all(len(chunk) <= 100 for chunk in found)
            assert sum(map(len, found)) == size
            return b"".join(found)

        return asyncio.run(got())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_put_is_given_back_and_lies_in_the_folder_of_what_is_kept_for_others(bench: Bench) -> None:
    bench.shelf.admit(SESSION, "secret")
    bench.put(KEY, "secret", DATA)
    assert bench.get(KEY, "secret") == DATA
    assert bench.home.guarded(SESSION, SHA256) == DATA
    assert bench.home.snapshot(SESSION, SHA256) is None


def test_a_pnodes_own_states_are_given_too(bench: Bench) -> None:
    bench.home.keep_snapshot(SESSION, SHA256, DATA)
    bench.shelf.admit(SESSION, "secret")
    assert bench.get(KEY, "secret") == DATA


@pytest.mark.parametrize("token", ["", "wrong", "secre", "secret ", "säcret"])
def test_only_the_sessions_token_opens_it(bench: Bench, token: str) -> None:
    bench.home.keep_snapshot(SESSION, SHA256, DATA)
    bench.shelf.admit(SESSION, "secret")
    bench.shelf.admit(OTHER, "other")
    for given_token in (token, "other"):
        with pytest.raises(Refused):
            bench.get(KEY, given_token)
        with pytest.raises(Refused):
            bench.put(KEY, given_token, DATA)
    assert bench.home.guarded(SESSION, SHA256) is None


def test_nothing_is_open_before_a_session_is_admitted_and_after_it_has_ended(bench: Bench) -> None:
    bench.home.keep_snapshot(SESSION, SHA256, DATA)
    for token in ("", "secret"):
        with pytest.raises(Refused):
            bench.get(KEY, token)
    bench.shelf.admit(SESSION, "secret")
    assert bench.get(KEY, "secret") == DATA
    bench.shelf.admit(SESSION, "newer")
    bench.shelf.admit(SESSION, "newer")
    for token in ("secret", "newer"):
        assert bench.get(KEY, token) == DATA, "whoever got tickets of the owner before still brings its token"
    bench.shelf.admit(SESSION, "newest")
    with pytest.raises(Refused):
        bench.get(KEY, "secret")
    bench.shelf.admit(SESSION, "")
    for token in ("", "newer", "newest"):
        with pytest.raises(Refused):
            bench.get(KEY, token)


@pytest.mark.parametrize(
    "key",
    [
        "",
        f"sessions/{SESSION}/record.json",
        f"sessions/{SESSION}/objects/{SHA256}",
        f"sessions/{SESSION}/objects/../objects/{SHA256}.safetensors",
        f"sessions/../objects/{SHA256}.safetensors",
        f"/{KEY}",
        f"{KEY}\n",
        KEY.upper(),
        f"datasets/shards/{SHA256}.bin",
    ],
)
def test_a_key_that_is_no_states_is_refused(bench: Bench, key: str) -> None:
    bench.shelf.admit(SESSION, "secret")
    with pytest.raises(Refused):
        bench.get(key, "secret")
    with pytest.raises(Refused):
        bench.put(key, "secret", DATA)


@given(key=st.text(max_size=200), token=st.text(max_size=20))
def test_no_key_and_no_token_but_the_right_ones_reach_the_home(key: str, token: str) -> None:
    class Nobody:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked")

    shelf = Shelf(Nobody(), Limits())  # type: ignore[arg-type]
    shelf.admit(SESSION, "the only token")
    for asked in (key, f"sessions/{key}/objects/{SHA256}.safetensors", KEY):
        with pytest.raises(Refused):
            asyncio.run(shelf.get_object(asked, token))


@given(data=st.binary(max_size=1000))
def test_bytes_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    bench = Bench(tmp_path_factory.mktemp("home"))
    key = object_key(SESSION, Sha256(hashlib.sha256(data).hexdigest()))
    bench.shelf.admit(SESSION, "secret")
    bench.put(key, "secret", data)
    assert bench.get(key, "secret") == data


def test_bytes_that_do_not_hash_to_their_name_are_not_kept(bench: Bench) -> None:
    bench.shelf.admit(SESSION, "secret")
    with pytest.raises(CorruptObject):
        bench.put(KEY, "secret", DATA[:-1])
    assert bench.home.guarded(SESSION, SHA256) is None


def test_what_is_not_there_is_not_found(bench: Bench) -> None:
    bench.shelf.admit(SESSION, "secret")
    with pytest.raises(NotFound):
        bench.get(KEY, "secret")


def test_what_was_damaged_is_not_found_unless_it_is_here_once_more(bench: Bench, tmp_path: Path) -> None:
    bench.shelf.admit(SESSION, "secret")
    bench.put(KEY, "secret", DATA)
    (path,) = (tmp_path / "guarded").rglob("*.safetensors")
    path.write_bytes(DATA[1:])
    with pytest.raises(NotFound):
        bench.get(KEY, "secret")
    bench.put(KEY, "secret", DATA)
    bench.home.keep_snapshot(SESSION, SHA256, DATA)
    path.write_bytes(DATA[1:])
    assert bench.get(KEY, "secret") == DATA


def test_a_full_disk_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(session: SessionId, sha256: Sha256, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.home, "keep_guarded", full)
    bench.shelf.admit(SESSION, "secret")
    with pytest.raises(Unavailable, match="No space left"):
        bench.put(KEY, "secret", DATA)


def test_more_than_a_state_may_have_is_refused_on_the_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Limits(object_bytes=1000))
    bench.shelf.admit(SESSION, "secret")
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 300
            yield bytes(300)

    with pytest.raises(InvalidData, match="1000 bytes"):
        asyncio.run(bench.shelf.put_object(KEY, "secret", endless()))
    assert taken == 1200


def test_addresses_are_signed_by_stores_alone(bench: Bench) -> None:
    bench.shelf.admit(SESSION, "secret")
    assert asyncio.run(bench.shelf.signed_object(KEY, "secret")) is None
