"""A checked and annotated network: shapes, parameters, ties, kernel groups, edges that carry gradients, segments.

Everything is a pure function of the definition (and, for segments, of a placement). What can reach a bit of a
weight (kernel groups, orders of folds) depends on the definition alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcnr.ids import NetworkId, VNodeId
from dcnr.network.graph import Definition, Node


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape without the batch axis, and dtype (``float32``, ``float64``, ``bfloat16``, ``int64``)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """A parameter that a VNode owns. ``init`` is ``normal``, ``zeros`` or ``ones``; ``std`` belongs to normal."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    init: str
    std: float


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

    def uses(self, owner: VNodeId) -> tuple[VNodeId, ...]:
        """VNodes that fold a gradient of ``owner``'s parameters, in the order of ``nodes`` (the owner itself included
        where it reaches a cost): the order in which their sums are folded."""
        raise NotImplementedError

    def segments(self, placement: Mapping[VNodeId, str], only: frozenset[VNodeId] | None = None) -> tuple[Segment, ...]:
        """Segments of a placement, in topological order of their (acyclic) quotient graph.

        Host of group g at depth d = max over incoming edges of depth(source) + (1 if the hosts differ): groups with equal
        (host, depth) form one segment, so every edge between two segments goes to a greater depth or stays on its host.
        ``only``: a subset that takes part (serving leaves costs out); edges to VNodes outside do not exist.
        """
        raise NotImplementedError


def analyse(definition: Definition) -> Network:
    """Check and annotate. Raises :class:`~dcnr.errors.InvalidNetwork` with all problems, each naming node id and line."""
    raise NotImplementedError
