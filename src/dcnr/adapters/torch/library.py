"""What the catalogue's arithmetic is written in: torch, and the few functions that torch lacks.

Nothing here writes into what it is given, and nothing keeps tensors between calls but the angles of rotary positions.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from dcnr.adapters.torch.backend import DTYPES
from dcnr.adapters.torch.fanout import fan_out
from dcnr.adapters.torch.words import dropout_mask, fixed_pattern
from dcnr.network.node_type import HEAD_CHUNK, Call, Library, Settings, compute_dtype
from dcnr.network.types import CATALOGUE


class TorchLibrary:
    """Implements :class:`dcnr.network.node_type.Library`."""

    torch: Any = torch
    functional: Any = functional

    def dtype(self, settings: Settings) -> torch.dtype:
        return DTYPES[compute_dtype(settings)]

    def fan_out(self, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
        return fan_out(tensor, (False,) * count)

    def rotate(self, tensor: Tensor, theta: float, scaling: float) -> Tensor:
        cos, sin = _angles(tensor.shape[1], tensor.shape[3], theta, scaling, tensor.dtype)
        turned: Tensor = _Rotate.apply(tensor, cos, sin)  # type: ignore[no-untyped-call]
        return turned

    def dropout_mask(self, call: Call, tensor: Tensor, rate: float) -> Tensor:
        return dropout_mask(
            seed=call.seed,
            vnode=call.vnode,
            step=call.step,
            first_row=call.first_row,
            shape=tuple(tensor.shape),
            rate=rate,
            dtype=tensor.dtype,
        )

    def fixed_pattern(self, seed: int, length: int, rate: float) -> Tensor:
        return fixed_pattern(seed=seed, length=length, rate=rate)

    def head_cross_entropy(
        self, x: Tensor, weight: Tensor, target: Tensor, *, ignored: int, smoothing: float, z: float
    ) -> Tensor:
        total: Tensor = _HeadCrossEntropy.apply(x, weight, target, ignored, smoothing, z)  # type: ignore[no-untyped-call]
        return total


LIBRARY: Final[Library] = TorchLibrary()


def valid_targets(type_name: str, settings: Settings, target: Tensor) -> int:
    """How many targets of a cost count: those that are not ignored, or every element where none can be."""
    ignored = CATALOGUE[type_name].ignored(settings)
    return target.numel() if ignored is None else int((target != ignored).sum())


# --- rotary positions --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _angles(length: int, size: int, theta: float, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, size / 2], computed in float64 and rounded once."""
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    places = torch.arange(length, dtype=torch.float64) / scaling
    turns = torch.outer(places, theta**-powers).unsqueeze(1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Rotary positions on [rows, T, heads, size]: element i turns with element i + size / 2."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(tensor, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    turned = torch.empty(tensor.shape, dtype=tensor.dtype)
    half = tensor.shape[-1] // 2
    first, second = tensor[..., :half], tensor[..., half:]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin, value=direction)
    return turned


# --- a head and its cost in one ----------------------------------------------------------------------------


class _HeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of ``x @ weight.T``, a chunk of positions at a time, forward and again backward.

    Holds the log-sum of each position between the two; computing the logits a second time costs a third more than keeping
    them, and keeping them is what a large vocabulary cannot afford.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, ignored: int, smoothing: float, z: float
    ) -> Tensor:
        ctx.smoothing, ctx.z = smoothing, z
        ctx.chunk = max(1, HEAD_CHUNK // weight.shape[0])
        counts = target != ignored
        # An ignored target need not be a class; it picks the first one and counts for nothing.
        classes = torch.where(counts, target, 0).unsqueeze(1)
        sums = torch.empty(x.shape[0], dtype=x.dtype)
        total = torch.zeros((), dtype=x.dtype)
        for first in range(0, x.shape[0], ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            logits = functional.linear(x[rows], weight)
            lse = torch.logsumexp(logits, dim=-1, out=sums[rows])
            losses = lse - (1.0 - smoothing) * logits.gather(1, classes[rows]).squeeze(1)
            if smoothing:
                losses -= smoothing * logits.mean(dim=-1)
            if z:
                losses += z * lse.square()
            total += losses.mul_(counts[rows]).sum()
        ctx.save_for_backward(x, weight, classes, counts, sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        x, weight, classes, counts, sums = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        picked = torch.full((ctx.chunk, 1), ctx.smoothing - 1.0, dtype=x.dtype)
        for first in range(0, x.shape[0], ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            lse = sums[rows].unsqueeze(1)
            slope = functional.linear(x[rows], weight).sub_(lse).exp_()
            if ctx.z:
                slope *= 1.0 + 2.0 * ctx.z * lse
            slope.scatter_add_(1, classes[rows], picked[: slope.shape[0]])
            if ctx.smoothing:
                slope -= ctx.smoothing / weight.shape[0]
            slope *= (grads[0] * counts[rows]).unsqueeze(1)
            torch.mm(slope, weight, out=grad_x[rows])
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), x[rows])
        return grad_x, grad_weight, None, None, None, None
