"""What VNodes need on a host: estimates for admission and placement. They decide where, never what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, VNodeInfo
from dcnr.network.node_type import DTYPE_BYTES, compute_dtype
from dcnr.network.types import CATALOGUE, orthogonalised

ELEMENT_FLOPS = 32
"""What reading one element in an elementwise kernel costs, in FLOPs of a matrix product of the same time (measured
on one CPU thread, forward and backward: add 21, layernorm 36, cross entropy and gelu 46)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes, by what holds them."""

    weights: int
    """Parameters, and the copies of those that nodes compute with in another dtype."""
    gradients: int
    """Running sums: D + 1 per use of each trainable parameter."""
    optimizer: int
    snapshot: int
    """One copy of weights and optimizer state, for the checkpoint that is being written."""
    activations: int
    """What W open microbatches keep, tensors that arrive from other hosts included."""
    transient: int
    """What one task needs while it runs: of the neediest node, its tensors once more, what its kernel needs for itself
    and the gradient of its largest weight before that is added to the running sum. Or what one update needs: the weights
    that an ``update_ratio`` compares with, bfloat16 weights in float32."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.snapshot + self.activations + self.transient


def memory(
    network: Network,
    vnodes: Iterable[VNodeId],
    *,
    rows: int,
    window: int,
    training: bool,
    delay: int = 0,
    optimizer: str = "adamw",
    momentum: float = 0.0,
) -> Memory:
    """Need of ``vnodes`` hosted together. ``rows`` per microbatch, ``window`` open microbatches.

    ``optimizer`` and ``momentum`` are the session's; a node's own optimizer beats it. A tied weight counts at its owner.
    """
    hosted = [network.vnodes[vnode] for vnode in vnodes]
    here = {info.node.id for info in hosted}
    weights = gradients = state = kept = largest = updating = 0
    casts: dict[tuple[VNodeId, str, str], int] = {}
    for info in hosted:
        weights += info.parameter_bytes
        casts |= _casts(network, info)
        task = 2 * rows * info.activation_bytes_per_row
        task += CATALOGUE[info.node.type].working(info.settings, info.inputs, rows)
        largest = max(largest, task + (_gradient_at_once(network, info) if training else 0))
        if training:
            kept += info.activation_bytes_per_row
            gradients += _gradient_bytes(network, info, delay)
            state += _optimizer_bytes(info, optimizer, momentum) if info.trainable else 0
            compared = any(metric.type == "update_ratio" for metric in network.metrics.get(info.node.id, ()))
            widened = sum(p.wide_bytes for p in info.parameters if p.wide_dtype != p.dtype)
            updating = max(updating, widened + compared * info.parameter_bytes)
        else:
            # Without a backward only what leaves is kept; the rest is freed as the task runs.
            kept += _leaving_bytes(network, info, here)
        kept += _arriving_bytes(network, info, here)
    return Memory(
        weights=weights + sum(casts.values()),
        gradients=gradients,
        optimizer=state,
        snapshot=weights + state if training else 0,
        activations=window * rows * kept,
        transient=max(largest, updating),
    )


def unit_cost(network: Network, unit: Iterable[int]) -> int:
    """Work of one row in kernel groups ``unit``, in FLOPs of a forward matrix product: what placement balances."""
    infos = (network.vnodes[vnode] for group in unit for vnode in network.groups[group].vnodes)
    return sum(info.flops_per_row + ELEMENT_FLOPS * sum(spec.elements for spec in info.inputs) for info in infos)


def edge_bytes(network: Network, edge: int) -> int:
    """Bytes per row that cross a link for an edge, forward; backward the same again where it bears a gradient."""
    entry = network.definition.edges[edge]
    return network.vnodes[entry.source].outputs[entry.source_slot].bytes


def _gradient_bytes(network: Network, info: VNodeInfo, delay: int) -> int:
    if not info.trainable:
        return 0
    tied = sum(user != info.node.id for user in network.uses(info.node.id))
    # Uses by other nodes are of the shared weight alone.
    shared = sum(p.wide_bytes for p in info.parameters if p.name == CATALOGUE[info.node.type].tensor)
    return (delay + 1) * (sum(p.wide_bytes for p in info.parameters) + tied * shared)


def _casts(network: Network, info: VNodeInfo) -> dict[tuple[VNodeId, str, str], int]:
    """Copies of parameters in the dtype that the node computes in, by owner, name and dtype: nodes alike share one."""
    kind, dtype = CATALOGUE[info.node.type], compute_dtype(info.settings)
    if not kind.casts_weights:
        return {}
    read = [(info.node.id, p) for p in info.parameters]
    if info.tied_to is not None:
        read += [(info.tied_to, p) for p in network.vnodes[info.tied_to].parameters if p.name == kind.tensor]
    return {(owner, p.name, dtype): p.elements * DTYPE_BYTES[dtype] for owner, p in read if p.dtype != dtype}


def _gradient_at_once(network: Network, info: VNodeInfo) -> int:
    """The largest gradient that backward makes at this node, of its own weights and of a tied one."""
    made = [p.wide_bytes for p in info.parameters] if info.trainable else []
    if info.tied_to is not None and info.node.id in network.uses(info.tied_to):
        shared = CATALOGUE[info.node.type].tensor
        made += [p.wide_bytes for p in CATALOGUE[info.node.type].parameters(info.settings) if p.name == shared]
    return max(made, default=0)


def _optimizer_bytes(info: VNodeInfo, session: str, session_momentum: float) -> int:
    own = info.settings["optimizer"]
    kind = session if own is None else own
    if kind == "sgd":
        return sum(p.wide_bytes for p in info.parameters) if session_momentum else 0
    copies = (1 if kind == "muon" and orthogonalised(info.node.type, p) else 2 for p in info.parameters)
    return sum(count * p.wide_bytes for count, p in zip(copies, info.parameters, strict=True))


def _arriving_bytes(network: Network, info: VNodeInfo, here: set[VNodeId]) -> int:
    """Received tensors, and the gradients sent back for them."""
    total = 0
    for spec, edge in zip(info.inputs, info.in_edges, strict=True):
        if edge is None:
            total += spec.bytes
        elif network.definition.edges[edge].source not in here:
            total += spec.bytes * (2 if edge in network.gradient_edges else 1)
    return total


def _leaving_bytes(network: Network, info: VNodeInfo, here: set[VNodeId]) -> int:
    edges = network.definition.edges
    return sum(
        spec.bytes
        for spec, slot in zip(info.outputs, info.out_edges, strict=True)
        if not slot or any(edges[edge].target not in here for edge in slot)
    )
