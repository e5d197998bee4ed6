from __future__ import annotations

import pytest
import torch

from dcnr.adapters.torch.backend import DTYPES, TorchBackend, canonical, contiguous_strides
from dcnr.errors import ComputeError


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_filled_through_its_bytes(dtype: str) -> None:
    backend = TorchBackend()
    original = torch.arange(6).reshape(2, 3).to(DTYPES[dtype])
    copy = backend.empty((2, 3), dtype)
    target = backend.view(copy)
    target[:] = backend.view(original)
    assert target.nbytes == 6 * DTYPES[dtype].itemsize
    assert torch.equal(copy, original)


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_scalars_and_empty_tensors_have_bytes(shape: tuple[int, ...]) -> None:
    backend = TorchBackend()
    assert backend.view(backend.empty(shape, "float64")).nbytes == (8 if shape == () else 0)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ComputeError, match="complex64"):
        TorchBackend().empty((1,), "complex64")


def test_canonical_copies_only_what_is_strided_or_shifted() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert canonical(whole) is whole
    for odd in (whole.T, whole[1:], whole[:, :2], torch.ones(1).expand(3, 4), whole.as_strided((1, 4), (7, 1))):
        made = canonical(odd)
        assert torch.equal(made, odd)
        assert made.storage_offset() == 0
        assert made.stride() == contiguous_strides(odd.shape) == torch.empty(odd.shape).stride()
