"""Blocking calls on the loop are errors here: the driver's loop also keeps links and heartbeats alive."""

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking_call_on_the_loop() -> Iterator[None]:
    with blockbuster_ctx("dcnr") as guard:
        # The counted table's lock is held for a few dictionary operations, never across work.
        guard.functions["threading.Lock.acquire"].deactivate()
        yield
