"""What an owner tells its followers."""

from __future__ import annotations

from dataclasses import replace

from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage


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
