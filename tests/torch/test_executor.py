"""The compute port: a step made of tasks over handles is the oracle's step, bit for bit, and every count comes back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dcnr.adapters.torch.backend import TorchBackend, from_array, view
from dcnr.adapters.torch.executor import TorchExecutor
from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.machine import Handle, TensorRef
from dcnr.network.analysis import METRICS, Network, Segment, analyse
from dcnr.network.graph import MetricSpec
from dcnr.network.node_type import NodeType
from dcnr.network.rewrite import TRAINING, rewritten
from dcnr.network.types import CATALOGUE
from dcnr.oracle import StepResult, Trainer
from dcnr.pnode.tasks import Backward, Forward, ForwardDone, Load, Snapshot, Summarize, Update
from dcnr.session.recipe import AdamW, Recipe, grad_scale, root_mean_square, step_loss
from dcnr.session.rows import microbatch_rows
from tests.numerics.networks import Columns, gpt, mlp, mlp_rows, placements, token_rows


class Table:
    """Counts as the driver's table does."""

    def __init__(self) -> None:
        self.backend = TorchBackend()
        self.entries: dict[Handle, list[Any]] = {}
        self.made = 0

    def put(self, value: Any, count: int = 1) -> Handle:
        self.made += 1
        self.entries[Handle(self.made)] = [value, count]
        return Handle(self.made)

    def get(self, handle: Handle) -> Any:
        return self.entries[handle][0]

    def hold(self, handle: Handle) -> None:
        self.entries[handle][1] += 1

    def release(self, handle: Handle) -> None:
        self.entries[handle][1] -= 1
        if self.entries[handle][1] == 0:
            del self.entries[handle]


class Hosts:
    """Every segment of a placement on one executor; tensors between segments are copied as if they had travelled."""

    def __init__(self, network: Network, recipe: Recipe, rows: Columns, placement: dict[VNodeId, str]) -> None:
        self.table = Table()
        self.executor = TorchExecutor(self.table)
        self.network, self.recipe, self.rows = network, recipe, rows
        self.segments = network.segments(placement)
        self.not_finite: tuple[VNodeId, ...] = ()
        self.owners = [v for v, info in network.vnodes.items() if info.parameters]
        self.states = {vnode: self.load(vnode, None) for vnode in self.owners}

    def load(self, vnode: VNodeId, source: bytes | None) -> Handle:
        handle = None if source is None else self.table.put(source)
        task = Load(network=self.network, recipe=self.recipe, vnode=vnode, source=handle, training=True)
        loaded = self.executor.execute(task)
        if handle is not None:
            self.table.release(handle)
        state: Handle = loaded.state
        return state

    def of(self, vnodes: tuple[VNodeId, ...]) -> tuple[tuple[VNodeId, Handle], ...]:
        return tuple((vnode, self.states[vnode]) for vnode in vnodes)

    def travel(self, ref: TensorRef) -> TensorRef:
        """Bytes into a fresh tensor, checked against the digest."""
        source = self.table.get(ref.handle)
        assert hashlib.sha256(view(source)).hexdigest() == ref.digest
        assert (tuple(source.shape), source.dtype) == (ref.shape, getattr(torch, ref.dtype))
        copy = self.table.backend.empty(ref.shape, ref.dtype)
        self.table.backend.view(copy)[:] = view(source)
        self.table.release(ref.handle)
        return replace(ref, handle=self.table.put(copy))

    def rows_of(self, column: str, chosen: tuple[int, ...]) -> TensorRef:
        tensor = from_array(self.rows[column][list(chosen)])
        name = str(tensor.dtype).removeprefix("torch.")
        return TensorRef(handle=self.table.put(tensor), shape=tuple(tensor.shape), dtype=name)

    def forward(
        self, segment: Segment, inputs: list[TensorRef], valid: tuple[int, ...], step: int, microbatch: int
    ) -> ForwardDone:
        done: ForwardDone = self.executor.execute(
            Forward(
                network=self.network,
                recipe=self.recipe,
                segment=segment,
                states=self.of(segment.states),
                inputs=tuple(inputs),
                valid_targets=valid,
                step=step,
                microbatch=microbatch,
                first_row=microbatch * self.recipe.rows,
                training=True,
            )
        )
        return done

    def step(self, step: int) -> StepResult:
        definition, recipe = self.network.definition, self.recipe
        total = len(next(iter(self.rows.values())))
        squares: dict[str, list[float]] = {}
        losses = {index: [0.0] * recipe.microbatches for index in range(len(definition.costs))}
        for microbatch in range(recipe.microbatches):
            chosen = microbatch_rows(
                step=step,
                microbatch=microbatch,
                batch_size=recipe.batch_size,
                rows=recipe.rows,
                total=total,
                seed=recipe.seed,
            )
            edges: dict[int, TensorRef] = {}
            saved: list[tuple[Segment, Handle | None]] = []
            for segment in self.segments:
                inputs = [edges.pop(edge) for edge in segment.in_edges]
                inputs += [self.rows_of(definition.inputs[index].column, chosen) for index in segment.inputs]
                inputs += [self.rows_of(definition.costs[index].target, chosen) for index in segment.costs]
                valid = tuple(self.valid(index, step) for index in segment.costs)
                done = self.forward(segment, inputs, valid, step, microbatch)
                for ref in inputs:
                    self.table.release(ref.handle)
                edges |= {e: self.travel(ref) for e, ref in zip(segment.out_edges, done.outputs, strict=True)}
                for index, loss in zip(segment.costs, done.losses, strict=True):
                    losses[index][microbatch] = loss
                for measured in done.squares:
                    squares.setdefault(measured.name, []).append(measured.value)
                saved.append((segment, done.saved))
            for segment, handle in reversed(saved):
                if handle is None:
                    continue
                grads = tuple(edges.pop(edge) for edge in segment.grads_in)
                task = Backward(
                    network=self.network,
                    segment=segment,
                    saved=handle,
                    states=self.of(segment.states),
                    grads=grads,
                    step=step,
                    microbatch=microbatch,
                )
                back = self.executor.execute(task)
                for ref in grads:
                    self.table.release(ref.handle)
                edges |= {e: self.travel(ref) for e, ref in zip(segment.grads_out, back.grads, strict=True)}
        trained = tuple(v for v in self.owners if self.network.uses(v) and self.network.vnodes[v].trainable)
        scale = 1.0
        if recipe.clips_network:
            told = self.executor.execute(Summarize(network=self.network, states=self.of(trained), step=step))
            assert all(finite for _, _, finite in told.summaries)
            scale = grad_scale([square for _, square, _ in told.summaries], recipe.clip_norm)
        updated = self.executor.execute(
            Update(network=self.network, recipe=recipe, states=self.of(trained), step=step, grad_scale=scale)
        )
        self.not_finite = updated.not_finite
        weights = tuple(cost.weight for cost in definition.costs)
        metrics = {measured.name: measured.value for measured in updated.metrics}
        for metric in definition.metrics:
            if metric.type == "activation_rms":
                elements = self.network.vnodes[metric.node_id].outputs[metric.slot_id].elements
                metrics[metric.name] = root_mean_square(squares[metric.name], elements * recipe.batch_size)
        loss = step_loss(list(losses.values()), weights)
        return StepResult(step=step, loss=loss, grad_scale=scale, metrics=metrics)

    def valid(self, cost: int, step: int) -> int:
        """These rows have as many valid targets in every step."""
        target = self.rows[self.network.definition.costs[cost].target]
        return self.recipe.batch_size * int(np.prod(target.shape[1:]))

    def snapshot(self) -> dict[VNodeId, bytes]:
        copies = self.executor.execute(Snapshot(states=self.of(tuple(self.owners)))).copies
        found = {vnode: self.executor.serialise_snapshot(self.table.get(handle)) for vnode, handle in copies}
        for _, handle in copies:
            self.table.release(handle)
        return found


MEASURED = tuple(
    MetricSpec(name=f"{type} of {node}", type=type, node_id=VNodeId(node))
    for type in METRICS
    for node in ("trunk", "branch2", "side")
)
CASES = {
    "gpt": (gpt(dropout=0.1), token_rows()),
    "head and cost in one": (gpt(output=False), token_rows()),
    "mlp": (mlp(), mlp_rows()),
    "measured": (replace(mlp(), metrics=MEASURED), mlp_rows()),
}


@pytest.mark.parametrize(("clip_norm", "clip_scope"), [(0.0, "network"), (0.5, "network"), (0.1, "vnode")])
@pytest.mark.parametrize("way", ["whole", "halves", "turns"])
@pytest.mark.parametrize("name", CASES)
def test_tasks_compute_the_oracles_bits(name: str, way: str, clip_norm: float, clip_scope: str) -> None:
    definition, rows = CASES[name]
    network = rewritten(analyse(definition), TRAINING)
    assert ("tied_head" in network.rewrites) is (name == "head and cost in one")
    recipe = Recipe(
        steps=3, batch_size=8, microbatches=4, optimizer=AdamW(lr=1e-2), clip_norm=clip_norm, clip_scope=clip_scope
    )
    oracle = Trainer(network, recipe, rows)
    hosts = Hosts(network, recipe, rows, placements(network)[way])
    for step in (1, 2, 3):
        assert hosts.step(step) == oracle.step()
        assert hosts.not_finite == ()
    assert hosts.snapshot() == oracle.state_objects()
    assert sorted(hosts.table.entries) == sorted(hosts.states.values())


def test_a_step_replayed_from_a_snapshot_has_the_same_bits() -> None:
    network = analyse(gpt(dropout=0.1))
    recipe = Recipe(steps=3, batch_size=8, microbatches=2, optimizer=AdamW(lr=1e-2))
    hosts = Hosts(network, recipe, token_rows(), placements(network)["halves"])
    hosts.step(1)
    kept = hosts.snapshot()
    second = hosts.step(2)
    after = hosts.snapshot()
    for vnode in hosts.owners:
        hosts.table.release(hosts.states[vnode])
        hosts.states[vnode] = hosts.load(vnode, kept[vnode])
    assert hosts.step(2) == second
    assert hosts.snapshot() == after


def _one_segment(**change: Any) -> tuple[Hosts, Forward]:
    network = analyse(gpt())
    hosts = Hosts(network, Recipe(steps=1), token_rows(), placements(network)["whole"])
    (segment,) = hosts.segments
    inputs = (hosts.rows_of("tokens", (0, 1)), hosts.rows_of("targets", (0, 1)))
    task = Forward(
        network=network,
        recipe=hosts.recipe,
        segment=segment,
        states=hosts.of(segment.states),
        inputs=inputs,
        valid_targets=(24,),
        step=1,
        microbatch=0,
        first_row=0,
        training=True,
    )
    return hosts, replace(task, **change)


def test_evaluation_keeps_nothing_and_gives_wanted_results() -> None:
    wanted = ((VNodeId("head"), 0, True), (VNodeId("head"), 0, False), (VNodeId("norm"), 0, False))
    hosts, task = _one_segment(training=False, results=wanted)
    done = hosts.executor.execute(task)
    assert done.saved is None
    assert [ref.shape for ref in done.results] == [(2, 1, 40), (2, 12, 40), (2, 12, 32)]
    last, whole, _ = (hosts.table.get(ref.handle) for ref in done.results)
    assert torch.equal(last, whole[:, -1:])
    training = hosts.executor.execute(replace(task, training=True, results=()))
    assert training.losses == done.losses  # This network has no dropout.


def test_a_network_without_its_costs_serves_any_length() -> None:
    network = analyse(gpt())
    only = frozenset(network.vnodes) - {VNodeId("loss")}
    (segment,) = network.segments(dict.fromkeys(only, "a"), only)
    hosts, task = _one_segment()
    for length in (1, 5, 12):
        tokens = from_array(hosts.rows["tokens"][:1, :length].copy())
        ref = TensorRef(handle=hosts.table.put(tokens), shape=(1, length), dtype="int64")
        served = replace(
            task,
            segment=segment,
            inputs=(ref,),
            valid_targets=(),
            training=False,
            results=((VNodeId("head"), 0, True),),
        )
        assert hosts.executor.execute(served).results[0].shape == (1, 1, 40)


def test_a_token_outside_the_vocabulary_names_the_embedder() -> None:
    hosts, task = _one_segment()
    hosts.table.get(task.inputs[0].handle)[1, 3] = 40
    with pytest.raises(ComputeError, match="VNode tok") as caught:
        hosts.executor.execute(task)
    assert caught.value.vnode == "tok"


def test_a_target_outside_the_classes_names_the_cost() -> None:
    hosts, task = _one_segment()
    hosts.table.get(task.inputs[1].handle)[1, 3] = 40
    with pytest.raises(ComputeError, match="VNode loss") as caught:
        hosts.executor.execute(task)
    assert caught.value.vnode == "loss"


def test_a_slip_in_a_kernel_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of installed packages raise whatever they raise."""

    def kernel(lib: Any, inputs: Any, weights: Any, call: Any) -> Any:
        return weights["wieght"]

    monkeypatch.setitem(
        cast("dict[str, NodeType]", CATALOGUE), "layernorm", replace(CATALOGUE["layernorm"], kernel=kernel)
    )
    hosts, task = _one_segment()
    with pytest.raises(ComputeError, match="VNode attention0_norm: KeyError: 'wieght'") as caught:
        hosts.executor.execute(task)
    assert caught.value.vnode == "attention0_norm"


@pytest.mark.parametrize(("shape", "dtype"), [((2, 12, 32), torch.float64), ((2, 12, 31), torch.float32)])
def test_a_tensor_of_another_dtype_or_shape_names_the_vnode(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    network = analyse(gpt(tied=False))
    hosts = Hosts(network, Recipe(steps=1), token_rows(), placements(network)["units"])
    segment = next(s for s in hosts.segments if s.vnodes == ("attention0_norm",))
    ref = TensorRef(handle=hosts.table.put(torch.zeros(shape, dtype=dtype)), shape=shape, dtype="float32")
    with pytest.raises(ComputeError, match="VNode attention0_norm"):
        hosts.forward(segment, [ref], (), 1, 0)


def test_a_backward_pass_that_fails_keeps_nothing() -> None:
    network = analyse(gpt())
    hosts = Hosts(network, Recipe(steps=1), token_rows(), placements(network)["halves"])
    first = hosts.segments[0]
    done = hosts.forward(first, [hosts.rows_of("tokens", (0, 1))], (), 1, 0)
    assert done.saved is not None
    task = Backward(
        network=network,
        segment=first,
        saved=done.saved,
        states=hosts.of(first.states),
        grads=tuple(replace(ref, handle=Handle(10_000)) for ref in done.outputs),
        step=1,
        microbatch=0,
    )
    with pytest.raises(KeyError):
        hosts.executor.execute(task)
    with pytest.raises(KeyError):
        hosts.table.get(done.saved)


def test_weights_that_are_not_finite_are_told_by_name() -> None:
    hosts, _ = _one_segment()
    hosts.recipe = replace(hosts.recipe, optimizer=AdamW(lr=1e308), batch_size=8, microbatches=1, clip_norm=0.0)
    hosts.step(1)
    assert "attention0" in hosts.not_finite
