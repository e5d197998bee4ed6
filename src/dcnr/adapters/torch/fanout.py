"""How a tensor leaves a node: the explicit folds and borders that keep placement out of the bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcnr.adapters.torch.backend import canonical


class _FanOut(torch.autograd.Function):
    """One tensor in, one output per consumer; backward is the left fold of the consumers' gradients in their order."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, crossing: tuple[bool, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.crossing = crossing
        source = canonical(tensor) if any(crossing) else tensor
        return tuple(source.view_as(source) for _ in crossing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        folded = False
        for grad, crosses in zip(grads, ctx.crossing, strict=True):
            if grad is None:  # This consumer reaches no cost.
                continue
            term = canonical(grad) if crosses else grad
            if total is None:
                total = term
            else:
                total = total.add_(term) if folded else total + term
                folded = True
        return total, None


def fan_out(tensor: Tensor, crossing: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """One copy of ``tensor`` (a view, no memory) per consumer, in the order in which their gradients are folded.

    ``crossing``: per consumer, whether it belongs to another kernel group; there the tensor and its gradient are made
    canonical (:func:`~dcnr.adapters.torch.backend.canonical`), as they would be had they travelled. Autograd alone
    sums gradients in the order in which it happens to run, which differs between one segment and two.
    """
    if not tensor.requires_grad or not torch.is_grad_enabled():
        source = canonical(tensor) if any(crossing) else tensor
        return (source,) * len(crossing)
    if len(crossing) == 1 and not crossing[0]:
        return (tensor,)
    outputs: tuple[Tensor, ...] = _FanOut.apply(tensor, crossing)  # type: ignore[no-untyped-call]
    return outputs
