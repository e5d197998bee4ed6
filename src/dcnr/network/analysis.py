"""A checked and annotated network: shapes, parameters, ties, kernel groups, edges that carry gradients, segments.

Everything is a pure function of the definition (and, for segments, of a placement). What can reach a bit of a
weight (kernel groups, orders of folds) depends on the definition alone. Everything is linear in nodes and edges, up to a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dcnr.config import LIMITS
from dcnr.errors import InvalidNetwork
from dcnr.ids import NetworkId, VNodeId
from dcnr.network import kernel_groups
from dcnr.network.graph import (
    UNSAID,
    CostSpec,
    Definition,
    InputSpec,
    MetricSpec,
    Node,
    OutputSpec,
    Position,
    network_id,
    texts,
)
from dcnr.network.node_type import (
    AXES_MOST,
    DIMENSION_MOST,
    DTYPE_OF,
    ELEMENTS_MOST,
    FLOATING,
    INPUT_DTYPES,
    PRECISIONS,
    Mismatch,
    NodeType,
    Settings,
    from_numpy,
    taken,
)
from dcnr.network.node_type import ParameterSpec as ParameterSpec
from dcnr.network.node_type import TensorSpec as TensorSpec
from dcnr.network.types import NAMED_MOST, OPTIMIZER_KEYS, cost_target, cut, fewer, find_type, nearest, normalise_config

METRICS = ("learning_rate", "grad_norm", "weight_norm", "update_ratio", "activation_rms")
"""Types of metrics. All but the last are of a node's own parameters; the last is of what leaves an output slot."""
MORE = "and more: mend these first"
"""The last of ``network_problems`` problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VNodeInfo:
    """One VNode of the analysed network."""

    node: Node
    position: int
    """Index in the file's ``nodes``: the order of folds over VNodes."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[ParameterSpec, ...]
    """Those it owns; empty for a node that uses another's weight and nothing of its own."""
    tied_to: VNodeId | None
    """Owner of the weight that this node uses, if that is another node."""
    trainable: bool
    """Has parameters of its own that the optimizer updates."""
    group: int
    """Index of its kernel group."""
    in_edges: tuple[int | None, ...]
    """Edge per input slot; ``None`` = a network input."""
    out_edges: tuple[tuple[int, ...], ...]
    """Edges per output slot, in the file's order: the order of the gradient fold."""
    flops_per_row: int
    """Forward."""
    activation_bytes_per_row: int
    """What backward needs kept, outputs included."""
    parameter_bytes: int
    settings: Settings
    """The config with every default filled in (``types.normalise_config``): what the kernels read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelGroup:
    """VNodes that are computed as one unit whatever the placement. Groups are numbered in topological order."""

    index: int
    vnodes: tuple[VNodeId, ...]
    """In topological order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Kernel groups on one host, executed as one unit. Edges are indexes into the definition's edges.

    ``host`` is whatever the placement maps to (a peer id, or (peer, worker)). Fields in the order in which the
    compute port takes and gives tensors.
    """

    index: int
    host: str
    vnodes: tuple[VNodeId, ...]
    """In the network's topological order."""
    in_edges: tuple[int, ...]
    """Edges that enter from other segments, ascending."""
    out_edges: tuple[int, ...]
    """Edges that leave to other segments, ascending."""
    inputs: tuple[int, ...]
    """Positions in the definition's ``inputs`` that this segment takes."""
    costs: tuple[int, ...]
    """Positions in the definition's ``costs`` whose node is here; their targets are inputs too."""
    states: tuple[VNodeId, ...]
    """Owners of every parameter that this segment reads (ties included), in the file's order."""
    grads_out: tuple[int, ...]
    """Those of ``in_edges`` whose gradient this segment sends upstream."""
    grads_in: tuple[int, ...]
    """Those of ``out_edges`` whose gradient this segment waits for."""
    folds: tuple[VNodeId, ...]
    """VNodes here that fold a weight gradient (they have trainable parameters, or use a trainable tied weight,
    and reach a cost)."""
    backward: bool
    """There is something to compute backward (``grads_out`` or ``folds``)."""

    @property
    def by_reference(self) -> bool:
        """Takes rows of the dataset: the owner opens its microbatches."""
        return bool(self.inputs or self.costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The analysed network. Build with :func:`analyse`."""

    id: NetworkId
    definition: Definition
    vnodes: Mapping[VNodeId, VNodeInfo]
    order: tuple[VNodeId, ...]
    """Topological order in which every kernel group is contiguous."""
    groups: tuple[KernelGroup, ...]
    gradient_edges: frozenset[int]
    """Edges whose head reaches a cost, whose tensor is floating and upstream of which is a trainable parameter."""
    folding: Mapping[VNodeId, tuple[VNodeId, ...]] = field(repr=False)
    """Per owner, the VNodes that fold a gradient of its parameters, in the file's order; see :meth:`uses`."""
    folds: frozenset[VNodeId] = field(repr=False)
    """VNodes that fold any weight gradient, their own or a tied one."""
    metrics: Mapping[VNodeId, tuple[MetricSpec, ...]] = field(repr=False)
    """Per VNode that measures, its metrics in the file's order; what is about a tied weight is measured by its owner."""
    rewrites: tuple[str, ...] = ()
    """What :mod:`dcnr.network.rewrite` changed; ``id`` is still that of the network as it was written."""
    heads: Mapping[VNodeId, tuple[VNodeId, ...]] = field(default_factory=dict, repr=False)
    """Per ``attention`` that stands for separate heads, the heads in order: its weights begin as theirs, one below another."""

    @property
    def results(self) -> tuple[OutputSpec, ...]:
        """What a forward pass gives: the declared outputs, else what the costs compare, under the costs' names."""
        if self.definition.outputs:
            return self.definition.outputs
        compared = ((cost, self.vnodes[cost.node_id].in_edges[0]) for cost in self.definition.costs)
        edges = ((cost, self.definition.edges[index]) for cost, index in compared if index is not None)
        return tuple(OutputSpec(name=cost.name, node_id=edge.source, slot_id=edge.source_slot) for cost, edge in edges)

    def uses(self, owner: VNodeId) -> tuple[VNodeId, ...]:
        """VNodes that fold a gradient of ``owner``'s parameters, in the order of ``nodes`` (the owner itself included
        where it reaches a cost): the order in which their sums are folded."""
        return self.folding.get(owner, ())

    def tie_classes(self) -> tuple[tuple[VNodeId, ...], ...]:
        """VNodes that share a weight, the owner first: they must share a host."""
        classes: dict[VNodeId, list[VNodeId]] = {}
        for info in self.vnodes.values():
            if info.tied_to is not None:
                classes.setdefault(info.tied_to, [info.tied_to]).append(info.node.id)
        return tuple(tuple(members) for members in classes.values())

    def placement_units(self) -> tuple[tuple[int, ...], ...]:
        """Indexes of kernel groups that must share a host: pieces of one required colocation group, and ties.

        Units and their members ascend; every group is in exactly one unit.
        """
        pieces = kernel_groups.Pieces(len(self.groups))
        first: dict[str, int] = {}
        for group in self.groups:
            name = _required_group(self.vnodes[group.vnodes[0]].settings)
            if name is not None:
                pieces.join(first.setdefault(name, group.index), group.index)
        for owner, *users in self.tie_classes():
            for user in users:
                pieces.join(self.vnodes[owner].group, self.vnodes[user].group)
        units: dict[int, list[int]] = {}
        for group in self.groups:
            units.setdefault(pieces.find(group.index), []).append(group.index)
        return tuple(tuple(members) for members in units.values())

    def upstream(self, vnodes: Iterable[VNodeId]) -> frozenset[VNodeId]:
        """``vnodes`` and everything that they are computed from, owners of tied weights included."""
        found: set[VNodeId] = set()
        stack = list(vnodes)
        while stack:
            current = stack.pop()
            if current in found:
                continue
            found.add(current)
            info = self.vnodes[current]
            if info.tied_to is not None:
                stack.append(info.tied_to)
            stack += [self.definition.edges[e].source for e in info.in_edges if e is not None]
        return frozenset(found)

    def cost_targets(self) -> tuple[TensorSpec, ...]:
        """What each of the definition's ``costs`` takes from its target column, without the batch axis."""
        infos = (self.vnodes[cost.node_id] for cost in self.definition.costs)
        return tuple(cost_target(info.node.type, info.settings, info.inputs[0]) for info in infos)

    def segments(self, placement: Mapping[VNodeId, str], only: frozenset[VNodeId] | None = None) -> tuple[Segment, ...]:
        """Segments of a placement, in topological order of their (acyclic) quotient graph.

        Host of group g at depth d = max over incoming edges of depth(source) + (1 if the hosts differ): groups with equal
        (host, depth) form one segment, so every edge between two segments goes to a greater depth.
        ``only``: a subset that takes part (serving leaves costs out); edges to VNodes outside do not exist.
        """
        edges = self.definition.edges
        taking_part = [v for v in self.order if only is None or v in only]
        present = frozenset(taking_part)
        depth = [0] * len(self.groups)
        for group in self.groups:
            for vnode in group.vnodes:
                if vnode not in present:
                    continue
                for index in self.vnodes[vnode].in_edges:
                    if index is None or edges[index].source not in present:
                        continue
                    source = edges[index].source
                    further = depth[self.vnodes[source].group] + (placement[source] != placement[vnode])
                    depth[group.index] = max(depth[group.index], further)
        members: dict[tuple[int, str], list[VNodeId]] = {}
        for vnode in taking_part:
            members.setdefault((depth[self.vnodes[vnode].group], placement[vnode]), []).append(vnode)
        # ``members`` is in the order of first VNodes, and sorting by depth alone is stable.
        keys = sorted(members, key=lambda key: key[0])
        where = {vnode: index for index, key in enumerate(keys) for vnode in members[key]}
        entering: list[list[int]] = [[] for _ in keys]
        leaving: list[list[int]] = [[] for _ in keys]
        for index, edge in enumerate(edges):
            if edge.source in present and edge.target in present and where[edge.source] != where[edge.target]:
                leaving[where[edge.source]].append(index)
                entering[where[edge.target]].append(index)
        inputs: list[list[int]] = [[] for _ in keys]
        for index, entry in enumerate(self.definition.inputs):
            if entry.node_id in present:
                inputs[where[entry.node_id]].append(index)
        costs: list[list[int]] = [[] for _ in keys]
        for index, cost in enumerate(self.definition.costs):
            if cost.node_id in present:
                costs[where[cost.node_id]].append(index)
        return tuple(
            self._segment(index, key[1], members[key], entering[index], leaving[index], inputs[index], costs[index])
            for index, key in enumerate(keys)
        )

    def _segment(
        self,
        index: int,
        host: str,
        vnodes: list[VNodeId],
        in_edges: list[int],
        out_edges: list[int],
        inputs: list[int],
        costs: list[int],
    ) -> Segment:
        owners: set[VNodeId] = set()
        for vnode in vnodes:
            info = self.vnodes[vnode]
            if info.parameters:
                owners.add(vnode)
            if info.tied_to is not None:
                owners.add(info.tied_to)
        grads_out = tuple(e for e in in_edges if e in self.gradient_edges)
        folds = tuple(v for v in vnodes if v in self.folds)
        return Segment(
            index=index,
            host=host,
            vnodes=tuple(vnodes),
            in_edges=tuple(in_edges),
            out_edges=tuple(out_edges),
            inputs=tuple(inputs),
            costs=tuple(costs),
            states=tuple(sorted(owners, key=lambda v: self.vnodes[v].position)),
            grads_out=grads_out,
            grads_in=tuple(e for e in out_edges if e in self.gradient_edges),
            folds=folds,
            backward=bool(grads_out or folds),
        )


def analyse(definition: Definition) -> Network:
    """Check and annotate. Raises :class:`~dcnr.errors.InvalidNetwork` with all problems, each naming node id and
    position.

    The result's ``definition`` is the canonical one (types by their first name, config values in their declared types,
    defaults left out, inputs spelled out), and its id is the network's.
    """
    return _Analysis(definition).run()


def _required_group(settings: Settings) -> str | None:
    if settings["colocate_policy"] != "required":
        return None
    name = settings["colocate_group"]
    assert isinstance(name, str)
    return name


class _Analysis:
    """One run over one definition. Steps collect problems; later steps skip what earlier ones found broken."""

    def __init__(self, definition: Definition) -> None:
        self.given = definition
        self.problems: list[str] = []
        self.precision = definition.precision if definition.precision in PRECISIONS else PRECISIONS[0]
        self.param_precision = definition.param_precision if definition.param_precision in PRECISIONS else ""
        self.position: dict[VNodeId, int] = {}
        self.kinds: list[NodeType | None] = []
        self.settings: list[Settings | None] = []
        self.nodes: list[Node] = []
        self.inputs: list[InputSpec] = []
        self.entering: dict[tuple[int, int], TensorSpec] = {}
        """What enters from the dataset, per position and slot, where it is sound."""
        self.weights: list[float] = []
        """Of the costs whose node is there."""
        self.slots: list[dict[int, int | None]] = [{} for _ in definition.nodes]
        """Per node: input slot -> edge, or ``None`` for a network input."""
        self.out_edges: list[dict[int, list[int]]] = [{} for _ in definition.nodes]
        self.pairs: list[tuple[int, int]] = []
        """Edges between nodes that exist, as positions."""
        self.input_specs: list[tuple[TensorSpec, ...] | None] = [None] * len(definition.nodes)
        self.output_specs: list[tuple[TensorSpec, ...] | None] = [None] * len(definition.nodes)
        self.owner_of: list[int | None] = [None] * len(definition.nodes)
        self.searches = 0
        """How often a nearest name was searched."""

    def run(self) -> Network:
        self._check_texts()
        self._check_header()
        self._check_nodes()
        self._check_edges()
        self._check_inputs()
        self._check_slots()
        self._check_ties()
        self._check_keys()
        order = kernel_groups.topological_order(len(self.nodes), self.pairs)
        cyclic = len(order) < len(self.nodes)
        if cyclic:
            cycle = kernel_groups.find_cycle(len(self.nodes), self.pairs, order)
            self._problem(self.nodes[cycle[0]], f"found a cycle: {self._names(cycle)}, expected none")
        else:
            self._infer_shapes(order)
        self._check_ends()
        grouped = None if cyclic or self._unsettled() else self._group()
        if self.problems:
            raise InvalidNetwork(self.problems)
        assert grouped is not None
        return self._annotate(*grouped)

    def _problem(self, subject: Node | None, text: str, at: Position | None = None) -> None:
        if subject is not None:
            text = f"node {subject.id!r}: {text}"
            at = subject.at if at is None else at
        self.problems.append(cut(text if at is None else f"{at}: {text}"))
        if len(self.problems) >= LIMITS.network_problems:
            raise InvalidNetwork([*self.problems, MORE])

    def _names(self, cycle: Sequence[int]) -> str:
        """Its nodes in the direction of the edges, each with its line; the middle of a long cycle is left out."""
        nodes = [self.given.nodes[position] for position in cycle]
        names = [repr(node.id) + ("" if node.at is None else f" (line {node.at.line})") for node in nodes]
        names.append(repr(nodes[0].id))
        return " -> ".join(fewer(names))

    def _nearest(self, name: str, known: Sequence[str] | None = None, what: str = "the id of a node") -> str:
        """What may have been meant by a name that is not among ``known`` (the nodes' ids)."""
        self.searches += 1
        if self.searches > NAMED_MOST:
            return what
        return nearest(name, list(self.position) if known is None else known, what)

    def _unsettled(self) -> bool:
        return any(settings is None for settings in self.settings)

    # --- what is there ---

    def _check_texts(self) -> None:
        """Every text is one, is short enough that messages may repeat it, and can be shown.

        A network file's texts are, but definitions come over the wire and from Python too.
        """
        for what, text, at in texts(self.given):
            if not isinstance(text, str):
                self._problem(None, f"{what}: found {type(text).__name__}, expected a text", at)
                raise InvalidNetwork(self.problems)
            if len(text) > LIMITS.network_text:
                found = f"found {text[:60]!r}.. of {len(text)} characters"
                self._problem(None, f"{what}: {found}, expected at most {LIMITS.network_text}", at)
                # Every further problem might repeat it.
                raise InvalidNetwork(self.problems)
            if not text.isprintable():
                self._problem(None, f"{what}: found {text!r}, expected printable characters", at)

    def _check_header(self) -> None:
        given = self.given
        if not given.name.strip():
            self._problem(None, "name: found nothing, expected a name")
        for key, found in (("precision", given.precision), ("param_precision", given.param_precision)):
            if found not in PRECISIONS and not (key == "param_precision" and not found):
                self._problem(None, f"{key}: found {found!r}, expected one of {', '.join(PRECISIONS)}")
        if not given.nodes:
            self._problem(None, "nodes: found none, expected at least one")
        if len(given.nodes) > LIMITS.network_nodes:
            raise InvalidNetwork(
                [f"nodes: found {len(given.nodes)}, expected at most {LIMITS.network_nodes}"],
            )

    def _check_nodes(self) -> None:
        slots = 0
        for position, node in enumerate(self.given.nodes):
            first = self.position.setdefault(node.id, position)
            if first != position:
                at = self.given.nodes[first].at
                where = "before it" if at is None else f"at {at}"
                self._problem(node, f"found a second node of this id, expected one (the first is {where})")
            if not node.id:
                self._problem(node, "found an empty id, expected one")
            kind = find_type(node.type)
            if isinstance(kind, str):
                self._problem(node, kind, node.places.get("type"))
                self.kinds.append(None)
                self.settings.append(None)
                self.nodes.append(node)
                continue
            normalised = normalise_config(kind, node.config, self.precision, self.param_precision)
            for key, text in normalised.problems:
                self._problem(node, text, node.places.get(key))
            self.kinds.append(kind)
            self.settings.append(None if normalised.problems else normalised.settings)
            self.nodes.append(replace(node, type=kind.name, config=normalised.config))
            if not normalised.problems:
                slots += kind.outputs(normalised.settings)
        if slots > LIMITS.network_slots:
            raise InvalidNetwork(
                [*self.problems, f"nodes: found {slots} output slots in all, expected at most {LIMITS.network_slots}"]
            )

    def _check_edges(self) -> None:
        for index, edge in enumerate(self.given.edges):
            text = f"edge {edge.source!r} -> {edge.target!r}"
            missing = [end for end in (edge.source, edge.target) if end not in self.position]
            for end in missing:
                self._problem(
                    None, f"node {end!r}: found no such node at {text}, expected {self._nearest(end)}", edge.at
                )
            if missing:
                continue
            source, target = self.position[edge.source], self.position[edge.target]
            self.pairs.append((source, target))
            if edge.source_slot < 0 or (
                (count := self._output_count(source)) is not None and edge.source_slot >= count
            ):
                found = f"found output slot {edge.source_slot} at {text}"
                self._problem(self.nodes[source], f"{found}, expected {self._slots_expected(count)}", edge.at)
            else:
                self.out_edges[source].setdefault(edge.source_slot, []).append(index)
            kind = self.kinds[source]
            if kind is not None and kind.is_cost:
                self._problem(self.nodes[source], f"found {text}, expected no edge from a cost", edge.at)
            self._feed(target, edge.target_slot, index, text, edge.at)

    def _output_count(self, position: int) -> int | None:
        kind, settings = self.kinds[position], self.settings[position]
        return None if kind is None or settings is None else kind.outputs(settings)

    @staticmethod
    def _slots_expected(count: int | None) -> str:
        return "slot 0" if count in (None, 1) else f"slots 0 to {(count or 1) - 1}"

    def _feed(self, position: int, slot: int, edge: int | None, text: str, at: Position | None) -> None:
        kind, node = self.kinds[position], self.nodes[position]
        if slot < 0 or (kind is not None and kind.inputs is not None and slot >= kind.inputs):
            count = None if kind is None else kind.inputs
            self._problem(node, f"found input slot {slot} at {text}, expected {self._slots_expected(count)}", at)
        elif slot in self.slots[position]:
            self._problem(node, f"found input slot {slot} fed a second time by {text}, expected one feed per slot", at)
        else:
            self.slots[position][slot] = edge

    def _check_inputs(self) -> None:
        given: Sequence[InputSpec] = self.given.inputs
        if not given:
            targets = {edge.target for edge in self.given.edges}
            given = [
                InputSpec(name=node.id, node_id=node.id, column=node.id, dtype="", shape=UNSAID, at=node.at)
                for node in self.given.nodes
                if node.id not in targets
            ]
        first: dict[str, InputSpec] = {}
        for entry in given:
            text = f"input {entry.name!r}"
            position = self.position.get(entry.node_id)
            if not entry.name:
                self._problem(None, f"node {entry.node_id!r}: found an input without a name, expected one", entry.at)
            if position is None:
                self._problem(
                    None,
                    f"node {entry.node_id!r}: found no such node at {text}, expected {self._nearest(entry.node_id)}",
                    entry.at,
                )
                continue
            whole = self._completed(entry, position)
            self._feed(position, whole.slot_id, None, text, whole.at)
            self.inputs.append(whole)
            twin = first.setdefault(whole.name, whole)
            if (twin.column, twin.dtype, twin.shape) != (whole.column, whole.dtype, whole.shape):
                self._problem(
                    self.nodes[position],
                    f"found {text} a second time with another column, dtype or shape, expected the same or another name",
                    whole.at,
                )

    def _completed(self, entry: InputSpec, position: int) -> InputSpec:
        """``entry`` with column, dtype and shape filled in from the node where they are left out."""
        kind, settings, node = self.kinds[position], self.settings[position], self.nodes[position]
        default = None if kind is None or settings is None else kind.default_input(settings)
        dtype, shape = entry.dtype, entry.shape
        if default is not None:
            dtype, shape = dtype or default.dtype, default.shape if shape is UNSAID else shape
        elif shape is UNSAID:
            if kind is not None and settings is not None:
                found = f"found input {entry.name!r} without a shape"
                self._problem(node, f"{found}, expected an entry in inputs with shape and dtype", entry.at)
            return replace(entry, column=entry.column or entry.name)
        dtype = dtype or from_numpy(DTYPE_OF[self.precision])
        text, expected = f"found input {entry.name!r} of shape {list(shape)}", ""
        if dtype not in INPUT_DTYPES:
            text, expected = f"found input {entry.name!r} of dtype {dtype!r}", f"one of {', '.join(INPUT_DTYPES)}"
        elif any(not 1 <= size <= DIMENSION_MOST for size in shape):
            expected = f"sizes of 1 to {DIMENSION_MOST}"
        elif len(shape) > AXES_MOST or math.prod(shape) > ELEMENTS_MOST:
            expected = f"at most {AXES_MOST} axes and {ELEMENTS_MOST} elements"
        if expected:
            self._problem(node, f"{text}, expected {expected}", entry.at)
        else:
            self.entering[position, entry.slot_id] = TensorSpec(shape=shape, dtype=dtype)
        return replace(entry, column=entry.column or entry.name, dtype=dtype, shape=shape)

    def _check_slots(self) -> None:
        for node, kind, slots in zip(self.nodes, self.kinds, self.slots, strict=True):
            if kind is None:
                continue
            if kind.inputs is not None:
                missing = [slot for slot in range(kind.inputs) if slot not in slots]
            elif len(slots) < 2:
                self._problem(node, f"found {len(slots)} inputs, expected two or more")
                continue
            else:
                missing = [slot for slot in range(len(slots)) if slot not in slots]
            for slot in missing:
                self._problem(node, f"found nothing at input slot {slot}, expected an edge or an input")

    def _check_ties(self) -> None:
        owners: dict[str, int] = {}
        for position, (kind, settings) in enumerate(zip(self.kinds, self.settings, strict=True)):
            if kind is None or settings is None:
                continue
            node = self.nodes[position]
            shared, tied = settings["shared_weight_alias"], settings["tie_weight_alias"]
            for key, alias in (("shared_weight_alias", shared), ("tie_weight_alias", tied)):
                if alias is not None and not kind.tensor:
                    self._problem(
                        node, f"found {key} at type {kind.name!r}, expected it at a type whose weight can be shared"
                    )
            if shared is not None and tied is not None:
                self._problem(node, "found shared_weight_alias and tie_weight_alias, expected one of them")
            elif shared is not None:
                assert isinstance(shared, str)
                first = owners.setdefault(shared, position)
                if first != position:
                    other = self.nodes[first].id
                    self._problem(
                        node, f"found shared_weight_alias {shared!r} a second time, expected only node {other!r}"
                    )
        for position, (kind, settings) in enumerate(zip(self.kinds, self.settings, strict=True)):
            if kind is None or settings is None or settings["tie_weight_alias"] is None or not kind.tensor:
                continue
            node = self.nodes[position]
            for key in OPTIMIZER_KEYS:
                if key in self.given.nodes[position].config:
                    found = f"config key {key!r}: found it at a tied node"
                    self._problem(node, f"{found}, expected it at the weight's owner", node.places.get(key))
            owner = owners.get(str(settings["tie_weight_alias"]))
            if owner is None:
                alias = str(settings["tie_weight_alias"])
                few = len(owners) <= NAMED_MOST and ", ".join(repr(a) for a in sorted(owners))
                expected = few or self._nearest(alias, sorted(owners), "the alias of a node with shared_weight_alias")
                at = node.places.get("tie_weight_alias")
                self._problem(node, f"found tie_weight_alias {alias!r}, expected {expected}", at)
                continue
            self.owner_of[position] = owner
            mine, theirs = self._tensor_shape(position), self._tensor_shape(owner)
            if mine != theirs:
                self._problem(
                    node,
                    f"found a tied weight of shape {mine}, expected {theirs} as at its owner {self.nodes[owner].id!r}",
                )

    def _check_keys(self) -> None:
        """A state dict's keys, ``<node id>.<name>``, are one parameter's each: ids may have points in them."""
        first: dict[str, Node] = {}
        for position, node in enumerate(self.nodes):
            if self.kinds[position] is None or self.settings[position] is None:
                continue
            for parameter in self._owned(position):
                key = f"{node.id}.{parameter.name}"
                other = first.setdefault(key, node)
                if other.id != node.id:
                    self._problem(node, f"found parameter {key!r} of node {other.id!r} too, expected another id")

    def _tensor_shape(self, position: int) -> list[int]:
        kind, settings = self.kinds[position], self.settings[position]
        assert kind is not None
        assert settings is not None
        return next(list(p.shape) for p in kind.parameters(settings) if p.name == kind.tensor)

    # --- shapes ---

    def _infer_shapes(self, order: Sequence[int]) -> None:
        for position in order:
            kind, settings, node = self.kinds[position], self.settings[position], self.nodes[position]
            if kind is None or settings is None:
                continue
            found: list[TensorSpec] = []
            for slot in range(len(self.slots[position])):
                edge = self.slots[position].get(slot, -1)
                spec = self.entering.get((position, slot)) if edge is None else self._arriving(edge)
                if spec is not None:
                    found.append(spec)
            if len(found) < (2 if kind.inputs is None else kind.inputs) or len(found) < len(self.slots[position]):
                # Something before this node is broken and reported there.
                continue
            inputs = tuple(found)
            self.input_specs[position] = inputs
            self._compare(node, "input_shapes", node.input_shapes, inputs)
            try:
                outputs = kind.shape(settings, taken(settings, inputs))
            except Mismatch as mismatch:
                self._problem(node, str(mismatch))
                continue
            if self._too_large(node, kind, settings, outputs):
                continue
            self.output_specs[position] = outputs
            self._compare(node, "output_shapes", node.output_shapes, outputs)

    def _too_large(self, node: Node, kind: NodeType, settings: Settings, outputs: tuple[TensorSpec, ...]) -> bool:
        """Sizes are multiplied, never allocated, so a hostile file costs nothing; it is refused all the same."""
        expected = f"expected at most {ELEMENTS_MOST} elements and {AXES_MOST} axes of at most {DIMENSION_MOST}"
        before = len(self.problems)
        # Outputs of one type are alike; only one of 65,536 equal ones is looked at.
        for spec in dict.fromkeys(outputs):
            if (
                spec.elements > ELEMENTS_MOST
                or len(spec.shape) > AXES_MOST
                or max(spec.shape, default=0) > DIMENSION_MOST
            ):
                self._problem(node, f"found output {spec}, {expected}")
        for parameter in kind.parameters(settings):
            if parameter.elements > ELEMENTS_MOST:
                self._problem(node, f"found parameter {parameter.name!r} of shape {list(parameter.shape)}, {expected}")
        return len(self.problems) > before

    def _arriving(self, index: int) -> TensorSpec | None:
        if index < 0:
            return None
        edge = self.given.edges[index]
        specs = self.output_specs[self.position[edge.source]]
        return specs[edge.source_slot] if specs is not None and 0 <= edge.source_slot < len(specs) else None

    def _compare(
        self, node: Node, key: str, given: tuple[tuple[int, ...], ...] | None, specs: tuple[TensorSpec, ...]
    ) -> None:
        actual = tuple(spec.shape for spec in specs)
        if given is not None and given != actual:
            found, expected = [list(s) for s in given], [list(s) for s in actual]
            self._problem(node, f"{key}: found {found}, expected {expected}", node.places.get(key))

    # --- outputs, costs, metrics ---

    def _check_ends(self) -> None:
        for key, entries in (
            ("output", self.given.outputs),
            ("cost", self.given.costs),
            ("metric", self.given.metrics),
        ):
            names: set[str] = set()
            for entry in entries:
                if not entry.name or entry.name in names:
                    found = "a second time" if entry.name else "without a name"
                    self._problem(
                        None,
                        f"node {entry.node_id!r}: found {key} {entry.name!r} {found}, expected a name of its own",
                        entry.at,
                    )
                names.add(entry.name)
                self._check_end(key, entry)
        self._check_costs()

    def _check_end(self, key: str, entry: OutputSpec | CostSpec | MetricSpec) -> None:
        text = f"{key} {entry.name!r}"
        position = self.position.get(entry.node_id)
        if position is None:
            self._problem(
                None,
                f"node {entry.node_id!r}: found no such node at {text}, expected {self._nearest(entry.node_id)}",
                entry.at,
            )
            return
        node, kind = self.nodes[position], self.kinds[position]
        count = self._output_count(position)
        if entry.slot_id < 0 or (count is not None and entry.slot_id >= count):
            found = f"found output slot {entry.slot_id} at {text}"
            self._problem(node, f"{found}, expected {self._slots_expected(count)}", entry.at)
        if kind is not None and isinstance(entry, CostSpec) != kind.is_cost and not isinstance(entry, MetricSpec):
            if isinstance(entry, CostSpec):
                self._problem(node, f"found type {kind.name!r} at {text}, expected a node of type 'cost'", entry.at)
            else:
                self._problem(
                    node, f"found a cost at {text}, expected another node: losses are reported anyway", entry.at
                )
        if isinstance(entry, MetricSpec):
            self._check_metric(entry, position)

    def _check_metric(self, entry: MetricSpec, position: int) -> None:
        node, kind, settings = self.nodes[position], self.kinds[position], self.settings[position]
        text, outputs = f"metric {entry.name!r}", self.output_specs[position]
        if entry.type not in METRICS:
            self._problem(node, f"found type {entry.type!r} at {text}, expected {', '.join(METRICS)}", entry.at)
        elif kind is None or settings is None:
            pass  # The node itself is at fault, and said so.
        elif entry.type != "activation_rms":
            expected = "expected a node with trainable parameters, its own or tied ones"
            owner = self._measured(position)
            if not self._owned(owner):
                self._problem(node, f"found {entry.type} at {text} of a node without any, {expected}", entry.at)
            elif (held := self.settings[owner]) is not None and held["trainable"] is False:
                self._problem(node, f"found {entry.type} at {text} of a node that is frozen, {expected}", entry.at)
        elif kind.is_cost:
            found = f"found activation_rms at {text} of a cost"
            self._problem(node, f"{found}, expected another node: losses are reported anyway", entry.at)
        elif outputs is not None and 0 <= entry.slot_id < len(outputs) and outputs[entry.slot_id].dtype not in FLOATING:
            found = f"found activation_rms at {text} of an output of {outputs[entry.slot_id].dtype}"
            self._problem(node, f"{found}, expected one of floating point", entry.at)

    def _measured(self, position: int) -> int:
        """Whose parameters a metric of this node is about: a node that only uses another's weight stands for that one."""
        owner = self.owner_of[position]
        return position if owner is None or self._owned(position) else owner

    def _check_costs(self) -> None:
        listed: set[VNodeId] = set()
        for cost in self.given.costs:
            position = self.position.get(cost.node_id)
            if position is None:
                continue
            node = self.nodes[position]
            if cost.node_id in listed:
                self._problem(node, f"found cost {cost.name!r} at a node that has one already, expected one", cost.at)
            listed.add(cost.node_id)
            if not cost.target:
                self._problem(node, f"found cost {cost.name!r} without target, expected a column's name", cost.at)
            self.weights.append(self._weight(cost, node))
        for node, kind in zip(self.nodes, self.kinds, strict=True):
            if kind is not None and kind.is_cost and node.id not in listed:
                self._problem(node, "found no entry in costs, expected one that names its target")

    def _weight(self, cost: CostSpec, node: Node) -> float:
        """Of that type: 1 would give another id than 1.0."""
        try:
            if (
                isinstance(cost.weight, int | float)
                and not isinstance(cost.weight, bool)
                and math.isfinite(cost.weight)
            ):
                return float(cost.weight)
            found = repr(cost.weight)
        except OverflowError:
            found = f"an integer of {int(cost.weight).bit_length()} bits"
        self._problem(node, f"found weight {found} at cost {cost.name!r}, expected a finite number", cost.at)
        return 0.0

    # --- kernel groups ---

    def _group(self) -> tuple[list[int], list[list[int]]] | None:
        """Group of each node, and the members of each group in topological order; groups in topological order."""
        required = [None if s is None else _required_group(s) for s in self.settings]
        piece = kernel_groups.kernel_pieces(required, self.pairs)
        count = len(self.nodes)
        between = [(piece[a], piece[b]) for a, b in self.pairs if piece[a] != piece[b]]
        # Positions that stand for no piece are isolated in this graph and are skipped below.
        order = kernel_groups.topological_order(count, between)
        if len(order) < count:
            cycle = kernel_groups.find_cycle(count, between, order)
            names = " -> ".join(fewer([self._piece_name(p, required) for p in [*cycle, cycle[0]]]))
            leaving = {(piece[a], piece[b]): a for a, b in reversed(self.pairs)}
            for current, following in list(pairwise([*cycle, cycle[0]]))[:NAMED_MOST]:
                if required[current] is not None:
                    self._problem(
                        self.nodes[leaving[current, following]],
                        f"found required colocation group {required[current]!r} in a cycle: {names}, "
                        "expected groups that can be computed one after the other",
                    )
            return None
        number = {piece_of: index for index, piece_of in enumerate(p for p in order if piece[p] == p)}
        group = [number[p] for p in piece]
        members: list[list[int]] = [[] for _ in number]
        for position in kernel_groups.topological_order(count, self.pairs):
            members[group[position]].append(position)
        return group, members

    def _piece_name(self, position: int, required: Sequence[str | None]) -> str:
        name = required[position]
        return f"node {self.nodes[position].id!r}" if name is None else f"group {name!r}"

    # --- the result ---

    def _annotate(self, group: list[int], members: list[list[int]]) -> Network:
        order = [position for vnodes in members for position in vnodes]
        parameters = [self._owned(position) for position in range(len(self.nodes))]
        reaches = self._reaches_cost(order)
        wanted = [bool(parameters[p]) and self._settled(p)["trainable"] is not False for p in range(len(self.nodes))]
        folding: dict[VNodeId, list[VNodeId]] = {}
        for position, node in enumerate(self.nodes):
            if reaches[position]:
                if wanted[position]:
                    folding.setdefault(node.id, []).append(node.id)
                owner = self.owner_of[position]
                if owner is not None and wanted[owner]:
                    folding.setdefault(self.nodes[owner].id, []).append(node.id)
        folds = frozenset(vnode for uses in folding.values() for vnode in uses)
        definition = replace(
            self.given,
            param_precision="" if self.param_precision == self.precision else self.param_precision,
            nodes=tuple(self.nodes),
            inputs=tuple(self.inputs),
            costs=tuple(replace(cost, weight=w) for cost, w in zip(self.given.costs, self.weights, strict=True)),
        )
        metrics: dict[VNodeId, list[MetricSpec]] = {}
        for metric in definition.metrics:
            vnode = metric.node_id
            if metric.type != "activation_rms":
                vnode = self.nodes[self._measured(self.position[vnode])].id
            metrics.setdefault(vnode, []).append(metric)
        vnodes: dict[VNodeId, VNodeInfo] = {}
        for position, node in enumerate(self.nodes):
            kind, settings = self.kinds[position], self.settings[position]
            inputs, outputs = self.input_specs[position], self.output_specs[position]
            assert kind is not None
            assert settings is not None
            assert inputs is not None
            assert outputs is not None
            owner = self.owner_of[position]
            slots = self.slots[position]
            read = taken(settings, inputs)
            kept = kind.kept(settings, read, outputs) + sum(
                r.bytes for r, i in zip(read, inputs, strict=True) if r != i
            )
            vnodes[node.id] = VNodeInfo(
                node=node,
                position=position,
                inputs=inputs,
                outputs=outputs,
                parameters=parameters[position],
                tied_to=None if owner is None else self.nodes[owner].id,
                trainable=node.id in folding,
                group=group[position],
                in_edges=tuple(slots[slot] for slot in range(len(slots))),
                out_edges=tuple(tuple(self.out_edges[position].get(slot, ())) for slot in range(len(outputs))),
                flops_per_row=kind.flops(settings, read, outputs),
                activation_bytes_per_row=sum(o.bytes for o in outputs) + kept,
                parameter_bytes=sum(p.bytes for p in parameters[position]),
                settings=settings,
            )
        return Network(
            id=network_id(definition),
            definition=definition,
            vnodes=vnodes,
            order=tuple(self.nodes[position].id for position in order),
            groups=tuple(
                KernelGroup(index=index, vnodes=tuple(self.nodes[position].id for position in positions))
                for index, positions in enumerate(members)
            ),
            gradient_edges=self._gradient_edges(order, reaches, folds),
            folding={owner: tuple(uses) for owner, uses in folding.items()},
            folds=folds,
            metrics={vnode: tuple(entries) for vnode, entries in metrics.items()},
        )

    def _settled(self, position: int) -> Settings:
        settings = self.settings[position]
        assert settings is not None
        return settings

    def _owned(self, position: int) -> tuple[ParameterSpec, ...]:
        kind = self.kinds[position]
        assert kind is not None
        all_of_them = kind.parameters(self._settled(position))
        if self.owner_of[position] is None:
            return all_of_them
        return tuple(p for p in all_of_them if p.name != kind.tensor)

    def _reaches_cost(self, order: Sequence[int]) -> list[bool]:
        reaches = [False] * len(self.nodes)
        for cost in self.given.costs:
            reaches[self.position[cost.node_id]] = True
        for position in reversed(order):
            for edges in self.out_edges[position].values():
                if any(reaches[self.position[self.given.edges[e].target]] for e in edges):
                    reaches[position] = True
        return reaches

    def _gradient_edges(
        self, order: Sequence[int], reaches: Sequence[bool], folds: frozenset[VNodeId]
    ) -> frozenset[int]:
        found: set[int] = set()
        trained = [False] * len(self.nodes)
        """A trainable parameter is read here or upstream."""
        for position in order:
            trained[position] = self.nodes[position].id in folds or any(
                trained[self.position[self.given.edges[edge].source]]
                for edge in self.slots[position].values()
                if edge is not None
            )
            outputs = self.output_specs[position]
            assert outputs is not None
            for slot, edges in self.out_edges[position].items():
                if trained[position] and outputs[slot].dtype in FLOATING:
                    found.update(e for e in edges if reaches[self.position[self.given.edges[e].target]])
        return frozenset(found)
