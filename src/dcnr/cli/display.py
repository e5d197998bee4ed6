"""A session on a terminal: a line for each event, and a bar with loss and speed. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from dcnr.cli.output import out, print_json, say
from dcnr.session.events import (
    CheckpointAbandoned,
    CheckpointCommitted,
    CheckpointDamaged,
    Evaluated,
    ExactnessLost,
    Failed,
    Finished,
    Other,
    Placed,
    PNodeLost,
    RecoveryPhase,
    Replaying,
    Resumed,
    SessionEvent,
    StepDone,
    Stopped,
    Suspended,
    VNodeMoved,
    Waiting,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SPEED_STEPS = 20
"""Tokens per second are a mean over this many steps,"""
SPEED_SECONDS = 0.2
"""that took at least this long: steps that were done before we followed come in a burst."""


def describe(event: SessionEvent) -> str | None:
    """One line for people; ``None`` for what only programs want to know."""
    match event:
        case Placed():
            hosts = sorted(set(event.vnodes.values()))
            start = f"from step {event.base_step}" if event.base_step else "from the initial weights"
            return f"placed {len(event.vnodes)} VNodes on {len(hosts)} PNodes {start} (log entry {event.index})"
        case PNodeLost():
            return f"PNode {event.peer[:8]} lost with {len(event.vnodes)} VNodes: {event.reason}"
        case RecoveryPhase():
            return f"recovery: {event.phase} {event.ms:,.1f} ms"
        case Replaying():
            return f"replaying steps {event.first} to {event.last}"
        case CheckpointCommitted():
            return f"checkpoint of step {event.step} committed ({event.size_bytes / (1 << 20):.1f} MiB)"
        case CheckpointAbandoned():
            return f"checkpoint of step {event.step} abandoned: {event.reason}"
        case CheckpointDamaged():
            return f"checkpoint of step {event.step} is damaged, an older one is used: {event.reason}"
        case Evaluated():
            return f"validation loss {event.loss:.4f} at step {event.step} ({event.rows} rows)"
        case ExactnessLost(old=""):
            return "VNodes run in several numeric classes: bits are not comparable"
        case ExactnessLost():
            return f"numeric class changes from {event.old[:8]} to {event.new[:8]}: bits are no longer comparable"
        case Waiting():
            return f"waiting: {event.reason}"
        case Resumed():
            return f"resumed at step {event.step}"
        case Suspended():
            return f"suspended at step {event.step}: {event.reason}"
        case Stopped():
            return f"stopped at step {event.step}"
        case Failed():
            return f"failed: {event.reason}"
        case Finished():
            return f"finished {event.step} steps, loss {event.loss:.4f}"
        case _:
            return None


class Teller:
    """Events to lines. VNodes that move together, dozens of them in a recovery, become one line."""

    def __init__(self) -> None:
        self._moved: list[VNodeMoved] = []

    def lines(self, event: SessionEvent) -> list[str]:
        if isinstance(event, VNodeMoved):
            self._moved.append(event)
            return []
        told = [*self._moves(), describe(event)]
        self._moved = []
        return [line for line in told if line is not None]

    def _moves(self) -> Iterator[str]:
        paths = dict.fromkeys((move.source, move.target, move.why) for move in self._moved)
        for source, target, why in paths:
            vnodes = [m.vnode for m in self._moved if (m.source, m.target, m.why) == (source, target, why)]
            what = f"VNode {vnodes[0]}" if len(vnodes) == 1 else f"{len(vnodes)} VNodes"
            yield f"{what} moved from {source[:8]} to {target[:8]}: {why}"


class Meter:
    """Step, losses and speed of a session, fed with its events."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.loss: float | None = None
        self.validation: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=SPEED_STEPS + 1)

    def take(self, event: SessionEvent) -> None:
        match event:
            case StepDone():
                self.step, self.loss = event.step, event.loss
                self._recent.append((time.monotonic(), event.tokens))
            case Evaluated():
                self.validation = event.loss
            case _:
                pass

    @property
    def tokens_per_s(self) -> float:
        """Over the recent steps; 0 where they came too fast to be more than a tale of what was done before."""
        if len(self._recent) < 2:
            return 0.0
        tokens = sum(count for _, count in self._recent) - self._recent[0][1]
        seconds = self._recent[-1][0] - self._recent[0][0]
        return tokens / seconds if seconds >= SPEED_SECONDS else 0.0

    def figures(self) -> str:
        """``loss 3.21  validation 3.30  1,234 tokens/s``, as far as known."""
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.validation is not None:
            parts.append(f"validation {self.validation:.4f}")
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        return "  ".join(parts)


class View(Protocol):
    """Somewhere to show a session."""

    def __enter__(self) -> View: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, event: SessionEvent) -> None: ...


class JsonView:
    """Every event as one JSON line."""

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: SessionEvent) -> None:
        if isinstance(event, Other):
            print_json({"event": event.name, **event.values})
        else:
            print_json({"event": event.kind, **event.data()})


class PlainView:
    """Lines, about twenty for the steps of a session."""

    def __init__(self, steps: int) -> None:
        self._meter = Meter(steps)
        self._teller = Teller()
        self._every = max(1, steps // 20)

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: SessionEvent) -> None:
        self._meter.take(event)
        if isinstance(event, StepDone) and (event.step % self._every == 0 or event.step in (1, self._meter.steps)):
            say(f"step {event.step}/{self._meter.steps}  {self._meter.figures()}")
        for line in self._teller.lines(event):
            say(line)


class BarView:
    """A progress bar with the figures beside it, event lines above it."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._meter = Meter(steps)
        self._teller = Teller()
        self._progress: Progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=out(),
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=steps)

    def __enter__(self) -> BarView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: SessionEvent) -> None:
        self._meter.take(event)
        self._progress.update(self._task, completed=self._meter.step, description=self._meter.figures() or "starting")
        for line in self._teller.lines(event):
            self._progress.console.print(line, markup=False)


def view(steps: int, json: bool) -> View:
    """The view that fits standard output."""
    if json:
        return JsonView()
    return BarView(steps) if out().is_terminal else PlainView(steps)


def follow(events: Iterable[SessionEvent], steps: int, json: bool) -> None:
    """Show a session's events until it ends. Raises what the iteration raises."""
    with view(steps, json) as shown:
        for event in events:
            shown.show(event)
