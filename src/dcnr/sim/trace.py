"""One readable line per event, effect and message: names and numbers, never payloads."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields
from functools import cache
from typing import Any, cast

from dcnr.ids import Incarnation
from dcnr.machine import TensorRef

_LEFT_OUT = frozenset(
    {"session", "data", "definition", "record", "token", "neighbours", "placement", "network", "recipe", "problem"}
)
_LONG = 60


@cache
def _names(kind: Hashable) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cast(Any, kind)) if f.name not in _LEFT_OUT)


def brief(thing: Any, depth: int = 0) -> str:
    """``Send(peer=1a2b, message=Done(step=3, ...))``."""
    if isinstance(thing, str):
        return thing[:8] if len(thing) in (32, 64) else thing[:_LONG]
    if thing is None or isinstance(thing, bool | int | float):
        return str(thing)
    if isinstance(thing, TensorRef):
        return f"#{thing.handle}:{(thing.digest or '')[:8]}"
    if isinstance(thing, Incarnation):
        return f"boot {thing.boot}"
    if isinstance(thing, bytes):
        return f"{len(thing)} bytes"
    if isinstance(thing, tuple | list):
        if depth > 2 or len(thing) > 6:
            return f"<{len(thing)}>"
        return f"({', '.join(brief(x, depth + 1) for x in thing)})"
    if hasattr(type(thing), "__dataclass_fields__"):
        kind = type(thing)
        if depth > 2:
            return kind.__name__
        shown = ", ".join(f"{n}={brief(getattr(thing, n), depth + 1)}" for n in _names(cast(Hashable, kind)))
        return f"{kind.__name__}({shown})"
    if isinstance(thing, dict):
        return f"<{len(thing)} keys>"
    return type(thing).__name__
