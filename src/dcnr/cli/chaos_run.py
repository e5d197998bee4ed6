"""Doing the faults of ``dcnr chaos`` to real processes, and watching the session meanwhile."""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dcnr.cli.chaos_plan import Fault
from dcnr.cli.chaos_report import Report, Row, seconds
from dcnr.cli.story import Ended, Newsroom, Work
from dcnr.cli.verify import Evidence, collect
from dcnr.client.blocking import Client, Run
from dcnr.config import LIMITS
from dcnr.errors import DCNRError, Unavailable
from dcnr.runtime.supervisor import PROCESSES
from dcnr.runtime.switch import cut
from dcnr.session.events import CheckpointCommitted, Placed, SessionEvent

LOCK = "chaos.lock"
"""In the home of `dcnr up`; held by who is at work."""
POLL_S = 0.05
CALM_S = 3 * LIMITS.link_grace_s
"""After the last fault: by then the network has noticed it."""
PATIENCE_S = 120.0
"""How long the session may take to go on after the last fault, and a commit to come after that."""

Tell = Callable[[str], None]


# --- processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A process of ``dcnr up`` as its record has it."""

    name: str
    pid: int
    created: float
    ready: bool
    home: str
    peer: str
    address: str
    parent: int

    def process(self) -> psutil.Process | None:
        """The process, if it is still the one that the record means: nobody else is ever signalled.

        Its start, its parent and its own command line must say so.
        """
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.01 and process.ppid() == self.parent
            words = process.cmdline()
        except psutil.Error:
            return None
        return process if same and "dcnr.cli.main" in words and self.home in words else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Those of a ``dcnr up``."""

    pnodes: list[Victim]
    orchestrators: list[Victim]
    switch: str
    """Its address; empty where nobody can be cut off."""

    def victim(self, number: int, owner: str) -> Victim:
        """Of a fault. ``owner`` is the address of the orchestrator that owns the session, as far as it is known."""
        if number < len(self.pnodes):
            return self.pnodes[number]
        return next((o for o in self.orchestrators if o.address == owner), self.orchestrators[0])


def read_processes(home: Path, parent: int) -> Processes:
    """Processes of the ``dcnr up`` with process id ``parent``. Raises :class:`Unavailable`."""
    path = home / PROCESSES
    try:
        record = json.loads(path.read_text())
        if record["parent"] != parent:
            raise Unavailable(f"{path} is of process {record['parent']}, expected `dcnr up`, process {parent}")
        found = [
            Victim(
                name=child["name"],
                pid=child["pid"],
                created=child["process_created"],
                ready=child["ready"],
                home=child["home"],
                peer=child["peer"],
                address=child["address"],
                parent=parent,
            )
            for child in record["children"]
        ]
        switch = str(record["switch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path} does not tell the processes of `dcnr up`: {error!r}") from error
    orchestrators = [victim for victim in found if victim.name.startswith("orchestrator")]
    return Processes(
        pnodes=[victim for victim in found if victim not in orchestrators], orchestrators=orchestrators, switch=switch
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """What is to be undone ``until_s``, by the clock of the run."""

    until_s: float
    victim: Victim
    cut: socket.socket | None
    """That holds it cut off; ``None`` where it is stopped."""


@dataclass(slots=True, kw_only=True)
class Hand:
    """Does faults, and undoes those that last."""

    home: Path
    parent: int
    lasting: list[Lasting] = field(default_factory=list)

    def strike(self, fault: Fault, now_s: float, owner: str = "") -> tuple[Victim, str]:
        """The victim, and why nothing was done (empty: it was). ``owner``: see :meth:`Processes.victim`."""
        processes = read_processes(self.home, self.parent)
        victim = processes.victim(fault.victim, owner)
        process = victim.process()
        if process is None:
            return victim, "it was dead already"
        if not victim.ready:
            return victim, "it was not back yet"
        if fault.kind == "partition":
            held = cut(processes.switch, victim.name, victim.address)
            self.lasting.append(Lasting(until_s=now_s + fault.lasts_s, victim=victim, cut=held))
            return victim, ""
        if fault.kind == "stop" and process.status() == psutil.STATUS_STOPPED:
            return victim, "it was stopped already"
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "restart": signal.SIGTERM}[fault.kind]
        if fault.kind == "stop":
            # First: whatever happens to us in between, it is continued.
            self.lasting.append(Lasting(until_s=now_s + fault.lasts_s, victim=victim, cut=None))
        try:
            process.send_signal(number)
            if fault.kind == "restart" and any(victim == one.victim and one.cut is None for one in self.lasting):
                process.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return victim, "it was dead already"
        return victim, ""

    def undo(self, now_s: float = float("inf")) -> list[str]:
        """End what has lasted long enough; a line for each."""
        over = [one for one in self.lasting if one.until_s <= now_s]
        self.lasting = [one for one in self.lasting if one.until_s > now_s]
        lines = []
        for one in over:
            if one.cut is not None:
                one.cut.close()
                lines.append(f"{one.victim.name} can be reached again")
            elif (process := one.victim.process()) is not None:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
                    lines.append(f"{one.victim.name} goes on")
        return lines


@contextmanager
def hand(home: Path, parent: int) -> Iterator[Hand]:
    """Whoever is still stopped or cut off at the end is so no more, however the block ends. Raises
    :class:`Unavailable` where another hand is at work on this network: neither could tell what it has done."""
    with (home / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # It ends with this process, whatever becomes of it.
        except BlockingIOError as error:
            reason = "another `dcnr chaos` is at work on this network: wait until it ends, or end it with Ctrl-C"
            raise Unavailable(reason) from error
        made = Hand(home=home, parent=parent)
        try:
            yield made
        finally:
            made.undo()


# --- the run -----------------------------------------------------------------------------------------------


class Watch:
    """Follows the session, strikes when it is time, and collects what is to be verified."""

    def __init__(self, net: Client, run: Run, striking: Hand, planned: Sequence[Fault], tell: Tell) -> None:
        info = run.info()
        if info.state not in ("running", "recovering", "starting"):
            raise Unavailable(f"session {run.id} is {info.state}: chaos needs one that trains")
        self.report = Report(step=info.step)
        self.evidence: list[Evidence] = []
        self._net, self._run, self._hand, self._tell = net, run, striking, tell
        self._planned = list(planned)
        self._hosts = frozenset(str(location.peer) for location in info.placement)
        self._news = Newsroom()
        self._begun = time.monotonic()
        self._ended = False
        self._windows: list[float] = []
        self._collecting = False
        self._collected_step = info.committed_step
        self._committed_step = info.committed_step

    def go(self, for_s: float, window_times: Sequence[float]) -> None:
        """Everything until the session went on after the last fault, or is over, or patience is."""
        self._windows = list(window_times)
        self._news.follow(self._run, self.report.step)
        # The plan was told, so all of it is done, on a slow machine too.
        while not self._ended and (self._planned or self._now() < for_s):
            self._strike()
            self._hear()
        calm_at = self._now()
        while self._hand.lasting and not self._ended:
            self._hear()
            calm_at = self._now()
        while not self._ended and self._now() - calm_at < (PATIENCE_S if self.report.waiting else CALM_S):
            self._hear()
        # The last stretch: what was computed under the last faults is in the next commit.
        self._windows = [self._now()]
        waiting_since, least = self._now(), self.report.step
        if not self._ended:
            self._tell(f"{waiting_since:7.1f} s  waiting for a commit, so that the last steps can be verified")
        while self._collecting or (self._windows and not self._ended and self._now() - waiting_since < PATIENCE_S):
            if self.report.step > least and not self._windows:
                break
            self._hear()
        if not self._windows:
            return
        try:
            self._add(self._collect(None))
        except DCNRError as error:
            self.report.problems.append(f"the last steps cannot be verified: {error}")

    def _now(self) -> float:
        return time.monotonic() - self._begun

    def _strike(self) -> None:
        while self._planned and self._planned[0].at_s <= self._now():
            fault = self._planned.pop(0)
            now_s = self._now()
            # Whom the client follows the session at is its owner.
            victim, skipped = self._hand.strike(fault, now_s, self._net.address)
            idle = not skipped and victim.name.startswith("pnode") and victim.peer not in self._hosts
            row = Row(
                fault=fault, name=victim.name, at_s=now_s, done_before=self.report.step, skipped=skipped, idle=idle
            )
            self.report.add(row)
            remark = f" ({row.remark})" if row.remark else ""
            self._tell(f"{now_s:7.1f} s  {victim.name}: {fault.what}, after step {row.done_before}{remark}")

    def _hear(self) -> None:
        """What comes within a moment."""
        for line in self._hand.undo(self._now()):
            self._tell(f"{self._now():7.1f} s  {line}")
        match self._news.next(POLL_S):
            case Ended(error=error):
                self._ended = True
                if not self.report.finished:
                    self.report.problems.append(f"the session ended: {error or self._run.info().state}")
            case Work(then=then, result=result, error=error):
                self._collecting = False
                if error is None:
                    then(result)
                # Otherwise it was asked in the midst of a fault, and the next commit is as good.
            case SessionEvent() as event:
                for row in self.report.take(self._now(), event):
                    self._tell(
                        f"{self._now():7.1f} s  step {self.report.step} is done, {seconds(row.regain_s)} after the "
                        f"{row.fault.kind} of {row.name}"
                    )
                if isinstance(event, Placed):
                    self._hosts = frozenset(event.vnodes.values())
                    self._tell(f"{self._now():7.1f} s  all VNodes placed anew, from step {event.base_step}")
                if isinstance(event, CheckpointCommitted):
                    self._committed(event.step)
            case _:
                pass

    def _committed(self, step: int) -> None:
        if self._collecting or not self._windows or self._windows[0] > self._now():
            return
        self._collecting = True
        # Now, while the commit before it is kept: older ones are deleted as training goes on.
        self._news.work(lambda: self._collect(step), self._add)

    def _collect(self, step: int | None) -> Evidence:
        """From the commit before that of ``step`` (the newest) to that one."""
        if step is None:
            commits = [commit.step for commit in self._run.files().commits]
            step = max(commits, default=0)
        return collect(self._net, self._run, max(0, step - 1), step)

    def _add(self, evidence: Evidence) -> None:
        self.evidence.append(evidence)
        passed = [at_s for at_s in self._windows if at_s <= self._now()]
        del self._windows[: len(passed)]
