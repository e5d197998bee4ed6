"""What the doctor notices."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dcnr.cli.doctor import check_port, check_proxy
from dcnr.cli.peers import parse_listen, parse_size
from dcnr.cli.place import up_note
from dcnr.errors import UsageError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_taken_port_names_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = check_port("port", port)
        assert f"{port} is taken" in check.found
        assert "--listen" in check.mend
        with up_note(f"127.0.0.1:1,127.0.0.1:{port},127.0.0.1:2", Path("home")):
            assert check_port("port", port).mend == ""


@pytest.mark.parametrize(
    ("environment", "mend"),
    [
        ({}, False),
        ({"http_proxy": ""}, False),
        ({"http_proxy": "http://dead:1"}, True),
        ({"grpc_proxy": "http://dead:1", "no_proxy": "localhost"}, True),
        ({"https_proxy": "http://dead:1", "no_proxy": "localhost, 127.0.0.1"}, False),
        ({"https_proxy": "http://dead:1", "no_proxy": "*"}, False),
    ],
)
def test_a_proxy_that_catches_loopback_is_noticed(environment: dict[str, str], mend: bool) -> None:
    assert bool(check_proxy(environment).mend) is mend


@pytest.mark.parametrize(
    ("text", "count"), [("1000", 1000), ("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5 kb", 1536), ("1t", 1 << 40)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "1 2", "-3", "5X"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_addresses() -> None:
    assert parse_listen("50050") == "127.0.0.1:50050"
    assert parse_listen("[::1]:7") == "[::1]:7"
    for wrong in ("host", "host:", "host:70000", ""):
        with pytest.raises(UsageError):
            parse_listen(wrong)
