"""What an object may be called, wherever it lies, and what to say where it does not fit."""

from __future__ import annotations

import re

from dcnr.errors import StoreError, StoreFull

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_KEY_CHARACTERS = 800
"""S3 takes 1,024 bytes, of which the store's own prefix has its share."""


def checked(key: str) -> str:
    """``key``, if it is a name. Raises :class:`StoreError`: no name can leave its folder or mean two things."""
    if len(key) > _KEY_CHARACTERS or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise StoreError(
            f"{key!r} is no name for an object: segments of letters, digits, '.', '_' and '-' between single "
            f"slashes, none beginning with '.', at most {_KEY_CHARACTERS} characters"
        )
    return key


def full(where: str, reason: str) -> StoreFull:
    """``where``: which store it is."""
    return StoreFull(
        f"store {where} is full: {reason}. Make room there: `dcnr data delete` and `dcnr session gc` delete what is of "
        "no use"
    )
