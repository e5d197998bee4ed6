"""A network as data: nodes, edges, inputs, outputs, costs, and its one canonical form.

Nothing here is checked beyond its JSON form; :func:`dcnr.network.analysis.analyse` checks and annotates.
The id of a network is the sha256 of :func:`canonical_json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dcnr.ids import NetworkId, VNodeId

ConfigValue = str | int | float | bool | tuple[int, ...] | None
UNSAID: Final[tuple[int, ...]] = (0,)
"""This very object as an input's shape stands for one that was not given; ``()`` is that of a single number."""
INTEGERS: Final = range(-(2**63), 2**63)
"""Integers of a definition: of 64 bits, more than any dimension or seed, and quickly printed."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """Where something was written: line and column count from 1; column 0 = the line as a whole; ``file`` may be unknown."""

    file: str = ""
    line: int
    column: int = 0

    def __str__(self) -> str:
        file = f"{self.file}, " if self.file else ""
        return f"{file}line {self.line}" + (f", column {self.column}" if self.column else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One VNode. ``config`` holds values in their declared types, defaults left out.

    ``at`` is where the node was written, ``places`` where its config keys and shapes were: for messages only, no part of
    the definition.
    """

    id: VNodeId
    type: str
    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    output_shapes: tuple[tuple[int, ...], ...] | None = None
    at: Position | None = field(default=None, compare=False)
    places: Mapping[str, Position] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """From an output slot to an input slot. An edge's index in the definition is its name on the wire."""

    source: VNodeId
    source_slot: int = 0
    target: VNodeId
    target_slot: int = 0
    at: Position | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """A tensor that enters from the dataset; ``shape`` leaves out the batch axis.

    Several inputs may have one name (one tensor that enters at several nodes) if column, dtype and shape agree. Before
    analysis an empty ``column`` or ``dtype`` and the shape :data:`UNSAID` stand for the default.
    """

    name: str
    node_id: VNodeId
    slot_id: int = 0
    column: str
    dtype: str
    shape: tuple[int, ...]
    at: Position | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    name: str
    node_id: VNodeId
    slot_id: int = 0
    at: Position | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSpec:
    """``target`` names a column of the dataset. Total loss = sum of weight * cost."""

    name: str
    node_id: VNodeId
    slot_id: int = 0
    target: str
    weight: float = 1.0
    at: Position | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    name: str
    type: str
    node_id: VNodeId
    slot_id: int = 0
    at: Position | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A whole network, lists in the order of the file."""

    name: str
    precision: str = "float32"
    """Of activations and, where ``param_precision`` is empty, of parameters: ``float32``, ``float64`` or ``bf16``."""
    param_precision: str = ""
    inputs: tuple[InputSpec, ...] = ()
    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()
    outputs: tuple[OutputSpec, ...] = ()
    costs: tuple[CostSpec, ...] = ()
    metrics: tuple[MetricSpec, ...] = ()

    @property
    def shown_precision(self) -> str:
        """For people."""
        return f"{self.precision}, parameters {self.param_precision}" if self.param_precision else self.precision


def texts(definition: Definition) -> Iterator[tuple[str, object, Position | None]]:
    """What each text of a definition is called, the text (or whatever is there instead), and where it was written."""
    yield "name", definition.name, None
    yield "precision", definition.precision, None
    yield "param_precision", definition.param_precision, None
    for node in definition.nodes:
        yield "node id", node.id, node.at
        yield "node type", node.type, node.places.get("type", node.at)
        for key, value in node.config.items():
            yield "config key", key, node.places.get(key, node.at)
            if isinstance(value, str):
                yield "config value", value, node.places.get(key, node.at)
    for edge in definition.edges:
        yield "edge from", edge.source, edge.at
        yield "edge to", edge.target, edge.at
    for entry in definition.inputs:
        yield "input column", entry.column, entry.at
        yield "input dtype", entry.dtype, entry.at
    for cost in definition.costs:
        yield "cost target", cost.target, cost.at
    for metric in definition.metrics:
        yield "metric type", metric.type, metric.at
    for what, ends in (
        ("input", definition.inputs),
        ("output", definition.outputs),
        ("cost", definition.costs),
        ("metric", definition.metrics),
    ):
        for end in ends:
            yield f"{what} name", end.name, end.at
            yield f"{what} node_id", end.node_id, end.at


def json_bytes(value: Any) -> bytes:
    """The one JSON form of everything stored: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def canonical_json(definition: Definition) -> bytes:
    """Exactly the bytes whose sha256 is the network's id.

    Of what :func:`~dcnr.network.analysis.analyse` returns. Every field is written, slot 0, weight 1.0, the precision and
    empty lists included; left out are the defaults in a node's ``config``, and ``input_shapes`` and ``output_shapes``
    that the file does not give.
    """
    document: dict[str, Any] = {"name": definition.name, "precision": definition.precision}
    if definition.param_precision:
        document["param_precision"] = definition.param_precision
    document["inputs"] = [
        {
            "name": i.name,
            "node_id": i.node_id,
            "slot_id": i.slot_id,
            "column": i.column,
            "dtype": i.dtype,
            "shape": list(i.shape),
        }
        for i in definition.inputs
    ]
    nodes = []
    for node in definition.nodes:
        entry: dict[str, Any] = {"id": node.id, "type": node.type, "config": dict(node.config)}
        if node.input_shapes is not None:
            entry["input_shapes"] = [list(s) for s in node.input_shapes]
        if node.output_shapes is not None:
            entry["output_shapes"] = [list(s) for s in node.output_shapes]
        nodes.append(entry)
    document["nodes"] = nodes
    document["edges"] = [
        {"from": e.source, "from_slot": e.source_slot, "to": e.target, "to_slot": e.target_slot}
        for e in definition.edges
    ]
    document["outputs"] = [{"name": o.name, "node_id": o.node_id, "slot_id": o.slot_id} for o in definition.outputs]
    document["costs"] = [
        {"name": c.name, "node_id": c.node_id, "slot_id": c.slot_id, "target": c.target, "weight": c.weight}
        for c in definition.costs
    ]
    document["metrics"] = [
        {"name": m.name, "type": m.type, "node_id": m.node_id, "slot_id": m.slot_id} for m in definition.metrics
    ]
    return json_bytes(document)


def from_canonical_json(data: bytes) -> Definition:
    """Inverse of :func:`canonical_json`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

    return Definition(
        name=_str(document["name"]),
        precision=_str(document["precision"]),
        param_precision=_str(document.get("param_precision", "")),
        inputs=tuple(
            InputSpec(
                name=_str(i["name"]),
                node_id=VNodeId(_str(i["node_id"])),
                slot_id=_int(i["slot_id"]),
                column=_str(i["column"]),
                dtype=_str(i["dtype"]),
                shape=_shape(i["shape"]),
            )
            for i in map(_mapping, document["inputs"])
        ),
        nodes=tuple(
            Node(
                id=VNodeId(_str(n["id"])),
                type=_str(n["type"]),
                config={_str(key): _value(value) for key, value in _mapping(n["config"]).items()},
                input_shapes=_shapes(n.get("input_shapes")),
                output_shapes=_shapes(n.get("output_shapes")),
            )
            for n in map(_mapping, document["nodes"])
        ),
        edges=tuple(
            Edge(
                source=VNodeId(_str(e["from"])),
                source_slot=_int(e["from_slot"]),
                target=VNodeId(_str(e["to"])),
                target_slot=_int(e["to_slot"]),
            )
            for e in map(_mapping, document["edges"])
        ),
        outputs=tuple(
            OutputSpec(name=_str(o["name"]), node_id=VNodeId(_str(o["node_id"])), slot_id=_int(o["slot_id"]))
            for o in map(_mapping, document["outputs"])
        ),
        costs=tuple(
            CostSpec(
                name=_str(c["name"]),
                node_id=VNodeId(_str(c["node_id"])),
                slot_id=_int(c["slot_id"]),
                target=_str(c["target"]),
                weight=_float(c["weight"]),
            )
            for c in map(_mapping, document["costs"])
        ),
        metrics=tuple(
            MetricSpec(
                name=_str(m["name"]),
                type=_str(m["type"]),
                node_id=VNodeId(_str(m["node_id"])),
                slot_id=_int(m["slot_id"]),
            )
            for m in map(_mapping, document["metrics"])
        ),
    )


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError(f"found {type(value).__name__}, expected a mapping")


def _str(value: Any) -> str:
    if isinstance(value, str):
        # JSON can write halves of surrogate pairs, which are no text.
        value.encode()
        return value
    raise TypeError(f"found {type(value).__name__}, expected a text")


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"found {type(value).__name__}, expected an integer")
    if value not in INTEGERS:
        raise ValueError(f"found an integer of {value.bit_length()} bits, expected one of 64 with its sign")
    return value


def _float(value: Any) -> float:
    # 1 and 1.0 are equal and would be two ids.
    if isinstance(value, float):
        return value
    raise TypeError(f"found {type(value).__name__}, expected a number with a point")


def _value(value: Any) -> ConfigValue:
    match value:
        case bool() | float():
            return value
        case str():
            return _str(value)
        case int():
            return _int(value)
        case _:
            # A list of integers, as of axes.
            return _shape(value)


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(map(_int, value))
    raise TypeError(f"found {type(value).__name__}, expected a shape")


def _shapes(value: Any) -> tuple[tuple[int, ...], ...] | None:
    return None if value is None else tuple(map(_shape, value))


def network_id(definition: Definition) -> NetworkId:
    """sha256 of the canonical form."""
    return NetworkId(hashlib.sha256(canonical_json(definition)).hexdigest())
