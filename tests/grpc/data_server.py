"""A data service over a folder in a process of its own, without numpy's or torch's tensors in the way.

Prints its address; answers every line with its peak resident bytes; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from dcnr.adapters.grpc.server import serve
from dcnr.adapters.store.folder import FolderStore
from dcnr.dataservice.service import DataService
from tests.grpc.peers import Peer

SECRET = b"0123456789abcdef"


def peak_bytes() -> int:
    """Of this program alone: ``ru_maxrss`` begins at what the parent had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def main(root: Path) -> None:
    """Serve until standard input ends."""
    hub = Peer("a").hub
    server = await serve("127.0.0.1:0", hub, None, DataService(FolderStore(root), SECRET, lambda: 0.0))
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(f"{peak_bytes()}\n")
        sys.stdout.flush()
    await hub.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
