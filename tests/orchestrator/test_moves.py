"""Hosts that leave, or are drained: the session goes on elsewhere and no step is withdrawn."""

from __future__ import annotations

from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import PeerId
from dcnr.protocol import messages as m
from dcnr.session.log import Base, Entry
from dcnr.sim.world import Process
from tests.orchestrator.test_marks import (
    ENDLESS,
    OFTEN,
    a_stage,
    bases,
    entries,
    finished_well,
    kinds,
    marked,
    owner_at,
    session_of,
    steps_told,
    told,
)
from tests.scenarios.stage import Stage

RARELY = Limits(mark_least_s=1e6)
"""Marks that nothing but a move asks for."""


def hosts(stage: Stage) -> set[str]:
    placed = {spot.peer for spot in stage.checkers.fold.placement.values()}
    return {process.name for process in stage.pnodes if process.peer in placed}


def moves(stage: Stage) -> list[Entry]:
    return [entry for entry in entries(stage) if entry.kind.value == "Move"]


def gone(stage: Stage, process: Process) -> None:
    stage.run_till(lambda: process.machine is None, f"{process.name} is gone")


def drain(stage: Stage, peer: PeerId, on: bool = True) -> Any:
    replies: list[Any] = []
    stage.world.request(stage.orchestrator, m.DrainNode(peer=peer, on=on), lambda reply, last: replies.append(reply))
    stage.run_till(lambda: bool(replies), "an answer")
    return replies[0]


def opened_beyond(stage: Stage, since: int, step: int) -> list[str]:
    return [
        line
        for line in stage.lines[since:]
        if ": OpenMicrobatch " in line and int(line.split("step=")[1].split()[0]) > step
    ]


# --- leaving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [OFTEN, RARELY], ids=["often", "rarely"])
@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_host_that_leaves_moves_away_and_no_step_is_withdrawn(leaver: int, limits: Limits) -> None:
    stage = a_stage(limits=limits)
    process = stage.pnodes[leaver]
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(process)
    stage.run_till(lambda: bool(moves(stage)), "a move")
    (move,) = moves(stage)
    (base,) = bases(stage, "Move")
    assert base == max(steps_told(stage))
    assert process.name not in hosts(stage)
    gone(stage, process)
    finished_well(stage)
    assert "Rollback" not in kinds(stage)
    assert Base.from_json(move.body["folded"]["base"]).step == base
    assert any("it left" in line or "pnode_gone" in line for line in stage.lines)


def test_nothing_is_opened_beyond_the_step_that_is_moved() -> None:
    """Whoever leaves computes nothing for naught."""
    stage = a_stage(limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    since = len(stage.lines)
    stage.run_till(lambda: bool(moves(stage)), "a move")
    (base,) = bases(stage, "Move")
    assert not opened_beyond(stage, since, base)
    assert base <= 5 + 4  # What was open, and one step more.


def test_two_leave_one_after_another() -> None:
    stage = a_stage(pnodes=4)
    for number, process in enumerate(stage.pnodes[:2], start=1):
        stage.run_until(f"orchestrator tells: step_done step={8 * number}")
        stage.leave(process)
        gone(stage, process)
    finished_well(stage)
    assert kinds(stage).count("Move") == 2
    assert "Rollback" not in kinds(stage)
    assert hosts(stage) == {"pnode-3", "pnode-4"}


def test_two_leave_at_once() -> None:
    stage = a_stage(pnodes=4)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.leave(stage.pnodes[3])
    gone(stage, stage.pnodes[0])
    gone(stage, stage.pnodes[3])
    finished_well(stage)
    assert "Rollback" not in kinds(stage)
    assert 1 <= kinds(stage).count("Move") <= 2
    assert hosts(stage) == {"pnode-2", "pnode-3"}


def test_all_but_one_leave_one_after_another() -> None:
    stage = a_stage(60)
    for number, process in enumerate(stage.pnodes[:2], start=1):
        stage.run_until(f"orchestrator tells: step_done step={12 * number}")
        stage.leave(process)
        gone(stage, process)
    finished_well(stage)
    assert "Rollback" not in kinds(stage)
    assert hosts(stage) == {"pnode-3"}


@pytest.mark.parametrize("limits", [OFTEN, RARELY], ids=["often", "rarely"])
def test_where_every_step_is_a_checkpoint_a_commit_is_what_is_moved(limits: Limits) -> None:
    stage = a_stage(checkpoint_every=1, limits=limits)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[1])
    gone(stage, stage.pnodes[1])
    finished_well(stage)
    assert kinds(stage).count("Move") == 1
    assert "Rollback" not in kinds(stage)
    (base,) = bases(stage, "Move")
    before = entries(stage)[: kinds(stage).index("Move")]
    assert base in [int(e.body["step"]) for e in before if e.kind.value == "Commit"]


def test_a_leaver_that_is_alone_is_told_so_and_exits_at_once() -> None:
    stage = a_stage(ENDLESS, pnodes=1)
    stage.run_until("orchestrator tells: step_done step=5")
    at_us = stage.world.now_us
    stage.leave(stage.pnodes[0])
    gone(stage, stage.pnodes[0])
    assert (stage.world.now_us - at_us) / 1e6 < 2.0
    assert any(": MoveRefused" in line for line in stage.lines)
    assert len(told(stage, "no_place_to_move")) == 1
    stage.start(stage.pnodes[0])
    stage.run_until("orchestrator tells: step_done step=6")
    assert "Move" not in kinds(stage)


def test_a_pnode_that_hosts_nothing_exits_at_once() -> None:
    stage = a_stage(ENDLESS)
    spare = stage.pnodes[2]
    stage.run_until(f"{spare.name} starts as boot 1")
    stage.kill(spare)
    stage.run_until("log 2: Place")
    stage.start(spare)
    stage.run_for(1.0)
    at_us = stage.world.now_us
    stage.leave(spare)
    gone(stage, spare)
    assert (stage.world.now_us - at_us) / 1e6 < 0.1
    stage.run_for(1.0)
    assert kinds(stage) == ["Acquire", "Place"]


def test_a_leaver_is_told_twice_and_exits_at_once() -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.leave(stage.pnodes[0])
    stage.run_for(0.001)
    assert stage.pnodes[0].machine is None
    finished_well(stage)
    assert kinds(stage).count("Rollback") == 1


def test_a_leaver_whose_owner_does_not_answer_loses_patience() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.world.pause(stage.orchestrator)
    at_us = stage.world.now_us
    stage.leave(stage.pnodes[0])
    gone(stage, stage.pnodes[0])
    waited_s = (stage.world.now_us - at_us) / 1e6
    assert waited_s <= stage.limits.leave_patience_s + 1.0


# --- trouble ------------------------------------------------------------------------------------------------


def test_a_loss_while_a_move_is_under_way_is_a_rollback() -> None:
    stage = a_stage(pnodes=4, limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.run_till(lambda: bool(told(stage, "moving")), "a move is under way")
    stage.kill(stage.pnodes[2])
    finished_well(stage)
    assert kinds(stage).count("Rollback") >= 1
    assert stage.pnodes[0].machine is None
    assert hosts(stage) == {"pnode-2", "pnode-4"}


def test_a_loss_right_after_a_move_begins_from_what_was_moved() -> None:
    """The leaver is still there to give what it kept."""
    stage = a_stage(pnodes=4, limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.run_till(lambda: bool(moves(stage)), "a move")
    (base,) = bases(stage, "Move")
    stage.kill(stage.pnodes[2])
    finished_well(stage)
    assert set(bases(stage)) <= {base, 0}
    assert bases(stage)[0] == base


def test_a_leaver_that_dies_before_it_has_moved_is_a_loss() -> None:
    stage = a_stage(limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.run_till(lambda: bool(told(stage, "moving")), "a move is under way")
    stage.kill(stage.pnodes[0])
    finished_well(stage)
    assert kinds(stage).count("Rollback") == 1
    assert "Move" not in kinds(stage)


def test_a_full_disk_where_a_move_needs_it_is_tried_again() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    for process in stage.pnodes:
        process.full = True
    stage.leave(stage.pnodes[0])
    stage.run_till(lambda: bool(told(stage, "mark_failed")), "a mark fails")
    done = len(steps_told(stage))
    stage.run_for(1.5)
    assert len(steps_told(stage)) > done
    for process in stage.pnodes:
        process.full = False
    stage.run_till(lambda: bool(moves(stage)), "a move")
    gone(stage, stage.pnodes[0])
    assert "Rollback" not in kinds(stage)


def test_the_owner_restarts_while_a_host_leaves() -> None:
    """It hears again from the host that it leaves, and moves it then."""
    stage = a_stage(60, limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    stage.run_till(lambda: bool(told(stage, "leaving")), "it leaves")
    stage.kill(stage.orchestrator)
    stage.start(stage.orchestrator)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.client.seen == 60
    assert stage.pnodes[0].machine is None


@pytest.mark.parametrize("ticketed", [0, 1], ids=["before any ticket", "between two tickets"])
@pytest.mark.parametrize("restarted", ["", "at once", "late"], ids=["succeeded", "restarted", "restarted, links late"])
@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_an_owner_that_dies_between_a_move_and_its_tickets_costs_no_step(
    ticketed: int, restarted: str, leaver: int
) -> None:
    """Who keeps the states of the base is in the log: only PNodes have them."""
    stage = a_stage(40, pnodes=4, orchestrators=1 if restarted else 2, limits=RARELY)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[leaver])
    stage.run_till(lambda: bool(moves(stage)), "a move")
    since = len(stage.lines)
    if ticketed:
        stage.run_till(lambda: any(": TicketAnswer " in line for line in stage.lines[since:]), "a host has its tickets")
    stage.kill(stage.orchestrator)
    if restarted:
        network = stage.world.network
        for process in stage.pnodes if restarted == "late" else ():
            network.cut(stage.orchestrator, process)
        stage.start(stage.orchestrator)
        if restarted == "late":
            stage.run_for(1.0)
            for process in stage.pnodes:
                network.heal(stage.orchestrator, process)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.client.seen == 40
    assert "Rollback" not in kinds(stage)
    (move,) = moves(stage)
    assert move.body["folded"]["keepers"]


# --- draining -----------------------------------------------------------------------------------------------


def test_a_drained_pnode_gives_up_its_vnodes_and_stays() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    reply = drain(stage, stage.pnodes[1].peer)
    assert (reply.peer, reply.on) == (stage.pnodes[1].peer, True)
    stage.run_till(lambda: bool(moves(stage)), "a move")
    assert hosts(stage) == {"pnode-1", "pnode-3"}
    stage.run_for(2.0)
    assert stage.pnodes[1].machine is not None
    assert kinds(stage) == ["Acquire", "Place", "Move"]
    assert owner_at(stage).running


def test_a_drained_pnode_is_of_use_again_when_that_is_undone() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    drain(stage, stage.pnodes[1].peer)
    stage.run_till(lambda: bool(moves(stage)), "a move")
    stage.run_for(0.5)
    drain(stage, stage.pnodes[1].peer, on=False)
    stage.run_till(lambda: bool(told(stage, "of_use_again")), "it is of use again")
    stage.kill(stage.pnodes[2])
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    assert hosts(stage) == {"pnode-1", "pnode-2"}


def test_draining_is_refused_for_an_unknown_pnode() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=2")
    reply = drain(stage, PeerId("f" * 32))
    assert isinstance(reply, m.Refusal)
    assert "f" * 32 in reply.reason


def test_what_is_drained_gets_nothing_of_a_new_placement() -> None:
    stage = a_stage(ENDLESS, client_at_s=1.0)
    stage.run_for(0.5)
    drain(stage, stage.pnodes[0].peer)
    stage.run_until("log 2: Place")
    assert hosts(stage) == {"pnode-2", "pnode-3"}


# --- coming back --------------------------------------------------------------------------------------------


def test_a_pnode_that_left_comes_back_and_takes_vnodes_again() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    stage.leave(stage.pnodes[0])
    gone(stage, stage.pnodes[0])
    stage.start(stage.pnodes[0])
    stage.run_for(1.0)
    assert "Rollback" not in kinds(stage)
    stage.leave(stage.pnodes[1])
    gone(stage, stage.pnodes[1])
    assert kinds(stage).count("Move") == 2
    assert hosts(stage) == {"pnode-1", "pnode-3"}


def test_a_rolling_restart_of_everything_withdraws_no_step() -> None:
    stage = a_stage(ENDLESS)
    stage.run_until("orchestrator tells: step_done step=5")
    for process in stage.pnodes:
        stage.leave(process)
        gone(stage, process)
        stage.start(process)
        stage.run_for(1.0)
    stage.kill(stage.orchestrator)
    stage.start(stage.orchestrator)
    stage.run_till(lambda: bool(told(stage, "adopted")), "adoption")
    stage.run_for(1.0)
    assert "Rollback" not in kinds(stage)
    assert kinds(stage).count("Move") == 3
    assert stage.client.seen > 5
    assert session_of(stage)
    marked(stage, stage.client.seen)
