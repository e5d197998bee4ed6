"""Rules of the step machine: window, order, repetitions, the clipping fold, numbers that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import MetricSpec
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol.messages import SegmentTime
from dcnr.session.recipe import Recipe, grad_scale, root_mean_square, step_loss

A, B, C = VNodeId("a"), VNodeId("b"), VNodeId("c")
LOSS_1, LOSS_2 = VNodeId("loss_1"), VNodeId("loss_2")


def a_network() -> Graph:
    """Three layers with weights, named against the order of the file, and two costs."""
    graph = Graph("net")
    x = graph.input("x", [4], "float32")
    first = graph.linear(x, out_dim=4, id="c")
    second = graph.linear(first, out_dim=4, id="a")
    graph.cost("mse", second, target="y", weight=0.75, id="loss_1")
    graph.cost("mse", graph.linear(second, out_dim=4, id="b"), target="z", weight=0.25, id="loss_2")
    return graph


NETWORK = analyse(a_network().definition())
ORDER = tuple(v for v in NETWORK.vnodes if v in (A, B, C))


def a_machine(
    *,
    steps: int = 4,
    microbatches: int = 2,
    window: int = 3,
    clip_norm: float = 1.0,
    clip_scope: str = "network",
    base_step: int = 0,
    hosts: int = 2,
) -> StepMachine:
    placement = {v: "left" if hosts == 1 or v == C else "right" for v in NETWORK.vnodes}
    return StepMachine(
        network=NETWORK,
        segments=NETWORK.segments(placement),
        recipe=Recipe(
            steps=steps,
            batch_size=microbatches,
            microbatches=microbatches,
            clip_norm=clip_norm,
            clip_scope=clip_scope,
        ),
        base_step=base_step,
        window=window,
    )


def test_measured_times_are_means_and_a_repetition_does_not_count() -> None:
    machine = a_machine()
    assert machine.times == {}
    (first, second, _), (one, other) = opened(machine), segments()
    machine.done(one, *first, 1.0, 3.0)
    machine.done(one, *first, 9.0, 9.0)
    machine.done(one, *second, 2.0, 4.0)
    machine.done(99, *second, 1.0, 1.0)
    machine.done(one, 99, 0, 1.0, 1.0)
    assert machine.times == {
        one: SegmentTime(segment=one, peer=PeerId("left"), forward_s=1.5, backward_s=3.5, microbatches=2)
    }
    machine.done(other, *first, 5.0, 6.0)
    assert machine.times[other].peer == "right"


def opened(machine: StepMachine) -> list[tuple[int, int]]:
    found = []
    while machine.may_open():
        found.append(machine.open())
    return found


def segments(hosts: int = 2) -> list[int]:
    placement = {v: "left" if hosts == 1 or v == C else "right" for v in NETWORK.vnodes}
    return [s.index for s in NETWORK.segments(placement)]


def close(machine: StepMachine, step: int, microbatch: int) -> None:
    assert [machine.done(s, step, microbatch) for s in segments()][-1]


def finish(machine: StepMachine, step: int) -> list[tuple[int, float, float]]:
    """Everything that a step needs but its microbatches' ends."""
    for microbatch in range(machine.recipe.microbatches):
        machine.loss(LOSS_1, step, microbatch, 1.0)
        machine.loss(LOSS_2, step, microbatch, 2.0)
    for v in ORDER:
        machine.summary(step, v, 1.0, True)
    machine.close(step)
    for v in ORDER:
        machine.updated(step, v, True)
    return [(done.step, done.loss, done.scale) for done in machine.finish_steps()]


# --- window and order ---------------------------------------------------------------------------------------


def test_no_more_than_the_window_is_open() -> None:
    machine = a_machine(window=3)
    assert opened(machine) == [(1, 0), (1, 1), (2, 0)]
    assert not machine.done(segments()[0], 1, 0)
    assert not machine.may_open()
    assert machine.done(segments()[1], 1, 0)
    assert opened(machine) == [(2, 1)]


def test_microbatches_open_in_order_from_the_base_to_the_last_step() -> None:
    machine = a_machine(steps=4, window=100, base_step=2)
    assert (machine.next_step, machine.starts_step) == (3, True)
    assert opened(machine) == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert not machine.may_open()


def test_starts_step_holds_before_a_steps_first_microbatch_only() -> None:
    machine = a_machine(window=100)
    found = []
    while machine.may_open():
        starts = machine.starts_step
        _, microbatch = machine.open()
        found.append((starts, microbatch))
    assert all(starts == (microbatch == 0) for starts, microbatch in found)


def test_steps_are_done_in_order_though_their_reports_are_not() -> None:
    machine = a_machine(window=100)
    opened(machine)
    assert not finish(machine, 2)
    assert [step for step, _, _ in finish(machine, 1)] == [1, 2]
    assert machine.done_step == 2


def test_a_step_is_done_only_with_every_update_and_every_loss() -> None:
    machine = a_machine(window=100)
    opened(machine)
    for v in ORDER:
        machine.summary(1, v, 1.0, True)
    machine.close(1)
    for microbatch in range(2):
        machine.loss(LOSS_1, 1, microbatch, 1.0)
    machine.loss(LOSS_2, 1, 0, 2.0)
    for v in ORDER:
        machine.updated(1, v, True)
    assert not machine.finish_steps()
    machine.loss(LOSS_2, 1, 1, 2.0)
    assert len(machine.finish_steps()) == 1


# --- repetitions --------------------------------------------------------------------------------------------


def test_repetitions_and_what_was_never_opened_change_nothing() -> None:
    machine = a_machine(window=1)
    assert opened(machine) == [(1, 0)]
    assert not any(machine.done(s, 3, 0) for s in segments())
    first, second = segments()
    assert not machine.done(first, 1, 0)
    assert not machine.done(first, 1, 0), "one segment twice is not two"
    assert machine.done(second, 1, 0)
    assert not machine.done(second, 1, 0)
    machine.loss(LOSS_1, 9, 0, math.nan)
    machine.summary(9, A, math.nan, False)
    machine.updated(9, A, False)
    assert machine.not_finite(9) is None
    assert machine.close(9) is None


def test_a_step_is_closed_once_and_a_late_summary_does_not_alter_the_factor() -> None:
    machine = a_machine()
    opened(machine)
    for v in ORDER:
        assert machine.close(1) is None
        machine.summary(1, v, 4.0, True)
    scale = machine.close(1)
    assert scale == grad_scale([4.0] * 3, 1.0)
    machine.summary(1, A, 1e9, True)
    assert machine.close(1) is None
    assert machine.closed() == [(1, scale)]


def test_a_finished_step_hears_nothing_more() -> None:
    machine = a_machine()
    opened(machine)
    assert len(finish(machine, 1)) == 1
    assert not finish(machine, 1)
    assert machine.closed() == []


# --- what nobody asked for ----------------------------------------------------------------------------------

STRANGERS = tuple(VNodeId(f"stranger_{n}") for n in range(9))


def test_summaries_of_others_do_not_close_a_step_nor_updates_of_others_end_it() -> None:
    machine = a_machine()
    opened(machine)
    for v in (*STRANGERS, LOSS_1):
        machine.summary(1, v, 1.0, False)
        machine.updated(1, v, False)
    assert machine.close(1) is None
    assert machine.not_finite(1) is None
    for microbatch in (-1, 2, 77):
        for cost in (LOSS_1, LOSS_2, A):
            machine.loss(cost, 1, microbatch, math.nan)
    assert [step for step, _, _ in finish(machine, 1)] == [1]


@pytest.mark.parametrize("grad_sq", [-1.0, math.nan])
def test_a_square_that_cannot_be_is_not_finite(grad_sq: float) -> None:
    machine = a_machine()
    opened(machine)
    for v in ORDER:
        machine.summary(1, v, grad_sq if v == A else 1.0, True)
    assert machine.close(1) is None
    assert machine.not_finite(1) == A


def test_losses_whose_sum_is_too_large_are_not_finite() -> None:
    machine = a_machine(clip_norm=0.0)
    opened(machine)
    for microbatch in range(2):
        machine.loss(LOSS_1, 1, microbatch, 1.7e308)
        machine.loss(LOSS_2, 1, microbatch, 1.0)
    for v in ORDER:
        machine.updated(1, v, True)
    assert not machine.finish_steps()
    assert machine.not_finite(1) == LOSS_1


# --- the folds ----------------------------------------------------------------------------------------------


def test_squares_are_added_in_the_files_order_whatever_order_they_come_in() -> None:
    squares = {ORDER[0]: 1e16, ORDER[1]: 1.0, ORDER[2]: 1.0}
    expected = grad_scale([squares[v] for v in ORDER], 1.0)
    assert expected != grad_scale([squares[v] for v in reversed(ORDER)], 1.0), "the case shows nothing"
    for order in (ORDER, tuple(reversed(ORDER))):
        machine = a_machine()
        opened(machine)
        for v in order:
            machine.summary(1, v, squares[v], True)
        assert machine.close(1) == expected
    assert (C, A, B) == ORDER


@pytest.mark.parametrize(("clip_norm", "clip_scope"), [(0.0, "network"), (1.0, "vnode")])
def test_without_a_common_factor_no_close_is_needed(clip_norm: float, clip_scope: str) -> None:
    machine = a_machine(clip_norm=clip_norm, clip_scope=clip_scope)
    opened(machine)
    for microbatch in range(2):
        machine.loss(LOSS_1, 1, microbatch, 1.0)
        machine.loss(LOSS_2, 1, microbatch, 2.0)
    for v in ORDER:
        machine.updated(1, v, True)
    assert [(done.step, done.loss, done.scale) for done in machine.finish_steps()] == [
        (1, step_loss([[1.0, 1.0], [2.0, 2.0]], (0.75, 0.25)), 1.0)
    ]


def test_the_loss_is_folded_by_cost_and_microbatch_not_by_arrival() -> None:
    values = {(LOSS_1, 0): 0.1, (LOSS_1, 1): 0.7, (LOSS_2, 0): 1e8, (LOSS_2, 1): 0.3}
    expected = step_loss([[0.1, 0.7], [1e8, 0.3]], (0.75, 0.25))
    for order in (list(values), list(reversed(values))):
        machine = a_machine(clip_norm=0.0)
        opened(machine)
        for vnode, microbatch in order:
            machine.loss(vnode, 1, microbatch, values[vnode, microbatch])
        for v in ORDER:
            machine.updated(1, v, True)
        assert [done.loss for done in machine.finish_steps()] == [expected]


# --- not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_vnode_of_the_file_is_named_once_all_have_reported(bad: float) -> None:
    machine = a_machine()
    opened(machine)
    machine.summary(1, B, bad, False)
    machine.summary(1, A, bad, False)
    assert machine.not_finite(1) is None
    machine.summary(1, C, 1.0, True)
    assert machine.not_finite(1) == A
    assert machine.close(1) is None, "a step that is not finite is not closed"


@pytest.mark.parametrize(("clip_norm", "clip_scope"), [(0.0, "network"), (1.0, "vnode")])
def test_without_a_common_factor_it_is_named_once_all_have_updated(clip_norm: float, clip_scope: str) -> None:
    machine = a_machine(clip_norm=clip_norm, clip_scope=clip_scope)
    opened(machine)
    machine.updated(1, A, False)
    machine.updated(1, B, True)
    assert machine.not_finite(1) is None
    machine.updated(1, C, True)
    assert machine.not_finite(1) == A


def test_a_loss_that_is_not_finite_keeps_its_step_from_being_done() -> None:
    machine = a_machine(clip_norm=0.0)
    opened(machine)
    for microbatch in range(2):
        machine.loss(LOSS_1, 1, microbatch, 1.0)
        machine.loss(LOSS_2, 1, microbatch, math.nan)
    for v in ORDER:
        machine.updated(1, v, True)
    assert machine.not_finite(1) == LOSS_2
    assert not machine.finish_steps()


# --- metrics ------------------------------------------------------------------------------------------------


def a_measuring_machine() -> StepMachine:
    metrics = (
        MetricSpec(name="rms", type="activation_rms", node_id=A),
        MetricSpec(name="norm", type="weight_norm", node_id=B),
        MetricSpec(name="ratio", type="update_ratio", node_id=B),
    )
    network = analyse(replace(a_network().definition(), metrics=metrics))
    segments = network.segments(dict.fromkeys(network.vnodes, "here"))
    recipe = Recipe(steps=1, batch_size=2, microbatches=2)
    return StepMachine(network=network, segments=segments, recipe=recipe, base_step=0, window=2)


def test_a_step_waits_for_its_measured_activations_and_folds_them_in_order() -> None:
    machine = a_measuring_machine()
    opened(machine)
    machine.squares(1, 1, [("rms", 1e-16)])
    machine.squares(1, 1, [("rms", 1e-16)])
    machine.squares(1, 2, [("rms", 9.0)])
    machine.squares(1, 0, [("norm", 9.0), ("strange", 9.0)])
    machine.metrics(1, [("norm", 2.5), ("ratio", math.nan), ("rms", 9.0), ("strange", 9.0)])
    assert not finish(machine, 1)
    machine.squares(1, 0, [("rms", 1.0)])
    (done,) = machine.finish_steps()
    assert dict(done.metrics) == {"rms": root_mean_square([1.0, 1e-16], 8), "norm": 2.5}
    assert list(done.metrics) == ["rms", "norm"]
