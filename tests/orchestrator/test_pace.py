"""How often a state is saved: Young's interval, and the commits that it adds to those of the recipe."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnr.config import Limits
from dcnr.machine import Instant
from dcnr.orchestrator.pace import Pace
from dcnr.session.log import Entry
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage

LEAST_S, PRIOR_S, FACTOR = 1.0, 600.0, 20.0


def pause_s(cost_s: float, elapsed_s: float = 1000.0, losses: int = 0, factor: float = math.inf) -> float:
    pace = Pace(Instant(0.0), prior_s=PRIOR_S, least_s=LEAST_S, cost_factor=factor)
    for _ in range(losses):
        pace.lost()
    pace.saved(Instant(elapsed_s), cost_s)
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if pace.due(Instant(elapsed_s + middle)) else (middle, high)
    return high


@given(
    cost_s=st.floats(0.02, 100.0),
    elapsed_s=st.floats(0.0, 1e6),
    losses=st.integers(0, 1000),
    factor=st.sampled_from((FACTOR, math.inf)),
)
def test_the_pause_is_youngs_interval_within_its_bounds(
    cost_s: float, elapsed_s: float, losses: int, factor: float
) -> None:
    young_s = math.sqrt(2 * cost_s * (elapsed_s + PRIOR_S) / (losses + 1))
    expected = max(LEAST_S, min(young_s, factor * cost_s))
    assert pause_s(cost_s, elapsed_s, losses, factor) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_losses_make_saves_more_frequent_and_cost_makes_them_rarer() -> None:
    assert pause_s(1.0, losses=15) == pytest.approx(pause_s(1.0) / 4)
    assert pause_s(4.0) == pytest.approx(2 * pause_s(1.0))
    assert pause_s(0.5, 1e6, factor=FACTOR) == pytest.approx(0.5 * FACTOR)
    assert pause_s(0.0, factor=math.inf) == pytest.approx(LEAST_S)


def test_a_save_that_failed_is_put_off() -> None:
    pace = Pace(Instant(0.0), prior_s=PRIOR_S, least_s=LEAST_S)
    assert not pace.due(Instant(0.9))
    assert pace.due(Instant(1.0))
    pace.put_off(Instant(60.0))
    assert not pace.due(Instant(59.9))


# --- commits ------------------------------------------------------------------------------------------------


def a_run(*, checkpoint_every: int, steps: int = 100, kills: int = 0, limits: Limits) -> tuple[list[int], list[int]]:
    """Steps of 0.6 s and more on the only PNode, so that a loss goes back to a commit. Steps of the commits, and those
    from which it was placed anew."""
    recipe = Recipe(steps=steps, batch_size=1, microbatches=1, checkpoint_every=checkpoint_every)
    stage = Stage(pnodes=1, recipe=recipe, limits=limits, compute_s=0.2)
    for kill in range(kills):
        stage.run_until(f"orchestrator tells: step_done step={10 * (kill + 1)}")
        stage.kill(stage.pnodes[0])
        stage.start(stage.pnodes[0])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    entries = [Entry.from_bytes(entry) for entry in stage.entries()]
    return (
        [int(e.body["step"]) for e in entries if e.kind.value == "Commit"],
        [int(e.body["folded"]["base"][0]) for e in entries if e.kind.value == "Rollback"],
    )


def test_slow_steps_are_committed_more_often_than_the_recipe_asks() -> None:
    commits, _ = a_run(checkpoint_every=150, steps=200, limits=Limits())
    assert {150, 200} < set(commits)
    early = [step for step in commits if step not in (150, 200)]
    assert 1 <= len(early) <= 5, "half a minute apart at least"


def test_without_checkpoints_there_is_none_but_the_last() -> None:
    assert a_run(checkpoint_every=0, limits=Limits())[0] == [100]


def test_losses_that_go_back_to_a_commit_make_commits_more_frequent() -> None:
    limits = Limits(commit_least_s=1.0, fallback_prior_s=20_000.0)
    calm, _ = a_run(checkpoint_every=1000, limits=limits)
    rough, bases = a_run(checkpoint_every=1000, kills=6, limits=limits)
    assert len(bases) == 6
    assert len(rough) > 1.5 * len(calm)
    calm_gap = max(b - a for a, b in itertools.pairwise((0, *calm)))
    assert 60 - bases[-1] < calm_gap, "the last loss cost less than it would have at the calm pace"


@pytest.mark.parametrize("least_s", [38.0, 40.5, 41.2, 42.0, 42.6])
def test_an_early_commit_does_not_displace_what_the_recipe_asks_for(least_s: float) -> None:
    """At which steps a session is evaluated must not depend on how fast machines are."""
    recipe = Recipe(steps=120, batch_size=1, microbatches=1, checkpoint_every=55, eval_every=55, eval_batches=1)
    stage = Stage(pnodes=1, recipe=recipe, limits=Limits(commit_least_s=least_s), compute_s=0.2)
    stage.slow_store(0.4)
    stage.run_to_end()
    commits = [Entry.from_bytes(entry) for entry in stage.entries()]
    assert {55, 110, 120} <= {int(entry.body["step"]) for entry in commits if entry.kind.value == "Commit"}
    evaluated = [line.rpartition("step=")[2].split()[0] for line in stage.lines if "tells: evaluated" in line]
    assert evaluated == ["55", "110", "120"]
