"""Several orchestrators over one store: who owns, who follows, who takes over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import SessionId
from dcnr.orchestrator.orchestrator import OrchestratorMachine
from dcnr.protocol import messages as m
from dcnr.session.log import Entry, record_key
from dcnr.session.recipe import Recipe
from dcnr.sim.world import Process
from tests.scenarios.stage import Stage

LEASE_S, PAUSE_S = Limits().lease_s, Limits().lease_s / 3
ENDLESS = 1000
"""Steps; more than any of these plays computes."""


def a_stage(
    steps: int = ENDLESS, *, orchestrators: int = 2, pnodes: int = 2, checkpoint_every: int = 1, seed: int = 1
) -> Stage:
    """PNodes that have heard of every orchestrator when the session is made; at least a fifth of a second for a step."""
    recipe = Recipe(steps=steps, batch_size=1, microbatches=1, checkpoint_every=checkpoint_every, clip_norm=0.1)
    return Stage(
        pnodes=pnodes, recipe=recipe, orchestrators=orchestrators, seed=seed, compute_s=0.05, client_at_s=5 * PAUSE_S
    )


def entries(stage: Stage) -> list[Entry]:
    return [Entry.from_bytes(entry) for entry in stage.entries()]


def kinds(stage: Stage) -> list[str]:
    return [entry.kind.value for entry in entries(stage)]


def told(stage: Stage, process: Process, kind: str) -> int:
    return sum(line.startswith(f"{process.name} tells: {kind}") for line in stage.lines)


def session_of(stage: Stage) -> SessionId:
    session = stage.checkers.session
    assert session is not None
    return session


def taken_over(stage: Stage, process: Process) -> None:
    stage.run_until(f"{process.name} tells: taking_over")
    stage.run_for(0.5)
    assert told(stage, process, "adopted")


def session_of_begun(stage: Stage) -> SessionId:
    stage.run_until("orchestrator tells: step_done step=2")
    return session_of(stage)


def machine(process: Process) -> OrchestratorMachine:
    assert isinstance(process.machine, OrchestratorMachine)
    return process.machine


def ask(stage: Stage, process: Process, message: m.Message, for_s: float = 1.0) -> list[Any]:
    """What it replies within that time."""
    replies: list[Any] = []
    stage.world.request(process, message, lambda reply, last: replies.append(reply))
    stage.run_for(for_s)
    return replies


def info(stage: Stage, process: Process) -> m.SessionInfo:
    (reply,) = ask(stage, process, m.SessionQuery(session=session_of(stage)))
    assert isinstance(reply, m.SessionList), reply
    return reply.sessions[0]


# --- taking over --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 9))
def test_another_takes_over_after_a_lease_and_nothing_rolls_back(seed: int) -> None:
    stage = a_stage(30, seed=seed)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(owner)
    died_us = stage.world.now_us
    stage.run_until("orchestrator-2 tells: taking_over")
    silent_s = (stage.world.now_us - died_us) / 1e6
    # Its last hint may have been one pause old; then come a lease, jitter, and at most one more round.
    assert LEASE_S - PAUSE_S <= silent_s <= LEASE_S + 3 * PAUSE_S
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.client.seen == 30
    assert kinds(stage).count("Acquire") == 2
    assert kinds(stage).count("Place") == 1
    assert "Rollback" not in kinds(stage)
    assert told(stage, other, "adopted") == 1


def test_an_owner_that_was_paused_for_less_than_a_lease_keeps_its_session() -> None:
    stage = a_stage(checkpoint_every=0)
    stage.run_until("orchestrator tells: step_done step=2")
    for _ in range(3):
        stage.world.pause(stage.orchestrator)
        stage.run_for(LEASE_S - 1.5 * PAUSE_S)
        stage.world.unpause(stage.orchestrator)
        stage.run_for(PAUSE_S)
    assert kinds(stage) == ["Acquire", "Place"]


def test_an_owner_that_was_paused_for_longer_follows_its_successor() -> None:
    stage = a_stage(checkpoint_every=0)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    followed: list[Any] = []
    follow = m.FollowSession(session=session_of(stage), after_step=0)
    stage.world.request(owner, follow, lambda reply, last: followed.append((reply.kind, last)))
    stage.run_for(0.1)
    stage.world.pause(owner)
    taken_over(stage, stage.orchestrators[1])
    done = told(stage, other, "step_done")
    stage.world.unpause(owner)
    stage.run_for(2 * PAUSE_S)
    assert told(stage, owner, "stepped_down") == 1
    assert followed[-1] == ("stepped_down", True)
    assert [last for _, last in followed].count(True) == 1
    assert [entry.author.peer for entry in entries(stage)] == [owner.peer, owner.peer, other.peer]
    assert told(stage, other, "step_done") > done
    (refusal,) = ask(stage, owner, follow)
    assert (refusal.kind, other.address in refusal.reason) == ("NotOwner", True)


@pytest.mark.parametrize("action", ["stop", "suspend", "resume", "collect"])
def test_who_is_asked_before_it_knows_of_its_successor_names_it(action: str) -> None:
    """What it was about to write found the other's entry; its client goes on there by itself."""
    stage = a_stage(checkpoint_every=0)
    owner, other = stage.orchestrators
    session = session_of_begun(stage)
    if action == "resume":
        assert ask(stage, owner, m.ControlSession(session=session, action="stop"), 0.5)
    stage.world.pause(owner)
    if action == "resume":
        (controlled,) = ask(stage, other, m.ControlSession(session=session, action="resume"), 0.5)
        assert isinstance(controlled, m.Controlled)
    else:
        taken_over(stage, other)
    message = (
        m.CollectGarbage(session=session, delete=True)
        if action == "collect"
        else m.ControlSession(session=session, action=action)
    )
    replies: list[Any] = []
    stage.world.request(owner, message, lambda reply, last: replies.append(reply))
    stage.world.unpause(owner)
    stage.run_for(1.0)
    if action != "suspend":  # It is answered before anything is written, and asked again by who waits for the end.
        (refusal,) = replies
        assert (refusal.kind, other.address in refusal.reason) == ("NotOwner", True)
    (refusal,) = ask(stage, owner, message)
    assert (refusal.kind, other.address in refusal.reason) == ("NotOwner", True)


def test_who_only_follows_a_session_tells_its_step_as_far_as_the_log_does() -> None:
    stage = a_stage(30)
    stage.run_until("orchestrator tells: step_done step=5")
    shown = info(stage, stage.orchestrators[1])
    assert shown.step == shown.committed_step > 0
    assert shown.owner == stage.orchestrator.peer


def test_the_successor_is_succeeded_in_its_turn() -> None:
    stage = a_stage(checkpoint_every=0)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(owner)
    taken_over(stage, stage.orchestrators[1])
    stage.start(owner)
    stage.run_for(PAUSE_S)
    assert info(stage, owner).owner == other.peer
    stage.kill(other)
    taken_over(stage, owner)
    stage.run_for(2 * PAUSE_S)
    assert told(stage, owner, "step_done") > 2
    assert kinds(stage) == ["Acquire", "Place", "Acquire", "Acquire"]


def test_of_three_one_takes_over() -> None:
    stage = a_stage(orchestrators=3, checkpoint_every=0)
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.orchestrator)
    stage.run_for(4 * LEASE_S)
    assert kinds(stage) == ["Acquire", "Place", "Acquire"]
    owners = [process for process in stage.orchestrators[1:] if told(stage, process, "adopted")]
    assert len(owners) == 1
    assert told(stage, owners[0], "step_done") > 5


def test_the_store_is_away_while_the_owner_dies() -> None:
    """Hosts compute what is open; whoever could take over has to wait, and nothing is lost by it."""
    stage = a_stage(30)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    stage.world.store.away = True
    stage.run_for(0.001)
    before = len(stage.entries())
    stage.kill(owner)
    since = len(stage.lines)
    stage.run_for(5 * LEASE_S)
    assert any("StepSummaries step=3" in line for line in stage.lines[since:])
    assert len(stage.entries()) == before
    assert not told(stage, other, "taking_over")
    stage.world.store.away = False
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert "Rollback" not in kinds(stage)


def test_the_store_is_away_once_another_has_begun_to_take_over() -> None:
    stage = a_stage(30)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(owner)
    stage.run_until("orchestrator-2 tells: taking_over")
    stage.world.store.away = True
    stage.run_for(5 * LEASE_S)
    assert not told(stage, other, "adopted")
    stage.world.store.away = False
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert "Rollback" not in kinds(stage)


def test_a_host_that_goes_with_the_owner_costs_one_rollback() -> None:
    stage = a_stage(30, pnodes=3, checkpoint_every=5)
    stage.run_until("orchestrator tells: step_done step=7")
    stage.kill(stage.orchestrator)
    stage.kill(stage.pnodes[0])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert kinds(stage).count("Rollback") == 1


def test_who_follows_while_a_new_owner_reads_the_past_hears_of_it_afterwards() -> None:
    stage = a_stage(12, orchestrators=1, checkpoint_every=5)
    stage.run_until("log 3: Commit")
    stage.run_until("orchestrator tells: step_done step=6")
    stage.kill(stage.orchestrator)
    stage.slow_store(0.3)
    stage.start(stage.orchestrator)
    session = session_of(stage)

    def acquiring() -> bool:
        owner = machine(stage.orchestrator)._sessions.owners.get(session)
        return owner is not None and owner.phase == "acquiring"

    stage.run_till(acquiring, "it acquires the session")
    assert not machine(stage.orchestrator)._sessions.owners[session].history
    heard: list[Any] = []
    follow = m.FollowSession(session=session, after_step=2)
    stage.world.request(stage.orchestrator, follow, lambda reply, last: heard.append(reply))
    stage.run_for(0.1)
    assert machine(stage.orchestrator)._sessions.owners[session].phase == "acquiring"
    stage.slow_store(0.002)
    stage.run_to_end()
    steps = [json.loads(record.data)["step"] for record in heard if record.kind == "step_done"]
    assert steps == list(range(3, 13))


# --- following ----------------------------------------------------------------------------------------------


def test_who_does_not_own_a_session_knows_what_its_log_says_and_who_does() -> None:
    stage = a_stage()
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    committed = stage.checkers.fold.newest().step
    found = info(stage, other)
    assert (found.owner, found.owner_addresses) == (owner.peer, (owner.address,))
    assert found.committed_step >= committed > 0
    assert (found.state, found.epoch) == ("running", 1)


@pytest.mark.parametrize("action", ["stop", "resume", "follow"])
def test_who_does_not_own_a_session_names_the_owner_to_who_wants_to_command_or_follow(action: str) -> None:
    stage = a_stage(checkpoint_every=0)
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    session = session_of(stage)
    command = m.FollowSession(session=session, after_step=0) if action == "follow" else m.ControlSession(session=session, action=action)  # fmt: skip
    (refusal,) = ask(stage, other, command)
    assert (refusal.kind, owner.address in refusal.reason) == ("NotOwner", True)
    assert kinds(stage) == ["Acquire", "Place"]


def test_an_ended_session_is_told_of_by_anybody_as_its_owner_told_of_it() -> None:
    stage = a_stage(6)
    owner, other = stage.orchestrators
    stage.run_to_end()
    stage.run_for(0.1)
    follow = m.FollowSession(session=session_of(stage), after_step=0)

    def steps(process: Process) -> list[tuple[int, float, float]]:
        records = ask(stage, process, follow)
        assert records[-1].kind == "finished"
        data = [json.loads(record.data) for record in records if record.kind == "step_done"]
        return [(found["step"], found["loss"], found["grad_scale"]) for found in data]

    assert [step for step, _, _ in steps(owner)] == [1, 2, 3, 4, 5, 6]
    assert all(scale < 1.0 for _, _, scale in steps(owner))
    assert steps(other) == steps(owner)


def test_a_stopped_session_is_resumed_by_whoever_is_asked() -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=2")
    stage.client.control("stop")
    stage.run_to_end()
    other = stage.orchestrators[1]
    (reply,) = ask(stage, other, m.ControlSession(session=session_of(stage), action="resume"))
    assert isinstance(reply, m.Controlled), reply
    stage.run_until("orchestrator-2 tells: step_done step=4")
    assert info(stage, stage.orchestrator).owner == other.peer


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("moment_s", [0.25, 0.5])
def test_whoever_lost_the_race_for_a_session_while_hints_are_old_follows_it(seed: int, moment_s: float) -> None:
    """It reads anew whose the session is, and must not take over meanwhile, in vain, what it is about to forget: whoever
    followed that heard nothing any more."""
    stage = a_stage(orchestrators=3, checkpoint_every=0, seed=seed)
    follow = m.FollowSession(session=session_of_begun(stage), after_step=0)
    stage.slow_store(0.2)
    stage.world.store.read_only = True
    stage.run_for(3 * LEASE_S + moment_s)
    stage.world.store.read_only = False
    stage.run_until("log 3: Acquire")
    heard: list[tuple[str, list[Any]]] = []
    for _ in range(12):  # At any moment of it.
        stage.run_for(0.1)
        for process in stage.orchestrators:
            replies: list[Any] = []
            heard.append((process.name, replies))
            stage.world.request(process, follow, lambda reply, last, into=replies: into.append(reply))  # type: ignore[misc]
    stage.run_for(2 * LEASE_S)
    assert [name for name, replies in heard if not replies] == []


def test_a_suspended_session_is_stopped_by_whoever_is_asked() -> None:
    stage = a_stage(checkpoint_every=0)
    stage.run_until("orchestrator tells: step_done step=2")
    stage.client.control("suspend")
    stage.run_to_end()
    (reply,) = ask(stage, stage.orchestrators[1], m.ControlSession(session=session_of(stage), action="stop"))
    assert reply == m.Controlled(session=session_of(stage), state="stopped")
    assert kinds(stage)[-3:] == ["Suspend", "Acquire", "Stop"]
    assert info(stage, stage.orchestrator).state == "stopped"


def test_an_orchestrator_tells_where_the_others_are() -> None:
    stage = a_stage(orchestrators=3)
    session_of_begun(stage)
    (status,) = ask(stage, stage.orchestrator, m.GetStatus())
    assert status.others == tuple(sorted(o.address for o in stage.orchestrators[1:]))
    stage.kill(stage.orchestrators[1])
    stage.run_for(3 * LEASE_S)
    (status,) = ask(stage, stage.orchestrator, m.GetStatus())
    assert status.others == (stage.orchestrators[2].address,)


def test_names_that_another_made_a_moment_ago_are_found() -> None:
    """Before the hint that would tell of them is written or read."""
    stage = a_stage()
    other = stage.orchestrators[1]
    stage.run_until("log 1: Acquire")
    session = session_of(stage)
    assert session not in machine(other)._sessions.owners
    for name in (session, "mlp"):
        message = m.SessionQuery(session=name) if name == session else m.GetNetwork(network=name)
        (reply,) = ask(stage, other, message, for_s=0.1)
        assert not isinstance(reply, m.Refusal), reply
    (refusal,) = ask(stage, other, m.SessionQuery(session="f" * 32), for_s=0.1)
    assert refusal.kind == "UnknownName"


def test_a_log_that_cannot_be_read_for_a_while_is_answered_from_afterwards() -> None:
    stage = a_stage()
    other = stage.orchestrators[1]
    stage.run_until("orchestrator tells: step_done step=2")
    stage.world.store.away = True
    assert ask(stage, other, m.SessionQuery(session=session_of(stage))) == []
    stage.world.store.away = False
    assert info(stage, other).committed_step > 0


def test_a_session_whose_record_is_damaged_is_said_and_leaves_the_others_alone() -> None:
    stage = a_stage()
    owner, other = stage.orchestrators
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(other)
    stage.world.store.objects[record_key(SessionId("0" * 32))] = b"rubbish"
    stage.start(other)
    stage.run_for(1.0)
    assert told(stage, other, "session_unreadable") == 1
    assert info(stage, other).owner == owner.peer


def test_lists_are_answered_while_the_store_is_away() -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=3")
    stage.world.store.away = True
    for process in stage.orchestrators:
        (reply,) = ask(stage, process, m.SessionQuery(session=""), for_s=Limits().answer_within_s + 0.1)
        assert [i.session for i in reply.sessions] == [session_of(stage)]


@pytest.mark.parametrize("action", ["stop", "suspend"])
def test_a_session_that_is_stopped_while_it_is_taken_over_ends(action: str) -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=3")
    stage.world.pause(stage.pnodes[0])  # It does not answer, so the takeover waits for it.
    stage.kill(stage.orchestrator)
    stage.run_until("orchestrator-2 tells: taking_over")
    stage.run_for(0.3)
    assert not told(stage, stage.orchestrators[1], "adopted")
    (reply,) = ask(stage, stage.orchestrators[1], m.ControlSession(session=session_of(stage), action=action), for_s=0.2)
    stage.world.unpause(stage.pnodes[0])
    stage.run_for(5.0)
    ended = {"stop": "Stop", "suspend": "Suspend"}[action]
    assert isinstance(reply, m.Controlled), reply
    assert kinds(stage)[-1] == ended
    steps = told(stage, stage.orchestrators[1], "step_done")
    stage.run_for(5.0)
    assert told(stage, stage.orchestrators[1], "step_done") == steps


def test_an_owner_that_is_cut_off_from_every_pnode_is_succeeded_and_nothing_rolls_back() -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=3")
    for process in stage.pnodes:
        stage.world.network.cut(process, stage.orchestrator)
    taken_over(stage, stage.orchestrators[1])
    stage.run_for(5.0)
    assert "Rollback" not in kinds(stage)
    assert told(stage, stage.orchestrators[1], "step_done") > 5


def test_what_is_being_read_anew_is_not_taken_over_meanwhile() -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=2")
    machine: Any = stage.orchestrators[1].machine
    sessions, desk = machine._sessions, machine._desk
    sessions._beats.expired = lambda peer, patience_s: True  # As if its owner were silent.

    def taken_over() -> bool:
        return any(event.kind == "taking_over" for event in desk.events)

    (owner,) = sessions.owners.values()
    assert owner.phase == "followed"
    sessions.read(owner.id)
    sessions.look_around(frozenset())
    assert not taken_over()
    sessions._being_read.clear()
    sessions.look_around(frozenset())
    assert taken_over()
