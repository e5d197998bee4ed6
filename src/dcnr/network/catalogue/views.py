"""The same values in another arrangement: reshape, transpose, slice, flatten."""

from __future__ import annotations

import math

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
    axis_of,
    integer,
    integers,
)


def _reshape_check(settings: Settings) -> tuple[str, ...]:
    sizes = integers(settings, "target_shape")
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        return (f"config key 'target_shape': found {list(sizes)}, expected sizes of at least 1 and at most one -1",)
    return ()


def _reshape_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    sizes = integers(settings, "target_shape")
    known = math.prod(size for size in sizes if size != -1)
    if found.elements % known or (-1 not in sizes and known != found.elements):
        raise Mismatch(f"found input {found}, expected {known} elements or, with -1, a multiple (target_shape)")
    shape = tuple(found.elements // known if size == -1 else size for size in sizes)
    return (TensorSpec(shape=shape, dtype=found.dtype),)


def _transpose_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    axes = integers(settings, "axes")
    ordered = [axis_of(found, axis) for axis in axes]
    if sorted(ordered) != list(range(len(found.shape))):
        raise Mismatch(f"found input {found}, expected one whose axes are each named once by axes {list(axes)}")
    return (TensorSpec(shape=tuple(found.shape[axis] for axis in ordered), dtype=found.dtype),)


def _slice_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    axis = axis_of(found, integer(settings, "axis"))
    size = found.shape[axis]
    start = integer(settings, "start")
    stop = size if settings["stop"] is None else integer(settings, "stop")
    first, last = (end + size if end < 0 else end for end in (start, stop))
    if not 0 <= first < last <= size:
        raise Mismatch(f"found input {found}, expected axis {axis} to hold {start}..{stop} (start, stop)")
    return (TensorSpec(shape=(*found.shape[:axis], last - first, *found.shape[axis + 1 :]), dtype=found.dtype),)


def _flatten_shape(_: Settings, inputs: Inputs) -> Inputs:
    return (TensorSpec(shape=(inputs[0].elements,), dtype=inputs[0].dtype),)


def _reshape(_lib: Library, inputs: Tensors, _weights: Weights, call: Call) -> Tensors:
    return (inputs[0].reshape(inputs[0].shape[0], *integers(call.settings, "target_shape")),)


def _transpose(_lib: Library, inputs: Tensors, _weights: Weights, call: Call) -> Tensors:
    axes = (axis if axis < 0 else axis + 1 for axis in integers(call.settings, "axes"))
    return (inputs[0].permute(0, *axes),)


def _slice(_lib: Library, inputs: Tensors, _weights: Weights, call: Call) -> Tensors:
    axis = integer(call.settings, "axis")
    axis = axis % inputs[0].dim() if axis < 0 else axis + 1
    stop = call.settings["stop"]
    kept = slice(integer(call.settings, "start"), None if stop is None else integer(call.settings, "stop"))
    return (inputs[0][(slice(None),) * axis + (kept,)],)


def _flatten(_lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (inputs[0].reshape(inputs[0].shape[0], -1),)


TYPES = (
    NodeType(
        name="reshape",
        purpose="The same elements in another shape.",
        shapes="[..] -> target_shape",
        keys=(
            Key(name="target_shape", kind="ints", required=True, about="Without the batch axis; one -1 is allowed."),
        ),
        shape=_reshape_shape,
        kernel=_reshape,
        examples=(Example(config={"target_shape": (2, -1)}), Example(config={"target_shape": (4, 3, 1)})),
        check=_reshape_check,
    ),
    NodeType(
        name="transpose",
        purpose="The same elements with the axes in another order.",
        shapes="[..] -> its axes in the order of `axes`",
        keys=(Key(name="axes", kind="ints", required=True, about="Each axis once; the batch axis is not counted."),),
        shape=_transpose_shape,
        kernel=_transpose,
        examples=(Example(config={"axes": (1, 0)}), Example(config={"axes": (-1, 0, 1)}, inputs=((2, 3, 4),))),
    ),
    NodeType(
        name="slice",
        purpose="A part of one axis.",
        shapes="[.., n, ..] -> [.., stop - start, ..]",
        keys=(
            Key(name="axis", kind="int", default=-1, about="The batch axis is not counted."),
            Key(name="start", kind="int", default=0, about="First index; a negative one counts from the end."),
            Key(name="stop", kind="int", about="Index after the last, likewise; the axis' end when absent."),
        ),
        shape=_slice_shape,
        kernel=_slice,
        examples=(
            Example(config={"start": 1, "stop": -1}),
            Example(config={"axis": 0, "start": -2}),
            Example(config={"axis": -2, "stop": 2}),
        ),
    ),
    NodeType(
        name="flatten",
        purpose="All elements of a row as one axis.",
        shapes="[..] -> [n]",
        shape=_flatten_shape,
        kernel=_flatten,
        examples=(Example(),),
    ),
)
