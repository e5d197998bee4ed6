"""A segment of a network as a network of its own: what ``dcnr bench train`` gives to plain PyTorch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network
from dcnr.network.graph import Definition, InputSpec, OutputSpec


def stage(network: Network, vnodes: Collection[VNodeId]) -> Definition:
    """The network of ``vnodes`` alone, costs left out. No weight may be tied across its border.

    A tensor that enters from outside is an input named ``<node id>_<slot>`` after where it comes from; one that leaves is
    an output of the same name. The whole network's inputs and outputs keep their names.
    """
    whole = network.definition
    nodes = tuple(node for node in whole.nodes if node.id in vnodes and node.type != "cost")
    kept = {node.id for node in nodes}
    costs = {cost.node_id for cost in whole.costs}
    inputs = [entry for entry in whole.inputs if entry.node_id in kept]
    outputs = [entry for entry in whole.outputs if entry.node_id in kept]
    leaving: dict[str, OutputSpec] = {}
    for edge in whole.edges:
        name = f"{edge.source}_{edge.source_slot}"
        if edge.target in kept and edge.source not in kept:
            spec = network.vnodes[edge.source].outputs[edge.source_slot]
            inputs.append(
                InputSpec(
                    name=name,
                    node_id=edge.target,
                    slot_id=edge.target_slot,
                    column=name,
                    dtype=spec.dtype,
                    shape=spec.shape,
                )
            )
        if edge.source in kept and edge.target not in kept | costs:
            leaving[name] = OutputSpec(name=name, node_id=edge.source, slot_id=edge.source_slot)
    return replace(
        whole,
        nodes=nodes,
        edges=tuple(edge for edge in whole.edges if edge.source in kept and edge.target in kept),
        inputs=tuple(inputs),
        outputs=(*outputs, *leaving.values()),
        costs=(),
        metrics=tuple(metric for metric in whole.metrics if metric.node_id in kept),
    )
