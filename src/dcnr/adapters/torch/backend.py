"""Tensors of torch behind :class:`dcnr.runtime.ports.TensorBackend`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcnr.errors import ComputeError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "uint8": torch.uint8,
}
"""The names of dtypes on the wire and in networks."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_SUM_CHUNK = 1 << 16
"""Elements converted to float64 at once: stays in the cache, eight times faster than whole tensors (measured)."""


class TorchBackend:
    """Stateless."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A fresh, aligned, contiguous, uninitialised tensor. Raises :class:`ComputeError` for an unknown dtype."""
        if dtype not in DTYPES:
            raise ComputeError(f"unknown dtype {dtype!r}: one of {', '.join(DTYPES)}")
        return torch.empty(shape, dtype=DTYPES[dtype])

    def view(self, tensor: Any) -> memoryview:
        """The tensor's bytes, writable, without a copy; the tensor must be contiguous."""
        return view(tensor)


def view(tensor: Tensor) -> memoryview:
    """See :meth:`TorchBackend.view`. The view keeps the tensor's memory alive."""
    assert tensor.is_contiguous(), "only contiguous tensors have a byte view"
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    data: memoryview = array.data
    return data


def canonical(tensor: Tensor) -> Tensor:
    """The same values, contiguous from storage offset 0: what every kernel group sees, whatever the placement.

    Strided or shifted inputs make kernels take other paths, which changes bits (measured). Axes of length 1 are held to
    the same strides, because libraries look at them too. No copy where the tensor is canonical already.
    """
    plain = tensor.storage_offset() == 0 and tensor.is_contiguous()
    # Of a contiguous tensor, only axes of length 1 can have other strides, and most tensors have no such axis.
    if plain and (1 not in tensor.shape or tensor.stride() == contiguous_strides(tensor.shape)):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """Over all elements in float64: one left fold over tensor after tensor, row-major whatever the strides.

    The clipping factor rests on it, so its order is part of the arithmetic.
    """
    total = 0.0
    for tensor in tensors:
        flat = canonical(tensor.detach()).view(-1)
        for first in range(0, flat.numel(), _SUM_CHUNK):
            wide = flat[first : first + _SUM_CHUNK].double()
            total += torch.dot(wide, wide).item()
    return total


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, as ``torch.empty`` gives them."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def from_array(array: Any) -> Tensor:
    """A copy of a numpy array in memory that torch allocated: numpy's is not aligned as torch's is."""
    tensor = torch.empty(array.shape, dtype=NAMES_OF_NUMPY[array.dtype.name])
    tensor.copy_(torch.from_numpy(array))
    return tensor


NAMES_OF_NUMPY: dict[str, torch.dtype] = {name: dtype for name, dtype in DTYPES.items() if name != "bfloat16"}
