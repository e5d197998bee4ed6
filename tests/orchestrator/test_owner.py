"""What an owner tells its followers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.ids import SessionId
from dcnr.network.types import catalogue_digest
from dcnr.orchestrator.placement import Placement, Problem
from dcnr.protocol import messages as m
from dcnr.session.log import Entry, manifest_key
from dcnr.session.recipe import Recipe
from dcnr.sim.world import Process
from tests.scenarios.stage import Stage, halves


def a_stage(classes: tuple[str, ...]) -> Stage:
    stage = Stage(pnodes=len(classes), recipe=Recipe(steps=3, batch_size=1, microbatches=1, checkpoint_every=1))
    for process, numeric_class in zip(stage.pnodes, classes, strict=True):
        process.capabilities = replace(process.capabilities, numeric_class=numeric_class)
    return stage


def exactness(stage: Stage) -> list[str]:
    return [line.partition("exactness_lost ")[2] for line in stage.lines if "exactness_lost" in line]


def test_a_first_placement_over_several_classes_loses_exactness() -> None:
    stage = a_stage(("a", "b"))
    stage.run_to_end()
    assert exactness(stage) == ["index=2 new=a,b"]


def test_one_class_keeps_it() -> None:
    stage = a_stage(("a", "a"))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.pnodes[0])
    stage.run_to_end()
    assert not exactness(stage)


def test_a_move_to_another_class_loses_it() -> None:
    stage = a_stage(("a", "b"))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.pnodes[0])
    stage.run_to_end()
    assert exactness(stage) == ["index=2 new=a,b", "index=4 old=a,b new=b"]


def test_admission_and_placement_know_the_node_types_of_session_and_pnodes() -> None:
    stage = a_stage(("a", "a"))
    for process, catalogue in zip(stage.pnodes, ("one", "other"), strict=True):
        process.capabilities = replace(process.capabilities, catalogue=catalogue)
    asked: list[Problem] = []

    def planner(problem: Problem) -> Placement | str:
        asked.append(problem)
        return halves(problem)

    stage.world.planner = planner
    stage.run_until("log 2: Place")
    assert len(asked) == 2
    for problem in asked:
        assert problem.catalogue == catalogue_digest()
        assert {c.catalogue for c in problem.candidates} == {"one", "other"}


# --- what is written meanwhile ------------------------------------------------------------------------------


def kinds(stage: Stage) -> list[str]:
    return [Entry.from_bytes(entry).kind.value for entry in stage.entries()]


def a_spare(stage: Stage, process: Process) -> None:
    """It comes after the placement, so it hosts nothing."""
    stage.run_until(f"{process.name} starts as boot 1")
    stage.kill(process)
    stage.run_until("log 2: Place")
    stage.start(process)


def test_a_host_that_goes_while_a_commit_is_written_is_replaced_whoever_goes_next() -> None:
    stage = Stage(pnodes=3, recipe=Recipe(steps=3, batch_size=1, microbatches=1, checkpoint_every=1))
    a_spare(stage, stage.pnodes[2])
    stage.run_until(
        "pnode-1 -> orchestrator: Stored step=1 vnode=linear_0 instance=2",
        "pnode-2 -> orchestrator: Stored step=1 vnode=output instance=2",
    )
    stage.run_for(0.0015)  # They arrive, and the manifest is on its way.
    stage.slow_store(4.0)
    stage.kill(stage.pnodes[0])
    stage.run_until("orchestrator tells: pnode_lost")
    stage.kill(stage.pnodes[2])
    stage.run_until("log 3: Commit")
    stage.slow_store(0.002)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert kinds(stage)[2:4] == ["Commit", "Rollback"]


def test_a_host_that_goes_while_the_stop_is_written_does_not_start_the_session_again() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.slow_store(4.0)
    stage.client.control("stop")
    stage.kill(stage.pnodes[0])
    stage.run_to_end()
    stage.run_for(20.0)
    assert kinds(stage) == ["Acquire", "Place", "Stop"]


def test_a_stop_while_the_session_is_acquired_is_obeyed() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.orchestrator)
    stage.start(stage.orchestrator)
    stage.run_until("orchestrator tells: pnode_registered")
    stage.slow_store(1.0)
    stage.client.control("stop")
    stage.run_to_end()
    stage.run_for(20.0)
    assert kinds(stage) == ["Acquire", "Place", "Acquire", "Stop"]


def test_a_stop_right_after_a_resume_is_obeyed() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.client.control("stop")
    stage.run_to_end()
    stage.slow_store(1.0)
    stage.client.control("resume")
    stage.run_until("log 4: Resume")
    session = stage.checkers.session
    stop = m.ControlSession(session=session or SessionId(""), action="stop")
    stage.world.request(stage.orchestrator, stop, lambda reply, last: None)
    stage.run_for(20.0)
    assert kinds(stage) == ["Acquire", "Place", "Stop", "Resume", "Stop"]


def test_a_host_that_goes_while_a_resume_is_written_is_not_placed_for_twice() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.client.control("stop")
    stage.run_to_end()
    stage.world.store.read_only = True
    session = stage.checkers.session
    resume = m.ControlSession(session=session or SessionId(""), action="resume")
    stage.world.request(stage.orchestrator, resume, lambda reply, last: None)
    stage.run_for(0.5)
    stage.kill(stage.pnodes[0])
    stage.run_until("orchestrator tells: pnode_gone")
    stage.run_for(0.5)
    stage.world.store.read_only = False
    stage.run_until("orchestrator tells: finished step=9")
    assert kinds(stage) == ["Acquire", "Place", "Stop", "Resume", "Place", "Commit", "Finish"]


def test_a_suspended_session_is_stopped() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.client.control("suspend")
    stage.run_to_end()
    assert stage.client.ended == "suspended"
    session = stage.checkers.session
    replies: list[m.Message] = []
    stop = m.ControlSession(session=session or SessionId(""), action="stop")
    for _ in range(2):
        stage.world.request(stage.orchestrator, stop, lambda reply, last: replies.append(reply))
        stage.run_for(1.0)
    assert replies[0] == m.Controlled(session=session or SessionId(""), state="stopped")
    assert replies[1] == m.Refusal(kind="Refused", reason="the session is stopped")
    assert kinds(stage)[-2:] == ["Suspend", "Stop"]


def test_a_second_stop_does_not_undo_a_resume() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=3, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=1")
    stage.slow_store(1.0)
    stage.client.control("stop")
    stage.client.control("stop")
    stage.run_until("orchestrator tells: stopped step=0")
    stage.client.control("resume")
    stage.slow_store(0.002)
    stage.run_for(60.0)
    assert kinds(stage)[2:5] == ["Stop", "Stop", "Resume"]
    assert stage.client.ended == "finished"


@pytest.mark.parametrize("damage", ["altered", "missing", "empty"])
@pytest.mark.parametrize("commits", [1, 2])
def test_steps_are_told_although_the_newest_manifest_is_damaged_before_a_restart(commits: int, damage: str) -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=4, batch_size=1, microbatches=1, checkpoint_every=1))
    stage.run_until(f"log {2 + commits}: Commit")
    stage.kill(stage.orchestrator)
    newest = stage.checkers.fold.commits[-1]
    assert newest.manifest is not None
    session = stage.checkers.session
    assert session is not None
    key = manifest_key(session, newest.manifest)
    stage.world.store.damage(key, missing=damage == "missing")
    if damage == "empty":
        stage.world.store.objects[key] = b""
    told = len(stage.lines)
    stage.start(stage.orchestrator)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    done = [line for line in stage.lines[told:] if "step_done" in line]
    assert done == [f"orchestrator tells: step_done step={step}" for step in range(commits, 5)]


@pytest.mark.parametrize("back", ["before the end", "after the end"])
def test_a_host_that_was_lost_forgets_its_snapshots_when_the_session_is_finished(back: str) -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=6, batch_size=1, microbatches=1, checkpoint_every=1))
    lost = stage.pnodes[1]
    stage.run_until("log 4: Commit")
    stage.kill(lost)
    stage.run_until("log 5: Rollback")
    if back == "before the end":
        stage.start(lost)
    stage.run_to_end()
    if back == "after the end":
        assert lost.snapshots
        stage.start(lost)
    stage.run_for(5.0)
    assert not lost.snapshots


def test_an_answer_to_an_older_withdrawal_starts_nothing() -> None:
    stage = a_stage(("a", "a"))
    stage.run_until("orchestrator tells: step_done step=1")
    owner = next(iter(stage.orchestrator.machine._sessions.owners.values()))
    peer = stage.pnodes[0].peer
    for epoch, before in ((owner.epoch, owner.fold.instance - 1), (owner.epoch - 1, owner.fold.instance)):
        owner._unwithdrawn = {peer}
        owner.withdrawn(peer, m.Withdrawn(session=owner.id, epoch=epoch, before=before))
        assert owner._unwithdrawn
    owner.withdrawn(peer, m.Withdrawn(session=owner.id, epoch=owner.epoch, before=owner.fold.instance))
    assert not owner._unwithdrawn
