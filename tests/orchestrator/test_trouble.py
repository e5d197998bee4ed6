"""Hosts that cannot reach each other, PNodes that flap, and what a session that waits lets go of."""

from __future__ import annotations

from typing import Any

from dcnr.config import Limits
from dcnr.ids import Incarnation, PeerId
from dcnr.machine import Instant, Plan, Planned
from dcnr.network.analysis import analyse
from dcnr.network.templates import mlp
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.placement import Placement, Problem, training_problem
from dcnr.session.log import Author, Entry
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage, halves

VNODES = analyse(mlp(4, [4], 4).definition()).vnodes
"""Of a stage's network."""
RECIPE = Recipe(steps=6, batch_size=1, microbatches=1, checkpoint_every=0)
PROBLEM = training_problem(analyse(mlp(4, [4], 4).definition()), RECIPE, (), window_extra=1)


def placements(stage: Stage) -> list[set[str]]:
    """Of every entry that places: its PNodes."""
    names = {str(process.peer): process.name for process in stage.pnodes}
    found = []
    for data in stage.entries():
        entry = Entry.from_bytes(data)
        if entry.kind.value in ("Place", "Rollback", "Move"):
            found.append({names[spot[0]] for spot in entry.body["folded"]["placement"].values()})
    return found


def test_hosts_that_cannot_reach_each_other_are_parted_and_the_session_ends_while_they_cannot() -> None:
    stage = Stage(pnodes=2, recipe=RECIPE)
    stage.run_until("orchestrator tells: step_done step=2")
    stage.world.watch.causes += 1
    stage.world.network.cut(stage.pnodes[0], stage.pnodes[1])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert any("parted" in line for line in stage.lines)
    before, after = placements(stage)
    assert before == {"pnode-1", "pnode-2"}
    assert len(after) == 1


def test_a_short_cut_between_hosts_parts_nobody() -> None:
    stage = Stage(pnodes=2, recipe=RECIPE)
    stage.run_until("orchestrator tells: step_done step=2")
    stage.world.network.cut(stage.pnodes[0], stage.pnodes[1])
    stage.run_for(stage.limits.pair_patience_s / 2)
    stage.world.network.heal(stage.pnodes[0], stage.pnodes[1])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert placements(stage) == [{"pnode-1", "pnode-2"}]


def test_a_last_state_that_cannot_be_stored_is_asked_for_ever_more_rarely_and_told_of_more_rarely_still() -> None:
    """Its PNode's disk stays full for two minutes; then it has room, and the session ends."""
    stage = Stage(pnodes=1, recipe=RECIPE)
    stage.run_until("orchestrator tells: step_done step=6")
    at_us, (pnode,) = stage.world.now_us, stage.pnodes
    pnode.full = True
    stage.run_for(130.0)
    asked = [line for line in stage.lines if "orchestrator -> pnode-1: SnapshotAt" in line and "step=6" in line]
    told = [line for line in stage.lines if line.startswith("orchestrator tells: checkpoint_abandoned")]
    # After 2, 4, 8, 16 and 32 seconds and every minute from then on.
    assert len(asked) == 7
    assert 3 <= len(told) <= 3 + len(VNODES) - 1, "a reason names the VNode, and any may be the first"
    pnode.full = False
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.world.now_us - at_us < 1e6 * (130.0 + stage.limits.checkpoint_retry_most_s + 5.0)


def a_desk(limits: Limits | None = None) -> Desk:
    author = Author(peer=PeerId("me"), incarnation=Incarnation(boot=1, nonce="m"))
    return Desk(author=author, secret=b"0" * 32, limits=limits or Limits(), unix_s_at_zero=0.0)


def test_of_those_that_look_for_a_place_the_oldest_has_its_turn_first_and_one_at_a_time() -> None:
    desk, turns = a_desk(), list[str]()

    def look(name: str, age: float, again: int = 0) -> None:
        left = [again]

        def placed(problem: Problem, answer: Placement | str) -> bool:
            turns.append(name)
            left[0] -= 1
            return left[0] >= 0

        desk.place((age, name), lambda: PROBLEM, placed)

    def answer() -> None:
        """The only plan that is being made."""
        (plan,) = [effect for effect in desk.out if isinstance(effect, Plan)]
        desk.out.clear()
        desk.answer(plan.id, Planned(id=plan.id, answer="no room"))

    look("young", 3.0, again=1)
    look("gone", 2.0)
    desk.place((0.0, "looks no more"), lambda: None, lambda problem, answer: turns.append("never") is None)
    look("old", 1.0)
    for _ in range(4):
        answer()
    assert turns == ["young", "old", "gone", "young"]
    assert not desk.out
    look("later", 4.0)
    answer()
    assert turns[-1] == "later"


def test_what_was_taken_over_is_foreign_until_its_host_says_otherwise() -> None:
    stage = Stage(pnodes=1, recipe=RECIPE, orchestrators=1)
    stage.run_until("orchestrator tells: step_done step=2")
    desk, session = stage.orchestrator.machine._desk, stage.checkers.session
    (node,) = desk.nodes.values()
    reserved = node.reserved[session]
    free = desk.free_bytes(node, None)
    desk.cede(session)
    assert (node.reserved, node.foreign_bytes) == ({}, reserved)
    assert desk.free_bytes(node, None) == free


def test_probation_begins_with_the_second_loss_doubles_and_is_forgotten() -> None:
    desk, peer, limits = a_desk(), PeerId("flapping"), Limits()

    def lasts_s() -> float:
        desk.lost(peer)
        began = desk.now
        while desk.on_probation(peer):
            desk.now = Instant(desk.now + 1.0)
        return desk.now - began

    assert [lasts_s() for _ in range(4)] == [0.0, 60.0, 120.0, 240.0]
    desk.now = Instant(desk.now + limits.probation_most_s)
    assert [lasts_s() for _ in range(2)] == [0.0, 60.0]


def test_probation_never_lasts_longer_than_its_bound() -> None:
    desk, peer = a_desk(Limits(probation_most_s=100.0)), PeerId("flapping")
    for _ in range(50):
        desk.lost(peer)
    desk.now = Instant(desk.now + 99.0)
    assert desk.on_probation(peer)
    desk.now = Instant(desk.now + 1.0)
    assert not desk.on_probation(peer)


def test_a_pnode_on_probation_gets_vnodes_only_where_there_is_no_other_place() -> None:
    stage = Stage(pnodes=3, recipe=Recipe(steps=40, batch_size=1, microbatches=1, checkpoint_every=0), compute_s=0.1)
    stage.run_until("orchestrator tells: step_done step=1")
    for _ in range(2):
        stage.kill(stage.pnodes[0])
        stage.run_until("orchestrator tells: pnode_gone")
        stage.start(stage.pnodes[0])
        stage.run_for(0.5)
    assert placements(stage)[-1] == {"pnode-2", "pnode-3"}
    stage.kill(stage.pnodes[2])
    stage.run_until("log 4: Rollback")
    assert placements(stage)[-1] == {"pnode-2"}  # The first one is here and was lost twice.
    stage.kill(stage.pnodes[1])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert placements(stage)[-1] == {"pnode-1"}


def two_at_least(problem: Problem) -> Placement | str:
    return halves(problem) if len(problem.candidates) > 1 else "one PNode is too small for it"


def test_a_session_that_waits_holds_nothing_and_goes_on_when_it_can() -> None:
    stage = Stage(pnodes=2, recipe=RECIPE)
    stage.world.planner = two_at_least
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.pnodes[0])
    stage.run_until("orchestrator tells: waiting")
    stage.run_for(2.0)
    machine: Any = stage.pnodes[1].machine
    assert machine._free_bytes() == machine.capabilities.memory_bytes
    assert stage.lines.count("orchestrator tells: waiting") == 1
    stage.start(stage.pnodes[0])
    stage.run_to_end()
    assert stage.client.ended == "finished"
