"""A network as a plain ``torch.nn.Module``: debugger and exporter. Its bits are torch's own, not the session's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dcnr.adapters.torch.backend import DTYPES
from dcnr.adapters.torch.library import LIBRARY
from dcnr.adapters.torch.words import initial
from dcnr.errors import UsageError
from dcnr.ids import VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.graph import Definition
from dcnr.network.node_type import Call, compute_dtype, number
from dcnr.network.types import CATALOGUE


def to_torch(definition: Definition, seed: int = 0) -> NetworkModule:
    """The module of a network, with the initial weights of a session of that seed.

    Raises :class:`~dcnr.errors.InvalidNetwork`. Imports nothing but torch and may run with any number of threads.
    """
    return NetworkModule(definition, seed)


class NetworkModule(nn.Module):
    """``state_dict`` has a session's keys, ``<node id>.<name>``, a tied weight once under its owner.

    ``forward(**inputs)`` takes tensors [rows, ...] by the network's input names and gives its outputs by name, or the tensor
    itself where there is one. A network without outputs gives what its costs compare, under the costs' names.
    """

    def __init__(self, definition: Definition, seed: int = 0) -> None:
        super().__init__()
        self._network = analyse(definition)
        for vnode, info in self._network.vnodes.items():
            for spec in info.parameters:
                value = initial(spec, seed=seed, vnode=vnode, dtype=DTYPES[spec.dtype])
                parameter = nn.Parameter(value, requires_grad=info.trainable)
                *path, name = f"{vnode}.{spec.name}".split(".")
                _descend(self, path)._parameters[name] = parameter

    def forward(self, **inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Raises :class:`~dcnr.errors.UsageError` unless exactly the network's inputs are given."""
        network, definition = self._network, self._network.definition
        # One tensor that enters at several nodes is several entries of one name.
        names = {entry.name for entry in definition.inputs}
        if names != set(inputs):
            raise UsageError(f"found inputs {sorted(inputs)}, expected {sorted(names)}")
        fed = {(entry.node_id, entry.slot_id): inputs[entry.name] for entry in definition.inputs}
        made: dict[tuple[VNodeId, int], Tensor] = {}

        def feed(vnode: VNodeId, slot: int) -> Tensor:
            index = network.vnodes[vnode].in_edges[slot]
            if index is None:
                return fed[vnode, slot]
            edge = definition.edges[index]
            return made[edge.source, edge.source_slot]

        for vnode in network.order:
            info = network.vnodes[vnode]
            kind = CATALOGUE[info.node.type]
            if kind.is_cost:
                continue
            dtype = DTYPES[compute_dtype(info.settings)]
            fed_here = (feed(vnode, slot) for slot in range(len(info.inputs)))
            tensors = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in fed_here)
            if info.node.type == "dropout":
                made[vnode, 0] = functional.dropout(tensors[0], number(info.settings, "rate"), self.training)
                continue
            weights = {spec.name: self._parameter(vnode, spec.name) for spec in info.parameters}
            if info.tied_to is not None:
                weights[kind.tensor] = self._parameter(info.tied_to, kind.tensor)
            if kind.casts_weights:
                weights = {name: weight.to(dtype) for name, weight in weights.items()}
            outputs = kind.kernel(LIBRARY, tensors, weights, Call(vnode=vnode, settings=info.settings))
            made.update({(vnode, slot): output for slot, output in enumerate(outputs)})
        if definition.outputs:
            found = {entry.name: made[entry.node_id, entry.slot_id] for entry in definition.outputs}
        else:
            found = {cost.name: feed(cost.node_id, 0) for cost in definition.costs}
        return next(iter(found.values())) if len(found) == 1 else found

    def _parameter(self, vnode: VNodeId, name: str) -> Tensor:
        *path, last = f"{vnode}.{name}".split(".")
        parameter = _descend(self, path)._parameters[last]
        assert parameter is not None
        return parameter


def _descend(module: nn.Module, path: list[str]) -> nn.Module:
    """The submodule at a dotted path, made where it is missing.

    Written into torch's own table, because a node may be called ``train`` or ``add``, which are methods of a module.
    """
    for name in path:
        child: Any = module._modules.get(name)
        if child is None:
            child = module._modules[name] = nn.Module()
        module = child
    return module
