"""What passes the switch, and what does not while somebody is cut off."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from dcnr.errors import Unavailable
from dcnr.runtime.switch import Switch, cut

TIMEOUT_S = 20.0


@pytest.fixture
def switch() -> Iterator[str]:
    """The address of one that runs."""
    made = Switch()
    made.start()
    yield made.address
    made.stop()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(TIMEOUT_S)
        yield listening


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def connection(switch: str) -> socket.socket:
    host, _, port = switch.rpartition(":")
    return socket.create_connection((host, int(port)), TIMEOUT_S)


def dial(switch: str, name: str, target: str) -> socket.socket:
    """Ask for a connection to ``target``, as gRPC does."""
    dialled = connection(switch)
    authorization = base64.b64encode(name.encode()).decode()
    dialled.sendall(f"CONNECT {target} HTTP/1.1\r\nProxy-Authorization: Basic {authorization}\r\n\r\n".encode())
    return dialled


def answer(dialled: socket.socket) -> bytes:
    """The switch's own, up to the empty line."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = dialled.recv(1)
        assert piece, head
        head += piece
    return head


def meanwhile(switch: str) -> None:
    """Others come and go, so that what was sent before has passed, if it can."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        for _ in range(20):
            with dial(switch, "pnode-9", address(elsewhere)) as other:
                answer(other)


def silent(dialled: socket.socket) -> bool:
    """Whether nothing has come."""
    dialled.setblocking(False)
    try:
        dialled.recv(1)
    except BlockingIOError:
        return True
    finally:
        dialled.settimeout(TIMEOUT_S)
    return False


def test_bytes_pass_both_ways_and_so_does_the_end(switch: str, server: socket.socket) -> None:
    with dial(switch, "pnode-0", address(server)) as dialled:
        assert answer(dialled) == b"HTTP/1.1 200 OK\r\n\r\n"
        with server.accept()[0] as accepted:
            dialled.sendall(b"up")
            assert accepted.recv(9) == b"up"
            accepted.sendall(b"down")
            assert dialled.recv(9) == b"down"
        assert dialled.recv(9) == b""


@pytest.mark.parametrize("who", ["who dials", "who is dialled"])
def test_who_is_cut_off_hears_and_is_heard_when_the_cut_ends(switch: str, server: socket.socket, who: str) -> None:
    whom = ("pnode-1", "127.0.0.1:1") if who == "who dials" else ("pnode-0", address(server))
    name = "pnode-1" if who == "who dials" else "pnode-2"
    with dial(switch, name, address(server)) as dialled, closing(server.accept()[0]) as accepted:
        answer(dialled)
        with cut(switch, *whom):
            dialled.sendall(b"up")
            accepted.sendall(b"down")
            later = dial(switch, name, address(server))
            meanwhile(switch)
            assert silent(dialled)
            assert silent(accepted)
            assert silent(later)
        assert accepted.recv(9) == b"up"
        assert dialled.recv(9) == b"down"
        with later:
            assert answer(later) == b"HTTP/1.1 200 OK\r\n\r\n"


def test_an_end_does_not_pass_a_cut_either(switch: str, server: socket.socket) -> None:
    with dial(switch, "pnode-1", address(server)) as dialled:
        answer(dialled)
        with cut(switch, "pnode-1", "127.0.0.1:1"):
            server.accept()[0].close()
            meanwhile(switch)
            assert silent(dialled)
        assert dialled.recv(9) == b""


def test_of_two_cuts_the_second_goes_on_when_the_first_ends(switch: str, server: socket.socket) -> None:
    with dial(switch, "pnode-1", address(server)) as dialled, closing(server.accept()[0]) as accepted:
        answer(dialled)
        first = cut(switch, "pnode-1", "127.0.0.1:1")
        with cut(switch, "pnode-1", "127.0.0.1:1"):
            first.close()
            accepted.sendall(b"down")
            meanwhile(switch)
            assert silent(dialled)
        assert dialled.recv(9) == b"down"


def test_what_nobody_listens_at_and_what_makes_no_sense_is_told(switch: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nowhere = address(gone)
    for target, said in ((nowhere, b"502"), ("no-port", b"502")):
        with dial(switch, "pnode-0", target) as dialled:
            assert said in answer(dialled)
    with connection(switch) as dialled:
        dialled.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"400" in answer(dialled)


def test_who_is_no_switch_cuts_nobody_off(switch: str, server: socket.socket) -> None:
    nowhere = address(server)
    server.close()
    with pytest.raises(Unavailable, match=f"at {nowhere} does not answer"):
        cut(nowhere, "pnode-0", "127.0.0.1:1")
    with pytest.raises(Unavailable, match="cuts nobody off"):
        cut(switch, "two words", "127.0.0.1:1")
