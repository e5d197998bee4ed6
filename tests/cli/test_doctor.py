"""What the doctor notices."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dcnr.cli.doctor import CLOCKS_APART_MOST_S, check_clock, check_network, check_port, check_proxy
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


def test_a_taken_port_of_a_pnode_is_nothing_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("dcnr.cli.doctor.PNODE_PORT", port)
        check = check_port("pnode port", port)
        assert (check.found, check.mend) == (f"{port} is taken: a PNode takes the next free one", "")


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
    ("ours_ahead_s", "said"),
    [
        (30 * 86400.0, "30 d 0 h ahead of the orchestrator's"),
        (-30 * 86400.0, "30 d 0 h behind the orchestrator's"),
        (CLOCKS_APART_MOST_S + 1, "ahead of"),
        (CLOCKS_APART_MOST_S, ""),
        (-CLOCKS_APART_MOST_S, ""),
        (0.0, ""),
    ],
)
def test_a_clock_that_is_off_is_named(ours_ahead_s: float, said: str) -> None:
    """The answer may take long: whatever the other clock can have been meanwhile is no skew."""
    theirs, took_s = 1.8e9, 5.0
    before = theirs + ours_ahead_s - (took_s if ours_ahead_s < 0 else 0.0)
    check = check_clock(theirs, before, before + took_s)
    assert said in check.found
    assert bool(check.mend) is bool(said)
    assert not check.fatal


def test_no_network_is_no_trouble_and_one_that_is_named_must_answer() -> None:
    assert list(check_network(None)) == []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        (check,) = check_network(address)
    assert check.fatal
    assert address in check.found


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
