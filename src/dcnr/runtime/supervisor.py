"""A local network in child processes: one orchestrator and some PNodes, each with a home of its own.

Nothing survives the parent, even a SIGKILL of it: every child reads a pipe whose other end only the parent holds, and
ends at its end of file. The parent forks nothing after loading gRPC, for it never loads gRPC.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from dcnr.errors import Unavailable

_READY_TIMEOUT_S = 180.0
"""A PNode imports torch and measures kernels: 3 s alone; over 60 s were seen on two cores with a load of twelve."""
_STOP_TIMEOUT_S = 5.0
_LOG_TAIL_CHARACTERS = 2000


@dataclass(slots=True, kw_only=True, eq=False)
class Child:
    """A running process of the network, and what it said when it was ready."""

    name: str
    home: Path
    process: subprocess.Popen[bytes]
    address: str = ""
    peer: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> Path:
        """What it wrote to stderr."""
        return self.home / "stderr.log"

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

    ``home`` gets ``orchestrator/``, ``store/`` (unless ``store`` is a URL) and ``pnode-<i>/``; the same ``home`` again
    goes on with what is there.
    ``listen`` is the orchestrator's address. A PNode takes any free port of 127.0.0.1, or (``ports_in_order``) the first
    free one from 50051. Raises :class:`Unavailable`
    with the end of the child's log (a taken port, say); then nothing is left running.
    """

    def __init__(
        self,
        home: Path,
        pnodes: int = 3,
        threads: int = 1,
        *,
        listen: str = "127.0.0.1:0",
        store: str | None = None,
        memory_bytes: int | None = None,
        ports_in_order: bool = False,
    ) -> None:
        self.home = Path(home)
        self._pnodes_at_start = pnodes
        self._threads = threads
        self._listen = listen
        self._store = store or str(self.home / "store")
        self._memory_bytes = memory_bytes
        self._ports_in_order = ports_in_order
        self._orchestrator: Child | None = None
        self.pnodes: list[Child] = []
        """By number; a killed one stays in its place until it is started again."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        try:
            self.start_orchestrator()
            started = [self._spawn_pnode(number) for number in range(self._pnodes_at_start)]
            self.pnodes = [child for child, _ in started]
            for child, lines in started:
                self._wait_ready(child, lines)
        except BaseException:
            self.stop()
            raise

    # --- what runs -----------------------------------------------------------------------------------------

    @property
    def orchestrator(self) -> Child:
        if self._orchestrator is None:
            raise Unavailable("the local network is not running")
        return self._orchestrator

    @property
    def address(self) -> str:
        """Where clients find the network."""
        return self.orchestrator.address

    @property
    def addresses(self) -> list[str]:
        """Of the PNodes, by number."""
        return [child.address for child in self.pnodes]

    @property
    def pids(self) -> list[int]:
        """Of the PNodes, by number."""
        return [child.pid for child in self.pnodes]

    # --- starting and killing ------------------------------------------------------------------------------

    def start_orchestrator(self) -> Child:
        """Start it, or start it again (at the same address) after a kill."""
        again = self._orchestrator
        if again is not None:
            again.kill()
        child, lines = self._spawn(
            "orchestrator",
            self.home / "orchestrator",
            ["orchestrator", "--listen", again.address if again else self._listen, "--store", self._store],
        )
        self._orchestrator = child
        self._wait_ready(child, lines)
        return child

    def start_pnode(self, number: int | None = None) -> Child:
        """Start one more PNode, or number ``number`` again in its old home; waits until it is ready."""
        at = len(self.pnodes) if number is None else number
        for previous in self.pnodes[at : at + 1]:
            previous.kill()
        child, lines = self._spawn_pnode(at)
        self.pnodes[at : at + 1] = [child]
        self._wait_ready(child, lines)
        return child

    def kill(self, number: int, signal_number: int = signal.SIGKILL) -> int:
        """Send PNode ``number`` a signal; returns its process id."""
        child = self.pnodes[number]
        if signal_number == signal.SIGKILL:
            child.kill()
        else:
            child.process.send_signal(signal_number)
        return child.pid

    def kill_orchestrator(self) -> int:
        self.orchestrator.kill()
        return self.orchestrator.pid

    def stop(self) -> None:
        """SIGTERM to all, PNodes first (they say goodbye), then SIGKILL to what is left."""
        for children in (self.pnodes, [self._orchestrator] if self._orchestrator else []):
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            for child in children:
                if child.running:
                    child.process.terminate()
            for child in children:
                try:
                    child.reap(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.kill()
        self.pnodes = []
        self._orchestrator = None

    # --- children ------------------------------------------------------------------------------------------

    def _spawn_pnode(self, number: int) -> tuple[Child, queue.Queue[bytes]]:
        arguments = ["pnode", "--bootstrap", self.address, "--threads", str(self._threads)]
        if not self._ports_in_order:
            arguments += ["--listen", "127.0.0.1:0"]
        if self._memory_bytes is not None:
            arguments += ["--memory", str(self._memory_bytes)]
        # The keys of an S3 store are the orchestrator's alone.
        return self._spawn(f"pnode-{number}", self.home / f"pnode-{number}", arguments, without="AWS_")

    def _spawn(
        self, name: str, home: Path, arguments: Sequence[str], without: str | None = None
    ) -> tuple[Child, queue.Queue[bytes]]:
        """``without``: variables that begin so stay here."""
        home.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"DCNR_LIFELINE": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        if without is not None:
            environment = {key: value for key, value in environment.items() if not key.startswith(without)}
        # Meant for a PNode that is started by hand: of several here all would want the one port.
        for variable in ("DCNR_CONFIG", "DCNR_PNODE_LISTEN"):
            environment.pop(variable, None)
        with open(home / "stderr.log", "ab") as log:
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
        return Child(name=name, home=home, process=process), lines

    def _wait_ready(self, child: Child, lines: queue.Queue[bytes]) -> None:
        try:
            line = lines.get(timeout=_READY_TIMEOUT_S)
        except queue.Empty:
            raise Unavailable(
                f"{child.name} was not ready within {_READY_TIMEOUT_S:g} s; its log is {child.log}"
            ) from None
        if not line:
            child.process.wait()
            tail = child.log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:].strip()
            raise Unavailable(
                f"{child.name} ended with exit code {child.process.returncode} before it was ready:\n{tail}"
            )
        ready = json.loads(line)
        child.address = ready["address"]
        child.peer = ready["peer"]


def _read_first_line(stdout: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Hand on the first line (empty where the child ended before it), then read on, so that the pipe never fills."""
    with stdout:
        lines.put(stdout.readline())
        while stdout.read(1 << 16):
            pass
