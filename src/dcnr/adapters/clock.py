"""The process's clocks. Machines and services get time from here, so that tests can pass their own."""

from __future__ import annotations

import time

from dcnr.machine import Instant


def monotonic() -> Instant:
    """Seconds of this process, the same clock as the asyncio loop's; meaningless elsewhere."""
    return Instant(time.monotonic())


def unix_s() -> float:
    """Wall-clock seconds, for people to read only: nothing is ever decided by it."""
    return time.time()
