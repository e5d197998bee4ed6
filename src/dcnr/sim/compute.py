"""Arithmetic replaced by hash chains: whatever the real kernels depend on, these digests depend on.

A digest stands for a tensor's bits. One formula per VNode, and none per segment, so that no digest can know how the
network was split. :class:`Kernels` are those formulas; the compute twin of :mod:`dcnr.sim.world` and the
:class:`Oracle` both use them, the twin task by task as the machines ask, the oracle in one plain loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dcnr.ids import DatasetId, VNodeId
from dcnr.network.analysis import Network, VNodeInfo
from dcnr.network.graph import json_bytes
from dcnr.protocol.messages import Direction
from dcnr.session.recipe import Recipe, grad_scale, step_loss
from dcnr.session.rows import microbatch_rows

Digest = str


def digest(*parts: object) -> Digest:
    """32 hexadecimal characters that depend on every part and on their order."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def fold(parts: Sequence[Digest]) -> Digest:
    """An explicit left fold: not associative and not commutative, as floating-point sums are not."""
    total = parts[0]
    for part in parts[1:]:
        total = digest("sum", total, part)
    return total


def spread(value: Digest, exponent: float) -> float:
    """A float between 10**-exponent and 10**exponent, so that the order of a float sum shows in its last bits."""
    share = int(value[:12], 16) / 16**12
    return float((1.0 + int(value[12:20], 16) / 16**8) * 10.0 ** ((2.0 * share - 1.0) * exponent))


def rows_digest(dataset: DatasetId, split: str, rows: Sequence[int], column: str) -> Digest:
    """A column of rows of the dataset."""
    return digest("rows", dataset, split, column, *rows)


@dataclass(slots=True)
class State:
    """A VNode's weights, optimizer state and running gradient sums, as the compute worker holds them."""

    vnode: VNodeId
    weights: Digest
    version: int
    sums: dict[VNodeId, tuple[int, list[Digest]]] = field(default_factory=dict)
    """Per use: the step, and one digest per microbatch in the order added."""
    oracle: Oracle | None = field(default=None, repr=False, compare=False)
    """Its session's, while a worker holds it."""

    def to_bytes(self) -> bytes:
        """The state object: tensors only, so two VNodes of equal weights have equal bytes."""
        return json_bytes({"weights": self.weights, "version": self.version})


class Kernels:
    """The formulas of one network."""

    def __init__(self, network: Network, seed: int) -> None:
        self.network = network
        self.seed = seed
        self.costs = {c.node_id: c for c in network.definition.costs}
        self.updated = tuple(
            info.node.id
            for info in sorted(network.vnodes.values(), key=lambda info: info.position)
            if info.trainable and network.uses(info.node.id)
        )
        """VNodes whose weights ever change, in the order of ``nodes``."""
        self.uses = {owner: network.uses(owner) for owner in self.updated}
        self.stateful = tuple(
            info.node.id for info in sorted(network.vnodes.values(), key=lambda info: info.position) if info.parameters
        )

    def folds_into(self, info: VNodeInfo) -> list[VNodeId]:
        """States whose gradient sums a VNode's backward adds to: its own and the one it is tied to."""
        return [
            owner
            for owner in (info.node.id, info.tied_to)
            if owner is not None and info.node.id in self.uses.get(owner, ())
        ]

    def initial(self, vnode: VNodeId) -> Digest:
        """Constant initialisations are equal for equal shapes: two VNodes may share a state object."""
        parameters = self.network.vnodes[vnode].parameters
        shapes = [(p.name, p.shape, p.init) for p in parameters]
        if all(p.init != "normal" for p in parameters):
            return digest("init", shapes)
        return digest("init", self.seed, vnode, shapes)

    def weights_of(self, info: VNodeInfo, states: Mapping[VNodeId, Digest]) -> Digest:
        """What a VNode's kernel reads: its own state and the one it is tied to."""
        own = states[info.node.id] if info.parameters else "-"
        return own if info.tied_to is None else f"{own}+{states[info.tied_to]}"

    def output(
        self, info: VNodeInfo, weights: Digest, inputs: Sequence[Digest], slot: int, step: int, first_row: int
    ) -> Digest:
        return digest("out", info.node.id, slot, weights, step, first_row, *inputs)

    def loss(self, cost_output: Digest) -> float:
        return spread(cost_output, 3.0)

    def input_gradient(self, info: VNodeInfo, weights: Digest, saved: Digest, incoming: Digest, slot: int) -> Digest:
        return digest("grad", info.node.id, slot, weights, saved, incoming)

    def weight_gradient(self, info: VNodeInfo, weights: Digest, saved: Digest, incoming: Digest) -> Digest:
        return digest("weight", info.node.id, weights, saved, incoming)

    def saved(self, info: VNodeInfo, inputs: Sequence[Digest], step: int, first_row: int) -> Digest:
        return digest("saved", info.node.id, step, first_row, *inputs)

    def incoming(self, info: VNodeInfo, gradients: Mapping[int, Digest]) -> Digest | None:
        """Gradients of a VNode's outputs, folded per slot in the file's edge order; ``None`` = nothing comes back.

        ``gradients``: those of gradient-bearing edges. A cost starts the chain.
        """
        cost = self.costs.get(info.node.id)
        if cost is not None:
            return digest("seed", cost.name, cost.weight)
        slots = []
        for edges in info.out_edges:
            bearing = [gradients[e] for e in edges if e in self.network.gradient_edges]
            slots.append(fold(bearing) if bearing else "0")
        return None if all(s == "0" for s in slots) else digest("incoming", *slots)

    def folded(self, owner: VNodeId, sums: Mapping[VNodeId, Sequence[Digest]]) -> Digest:
        """Microbatches per use, then the uses in the order of ``nodes``."""
        return fold([fold(sums[use]) for use in self.uses[owner]])

    def grad_square(self, folded: Digest) -> float:
        return spread(folded, 2.0)

    def next_weights(self, weights: Digest, step: int, folded: Digest, scale: float) -> Digest:
        return digest("update", weights, step, folded, scale.hex())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What of a dataset the sessions of a simulation see."""

    dataset: DatasetId
    rows_train: int


@dataclass(slots=True)
class _Passed:
    """A forward pass of the whole network."""

    edges: dict[int, Digest] = field(default_factory=dict)
    seen: dict[VNodeId, tuple[Digest, Digest]] = field(default_factory=dict)
    """Per VNode the weights that it read and what its backward keeps."""
    losses: dict[VNodeId, float] = field(default_factory=dict)


class Oracle:
    """The whole run in one piece, without machines, hosts or failures. Steps are computed when first asked for."""

    def __init__(self, network: Network, recipe: Recipe, rows: Rows) -> None:
        self.network, self.recipe, self.rows = network, recipe, rows
        self.kernels = Kernels(network, recipe.seed)
        self.states: list[dict[VNodeId, Digest]] = [{v: self.kernels.initial(v) for v in self.kernels.stateful}]
        self.tensors: dict[tuple[int, Direction, int, int], Digest] = {}
        """(edge, direction, step, microbatch) to the digest of what travels."""
        self.losses: dict[tuple[VNodeId, int, int], float] = {}
        """(cost VNode, step, microbatch)."""
        self.grad_squares: dict[tuple[VNodeId, int], float] = {}
        self.scales: dict[int, float] = {}

    def state(self, step: int) -> Mapping[VNodeId, Digest]:
        """Weights after ``step``; 0 = initial."""
        while len(self.states) <= step:
            self._step(len(self.states))
        return self.states[step]

    def version(self, vnode: VNodeId, step: int) -> int:
        """How many updates a VNode's weights have seen after ``step``."""
        return step if vnode in self.kernels.updated else 0

    def loss(self, step: int) -> float:
        """Of the whole step, as clients are told it."""
        self.state(step)
        costs = self.network.definition.costs
        losses = [
            [self.losses[cost.node_id, step, microbatch] for microbatch in range(self.recipe.microbatches)]
            for cost in costs
        ]
        return step_loss(losses, [cost.weight for cost in costs])

    def _step(self, step: int) -> None:
        recipe, kernels = self.recipe, self.kernels
        weights = self.states[recipe.forward_version(step)]
        sums: dict[VNodeId, list[Digest]] = {}
        for microbatch in range(recipe.microbatches):
            self._microbatch(step, microbatch, weights, sums)
        folded = {v: kernels.folded(v, sums) for v in kernels.updated}
        squares = {v: kernels.grad_square(folded[v]) for v in kernels.updated}
        scale = grad_scale(list(squares.values()), recipe.clip_norm) if recipe.clips_network else 1.0
        after = dict(self.states[step - 1])
        for vnode in kernels.updated:
            self.grad_squares[vnode, step] = squares[vnode]
            own = grad_scale([squares[vnode]], recipe.clip_norm) if recipe.clips_vnode else scale
            after[vnode] = kernels.next_weights(after[vnode], step, folded[vnode], own)
        self.scales[step] = scale
        self.states.append(after)

    def evaluation(self, step: int, rows: int) -> float:
        """Validation loss of the state after ``step`` over the first ``rows`` rows of the split."""
        weights, size = self.state(step), self.recipe.rows
        losses: list[dict[VNodeId, float]] = []
        for first in range(0, rows, size):
            passed = self._forward(weights, "validation", range(first, first + size), len(losses) + 1, 0)
            losses.append(passed.losses)
        return sum(c.weight * sum(batch[c.node_id] for batch in losses) for c in self.network.definition.costs)

    def _forward(
        self, weights: Mapping[VNodeId, Digest], split: str, rows: Sequence[int], step: int, first_row: int
    ) -> _Passed:
        network, kernels, dataset = self.network, self.kernels, self.rows.dataset
        entering = {(i.node_id, i.slot_id): i.column for i in network.definition.inputs}
        passed = _Passed()
        for vnode in network.order:
            info = network.vnodes[vnode]
            inputs = [
                rows_digest(dataset, split, rows, entering[vnode, slot]) if edge is None else passed.edges[edge]
                for slot, edge in enumerate(info.in_edges)
            ]
            cost = kernels.costs.get(vnode)
            if cost is not None:
                inputs.append(rows_digest(dataset, split, rows, cost.target))
            read = kernels.weights_of(info, weights)
            passed.seen[vnode] = (read, kernels.saved(info, inputs, step, first_row))
            for slot, out in enumerate(info.out_edges):
                value = kernels.output(info, read, inputs, slot, step, first_row)
                if cost is not None and slot == cost.slot_id:
                    passed.losses[vnode] = kernels.loss(value)
                passed.edges.update(dict.fromkeys(out, value))
        return passed

    def _microbatch(
        self, step: int, microbatch: int, weights: Mapping[VNodeId, Digest], sums: dict[VNodeId, list[Digest]]
    ) -> None:
        network, recipe, kernels = self.network, self.recipe, self.kernels
        rows = microbatch_rows(
            step=step,
            microbatch=microbatch,
            batch_size=recipe.batch_size,
            rows=recipe.rows,
            total=self.rows.rows_train,
            seed=recipe.seed,
        )
        passed = self._forward(weights, "train", rows, step, microbatch * recipe.rows)
        for edge, value in passed.edges.items():
            self.tensors[edge, Direction.FORWARD, step, microbatch] = value
        for cost_vnode, loss in passed.losses.items():
            self.losses[cost_vnode, step, microbatch] = loss
        gradients: dict[int, Digest] = {}
        for vnode in reversed(network.order):
            info = network.vnodes[vnode]
            incoming = kernels.incoming(info, gradients)
            if incoming is None:
                continue
            read, saved = passed.seen[vnode]
            for slot, entered in enumerate(info.in_edges):
                if entered is not None and entered in network.gradient_edges:
                    value = kernels.input_gradient(info, read, saved, incoming, slot)
                    gradients[entered] = value
                    self.tensors[entered, Direction.BACKWARD, step, microbatch] = value
            if kernels.folds_into(info):
                sums.setdefault(vnode, []).append(kernels.weight_gradient(info, read, saved, incoming))
