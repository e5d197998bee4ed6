"""Real child processes: what starts, what is left running, what an orchestrator loads."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dcnr.errors import Unavailable
from dcnr.runtime.supervisor import LocalNetwork

pytestmark = pytest.mark.timeout(400)  # Several starts of torch, on machines that do other things meanwhile.

ORCHESTRATOR_BYTES_MOST = 150_000_000

PARENT = """
import sys
from pathlib import Path
from dcnr.runtime.supervisor import LocalNetwork
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


def test_nothing_survives_a_sigkill_of_the_parent(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
    assert ended(pids)


def test_a_taken_port_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        net = LocalNetwork(tmp_path, pnodes=1, listen=address)
        with pytest.raises(Unavailable, match=f"exit code 1(.|\n)*{address}"):
            net.start()
    assert net.pnodes == []
    assert not [p for p in psutil.Process().children(recursive=True) if "dcnr.cli.main" in p.cmdline()]
