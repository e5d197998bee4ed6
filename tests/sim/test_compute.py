"""The hash chains do not know how a network is split; the executor's checks can fail."""

from __future__ import annotations

import random

import pytest

from dcnr.ids import VNodeId
from dcnr.machine import Handle, TensorRef
from dcnr.network.analysis import Network, analyse
from dcnr.pnode.tasks import Backward, Forward, Load, Summarize, Update
from dcnr.protocol.messages import Direction
from dcnr.session.recipe import Recipe, grad_scale
from dcnr.session.rows import microbatch_rows
from dcnr.sim.compute import Oracle, Rows, rows_digest
from dcnr.sim.faults import scenario
from dcnr.sim.run import dataset
from dcnr.sim.tensors import Table
from dcnr.sim.violation import Violation
from dcnr.sim.worker import Executor


class _Split:
    """Runs a session over a random placement in one loop, without machines."""

    def __init__(self, seed: int, hosts: int) -> None:
        plan = scenario(seed)
        self.network: Network = analyse(plan.definition)
        self.recipe: Recipe = plan.recipe
        manifest = dataset(plan.context)
        self.rows = Rows(dataset=manifest.id, rows_train=manifest.rows("train", plan.context))
        self.oracle = Oracle(self.network, self.recipe, self.rows)
        draw = random.Random(seed)
        placement = {}
        for unit in self.network.placement_units():
            host = f"host-{draw.randrange(hosts)}"
            for group in unit:
                placement.update(dict.fromkeys(self.network.groups[group].vnodes, host))
        self.segments = self.network.segments(placement)
        self.table = Table()
        self.executor = Executor(self.table, (self.oracle,))
        self.states = {
            v: self.executor.execute(
                Load(network=self.network, recipe=self.recipe, vnode=v, source=None, training=True)
            ).state
            for v in self.oracle.kernels.stateful
        }

    def of(self, vnodes: tuple[VNodeId, ...]) -> tuple[tuple[VNodeId, Handle], ...]:
        return tuple((v, self.states[v]) for v in vnodes)

    def microbatch(self, step: int, microbatch: int) -> None:
        definition, recipe = self.network.definition, self.recipe
        wanted = microbatch_rows(
            step=step,
            microbatch=microbatch,
            batch_size=recipe.batch_size,
            rows=recipe.rows,
            total=self.rows.rows_train,
            seed=recipe.seed,
        )

        def column(name: str) -> TensorRef:
            value = rows_digest(self.rows.dataset, "train", wanted, name)
            return self.table.tensor(value, name, (1,), "int64", None)

        edges: dict[int, TensorRef] = {}
        saved: dict[int, Handle | None] = {}
        for segment in self.segments:
            inputs = [edges[e] for e in segment.in_edges]
            inputs += [column(definition.inputs[i].column) for i in segment.inputs]
            inputs += [column(definition.costs[c].target) for c in segment.costs]
            done = self.executor.execute(
                Forward(
                    network=self.network,
                    recipe=recipe,
                    segment=segment,
                    states=self.of(segment.states),
                    inputs=tuple(inputs),
                    valid_targets=(1,) * len(segment.costs),
                    step=step,
                    microbatch=microbatch,
                    first_row=microbatch * recipe.rows,
                    training=True,
                )
            )
            edges.update(zip(segment.out_edges, done.outputs, strict=True))
            saved[segment.index] = done.saved
            for edge, ref in zip(segment.out_edges, done.outputs, strict=True):
                assert ref.digest == self.oracle.tensors[edge, Direction.FORWARD, step, microbatch]
        gradients: dict[int, TensorRef] = {}
        for segment in reversed(self.segments):
            kept = saved[segment.index]
            if kept is None:
                continue
            back = self.executor.execute(
                Backward(
                    network=self.network,
                    segment=segment,
                    saved=kept,
                    states=self.of(segment.states),
                    grads=tuple(gradients[e] for e in segment.grads_in),
                    step=step,
                    microbatch=microbatch,
                )
            )
            gradients.update(zip(segment.grads_out, back.grads, strict=True))
            for edge, ref in zip(segment.grads_out, back.grads, strict=True):
                assert ref.digest == self.oracle.tensors[edge, Direction.BACKWARD, step, microbatch]

    def close(self, step: int) -> None:
        states = self.of(self.oracle.kernels.updated)
        done = self.executor.execute(Summarize(network=self.network, states=states, step=step))
        squares = [square for _, square, _ in done.summaries]
        scale = grad_scale(squares, self.recipe.clip_norm) if self.recipe.clips_network else 1.0
        assert scale == self.oracle.scales[step]
        self.executor.execute(
            Update(network=self.network, recipe=self.recipe, states=states, step=step, grad_scale=scale)
        )


@pytest.mark.parametrize("seed", range(30))
def test_no_split_changes_a_digest(seed: int) -> None:
    split = _Split(seed, hosts=1 + seed % 4)
    for step in (1, 2):
        split.oracle.state(step)
        for microbatch in range(split.recipe.microbatches):
            split.microbatch(step, microbatch)
        split.close(step)
    final = {v: split.table.get(h).weights for v, h in split.states.items()}
    assert final == split.oracle.state(2)


def test_an_update_before_all_microbatches_is_seen() -> None:
    seed = next(s for s in range(100) if scenario(s).recipe.microbatches > 1)
    split = _Split(seed, hosts=1)
    split.oracle.state(1)
    split.microbatch(1, 0)
    with pytest.raises(Violation, match="UpdateOnce"):
        split.close(1)


def test_a_wrong_scale_is_seen() -> None:
    split = _Split(1, hosts=1)
    for microbatch in range(split.recipe.microbatches):
        split.oracle.state(1)
        split.microbatch(1, microbatch)
    states = split.of(split.oracle.kernels.updated)
    with pytest.raises(Violation, match="Oracle"):
        split.executor.execute(
            Update(network=split.network, recipe=split.recipe, states=states, step=1, grad_scale=0.123)
        )


def test_a_handle_released_twice_is_seen() -> None:
    table = Table()
    handle = table.put("x", "test", 1)
    table.release(handle)
    with pytest.raises(Violation, match="BoundedConserved"):
        table.release(handle)


def test_the_order_of_summands_shows() -> None:
    """Otherwise a machine that adds in arrival order would go unseen."""
    shown = 0
    for seed in range(40):  # Those with two sessions are short.
        oracle = _Split(seed, hosts=1).oracle
        for step in range(1, oracle.recipe.steps + 1):
            oracle.state(step)
            squares = [oracle.grad_squares[v, step] for v in oracle.kernels.updated]
            shown += grad_scale(squares, 1.0) != grad_scale(squares[::-1], 1.0)
    assert shown > 20
