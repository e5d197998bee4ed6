"""Programs that stay: a local network, an orchestrator, a PNode."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from dcnr.cli.output import command, say, warn
from dcnr.cli.place import state_folder, up_note
from dcnr.errors import NotInThisVersion, UsageError

ORCHESTRATOR = "127.0.0.1:50050"
WATCH_S = 0.2
"""How often `dcnr up` looks whether a process has ended: it costs microseconds, and a restart waits for it."""
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """``2GiB``, ``512M``, ``1000000``: bytes, units binary. Raises :class:`UsageError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if found is None:
        raise UsageError(f"a size is a number with K, M, G or T, found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def parse_listen(text: str, option: str = "--listen") -> str:
    """``HOST:PORT`` or ``PORT``; a port beyond 65535 would wrap silently. Raises :class:`UsageError`."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"{option} takes HOST:PORT with a port up to 65535, found {text!r}")
    return f"{host or '127.0.0.1'}:{port}"


def parse_proxy(text: str) -> str:
    """``http://[NAME@]HOST:PORT``, or nothing: gRPC would silently do without one that it cannot read.

    Raises :class:`UsageError`.
    """
    if text and not re.fullmatch(r"http://([^@/\s]+@)?[^@/\s]+:\d+/?", text):
        raise UsageError(f"--http-proxy takes http://HOST:PORT, found {text!r}")
    return text


def _addresses(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


@command
def up(
    pnodes: Annotated[int, typer.Option(min=1, help="PNodes to start.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each PNode.")] = 1,
    home: Annotated[
        Path | None, typer.Option(help="Folder of everything. Default: in the user's state folder.")
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDR",
            help="Of the (first) orchestrator; PNodes stay on 127.0.0.1, at the first free ports from 50051.",
        ),
    ] = ORCHESTRATOR,
    orchestrators: Annotated[int, typer.Option(min=1, help="Orchestrators over the same store.")] = 1,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Folder or s3://bucket/prefix. Default: a folder in the home.")
    ] = None,
    cuttable: Annotated[
        bool, typer.Option("--cuttable", help="`dcnr chaos` may cut PNodes off: what they dial passes through here.")
    ] = False,
) -> None:
    """A local network in child processes; Ctrl-C stops all. Who dies is started again. Unfinished sessions go on."""
    from dcnr.runtime.supervisor import Keeper, LocalNetwork

    # The children must not outlive a polite end of this process either.
    signal.signal(signal.SIGTERM, _interrupt)
    folder = home or state_folder() / "up"
    local = LocalNetwork(
        folder,
        pnodes,
        threads,
        orchestrators=orchestrators,
        store=store,
        listen=parse_listen(listen),
        ports_in_order=True,
        cuttable=cuttable,
    )
    with local as net, up_note(net.address, folder):
        what = f"{pnodes} PNodes of {threads} thread{'s' * (threads > 1)}"
        if orchestrators > 1:
            what = f"{orchestrators} orchestrators, {what}"
        say(f"network at {net.address}: {what}, home {folder}")
        say("try:  dcnr nodes   |   dcnr train FILE --data PATH --steps N   |   Ctrl-C stops all")
        keeper = Keeper(net, warn)
        while True:
            threading.Event().wait(WATCH_S)
            keeper.look(time.monotonic())


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@command
def orchestrator(
    listen: Annotated[str, typer.Option(metavar="ADDR", help="HOST:PORT to listen on.")] = ORCHESTRATOR,
    bootstrap: Annotated[str | None, typer.Option(metavar="ADDR,...", help="Not in this version.")] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Folder or s3://bucket/prefix. Default: a folder in the home.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of this process.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without identity.")] = False,
) -> None:
    """One orchestrator, with its data service. Another on the same store takes over what this one leaves."""
    from dcnr.app import run_orchestrator

    if bootstrap:
        raise NotInThisVersion(
            "--bootstrap of an orchestrator is not in this version: those of one --store find each other there"
        )
    run_orchestrator(
        listen=parse_listen(listen), home=home or state_folder() / "orchestrator", store=store, insecure=insecure
    )


@command
def pnode(
    bootstrap: Annotated[
        str, typer.Option(metavar="ADDR,...", envvar=["DCNR_PNODE_BOOTSTRAP", "DCNR_NETWORK"], help="Orchestrators.")
    ] = ORCHESTRATOR,
    listen: Annotated[str | None, typer.Option(metavar="ADDR", help="Default: the first free port from 50051.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="For VNodes, as 2GiB. Default: half.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the compute worker.")] = 1,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    home: Annotated[Path | None, typer.Option(help="Folder of this process.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without identity.")] = False,
    http_proxy: Annotated[
        str, typer.Option(metavar="URL", help="As http://host:port: what this PNode dials goes through that proxy.")
    ] = "",
    upload_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes a second that copies of states may take, as 2M. Default: all."),
    ] = None,
) -> None:
    """One PNode: offers this machine to a network."""
    if device not in ("auto", "cpu"):
        if device == "mps" or re.fullmatch(r"cuda(:\d+)?", device):
            raise NotInThisVersion(f"--device {device} is not in this version")
        raise UsageError(f"--device {device}: auto, cpu, cuda:N or mps")
    given = None if memory is None else parse_size(memory)
    if given == 0:
        raise UsageError(f"--memory {memory}: a PNode that offers no memory hosts nothing")
    for address in _addresses(bootstrap):
        parse_listen(address, "--bootstrap")
    limit = math.inf if upload_limit is None else parse_size(upload_limit)
    if limit < 1:
        raise UsageError(f"--upload-limit {upload_limit}: a PNode has to send the states that it computes")
    from dcnr.app import run_pnode

    run_pnode(
        bootstrap=_addresses(bootstrap),
        listen=None if listen is None else parse_listen(listen),
        memory_bytes=given,
        threads=threads,
        home=home or state_folder() / "pnode",
        insecure=insecure,
        http_proxy=parse_proxy(http_proxy),
        upload_bytes_per_s=limit,
    )
