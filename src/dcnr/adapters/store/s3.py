"""The object store as a bucket of any S3-compatible server, through obstore.

The log needs a create that is atomic, exclusive and durable: a PUT with ``If-None-Match: *``. Who repeats one that was
not answered may find its own object there, so a create is repeated here, where that can be told, and by obstore never
(``_once``). Everything else may be done twice without harm and is repeated by obstore (``_steady``), with growing
pauses drawn at random, until ``store_give_up_s`` is over.

A stream that does not fit into one part is sent in parts, and no server that we know of, and not obstore, makes the end
of that conditional. Its name holds the hash of its bytes, and the upload ends only if they have it; so the worst that a
second writer can do is to put the same bytes there again. See docs/adr/0011-s3-store.md.

obstore reads the keys, and what else begins with ``AWS_``, from the environment by itself. Only its blocking calls are
used, in threads of our own: the futures of its asynchronous ones are completed by a thread of Rust's, and where one of
these meets the end of the interpreter, the process aborts (seen once in 50 starts that failed).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import obstore
from obstore import store as obstores
from obstore.exceptions import AlreadyExistsError, BaseError

from dcnr.adapters.store.names import checked, full
from dcnr.adapters.store.s3_errors import Failure
from dcnr.config import Limits
from dcnr.errors import AlreadyExists, CorruptObject, NotFound, StoreError, StoreUnavailable
from dcnr.ids import Sha256

_T = TypeVar("_T")
PART_BYTES = 5 << 20
"""The least that S3 takes as a part. Of these an upload holds three: one that fills and ``_PARTS_AT_ONCE`` on the way."""
_PARTS_AT_ONCE = 2
_UPLOADS = 4
"""Streams at a time, each with three parts in memory: an orchestrator is to stay below 150 MB. Others wait."""
_CALLS = 16
"""Other requests at a time."""
_PAUSE_S = 0.1
_PAUSE_MOST_S = 3.0


class S3Store:
    """See the module's docstring. ``prefix`` begins the name of every object; ``None`` = the whole bucket."""

    def __init__(self, bucket: str, prefix: str | None, endpoint: str | None, limits: Limits) -> None:
        """Sends nothing. ``endpoint``: where the server is, ``None`` for Amazon's.

        Raises :class:`StoreUnavailable` where the settings of the environment do not make a store.
        """
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._where = f"{self.url} at {endpoint}" if endpoint else self.url
        self._bucket = bucket
        self._limits = limits
        self._steady = self._connected(bucket, prefix, endpoint, limits.store_give_up_s)
        self._once = self._connected(bucket, prefix, endpoint, 0.0)
        self._calls = ThreadPoolExecutor(_CALLS, "s3-call")
        # Of their own: an upload waits for its stream, which may itself be read from here.
        self._uploads = ThreadPoolExecutor(_UPLOADS, "s3-upload")
        self._streams = asyncio.Semaphore(_UPLOADS)

    def _connected(self, bucket: str, prefix: str | None, endpoint: str | None, give_up_s: float) -> obstores.S3Store:
        # Deleting many at once is not known to every server, and one at a time is all that is done here.
        config: obstores.S3Config = {"disable_bulk_delete": True}
        if endpoint is not None:
            config["endpoint"] = endpoint
        try:
            return obstores.S3Store(
                bucket,
                prefix=prefix,
                config=config,
                client_options={
                    "allow_http": endpoint is not None and endpoint.startswith("http://"),
                    "timeout": timedelta(seconds=self._limits.store_request_timeout_s),
                },
                retry_config={
                    # The time alone decides.
                    "max_retries": 1000 if give_up_s else 0,
                    "retry_timeout": timedelta(seconds=give_up_s),
                    "backoff": {
                        "init_backoff": timedelta(seconds=_PAUSE_S),
                        "max_backoff": timedelta(seconds=_PAUSE_MOST_S),
                    },
                },
            )
        except BaseError as error:
            raise self._error(Failure(error), "") from error

    # --- the port ------------------------------------------------------------------------------------------

    async def create(self, key: str, data: bytes) -> None:
        """Repeated until its outcome is known or the time is up: then it may have happened or not."""
        checked(key)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._limits.store_give_up_s
        pause_s = _PAUSE_S
        unknown = False
        """Whether an attempt may have succeeded without an answer."""
        while True:
            try:
                await self._thread(lambda: obstore.put(self._once, key, data, mode="create", use_multipart=False))
                return
            except AlreadyExistsError as error:
                if not Failure(error).conflict:
                    if unknown and await self._is(key, data):
                        return
                    raise AlreadyExists(f"{key} exists in {self.url}") from error
                # Another write of this name is under way, and only its outcome decides about this one.
                failure = Failure(error)
            except (BaseError, OSError) as error:
                failure = Failure(error)
                if not failure.passing or loop.time() + pause_s > give_up:
                    raise self._error(failure, key) from error
                unknown = unknown or not failure.unsent
            if loop.time() + pause_s > give_up:
                raise self._error(failure, key)
            await asyncio.sleep(random.uniform(0.0, pause_s))
            pause_s = min(2 * pause_s, _PAUSE_MOST_S)

    async def _is(self, key: str, data: bytes) -> bool:
        with suppress(NotFound):
            return await self.get(key) == data
        return False

    async def create_from(self, key: str, chunks: AsyncIterator[bytes], sha256: Sha256) -> None:
        """Like :meth:`create`, with three parts in memory at most. More bytes than one part need a name with their hash."""
        checked(key)
        async with self._streams:
            first = bytearray()
            async for chunk in chunks:
                first += chunk
                if len(first) > PART_BYTES:
                    await self._in_parts(key, _Upload(key, bytes(first), chunks, sha256))
                    return
            if hashlib.sha256(first).hexdigest() != sha256:
                raise _refused(key, len(first))
            await self.create(key, bytes(first))

    async def _in_parts(self, key: str, upload: _Upload) -> None:
        if upload.sha256 not in key:
            raise StoreError(f"{key} must have its hash in its name: it is too large for one exclusive write")
        with suppress(NotFound):
            await self.size(key)
            raise AlreadyExists(f"{key} exists in {self.url}")

        def send() -> None:
            obstore.put(
                self._steady,
                key,
                upload,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

        sending = asyncio.get_running_loop().run_in_executor(self._uploads, send)
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            # The thread tells the server, or it would keep what it has; that may last, and nobody waits for it. But the
            # stream must rest before its owner goes on.
            sending.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
            await upload.stop()
            raise
        except (BaseError, OSError) as error:
            if upload.failure is not None:
                raise upload.failure from None
            raise self._error(Failure(error), key) from error

    async def size(self, key: str) -> int:
        checked(key)
        try:
            return await self._call(key, lambda: obstore.head(self._steady, key)["size"])
        except NotFound:
            # The answer to HEAD has no body: whether the object or the whole bucket is missing, GET tells.
            return len(await self.get(key))

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        checked(key)
        if length == 0:
            await self.size(key)
            return b""

        def read() -> bytes:
            if length is not None:
                return bytes(obstore.get_range(self._steady, key, start=start, length=length))
            return bytes(
                obstore.get(self._steady, key, options={"range": {"offset": start}} if start else None).bytes()
            )

        try:
            return await self._thread(read)
        except (BaseError, OSError) as error:
            failure = Failure(error)
            if failure.beyond_the_end:
                return b""
            raise self._error(failure, key) from error

    async def signed_get(self, key: str, valid_s: float) -> str:
        checked(key)
        return await self._call(key, lambda: obstore.sign(self._once, "GET", key, timedelta(seconds=valid_s)))

    async def put_hint(self, key: str, data: bytes) -> None:
        checked(key)
        await self._call(key, lambda: obstore.put(self._steady, key, data, use_multipart=False))

    async def delete(self, key: str) -> None:
        checked(key)
        with suppress(NotFound):
            await self._call(key, lambda: obstore.delete(self._steady, key))

    async def list(self, prefix: str) -> list[str]:
        folder = prefix.rpartition("/")[0]
        if folder:
            checked(folder)

        def names() -> Iterator[str]:
            for several in obstore.list(self._steady, folder or None):
                yield from (one["path"] for one in several)

        return await self._call(prefix, lambda: sorted(name for name in names() if name.startswith(prefix)))

    # --- inside --------------------------------------------------------------------------------------------

    async def _thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._calls, work)

    async def _call(self, key: str, work: Callable[[], _T]) -> _T:
        try:
            return await self._thread(work)
        except (BaseError, OSError) as error:
            raise self._error(Failure(error), key) from error

    def _error(self, failure: Failure, key: str) -> StoreError:
        if failure.no_such_object:
            return NotFound(f"{key} is not in {self.url}")
        if failure.full:
            return full(self._where, failure.reason(self._bucket))
        return StoreUnavailable(f"store {self._where} cannot be used: {failure.reason(self._bucket)}")


class _Upload:
    """The bytes of one upload as obstore draws them in its thread. They end only where their hash is right."""

    def __init__(self, key: str, first: bytes, rest: AsyncIterator[bytes], sha256: Sha256) -> None:
        """``rest`` is read on the running loop."""
        self.sha256 = sha256
        self.failure: BaseException | None = None
        """Why it ended early, where that was not obstore's doing."""
        self._key = key
        self._first = first
        self._rest = rest
        self._digest = hashlib.sha256()
        self._size = 0
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Task[object] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk, self._first = self._first, b""
        if not chunk:
            following = asyncio.run_coroutine_threadsafe(self._following(), self._loop).result()
            if following is None:
                if self._digest.hexdigest() == self.sha256:
                    raise StopIteration
                self.failure = _refused(self._key, self._size)
                raise _given_up()
            chunk = following
        self._digest.update(chunk)
        self._size += len(chunk)
        return chunk

    async def _following(self) -> bytes | None:
        if self.failure is not None:
            raise _given_up()
        self._reading = asyncio.current_task()
        try:
            return await anext(self._rest, None)
        except BaseException as error:
            self.failure = error
            raise _given_up() from error
        finally:
            self._reading = None

    async def stop(self) -> None:
        """No byte more is read."""
        self.failure = asyncio.CancelledError()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})


def _given_up() -> OSError:
    """Whatever the reason is, to obstore it is one thing: a reason to abort."""
    return OSError("the upload is given up")


def _refused(key: str, size: int) -> CorruptObject:
    return CorruptObject(f"{key} is refused: the {size} bytes that came do not hash to its name")
