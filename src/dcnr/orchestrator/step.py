"""One session's steps: which microbatches are open, what has come back, when a step closes and when it is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network, Segment
from dcnr.protocol.messages import Loss, SegmentTime
from dcnr.session.recipe import Recipe, grad_scale, root_mean_square, step_loss


@dataclass(slots=True, kw_only=True)
class _Step:
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    """(cost's position, microbatch) to loss."""
    squares: dict[VNodeId, float] = field(default_factory=dict)
    not_finite: set[VNodeId] = field(default_factory=set)
    scale: float | None = None
    updated: set[VNodeId] = field(default_factory=set)
    metrics: dict[str, float] = field(default_factory=dict)
    """Of gradients and weights."""
    squares_of: dict[tuple[str, int], float] = field(default_factory=dict)
    """(``activation_rms``, microbatch) to the activation's sum of squares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """``scale``: the clipping factor. ``metrics``: by name, in the definition's order, those that are finite."""

    step: int
    loss: float
    scale: float
    metrics: Mapping[str, float]


class StepMachine:
    """Everything is idempotent: reports arrive at least once. Steps are base+1..T.

    What a host reports of VNodes or microbatches that nobody asked it for is ignored.
    """

    def __init__(
        self, *, network: Network, segments: tuple[Segment, ...], recipe: Recipe, base_step: int, window: int
    ) -> None:
        self.recipe = recipe
        self.window = window
        self.updating = tuple(v for v in network.vnodes if network.uses(v))
        """In the order of ``nodes``: the order of the clipping fold."""
        self.done_step = base_step
        self.times: dict[int, SegmentTime] = {}
        """By segment, for people."""
        self._segments = {s.index: PeerId(s.host) for s in segments}
        self._costs = {c.node_id: (i, c.weight) for i, c in enumerate(network.definition.costs)}
        self._weights = tuple(c.weight for c in network.definition.costs)
        self._order = {v: i for i, v in enumerate(network.vnodes)}
        self._metrics = network.definition.metrics
        self._elements = {
            metric.name: network.vnodes[metric.node_id].outputs[metric.slot_id].elements * recipe.batch_size
            for metric in self._metrics
            if metric.type == "activation_rms"
        }
        """Of a whole step, per ``activation_rms``."""
        self._of_weights = frozenset(m.name for m in self._metrics if m.name not in self._elements)
        self._open: dict[tuple[int, int], set[int]] = {}
        self._next = (base_step + 1, 0)
        self._steps: dict[int, _Step] = {}

    # --- opening --------------------------------------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """The step of the microbatch that would be opened next."""
        return self._next[0]

    @property
    def starts_step(self) -> bool:
        """The microbatch that would be opened next is its step's first."""
        return self._next[1] == 0

    def may_open(self) -> bool:
        return len(self._open) < self.window and self._next[0] <= self.recipe.steps

    def open(self) -> tuple[int, int]:
        """Open the next microbatch of the plan."""
        step, microbatch = key = self._next
        self._open[key] = set(self._segments)
        last = microbatch + 1 == self.recipe.microbatches
        self._next = (step + 1, 0) if last else (step, microbatch + 1)
        self._step(step)
        return key

    def reopen(self, last: tuple[int, int] | None) -> None:
        """An earlier owner has opened everything up to ``last``."""
        while last is not None and self._next <= last:
            self.open()

    @property
    def closed_step(self) -> int:
        """Steps up to this one are done and nothing of them is open: a segment that nothing waits for, one without
        parameters or a frozen branch, may be at work for a step that is done."""
        return min([self.done_step, *(step - 1 for step, _ in self._open)])

    def still_open(self) -> list[tuple[int, int]]:
        """(step, microbatch) that not every segment has finished, ascending."""
        return sorted(self._open)

    def _step(self, step: int) -> _Step:
        return self._steps.setdefault(step, _Step())

    def _known(self, step: int) -> _Step | None:
        """``None`` for a step that is over, or was never opened: a repetition, or nonsense."""
        return self._steps.get(step)

    # --- what comes back ------------------------------------------------------------------------------------

    def done(self, segment: int, step: int, microbatch: int, forward_s: float = 0.0, backward_s: float = 0.0) -> bool:
        """A segment has finished a microbatch, and measured so long. True = it is closed now."""
        waiting = self._open.get((step, microbatch), set())
        if segment not in waiting:
            return False
        waiting.remove(segment)
        self._measure(segment, forward_s, backward_s)
        if waiting:
            return False
        del self._open[(step, microbatch)]
        return True

    def _measure(self, segment: int, forward_s: float, backward_s: float) -> None:
        peer = self._segments[segment]
        old = self.times.get(
            segment, SegmentTime(segment=segment, peer=peer, forward_s=0.0, backward_s=0.0, microbatches=0)
        )
        count = old.microbatches + 1
        self.times[segment] = SegmentTime(
            segment=segment,
            peer=peer,
            forward_s=old.forward_s + (forward_s - old.forward_s) / count,
            backward_s=old.backward_s + (backward_s - old.backward_s) / count,
            microbatches=count,
        )

    def loss(self, vnode: VNodeId, step: int, microbatch: int, loss: float) -> None:
        known = self._known(step)
        if known is not None and vnode in self._costs and 0 <= microbatch < self.recipe.microbatches:
            known.losses[(self._costs[vnode][0], microbatch)] = loss
            if not math.isfinite(loss):
                known.not_finite.add(vnode)

    def summary(self, step: int, vnode: VNodeId, grad_sq: float, finite: bool) -> None:
        known = self._known(step)
        if known is not None and known.scale is None and vnode in self.updating:
            known.squares[vnode] = grad_sq
            if not (finite and grad_sq >= 0):
                known.not_finite.add(vnode)

    def updated(self, step: int, vnode: VNodeId, finite: bool) -> None:
        known = self._known(step)
        if known is not None and vnode in self.updating:
            known.updated.add(vnode)
            if not finite:
                known.not_finite.add(vnode)

    def metrics(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Metrics of gradients and weights, by name."""
        known = self._known(step)
        if known is not None:
            known.metrics.update({name: value for name, value in values if name in self._of_weights})

    def squares(self, step: int, microbatch: int, values: Iterable[tuple[str, float]]) -> None:
        """Sums of squares of measured activations, by the metric's name."""
        known = self._known(step)
        if known is not None and 0 <= microbatch < self.recipe.microbatches:
            known.squares_of.update({(name, microbatch): v for name, v in values if name in self._elements})

    def loss_of(self, step: int, said: Iterable[Loss]) -> float | None:
        """The loss of a step, from what its cost VNodes have said of each microbatch. ``None`` = some is missing."""
        whole = _Step()
        for loss in said:
            if loss.step == step and loss.vnode in self._costs:
                whole.losses[(self._costs[loss.vnode][0], loss.microbatch)] = loss.loss
        wanted = len(self._weights) * self.recipe.microbatches
        return self._total(whole) if len(whole.losses) == wanted else None

    # --- decisions ------------------------------------------------------------------------------------------

    def close(self, step: int) -> float | None:
        """The clipping factor, once: when every VNode's summary is there and all are finite."""
        known = self._known(step)
        if known is None or known.scale is not None or len(known.squares) < len(self.updating):
            return None
        if known.not_finite:
            return None
        known.scale = grad_scale([known.squares[v] for v in self.updating], self.recipe.clip_norm)
        return known.scale

    def closed(self) -> list[tuple[int, float]]:
        """Steps that have a factor and are not done: said again to a host that comes back."""
        return [(t, s.scale) for t, s in sorted(self._steps.items()) if s.scale is not None]

    def not_finite(self, step: int) -> VNodeId | None:
        """The first VNode, in the order of ``nodes``, whose numbers are not finite, once all have reported."""
        known = self._known(step)
        if known is None or not known.not_finite:
            return None
        reported = known.squares if self.recipe.clips_network else known.updated
        if len(reported) < len(self.updating):
            return None
        return min(known.not_finite, key=lambda v: self._order[v])

    def finish_steps(self) -> list[FinishedStep]:
        """Steps that are done now, ascending. Their bookkeeping ends.

        A step with numbers that are not finite is never done.
        """
        finished = []
        while (known := self._steps.get(self.done_step + 1)) is not None:
            if len(known.updated) < len(self.updating):
                break
            if len(known.losses) < len(self._weights) * self.recipe.microbatches or known.not_finite:
                break
            if len(known.squares_of) < len(self._elements) * self.recipe.microbatches:
                break
            total = self._total(known)
            if not math.isfinite(total):  # Each loss is, and their sum is too large.
                known.not_finite.update(self._costs)
                break
            self.done_step += 1
            del self._steps[self.done_step]
            finished.append(
                FinishedStep(
                    step=self.done_step,
                    loss=total,
                    scale=1.0 if known.scale is None else known.scale,
                    metrics=self._measured(known),
                )
            )
        return finished

    def _measured(self, step: _Step) -> dict[str, float]:
        found = step.metrics | {
            name: root_mean_square(
                [step.squares_of[(name, microbatch)] for microbatch in range(self.recipe.microbatches)], elements
            )
            for name, elements in self._elements.items()
        }
        values = ((metric.name, found.get(metric.name, math.nan)) for metric in self._metrics)
        return {name: value for name, value in values if math.isfinite(value)}

    def _total(self, step: _Step) -> float:
        microbatches = range(self.recipe.microbatches)
        return step_loss(
            [[step.losses[(c, m)] for m in microbatches] for c in range(len(self._weights))], self._weights
        )
