"""Normalisations of the last axis: layernorm, rmsnorm."""

from __future__ import annotations

from dcnr.network.node_type import (
    BIAS,
    DTYPE_BYTES,
    EPS,
    Call,
    Example,
    Library,
    NodeType,
    ParameterSpec,
    Settings,
    Tensors,
    Weights,
    dimension,
    expect_dim,
    infer_dim,
    integer,
    number,
    per_element,
    positions,
    vector,
)


def _gain(settings: Settings) -> tuple[ParameterSpec, ...]:
    return (vector(settings, "weight", integer(settings, "dim"), "ones"),)


def _gain_and_bias(settings: Settings) -> tuple[ParameterSpec, ...]:
    bias = vector(settings, "bias", integer(settings, "dim"), "zeros")
    return (*_gain(settings), bias) if settings["bias"] else _gain(settings)


def _layernorm(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    size, eps = (integer(call.settings, "dim"),), number(call.settings, "eps")
    return (lib.functional.layer_norm(inputs[0], size, weights["weight"], weights.get("bias"), eps),)


def _rmsnorm(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    """Zhang and Sennrich, 2019."""
    size, eps = (integer(call.settings, "dim"),), number(call.settings, "eps")
    return (lib.functional.rms_norm(inputs[0], size, weights["weight"], eps),)


_DIM = dimension("dim", "Size of the last axis.", required=True)

TYPES = (
    NodeType(
        name="layernorm",
        purpose="The last axis with mean 0 and deviation 1, times a gain (Ba et al., 2016).",
        shapes="[.., dim] -> [.., dim]",
        keys=(_DIM, EPS, BIAS),
        shape=expect_dim,
        kernel=_layernorm,
        examples=(Example(config={"dim": 4}), Example(config={"dim": 4, "bias": False, "eps": 1e-3})),
        parameters=_gain_and_bias,
        flops=per_element(8),
        # Mean and reciprocal deviation of each position.
        kept=lambda _settings, inputs, _outputs: 2 * positions(inputs) * DTYPE_BYTES[inputs[0].dtype],
        infer=infer_dim,
    ),
    NodeType(
        name="rmsnorm",
        purpose="The last axis divided by its root mean square, times a gain (Zhang and Sennrich, 2019).",
        shapes="[.., dim] -> [.., dim]",
        keys=(_DIM, EPS),
        shape=expect_dim,
        kernel=_rmsnorm,
        examples=(Example(config={"dim": 4}),),
        parameters=_gain,
        flops=per_element(6),
        kept=lambda _settings, inputs, _outputs: inputs[0].bytes + positions(inputs) * DTYPE_BYTES[inputs[0].dtype],
        infer=infer_dim,
    ),
)
