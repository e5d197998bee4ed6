"""Products with a weight: linear, embedder."""

from __future__ import annotations

from dcnr.network.graph import ConfigValue
from dcnr.network.node_type import (
    BIAS,
    ROPE_THETA,
    SEQ_LEN,
    Call,
    Example,
    Inputs,
    Key,
    Library,
    Mismatch,
    NodeType,
    ParameterSpec,
    Settings,
    Tensors,
    TensorSpec,
    Weights,
    compute_dtype,
    dimension,
    expect_last,
    integer,
    matrix,
    text,
    vector,
)


def _linear_shape(settings: Settings, inputs: Inputs) -> Inputs:
    expect_last(settings, inputs[0], integer(settings, "in_dim"), "in_dim")
    return (TensorSpec(shape=(*inputs[0].shape[:-1], integer(settings, "out_dim")), dtype=inputs[0].dtype),)


def _linear_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    rows, columns = integer(settings, "out_dim"), integer(settings, "in_dim")
    weight = matrix(settings, "weight", (rows, columns))
    return (weight, vector(settings, "bias", rows, "zeros")) if settings["bias"] else (weight,)


def _linear(lib: Library, inputs: Tensors, weights: Weights, _: Call) -> Tensors:
    return (lib.functional.linear(inputs[0], weights["weight"], weights.get("bias")),)


def _linear_flops(_: Settings, inputs: Inputs, outputs: Inputs) -> int:
    return 2 * inputs[0].elements * outputs[0].shape[-1]


def _linear_infer(_config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    known: dict[str, ConfigValue] = {"in_dim": inputs[0].shape[-1]} if inputs[0].shape else {}
    if tied is not None:
        # A bias of its own beside another's weight is rarely meant, and keeps a head from being computed with its cost.
        known |= {"out_dim": tied[0], "bias": False}
    return known


def _embedder_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    if found.dtype != "int64":
        raise Mismatch(f"found input {found}, expected dtype int64")
    limit = settings["seq_len"]
    if limit is not None and (len(found.shape) != 1 or found.shape[0] > integer(settings, "seq_len")):
        raise Mismatch(f"found input {found}, expected [T] with T <= {limit} (seq_len)")
    return (TensorSpec(shape=(*found.shape, integer(settings, "dim")), dtype=compute_dtype(settings)),)


def _embedder_check(settings: Settings) -> tuple[str, ...]:
    if settings["position_encoding"] == "learned" and settings["seq_len"] is None:
        return ("config key 'seq_len': found nothing, expected it with position_encoding learned",)
    return ()


def _embedder_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    dim = integer(settings, "dim")
    weight = matrix(settings, "weight", (integer(settings, "vocab_size"), dim))
    if settings["position_encoding"] == "learned":
        return (weight, matrix(settings, "position.weight", (integer(settings, "seq_len"), dim)))
    return (weight,)


def _embedder(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    found = lib.functional.embedding(inputs[0], weights["weight"])
    if text(call.settings, "position_encoding") == "learned":
        found = found + weights["position.weight"][: inputs[0].shape[1]]
    return (found.to(lib.dtype(call.settings)),)


def _embedder_infer(_config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    known: dict[str, ConfigValue] = {"seq_len": inputs[0].shape[0]} if len(inputs[0].shape) == 1 else {}
    if tied is not None:
        known |= {"vocab_size": tied[0], "dim": tied[1]}
    return known


def _tokens(settings: Settings) -> TensorSpec | None:
    if settings["seq_len"] is None:
        return None
    return TensorSpec(shape=(integer(settings, "seq_len"),), dtype="int64")


TYPES = (
    NodeType(
        name="linear",
        purpose="Product with a weight, of the last axis.",
        shapes="[.., in_dim] -> [.., out_dim]",
        aliases=("dense",),
        keys=(
            dimension("in_dim", "Size of the input's last axis.", required=True),
            dimension("out_dim", "Size of the output's last axis.", required=True),
            BIAS,
        ),
        shape=_linear_shape,
        kernel=_linear,
        examples=(
            Example(config={"in_dim": 4, "out_dim": 5}),
            Example(config={"in_dim": 4, "out_dim": 5, "bias": False}),
        ),
        parameters=_linear_parameters,
        tensor="weight",
        orthogonalised=True,
        flops=_linear_flops,
        infer=_linear_infer,
    ),
    NodeType(
        name="embedder",
        purpose="A row of its weight for each token, with a learned position added if wanted.",
        shapes="[T] int64 -> [T, dim]",
        keys=(
            dimension("vocab_size", "Number of tokens.", required=True),
            dimension("dim", "Size of the output's last axis.", required=True),
            SEQ_LEN,
            Key(
                name="position_encoding",
                kind="str",
                default="learned",
                choices=("learned", "rope", "none"),
                about="`learned` needs `seq_len`; `rope` declares that the attention nodes rotate: it adds nothing here.",
            ),
            ROPE_THETA,
        ),
        shape=_embedder_shape,
        kernel=_embedder,
        examples=(
            Example(config={"vocab_size": 7, "dim": 4, "seq_len": 6}, inputs=((5,),), indexes=7),
            Example(config={"vocab_size": 7, "dim": 4, "position_encoding": "none"}, inputs=((5,),), indexes=7),
        ),
        check=_embedder_check,
        parameters=_embedder_parameters,
        tensor="weight",
        casts_weights=False,
        flops=lambda _settings, _inputs, outputs: outputs[0].elements,
        default_input=_tokens,
        infer=_embedder_infer,
    ),
)
