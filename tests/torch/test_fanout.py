"""The explicit fold: in the order of the consumers, whatever order autograd runs them in."""

from __future__ import annotations

import torch

from dcnr.adapters.torch.fanout import fan_out


def test_gradients_fold_from_the_left_in_consumer_order() -> None:
    # In float32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows.
    for factors, expected in (((1e8, 1.0, -1e8), 0.0), ((1e8, -1e8, 1.0), 1.0), ((1.0, 1e8, -1e8), 0.0)):
        source = torch.ones(3, requires_grad=True)
        copies = fan_out(source, (True, False, True))
        # Built in reverse, so that the order of the graph is not the order of the consumers.
        parts = [copy * factor for copy, factor in reversed(list(zip(copies, factors, strict=True)))]
        (grad,) = torch.autograd.grad([part.sum() for part in parts], [source])
        assert grad.tolist() == [expected] * 3


def test_a_consumer_without_gradient_is_left_out() -> None:
    source = torch.ones(2, requires_grad=True)
    first, _, third = fan_out(source, (True, True, True))
    (grad,) = torch.autograd.grad([(first * 2).sum(), (third * 3).sum()], [source])
    assert grad.tolist() == [5.0, 5.0]


def test_across_kernel_groups_tensor_and_gradient_are_canonical() -> None:
    source = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    seen: list[tuple[int, ...]] = []
    middle = source * 1
    middle.register_hook(lambda grad: seen.append(grad.stride()))
    (copy,) = fan_out(middle, (True,))
    assert copy.is_contiguous()
    torch.autograd.grad(copy.sum(), source)  # The gradient of a sum is expanded: strides 0.
    assert seen == [(2, 1)]


def test_without_gradients_nothing_is_copied() -> None:
    source = torch.ones(2, 2)
    assert all(copy is source for copy in fan_out(source, (True, False)))
