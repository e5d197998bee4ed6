"""Several tensors to one, or one to several: broadcast, stack, add, multiply, matmul."""

from __future__ import annotations

import functools

from dcnr.network.node_type import (
    Call,
    Example,
    Inputs,
    Key,
    Library,
    Mismatch,
    NodeType,
    Settings,
    Tensors,
    TensorSpec,
    Weights,
    all_alike,
    axis_of,
    expect_float,
    integer,
    per_element,
)


def _broadcast_shape(settings: Settings, inputs: Inputs) -> Inputs:
    return inputs * integer(settings, "num_outputs")


def _stack_shape(settings: Settings, inputs: Inputs) -> Inputs:
    first = inputs[0]
    axis = axis_of(first, integer(settings, "axis"))
    for slot, found in enumerate(inputs):
        others = (*found.shape[:axis], *found.shape[axis + 1 :])
        if (
            found.dtype != first.dtype
            or len(found.shape) != len(first.shape)
            or others != (*first.shape[:axis], *first.shape[axis + 1 :])
        ):
            raise Mismatch(f"found input {found} at slot {slot}, expected {first} as at slot 0, but for axis {axis}")
    size = sum(found.shape[axis] for found in inputs)
    return (TensorSpec(shape=(*first.shape[:axis], size, *first.shape[axis + 1 :]), dtype=first.dtype),)


def _matmul_shape(settings: Settings, inputs: Inputs) -> Inputs:
    first, second = inputs
    for found in inputs:
        expect_float(settings, found)
        if len(found.shape) < 2:
            raise Mismatch(f"found input {found}, expected [.., n, m]")
    *outer, rows, inner = first.shape
    expected = [*outer, inner]
    if list(second.shape[:-1]) != expected:
        raise Mismatch(
            f"found input {second} at slot 1, expected {expected} and one more axis, to multiply with {first}"
        )
    return (TensorSpec(shape=(*outer, rows, second.shape[-1]), dtype=first.dtype),)


def _matmul_flops(_: Settings, inputs: Inputs, outputs: Inputs) -> int:
    return 2 * inputs[0].elements * outputs[0].shape[-1]


def _broadcast(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    return lib.fan_out(inputs[0], integer(call.settings, "num_outputs"))


def _stack(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    axis = integer(call.settings, "axis")
    return (lib.torch.cat(inputs, dim=axis if axis < 0 else axis + 1),)


def _add(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (functools.reduce(lib.torch.add, inputs),)


def _multiply(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (functools.reduce(lib.torch.mul, inputs),)


def _matmul(_lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (inputs[0] @ inputs[1],)


_THREE = (Example(inputs=((3, 4), (3, 4), (3, 4))),)

TYPES = (
    NodeType(
        name="broadcast",
        purpose="Its input at each output slot; gradients add up in the order of the slots.",
        shapes="[..] -> num_outputs times [..]",
        keys=(Key(name="num_outputs", kind="int", default=2, least=1, below=65537, about="Number of output slots."),),
        outputs=lambda settings: integer(settings, "num_outputs"),
        shape=_broadcast_shape,
        kernel=_broadcast,
        examples=(Example(config={"num_outputs": 3}),),
    ),
    NodeType(
        name="stack",
        purpose="Its inputs one after the other along an axis, in the order of the slots.",
        shapes="two or more, alike but for the axis -> one",
        aliases=("concat",),
        keys=(Key(name="axis", kind="int", default=-1, about="The batch axis is not counted."),),
        inputs=None,
        shape=_stack_shape,
        kernel=_stack,
        examples=(
            Example(inputs=((3, 4), (3, 1), (3, 2))),
            Example(config={"axis": 0}, inputs=((3, 4), (1, 4))),
        ),
    ),
    NodeType(
        name="add",
        purpose="The sum of its inputs, in the order of the slots.",
        shapes="two or more [..] alike -> [..]",
        inputs=None,
        shape=all_alike,
        kernel=_add,
        examples=_THREE,
        flops=per_element(1),
    ),
    NodeType(
        name="multiply",
        purpose="The product of its inputs, element by element.",
        shapes="two or more [..] alike -> [..]",
        inputs=None,
        shape=all_alike,
        kernel=_multiply,
        examples=_THREE,
        flops=per_element(1),
        # Every partial product but the last, which is the output.
        kept=lambda _settings, inputs, _outputs: inputs[0].bytes * (len(inputs) - 2),
    ),
    NodeType(
        name="matmul",
        purpose="The matrix product of slot 0 with slot 1.",
        shapes="[.., n, m] and [.., m, k] -> [.., n, k]",
        inputs=2,
        shape=_matmul_shape,
        kernel=_matmul,
        examples=(Example(inputs=((2, 3, 4), (2, 4, 5))), Example(inputs=((3, 4), (4, 2)))),
        flops=_matmul_flops,
    ),
)
