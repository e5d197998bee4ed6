"""A segment as one fused program: one autograd graph forward, one call of ``torch.autograd.grad`` backward.

Bits are the same however kernel groups are joined into segments: every edge between two groups passes
:func:`~dcnr.adapters.torch.fanout.fan_out`, inside a segment as between two, and each use of a tied weight is a leaf of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcnr.adapters.torch.backend import DTYPES, NAMES, canonical, sum_of_squares
from dcnr.adapters.torch.fanout import fan_out
from dcnr.adapters.torch.library import LIBRARY
from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, Segment, VNodeInfo
from dcnr.network.node_type import Call, Kernel, compute_dtype
from dcnr.network.types import CATALOGUE

Parameters = Mapping[VNodeId, Callable[[str, torch.dtype], Tensor]]
"""Per owner, what gives a parameter by its name in the dtype that a kernel takes."""

Sums = Mapping[VNodeId, dict[VNodeId, dict[str, Tensor]]]
"""Per owner, the running gradient sums of one step: by using VNode, then by parameter name."""

TENSOR_ERRORS = (RuntimeError, IndexError, ValueError, TypeError)
"""What torch raises for tensors that a kernel cannot take."""
KERNEL_ERRORS = (*TENSOR_ERRORS, LookupError, AttributeError, ArithmeticError, AssertionError)
"""And what a slip in a kernel raises: types of installed packages have theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaf:
    """A parameter as one VNode uses it: the unit of the running gradient sums."""

    owner: VNodeId
    use: VNodeId
    name: str
    folds: bool
    dtype: torch.dtype
    """What the kernel takes it in."""
    wide: torch.dtype
    """Of the running sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One VNode of the program, its edges resolved."""

    info: VNodeInfo
    kernel: Kernel
    dtype: torch.dtype
    """What it computes in: floating inputs are cast to it."""
    sources: tuple[tuple[bool, int], ...]
    """Per input slot: (True, edge) or (False, position among the tensors that the segment takes)."""
    leaves: tuple[_Leaf, ...]
    consumers: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]
    """Per output slot: the edges that read it in the file's order, and which of them cross kernel groups."""
    cost: int | None
    """Position among the segment's costs."""
    measured: tuple[tuple[int, str], ...]
    """Output slots whose activations a metric of the network names, each with the metric's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What backward needs: the ends of the autograd graph."""

    roots: tuple[Tensor, ...]
    """One per edge of ``segment.grads_in``, then one loss per cost."""
    seeds: tuple[Tensor, ...]
    """Gradients of the losses: their weights."""
    edges: tuple[Tensor, ...]
    """Leaves of ``segment.grads_out``."""
    leaves: tuple[tuple[_Leaf, Tensor], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """``outputs`` per ``segment.out_edges``; ``losses`` per ``segment.costs``, unweighted.

    ``squares``: per ``activation_rms`` of the segment its name and the sum of squares, in training alone.
    """

    outputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    losses: tuple[float, ...]
    saved: Saved | None
    squares: tuple[tuple[str, float], ...]


class SegmentProgram:
    """The compiled form of a segment. Holds no weights and no state: calls are independent of each other."""

    def __init__(self, network: Network, segment: Segment) -> None:
        self._segment = segment
        self._definition = network.definition
        inside = frozenset(segment.vnodes)
        leaving = frozenset(segment.out_edges)
        entering = {edge: position for position, edge in enumerate(segment.in_edges)}
        first_input = len(segment.in_edges)
        columns = {
            (network.definition.inputs[index].node_id, network.definition.inputs[index].slot_id): first_input + position
            for position, index in enumerate(segment.inputs)
        }
        self._first_target = first_input + len(segment.inputs)
        costs = {network.definition.costs[index].node_id: position for position, index in enumerate(segment.costs)}
        self._weights = tuple(network.definition.costs[index].weight for index in segment.costs)
        self._needs_grad = frozenset(segment.grads_out)
        self._dtypes = tuple(
            network.vnodes[edge.source].outputs[edge.source_slot].dtype
            for edge in (network.definition.edges[index] for index in segment.in_edges)
        )
        folds = frozenset(segment.folds)
        calls = []
        for vnode in segment.vnodes:
            info = network.vnodes[vnode]
            kind, dtype = CATALOGUE[info.node.type], DTYPES[compute_dtype(info.settings)]
            sources = []
            for slot, edge in enumerate(info.in_edges):
                if edge is None:
                    sources.append((False, columns[vnode, slot]))
                elif edge in entering:
                    sources.append((False, entering[edge]))
                else:
                    sources.append((True, edge))
            read = [(info, spec) for spec in info.parameters]
            if info.tied_to is not None:
                owner = network.vnodes[info.tied_to]
                read += [(owner, spec) for spec in owner.parameters if spec.name == kind.tensor]
            leaves = [
                _Leaf(
                    owner=owner.node.id,
                    use=vnode,
                    name=spec.name,
                    folds=vnode in folds and owner.trainable,
                    dtype=dtype if kind.casts_weights else DTYPES[spec.dtype],
                    wide=DTYPES[spec.wide_dtype],
                )
                for owner, spec in read
            ]
            consumers = []
            for edges in info.out_edges:
                live = tuple(e for e in edges if e in leaving or network.definition.edges[e].target in inside)
                targets = (network.vnodes[network.definition.edges[e].target] for e in live)
                consumers.append((live, tuple(target.group != info.group for target in targets)))
            calls.append(
                _Call(
                    info=info,
                    kernel=kind.kernel,
                    dtype=dtype,
                    sources=tuple(sources),
                    leaves=tuple(leaves),
                    consumers=tuple(consumers),
                    cost=costs.get(vnode),
                    measured=tuple(
                        (metric.slot_id, metric.name)
                        for metric in network.metrics.get(vnode, ())
                        if metric.type == "activation_rms"
                    ),
                )
            )
        self._calls = tuple(calls)

    def forward(
        self,
        *,
        parameters: Parameters,
        inputs: Sequence[Tensor],
        valid_targets: Sequence[int],
        seed: int,
        step: int,
        first_row: int,
        training: bool,
        results: Sequence[tuple[VNodeId, int, bool]] = (),
    ) -> Forwarded:
        """Run the segment on one microbatch.

        ``inputs``: tensors [rows, ...] of ``in_edges``, ``inputs`` and the costs' targets, canonical and never written here.
        ``valid_targets`` per cost, of the whole step. ``results``: outputs wanted besides, (node, slot, only the last
        position of axis 1, the axis kept). Raises :class:`ComputeError` naming the VNode.
        """
        segment = self._segment
        grad = training and segment.backward
        for position, dtype in enumerate(self._dtypes):
            if NAMES.get(inputs[position].dtype) != dtype:
                edge = self._definition.edges[segment.in_edges[position]]
                raise ComputeError(
                    f"VNode {edge.target}: input slot {edge.target_slot} takes {dtype}, got {inputs[position].dtype}",
                    edge.target,
                )
        taken = list(inputs)
        edge_leaves: dict[int, Tensor] = {}
        if grad:
            for position, edge_index in enumerate(segment.in_edges):
                if edge_index in self._needs_grad:
                    taken[position] = edge_leaves[edge_index] = taken[position].detach().requires_grad_()
        values: dict[int, Tensor] = {}
        losses: list[Tensor] = [torch.empty(0)] * len(segment.costs)
        leaves: list[tuple[_Leaf, Tensor]] = []
        squares: list[tuple[str, float]] = []
        wanted: dict[tuple[VNodeId, int], Tensor] = {(vnode, slot): torch.empty(0) for vnode, slot, _ in results}
        with torch.set_grad_enabled(grad):
            for call in self._calls:
                vnode = call.info.node.id
                weights: dict[str, Tensor] = {}
                for leaf in call.leaves:
                    tensor = parameters[leaf.owner](leaf.name, leaf.dtype).detach()
                    if grad and leaf.folds:
                        leaves.append((leaf, tensor.requires_grad_()))
                        # Autograd then casts each microbatch's gradient and adds it up in this.
                        tensor.grad_dtype = leaf.wide
                    weights[leaf.name] = tensor
                target, valid = None, 0
                if call.cost is not None:
                    target, valid = taken[self._first_target + call.cost], valid_targets[call.cost]
                context = Call(
                    vnode=vnode,
                    settings=call.info.settings,
                    seed=seed,
                    step=step,
                    first_row=first_row,
                    training=training,
                    target=target,
                    valid=valid,
                )
                try:
                    outputs = call.kernel(
                        LIBRARY,
                        tuple(
                            _cast(values.pop(index) if internal else taken[index], call.dtype)
                            for internal, index in call.sources
                        ),
                        weights,
                        context,
                    )
                except KERNEL_ERRORS as error:
                    # A message of these alone says little: the key that was not found, say.
                    said = error if isinstance(error, TENSOR_ERRORS) else f"{type(error).__name__}: {error}"
                    raise ComputeError(f"VNode {vnode}: {said}", vnode) from error
                if call.cost is not None:
                    losses[call.cost] = outputs[0]
                if training:
                    squares += [(name, sum_of_squares([outputs[slot]])) for slot, name in call.measured]
                for slot, ((edges, crossing), output) in enumerate(zip(call.consumers, outputs, strict=True)):
                    if (vnode, slot) in wanted:
                        wanted[vnode, slot] = output.detach()
                    if edges:
                        values.update(zip(edges, fan_out(output, crossing), strict=True))
        saved = None
        if grad:
            saved = Saved(
                roots=(*(values[edge] for edge in segment.grads_in), *losses),
                seeds=tuple(torch.full_like(loss, w) for loss, w in zip(losses, self._weights, strict=True)),
                edges=tuple(edge_leaves[edge] for edge in segment.grads_out),
                leaves=tuple(leaves),
            )
        return Forwarded(
            outputs=tuple(values[edge].detach() for edge in segment.out_edges),
            results=tuple(
                canonical(wanted[vnode, slot][:, -1:] if last else wanted[vnode, slot]) for vnode, slot, last in results
            ),
            losses=tuple(loss.item() for loss in losses),
            saved=saved,
            squares=tuple(squares),
        )

    def backward(self, saved: Saved, grads: Sequence[Tensor], *, sums: Sums, microbatch: int) -> tuple[Tensor, ...]:
        """The vector-Jacobian product: gradients per ``segment.grads_out``; those of weights are added to ``sums``.

        ``grads`` per ``segment.grads_in``, canonical. Microbatch 0 begins the sums of the uses here. Consumes the graph of
        ``saved``. Raises :class:`ComputeError`; ``sums`` are then of no more use.
        """
        roots, seeds = [], []
        for root, seed in zip(saved.roots, (*grads, *saved.seeds), strict=True):
            if root.requires_grad:
                roots.append(root)
                seeds.append(seed)
        # Autograd adds in place into the running sum as soon as a gradient exists: the left fold over microbatches without
        # a second copy of all gradients. A leaf is one use of one parameter, so nothing else can reach its sum.
        for leaf, tensor in saved.leaves:
            tensor.grad = None if microbatch == 0 else sums[leaf.owner][leaf.use][leaf.name]
        wanted = [*saved.edges, *(tensor for _, tensor in saved.leaves)]
        try:
            torch.autograd.backward(roots, seeds, inputs=wanted)
        except KERNEL_ERRORS as error:
            raise ComputeError(f"backward of VNodes {', '.join(self._segment.vnodes)}: {error}") from error
        for leaf, tensor in saved.leaves:
            sums[leaf.owner].setdefault(leaf.use, {})[leaf.name] = _gradient(tensor)
        return tuple(_gradient(tensor) for tensor in saved.edges)


def _gradient(leaf: Tensor) -> Tensor:
    """What backward left at a leaf; zero where no path led there."""
    return torch.zeros_like(leaf, dtype=leaf.grad_dtype) if leaf.grad is None else canonical(leaf.grad)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in ``dtype``; itself where it has it, or is none."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
