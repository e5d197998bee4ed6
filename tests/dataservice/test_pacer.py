"""Holding back what is sent."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from dcnr.dataservice.pacer import Pacer


def seconds(pacer: Pacer, *sizes: int) -> float:
    async def take_all() -> None:
        async with asyncio.TaskGroup() as group:
            for size in sizes:
                group.create_task(pacer.take(size))

    begun = time.monotonic()
    asyncio.run(take_all())
    return time.monotonic() - begun


def test_who_takes_waits_for_what_was_taken_before() -> None:
    assert seconds(Pacer(1_000_000.0), 20_000, 30_000, 10**9) >= 0.05
    assert seconds(Pacer(1.0), 10**9) < 60.0, "the first one goes at once, whatever its size"


def test_without_a_limit_nobody_waits() -> None:
    assert seconds(Pacer(), 10**15, 10**15) < 60.0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_limit_that_lets_nothing_through_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pacer(rate)
