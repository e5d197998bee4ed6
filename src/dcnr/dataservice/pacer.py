"""Holding back what is sent, so that a line is left to others."""

from __future__ import annotations

import asyncio
import math


class Pacer:
    """``bytes_per_s`` for all who ask one pacer together. Without a limit it never waits."""

    def __init__(self, bytes_per_s: float = math.inf) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be above 0, found {bytes_per_s}")
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Wait until what was taken before has had its time, then take ``size`` bytes."""
        if self._bytes_per_s == math.inf:
            return
        now = asyncio.get_running_loop().time()
        begin = max(now, self._free_at)
        self._free_at = begin + size / self._bytes_per_s
        if begin > now:
            await asyncio.sleep(begin - now)
