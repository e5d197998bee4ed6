"""The data service over a real folder store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dcnr.adapters.store.folder import FolderStore
from dcnr.adapters.text import PreparedDataset, prepare_columns, prepare_text
from dcnr.config import Limits
from dcnr.dataservice.service import PAGE_BYTES, DataService
from dcnr.errors import CorruptObject, DCNRError, InvalidData, NotFound, Refused, StoreError, WireError
from dcnr.ids import DatasetId, Sha256
from dcnr.protocol.messages import RowsRef
from dcnr.runtime.ports import ColumnData
from dcnr.session import tokens
from dcnr.session.dataset import Column, Manifest, Shard, Split, TokenizerRef, manifest_key, shard_key, tokenizer_key

SECRET = b"0123456789abcdef"
TEXT = "\n".join(f"line {n} of some text, which goes on" for n in range(600))


class CountingStore(FolderStore):
    """Notes what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int, int | None]] = []

    def get_now(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads.append((key, start, length))
        return super().get_now(key, start, length)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def service(store: CountingStore) -> DataService:
    return DataService(store, SECRET, lambda: 100.0)


@pytest.fixture
def text(tmp_path: Path) -> PreparedDataset:
    (tmp_path / "a.txt").write_text(TEXT)
    return prepare_text(tmp_path / "a.txt", tokenizer="bpe:300", name="lines", split=0.1)


async def chunks_of(data: bytes, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def put(service: DataService, key: str, token: str, data: bytes) -> None:
    await service.put_object(key, token, chunks_of(data))


async def get(service: DataService, key: str, token: str) -> bytes:
    size, chunks = await service.get_object(key, token)
    data = b"".join([chunk async for chunk in chunks])
    assert len(data) == size
    return data


async def upload(service: DataService, prepared: PreparedDataset) -> str:
    for key, data in prepared.objects.items():
        await put(service, key, "", data)
    return await service.create_dataset(prepared.manifest)


def rows_ref(
    dataset: str,
    rows: Sequence[int],
    *,
    context: int = 0,
    columns: Sequence[str] = ("tokens", "targets"),
    split: str = "train",
    token: str | None = None,
) -> RowsRef:
    return RowsRef(
        dataset=DatasetId(dataset),
        split=split,
        context=context,
        rows=tuple(rows),
        columns=tuple(columns),
        token=tokens.mint(SECRET, f"rows/{dataset}", 200.0) if token is None else token,
    )


def array(column: ColumnData) -> NDArray[np.generic]:
    return np.frombuffer(column.data, dtype=np.dtype(column.dtype)).reshape(column.shape)


def stream(prepared: PreparedDataset, split: str) -> NDArray[np.generic]:
    manifest = Manifest.from_bytes(prepared.manifest)
    shards = manifest.split(split).shards[0]
    return np.frombuffer(b"".join(prepared.objects[shard_key(s.sha256)] for s in shards), dtype="<u2")


def raw_text(values: NDArray[np.generic], shard_tokens: int, dtype: str = "uint16") -> PreparedDataset:
    """A text dataset of given tokens, with shards of a given size."""
    objects = {tokenizer_key(hashlib.sha256(b"{}").hexdigest()): b"{}"}
    shards = []
    for start in range(0, len(values), shard_tokens):
        data = values[start : start + shard_tokens].astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        sha256 = hashlib.sha256(data).hexdigest()
        objects[shard_key(sha256)] = data
        shards.append(Shard(sha256=Sha256(sha256), count=min(shard_tokens, len(values) - start)))
    manifest = Manifest(
        name="raw",
        kind="text",
        stored=(Column(name="tokens", dtype=dtype, shape=()),),
        train=Split(count=len(values), shards=(tuple(shards),)),
        validation=Split(count=0, shards=((),)),
        tokenizer=TokenizerRef(kind="file", sha256=Sha256(hashlib.sha256(b"{}").hexdigest()), vocab=70_000),
        text_sha256="0" * 64,
    )
    return PreparedDataset(id=manifest.id, manifest=manifest.to_bytes(), objects=objects)


class TestTextRows:
    def test_rows_are_slices_of_the_stream(self, service: DataService, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(service, text)
            assert dataset == text.id
            for split in ("train", "validation"):
                whole = stream(text, split)
                total = Manifest.from_bytes(text.manifest).rows(split, 16)
                assert total == (len(whole) - 1) // 16 > 2
                rows = [total - 1, 0, 2, 0]
                got = await service.rows(rows_ref(dataset, rows, context=16, split=split))
                assert [(c.name, c.shape, c.dtype) for c in got] == [
                    ("tokens", (4, 16), "int64"),
                    ("targets", (4, 16), "int64"),
                ]
                for line, row in enumerate(rows):
                    assert array(got[0])[line].tolist() == whole[row * 16 : row * 16 + 16].tolist()
                    assert array(got[1])[line].tolist() == whole[row * 16 + 1 : row * 16 + 17].tolist()

        asyncio.run(scenario())

    def test_columns_come_in_the_order_asked_for(self, service: DataService, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(service, text)
            both = await service.rows(rows_ref(dataset, [1], context=8))
            turned = await service.rows(rows_ref(dataset, [1], context=8, columns=["targets", "tokens"]))
            assert turned == [both[1], both[0]]
            assert await service.rows(rows_ref(dataset, [1], context=8, columns=["targets"])) == [both[1]]

        asyncio.run(scenario())

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_stream_shards_context_and_cache(self, tmp_path: Path, data: st.DataObject) -> None:
        length = data.draw(st.integers(2, 400_000), "length")
        dtype = data.draw(st.sampled_from(["uint16", "uint32"]), "dtype")
        shard_tokens = data.draw(st.integers(max(1, length // 7), length), "shard")
        context = data.draw(st.integers(1, min(length - 1, 150_000)), "context")
        values = np.arange(length) * 31 % (65_536 if dtype == "uint16" else 69_997)
        prepared = raw_text(values, shard_tokens, dtype)
        total = (length - 1) // context
        rows = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=4), "rows")
        limits = Limits(shard_cache_bytes=data.draw(st.sampled_from([1, 2 * PAGE_BYTES, 32 << 20]), "cache"))

        async def scenario() -> None:
            service = DataService(FolderStore(tmp_path / "shared"), SECRET, lambda: 100.0, limits)
            dataset = await upload(service, prepared)
            for _ in range(2):
                got = await service.rows(rows_ref(dataset, rows, context=context))
                assert array(got[0]).tolist() == [values[r * context : (r + 1) * context].tolist() for r in rows]
                assert array(got[1]).tolist() == [
                    values[r * context + 1 : (r + 1) * context + 1].tolist() for r in rows
                ]

        asyncio.run(scenario())

    def test_only_the_needed_ranges_are_read(self, store: CountingStore) -> None:
        values = np.arange(2_000_000) % 60_000
        prepared = raw_text(values, 1_000_000)

        async def scenario() -> None:
            service = DataService(store, SECRET, lambda: 100.0, Limits(shard_cache_bytes=PAGE_BYTES))
            dataset = await upload(service, prepared)
            shards = [shard_key(s.sha256) for s in Manifest.from_bytes(prepared.manifest).train.shards[0]]
            await service.rows(rows_ref(dataset, [5], context=100))
            assert store.reads[-1] == (shards[0], 0, None)
            store.reads.clear()
            await service.rows(rows_ref(dataset, [5], context=100))
            await service.rows(rows_ref(dataset, [6], context=100))
            assert store.reads == []
            store.reads.clear()
            await service.rows(rows_ref(dataset, [5000], context=100))
            assert store.reads == [(shards[0], 1_000_000 // PAGE_BYTES * PAGE_BYTES, PAGE_BYTES)]

        asyncio.run(scenario())

    def test_a_name_that_is_not_there_is_the_first_column(self, service: DataService, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(service, text)
            asked = await service.rows(rows_ref(dataset, [3], context=8, columns=["embedder", "targets", "tokens"]))
            assert [column.name for column in asked] == ["embedder", "targets", "tokens"]
            assert asked[0].data == asked[2].data != asked[1].data

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"rows": [10**9]}, "no row 1000000000"),
            ({"rows": [-1]}, "no row -1"),
            ({"rows": []}, "no rows"),
            ({"rows": [0], "context": 0}, "context of at least 1"),
            ({"rows": [0], "split": "test"}, "no split 'test'"),
        ],
    )
    def test_what_is_not_there_is_refused(
        self, service: DataService, text: PreparedDataset, change: dict[str, object], reason: str
    ) -> None:
        async def scenario() -> None:
            dataset = await upload(service, text)
            with pytest.raises(InvalidData, match=reason):
                await service.rows(rows_ref(dataset, **({"context": 16} | change)))  # type: ignore[arg-type]

        asyncio.run(scenario())


class TestColumnRows:
    def test_named_arrays_come_back(self, service: DataService) -> None:
        rng = np.random.default_rng(0)
        # Rows of 400 kB make shards of 20 rows.
        x, y = rng.normal(size=(50, 100, 500)), rng.integers(0, 9, size=50).astype(np.int32)
        held = rng.normal(size=(3, 100, 500))
        prepared = prepare_columns({"x": x, "y": y}, name="arrays", validation={"x": held, "y": y[:3]})

        async def scenario() -> None:
            dataset = await upload(service, prepared)
            rows = [49, 0, 20, 19]
            got = await service.rows(rows_ref(dataset, rows, columns=["y", "x"]))
            assert [(c.shape, c.dtype) for c in got] == [((4,), "int64"), ((4, 100, 500), "float64")]
            assert array(got[0]).tolist() == y[rows].tolist()
            assert np.array_equal(array(got[1]), x[rows])
            got = await service.rows(rows_ref(dataset, [2], columns=["x"], split="validation"))
            assert np.array_equal(array(got[0]), held[2:])
            with pytest.raises(InvalidData, match="no context"):
                await service.rows(rows_ref(dataset, [0], columns=["x"], context=4))

        asyncio.run(scenario())


class TestTokens:
    def test_rows_need_the_datasets_own_token(self, service: DataService, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(service, text)
            another_dataset = tokens.mint(SECRET, "rows/" + "0" * 64, 200.0)
            expired = tokens.mint(SECRET, f"rows/{dataset}", 99.0)
            another_secret = tokens.mint(b"x" * 16, f"rows/{dataset}", 200.0)
            for token in (another_dataset, expired, another_secret, ""):
                with pytest.raises(Refused):
                    await service.rows(rows_ref(dataset, [0], context=8, token=token))

        asyncio.run(scenario())

    def test_state_objects_need_a_token_of_their_session_and_right(self, service: DataService) -> None:
        data = b"state"
        key = f"sessions/s1/objects/{hashlib.sha256(data).hexdigest()}.safetensors"
        read, write = (tokens.mint(SECRET, f"objects/s1/{right}", 200.0) for right in ("read", "write"))
        other = tokens.mint(SECRET, "objects/s2/write", 200.0)

        async def scenario() -> None:
            for token in (read, other, ""):
                with pytest.raises(Refused):
                    await put(service, key, token, data)
            await put(service, key, write, data)
            await put(service, key, write, data)
            for token in (write, other, ""):
                with pytest.raises(Refused):
                    await get(service, key, token)
            assert await get(service, key, read) == data

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "key",
        [
            "store.json",
            "sessions/s1/record.json",
            "sessions/s1/log/00000000000000000001",
            "sessions/s1/../s2/objects/" + "0" * 64 + ".safetensors",
            "datasets/shards/../../store.json",
            "datasets/" + "0" * 64 + "/manifest.json",
            "datasets/shards/" + "0" * 63 + ".bin",
            "datasets/shards/" + "0" * 64 + ".bin\n",
        ],
    )
    def test_nothing_else_in_the_store_is_given_out(self, service: DataService, key: str) -> None:
        async def scenario() -> None:
            token = tokens.mint(SECRET, "objects/s1/read", 200.0)
            with pytest.raises(Refused, match="no object of the data service"):
                await get(service, key, token)
            with pytest.raises(Refused, match="no object of the data service"):
                await put(service, key, token, b"")

        asyncio.run(scenario())


class TestDamage:
    def test_a_tampered_shard_is_named(self, store: CountingStore, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(DataService(store, SECRET, lambda: 100.0), text)
            shard = Manifest.from_bytes(text.manifest).train.shards[0][0].sha256
            path = store.root / shard_key(shard)
            whole = path.read_bytes()
            for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-2], b""):
                path.write_bytes(damaged)
                fresh = DataService(store, SECRET, lambda: 100.0)
                with pytest.raises(CorruptObject, match=shard):
                    await fresh.rows(rows_ref(dataset, [0], context=8))
                with pytest.raises(CorruptObject, match=shard):
                    await get(fresh, shard_key(shard), "")
                with pytest.raises((CorruptObject, InvalidData), match=shard):
                    await fresh.create_dataset(text.manifest)
            await upload(fresh, text)
            assert path.read_bytes() == whole
            assert len(await fresh.rows(rows_ref(dataset, [0], context=8))) == 2

        asyncio.run(scenario())

    def test_a_missing_shard_is_named(self, store: CountingStore, text: PreparedDataset) -> None:
        async def scenario() -> None:
            dataset = await upload(DataService(store, SECRET, lambda: 100.0), text)
            shard = Manifest.from_bytes(text.manifest).train.shards[0][0].sha256
            await store.delete(shard_key(shard))
            with pytest.raises(NotFound, match=shard):
                await DataService(store, SECRET, lambda: 100.0).rows(rows_ref(dataset, [0], context=8))

        asyncio.run(scenario())

    def test_a_tampered_state_object_is_refused_and_mended_by_an_upload(
        self, store: CountingStore, service: DataService
    ) -> None:
        data = b"state" * 1000
        key = f"sessions/s1/objects/{hashlib.sha256(data).hexdigest()}.safetensors"
        read, write = (tokens.mint(SECRET, f"objects/s1/{right}", 200.0) for right in ("read", "write"))

        async def scenario() -> None:
            await put(service, key, write, data)
            (store.root / key).write_bytes(data[:-1])
            with pytest.raises(CorruptObject, match=key):
                await get(service, key, read)
            await put(service, key, write, data)
            assert await get(service, key, read) == data

        asyncio.run(scenario())

    def test_an_upload_that_comes_late_to_mend_deletes_nothing_whole(
        self, store: CountingStore, service: DataService
    ) -> None:
        """It found the object damaged before another upload mended it, and what it brings is damaged as well."""
        data = b"state" * 1000
        key = f"sessions/s1/objects/{hashlib.sha256(data).hexdigest()}.safetensors"
        read, write = (tokens.mint(SECRET, f"objects/s1/{right}", 200.0) for right in ("read", "write"))

        async def scenario() -> None:
            deleting, both_have_read, mended = asyncio.Event(), asyncio.Event(), asyncio.Event()
            real_get, real_delete, reads = store.get, store.delete, 0

            async def get_counted(key: str, start: int = 0, length: int | None = None) -> bytes:
                nonlocal reads
                found = await real_get(key, start, length)
                reads += not found  # The end of the object: both know now that it is damaged.
                if reads == 2 and not found:
                    both_have_read.set()
                return found

            async def delete_late(key: str) -> None:
                first = not deleting.is_set()
                deleting.set()
                await (both_have_read if first else mended).wait()
                await real_delete(key)

            await put(service, key, write, data)
            (store.root / key).write_bytes(data[:-1])
            store.get, store.delete = get_counted, delete_late  # type: ignore[method-assign]
            good = asyncio.create_task(put(service, key, write, data))
            await deleting.wait()
            bad = asyncio.create_task(put(service, key, write, b"x" * len(data)))
            await good
            mended.set()
            with pytest.raises(DCNRError):
                await bad
            assert await get(service, key, read) == data

        asyncio.run(scenario())

    @pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 95])
    def test_an_object_comes_in_chunks_and_its_damage_with_the_last(self, store: CountingStore, size: int) -> None:
        async def scenario() -> None:
            service = DataService(store, SECRET, lambda: 100.0, Limits(object_chunk_bytes=10))
            data = bytes(range(size))
            key = shard_key(hashlib.sha256(data).hexdigest())
            await put(service, key, "", data)
            found, chunks = await service.get_object(key, "")
            assert (found, [len(chunk) async for chunk in chunks]) == (
                size,
                [10] * (size // 10) + [size % 10] * (size % 10 > 0),
            )
            (store.root / key).write_bytes(b"x" * 25)
            found, chunks = await service.get_object(key, "")
            assert found == 25
            assert [await anext(chunks) for _ in range(3)] == [b"x" * 10, b"x" * 10, b"x" * 5]
            with pytest.raises(CorruptObject, match=f"{key} is damaged.*add the data again"):
                await anext(chunks)
            assert {length for _, _, length in store.reads} == {10}

        asyncio.run(scenario())

    def test_an_upload_that_breaks_off_leaves_nothing_and_a_whole_object_alone(
        self, store: CountingStore, service: DataService
    ) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"st"
            raise WireError("the client is gone")

        async def scenario() -> None:
            key = shard_key(hashlib.sha256(b"state").hexdigest())
            with pytest.raises(WireError, match="gone"):
                await service.put_object(key, "", broken())
            assert store.list_now("datasets/") == []
            await put(service, key, "", b"state")
            await service.put_object(key, "", broken())  # Not read: the object is there.
            assert await get(service, key, "") == b"state"

        asyncio.run(scenario())

    def test_uploads_of_one_object_at_once_all_succeed(self, store: CountingStore, service: DataService) -> None:
        async def scenario() -> None:
            data = bytes(range(256)) * 10_000
            key = shard_key(hashlib.sha256(data).hexdigest())
            await asyncio.gather(*(service.put_object(key, "", chunks_of(data, 100_000)) for _ in range(8)))
            assert await get(service, key, "") == data

        asyncio.run(scenario())

    def test_an_upload_that_is_not_its_name_is_refused(self, store: CountingStore, service: DataService) -> None:
        async def scenario() -> None:
            key = shard_key("0" * 64)
            with pytest.raises(CorruptObject, match=key):
                await put(service, key, "", b"something")
            assert store.list_now("datasets/") == []

        asyncio.run(scenario())

    def test_a_shard_beyond_the_limit_is_refused(self, store: CountingStore) -> None:
        async def scenario() -> None:
            service = DataService(store, SECRET, lambda: 100.0, Limits(shard_bytes=10))
            key = shard_key(hashlib.sha256(b"x" * 11).hexdigest())
            chunks = chunks_of(b"x" * 100, 6)
            with pytest.raises(InvalidData, match=f"{key} has more than 10 bytes"):
                await service.put_object(key, "", chunks)
            assert sum([len(chunk) async for chunk in chunks]) == 100 - 12, "nothing was read beyond the limit"
            assert store.list_now("datasets/") == []

        asyncio.run(scenario())


class TestDatasets:
    def test_every_shard_must_be_there(self, store: CountingStore, service: DataService, text: PreparedDataset) -> None:
        async def scenario() -> None:
            for missing in text.objects:
                for key, data in text.objects.items():
                    if key != missing:
                        await put(service, key, "", data)
                with pytest.raises(InvalidData, match=missing):
                    await service.create_dataset(text.manifest)
                assert await service.list_datasets() == []
                for key in text.objects:
                    await store.delete(key)

        asyncio.run(scenario())

    def test_a_shard_of_another_size_is_refused(self, service: DataService) -> None:
        prepared = prepare_columns({"x": np.zeros((4, 2))}, name="a")
        # The same shard, said to have rows of half the size.
        manifest = Manifest.from_bytes(prepared.manifest)
        shard = manifest.train.shards[0][0]
        wrong = Manifest(
            name="a",
            kind="columns",
            stored=(Column(name="x", dtype="float64", shape=()),),
            train=Split(count=4, shards=((shard,),)),
            validation=manifest.validation,
        )

        async def scenario() -> None:
            await upload(service, prepared)
            with pytest.raises(InvalidData, match="64 bytes where the manifest says 32"):
                await service.create_dataset(wrong.to_bytes())

        asyncio.run(scenario())

    def test_tokens_outside_the_vocabulary_are_refused(self, service: DataService) -> None:
        prepared = raw_text(np.array([1, 70_000, 2]), 10, "uint32")

        async def scenario() -> None:
            with pytest.raises(InvalidData, match="token 70000"):
                await upload(service, prepared)

        asyncio.run(scenario())

    @pytest.mark.parametrize("manifest", [b"", b"{}", b"null", b"[" * 100_000, b"\xff", b'{"format":2}'])
    def test_malformed_manifests_are_refused(self, service: DataService, manifest: bytes) -> None:
        async def scenario() -> None:
            with pytest.raises(InvalidData):
                await service.create_dataset(manifest)

        asyncio.run(scenario())

    def test_they_are_found_by_id_prefix_and_newest_of_a_name(self, store: CountingStore, service: DataService) -> None:
        async def scenario() -> None:
            made = [prepare_columns({"x": np.full((2, n + 1), n)}, name="same") for n in range(3)]
            ids = [await upload(service, prepared) for prepared in made]
            assert [d for d, _ in await service.list_datasets()] == ids
            assert await service.get_dataset(ids[0]) == (ids[0], made[0].manifest)
            assert await service.get_dataset(ids[1][:12]) == (ids[1], made[1].manifest)
            assert (await service.get_dataset("same"))[0] == ids[2]
            with pytest.raises(NotFound, match="nothing"):
                await service.get_dataset("nothing")
            with pytest.raises(NotFound):
                await service.get_dataset("")
            with pytest.raises(NotFound, match="0" * 64):
                await service.get_dataset("0" * 64)

            # Added again, the first is the newest; added twice in a row changes nothing.
            for _ in range(2):
                assert await upload(service, made[0]) == ids[0]
            assert [d for d, _ in await service.list_datasets()] == [ids[1], ids[2], ids[0]]
            assert len(await store.list("datasets/added/")) == 4

            assert await service.delete_dataset("same") == ids[0]
            assert [d for d, _ in await service.list_datasets()] == ids[1:]
            assert (await service.get_dataset("same"))[0] == ids[2]
            with pytest.raises(NotFound):
                await service.rows(rows_ref(ids[0], [0], columns=["x"]))
            with pytest.raises(NotFound):
                await service.delete_dataset(ids[0])
            assert await upload(service, made[0]) == ids[0]
            assert (await service.get_dataset("same"))[0] == ids[0]

        asyncio.run(scenario())

    def test_deleted_data_leave_nothing_that_another_dataset_does_not_name(
        self, store: CountingStore, service: DataService, text: PreparedDataset
    ) -> None:
        async def scenario() -> None:
            shared, own = np.arange(6.0), np.arange(6)
            one = await upload(service, prepare_columns({"x": shared, "y": own}, name="one"))
            two = await upload(service, prepare_columns({"x": shared}, name="two"))
            await upload(service, text)
            both = await store.list("datasets/shards/")
            assert await service.delete_dataset("one") == one
            assert [d for d, _ in await service.list_datasets()] == [two, text.id]
            gone = set(both) - set(await store.list("datasets/shards/"))
            assert gone == {shard_key(hashlib.sha256(own.tobytes()).hexdigest())}
            assert array((await service.rows(rows_ref(two, [5], columns=["x"])))[0]).tolist() == [5.0]
            await service.delete_dataset(two)
            await service.delete_dataset(text.id)
            # A tokenizer outlives its text: what was trained on it is asked in its tokens.
            reference = Manifest.from_bytes(text.manifest).tokenizer
            assert reference is not None
            assert await store.list("datasets/shards/") == [tokenizer_key(reference.sha256)]

        asyncio.run(scenario())

    def test_data_that_a_session_reads_are_not_deleted(self, store: CountingStore, text: PreparedDataset) -> None:
        readers = {text.id: ["s1", "s2"]}

        async def unfinished(dataset: str) -> list[str]:
            return readers.get(dataset, [])

        async def scenario() -> None:
            service = DataService(store, SECRET, lambda: 100.0, unfinished=unfinished)
            await upload(service, text)
            other = await upload(service, prepare_columns({"x": np.arange(3)}, name="other"))
            with pytest.raises(Refused, match=f"{text.id[:12]} is read by session s1, s2, .*dcnr session stop s1"):
                await service.delete_dataset("lines")
            assert await service.rows(rows_ref(text.id, [0], context=8))
            assert await service.delete_dataset("other") == other
            del readers[text.id]
            assert await service.delete_dataset("lines") == text.id

        asyncio.run(scenario())

    def test_an_ambiguous_prefix_is_refused(self, service: DataService) -> None:
        async def scenario() -> None:
            ids = [await upload(service, prepare_columns({"x": np.full(2, n)}, name=f"n{n}")) for n in range(17)]
            first = next(c for c in "0123456789abcdef" if sum(i.startswith(c) for i in ids) > 1)
            with pytest.raises(InvalidData, match="several"):
                await service.get_dataset(first)

        asyncio.run(scenario())

    def test_a_damaged_manifest_says_so_hides_nothing_else_and_can_be_deleted_or_mended(
        self, store: CountingStore
    ) -> None:
        async def scenario() -> None:
            good, bad = (prepare_columns({"x": np.full(2, n)}, name=f"n{n}") for n in range(2))
            for prepared in (good, bad):
                await upload(DataService(store, SECRET, lambda: 100.0), prepared)
            (store.root / manifest_key(bad.id)).write_bytes(bad.manifest[:-5])
            fresh = DataService(store, SECRET, lambda: 100.0)
            assert [d for d, _ in await fresh.list_datasets()] == [good.id]
            with pytest.raises(CorruptObject, match=bad.id):
                await fresh.get_dataset(bad.id)
            await upload(fresh, bad)
            assert await fresh.get_dataset(bad.id) == (bad.id, bad.manifest)
            (store.root / manifest_key(bad.id)).write_bytes(b"")
            fresh = DataService(store, SECRET, lambda: 100.0)
            assert await fresh.delete_dataset(bad.id) == bad.id
            with pytest.raises(NotFound):
                await fresh.get_dataset(bad.id)

        asyncio.run(scenario())

    def test_two_services_add_at_once(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            services = [DataService(FolderStore(tmp_path / "s"), SECRET, lambda: 100.0) for _ in range(2)]
            made = [prepare_columns({"x": np.full(2, n)}, name=f"n{n}") for n in range(8)]
            ids = await asyncio.gather(*(upload(services[n % 2], prepared) for n, prepared in enumerate(made)))
            assert sorted(d for d, _ in await services[0].list_datasets()) == sorted(ids)

        asyncio.run(scenario())

    def test_ids_that_are_no_ids(self, service: DataService) -> None:
        async def scenario() -> None:
            with pytest.raises((InvalidData, StoreError)):
                await service.rows(rows_ref("../../x", [0], columns=["x"]))

        asyncio.run(scenario())
