"""Green, yellow, red as a function of time; a paused observer condemns nobody."""

from __future__ import annotations

import pytest

from dcnr.config import Limits
from dcnr.machine import Instant
from dcnr.membership.liveness import Colour, Pulse
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage

LIMITS = Limits(heartbeat_interval_s=1.0, yellow_after_s=3.0, red_after_s=10.0, link_grace_s=2.0)


def pulse(down_since: float | None = None) -> Pulse:
    return Pulse(heard_at=Instant(100.0), down_since=None if down_since is None else Instant(down_since))


@pytest.mark.parametrize(
    ("silent_s", "colour"),
    [(0.0, Colour.GREEN), (3.0, Colour.GREEN), (3.1, Colour.YELLOW), (10.0, Colour.YELLOW), (10.1, Colour.RED)],
)
def test_silence_turns_green_to_yellow_to_red(silent_s: float, colour: Colour) -> None:
    assert pulse().colour(Instant(100.0 + silent_s), LIMITS) is colour


@pytest.mark.parametrize(("down_s", "colour"), [(0.0, Colour.YELLOW), (2.0, Colour.YELLOW), (2.1, Colour.RED)])
def test_a_closed_link_is_yellow_and_red_when_it_is_not_dialled_again(down_s: float, colour: Colour) -> None:
    assert pulse(down_since=101.0).colour(Instant(101.0 + down_s), LIMITS) is colour


@pytest.mark.parametrize("down_since", [None, 101.0, 109.0])
def test_the_deadline_is_just_after_it_turns_red(down_since: float | None) -> None:
    found = pulse(down_since)
    deadline = found.deadline(LIMITS)
    assert found.colour(deadline, LIMITS) is Colour.RED
    assert found.colour(Instant(deadline - 0.01), LIMITS) is not Colour.RED


def test_a_pause_of_the_observer_moves_everything() -> None:
    found = pulse(down_since=101.0)
    before = found.deadline(LIMITS)
    found.shift(60.0)
    assert found.deadline(LIMITS) == pytest.approx(before + 60.0)
    assert found.colour(Instant(161.5), LIMITS) is Colour.YELLOW


# --- whole processes ----------------------------------------------------------------------------------------


def a_run(seed: int) -> Stage:
    stage = Stage(pnodes=2, recipe=Recipe(steps=4, batch_size=1, microbatches=1, checkpoint_every=2), seed=seed)
    stage.run_until("orchestrator tells: step_done step=1")
    return stage


@pytest.mark.parametrize("pause_us", [700_000, 4_000_000, 20_000_000])
def test_an_orchestrator_that_was_paused_condemns_nobody(pause_us: int) -> None:
    """Its PNodes have been computing and beating all the while; it hears that late and at once."""
    stage = a_run(1)
    stage.world.pause(stage.orchestrator)
    stage.world.after(pause_us, lambda: stage.world.unpause(stage.orchestrator))
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert not [line for line in stage.lines if "pnode_gone" in line or "Rollback" in line]


@pytest.mark.parametrize("seed", [*range(5), 17, 26, 27, 31, 35])
def test_nor_when_its_links_broke_meanwhile(seed: int) -> None:
    """The PNodes have dialled in vain for twenty seconds, so their pauses are as long as they get. The last five seeds
    had a rollback while these could be longer than the grace."""
    stage = a_run(seed)
    stage.world.pause(stage.orchestrator)
    for link in stage.world.network.links():
        if stage.orchestrator in (link.dialler, link.acceptor):
            stage.world.network.break_link(link, "reset")
    stage.world.after(20_000_000, lambda: stage.world.unpause(stage.orchestrator))
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert not [line for line in stage.lines if "pnode_gone" in line or "Rollback" in line]


def test_a_pnode_that_is_killed_is_missed_after_the_grace_and_one_that_is_paused_after_the_silence() -> None:
    for kill, most_s in ((True, Limits().link_grace_s + 0.6), (False, Limits().red_after_s + 1.1)):
        stage = a_run(1)
        world = stage.world
        since = world.now_us
        if kill:
            stage.kill(stage.pnodes[1])
        else:
            world.watch.causes += 1
            world.pause(stage.pnodes[1])
        stage.run_until("orchestrator tells: pnode_gone")
        assert (world.now_us - since) / 1e6 < most_s
