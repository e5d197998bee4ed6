"""The compute port on torch: runs one task (:mod:`dcnr.pnode.tasks`) on the calling thread."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dcnr.adapters.torch.backend import NAMES, view
from dcnr.adapters.torch.program import Parameters, Saved, SegmentProgram
from dcnr.adapters.torch.state import StateCopy, VNodeState, serialise_snapshot
from dcnr.ids import NetworkId, VNodeId
from dcnr.machine import TensorRef
from dcnr.network.analysis import Network, Segment
from dcnr.pnode.tasks import (
    Backward,
    BackwardDone,
    Forward,
    ForwardDone,
    Load,
    Loaded,
    Snapshot,
    SnapshotDone,
    States,
    Summarize,
    Summarized,
    Update,
    UpdateDone,
)
from dcnr.protocol.messages import MetricValue
from dcnr.runtime.ports import TensorTable
from dcnr.session.recipe import grad_scale

PROGRAMS_MOST = 64
"""Compiled segments kept: a program is small and quickly made again, so the oldest goes first."""


class TorchExecutor:
    """Implements :class:`dcnr.runtime.ports.Executor`. Call :func:`~dcnr.adapters.torch.environment.prepare` first.

    Every task may raise :class:`~dcnr.errors.ComputeError`; what a task made before it failed is dropped with the exception.
    """

    def __init__(self, table: TensorTable) -> None:
        self._table = table
        self._programs: dict[tuple[NetworkId, tuple[str, ...], Segment], SegmentProgram] = {}

    def execute(self, task: Any) -> Any:
        """The result dataclass that belongs to the task's type."""
        match task:
            case Load():
                return self._load(task)
            case Forward():
                return self._forward(task)
            case Backward():
                return self._backward(task)
            case Summarize():
                return self._summarize(task)
            case Update():
                return self._update(task)
            case Snapshot():
                return self._snapshot(task)
            case _:
                raise AssertionError(f"no compute task: {task!r}")

    def serialise_snapshot(self, copy: StateCopy) -> bytes:
        """The bytes of a snapshot's state object. May run on any thread, beside :meth:`execute`."""
        return serialise_snapshot(copy)

    def _load(self, task: Load) -> Loaded:
        if task.source is None:
            state = VNodeState.initial(task.network, task.recipe, task.vnode, training=task.training)
        else:
            source = self._table.get(task.source)
            make = VNodeState.begin if task.begin else VNodeState.load
            state = make(task.network, task.recipe, task.vnode, source, training=task.training)
        return Loaded(state=self._table.put(state))

    def _forward(self, task: Forward) -> ForwardDone:
        begun = time.perf_counter()
        done = self._program(task.network, task.segment).forward(
            parameters=self._parameters(task.states),
            inputs=self._tensors(task.inputs),
            valid_targets=task.valid_targets,
            seed=task.recipe.seed,
            step=task.step,
            first_row=task.first_row,
            training=task.training,
            results=task.results,
        )
        return ForwardDone(
            outputs=self._put(done.outputs),
            results=self._put(done.results),
            saved=None if done.saved is None else self._table.put(done.saved),
            losses=done.losses,
            seconds=time.perf_counter() - begun,
            squares=_values(done.squares),
        )

    def _backward(self, task: Backward) -> BackwardDone:
        begun = time.perf_counter()
        saved: Saved = self._table.get(task.saved)
        try:
            grads = self._program(task.network, task.segment).backward(
                saved,
                self._tensors(task.grads),
                sums={vnode: state.sums(task.step) for vnode, state in self._states(task.states)},
                microbatch=task.microbatch,
            )
        finally:
            # The count is this task's, failed or not.
            self._table.release(task.saved)
        return BackwardDone(grads=self._put(grads), seconds=time.perf_counter() - begun)

    def _summarize(self, task: Summarize) -> Summarized:
        summaries = []
        for vnode, state in self._states(task.states):
            square = state.grad_square(task.step)
            # NaN and infinities survive a sum of squares, so one number tells.
            summaries.append((vnode, square, square - square == 0.0))
        return Summarized(summaries=tuple(summaries))

    def _update(self, task: Update) -> UpdateDone:
        begun = time.perf_counter()
        learning_rate = task.recipe.learning_rate(task.step)
        not_finite: list[VNodeId] = []
        metrics: list[tuple[str, float]] = []
        for vnode, state in self._states(task.states):
            scale = task.grad_scale
            if task.recipe.clips_vnode:
                scale = grad_scale([state.grad_square(task.step)], task.recipe.clip_norm)
            applied = state.update(step=task.step, learning_rate=learning_rate, grad_scale=scale)
            metrics += applied.metrics
            if not applied.finite:
                not_finite.append(vnode)
        return UpdateDone(not_finite=tuple(not_finite), seconds=time.perf_counter() - begun, metrics=_values(metrics))

    def _snapshot(self, task: Snapshot) -> SnapshotDone:
        return SnapshotDone(
            copies=tuple((vnode, self._table.put(state.copy())) for vnode, state in self._states(task.states))
        )

    def _program(self, network: Network, segment: Segment) -> SegmentProgram:
        key = (network.id, network.rewrites, segment)
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= PROGRAMS_MOST:
                del self._programs[next(iter(self._programs))]
            program = self._programs[key] = SegmentProgram(network, segment)
        return program

    def _states(self, states: States) -> list[tuple[VNodeId, VNodeState]]:
        return [(vnode, self._table.get(handle)) for vnode, handle in states]

    def _parameters(self, states: States) -> Parameters:
        return {vnode: state.weight for vnode, state in self._states(states)}

    def _tensors(self, refs: Sequence[TensorRef]) -> list[Tensor]:
        return [self._table.get(ref.handle) for ref in refs]

    def _put(self, tensors: Sequence[Tensor]) -> tuple[TensorRef, ...]:
        return tuple(
            TensorRef(
                handle=self._table.put(tensor),
                shape=tuple(tensor.shape),
                dtype=NAMES[tensor.dtype],
                digest=hashlib.sha256(view(tensor)).hexdigest(),
            )
            for tensor in tensors
        )


def _values(measured: Sequence[tuple[str, float]]) -> tuple[MetricValue, ...]:
    return tuple(MetricValue(name=name, value=value) for name, value in measured)
