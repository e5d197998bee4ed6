"""What a PNode's worker is given, in which order, and the states that it works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcnr.ids import VNodeId
from dcnr.machine import Handle
from dcnr.pnode import tasks
from dcnr.protocol import messages as m

CONTROL, BACKWARD, FORWARD = 0, 1, 2
"""Order on a compute worker: state and updates, then backward, then forward; each by (step, microbatch)."""


@dataclass(slots=True, kw_only=True)
class Job:
    """A compute task that may run now. ``build`` makes it at the last moment, ``done`` takes its result."""

    rank: int
    step: int
    microbatch: int
    vnode: VNodeId
    build: Callable[[], tasks.Task]
    done: Callable[[Any], None]


@dataclass(slots=True, kw_only=True)
class State:
    """A VNode's state here. ``updates`` False: nothing ever changes it, so it has no version."""

    ref: m.StateRef
    updates: bool
    version: int
    handle: Handle | None = None
    segments: frozenset[int] = frozenset()
    """Segments here that read it: all of them must have done M microbatches before it updates."""


class Ids:
    """Numbers for tasks and transfers, never used twice in a process."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last
