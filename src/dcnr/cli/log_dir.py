"""``--log-dir``: what a follower saw, in files: a JSON line for each event, and scalars for TensorBoard."""

from __future__ import annotations

import fcntl
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcnr.adapters.tensorboard import EventFile
from dcnr.cli.display import Meter
from dcnr.errors import InvalidData, ProtocolError, Unavailable
from dcnr.session.events import LAST_KINDS, Evaluated, Placed, SessionEvent, StepDone


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the file system refuses becomes one clear error."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"--log-dir: {path} cannot be written: {error.strerror or error}") from error


def prepare(folder: Path) -> None:
    """Make ``folder`` where it is missing. Raises :class:`Unavailable` where it cannot be written: before any training."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


class SessionLog:
    """The files of one session in ``folder``. Opened again, they go on after ``last_step``.

    The lines are the truth. A line that a kill cut off is dropped, and its event is asked for again if it was a step;
    so TensorBoard's file, which is written first, may hold that step twice, with the same values.
    """

    def __init__(self, folder: Path, session: str) -> None:
        """Raises :class:`Unavailable` where files cannot be written or another follower writes them, and
        :class:`InvalidData` where the lines are not ours."""
        if Path(session).name != session:
            raise ProtocolError(f"the network names a session {session!r}, which is no name of a file")
        prepare(folder)
        self._folder = folder
        self._path = folder / f"{session}.jsonl"
        self.last_step = 0
        """Of the newest ``step_done`` in the file."""
        self._last: dict[str, Any] = {}
        """The newest event in the file,"""
        self._placed = 0
        """and the log entry of the newest ``placed``."""
        self._meter = Meter(0)
        # Made with the first number, so that following what has ended adds no file.
        self._scalars: EventFile | None = None
        with _writing(self._path):
            self._lines = self._path.open("a+b")
            try:
                fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lines.close()
                raise Unavailable(f"--log-dir: {self._path} is being written by another follower") from error
            try:
                self._read()
            except BaseException:
                self._lines.close()
                raise

    def _read(self) -> None:
        """Find where to go on; cut off a line that has no end."""
        self._lines.seek(0)
        whole = 0
        for number, line in enumerate(self._lines, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                values = json.loads(line)
                kind = values["event"]
                if kind == StepDone.kind:
                    self.last_step = max(self.last_step, int(values["step"]))
                elif kind == Placed.kind:
                    self._placed = int(values["index"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise InvalidData(
                    f"{self._path}, line {number}: found {line[:60]!r}, expected a JSON object of an event"
                ) from error
            values.pop("unix_s", None)
            self._last = values
        self._lines.truncate(whole)

    def __enter__(self) -> SessionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._scalars is not None:
            self._scalars.close()

    def record(self, events: Iterable[SessionEvent]) -> Iterator[SessionEvent]:
        """The same events, each written before it is passed on."""
        for event in events:
            self.add(event)
            yield event

    def add(self, event: SessionEvent) -> None:
        """Write one event. Raises :class:`Unavailable` where that fails."""
        values = {"event": event.kind, **event.data()}
        # Who begins to follow is told again where a session is placed, and how it ended if it has.
        if event.kind in LAST_KINDS and values == self._last:
            return
        if isinstance(event, Placed):
            if event.index <= self._placed:
                return
            self._placed = event.index
        self._meter.take(event)
        unix_s = time.time()
        with _writing(self._folder):
            self._add_scalars(unix_s, event)
            self._lines.write(json.dumps({"unix_s": unix_s, **values}, ensure_ascii=False).encode() + b"\n")
            self._lines.flush()
        self._last = values

    def _add_scalars(self, unix_s: float, event: SessionEvent) -> None:
        match event:
            case StepDone():
                scalars = {
                    "train/loss": event.loss,
                    "train/learning_rate": event.learning_rate,
                    "train/grad_scale": event.grad_scale,
                }
                # Under a name of their own: a network may call one of its metrics as it likes.
                scalars |= {f"metrics/{name}": value for name, value in event.metrics.items()}
                if self._meter.tokens_per_s:
                    scalars["train/tokens_per_s"] = self._meter.tokens_per_s
            case Evaluated():
                scalars = {"validation/loss": event.loss}
            case _:
                return
        if self._scalars is None:
            self._scalars = EventFile(self._folder, unix_s)
        self._scalars.add(unix_s, event.step, scalars)
