"""Short-lived rights to named objects, minted by an orchestrator and checked by its own data service.

``<scope>|<expiry>|<mac>``: a keyed BLAKE2b over scope and expiry, under a secret drawn at each start of the
process. The expiry is in that process's monotonic seconds, so wall clocks are never compared and a restart
ends every token. Scopes: ``objects/<session>/read``, ``objects/<session>/write``, ``rows/<dataset>``.
"""

from __future__ import annotations

import hashlib
import hmac

from dcnr.errors import Refused


def _mac(secret: bytes, scope: str, expiry_ms: int) -> str:
    return hashlib.blake2b(f"{scope}|{expiry_ms}".encode(), key=secret, digest_size=16).hexdigest()


TOKEN_CHARACTERS = 500
"""Of the longest token: a scope is an object's key, an expiry a number of milliseconds."""


def mint(secret: bytes, scope: str, expires_at_s: float) -> str:
    """A token for ``scope``. ``secret``: 16 to 64 bytes."""
    expiry_ms = int(expires_at_s * 1000)
    return f"{scope}|{expiry_ms}|{_mac(secret, scope, expiry_ms)}"


def check(secret: bytes, token: str, scope: str, now_s: float) -> None:
    """Raises :class:`Refused` unless ``token`` was minted for exactly ``scope`` and has not expired."""
    parts = token.split("|")
    if len(token) > TOKEN_CHARACTERS or not token.isascii() or len(parts) != 3 or not parts[1].isdecimal():
        raise Refused("malformed data token")
    if not hmac.compare_digest(parts[2], _mac(secret, parts[0], int(parts[1]))):
        raise Refused("data token was not issued by this process (was the orchestrator restarted?)")
    if parts[0] != scope:
        raise Refused(f"data token is for {parts[0]}, not for {scope}")
    if now_s * 1000 > int(parts[1]):
        raise Refused("data token has expired")
