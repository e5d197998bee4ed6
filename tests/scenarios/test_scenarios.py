"""Conversations, line by line, compared with what is written beside this file.

Times are left out: the lines are in the order in which things happen. After a change that is meant to alter a
conversation, write them anew and read the difference::

    python -m tests.scenarios.test_scenarios
    git diff tests/scenarios
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage

FOLDER = Path(__file__).parent


def two_pnodes_train_two_steps() -> Stage:
    """Placement, two steps in two halves, a checkpoint, the end."""
    stage = Stage(pnodes=2, recipe=Recipe(steps=2, batch_size=4, microbatches=2, checkpoint_every=2))
    stage.run_to_end()
    return stage


def pnode_lost_rollback() -> Stage:
    """A PNode is killed after a commit: its VNodes move, the state is loaded, one step is computed again."""
    stage = Stage(pnodes=2, recipe=Recipe(steps=3, batch_size=2, microbatches=1, checkpoint_every=1))
    stage.run_until("log 3: Commit")
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.pnodes[1])
    stage.run_to_end()
    return stage


def orchestrator_restart() -> Stage:
    """The orchestrator is killed and comes back: it acquires the session and rolls back to the newest commit."""
    stage = Stage(pnodes=2, recipe=Recipe(steps=3, batch_size=2, microbatches=1, checkpoint_every=1))
    stage.run_until("orchestrator tells: step_done step=2")
    stage.kill(stage.orchestrator)
    stage.start(stage.orchestrator)
    stage.run_to_end()
    return stage


def link_breaks() -> Stage:
    """A link breaks and is dialled again: what it may have lost is said again, nothing is rolled back."""
    stage = Stage(pnodes=2, recipe=Recipe(steps=2, batch_size=2, microbatches=1, checkpoint_every=0))
    stage.run_until("orchestrator tells: step_done step=1")
    link = next(x for x in stage.world.network.links() if stage.orchestrator in (x.dialler, x.acceptor))
    stage.lines.append(f"the link of {link.dialler.name} and {link.acceptor.name} breaks")
    stage.world.network.break_link(link, "reset")
    stage.run_to_end()
    return stage


SCENARIOS: tuple[Callable[[], Stage], ...] = (
    two_pnodes_train_two_steps,
    pnode_lost_rollback,
    orchestrator_restart,
    link_breaks,
)


def transcript(play: Callable[[], Stage]) -> str:
    assert play.__doc__ is not None
    return "\n".join((f"# {play.__doc__}", *play().lines, ""))


def file_of(play: Callable[[], Stage]) -> Path:
    return FOLDER / f"{getattr(play, '__name__', '')}.txt"


@pytest.mark.parametrize("play", SCENARIOS, ids=lambda play: play.__name__)
def test_conversation(play: Callable[[], Stage]) -> None:
    assert transcript(play).splitlines() == file_of(play).read_text().splitlines()


def test_every_transcript_is_played() -> None:
    assert set(FOLDER.glob("*.txt")) == {file_of(play) for play in SCENARIOS}


def test_a_recovery_is_what_it_says() -> None:
    """Whatever was written down: the lost PNode costs one Rollback, the broken link none."""
    lost = pnode_lost_rollback()
    assert [line for line in lost.lines if "Rollback" in line] == ["log 4: Rollback"]
    assert not any("Rollback" in line for line in link_breaks().lines)


if __name__ == "__main__":
    for scenario in SCENARIOS:
        file_of(scenario).write_text(transcript(scenario))
