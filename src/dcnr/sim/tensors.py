"""The twin of the driver's counted table: every count given back exactly once, and who gave it remembered."""

from __future__ import annotations

import math
from typing import Any

from dcnr.machine import Handle, TensorRef
from dcnr.sim.violation import Violation

_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "int64": 8}


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * _BYTES[dtype]


class Table:
    """Values behind handles, each with a count, a size and a word that says where it came from."""

    def __init__(self) -> None:
        self._next = 1
        self._values: dict[Handle, Any] = {}
        self._counts: dict[Handle, int] = {}
        self._notes: dict[Handle, tuple[str, int]] = {}
        self.held_bytes = 0

    def put(self, value: Any, note: str, size_bytes: int) -> Handle:
        handle = Handle(self._next)
        self._next += 1
        self._values[handle] = value
        self._counts[handle] = 1
        self._notes[handle] = (note, size_bytes)
        self.held_bytes += size_bytes
        return handle

    def tensor(self, value: Any, note: str, shape: tuple[int, ...], dtype: str, digest: str | None) -> TensorRef:
        handle = self.put(value, note, tensor_bytes(shape, dtype))
        return TensorRef(handle=handle, shape=shape, dtype=dtype, digest=digest)

    def get(self, handle: Handle) -> Any:
        if handle not in self._values:
            raise Violation("BoundedConserved", f"handle {handle} is used after it was released")
        return self._values[handle]

    def hold(self, handle: Handle) -> None:
        self.get(handle)
        self._counts[handle] += 1

    def release(self, handle: Handle) -> None:
        if handle not in self._counts:
            raise Violation("BoundedConserved", f"handle {handle} is released more often than it was given")
        self._counts[handle] -= 1
        if self._counts[handle] == 0:
            del self._counts[handle]
            del self._values[handle]
            self.held_bytes -= self._notes.pop(handle)[1]

    def live(self) -> list[str]:
        """What is still held, readable."""
        return [f"{h}: {self._notes[h][0]} x{n}" for h, n in self._counts.items()]

    def values(self) -> list[Any]:
        return list(self._values.values())
