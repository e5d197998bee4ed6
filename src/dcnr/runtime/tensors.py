"""The counted table behind handles, and the numpy side of :class:`~dcnr.runtime.ports.TensorBackend`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcnr.machine import Handle
from dcnr.runtime.ports import TensorBackend

_STORAGE_DTYPES = {"bfloat16": "uint16"}
"""numpy has no bfloat16: its bits are kept, not its arithmetic, which an orchestrator never needs."""


def as_array(data: bytes | bytearray | memoryview, dtype: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """A tensor's bytes, as they are stored and travel, as an array over them; ``bfloat16`` as a float32 array of the same
    values. Raises ``ValueError`` where there are not as many bytes as ``shape`` asks for."""
    if dtype == "bfloat16":
        # The upper half of the float32 of the same value.
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)


class NumpyBackend:
    """Tensors of a process without torch. ``bfloat16`` is held as its raw 16 bits."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        return np.empty(shape, dtype=np.dtype(_STORAGE_DTYPES.get(dtype, dtype)).newbyteorder("<"))

    def view(self, tensor: Any) -> memoryview:
        # A flat view of bytes: ``reshape(-1)`` first, because memoryview.cast refuses arrays of rank 0 and of size 0.
        return memoryview(tensor.reshape(-1).view(np.uint8))


class CountedTable:
    """See :class:`~dcnr.runtime.ports.TensorTable`. A lock and not the GIL keeps counts right: threads share it."""

    def __init__(self, backend: TensorBackend) -> None:
        self.backend = backend
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._values: dict[Handle, Any] = {}
        self._counts: dict[Handle, int] = {}

    def put(self, value: Any, count: int = 1) -> Handle:
        with self._lock:
            handle = Handle(next(self._numbers))
            self._values[handle] = value
            self._counts[handle] = count
            return handle

    def get(self, handle: Handle) -> Any:
        with self._lock:
            return self._values[handle]

    def hold(self, handle: Handle) -> None:
        with self._lock:
            self._counts[handle] += 1

    def release(self, handle: Handle) -> None:
        with self._lock:
            self._counts[handle] -= 1
            if self._counts[handle] > 0:
                return
            del self._counts[handle]
            value = self._values.pop(handle)
        # The value dies here, outside the lock: freeing gigabytes must not stop the other threads.
        del value

    def live(self) -> int:
        """Handles not yet released: 0 at the end of a process that leaks nothing."""
        with self._lock:
            return len(self._values)
