"""What a PNode gives to others: states kept for them, and its own, so that the death of one PNode loses nothing."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import re
from collections.abc import AsyncGenerator, AsyncIterator

from dcnr.config import Limits
from dcnr.dataservice.pacer import Pacer
from dcnr.errors import CorruptObject, InvalidData, NotFound, Refused, Unavailable
from dcnr.ids import SessionId, Sha256
from dcnr.runtime.ports import Home

_OBJECT = re.compile(r"sessions/([A-Za-z0-9_-]+)/objects/([0-9a-f]{64})\.safetensors")

_TOKENS = 2


class Shelf:
    """Implements :class:`dcnr.runtime.ports.ObjectService` over a PNode's home, for sessions that :meth:`admit` names."""

    def __init__(self, home: Home, limits: Limits, pacer: Pacer | None = None) -> None:
        """``pacer``: how fast states leave this machine."""
        self._home = home
        self._pacer = pacer or Pacer()
        self._limits = limits
        self._tokens: dict[SessionId, tuple[str, ...]] = {}
        self._taking = asyncio.Semaphore(limits.shelf_uploads)
        """Each object is in memory while it comes."""

    def admit(self, session: SessionId, token: str) -> None:
        """From now on ``token`` gives access to the session's states, as does the one before: after a change of its owner
        some still bring that. '' = nobody has it."""
        before = self._tokens.pop(session, ())
        if token:
            self._tokens[session] = (*(t for t in before if t != token), token)[-_TOKENS:]

    async def get_object(self, key: str, token: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Size and chunks. Raises :class:`Refused`, or :class:`NotFound` where it is not there, or not whole any more."""
        session, sha256 = self._allowed(key, token)
        data = await asyncio.to_thread(self._find, session, sha256)
        if data is None:
            raise NotFound(f"{key} is not kept here")
        return len(data), self._chunks(data)

    def _find(self, session: SessionId, sha256: Sha256) -> bytes | None:
        """Kept for others, or as this PNode's own: its VNodes may have been placed elsewhere."""
        found = self._home.guarded(session, sha256)
        return self._home.snapshot(session, sha256) if found is None else found

    async def _chunks(self, data: bytes) -> AsyncGenerator[bytes, None]:
        for start in range(0, max(len(data), 1), self._limits.object_chunk_bytes):
            chunk = data[start : start + self._limits.object_chunk_bytes]
            await self._pacer.take(len(chunk))
            yield chunk

    async def signed_object(self, key: str, token: str) -> tuple[int, str] | None:
        return None

    async def put_object(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        """Raises :class:`Refused`, :class:`CorruptObject` for bytes that do not hash to the sha256 in ``key``, and
        :class:`Unavailable` where the disk does not take them."""
        async with self._taking:
            await self._take(key, token, chunks)

    async def _take(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        session, sha256 = self._allowed(key, token)
        content = io.BytesIO()
        async for chunk in chunks:
            content.write(chunk)
            if content.tell() > self._limits.object_bytes:
                raise InvalidData(
                    f"{key} has more than {self._limits.object_bytes} bytes, which is the most that is taken"
                )
        data = content.getvalue()

        def keep() -> None:
            if hashlib.sha256(data).hexdigest() != sha256:
                raise CorruptObject(f"{key}: its {len(data)} bytes do not hash to its name")
            self._home.keep_guarded(session, sha256, data)

        try:
            await asyncio.to_thread(keep)
        except OSError as error:
            raise Unavailable(f"{key} cannot be kept here: {error}") from error

    def _allowed(self, key: str, token: str) -> tuple[SessionId, Sha256]:
        found = _OBJECT.fullmatch(key)
        if found is None:
            raise Refused(f"{key!r} is no state of a session: a PNode keeps nothing else")
        session = SessionId(found[1])
        if not any(hmac.compare_digest(known.encode(), token.encode()) for known in self._tokens.get(session, ())):
            raise Refused(f"the token gives no access to states of session {session} here")
        return session, Sha256(found[2])
