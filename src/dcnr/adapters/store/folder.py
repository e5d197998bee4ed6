"""The object store as a local folder: the embedded default.

An object is a file under the root, named by its key. What the log needs from a store is one operation: a create
that is atomic, exclusive and durable. Here it is a temporary file that is written and fsynced, then hard-linked to
its final name (POSIX lets exactly one link win), then the folder is fsynced. Killed at any point, a writer leaves a
whole object or none, and at worst a stray temporary file, which the next start removes. A living writer holds a
lock on its temporary file, which dies with the process; one whose file is removed between its birth and its lock
notices that and takes another.

obstore's ``LocalStore`` creates exclusively too but never calls fsync: after a power cut an acknowledged log entry
could be empty. So this adapter is our own; obstore serves S3.

A root that is unmounted or deleted while open must not be taken for an empty store: the folder of temporary files
is made at the start only, and its absence is :class:`~dcnr.errors.StoreUnavailable`, never "not found".
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, ParamSpec, TypeVar

from dcnr.adapters.store.names import checked, full
from dcnr.errors import AlreadyExists, CorruptObject, NotFound, StoreError, StoreUnavailable
from dcnr.ids import Sha256
from dcnr.runtime.durable import sync_file, sync_folder

if sys.platform != "win32":
    import fcntl

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TEMPORARY = ".tmp"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_ATTEMPTS = 10
"""Each is lost only to a start of another process within the microseconds between a file's birth and its lock."""


class FolderStore:
    """See the module's docstring. The ``*_now`` methods block; the port's run them in a thread."""

    def __init__(self, root: Path) -> None:
        """Makes the folder and removes what killed writers left. Use ``open_store``, which also probes it."""
        self.root = root
        self.url = root.as_uri()
        self._temporary = root / _TEMPORARY
        self._durable_folders: set[Path] = set()
        try:
            made = [folder for folder in (root, *root.parents) if not folder.exists()]
            self._temporary.mkdir(parents=True, exist_ok=True)
            self._remove_strays()
            for folder in (root, *(folder.parent for folder in made)):
                sync_folder(folder)
        except OSError as error:
            reason = f"{error.strerror or error} ({error.filename or root})"
            raise StoreUnavailable(f"store {self.url} cannot be opened: {reason}") from error

    # --- the port ------------------------------------------------------------------------------------------

    async def create(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self.create_now, key, data)

    async def create_from(self, key: str, chunks: AsyncIterator[bytes], sha256: Sha256) -> None:
        """Like :meth:`create`, with one chunk in memory. What ends ``chunks`` early leaves nothing behind.

        Raises :class:`AlreadyExists`, where possible before a chunk is read, and :class:`CorruptObject`.
        """
        target = self._path(key)
        digest = hashlib.sha256()

        def append(file: BinaryIO, chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        # Only the file's own errors are the store's: what ``chunks`` raises passes through.
        unwritten = ExitStack()
        try:
            await self._blocking(target, self._prepare, key, target)
            file = await self._blocking(target, unwritten.enter_context, self._temporary_file())
            async for chunk in chunks:
                await self._blocking(target, append, file, chunk)
            if digest.hexdigest() != sha256:
                raise CorruptObject(f"{key} is refused: the {file.tell()} bytes that came do not hash to its name")
            await self._blocking(target, self._publish, key, file, target)
        finally:
            await self._blocking(target, unwritten.close)

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await asyncio.to_thread(self.get_now, key, start, length)

    async def signed_get(self, key: str, valid_s: float) -> None:
        """A folder has no addresses."""

    async def put_hint(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self.put_hint_now, key, data)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_now, key)

    async def size(self, key: str) -> int:
        return await asyncio.to_thread(self.size_now, key)

    # --- the same, blocking --------------------------------------------------------------------------------

    def create_now(self, key: str, data: bytes) -> None:
        """Create-only and durable. Raises :class:`AlreadyExists` where the name is taken."""
        target = self._path(key)
        try:
            self._prepare(key, target)
            with self._temporary_file() as file:
                file.write(data)
                self._publish(key, file, target)
        except OSError as error:
            raise self._unavailable(error, target) from error

    def get_now(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start``, fewer where the object ends. Raises :class:`NotFound`."""
        target = self._path(key)
        with self._reading(key, target), target.open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def size_now(self, key: str) -> int:
        """In bytes. Raises :class:`NotFound`."""
        target = self._path(key)
        with self._reading(key, target), target.open("rb") as file:
            return os.fstat(file.fileno()).st_size

    def put_hint_now(self, key: str, data: bytes) -> None:
        """Overwrite by rename: readers see the old bytes or the new ones. Not fsynced: nothing depends on a hint."""
        target = self._path(key)
        try:
            self._temporary.stat()
            self._make_folder(target.parent)
            with self._temporary_file() as file:
                file.write(data)
                file.flush()
                os.replace(file.name, target)
        except OSError as error:
            raise self._unavailable(error, target) from error

    def delete_now(self, key: str) -> None:
        """A missing object is no error. Not fsynced: a deletion may be repeated."""
        target = self._path(key)
        try:
            target.unlink(missing_ok=True)
        except (NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            raise self._unavailable(error, target) from error

    def list_now(self, prefix: str) -> list[str]:
        """Names that begin with ``prefix`` (which need not end at a '/'), ascending."""
        folder_key = prefix.rpartition("/")[0]
        top = self._path(folder_key) if folder_key else self.root
        keys: list[str] = []
        try:
            self._temporary.stat()
            folders = [top] if top.is_dir() else []
            while folders:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        path = Path(entry.path)
                        key = path.relative_to(self.root).as_posix()
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(path)
                        elif key.startswith(prefix):
                            keys.append(key)
        except OSError as error:
            raise self._unavailable(error, top) from error
        return sorted(keys)

    # --- inside --------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*checked(key).split("/"))

    def _prepare(self, key: str, target: Path) -> None:
        """Before the bytes of a create are written."""
        self._temporary.stat()  # Raises where the root is gone, before a folder is made in its place.
        if target.exists():  # A cheap way out; the link is what decides.
            self._taken(key, target)
        self._make_folder(target.parent)

    def _publish(self, key: str, file: BinaryIO, target: Path) -> None:
        """The bytes durable, then the name, then the name durable."""
        file.flush()
        sync_file(file.fileno())
        try:
            os.link(file.name, target)
        except FileExistsError:
            self._taken(key, target)
        sync_folder(target.parent)

    def _taken(self, key: str, target: Path) -> NoReturn:
        if target.is_dir():
            raise StoreError(f"{key!r} is the prefix of other names in {self.url}")
        # The winner may have been killed between its link and its fsync. Whoever is told that the name exists
        # acts on that, so it must be as durable for the loser as for the winner.
        self._make_folder(target.parent)
        sync_folder(target.parent)
        raise AlreadyExists(f"{key} exists in {self.url}")

    @contextmanager
    def _temporary_file(self) -> Iterator[BinaryIO]:
        """A new file, locked, whose temporary name is removed at the end, whatever happens until then."""
        for _ in range(_ATTEMPTS):
            path = self._temporary / secrets.token_hex(16)
            try:
                with path.open("xb") as file:
                    _lock(file.fileno(), wait=True)
                    # Once it is locked and still there, no other process's start removes it.
                    if os.fstat(file.fileno()).st_nlink:
                        yield file
                        return
            finally:
                path.unlink(missing_ok=True)
        raise StoreUnavailable(f"{self._temporary}: temporary files vanish as soon as they are made")

    @contextmanager
    def _reading(self, key: str, target: Path) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if not self._temporary.is_dir():
                raise self._unavailable(error, target) from error
            raise NotFound(f"{key} is not in {self.url}") from error
        except OSError as error:
            raise self._unavailable(error, target) from error

    async def _blocking(self, target: Path, work: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
        """``work`` in a thread, its errors as the store's. Who is cancelled meanwhile waits for the thread's end.

        What the thread uses, a file that is cleaned up next, must not go away below it.
        """
        task = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **options))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            raise
        except OSError as error:
            raise self._unavailable(error, target) from error

    def _remove_strays(self) -> None:
        for stray in self._temporary.iterdir():
            try:
                with stray.open("rb") as file:
                    _lock(file.fileno(), wait=False)
                    stray.unlink(missing_ok=True)
            except (FileNotFoundError, BlockingIOError):
                continue  # Its writer is alive, or just finished.

    def _make_folder(self, folder: Path) -> None:
        """Make the folders down to ``folder`` and fsync each one's entry in its parent, once per process.

        A folder that is there already may have been made by a process that was killed before its fsync.
        """
        if folder in self._durable_folders or folder == self.root:
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
        self._durable_folders.add(folder)

    def _unavailable(self, error: OSError, path: Path) -> StoreError:
        if isinstance(error, NotADirectoryError | FileExistsError):
            return StoreError(f"{path}: a part of this name is an object already")
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return full(self.url, f"{reason} ({path})")
        if isinstance(error, FileNotFoundError):
            reason = f"the store's folder {self.root} is gone"
        elif error.errno in (errno.EPERM, errno.ENOTSUP) and os.access(self._temporary, os.W_OK):
            reason += " (does this file system have hard links?)"
        return StoreUnavailable(f"store {self.url} cannot be used: {reason} ({path})")

    async def list(self, prefix: str) -> list[str]:
        # The last method, because from here on its name hides the type.
        return await asyncio.to_thread(self.list_now, prefix)


def _lock(descriptor: int, wait: bool) -> None:
    """Raises ``BlockingIOError`` where another process holds the lock and ``wait`` is false."""
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
