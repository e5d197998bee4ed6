"""A network written in Python: every call adds a node and is checked at once, at the caller's line.

::

    g = Graph("mine")
    x = g.input("tokens", [128], "int64")
    h = g.embedder(x, vocab_size=4096, dim=256, alias="tok")
    with g.colocate("block_0"):
        h = h + g.attention(g.layernorm(h), num_heads=8, head_dim=32)
    g.cost("ce_logits", g.linear(h, tie="tok"), target="targets")

Every type of the catalogue is a method: tensors first, then config keys. What follows from the tensors (``in_dim``, ``dim``,
``seq_len``) may be left out; a ``linear`` with ``tie`` has no bias unless it is asked for. ``alias`` and ``tie`` are short for ``shared_weight_alias`` and ``tie_weight_alias``; ``id`` names the
node instead of the automatic ``<group>_<type>``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from dcnr.errors import InvalidNetwork
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import (
    ConfigValue,
    CostSpec,
    Definition,
    Edge,
    InputSpec,
    MetricSpec,
    Node,
    OutputSpec,
    Position,
)
from dcnr.network.node_type import (
    DIMENSION_MOST,
    INPUT_DTYPES,
    PRECISIONS,
    Mismatch,
    NodeType,
    Settings,
    TensorSpec,
    taken,
)
from dcnr.network.types import CATALOGUE, find_type, nearest, normalise_config

_SHORT = {"alias": "shared_weight_alias", "tie": "tie_weight_alias"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """A tensor of a graph: output ``slot`` of ``node``, or (``node`` None) the input named ``name``."""

    graph: Graph = field(repr=False)
    spec: TensorSpec
    node: VNodeId | None
    slot: int = 0
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        return self.spec.shape

    def __add__(self, other: Symbol) -> Symbol:
        return self.graph.add(self, other)


class NodeMethod(Protocol):
    """What ``graph.<type>`` is: adds a node of that type and returns its output."""

    def __call__(self, *inputs: Symbol, id: str | None = None, **config: ConfigValue) -> Symbol: ...


class Graph:
    """Builds a :class:`~dcnr.network.graph.Definition`. Wrong calls raise :class:`~dcnr.errors.InvalidNetwork`, which names
    the caller's file and line."""

    def __init__(self, name: str = "network", precision: str = "float32", param_precision: str = "") -> None:
        """``precision`` of activations and, unless ``param_precision`` is given, of parameters."""
        for found in (precision, param_precision or precision):
            if found not in PRECISIONS:
                raise _problem(f"precision: found {found!r}, expected one of {', '.join(PRECISIONS)}")
        self.name = name
        self.precision = precision
        self.param_precision = param_precision
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []
        self._declared: dict[str, TensorSpec] = {}
        self._inputs: list[InputSpec] = []
        self._outputs: list[OutputSpec] = []
        self._costs: list[CostSpec] = []
        self._metrics: tuple[MetricSpec, ...] = ()
        self._columns: dict[str, str] = {}
        self._ids: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._shared: dict[str, tuple[int, ...]] = {}
        self._group: str | None = None

    @classmethod
    def from_definition(cls, definition: Definition) -> Graph:
        """The graph of a definition. Raises :class:`~dcnr.errors.InvalidNetwork`."""
        network = analyse(definition)
        whole = network.definition
        graph = cls(whole.name, whole.precision, whole.param_precision)
        graph._nodes.extend(whole.nodes)
        graph._edges.extend(whole.edges)
        graph._inputs.extend(whole.inputs)
        graph._outputs.extend(whole.outputs)
        graph._costs.extend(whole.costs)
        graph._metrics = whole.metrics
        for entry in whole.inputs:
            graph._declared[entry.name] = TensorSpec(shape=entry.shape, dtype=entry.dtype)
            graph._columns[entry.name] = entry.column
        for info in network.vnodes.values():
            graph._record(info.node.id, CATALOGUE[info.node.type], info.settings)
        return graph

    def definition(self) -> Definition:
        """The canonical definition. Raises :class:`~dcnr.errors.InvalidNetwork` with every problem."""
        return analyse(self._raw()).definition

    def summary(self) -> Summary:
        """Shapes, parameters and FLOPs per node; its ``str`` is a table."""
        return Summary(network=analyse(self._raw()))

    def input(self, name: str, shape: Sequence[int], dtype: str, column: str | None = None) -> Symbol:
        """A tensor of each row of the dataset: column ``column``, else ``name``. ``shape`` leaves out the batch axis."""
        where = f"input {name!r}"
        if not isinstance(name, str) or not name:
            raise _problem(f"{where}: expected a name")
        if name in self._declared:
            raise _problem(f"{where}: found it a second time, expected a name of its own")
        if dtype not in INPUT_DTYPES:
            raise _problem(f"{where}: found dtype {dtype!r}, expected {nearest(str(dtype), INPUT_DTYPES)}")
        if isinstance(shape, str) or not all(type(size) is int and 1 <= size <= DIMENSION_MOST for size in shape):
            raise _problem(f"{where}: found shape {shape!r}, expected sizes of 1 to {DIMENSION_MOST} without the rows")
        spec = TensorSpec(shape=tuple(shape), dtype=dtype)
        self._declared[name] = spec
        self._columns[name] = name if column is None else column
        return Symbol(graph=self, spec=spec, node=None, name=name)

    @contextmanager
    def colocate(self, group: str) -> Iterator[None]:
        """Nodes made inside are computed as one kernel group (each connected piece), and stay on one PNode."""
        before, self._group = self._group, group
        try:
            yield
        finally:
            self._group = before

    def __getattr__(self, name: str) -> NodeMethod:
        kind = find_type(name)
        if isinstance(kind, str):
            raise AttributeError(f"Graph has no method {name!r}: {kind}")

        def add_node(*inputs: Symbol, id: str | None = None, **config: ConfigValue) -> Symbol:
            return self._add(kind, inputs, id, config)[0]

        return add_node

    def broadcast(
        self, x: Symbol, num_outputs: int = 2, id: str | None = None, **config: ConfigValue
    ) -> tuple[Symbol, ...]:
        """Explicit fan-out. Any tensor may also be used several times without it."""
        return self._add(CATALOGUE["broadcast"], (x,), id, {"num_outputs": num_outputs, **config})

    def cost(
        self, kind: str, x: Symbol, *, target: str, weight: float = 1.0, id: str | None = None, **config: ConfigValue
    ) -> None:
        """Cost of ``x`` against the dataset's column ``target``; total loss = sum of weight * cost.

        ``kind`` is a cost function (``mse``, ``ce``, ``ce_logits``) or a type of its own (``tied_lm_head_ce``).
        """
        found = CATALOGUE.get(kind)
        if found is None or not found.is_cost:
            found, config = CATALOGUE["cost"], {"cost_function": kind, **config}
        (made,) = self._add(found, (x,), id, config)
        assert made.node is not None
        self._costs.append(CostSpec(name=made.node, node_id=made.node, target=target, weight=weight, at=_caller()))

    def output(self, name: str, x: Symbol) -> None:
        """A tensor that ``forward`` returns under ``name``."""
        self._own(x, f"output {name!r}")
        if x.node is None:
            raise _problem(f"output {name!r}: found input {x.name!r}, expected the output of a node")
        self._outputs.append(OutputSpec(name=name, node_id=x.node, slot_id=x.slot, at=_caller()))

    # --- inside ---

    def _raw(self) -> Definition:
        return Definition(
            name=self.name,
            precision=self.precision,
            param_precision=self.param_precision,
            inputs=tuple(self._inputs),
            nodes=tuple(self._nodes),
            edges=tuple(self._edges),
            outputs=tuple(self._outputs),
            costs=tuple(self._costs),
            metrics=self._metrics,
        )

    def _own(self, symbol: Symbol, where: str) -> None:
        if not isinstance(symbol, Symbol) or symbol.graph is not self:
            raise _problem(f"{where}: found {symbol!r}, expected a tensor of this graph")

    def _name(self, kind: NodeType) -> str:
        base = kind.name if self._group is None else f"{self._group}_{kind.name}"
        while True:
            # Counted per base, so that a graph of many equal nodes does not search from 1 each time.
            number = self._numbers[base] = self._numbers.get(base, 0) + 1
            name = base if number == 1 else f"{base}_{number}"
            if name not in self._ids:
                return name

    def _add(
        self, kind: NodeType, inputs: tuple[Symbol, ...], id: str | None, config: dict[str, ConfigValue]
    ) -> tuple[Symbol, ...]:
        vnode = VNodeId(self._name(kind) if id is None else id)
        where = f"node {vnode!r}"
        if not isinstance(vnode, str):
            raise _problem(f"{where}: expected a string as its id")
        if vnode in self._ids:
            raise _problem(f"{where}: found a second node of this id, expected one")
        for symbol in inputs:
            self._own(symbol, where)
        wanted = kind.inputs
        if (wanted is None and len(inputs) < 2) or (wanted is not None and len(inputs) != wanted):
            expected = "two or more" if wanted is None else str(wanted)
            raise _problem(f"{where}: found {len(inputs)} inputs, expected {expected}")
        specs = tuple(symbol.spec for symbol in inputs)
        given = {_SHORT.get(key, key): value for key, value in config.items()}
        if self._group is not None:
            given = {"colocate_group": self._group, "colocate_policy": "required", **given}
        tied = given.get("tie_weight_alias")
        shape = self._shared.get(tied) if isinstance(tied, str) else None
        if tied is not None and shape is None:
            known = ", ".join(repr(alias) for alias in self._shared) or "an alias given before"
            raise _problem(f"{where}: found tie {tied!r}, expected {known}")
        config = {**kind.infer(given, specs, shape), **given}
        normalised = normalise_config(kind, config, self.precision, self.param_precision)
        if normalised.problems:
            raise _problem(*(f"{where}: {text}" for _, text in normalised.problems))
        try:
            outputs = kind.shape(normalised.settings, taken(normalised.settings, specs))
        except Mismatch as mismatch:
            raise _problem(f"{where}: {mismatch}") from None
        self._record(vnode, kind, normalised.settings)
        at = _caller()
        self._nodes.append(Node(id=vnode, type=kind.name, config=normalised.config, at=at))
        for slot, symbol in enumerate(inputs):
            self._connect(symbol, vnode, slot, at)
        return tuple(Symbol(graph=self, spec=spec, node=vnode, slot=slot) for slot, spec in enumerate(outputs))

    def _record(self, vnode: VNodeId, kind: NodeType, settings: Settings) -> None:
        self._ids.add(vnode)
        alias = settings["shared_weight_alias"]
        if isinstance(alias, str) and kind.tensor:
            self._shared[alias] = next(p.shape for p in kind.parameters(settings) if p.name == kind.tensor)

    def _connect(self, symbol: Symbol, vnode: VNodeId, slot: int, at: Position) -> None:
        if symbol.node is not None:
            self._edges.append(Edge(source=symbol.node, source_slot=symbol.slot, target=vnode, target_slot=slot, at=at))
            return
        self._inputs.append(
            InputSpec(
                name=symbol.name,
                node_id=vnode,
                slot_id=slot,
                column=self._columns[symbol.name],
                dtype=symbol.spec.dtype,
                shape=symbol.spec.shape,
                at=at,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Summary:
    """What :meth:`Graph.summary` returns: the analysed network, shown as a table."""

    network: Network

    @property
    def parameters(self) -> int:
        """Elements of all parameters; a tied weight counts once."""
        return sum(p.elements for info in self.network.vnodes.values() for p in info.parameters)

    @property
    def trained(self) -> int:
        """Those of :attr:`parameters` that an optimizer updates: not of frozen nodes, nor of what reaches no cost."""
        folded = self.network.folding
        infos = (info for info in self.network.vnodes.values() if info.node.id in folded)
        return sum(p.elements for info in infos for p in info.parameters)

    def __str__(self) -> str:
        header = ("node", "type", "output shape", "parameters", "MFLOP/row", "group")
        rows: list[tuple[str, ...]] = [header]
        total_flops = 0
        for vnode in self.network.order:
            info = self.network.vnodes[vnode]
            total_flops += info.flops_per_row
            own = sum(p.elements for p in info.parameters)
            shown = f"{own:,}" if info.tied_to is None else f"{own:,} (+ {info.tied_to})"
            outputs = ", ".join(str(list(spec.shape)) for spec in info.outputs)
            rows.append((vnode, info.node.type, outputs, shown, f"{info.flops_per_row / 1e6:.1f}", str(info.group)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        numeric = (3, 4, 5)
        lines = [
            "  ".join(
                cell.rjust(width) if column in numeric else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(len(line) for line in lines)
        definition, infos = self.network.definition, self.network.vnodes.values()
        size = sum(info.parameter_bytes for info in infos)
        groups = len(self.network.groups)
        totals = (
            (definition.name, f"{len(infos)} nodes, {groups} kernel groups, {definition.shown_precision}"),
            ("parameters", f"{self.parameters:,}"),
            ("trained", f"{self.trained:,}"),
            ("size of parameters", f"{size / (1 << 20):.1f} MiB"),
            ("forward of one row", f"{total_flops / 1e6:.1f} MFLOP"),
        )
        width = max(len(name) for name, _ in totals)
        return "\n".join([lines[0], rule, *lines[1:], rule, *(f"{name.ljust(width)}  {text}" for name, text in totals)])

    __repr__ = __str__


def _caller() -> Position:
    """File and line of the first frame outside this package: where the user's call stands."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(
        ("dcnr.network.", "contextlib")
    ):
        frame = frame.f_back
    return Position(file=frame.f_code.co_filename, line=frame.f_lineno)


def _problem(*texts: str) -> InvalidNetwork:
    at = _caller()
    return InvalidNetwork([f"{at}: {text}" for text in texts])
