"""What every implementation of the ``Store`` port must do. Subclass with a ``store`` fixture to run it on one.

:class:`ObjectContract` is what the simulated twin has too: it knows neither streams nor names that are none.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import pytest

from dcnr.errors import AlreadyExists, CorruptObject, NotFound, StoreError
from dcnr.ids import Sha256
from dcnr.runtime.ports import Store


def sha256_of(data: bytes) -> Sha256:
    return Sha256(hashlib.sha256(data).hexdigest())


class Stream:
    """Chunks as they come from a network. ``failure`` is raised behind the last one."""

    def __init__(self, *chunks: bytes, failure: BaseException | None = None) -> None:
        self.left = list(chunks)
        self._failure = failure

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await asyncio.sleep(0)
        if self.left:
            return self.left.pop(0)
        raise self._failure or StopAsyncIteration


class ObjectContract:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("the subclass gives an empty store")

    def test_what_was_created_is_read_back(self, store: Store) -> None:
        async def scenario() -> None:
            data = bytes(range(256)) * 5
            await store.create("sessions/a/log/00000000000000000001", data)
            assert await store.get("sessions/a/log/00000000000000000001") == data
            await store.create("sessions/a/empty", b"")
            assert await store.get("sessions/a/empty") == b""

        asyncio.run(scenario())

    def test_a_second_create_is_refused_and_changes_nothing(self, store: Store) -> None:
        async def scenario() -> None:
            await store.create("a/b", b"first")
            with pytest.raises(AlreadyExists, match="a/b"):
                await store.create("a/b", b"second")
            with pytest.raises(AlreadyExists):
                await store.create("a/b", b"first")
            assert await store.get("a/b") == b"first"

        asyncio.run(scenario())

    def test_of_many_creates_at_once_exactly_one_wins(self, store: Store) -> None:
        async def scenario() -> None:
            results = await asyncio.gather(
                *(store.create("race", str(n).encode()) for n in range(20)), return_exceptions=True
            )
            winners = [n for n, result in enumerate(results) if result is None]
            assert len(winners) == 1
            assert all(isinstance(result, AlreadyExists) for n, result in enumerate(results) if n != winners[0])
            assert await store.get("race") == str(winners[0]).encode()

        asyncio.run(scenario())

    def test_ranges(self, store: Store) -> None:
        async def scenario() -> None:
            await store.create("object", b"0123456789")
            assert await store.get("object", 3) == b"3456789"
            assert await store.get("object", 3, 4) == b"3456"
            assert await store.get("object", 0, 0) == b""
            assert await store.get("object", 8, 10) == b"89"
            assert await store.get("object", 10, 1) == b""
            assert await store.size("object") == 10

        asyncio.run(scenario())

    def test_a_missing_object_is_not_found(self, store: Store) -> None:
        async def scenario() -> None:
            with pytest.raises(NotFound, match="nothing/here"):
                await store.get("nothing/here")
            await store.create("a/b", b"")
            with pytest.raises(NotFound):
                await store.get("a")
            for key in ("a", "nothing/here"):
                with pytest.raises(NotFound, match=key):
                    await store.size(key)

        asyncio.run(scenario())

    def test_hints_are_overwritten(self, store: Store) -> None:
        async def scenario() -> None:
            await store.put_hint("orchestrators/a/beat", b"1")
            await store.put_hint("orchestrators/a/beat", b"22")
            assert await store.get("orchestrators/a/beat") == b"22"
            await store.put_hint("orchestrators/a/beat", b"3")
            assert await store.get("orchestrators/a/beat") == b"3"

        asyncio.run(scenario())

    def test_deleted_means_gone_and_free_again(self, store: Store) -> None:
        async def scenario() -> None:
            await store.create("a", b"1")
            await store.delete("a")
            with pytest.raises(NotFound):
                await store.get("a")
            await store.delete("a")
            await store.delete("never/was")
            await store.create("a", b"2")
            assert await store.get("a") == b"2"

        asyncio.run(scenario())

    def test_names_under_a_prefix_come_in_order(self, store: Store) -> None:
        async def scenario() -> None:
            names = ["x/log/00000000000000000010", "x/log/00000000000000000002", "x/record.json", "xy/record.json", "y"]
            for name in names:
                await store.create(name, b"")
            assert await store.list("x/") == sorted(names[:3])
            assert await store.list("x/log/") == [names[1], names[0]]
            assert await store.list("x/log/0000000000000000001") == [names[0]]
            assert await store.list("x") == sorted(names[:4])
            assert await store.list("z/") == []
            assert [name for name in await store.list("") if name != "store.json"] == sorted(names)

        asyncio.run(scenario())

    def test_many_rounds_of_creators_have_one_winner_each(self, store: Store) -> None:
        async def scenario() -> None:
            for number in range(40):
                outcomes = await asyncio.gather(
                    *(store.create(f"race/{number}", str(n).encode()) for n in range(4)), return_exceptions=True
                )
                (winner,) = [n for n, outcome in enumerate(outcomes) if outcome is None]
                assert await store.get(f"race/{number}") == str(winner).encode()
            assert len(await store.list("race/")) == 40

        asyncio.run(scenario())


class StoreContract(ObjectContract):
    def test_chunks_become_one_object(self, store: Store) -> None:
        async def scenario() -> None:
            chunks = (b"first ", b"", b"second " * 300_000, b"third")
            whole = b"".join(chunks)
            await store.create_from("a/b", Stream(*chunks), sha256_of(whole))
            assert await store.get("a/b") == whole
            await store.create_from("a/empty", Stream(), sha256_of(b""))
            assert await store.get("a/empty") == b""
            with pytest.raises(AlreadyExists, match="a/b"):
                await store.create_from("a/b", Stream(b"other"), sha256_of(b"other"))
            assert await store.get("a/b") == whole

        asyncio.run(scenario())

    def test_chunks_of_other_bytes_than_promised_are_refused(self, store: Store) -> None:
        async def scenario() -> None:
            for chunks in ((b"ab", b"d"), (b"ab",), (b"ab", b"c", b"d"), ()):
                with pytest.raises(CorruptObject, match="a/b"):
                    await store.create_from("a/b", Stream(*chunks), sha256_of(b"abc"))
                assert await store.list("a/") == []
            await store.create_from("a/b", Stream(b"ab", b"c"), sha256_of(b"abc"))

        asyncio.run(scenario())

    @pytest.mark.parametrize("failure", [ConnectionError("gone"), ValueError("wrong"), asyncio.CancelledError()])
    def test_chunks_that_break_off_leave_nothing(self, store: Store, failure: BaseException) -> None:
        async def scenario() -> None:
            with pytest.raises(type(failure)):
                await store.create_from("a/b", Stream(b"ab", b"c", failure=failure), sha256_of(b"abc"))
            assert await store.list("a/") == []
            with pytest.raises(NotFound):
                await store.get("a/b")

        asyncio.run(scenario())

    def test_of_many_streams_at_once_exactly_one_wins(self, store: Store) -> None:
        async def scenario() -> None:
            streams = [Stream(*[str(n).encode()] * 5) for n in range(20)]
            results = await asyncio.gather(
                *(store.create_from("race", s, sha256_of(b"".join(s.left))) for s in streams), return_exceptions=True
            )
            winners = [n for n, result in enumerate(results) if result is None]
            assert len(winners) == 1
            assert all(isinstance(result, AlreadyExists) for n, result in enumerate(results) if n != winners[0])
            assert await store.get("race") == str(winners[0]).encode() * 5

        asyncio.run(scenario())

    def test_an_object_of_many_parts(self, store: Store) -> None:
        """Larger than what S3 takes in one piece of a stream; its length is no multiple of anything."""

        async def scenario() -> None:
            pieces = [random.Random(n).randbytes(1 << 20) for n in range(13)] + [b"end"]
            whole = b"".join(pieces)
            key = f"objects/{sha256_of(whole)}.safetensors"
            await store.create_from(key, Stream(*pieces), sha256_of(whole))
            assert await store.size(key) == len(whole)
            assert await store.get(key) == whole
            assert await store.get(key, (12 << 20) + 5, 1 << 19) == whole[(12 << 20) + 5 :][: 1 << 19]
            assert await store.get(key, len(whole) - 3) == b"end"
            stream = Stream(*pieces)
            with pytest.raises(AlreadyExists):
                await store.create_from(key, stream, sha256_of(whole))
            assert stream.left, "what is there is not sent again"

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "failure", [ConnectionError("gone"), asyncio.CancelledError(), None], ids=["broken", "cancelled", "wrong"]
    )
    def test_a_long_stream_that_breaks_off_or_is_not_its_name_leaves_nothing(
        self, store: Store, failure: BaseException | None
    ) -> None:
        async def scenario() -> None:
            pieces = [bytes([n]) * (1 << 20) for n in range(12)]
            name = sha256_of(b"".join(pieces) + b"more")
            with pytest.raises(CorruptObject if failure is None else type(failure)):
                await store.create_from(f"objects/{name}", Stream(*pieces, failure=failure), name)
            assert await store.list("objects/") == []
            with pytest.raises(NotFound):
                await store.size(f"objects/{name}")
            await store.create_from(f"objects/{name}", Stream(*pieces, b"more"), name)

        asyncio.run(scenario())

    def test_a_writer_cancelled_in_the_middle_of_a_long_stream_leaves_nothing(self, store: Store) -> None:
        async def scenario() -> None:
            waiting = asyncio.Event()

            async def chunks() -> AsyncIterator[bytes]:
                for n in range(12):
                    yield bytes([n]) * (1 << 20)
                waiting.set()
                await asyncio.Event().wait()

            stream = chunks()
            writer = asyncio.create_task(store.create_from(f"objects/{'0' * 64}", stream, Sha256("0" * 64)))
            await waiting.wait()
            writer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writer
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert await store.list("objects/") == []

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            "./a",
            ".tmp/a",
            "a/.hidden",
            "a\\b",
            "a b",
            "a\0",
            "a\n",
            "é",
            "x" * 300,
        ],
    )
    def test_bad_names_are_refused(self, store: Store, key: str) -> None:
        async def scenario() -> None:
            for call in (
                store.create(key, b""),
                store.create_from(key, Stream(), sha256_of(b"")),
                store.get(key),
                store.size(key),
                store.put_hint(key, b""),
                store.delete(key),
            ):
                with pytest.raises(StoreError, match="no name for an object"):
                    await call

        asyncio.run(scenario())
