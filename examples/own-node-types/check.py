"""Derivatives of every example against finite differences, shapes against those that the entry says."""

import torch
from dcnr_prelu import PRELU

from dcnr.adapters.torch.library import LIBRARY
from dcnr.ids import VNodeId
from dcnr.network.node_type import Call, Example, NodeType, TensorSpec
from dcnr.network.types import normalise_config


def check(kind: NodeType, example: Example) -> None:
    settings = normalise_config(kind, example.config, "float64").settings
    call = Call(vnode=VNodeId("node"), settings=settings)
    inputs = tuple(TensorSpec(shape=shape, dtype="float64") for shape in example.inputs)
    parameters = {parameter.name: parameter.shape for parameter in kind.parameters(settings)}
    shapes = [*((2, *spec.shape) for spec in inputs), *parameters.values()]  # two rows
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = dict(zip(parameters, given[len(inputs) :], strict=True))
        return kind.kernel(LIBRARY, given[: len(inputs)], weights, call)

    assert torch.autograd.gradcheck(function, tensors)
    expected = [(2, *spec.shape) for spec in kind.shape(settings, inputs)]
    assert [tuple(output.shape) for output in function(*tensors)] == expected


for example in PRELU.examples:
    check(PRELU, example)
print("prelu is right")
