"""A node type of one's own: a rectifier whose slope below zero is learned, one per feature (He et al., 2015)."""

from dcnr.network.node_type import (
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
    per_element,
    vector,
)


def parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    return (vector(settings, "weight", integer(settings, "dim"), "zeros"),)


def kernel(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    x = inputs[0]
    return (lib.torch.where(x > 0, x, x * weights["weight"]),)


PRELU = NodeType(
    name="prelu",
    purpose="max(x, 0) + weight * min(x, 0), a weight per feature.",
    shapes="[.., dim] -> [.., dim]",
    keys=(dimension("dim", "Size of the last axis.", required=True),),
    shape=expect_dim,
    kernel=kernel,
    examples=(Example(config={"dim": 4}, inputs=((3, 4),)),),
    parameters=parameters,
    flops=per_element(2),
    # Backward needs to know which elements were positive: a byte each.
    kept=lambda settings, inputs, outputs: inputs[0].elements,
    infer=infer_dim,
)
