"""Two sessions want PNodes that have room for one: the older one first, the other waits, says why, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

import dcnr
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import Finished, Placed, StepDone, Waiting
from tests.e2e.test_exact import assert_equals_oracle, text_like_columns, train

LONG, SHORT = 120, 10
ROOM = 5 << 20
"""On each of two PNodes: both hold one session (6.5 MiB) and not two."""


@pytest.mark.parametrize("orchestrators", [1, 2])
@pytest.mark.timeout(300)
def test_the_older_one_trains_and_the_other_waits_for_its_end(tmp_path: Path, orchestrators: int) -> None:
    columns = text_like_columns()
    with (
        LocalNetwork(tmp_path, 2, 1, orchestrators=orchestrators, memory_bytes=ROOM) as local,
        dcnr.connect(local.orchestrators[0].address) as client,
        dcnr.connect(local.orchestrators[-1].address) as other,
    ):
        while sum(node.colour == "green" for node in other.nodes()) < 2:
            pass
        older = train(client, columns, LONG)
        next(event for event in older if isinstance(event, StepDone))
        younger = train(other, columns, SHORT)
        events, waited, placed_while = [], [], ""
        for event in younger:
            events.append(event)
            if isinstance(event, Waiting):
                waited.append(event.reason)
            elif isinstance(event, Placed) and waited:
                placed_while = older.info().state
        assert isinstance(events[-1], Finished)
        held_by = f"held by session {older.id}" if orchestrators == 1 else "held by sessions of other orchestrators"
        assert any(held_by in reason for reason in waited), waited
        assert placed_while == "finished"
        assert isinstance(list(older)[-1], Finished)
        assert_equals_oracle(older, columns, LONG)
        assert_equals_oracle(younger, columns, SHORT)
