"""A session moves to a better placement only where the rest of the run gains far more than the move costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.config import Limits
from dcnr.orchestrator.placement import solve
from dcnr.session.log import Entry
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage


def a_stage(gflops: float, *, cost_s: float) -> Stage:
    """One slow PNode trains; another one comes later."""
    limits = Limits(rebalance_every_s=1.0, move_cost_s=cost_s)
    stage = Stage(
        pnodes=2,
        recipe=Recipe(steps=200, batch_size=1, microbatches=1, checkpoint_every=0),
        limits=limits,
        compute_s=0.02,
    )
    stage.world.planner = solve
    late = stage.pnodes[1]
    late.capabilities = replace(late.capabilities, gflops=gflops)
    stage.run_until(f"{late.name} starts as boot 1")
    stage.kill(late)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.start(late)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    return stage


def kinds(stage: Stage) -> list[str]:
    return [Entry.from_bytes(entry).kind.value for entry in stage.entries()]


def test_a_far_better_pnode_is_moved_to_without_a_step_withdrawn() -> None:
    stage = a_stage(1000.0, cost_s=0.1)
    assert kinds(stage) == ["Acquire", "Place", "Move", "Commit", "Finish"]
    hosts = {spot[0] for spot in Entry.from_bytes(stage.entries()[2]).body["folded"]["placement"].values()}
    assert hosts == {stage.pnodes[1].peer}
    assert sum("rebalancing" in line for line in stage.lines) == 1


@pytest.mark.parametrize(("gflops", "cost_s"), [(11.0, 0.1), (1000.0, 1000.0)], ids=["hardly better", "too dear"])
def test_nothing_moves_where_that_gains_too_little(gflops: float, cost_s: float) -> None:
    assert kinds(a_stage(gflops, cost_s=cost_s)) == ["Acquire", "Place", "Commit", "Finish"]
