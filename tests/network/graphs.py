"""Short ways to write definitions in tests."""

from __future__ import annotations

from typing import Any

import pytest

from dcnr.errors import InvalidNetwork
from dcnr.ids import VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.graph import ConfigValue, CostSpec, Definition, Edge, InputSpec, Node


def node(id: str, type: str, **config: ConfigValue) -> Node:
    return Node(id=VNodeId(id), type=type, config=config)


def edge(source: str, target: str, source_slot: int = 0, target_slot: int = 0) -> Edge:
    return Edge(source=VNodeId(source), source_slot=source_slot, target=VNodeId(target), target_slot=target_slot)


def entry(node_id: str, shape: tuple[int, ...] = (4,), dtype: str = "", name: str = "x", slot: int = 0) -> InputSpec:
    return InputSpec(name=name, node_id=VNodeId(node_id), slot_id=slot, column="", dtype=dtype, shape=shape)


def cost(node_id: str, target: str = "y", name: str = "loss") -> CostSpec:
    return CostSpec(name=name, node_id=VNodeId(node_id), target=target)


def network(*parts: Any, **fields: Any) -> Definition:
    """A definition from nodes, edges, inputs and costs in any order."""

    def of(kind: type) -> tuple[Any, ...]:
        return tuple(part for part in parts if isinstance(part, kind))

    return Definition(name="test", nodes=of(Node), edges=of(Edge), inputs=of(InputSpec), costs=of(CostSpec), **fields)


def problems(definition: Definition) -> tuple[str, ...]:
    with pytest.raises(InvalidNetwork) as caught:
        analyse(definition)
    return caught.value.problems
