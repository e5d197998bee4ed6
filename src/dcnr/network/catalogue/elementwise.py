"""Functions of single elements or of the last axis: activations, dropout, scale."""

from __future__ import annotations

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
    expect_float,
    kept_copies,
    number,
    per_element,
    same_shape,
    text,
)


def _softmax_shape(settings: Settings, inputs: Inputs) -> Inputs:
    expect_float(settings, inputs[0])
    if not inputs[0].shape:
        raise Mismatch(f"found input {inputs[0]}, expected [.., n]")
    return inputs


def _swiglu_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    expect_float(settings, found)
    if not found.shape or found.shape[-1] % 2:
        raise Mismatch(f"found input {found}, expected [.., 2 n]")
    return (TensorSpec(shape=(*found.shape[:-1], found.shape[-1] // 2), dtype=found.dtype),)


def _relu(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (lib.functional.relu(inputs[0]),)


def _gelu(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    return (lib.functional.gelu(inputs[0], approximate=text(call.settings, "approximate")),)


def _silu(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (lib.functional.silu(inputs[0]),)


def _tanh(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (lib.torch.tanh(inputs[0]),)


def _sigmoid(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (lib.torch.sigmoid(inputs[0]),)


def _softmax(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (lib.torch.softmax(inputs[0], dim=-1),)


def _swiglu(lib: Library, inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    """Value first: x[:n] * silu(x[n:]) (Shazeer, 2020)."""
    value, gate = inputs[0].chunk(2, dim=-1)
    return (value * lib.functional.silu(gate),)


def _dropout(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    rate = number(call.settings, "rate")
    if not call.training or rate == 0.0:
        return (inputs[0],)
    return (inputs[0] * lib.dropout_mask(call, inputs[0], rate),)


def _scale(_lib: Library, inputs: Tensors, _weights: Weights, call: Call) -> Tensors:
    return (inputs[0] * number(call.settings, "factor"),)


_PLAIN = (Example(),)
_SAME = "[..] -> [..]"

TYPES = (
    NodeType(
        name="relu",
        purpose="max(x, 0), element by element.",
        shapes=_SAME,
        shape=same_shape,
        kernel=_relu,
        examples=_PLAIN,
        flops=per_element(1),
    ),
    NodeType(
        name="gelu",
        purpose="x times the normal distribution's function of x (Hendrycks and Gimpel, 2016).",
        shapes=_SAME,
        keys=(
            Key(
                name="approximate",
                kind="str",
                default="none",
                choices=("none", "tanh"),
                about="`tanh` computes an approximation of it.",
            ),
        ),
        shape=same_shape,
        kernel=_gelu,
        examples=(*_PLAIN, Example(config={"approximate": "tanh"})),
        flops=per_element(8),
    ),
    NodeType(
        name="silu",
        purpose="x * sigmoid(x), element by element.",
        shapes=_SAME,
        shape=same_shape,
        kernel=_silu,
        examples=_PLAIN,
        flops=per_element(8),
    ),
    NodeType(
        name="tanh",
        purpose="The hyperbolic tangent, element by element.",
        shapes=_SAME,
        shape=same_shape,
        kernel=_tanh,
        examples=_PLAIN,
        flops=per_element(8),
    ),
    NodeType(
        name="sigmoid",
        purpose="1 / (1 + exp(-x)), element by element.",
        shapes=_SAME,
        shape=same_shape,
        kernel=_sigmoid,
        examples=_PLAIN,
        flops=per_element(8),
    ),
    NodeType(
        name="softmax",
        purpose="Exponentials of the last axis, divided by their sum.",
        shapes="[.., n] -> [.., n]",
        shape=_softmax_shape,
        kernel=_softmax,
        examples=_PLAIN,
        flops=per_element(10),
    ),
    NodeType(
        name="swiglu",
        purpose="Halves its last axis, value first: x[:n] * silu(x[n:]) (Shazeer, 2020).",
        shapes="[.., 2 n] -> [.., n]",
        shape=_swiglu_shape,
        kernel=_swiglu,
        examples=_PLAIN,
        flops=per_element(5),
        # The gate's activation.
        kept=lambda _settings, inputs, _outputs: inputs[0].bytes // 2,
    ),
    NodeType(
        name="dropout",
        purpose="Zeroes elements in training and scales the others up; its mask follows from (seed, VNode, step, row).",
        shapes=_SAME,
        keys=(Key(name="rate", kind="float", default=0.1, least=0.0, below=1.0, about="Share of zeroed elements."),),
        shape=same_shape,
        kernel=_dropout,
        examples=(Example(config={"rate": 0.4}),),
        flops=per_element(2),
        kept=kept_copies(1),
    ),
    NodeType(
        name="scale",
        purpose="Its input times a constant.",
        shapes=_SAME,
        keys=(Key(name="factor", kind="float", required=True, about="The constant."),),
        shape=same_shape,
        kernel=_scale,
        examples=(Example(config={"factor": -0.3}),),
        flops=per_element(1),
    ),
)
