"""The twin of a compute worker's executor: runs ``dcnr.pnode.tasks`` over hash chains and checks what it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcnr.ids import VNodeId
from dcnr.machine import Handle, TensorRef
from dcnr.network.analysis import Segment
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
    Task,
    Update,
    UpdateDone,
)
from dcnr.session.recipe import Recipe, grad_scale
from dcnr.sim.compute import Digest, Oracle, State
from dcnr.sim.tensors import Table
from dcnr.sim.violation import Violation


class ComputeError(Exception):
    """A kernel failed; the machine hears ``ComputeFailed``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a forward keeps for its backward, per VNode: the weights read and the digest of what was kept."""

    oracle: Oracle
    """Its session's."""
    segment: Segment
    step: int
    microbatch: int
    nodes: dict[VNodeId, tuple[Digest, Digest]]
    reads: tuple[Handle, ...]


class Executor:
    """One per process life. ``oracles``: one per session, which differ by seed; the checks compare with them."""

    def __init__(self, table: Table, oracles: Sequence[Oracle], not_finite: tuple[VNodeId, int] | None = None) -> None:
        self._table = table
        self._oracles = {oracle.recipe.seed: oracle for oracle in oracles}
        self._not_finite = not_finite
        self._valid_targets: dict[tuple[int, VNodeId], int] = {}

    def of(self, recipe: Recipe) -> Oracle:
        """Of the session that is trained by it."""
        return self._oracles[recipe.seed]

    def of_task(self, task: Task) -> Oracle | None:
        """Of the session that a task is for; ``None`` where it names none."""
        if isinstance(task, Backward):
            saved = self._table.get(task.saved)
            assert isinstance(saved, Saved)
            return saved.oracle
        return self.of(task.recipe) if isinstance(task, Load | Forward | Update) else None

    def handles(self, task: Task) -> list[Handle]:
        """Everything the task names: all of it must be live from the task's start to its end."""
        match task:
            case Load(source=source):
                return [] if source is None else [source]
            case Forward(states=states, inputs=inputs):
                return [*(h for _, h in states), *(t.handle for t in inputs)]
            case Backward(states=states, grads=grads, saved=saved):
                return [*(h for _, h in states), *(t.handle for t in grads), saved]
            case Summarize(states=states) | Update(states=states) | Snapshot(states=states):
                return [h for _, h in states]

    def execute(self, task: Task) -> Any:
        """Raises :class:`ComputeError` for what a kernel would refuse, :class:`Violation` for a broken invariant."""
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

    def failed(self, task: Task) -> None:
        """A task that did not run to its end still has taken over what it was to consume."""
        if isinstance(task, Backward):
            self._table.release(task.saved)

    def _load(self, task: Load) -> Loaded:
        oracle = self.of(task.recipe)
        info = oracle.network.vnodes[task.vnode]
        if not info.parameters:
            raise ComputeError(f"{task.vnode} has no state to load")
        if task.source is None:
            state = State(vnode=task.vnode, weights=oracle.kernels.initial(task.vnode), version=0, oracle=oracle)
        else:
            try:
                value = json.loads(self._table.get(task.source))
                state = State(vnode=task.vnode, weights=value["weights"], version=value["version"], oracle=oracle)
            except (ValueError, KeyError, TypeError) as error:
                raise ComputeError(f"state object of {task.vnode} cannot be read: {error}") from error
            self._check_weights(state, "Load")
        return Loaded(state=self._table.put(state, f"state {task.vnode}", info.parameter_bytes))

    def _states(self, states: States, oracle: Oracle | None = None) -> dict[VNodeId, State]:
        """``oracle``: whose session they must be of; ``None`` = of one, whichever it is."""
        found: dict[VNodeId, State] = {}
        for vnode, handle in states:
            state = self._table.get(handle)
            if not isinstance(state, State) or (state.vnode != vnode):
                raise Violation("VersionRule", f"handle {handle} given as the state of {vnode} is {state!r:.200}")
            oracle = oracle or state.oracle
            if state.oracle is not oracle:
                raise Violation("VersionRule", f"handle {handle} is a state of {vnode} in another session")
            found[vnode] = state
        return found

    @staticmethod
    def _check_weights(state: State, where: str) -> None:
        assert state.oracle is not None
        vnode, expected = state.vnode, state.oracle.state(state.version)[state.vnode]
        if state.weights != expected:
            raise Violation(
                "Oracle", f"{where}: {vnode} at version {state.version} is {state.weights[:8]}, oracle {expected[:8]}"
            )

    @staticmethod
    def _check_versions(oracle: Oracle, states: dict[VNodeId, State], step: int, what: str) -> None:
        for vnode, state in states.items():
            expected = oracle.version(vnode, oracle.recipe.forward_version(step))
            if state.version != expected:
                raise Violation(
                    "VersionRule", f"{what} of step {step} reads {vnode} at version {state.version}, not {expected}"
                )

    @staticmethod
    def _check_one_checkpoint(oracle: Oracle, states: dict[VNodeId, State]) -> None:
        """Serving reads one commit: a mixture of versions was never anybody's weights."""
        found = {state.version for vnode, state in states.items() if vnode in oracle.kernels.updated}
        if len(found) > 1:
            raise Violation("VersionRule", f"serving reads versions {sorted(found)} together")

    def _forward(self, task: Forward) -> ForwardDone:
        segment, oracle = task.segment, self.of(task.recipe)
        network, kernels = oracle.network, oracle.kernels
        definition = network.definition
        states = self._states(task.states, oracle)
        if tuple(states) != segment.states:
            raise Violation("VersionRule", f"forward of {segment.vnodes} got states {tuple(states)}")
        if task.training:
            self._check_versions(oracle, states, task.step, f"forward of {segment.vnodes}")
        else:
            self._check_one_checkpoint(oracle, states)
        if len(task.inputs) != len(segment.in_edges) + len(segment.inputs) + len(segment.costs):
            raise ComputeError(f"segment {segment.index} got {len(task.inputs)} inputs")
        values = [self._table.get(t.handle) for t in task.inputs]
        edges: dict[int, Digest] = dict(zip(segment.in_edges, values, strict=False))
        rest = values[len(segment.in_edges) :]
        entering = {
            (definition.inputs[p].node_id, definition.inputs[p].slot_id): v
            for p, v in zip(segment.inputs, rest, strict=False)
        }
        targets = {
            definition.costs[p].node_id: v for p, v in zip(segment.costs, rest[len(segment.inputs) :], strict=True)
        }
        for position, count in zip(segment.costs, task.valid_targets, strict=True):
            cost = definition.costs[position].node_id
            key = (oracle.recipe.seed, cost)
            if task.training and self._valid_targets.setdefault(key, count) != count:
                raise Violation("Oracle", f"valid targets of {cost} change from {self._valid_targets[key]} to {count}")
        weights = {v: s.weights for v, s in states.items()}
        nodes: dict[VNodeId, tuple[Digest, Digest]] = {}
        losses: dict[VNodeId, float] = {}
        for vnode in segment.vnodes:
            info = network.vnodes[vnode]
            inputs = [entering[vnode, s] if e is None else edges[e] for s, e in enumerate(info.in_edges)]
            if vnode in targets:
                inputs.append(targets[vnode])
            read = kernels.weights_of(info, weights)
            nodes[vnode] = (read, kernels.saved(info, inputs, task.step, task.first_row))
            for slot, out in enumerate(info.out_edges):
                value = kernels.output(info, read, inputs, slot, task.step, task.first_row)
                if vnode in targets and slot == kernels.costs[vnode].slot_id:
                    losses[vnode] = kernels.loss(value)
                for edge in out:
                    edges[edge] = value
        outputs = tuple(self._edge_tensor(oracle, e, edges[e], "forward") for e in segment.out_edges)
        saved = None
        if segment.backward and task.training:
            kept = Saved(
                oracle=oracle,
                segment=segment,
                step=task.step,
                microbatch=task.microbatch,
                nodes=nodes,
                reads=tuple(h for _, h in task.states),
            )
            size = sum(network.vnodes[v].activation_bytes_per_row for v in segment.vnodes) * oracle.recipe.rows
            saved = self._table.put(kept, f"saved {segment.vnodes} {task.step}/{task.microbatch}", size)
        return ForwardDone(
            outputs=outputs,
            results=(),
            saved=saved,
            losses=tuple(losses[definition.costs[p].node_id] for p in segment.costs),
            seconds=0.0,
        )

    def _edge_tensor(self, oracle: Oracle, edge: int, value: Digest, note: str) -> TensorRef:
        source = oracle.network.definition.edges[edge]
        spec = oracle.network.vnodes[source.source].outputs[source.source_slot]
        return self._table.tensor(
            value, f"{note} edge {edge}", (oracle.recipe.rows, *spec.shape), spec.dtype, digest=value
        )

    def _backward(self, task: Backward) -> BackwardDone:
        segment, saved = task.segment, self._table.get(task.saved)
        assert isinstance(saved, Saved)
        oracle = saved.oracle
        network, kernels = oracle.network, oracle.kernels
        states = self._states(task.states, oracle)
        if (saved.step, saved.microbatch, saved.segment.vnodes) != (task.step, task.microbatch, segment.vnodes):
            raise Violation(
                "VersionRule", f"backward {task.step}/{task.microbatch} uses what {saved.step}/{saved.microbatch} kept"
            )
        self._check_versions(oracle, states, task.step, f"backward of {segment.vnodes}")
        gradients = {e: self._table.get(t.handle) for e, t in zip(segment.grads_in, task.grads, strict=True)}
        for vnode in reversed(segment.vnodes):
            info = network.vnodes[vnode]
            incoming = kernels.incoming(info, gradients)
            if incoming is None:
                continue
            read, kept = saved.nodes[vnode]
            for slot, edge in enumerate(info.in_edges):
                if edge is not None and edge in network.gradient_edges:
                    gradients[edge] = kernels.input_gradient(info, read, kept, incoming, slot)
            for owner in kernels.folds_into(info):
                value = kernels.weight_gradient(info, read, kept, incoming)
                self._add(states[owner], vnode, task.step, task.microbatch, value)
        self._table.release(task.saved)
        grads = tuple(self._edge_tensor(oracle, e, gradients[e], "gradient") for e in segment.grads_out)
        return BackwardDone(grads=grads, seconds=0.0)

    @staticmethod
    def _add(state: State, use: VNodeId, step: int, microbatch: int, value: Digest) -> None:
        if microbatch == 0:
            state.sums[use] = (step, [value])
            return
        summed_step, parts = state.sums.get(use, (0, []))
        if summed_step != step or len(parts) != microbatch:
            raise Violation(
                "UpdateOnce",
                f"{state.vnode}: gradient of use {use} {step}/{microbatch} follows {len(parts)} of step {summed_step}",
            )
        parts.append(value)

    @staticmethod
    def _folded(state: State, step: int) -> Digest:
        assert state.oracle is not None
        kernels, recipe = state.oracle.kernels, state.oracle.recipe
        sums: dict[VNodeId, list[Digest]] = {}
        for use in kernels.uses.get(state.vnode, ()):
            summed_step, parts = state.sums.get(use, (0, []))
            if summed_step != step or len(parts) != recipe.microbatches:
                raise Violation(
                    "UpdateOnce",
                    f"{state.vnode}: step {step} is folded with {len(parts)} microbatches of step {summed_step} at use {use}",
                )
            sums[use] = parts
        if not sums:
            raise Violation("UpdateOnce", f"{state.vnode} has no gradient and is never updated")
        return kernels.folded(state.vnode, sums)

    def _summarize(self, task: Summarize) -> Summarized:
        summaries = []
        for vnode, state in self._states(task.states).items():
            assert state.oracle is not None
            square = state.oracle.kernels.grad_square(self._folded(state, task.step))
            summaries.append((vnode, square, True))
        return Summarized(summaries=tuple(summaries))

    def _update(self, task: Update) -> UpdateDone:
        not_finite, oracle = [], self.of(task.recipe)
        open_reads = {h for v in self._table.values() if isinstance(v, Saved) for h in v.reads}
        for vnode, handle in task.states:
            if handle in open_reads:
                raise Violation("VersionRule", f"update {task.step} of {vnode} while a backward that reads it is open")
        for vnode, state in self._states(task.states, oracle).items():
            if state.version != task.step - 1:
                raise Violation("UpdateOnce", f"{vnode} at version {state.version} is given update {task.step}")
            folded = self._folded(state, task.step)
            scale = task.grad_scale
            if oracle.recipe.clips_vnode:
                scale = grad_scale([oracle.kernels.grad_square(folded)], oracle.recipe.clip_norm)
            state.weights = oracle.kernels.next_weights(state.weights, task.step, folded, scale)
            state.version = task.step
            state.sums.clear()
            self._check_weights(state, f"Update with scale {task.grad_scale!r}")
            if self._not_finite == (vnode, task.step):
                not_finite.append(vnode)
        return UpdateDone(not_finite=tuple(not_finite), seconds=0.0)

    def _snapshot(self, task: Snapshot) -> SnapshotDone:
        copies = []
        for vnode, state in self._states(task.states).items():
            assert state.oracle is not None
            copy = State(vnode=vnode, weights=state.weights, version=state.version, oracle=state.oracle)
            size = state.oracle.network.vnodes[vnode].parameter_bytes
            copies.append((vnode, self._table.put(copy, f"copy {vnode} {state.version}", size)))
        return SnapshotDone(copies=tuple(copies))
