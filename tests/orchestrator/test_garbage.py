"""What nothing names in the store: found, and deleted when it is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from dcnr.protocol import messages as m
from dcnr.session.checkpoint import Manifest
from dcnr.session.log import Entry, manifest_key, object_key, objects_prefix
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage

ORPHAN = "0" * 64


def a_stage(steps: int) -> Stage:
    stage = Stage(
        pnodes=2, recipe=Recipe(steps=steps, batch_size=1, microbatches=1, checkpoint_every=2), compute_s=0.05
    )
    stage.run_until("log 3: Commit")
    return stage


def orphan(stage: Stage) -> str:
    """An object that an abandoned checkpoint has left."""
    session: Any = stage.checkers.session
    key = object_key(session, ORPHAN)  # type: ignore[arg-type]
    stage.world.store.objects[key] = b"nobody names it"
    return key


def collect(stage: Stage, *, delete: bool) -> Any:
    answers: list[Any] = []
    message = m.CollectGarbage(session=str(stage.checkers.session), delete=delete)
    stage.world.request(stage.orchestrator, message, lambda answer, last: answers.append(answer))
    stage.run_for(1.0)
    return answers[-1]


def named(stage: Stage) -> set[str]:
    session: Any = stage.checkers.session
    objects = stage.world.store.objects
    return {
        object_key(session, state.sha256)
        for commit in stage.checkers.fold.commits
        if commit.manifest is not None
        for state in Manifest.from_bytes(objects[manifest_key(session, commit.manifest)]).states.values()
    }


def test_a_finished_session_loses_what_nothing_names_and_keeps_the_rest() -> None:
    stage = a_stage(6)
    stage.run_to_end()
    stage.run_for(1.0)
    key, kept = orphan(stage), named(stage)
    assert collect(stage, delete=False).keys == (key,)
    assert key in stage.world.store.objects
    assert collect(stage, delete=True).keys == (key,)
    assert key not in stage.world.store.objects
    assert kept == {k for k in stage.world.store.objects if k.startswith(objects_prefix(stage.checkers.session))}  # type: ignore[arg-type]
    assert collect(stage, delete=True).keys == ()


@pytest.mark.parametrize("delete", [False, True], ids=["dry run", "delete"])
@pytest.mark.parametrize("every", [0, 10])
def test_a_running_session_goes_on_and_ends_with_its_commits_whole(every: int, delete: bool) -> None:
    recipe = Recipe(steps=60, batch_size=1, microbatches=1, checkpoint_every=every)
    stage = Stage(pnodes=2, recipe=recipe, compute_s=0.05)
    stage.run_until("orchestrator tells: step_done step=12")
    key = orphan(stage)
    answer = collect(stage, delete=delete)
    while isinstance(answer, m.Refusal):
        assert "checkpoint" in answer.reason
        answer = collect(stage, delete=delete)
    assert answer.keys == (key,)
    stage.run_to_end()
    assert "Rollback" not in [Entry.from_bytes(entry).kind.value for entry in stage.entries()]
    assert stage.client.ended == "finished"
    for commit in stage.checkers.fold.commits:
        stage.checkers.restorable(commit)


def test_the_last_state_is_asked_for_again_though_it_was_looked_for_garbage_meanwhile() -> None:
    """With a full disk it is asked for every 2, 4, 8, 16 s: what is to be asked then must not be forgotten."""
    stage = Stage(pnodes=1, recipe=Recipe(steps=6, batch_size=1, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=6")
    stage.pnodes[0].full = True
    stage.run_for(20.0)
    machine: Any = stage.orchestrator.machine
    (owner,) = machine._sessions.owners.values()
    left_s = owner.checkpoints._again_at - machine._desk.now
    assert left_s > 2.0
    stage.run_for(left_s - 1.5)
    stage.slow_store(1.5)
    message = m.CollectGarbage(session=str(stage.checkers.session), delete=False)
    stage.world.request(stage.orchestrator, message, lambda answer, last: None)
    stage.run_for(8.0)
    stage.pnodes[0].full = False
    stage.slow_store(0.002)
    stage.run_to_end()
    assert stage.client.ended == "finished"


def test_while_a_checkpoint_is_under_way_nothing_is_deleted() -> None:
    stage = a_stage(30)
    key = orphan(stage)
    stage.run_until("orchestrator -> pnode-1: SnapshotAt step=6 epoch=1")
    stage.slow_store(0.7)
    answers: list[Any] = []
    message = m.CollectGarbage(session=str(stage.checkers.session), delete=True)
    stage.world.request(stage.orchestrator, message, lambda answer, last: answers.append(answer))
    stage.run_for(0.2)
    assert "checkpoint" in answers[0].reason
    assert key in stage.world.store.objects
