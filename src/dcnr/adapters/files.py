"""A process's home folder.

::

    lock                                       held for life; names the process that holds it
    peer_id                                    drawn once
    boot                                       counts the starts
    <key>                                      what the machine persists (fence.json)
    snapshots/<session>/<sha256>.safetensors   kept states
    guarded/<session>/<sha256>.safetensors     states kept for other PNodes
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from dcnr.errors import Unavailable
from dcnr.ids import Incarnation, PeerId, SessionId, Sha256
from dcnr.runtime.durable import replace_durably, replace_whole

_OWN_NAMES = ("lock", "peer_id", "boot", "snapshots", "guarded")


class HomeFolder:
    """Implements :class:`~dcnr.runtime.ports.Home`. Opening it is one start of the process: it counts the boot.

    Raises :class:`Unavailable` where another process holds the folder, naming it, or where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path / "lock")
            self.peer = PeerId(self._named("peer_id") or self._draw_peer())
            boot = int(self._named("boot") or "0") + 1
            self.persist_own("boot", str(boot).encode())
        except (OSError, ValueError) as error:
            raise Unavailable(f"home folder {path} cannot be used: {error}") from error
        self.incarnation = Incarnation(boot=boot, nonce=secrets.token_hex(16))

    def close(self) -> None:
        """Let go of the lock; the operating system does so too when the process ends, however it ends."""
        os.close(self._lock)

    def persist(self, key: str, data: bytes) -> None:
        self.persist_own(self._checked(key), data)

    def persist_own(self, key: str, data: bytes) -> None:
        replace_durably(self.path / key, data)

    def load(self, key: str) -> bytes | None:
        try:
            return (self.path / self._checked(key)).read_bytes()
        except FileNotFoundError:
            return None

    def keep_snapshot(self, session: SessionId, sha256: Sha256, data: bytes) -> None:
        """Without waiting for the medium: whoever reads it hashes it, and the store or another PNode has it too."""
        _keep(self._folder(session), sha256, data)

    def snapshot(self, session: SessionId, sha256: Sha256, *, checked: bool = True) -> bytes | None:
        return self._read(self._folder(session), sha256, checked=checked)

    def discard_snapshots(self, session: SessionId, keep: frozenset[Sha256]) -> None:
        _discard(self._folder(session), keep)

    def keep_guarded(self, session: SessionId, sha256: Sha256, data: bytes) -> None:
        _keep(self._guarded(session), sha256, data)

    def guarded(self, session: SessionId, sha256: Sha256) -> bytes | None:
        return self._read(self._guarded(session), sha256)

    def discard_guarded(self, session: SessionId, keep: frozenset[Sha256]) -> None:
        _discard(self._guarded(session), keep)

    @staticmethod
    def _read(folder: Path, sha256: Sha256, *, checked: bool = True) -> bytes | None:
        path = folder / f"{_plain(sha256)}.safetensors"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if checked and hashlib.sha256(data).hexdigest() != sha256:
            path.unlink(missing_ok=True)
            return None
        return data

    def _folder(self, session: SessionId) -> Path:
        return self.path / "snapshots" / _plain(session)

    def _guarded(self, session: SessionId) -> Path:
        return self.path / "guarded" / _plain(session)

    def _checked(self, key: str) -> str:
        if _plain(key) in _OWN_NAMES:
            raise ValueError(f"{key!r} is the home's own name")
        return key

    def _named(self, key: str) -> str | None:
        try:
            return (self.path / key).read_text().strip()
        except FileNotFoundError:
            return None

    def _draw_peer(self) -> str:
        peer = secrets.token_hex(16)
        self.persist_own("peer_id", peer.encode())
        return peer


def _keep(folder: Path, sha256: Sha256, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_whole(folder / f"{_plain(sha256)}.safetensors", data)


def _discard(folder: Path, keep: frozenset[Sha256]) -> None:
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        return
    names = {f"{sha256}.safetensors" for sha256 in keep}
    for path in sorted(folder.glob("*")):
        if path.name not in names and not path.name.startswith("."):  # A write is under way there.
            path.unlink(missing_ok=True)


def _plain(name: str) -> str:
    """Session ids and hashes arrive over the wire: a name that could leave the folder is refused with ``ValueError``."""
    if not name or name.startswith(".") or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name):
        raise ValueError(f"{name!r} is no plain name")
    return name


def _lock(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise Unavailable(f"home folder {path.parent} is in use by process {holder}; choose another --home") from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file
