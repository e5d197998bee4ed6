"""What a compute worker is asked to do, over handles. One worker runs its tasks in the order given.

``states`` are handles of VNode states (weights, running gradient sums, optimizer state). A task reads the states it
names, except :class:`Load` (creates), :class:`Backward` (adds to the gradient sums), :class:`Update` (writes).
Every TensorRef and handle in a result is one count that the machine gives back with ``Release``.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcnr.ids import Sha256, VNodeId
from dcnr.machine import Handle, TensorRef
from dcnr.network.analysis import Network, Segment
from dcnr.protocol.messages import MetricValue
from dcnr.session.recipe import Recipe

States = tuple[tuple[VNodeId, Handle], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Make a VNode's state: from the bytes of a state object, or (``source`` None) the initial one.

    The bytes must hold exactly the tensors that the definition and recipe call for; anything else fails.
    ``training`` False = weights only. Result: :class:`Loaded`.
    """

    network: Network
    recipe: Recipe
    vnode: VNodeId
    source: Handle | None
    training: bool
    begin: bool = False
    """Another session's object: its weights alone, with an optimizer that has seen nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    state: Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Run a segment's forward on one microbatch. Result: :class:`ForwardDone`.

    ``inputs`` in the order: ``segment.in_edges``, then ``segment.inputs``, then the target of each of
    ``segment.costs`` (left out where ``targets`` is False: serving without costs). ``first_row`` is the position in the batch of
    the first row (dropout masks follow from (seed, VNode, step, row)). ``valid_targets`` per cost, of the whole step.
    """

    network: Network
    recipe: Recipe
    segment: Segment
    states: States
    inputs: tuple[TensorRef, ...]
    valid_targets: tuple[int, ...]
    step: int
    microbatch: int
    first_row: int
    training: bool
    results: tuple[tuple[VNodeId, int, bool], ...] = ()
    """Serving: further outputs wanted, (node, slot, only the last position of axis 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardDone:
    """``outputs``: one per ``segment.out_edges``, with digests; ``results`` likewise per wanted result.

    ``saved`` is what backward needs, ``None`` where there is no backward. ``losses``: one per ``segment.costs``, unweighted.
    ``squares``: in training, per activation that a metric of the network names, the metric and its sum of squares.
    """

    outputs: tuple[TensorRef, ...]
    results: tuple[TensorRef, ...]
    saved: Handle | None
    losses: tuple[float, ...]
    seconds: float
    squares: tuple[MetricValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """Local vector-Jacobian product of a segment. Adds weight gradients to the running sums of ``step`` in
    ``states`` (microbatch 0 sets them), one sum per use of a tied weight. Takes over ``saved``'s count. Result: :class:`BackwardDone`.
    ``grads`` in the order of ``segment.grads_in``.
    """

    network: Network
    segment: Segment
    saved: Handle
    states: States
    grads: tuple[TensorRef, ...]
    step: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDone:
    """``grads``: one per ``segment.grads_out``, with digests."""

    grads: tuple[TensorRef, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summarize:
    """Fold the uses of each state (order of ``nodes``) and sum the squares in float64. Result: :class:`Summarized`."""

    network: Network
    states: States
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summarized:
    """(VNode, sum of squares, finite) in the order of ``states``."""

    summaries: tuple[tuple[VNodeId, float, bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Scale the folded gradients, apply each VNode's optimizer. Result: :class:`UpdateDone`.

    ``grad_scale`` is the step's one factor. Where the recipe clips by VNode it is 1, and each VNode's own takes its place.
    """

    network: Network
    recipe: Recipe
    states: States
    step: int
    grad_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateDone:
    """VNodes whose new weights are not finite; values of the metrics that the network names here."""

    not_finite: tuple[VNodeId, ...]
    seconds: float
    metrics: tuple[MetricValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Copy states as they are now. Result: :class:`SnapshotDone`; each handle goes to a ``Keep`` effect."""

    states: States


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDone:
    copies: States


Task = Load | Forward | Backward | Summarize | Update | Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptObject:
    """What a kept snapshot is called."""

    sha256: Sha256
    size_bytes: int
