"""An object from its signed address: from the store itself, without keys and not through an orchestrator."""

from __future__ import annotations

import http.client
import urllib.request
from typing import Any

from dcnr.errors import Unreachable

_SILENCE_MOST_S = 5.0
"""Without a byte for this long, or without a connection, the orchestrator is asked to stream instead."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was signed is one address: a store that points elsewhere is not the one that was meant."""

    def redirect_request(self, *details: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def fetch(url: str, size: int) -> bytes:
    """``size`` bytes, unchecked. Blocks. Raises :class:`Unreachable` for whatever keeps them from coming."""
    if not url.startswith(("http://", "https://")):
        raise Unreachable("a signed address begins with http:// or https://")
    try:
        with _OPENER.open(url, timeout=_SILENCE_MOST_S) as answer:
            data: bytes = answer.read(size + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Not the whole address: for a while it is a right.
        raise Unreachable(f"{url.partition('?')[0]}: {error}") from error
    if len(data) != size:
        raise Unreachable(f"{url.partition('?')[0]} gives {len(data)} bytes or more instead of {size}")
    return data
