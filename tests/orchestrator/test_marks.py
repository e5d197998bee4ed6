"""Fast regain: what PNodes keep between commits, and what a loss then costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.config import Limits
from dcnr.ids import SessionId, Sha256
from dcnr.orchestrator.marks import Mark
from dcnr.orchestrator.orchestrator import OrchestratorMachine
from dcnr.orchestrator.owner import Owner
from dcnr.session.checkpoint import Manifest
from dcnr.session.log import Entry, manifest_key
from dcnr.session.recipe import Recipe
from dcnr.sim.world import Process
from tests.scenarios.stage import Stage

OFTEN = Limits(mark_least_s=0.02, mark_cost_factor=0.0, mark_retry_s=1.0)
"""A mark every step or two."""
ENDLESS = 1000


def a_stage(
    steps: int = 30,
    *,
    pnodes: int = 3,
    orchestrators: int = 1,
    checkpoint_every: int = 0,
    limits: Limits = OFTEN,
    seed: int = 1,
    client_at_s: float = 0.1,
) -> Stage:
    """Every step takes at least a twentieth of a second."""
    recipe = Recipe(steps=steps, batch_size=1, microbatches=1, checkpoint_every=checkpoint_every)
    return Stage(
        pnodes=pnodes,
        recipe=recipe,
        orchestrators=orchestrators,
        limits=limits,
        compute_s=0.01,
        seed=seed,
        client_at_s=client_at_s,
    )


def session_of(stage: Stage) -> SessionId:
    session = stage.checkers.session
    assert session is not None
    return session


def owner_at(stage: Stage, process: Process | None = None) -> Owner:
    machine = (process or stage.orchestrator).machine
    assert isinstance(machine, OrchestratorMachine)
    return machine._sessions.owners[session_of(stage)]


def newest(stage: Stage, process: Process | None = None) -> Mark:
    mark = owner_at(stage, process).marks.newest
    assert mark is not None
    return mark


def marked(stage: Stage, step: int, process: Process | None = None) -> Mark:
    """Until the state after ``step``, or a later one, is whole on PNodes."""

    def whole() -> bool:
        if stage.checkers.session is None:
            return False
        mark = owner_at(stage, process).marks.newest
        return mark is not None and mark.step >= step

    stage.run_till(whole, f"a mark of step {step}")
    return newest(stage, process)


def entries(stage: Stage) -> list[Entry]:
    return [Entry.from_bytes(entry) for entry in stage.entries()]


def kinds(stage: Stage) -> list[str]:
    return [entry.kind.value for entry in entries(stage)]


def bases(stage: Stage, kind: str = "Rollback") -> list[int]:
    """Steps from which the session was placed anew."""
    return [int(e.body["folded"]["base"][0]) for e in entries(stage) if e.kind.value == kind]


def manifest(stage: Stage, entry: Entry) -> Manifest:
    sha256 = Sha256(entry.body["folded"]["base"][1])
    return Manifest.from_bytes(stage.world.store.objects[manifest_key(session_of(stage), sha256)], sha256)


def told(stage: Stage, kind: str) -> list[str]:
    return [line for line in stage.lines if f"tells: {kind}" in line]


def steps_told(stage: Stage) -> list[int]:
    return [int(line.rpartition("step=")[2].split()[0]) for line in told(stage, "step_done")]


def finished_well(stage: Stage) -> None:
    """The simulator's checkers compare every loss and state with the oracle's on the way."""
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert steps_told(stage) == list(range(1, stage.checkers.oracle.recipe.steps + 1))


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_loss_goes_back_to_the_mark_and_not_to_the_commit(lost: int) -> None:
    """Each of them is a host and the guard of another one."""
    stage = a_stage(checkpoint_every=10)
    stage.run_until("log 3: Commit")
    mark = marked(stage, 12)
    stage.kill(stage.pnodes[lost])
    finished_well(stage)
    (base,) = bases(stage)
    assert base >= mark.step
    rollback = next(e for e in entries(stage) if e.kind.value == "Rollback")
    found = manifest(stage, rollback)
    assert [step for step, _ in found.losses] == list(range(11, base + 1))
    assert stage.checkers.marks_used == 1


def test_without_a_loss_the_store_hears_nothing_of_marks() -> None:
    stage = a_stage(checkpoint_every=10)
    marked(stage, 25)
    finished_well(stage)
    assert kinds(stage).count("Commit") == 3
    assert not bases(stage)
    manifests = [key for key in stage.world.store.objects if "/manifests/" in key]
    assert len(manifests) == kinds(stage).count("Commit")


def test_a_second_loss_during_recovery_begins_from_the_same_mark() -> None:
    """Of four, two that keep no state together."""
    stage = a_stage(pnodes=4)
    mark = marked(stage, 5)
    stage.kill(stage.pnodes[0])
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    stage.kill(stage.pnodes[2])
    finished_well(stage)
    first, second = bases(stage)
    assert first == second >= mark.step


def test_where_both_keepers_of_a_state_are_dead_the_commit_is_the_base() -> None:
    stage = a_stage(checkpoint_every=4)
    stage.run_until("log 3: Commit")
    marked(stage, 6)
    stage.kill(stage.pnodes[0])
    stage.kill(stage.pnodes[1])
    finished_well(stage)
    assert all(base % 4 == 0 for base in bases(stage))
    assert not stage.checkers.marks_used


def test_a_mark_that_a_commit_overtakes_while_it_is_written_down_is_no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a move, which lets the session go on until its place and its base are known."""
    stage = a_stage(checkpoint_every=10)
    mark = marked(stage, 2)
    owner, found, late = owner_at(stage), [], []
    with monkeypatch.context() as patch:
        patch.setattr(owner.desk, "create", lambda key, data, then: late.append(then))
        owner.marks.choose_base(found.append)
    stage.run_until("orchestrator tells: checkpoint_committed step=10 index=3")
    assert mark.step < 10
    (written,) = late
    written(None)
    stage.run_till(lambda: bool(found), "a base")
    assert found[0].step >= 10


def test_a_mark_that_is_older_than_a_commit_is_no_base_though_the_commit_is_damaged() -> None:
    """Its keepers have deleted it when they heard of the commit."""
    stage = a_stage(checkpoint_every=10, limits=Limits(mark_least_s=1e6))
    stage.run_till(lambda: stage.checkers.session is not None, "a session")
    stage.run_until("orchestrator tells: step_done step=2")
    owner = owner_at(stage)
    owner.marks.wanted = True  # One mark, and none after it.
    mark = marked(stage, 3)
    owner.marks.release()
    owner.go_on()
    stage.run_until("orchestrator tells: checkpoint_committed step=10 index=3")
    assert mark.step < 10
    owner._log.fold = replace(owner.fold, commits=())
    assert owner.marks.base() is None


def test_a_guard_that_is_no_host_dies_and_nothing_goes_back() -> None:
    stage = a_stage(pnodes=3)
    spare = stage.pnodes[2]
    stage.run_until(f"{spare.name} starts as boot 1")
    stage.kill(spare)
    stage.run_until("log 2: Place")
    stage.start(spare)
    stage.run_till(lambda: bool(spare.guarded), "the spare keeps a state")
    stage.kill(spare)
    stage.run_until("orchestrator tells: pnode_gone")
    after = newest(stage).step
    marked(stage, after + 1)
    finished_well(stage)
    assert not bases(stage)


def test_a_guard_that_dies_while_a_state_is_to_be_had_from_it_costs_another_rollback() -> None:
    """The second one begins from the commit: nobody keeps the mark's state any more."""
    stage = a_stage(pnodes=4)
    mark = marked(stage, 5)
    dead = stage.pnodes[0]
    state = next(v for v, keepers in mark.keepers.items() if keepers[0].peer == dead.peer)
    guard = next(p for p in stage.pnodes if p.peer == mark.keepers[state][1].peer)
    stage.kill(dead)
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    stage.kill(guard)
    finished_well(stage)
    first, second = bases(stage)
    assert first >= mark.step
    assert second == 0


# --- taking one ---------------------------------------------------------------------------------------------


def test_a_mark_that_fails_is_forgotten_and_training_goes_on() -> None:
    stage = a_stage(ENDLESS)
    marked(stage, 3)
    stage.pnodes[1].full = True  # It guards pnode-1's, and keeps its own.
    stage.run_till(lambda: bool(told(stage, "mark_failed")), "a mark fails")
    failed_at = newest(stage).step
    done = len(steps_told(stage))
    stage.run_for(0.9)
    assert len(steps_told(stage)) > done + 5
    assert len(told(stage, "mark_failed")) == 1  # It is tried again after a while.
    assert newest(stage).step == failed_at
    stage.pnodes[1].full = False
    marked(stage, failed_at + 1)
    assert "Rollback" not in kinds(stage)


def test_after_a_mark_that_was_too_slow_the_links_are_left_alone() -> None:
    """For twenty times as long as it took: a line that is too slow must not be busy with marks all the time."""
    limits = Limits(mark_least_s=0.02, mark_patience_s=2.0, mark_retry_s=0.5, guard_distrust_s=1.0)
    stage = a_stage(ENDLESS, limits=limits)
    marked(stage, 3)
    stage.world._keep_us = (10_000_000, 10_000_000)
    stage.run_till(lambda: bool(told(stage, "mark_failed")), "a mark fails")
    stage.world._keep_us = (500, 30_000)
    asked = sum(": SnapshotAt " in line for line in stage.lines)
    stage.run_for(35.0)
    assert sum(": SnapshotAt " in line for line in stage.lines) == asked
    stage.run_for(15.0)
    assert sum(": SnapshotAt " in line for line in stage.lines) > asked


def test_no_mark_is_taken_of_a_step_that_is_to_be_stored() -> None:
    stage = a_stage(checkpoint_every=3)
    finished_well(stage)
    asked = {int(line.split("step=")[1].split()[0]) for line in stage.lines if ": Marked " in line}
    assert asked
    assert not {step for step in asked if step % 3 == 0}


def test_no_mark_where_nobody_else_is_there() -> None:
    stage = a_stage(pnodes=1)
    finished_well(stage)
    assert not any(": Guard" in line or ": Marked" in line for line in stage.lines)


def test_memory_and_disks_hold_the_newest_mark_and_commit_alone() -> None:
    stage = a_stage(ENDLESS, checkpoint_every=10)
    for step in (12, 17, 23):
        mark = marked(stage, step)
        stage.run_for(0.01)
        for process in stage.pnodes:
            kept = {sha for _, sha in process.guarded}
            known = {s.sha256 for s in mark.states.values()}
            assert len(kept - known) <= 2  # And of the one that is being taken.
            assert len(process.snapshots) <= 6


def test_when_the_session_is_finished_nobody_keeps_anything() -> None:
    stage = a_stage(12)
    marked(stage, 3)
    assert any(p.guarded for p in stage.pnodes)
    finished_well(stage)
    stage.run_for(5.0)
    assert not any(p.guarded or p.snapshots or any(p.admitted.values()) for p in stage.pnodes)


# --- succession ---------------------------------------------------------------------------------------------


def restarted(stage: Stage) -> None:
    stage.kill(stage.orchestrator)
    stage.start(stage.orchestrator)
    stage.run_till(lambda: bool(told(stage, "adopted")), "adoption")


def test_after_a_restart_of_the_orchestrator_marks_begin_anew() -> None:
    stage = a_stage(ENDLESS)
    old = marked(stage, 4)
    restarted(stage)
    assert owner_at(stage).marks.newest is None
    mark = marked(stage, old.step + 1)
    stage.kill(stage.pnodes[1])
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    assert bases(stage)[0] >= mark.step


def test_a_session_whose_base_is_a_mark_is_adopted_and_finds_its_losses() -> None:
    stage = a_stage()
    mark = marked(stage, 5)
    stage.kill(stage.pnodes[1])
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    base = bases(stage)[0]
    assert base >= mark.step
    stage.run_until(f"orchestrator tells: step_done step={base + 3}")
    restarted(stage)
    assert [event.step for event in owner_at(stage).history][:base] == list(range(1, base + 1))
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.client.seen == 30
    assert kinds(stage).count("Rollback") == 1


def test_a_session_whose_base_is_a_mark_loses_a_host_with_its_orchestrator() -> None:
    """Who keeps what of the base nobody knows any more: the commit it is."""
    stage = a_stage(checkpoint_every=4)
    stage.run_until("log 3: Commit")
    mark = marked(stage, 5)
    stage.kill(stage.pnodes[1])
    stage.run_till(lambda: bool(bases(stage)), "a rollback")
    base = bases(stage)[0]
    stage.run_until(f"orchestrator tells: step_done step={max(base, mark.step) + 1}")
    stage.kill(stage.orchestrator)
    stage.kill(stage.pnodes[2])
    stage.start(stage.orchestrator)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.client.seen == 30
    assert bases(stage)[-1] % 4 == 0
