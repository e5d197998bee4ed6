"""The data service inside an orchestrator: datasets, rows and state objects, over a store and without a transport.

PNodes see neither the store nor its keys' rights: they bring a token for exactly one session's objects or one
dataset's rows (:mod:`dcnr.session.tokens`). Everything content-addressed is hashed before it is believed. A shard is
read whole and hashed when it is first used; after that only the pieces that rows need are read, through a small cache.
State objects, which may be larger than an orchestrator's memory, come and go chunk by chunk.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dcnr.config import LIMITS, Limits
from dcnr.errors import AlreadyExists, CorruptObject, InvalidData, NotFound, Refused
from dcnr.ids import Sha256
from dcnr.protocol.messages import RowsRef
from dcnr.runtime.ports import ColumnData, Store
from dcnr.session import tokens
from dcnr.session.dataset import (
    Column,
    Manifest,
    Shard,
    input_column,
    is_sha256,
    manifest_key,
    shard_key,
    tokenizer_key,
)

PAGE_BYTES = 256 << 10
"""What is read around a row: little against a network's latency, much against a row of text."""
MANIFESTS_KEPT = 64
_ADDED = "datasets/added/"
_SESSION_OBJECT = re.compile(r"sessions/([A-Za-z0-9_-]+)/objects/([0-9a-f]{64})\.safetensors")
_SESSION_MANIFEST = re.compile(r"sessions/([A-Za-z0-9_-]+)/manifests/([0-9a-f]{64})\.json")
_DATASET_OBJECT = re.compile(r"datasets/shards/([0-9a-f]{64})\.(bin|json)")


class DataService:
    """Implements :class:`dcnr.runtime.ports.DataService`.

    Which of several datasets of one name is the newest is written down as ``datasets/added/<n>``, create-only files
    that hold a dataset's id.
    """

    def __init__(
        self,
        store: Store,
        secret: bytes,
        clock: Callable[[], float],
        limits: Limits = LIMITS,
        unfinished: Callable[[str], Awaitable[Sequence[str]]] | None = None,
    ) -> None:
        """``secret`` and ``clock`` (monotonic seconds) are those that the tokens are minted with.

        ``unfinished``: a dataset to the sessions under way that read it; ``None`` = there are none.
        """
        self._mending = asyncio.Lock()
        """Of damaged objects: one is looked at, deleted and left to be created again at a time."""
        self._store = store
        self._secret = secret
        self._clock = clock
        self._limits = limits
        self._unfinished = unfinished
        self._changing = asyncio.Lock()
        """Datasets appear and go one at a time: a shard must not go while a manifest that names it is being checked."""
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._shards = _ShardReader(store, limits.shard_cache_bytes)

    # --- rows ----------------------------------------------------------------------------------------------

    async def rows(self, ref: RowsRef) -> list[ColumnData]:
        """One column of shape [rows, ...] per name in ``ref.columns``, in that order.

        A name that the dataset lacks stands for its first column (:func:`~dcnr.session.dataset.input_column`), and is
        answered under the name that was asked for: what may ask so was decided when the session was created.

        Raises :class:`Refused` for a wrong token, :class:`InvalidData` for rows that are not there,
        :class:`CorruptObject` with the shard's name where its bytes are damaged, :class:`NotFound`,
        :class:`StoreUnavailable`.
        """
        tokens.check(self._secret, ref.token, f"rows/{ref.dataset}", self._clock())
        manifest = await self._manifest(ref.dataset)
        offered = manifest.columns_for(ref.context)
        columns = {name: input_column(offered, name) for name in ref.columns}
        total = manifest.rows(ref.split, ref.context)
        if not ref.rows or not ref.columns:
            raise InvalidData(f"dataset {manifest.name!r}: no rows or no columns were asked for")
        for row in ref.rows:
            if not 0 <= row < total:
                raise InvalidData(f"dataset {manifest.name!r} has {total} rows in {ref.split}, no row {row}")
        size = sum(columns[name].row_bytes for name in ref.columns) * len(ref.rows)
        if size > self._limits.object_bytes:
            raise InvalidData(f"{len(ref.rows)} rows are {size} bytes, more than {self._limits.object_bytes}")
        split = manifest.split(ref.split)
        if manifest.kind == "text":
            stream = await self._read(
                manifest.stored[0], split.shards[0], [row * ref.context for row in ref.rows], ref.context + 1
            )
            sides = {"tokens": stream[:, :-1], "targets": stream[:, 1:]}
            return [
                _column_data(name, np.ascontiguousarray(sides[columns[name].name], dtype="<i8")) for name in ref.columns
            ]
        answers: list[ColumnData] = []
        for name in ref.columns:
            place = manifest.stored.index(columns[name])
            found = await self._read(columns[name], split.shards[place], list(ref.rows), 1)
            answers.append(_column_data(name, found.reshape(len(ref.rows), *columns[name].shape)))
        return answers

    async def _read(
        self, column: Column, shards: Sequence[Shard], starts: Sequence[int], count: int
    ) -> NDArray[np.generic]:
        """``count`` stored items from each of ``starts``: shape [len(starts), items]."""
        dtype = np.dtype(column.dtype).newbyteorder("<")
        width = count * column.row_bytes // dtype.itemsize
        out = np.empty((len(starts), width), dtype=dtype)
        # Where each shard begins, in items of the column; the last one is the end.
        begins = [0, *accumulate(shard.count for shard in shards)]
        for number, (line, start) in enumerate(zip(out.view(np.uint8), starts, strict=True)):
            if number % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
                # Rows that are in memory never wait; others on this loop must not wait for all of them.
                await asyncio.sleep(0)
            filled, at = 0, start
            while at < start + count:
                place = bisect_right(begins, at) - 1
                upto = min(start + count, begins[place + 1])
                shard = shards[place]
                piece = await self._shards.read(
                    shard.sha256,
                    shard.count * column.row_bytes,
                    (at - begins[place]) * column.row_bytes,
                    (upto - at) * column.row_bytes,
                )
                line[filled : filled + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
                filled, at = filled + len(piece), upto
        return out

    # --- objects -------------------------------------------------------------------------------------------

    async def get_object(self, key: str, token: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Size and chunks of a state object (needs a token for reading its session), a shard or a tokenizer (none).

        The chunks end in :class:`CorruptObject` where they do not hash to the object's name.
        """
        sha256 = self._allowed(key, token, "read")
        return await self._store.size(key), self._chunks(key, sha256)

    async def signed_object(self, key: str, token: str) -> tuple[int, str] | None:
        """Size and short-lived address of what :meth:`get_object` would give, against the same token.

        Whoever reads there checks the hash. Uploads have no such way: bytes must be refused before they are seen under
        a name that they do not hash to (docs/adr/0011-s3-store.md).
        """
        self._allowed(key, token, "read")
        url = await self._store.signed_get(key, self._limits.signed_ttl_s)
        return None if url is None else (await self._store.size(key), url)

    async def put_object(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        """An object that is there already is a success; damaged bytes under its name are replaced.

        Raises :class:`CorruptObject` for bytes that do not hash to the sha256 in ``key``.
        """
        sha256 = self._allowed(key, token, "write")
        most = self._limits.shard_bytes if key.startswith("datasets/") else self._limits.object_bytes
        async with aclosing(_at_most(most, key, chunks)) as taken:
            await self._create_or_mend(key, sha256, taken)

    async def _create_or_mend(self, key: str, sha256: Sha256, chunks: AsyncIterator[bytes]) -> None:
        try:
            async for _ in self._chunks(key, sha256):
                pass
        except NotFound:
            pass
        except CorruptObject:
            # What lies there is not the object that its name promises, so nobody can be using it. It is looked at again
            # when it is our turn: another upload may have mended it, and that one must not be deleted.
            async with self._mending:
                try:
                    async for _ in self._chunks(key, sha256):
                        pass
                except NotFound:
                    pass
                except CorruptObject:
                    await self._store.delete(key)
                else:
                    return
        else:
            return
        try:
            await self._store.create_from(key, chunks, sha256)
        except AlreadyExists:
            return  # Another upload of the same bytes, which were hashed as well.

    async def _chunks(self, key: str, sha256: Sha256) -> AsyncGenerator[bytes, None]:
        digest = hashlib.sha256()
        start = 0
        while chunk := await self._store.get(key, start, self._limits.object_chunk_bytes):
            await asyncio.to_thread(digest.update, chunk)
            yield chunk
            start += len(chunk)
        if digest.hexdigest() != sha256:
            raise _damaged(key, start)

    def _allowed(self, key: str, token: str, right: str) -> Sha256:
        """The sha256 in ``key``, if this service gives such objects out and the token allows it."""
        if match := _SESSION_OBJECT.fullmatch(key):
            tokens.check(self._secret, token, f"objects/{match[1]}/{right}", self._clock())
            return Sha256(match[2])
        # Clients read manifests; only the owner of the session writes them, and not through here.
        if right == "read" and (match := _SESSION_MANIFEST.fullmatch(key)):
            tokens.check(self._secret, token, f"objects/{match[1]}/read", self._clock())
            return Sha256(match[2])
        if match := _DATASET_OBJECT.fullmatch(key):
            return Sha256(match[1])
        raise Refused(f"{key!r} is no object of the data service")

    # --- datasets ------------------------------------------------------------------------------------------

    async def create_dataset(self, manifest: bytes) -> str:
        """Register a dataset whose shards were all uploaded. Adding it again is a success. Returns its id.

        Every shard is read and checked: sha256, size, tokens within the vocabulary. Raises :class:`InvalidData`.
        """
        if len(manifest) > self._limits.control_bytes:
            raise InvalidData(f"the manifest has {len(manifest)} bytes; at most {self._limits.control_bytes} are taken")
        parsed = Manifest.from_bytes(manifest)
        async with self._changing:
            await self._create_dataset(parsed, manifest)
        return parsed.id

    async def _create_dataset(self, parsed: Manifest, manifest: bytes) -> None:
        if parsed.tokenizer is not None:
            await self._uploaded(tokenizer_key(parsed.tokenizer.sha256), parsed.tokenizer.sha256, None)
        for sha256, size in parsed.shard_sizes().items():
            data = await self._uploaded(shard_key(sha256), sha256, size)
            if parsed.tokenizer is not None:
                highest = int(np.frombuffer(data, dtype=np.dtype(parsed.stored[0].dtype).newbyteorder("<")).max())
                if highest >= parsed.tokenizer.vocab:
                    raise InvalidData(
                        f"shard {sha256} has token {highest}, outside the vocabulary of {parsed.tokenizer.vocab}"
                    )
        # The entry of the order first: a dataset whose manifest is there can always be found by its name.
        same_name = [d for d, m in await self.list_datasets() if Manifest.from_bytes(m).name == parsed.name]
        if same_name[-1:] != [parsed.id]:
            await self._append_added(parsed.id)
        await self._create_or_mend(manifest_key(parsed.id), Sha256(parsed.id), _in_one(manifest))

    async def get_dataset(self, name: str) -> tuple[str, bytes]:
        """By id, name (the newest of that name) or unique prefix of the id.

        Raises :class:`NotFound`, or :class:`InvalidData` for a prefix of several.
        """
        if is_sha256(name):
            return name, (await self._manifest(name)).to_bytes()
        datasets = await self.list_datasets()
        for dataset, manifest in reversed(datasets):
            if Manifest.from_bytes(manifest).name == name:
                return dataset, manifest
        matches = [(dataset, manifest) for dataset, manifest in datasets if name and dataset.startswith(name)]
        if len(matches) > 1:
            raise InvalidData(f"{name!r} begins the ids of several datasets: {', '.join(d[:16] for d, _ in matches)}")
        if not matches:
            raise NotFound(f"no dataset has the name or id {name!r}: see dcnr data list")
        return matches[0]

    async def list_datasets(self) -> list[tuple[str, bytes]]:
        """Id and manifest of each, the newest last."""
        found: list[tuple[str, bytes]] = []
        for dataset in await self._added():
            try:
                found.append((dataset, (await self._manifest(dataset)).to_bytes()))
            except (NotFound, CorruptObject):
                continue  # Deleted, or damaged: asked for by its id, it says why.
        return found

    async def delete_dataset(self, name: str) -> str:
        """Delete the manifest, then the shards that no other dataset names. Returns the id.

        A tokenizer stays: what was trained on the text is asked, and answers, in its tokens. Raises :class:`Refused` with the session's id while one that is under way reads the dataset. Added again from
        the same files it has the same id, so sessions that name it can read it as before.
        """
        async with self._changing:
            # A damaged manifest can be deleted too, but its shards cannot be known.
            dataset = name if is_sha256(name) else (await self.get_dataset(name))[0]
            data = await self._read_manifest(dataset)
            if self._unfinished is not None and (sessions := await self._unfinished(dataset)):
                raise Refused(
                    f"dataset {dataset[:12]} is read by session {', '.join(sessions)}, which is not finished: let it "
                    f"finish, or stop it with dcnr session stop {sessions[0]}"
                )
            await self._store.delete(manifest_key(dataset))
            self._manifests.pop(dataset, None)
            if hashlib.sha256(data).hexdigest() == dataset:
                kept = {s for _, other in await self.list_datasets() for s in Manifest.from_bytes(other).shard_sizes()}
                for sha256 in Manifest.from_bytes(data).shard_sizes():
                    if sha256 not in kept:
                        await self._store.delete(shard_key(sha256))
            return dataset

    async def _uploaded(self, key: str, sha256: Sha256, size: int | None) -> bytes:
        try:
            data = await self._store.get(key)
        except NotFound as error:
            raise InvalidData(f"{key} was not uploaded before the manifest that names it") from error
        if size is not None and len(data) != size:
            raise InvalidData(f"{key} has {len(data)} bytes where the manifest says {size}")
        await _check(key, sha256, data)
        return data

    async def _manifest(self, dataset: str) -> Manifest:
        if dataset in self._manifests:
            self._manifests.move_to_end(dataset)
            return self._manifests[dataset]
        data = await self._read_manifest(dataset)
        await _check(manifest_key(dataset), Sha256(dataset), data)
        manifest = Manifest.from_bytes(data)
        self._manifests[dataset] = manifest
        if len(self._manifests) > MANIFESTS_KEPT:
            self._manifests.popitem(last=False)
        return manifest

    async def _read_manifest(self, dataset: str) -> bytes:
        if not is_sha256(dataset):
            raise InvalidData(f"{dataset!r} is no dataset's id")
        try:
            return await self._store.get(manifest_key(dataset))
        except NotFound as error:
            raise NotFound(f"no dataset has the id {dataset}: see dcnr data list") from error

    async def _added(self) -> list[str]:
        """Ids in the order in which they were added, each at its last place; deleted ones too."""
        order: dict[str, None] = {}
        for key in await self._store.list(_ADDED):
            dataset = (await self._store.get(key)).decode("ascii", "replace")
            order.pop(dataset, None)
            order[dataset] = None
        return list(order)

    async def _append_added(self, dataset: str) -> None:
        names = await self._store.list(_ADDED)
        number = int(names[-1].removeprefix(_ADDED)) + 1 if names else 1
        while True:
            try:
                await self._store.create(f"{_ADDED}{number:020}", dataset.encode())
                return
            except AlreadyExists:
                number += 1


class _ShardReader:
    """Ranges of shards, whose sha256 is checked once, through a cache of pages that drops the least recently used."""

    def __init__(self, store: Store, cache_bytes: int) -> None:
        self._store = store
        self._pages_kept = max(1, cache_bytes // PAGE_BYTES)
        self._pages: OrderedDict[tuple[Sha256, int], bytes] = OrderedDict()
        self._checked: set[Sha256] = set()
        self._loading = asyncio.Lock()
        """One miss at a time: two requests for one shard must not read and hash it twice."""

    async def read(self, sha256: Sha256, size: int, start: int, length: int) -> bytes:
        """``size``: of the whole shard. Raises :class:`CorruptObject` naming the shard."""
        first, last = start // PAGE_BYTES, (start + length - 1) // PAGE_BYTES
        pages = [await self._page(sha256, size, number) for number in range(first, last + 1)]
        joined = pages[0] if len(pages) == 1 else b"".join(pages)
        return joined[start - first * PAGE_BYTES :][:length]

    async def _page(self, sha256: Sha256, size: int, number: int) -> bytes:
        found = self._find(sha256, number)
        if found is not None:
            return found
        async with self._loading:
            found = self._find(sha256, number)
            if found is not None:
                return found
            key, start = shard_key(sha256), number * PAGE_BYTES
            if sha256 in self._checked:
                page = await self._store.get(key, start, PAGE_BYTES)
            else:
                data = await self._store.get(key)
                await _check(key, sha256, data)
                self._checked.add(sha256)
                for begin in range(0, len(data), PAGE_BYTES):
                    self._keep(sha256, begin // PAGE_BYTES, data[begin : begin + PAGE_BYTES])
                page = data[start : start + PAGE_BYTES]
            if len(page) != min(PAGE_BYTES, size - start):
                raise CorruptObject(f"{key} is shorter than its dataset's manifest says: add the data again to mend it")
            self._keep(sha256, number, page)
            return page

    def _find(self, sha256: Sha256, number: int) -> bytes | None:
        page = self._pages.get((sha256, number))
        if page is not None:
            self._pages.move_to_end((sha256, number))
        return page

    def _keep(self, sha256: Sha256, number: int, page: bytes) -> None:
        self._pages[sha256, number] = page
        self._pages.move_to_end((sha256, number))
        if len(self._pages) > self._pages_kept:
            self._pages.popitem(last=False)


async def _in_one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _at_most(most: int, key: str, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise InvalidData(f"{key} has more than {most} bytes, which is the most that is taken")
        yield chunk


async def _check(key: str, sha256: Sha256, data: bytes) -> None:
    # hashlib lets other threads run while it hashes, and the loop is one of them.
    if await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()) != sha256:
        raise _damaged(key, len(data))


def _damaged(key: str, size: int) -> CorruptObject:
    mend = ": add the data again to mend it" if key.startswith("datasets/") else ""
    return CorruptObject(f"{key} is damaged: its {size} bytes do not hash to its name{mend}")


def _column_data(name: str, values: NDArray[np.generic]) -> ColumnData:
    return ColumnData(name=name, shape=values.shape, dtype=values.dtype.name, data=values.tobytes())


ROWS_AT_ONCE = 1000
"""Rows read before others on the loop have their turn: about 10 ms."""
