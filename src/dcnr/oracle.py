"""The reference: a network trained in one process, with exactly the arithmetic of the distributed run.

``==`` is promised between this and any placement: the same kernel groups, the same folds, the same optimizer per VNode.
``session verify`` and the numerics tests rest on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, bfloat16

from dcnr.adapters.text import column_array
from dcnr.adapters.torch.backend import canonical, from_array
from dcnr.adapters.torch.library import valid_targets
from dcnr.adapters.torch.program import Parameters, Saved, SegmentProgram
from dcnr.adapters.torch.state import VNodeState
from dcnr.errors import InvalidData, UsageError
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, Segment, analyse
from dcnr.network.graph import Definition
from dcnr.network.rewrite import TRAINING, as_written, rewritten
from dcnr.session.recipe import Recipe, grad_scale, root_mean_square, step_loss
from dcnr.session.rows import microbatch_rows


class RowSource(Protocol):
    """Rows by index: what a dataset's shards look like to the oracle."""

    total: int
    """Rows of the dataset."""

    def take(self, column: str, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        """An array [len(rows), ...]. Raises :class:`InvalidData` for a column that is absent."""
        ...


class ArrayRows:
    """Columns in memory, each [total, ...]."""

    def __init__(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Raises :class:`InvalidData` where the columns are none or differ in length."""
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidData(f"columns must have one common number of rows, found {lengths}")
        self.total = next(iter(lengths.values()))
        self._columns = columns

    def take(self, column: str, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        if column not in self._columns:
            raise InvalidData(f"no column {column!r}: found {', '.join(self._columns)}")
        return np.ascontiguousarray(self._columns[column][np.asarray(rows, dtype=np.int64)])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a session's owner learns of a step. ``loss`` is the sum over costs of weight * cost.

    ``grad_scale`` 1 where nothing is clipped, or every VNode by itself.
    """

    step: int
    loss: float
    grad_scale: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values of the network's metrics by name, those that are finite."""


class Trainer:
    """Trains in this process; ``steps_done`` counts finished steps.

    ``model``: a definition, anything with ``definition()`` (a ``dcnr.Graph``), or an analysed network; ``rewrites`` change it as
    they do for a new session. ``placement`` maps
    VNodes to hosts and only decides how kernel groups are joined into segments: the bits are the same for every one.
    Call :func:`dcnr.adapters.torch.environment.prepare` first where bits are compared with a PNode's.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        data: RowSource | Mapping[str, np.ndarray[Any, Any]],
        *,
        placement: Mapping[VNodeId, str] | None = None,
        rewrites: Sequence[str] = TRAINING,
    ) -> None:
        """Raises :class:`~dcnr.errors.InvalidNetwork`, :class:`InvalidData` where the rows are fewer than a batch, and
        :class:`UsageError` for a network without cost or a delay, which is not in this version."""
        if recipe.delay != 0:
            raise UsageError(f"found delay {recipe.delay}, which is not in this version; expected 0")
        self.network = rewritten(network_of(model), rewrites)
        if not self.network.definition.costs:
            raise UsageError(f"network {self.network.definition.name!r} has no cost: there is nothing to train")
        self.recipe = recipe
        self.steps_done = 0
        self._rows: RowSource = self._array_rows(data) if isinstance(data, Mapping) else data
        if self._rows.total < recipe.batch_size:
            raise InvalidData(f"{self._rows.total} rows are fewer than a batch of {recipe.batch_size}")
        hosts = placement or dict.fromkeys(self.network.order, "here")
        self._segments = tuple(
            (segment, SegmentProgram(self.network, segment)) for segment in self.network.segments(hosts)
        )
        self._states = {
            vnode: VNodeState.initial(self.network, recipe, vnode, training=True)
            for vnode, info in self.network.vnodes.items()
            if info.parameters
        }
        # The order of ``nodes``: that of the fold over squares.
        self._trained = tuple(
            node.id
            for node in self.network.definition.nodes
            if self.network.vnodes[node.id].trainable and self.network.uses(node.id)
        )

    def step(self) -> StepResult:
        """Train one step."""
        step, recipe = self.steps_done + 1, self.recipe
        batch = [
            self._take(
                self._rows,
                microbatch_rows(
                    step=step,
                    microbatch=microbatch,
                    batch_size=recipe.batch_size,
                    rows=recipe.rows,
                    total=self._rows.total,
                    seed=recipe.seed,
                ),
            )
            for microbatch in range(recipe.microbatches)
        ]
        valid = self._valid(batch)
        losses = []
        activations: dict[str, list[float]] = {}
        for microbatch, columns in enumerate(batch):
            saved, found, measured = self._forward(
                columns, valid, step=step, first_row=microbatch * recipe.rows, training=True
            )
            losses.append(found)
            for name, square in measured:
                activations.setdefault(name, []).append(square)
            self._backward(saved, step=step, microbatch=microbatch)
        squares = {vnode: self._states[vnode].grad_square(step) for vnode in self._trained}
        scale = 1.0 if recipe.clips_vnode else grad_scale(list(squares.values()), recipe.clip_norm)
        metrics: dict[str, float] = {}
        for vnode, square in squares.items():
            own = grad_scale([square], recipe.clip_norm) if recipe.clips_vnode else scale
            applied = self._states[vnode].update(step=step, learning_rate=recipe.learning_rate(step), grad_scale=own)
            metrics.update(applied.metrics)
        self.steps_done = step
        return StepResult(
            step=step,
            loss=step_loss(list(zip(*losses, strict=True)), self._weights),
            grad_scale=scale,
            metrics=self._measured(metrics, activations),
        )

    def run(self, steps: int) -> list[StepResult]:
        """Train ``steps`` more steps."""
        return [self.step() for _ in range(steps)]

    def loss(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> float:
        """Of given rows in one piece, dropout off, weights unchanged. Raises :class:`InvalidData` for an absent column."""
        rows = self._array_rows(columns)
        tensors = self._take(rows, range(rows.total))
        _, losses, _ = self._forward(tensors, self._valid([tensors]), step=self.steps_done, first_row=0, training=False)
        return step_loss([(loss,) for loss in losses], self._weights)

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Weights under the file's ``<node id>.<name>``; a tied weight once, under its owner. bfloat16 as float32."""
        run = {
            f"{vnode}.{name}": (tensor.float() if tensor.dtype == bfloat16 else tensor).numpy().copy()
            for vnode, state in self._states.items()
            for name, tensor in state.parameters.items()
        }
        return as_written(self.network, run, lambda tensor, first, last: tensor[first:last])

    def state_objects(self) -> dict[VNodeId, bytes]:
        """State objects of the present step, as a network's checkpoint holds them: one per VNode with parameters."""
        return {vnode: state.to_bytes() for vnode, state in self._states.items()}

    def load_weights(self, objects: Mapping[VNodeId, bytes]) -> None:
        """Begin with the weights of another session's state objects; the optimizer has seen nothing.

        Raises :class:`UsageError` where one is missing, :class:`~dcnr.errors.ComputeError` for those of another network.
        """
        self._expect(objects)
        self._states = {
            vnode: VNodeState.begin(self.network, self.recipe, vnode, objects[vnode], training=True)
            for vnode in self._states
        }
        self.steps_done = 0

    def load_states(self, step: int, objects: Mapping[VNodeId, bytes]) -> None:
        """Go on after ``step`` from the objects of a checkpoint. Raises as :meth:`load_weights` does."""
        self._expect(objects)
        self._states = {
            vnode: VNodeState.load(self.network, self.recipe, vnode, objects[vnode], training=True)
            for vnode in self._states
        }
        self.steps_done = step

    def _expect(self, objects: Mapping[VNodeId, bytes]) -> None:
        missing = sorted(self._states.keys() - objects.keys())
        if missing:
            raise UsageError(f"no state object for VNodes {', '.join(missing)}")

    @property
    def _weights(self) -> tuple[float, ...]:
        return tuple(cost.weight for cost in self.network.definition.costs)

    def _array_rows(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRows:
        """As a session reads them: an input that names no column, and finds none of its own name, takes the first."""
        taken = {name: column_array(name, values) for name, values in columns.items()}
        for entry in self.network.definition.inputs:
            if columns and entry.column == entry.name:
                taken.setdefault(entry.column, next(iter(taken.values())))
        return ArrayRows(taken)

    def _take(self, source: RowSource, rows: Sequence[int]) -> dict[str, Tensor]:
        definition = self.network.definition
        names = [i.column for i in definition.inputs] + [cost.target for cost in definition.costs]
        return {name: from_array(source.take(name, rows)) for name in dict.fromkeys(names)}

    def _measured(self, metrics: dict[str, float], activations: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """In the definition's order. ``activations``: per metric its sums of squares by microbatch."""
        for metric in self.network.definition.metrics:
            if metric.type == "activation_rms":
                elements = self.network.vnodes[metric.node_id].outputs[metric.slot_id].elements
                metrics[metric.name] = root_mean_square(activations[metric.name], elements * self.recipe.batch_size)
        values = ((m.name, metrics.get(m.name, math.nan)) for m in self.network.definition.metrics)
        return {name: value for name, value in values if math.isfinite(value)}

    def _valid(self, batch: Sequence[Mapping[str, Tensor]]) -> tuple[int, ...]:
        """Per cost, the valid targets of the whole step."""
        found = []
        for cost in self.network.definition.costs:
            info = self.network.vnodes[cost.node_id]
            found.append(sum(valid_targets(info.node.type, info.settings, columns[cost.target]) for columns in batch))
        return tuple(found)

    def _forward(
        self, columns: Mapping[str, Tensor], valid: tuple[int, ...], *, step: int, first_row: int, training: bool
    ) -> tuple[list[tuple[Segment, SegmentProgram, Saved | None]], tuple[float, ...], list[tuple[str, float]]]:
        definition = self.network.definition
        parameters: Parameters = {vnode: state.weight for vnode, state in self._states.items()}
        edges: dict[int, Tensor] = {}
        losses = [0.0] * len(definition.costs)
        saved = []
        squares: list[tuple[str, float]] = []
        for segment, program in self._segments:
            done = program.forward(
                parameters=parameters,
                inputs=[
                    *(edges.pop(edge) for edge in segment.in_edges),
                    *(columns[definition.inputs[index].column] for index in segment.inputs),
                    *(columns[definition.costs[index].target] for index in segment.costs),
                ],
                valid_targets=[valid[index] for index in segment.costs],
                seed=self.recipe.seed,
                step=step,
                first_row=first_row,
                training=training,
            )
            # What leaves a segment may travel; nothing of its layout may.
            edges.update(zip(segment.out_edges, map(canonical, done.outputs), strict=True))
            for index, loss in zip(segment.costs, done.losses, strict=True):
                losses[index] = loss
            saved.append((segment, program, done.saved))
            squares += done.squares
        return saved, tuple(losses), squares

    def _backward(
        self, saved: list[tuple[Segment, SegmentProgram, Saved | None]], *, step: int, microbatch: int
    ) -> None:
        grads: dict[int, Tensor] = {}
        sums = {vnode: state.sums(step) for vnode, state in self._states.items()}
        while saved:
            segment, program, graph = saved.pop()
            if graph is None:
                continue
            found = program.backward(
                graph, [grads.pop(edge) for edge in segment.grads_in], sums=sums, microbatch=microbatch
            )
            grads.update(zip(segment.grads_out, found, strict=True))


def network_of(model: Any) -> Network:
    """The analysed network of a definition, of a builder's graph, or itself."""
    if isinstance(model, Network):
        return model
    definition = model if isinstance(model, Definition) else model.definition()
    return analyse(definition)
