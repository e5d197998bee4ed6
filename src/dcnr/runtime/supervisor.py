"""A local network in child processes: orchestrators over one store and some PNodes, each with a home of its own.

Nothing survives the parent, even a SIGKILL of it: every child reads a pipe whose other end only the parent holds, and
ends at its end of file. The parent forks nothing after loading gRPC, for it never loads gRPC.

:class:`LocalNetwork` starts and ends them, :class:`Keeper` brings back those that ended, and ``processes.json`` in the
home tells other commands who they are.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import psutil

from dcnr.errors import Unavailable

if TYPE_CHECKING:
    from dcnr.runtime.switch import Switch

PROCESSES = "processes.json"
"""In the home of a local network: its processes as they are now."""

_READY_TIMEOUT_S = 180.0
"""A PNode imports torch and measures kernels: 3 s alone; over 60 s were seen on two cores with a load of twelve."""
_STOP_TIMEOUT_S = 5.0
_LOG_TAIL_CHARACTERS = 2000
_RESTART_PAUSE_S = 1.0
"""Before who died is started again; doubled each time that it ends at once. Who was told to end is back without one."""
_AT_ONCE_S = 10.0
"""Who fails within this time after its start has failed at once."""
_AT_ONCE_MOST = 5
"""So often in a row: it will not be otherwise the next time."""


@dataclass(slots=True, kw_only=True, eq=False)
class Child:
    """A running process of the network, and what it said when it was ready."""

    name: str
    home: Path
    process: subprocess.Popen[bytes]
    lines: queue.Queue[bytes]
    """Its first line on stdout, when it has come."""
    started_at: float
    """On the monotonic clock."""
    created: float
    """The process's start as the system tells it: with the process id, it names this process for good."""
    log_from: int = 0
    """Where its own part of the log begins, in bytes."""
    address: str = ""
    """Empty until it is ready."""
    peer: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        return bool(self.address)

    @property
    def log(self) -> Path:
        """What it wrote to stderr."""
        return self.home / "stderr.log"

    def look(self, timeout_s: float = 0.0) -> bool:
        """Whether it is ready, after waiting for at most ``timeout_s``. One that has ended never is."""
        if not self.ready:
            try:
                line = self.lines.get(timeout_s > 0, timeout_s or None)
            except queue.Empty:
                return False
            if line:
                said = json.loads(line)
                self.address, self.peer = said["address"], said["peer"]
        return self.ready

    def last_words(self) -> str:
        """The end of its log."""
        said = self.log.read_bytes()[self.log_from :].decode(errors="replace")
        return said[-_LOG_TAIL_CHARACTERS:].strip()

    def kill(self) -> None:
        """SIGKILL, if it still runs; afterwards it is gone and its lifeline is closed."""
        self.process.kill()
        self.reap(None)

    def reap(self, timeout_s: float | None) -> None:
        """Wait for its end. Raises :class:`subprocess.TimeoutExpired`."""
        self.process.wait(timeout_s)
        assert self.process.stdin is not None
        self.process.stdin.close()


class LocalNetwork:
    """``with LocalNetwork(home, pnodes=3) as net:`` starts everything and waits until all are ready.

    ``home`` gets ``orchestrator/`` (further ones ``orchestrator-1/`` and on), ``store/`` and ``pnode-<i>/``; the same
    ``home`` again goes on with what is there. ``store`` is another store than the folder in the home. ``listen`` is the
    first orchestrator's address, the others take free ports of 127.0.0.1. A PNode takes any free port of 127.0.0.1, or
    (``ports_in_order``) the first free one from 50051. Raises :class:`Unavailable` with the end of the child's log (a
    taken port, say); then nothing is left running. ``cuttable``: what PNodes dial passes through a
    :class:`~dcnr.runtime.switch.Switch` here, which costs them time.
    """

    def __init__(
        self,
        home: Path,
        pnodes: int = 3,
        threads: int = 1,
        *,
        orchestrators: int = 1,
        store: str | None = None,
        listen: str = "127.0.0.1:0",
        memory_bytes: int | None = None,
        ports_in_order: bool = False,
        cuttable: bool = False,
    ) -> None:
        self.home = Path(home)
        self._pnodes_at_start = pnodes
        self._threads = threads
        self._store = store or str(self.home / "store")
        self._listen = [listen] + ["127.0.0.1:0"] * (orchestrators - 1)
        """Of each orchestrator; where it listens, once it does."""
        self._memory_bytes = memory_bytes
        self._ports_in_order = ports_in_order
        self._cuttable = cuttable
        self._switch: Switch | None = None
        self._recorded = False
        self.orchestrators: list[Child] = []
        """By number; a killed one stays in its place until it is started again."""
        self.pnodes: list[Child] = []
        """Likewise."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        try:
            if self._cuttable:
                from dcnr.runtime.switch import Switch  # It loads asyncio, which nothing else here needs.

                self._switch = Switch()
                self._switch.start()
            for number in range(len(self._listen)):
                self.orchestrators.append(self._spawn_orchestrator(number))
            for child in self.orchestrators:
                self._wait_ready(child)
            self._listen = [child.address for child in self.orchestrators]
            for number in range(self._pnodes_at_start):
                self.pnodes.append(self._spawn_pnode(number))
            for child in self.pnodes:
                self._wait_ready(child)
        except BaseException:
            self.stop()
            raise

    # --- what runs -----------------------------------------------------------------------------------------

    @property
    def children(self) -> list[Child]:
        """Orchestrators, then PNodes."""
        return [*self.orchestrators, *self.pnodes]

    @property
    def orchestrator(self) -> Child:
        """The first one."""
        if not self.orchestrators:
            raise Unavailable("the local network is not running")
        return self.orchestrators[0]

    @property
    def address(self) -> str:
        """Where clients find the network: the addresses of all orchestrators, separated by commas."""
        if not self.orchestrators:
            raise Unavailable("the local network is not running")
        return ",".join(self._listen)

    @property
    def addresses(self) -> list[str]:
        """Of the PNodes, by number."""
        return [child.address for child in self.pnodes]

    @property
    def pids(self) -> list[int]:
        """Of the PNodes, by number."""
        return [child.pid for child in self.pnodes]

    # --- starting and killing ------------------------------------------------------------------------------

    def start_orchestrator(self, number: int = 0) -> Child:
        """Start an orchestrator again, at the same address, after a kill."""
        return self._ready(self.orchestrators[number])

    def start_pnode(self, number: int | None = None) -> Child:
        """Start one more PNode, or number ``number`` again in its old home; waits until it is ready."""
        if number is not None and number < len(self.pnodes):
            return self._ready(self.pnodes[number])
        child = self._spawn_pnode(len(self.pnodes))
        self.pnodes.append(child)
        self._wait_ready(child)
        return child

    def _ready(self, previous: Child) -> Child:
        child = self.start_again(previous)
        self._wait_ready(child)
        return child

    def start_again(self, previous: Child) -> Child:
        """A child in place of one of ours, which is killed if it still runs. Does not wait until it is ready."""
        previous.kill()
        if previous in self.orchestrators:
            number = self.orchestrators.index(previous)
            child = self.orchestrators[number] = self._spawn_orchestrator(number)
        else:
            number = self.pnodes.index(previous)
            child = self.pnodes[number] = self._spawn_pnode(number)
        self.record()
        return child

    def kill(self, number: int, signal_number: int = signal.SIGKILL) -> int:
        """Send PNode ``number`` a signal; returns its process id."""
        child = self.pnodes[number]
        if signal_number == signal.SIGKILL:
            child.kill()
        else:
            child.process.send_signal(signal_number)
        return child.pid

    def kill_orchestrator(self, number: int = 0) -> int:
        self.orchestrators[number].kill()
        return self.orchestrators[number].pid

    def stop(self) -> None:
        """SIGTERM to all, PNodes first (they say goodbye), then SIGKILL to what is left."""
        for children in (self.pnodes, self.orchestrators):
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            for child in children:
                if child.running:
                    child.process.terminate()
                    # Somebody may have stopped it.
                    child.process.send_signal(signal.SIGCONT)
            for child in children:
                try:
                    child.reap(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.kill()
        self.pnodes = []
        self.orchestrators = []
        if self._switch is not None:
            self._switch.stop()
            self._switch = None
        if self._recorded:  # Else it may be that of another network, whose home this was to be as well.
            (self.home / PROCESSES).unlink(missing_ok=True)

    def record(self) -> None:
        """Write down who the processes are, for commands that are to find them (:data:`PROCESSES`)."""
        children = [
            {
                "name": child.name,
                "pid": child.pid,
                "process_created": child.created,
                "ready": child.ready,
                "peer": child.peer,
                "address": child.address,
                "home": str(child.home),
            }
            for child in self.children
        ]
        fresh = self.home / f".{PROCESSES}.{os.getpid()}"
        switch = "" if self._switch is None else self._switch.address
        fresh.write_text(json.dumps({"parent": os.getpid(), "switch": switch, "children": children}))
        fresh.replace(self.home / PROCESSES)
        self._recorded = True

    # --- children ------------------------------------------------------------------------------------------

    def _spawn_orchestrator(self, number: int) -> Child:
        name = f"orchestrator-{number}" if number else "orchestrator"
        # Several find each other in the store.
        return self._spawn(name, ["orchestrator", "--listen", self._listen[number], "--store", self._store])

    def _spawn_pnode(self, number: int) -> Child:
        arguments = ["pnode", "--bootstrap", self.address, "--threads", str(self._threads)]
        if not self._ports_in_order:
            arguments += ["--listen", "127.0.0.1:0"]
        if self._memory_bytes is not None:
            arguments += ["--memory", str(self._memory_bytes)]
        name = f"pnode-{number}"
        if self._switch is not None:
            arguments += ["--http-proxy", f"http://{name}@{self._switch.address}"]
        # The keys of a store are the orchestrators' alone.
        return self._spawn(name, arguments, without="AWS_")

    def _spawn(self, name: str, arguments: Sequence[str], without: str | None = None) -> Child:
        """``without``: variables that begin so stay here."""
        home = self.home / name
        home.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"DCNR_LIFELINE": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        if without is not None:
            environment = {key: value for key, value in environment.items() if not key.startswith(without)}
        # Meant for a process that is started by hand: of several here all would want the one port.
        for variable in ("DCNR_CONFIG", "DCNR_PNODE_LISTEN"):
            environment.pop(variable, None)
        # Set, it is heeded instead of no_proxy, which may well name this machine.
        environment["no_grpc_proxy"] = ""
        with open(home / "stderr.log", "ab") as log:
            log_from = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "dcnr.cli.main", *arguments, "--home", str(home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                # A group of its own: Ctrl-C in the terminal reaches the parent alone, which then stops all in order.
                process_group=0,
            )
        assert process.stdout is not None
        lines: queue.Queue[bytes] = queue.Queue(1)
        threading.Thread(target=_read_first_line, args=(process.stdout, lines), daemon=True).start()
        return Child(
            name=name,
            home=home,
            process=process,
            lines=lines,
            started_at=time.monotonic(),
            log_from=log_from,
            # It is ours to reap, so it is there, ended or not.
            created=psutil.Process(process.pid).create_time(),
        )

    def _wait_ready(self, child: Child) -> None:
        begun = time.monotonic()
        if not child.look(_READY_TIMEOUT_S):
            if time.monotonic() - begun >= _READY_TIMEOUT_S:
                raise Unavailable(f"{child.name} was not ready within {_READY_TIMEOUT_S:g} s; its log is {child.log}")
            child.process.wait()
            raise Unavailable(
                f"{child.name} ended with exit code {child.process.returncode} before it was ready:\n{child.last_words()}"
            )
        self.record()


# --- bringing back -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Restarts:
    """When a child that has ended is started again: a decision without a clock."""

    at_once: int = 0
    """Ends in a row right after the start."""

    def pause_s(self, *, code: int, was_ready: bool, lived_s: float) -> float | None:
        """``None``: never again. ``code`` is the exit code, or minus a signal's number."""
        told_to_end = code in (0, -signal.SIGKILL)
        if was_ready and (told_to_end or lived_s > _AT_ONCE_S):
            self.at_once = 0
            return 0.0 if code == 0 else _RESTART_PAUSE_S
        self.at_once += 1
        if self.at_once >= _AT_ONCE_MOST:
            return None
        return _RESTART_PAUSE_S * 2.0 ** (self.at_once - 1)


@dataclass(slots=True)
class _Place:
    """One of the network's places and who is in it."""

    child: Child
    restarts: Restarts = field(default_factory=Restarts)
    due_at: float | None = None
    """When it is started again, where it has ended."""
    given_up: bool = False
    told_ready: bool = True


class Keeper:
    """Starts a network's children again as they end, and tells so. Call :meth:`look` often; it never waits."""

    def __init__(self, network: LocalNetwork, tell: Callable[[str], None]) -> None:
        self._network = network
        self._tell = tell
        self._places = [_Place(child) for child in network.children]

    def look(self, now: float) -> None:
        """``now`` on the monotonic clock."""
        for place in self._places:
            child = place.child
            if place.given_up:
                continue
            if child.running:
                if child.look() and not place.told_ready:
                    place.told_ready = True
                    self._network.record()
                    self._tell(f"{child.name} is back (process {child.pid})")
            elif place.due_at is None:
                self._ended(place, now)
            elif now >= place.due_at:
                place.child = self._network.start_again(child)
                place.due_at, place.told_ready = None, False

    def _ended(self, place: _Place, now: float) -> None:
        child = place.child
        code = child.process.returncode
        how = f"{child.name} (process {child.pid}) ended with {signal.Signals(-code).name if code < 0 else code}"
        pause_s = place.restarts.pause_s(code=code, was_ready=child.look(), lived_s=now - child.started_at)
        if pause_s is None:
            place.given_up = True
            last = child.last_words().splitlines()[-1:]
            self._tell(
                f"{how}, {_AT_ONCE_MOST} times in a row right after its start: given up. "
                f"Its log {child.log} ends with: {last[0] if last else 'nothing'}"
            )
            return
        place.due_at = now + pause_s
        self._tell(f"{how}: started again" + (f" in {pause_s:g} s" if pause_s else ""))


def _read_first_line(stdout: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Hand on the first line (empty where the child ended before it), then read on, so that the pipe never fills."""
    with stdout:
        lines.put(stdout.readline())
        while stdout.read(1 << 16):
            pass
