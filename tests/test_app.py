import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import dcnr
from dcnr import app
from dcnr.adapters.files import HomeFolder
from dcnr.config import LIMITS
from dcnr.errors import AddressInUse, Unavailable, UsageError
from dcnr.runtime.driver import Driver
from dcnr.runtime.tensors import CountedTable, NumpyBackend


@pytest.mark.parametrize("listen", ["0.0.0.0:50050", "192.168.1.5:50050", "example.org:50050", "[::]:50050"])
def test_listening_beyond_loopback_needs_the_owners_word(listen: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(UsageError, match="--insecure"):
        app.run_orchestrator(listen=listen, home=home)
    with pytest.raises(UsageError, match="--insecure"):
        app.run_pnode(bootstrap=(), listen=listen, home=home)
    assert not home.exists(), "nothing was begun"
    app._check_listen(listen, insecure=True)


@pytest.mark.parametrize("listen", ["127.0.0.1:50050", "127.9.9.9:1", "localhost:50050", "[::1]:50050"])
def test_loopback_is_open_to_all(listen: str) -> None:
    app._check_listen(listen, insecure=False)


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:99999", ":50050", "127.0.0.1:x"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        app._check_listen(listen, insecure=False)


def test_a_home_in_use_stops_a_second_process(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    with pytest.raises(Unavailable, match="in use by process"):
        app.run_orchestrator(listen="127.0.0.1:0", home=tmp_path)
    home.close()


def test_the_first_free_candidate_is_taken(tmp_path: Path) -> None:
    async def addresses(candidates: list[str]) -> tuple[str, ...]:
        hub = await app._serve(candidates, home, "pnode", Driver(CountedTable(NumpyBackend()), LIMITS), None, None)
        await hub.stop()
        return hub.descriptor.addresses

    home = HomeFolder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        (found,) = asyncio.run(addresses([taken, "127.0.0.1:0"]))
        assert found not in (taken, "127.0.0.1:0")
        with pytest.raises(AddressInUse, match=f"{taken}(.|\n)*--listen"):
            asyncio.run(addresses([taken]))
    home.close()


@pytest.mark.parametrize("verbosity", [None, "ERROR"])
def test_a_taken_port_is_told_once(tmp_path: Path, verbosity: str | None) -> None:
    """gRPC would write a line of its own beside ours, unless it was asked to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
        ended = subprocess.run(
            [sys.executable, "-m", "dcnr.cli.main", "orchestrator", "--listen", listen, "--home", str(tmp_path)],
            env=environment | ({} if verbosity is None else {"GRPC_VERBOSITY": verbosity}),
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode != 0
    assert f"{listen} cannot be listened on" in " ".join(ended.stderr.split())
    assert (len(ended.stderr.splitlines()) == 1) == (verbosity is None), ended.stderr


def test_graphs_have_their_adapters(tmp_path: Path) -> None:
    graph = dcnr.templates.mlp(4, [8], 2)
    path = tmp_path / "network.yaml"
    path.write_text(graph.to_yaml())  # type: ignore[attr-defined]
    assert dcnr.load(path).definition() == graph.definition()
    module = graph.to_torch(seed=3)  # type: ignore[attr-defined]
    assert sum(p.numel() for p in module.parameters()) == 4 * 8 + 8 + 8 * 2 + 2
