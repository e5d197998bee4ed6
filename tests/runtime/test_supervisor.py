"""Real child processes: what starts, what is left running, what an orchestrator loads."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dcnr.errors import Unavailable
from dcnr.runtime.supervisor import PROCESSES, Keeper, LocalNetwork, Restarts

pytestmark = pytest.mark.timeout(400)  # Several starts of torch, on machines that do other things meanwhile.

ORCHESTRATOR_BYTES_MOST = 150_000_000
PR_SET_CHILD_SUBREAPER = 36  # Of linux/prctl.h.

PARENT = """
import sys
from pathlib import Path
from dcnr.runtime.supervisor import PROCESSES, Keeper, LocalNetwork, Restarts
net = LocalNetwork(Path(sys.argv[1]), pnodes=1)
net.start()
assert "grpc" not in sys.modules, "the parent forks, so it never loads gRPC"
print(net.orchestrator.pid, *net.pids, flush=True)
sys.stdin.read()
"""


def ended(pids: list[int]) -> bool:
    """Wait until none of the processes runs any more."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return not psutil.wait_procs(processes, timeout=20)[1]


def state(stat: Path) -> str:
    """A task's state as the kernel tells it: ``T`` is stopped."""
    return stat.read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def adopting(whether: bool) -> Iterator[None]:
    """This process becomes the parent of processes below it whose own parent dies."""
    if not whether:
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def test_a_network_starts_loses_a_pnode_gets_it_back_and_stops(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path, pnodes=2) as net:
        pids = [net.orchestrator.pid, *net.pids]
        assert len({net.address, *net.addresses}) == 3
        this = psutil.Process(net.orchestrator.pid)
        assert this.memory_info().rss < ORCHESTRATOR_BYTES_MOST
        if sys.platform == "linux":
            assert "libtorch" not in Path(f"/proc/{this.pid}/maps").read_text(), "an orchestrator loads torch never"
            assert "libtorch" in Path(f"/proc/{net.pids[0]}/maps").read_text()
        before = net.pnodes[1]
        net.kill(1)
        assert not before.running
        after = net.start_pnode(1)
        assert (after.peer, after.home) == (before.peer, before.home), "the same home is the same peer"
        assert after.pid == net.pids[1] != before.pid
        assert len(net.pnodes) == 2
        pids.append(after.pid)
        processes = [net.orchestrator.process, *(child.process for child in net.pnodes)]
    assert ended(pids)
    assert [p.returncode for p in processes] == [0, 0, 0], "told to end, each ends in order"


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "one stopped"])
@pytest.mark.parametrize("adopted", [False, True], ids=["orphaned", "adopted"])
def test_nothing_survives_a_sigkill_of_the_parent(tmp_path: Path, stopped: bool, adopted: bool) -> None:
    """``adopted``: by this process, which is of the same session, as the first process of a container may be.

    Then their process groups are not orphaned, and the kernel wakes nobody in them unasked.
    """
    if adopted and sys.platform != "linux":
        pytest.skip("only Linux lets a process adopt orphans")
    with adopting(adopted):
        with subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as parent:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 2
            assert all(psutil.pid_exists(pid) for pid in pids)
            if stopped:
                os.kill(pids[1], signal.SIGSTOP)
                while any(state(task) != "T" for task in Path(f"/proc/{pids[1]}/task").glob("*/stat")):
                    pass  # Each turn asks the kernel; a signal to wake must not come before the one to stop.
            os.kill(parent.pid, signal.SIGKILL)
        assert ended(pids)


def test_a_taken_port_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / PROCESSES).write_text("another's")
        (tmp_path / "orchestrator").mkdir()
        (tmp_path / "orchestrator" / "stderr.log").write_text("what an earlier start has said\n")
        net = LocalNetwork(tmp_path, pnodes=1, listen=address)
        with pytest.raises(Unavailable, match=f"exit code 1(.|\n)*{address}") as caught:
            net.start()
        assert "earlier" not in str(caught.value)
    assert net.pnodes == []
    assert (tmp_path / PROCESSES).read_text() == "another's", "whose home is in use, say"
    assert not [p for p in psutil.Process().children(recursive=True) if "dcnr.cli.main" in p.cmdline()]


def test_who_died_is_started_again_and_the_record_says_who_is_there(tmp_path: Path) -> None:
    told: list[str] = []
    with LocalNetwork(tmp_path, pnodes=0) as net:
        keeper = Keeper(net, told.append)
        keeper.look(0.0)
        assert told == []
        before = net.orchestrator
        os.kill(before.pid, signal.SIGKILL)
        before.process.wait()
        keeper.look(before.started_at + 100.0)
        assert told == [f"orchestrator (process {before.pid}) ended with SIGKILL: started again in 1 s"]
        keeper.look(before.started_at + 100.9)
        assert net.orchestrator is before
        keeper.look(before.started_at + 101.0)
        after = net.orchestrator
        assert not json.loads((tmp_path / PROCESSES).read_text())["children"][0]["ready"]
        assert after.look(60.0)
        keeper.look(before.started_at + 102.0)
        assert told[1:] == [f"orchestrator is back (process {after.pid})"]
        assert (after.peer, net.address) == (before.peer, after.address)
        (child,) = json.loads((tmp_path / PROCESSES).read_text())["children"]
        assert (child["pid"], child["peer"], child["ready"]) == (after.pid, after.peer, True)
        assert child["process_created"] == psutil.Process(after.pid).create_time()

        # Now it cannot start any more, and each attempt is further from the one before.
        (tmp_path / "orchestrator" / "boot").write_text("none")
        after.kill()
        del told[:]
        now = after.started_at + 200.0
        while len(told) < 6:
            net.orchestrator.process.wait()
            keeper.look(now)
            now += 100.0
            keeper.look(now)
        pauses = [line.rpartition(" in ")[2] for line in told[:-1]]
        assert pauses == ["1 s", "1 s", "2 s", "4 s", "8 s"]
        assert "5 times in a row right after its start: given up" in told[-1]
        assert "home folder" in told[-1]
        assert not net.orchestrator.running
        keeper.look(now + 1000.0)
        assert len(told) == 6
    assert not (tmp_path / PROCESSES).exists()


def test_a_pnode_of_a_cuttable_network_joins_through_the_switch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with LocalNetwork(tmp_path, pnodes=1, cuttable=True) as net:
        switch = json.loads((tmp_path / PROCESSES).read_text())["switch"]
        dialled = {c.raddr.port for c in psutil.Process(net.pids[0]).net_connections() if c.raddr}
        assert dialled == {int(switch.rpartition(":")[2])}
    assert not (tmp_path / PROCESSES).exists()


def test_when_a_child_is_started_again() -> None:
    restarts = Restarts()
    assert restarts.pause_s(code=0, was_ready=True, lived_s=1.0) == 0.0, "it was told to end"
    assert restarts.pause_s(code=-signal.SIGKILL, was_ready=True, lived_s=1.0) == 1.0
    failing = [restarts.pause_s(code=1, was_ready=True, lived_s=1.0) for _ in range(4)]
    assert failing == [1.0, 2.0, 4.0, 8.0]
    assert restarts.pause_s(code=1, was_ready=True, lived_s=99.0) == 1.0, "it did well for a while"
    failing = [restarts.pause_s(code=-signal.SIGKILL, was_ready=False, lived_s=99.0) for _ in range(5)]
    assert failing == [1.0, 2.0, 4.0, 8.0, None]


def test_orchestrators_share_a_store_and_keep_their_addresses(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path, pnodes=1, orchestrators=2) as net:
        first, second = net.orchestrators
        assert net.address == f"{first.address},{second.address}"
        assert first.address != second.address
        assert first.peer != second.peer
        assert psutil.Process(net.pids[0]).cmdline()[4:6] == ["--bootstrap", net.address]
        assert [net.kill_orchestrator(1), second.running] == [second.pid, False]
        again = net.start_orchestrator(1)
        assert (again.peer, again.address) == (second.peer, second.address)
        assert [child.name for child in net.children] == ["orchestrator", "orchestrator-1", "pnode-0"]
    assert (tmp_path / "store" / "store.json").exists()
