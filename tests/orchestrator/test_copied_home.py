"""A home is copied to a second machine: two processes have one identity, and only one of them is the PNode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.ids import Incarnation
from dcnr.machine import Effect, Emit
from dcnr.protocol import messages as m
from dcnr.session.recipe import Recipe
from dcnr.sim.world import Process
from tests.orchestrator.test_orchestrator import asked
from tests.scenarios.stage import Stage


class Watched(Stage):
    """``told``: what processes say of copied homes, and to whom."""

    def __init__(self, *, steps: int = 400) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []
        super().__init__(pnodes=2, recipe=Recipe(steps=steps, batch_size=1, microbatches=1, checkpoint_every=0))

    def _effect(self, process: Process, effect: Effect) -> None:
        super()._effect(process, effect)
        if isinstance(effect, Emit) and effect.kind == "home_copied":
            self.told.append((process.name, dict(effect.data)))

    def register(self, original: Process, boot: int, nonce: str = "copy") -> m.Message:
        """What the orchestrator answers to a process with the identity of ``original``."""
        descriptor = replace(
            self.world.descriptor(original), incarnation=Incarnation(boot=boot, nonce=nonce), addresses=("copy:50051",)
        )
        capabilities = replace(original.capabilities, hostname="second-machine")
        (reply,) = asked(self, m.Register(descriptor=descriptor, capabilities=capabilities))
        return reply


@pytest.mark.parametrize("boot", [1, 2, 3, 4])
def test_the_copy_is_refused_and_both_owners_are_told_once(boot: int) -> None:
    """Whatever its counter of starts says: copied before, while or after the original's starts, or started often."""
    stage = Watched()
    first = stage.pnodes[0]
    stage.run_until("orchestrator tells: pnode_registered")
    for _ in range(2):
        stage.kill(first)
        stage.start(first)
        stage.run_for(3.0)
    assert first.boot == 3
    before = len(stage.lines)
    for _ in range(3):
        refusal = stage.register(first, boot)
        assert isinstance(refusal, m.Refusal)
        assert refusal.reason.startswith(
            f"start 3 of PNode {first.peer[:12]} is at work on pnode-1, pnode-1:50051, and this is start {boot}: "
        )
        assert "a home of its own with --home" in refusal.reason
    (orchestrator, event), (pnode, said) = stage.told
    assert (orchestrator, event["peer"], event["refused_host"]) == ("orchestrator", first.peer, "second-machine")
    assert (pnode, said["host"], said["address"]) == ("pnode-1", "second-machine", "copy:50051")
    assert not any("pnode_gone" in line or "Rollback" in line for line in stage.lines[before:]), "nothing is disturbed"


def test_each_further_copy_is_told_of() -> None:
    stage = Watched()
    stage.run_until("orchestrator tells: step_done step=1")
    for nonce in ("copy", "another"):
        stage.register(stage.pnodes[0], 2, nonce)
    assert [who for who, _ in stage.told] == ["orchestrator", "pnode-1"] * 2


def test_a_start_after_a_power_cut_is_no_copy() -> None:
    """The old start's link stays open for the orchestrator, but nothing comes: the new one waits a moment, accuses
    nobody, and is taken."""
    stage = Watched(steps=40)
    first = stage.pnodes[0]
    stage.run_until("orchestrator tells: step_done step=2")
    stage.lines.append(f"{first.name} loses its power")
    stage.world.watch.causes += 1
    stage.world.stop(first, "power cut", slow=True)
    stage.start(first)
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert stage.told == []
    assert any(line == "orchestrator tells: pnode_registered" for line in stage.lines[-4000:])
