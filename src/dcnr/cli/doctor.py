"""``dcnr doctor``: is this machine fit, and if not, what to mend."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from dcnr.cli.output import (
    EXIT_FAILURE,
    JsonOption,
    NetworkOption,
    command,
    duration,
    moment,
    print_json,
    say,
    size,
)
from dcnr.cli.place import open_client, read_up_note, state_folder
from dcnr.config import LIMITS
from dcnr.errors import DCNRError, StoreError, UsageError

ORCHESTRATOR_PORT = 50050
PNODE_PORT = 50051
LOOPBACK = ("localhost", "127.0.0.1")
CLOCKS_APART_MOST_S = 120.0
"""Further apart is told. Amazon's S3 refuses from 15 minutes on; clocks that are kept right are within a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """``mend`` is empty where all is well. ``fatal`` = nothing works without it."""

    name: str
    found: str
    mend: str = ""
    fatal: bool = False


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    old = sys.version_info < (3, 11)
    return Check(name="python", found=version, mend="install Python 3.11 or newer" if old else "", fatal=old)


def check_torch() -> Check:
    """Importing is the only proof that the build fits the machine."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(
            name="torch",
            found=str(error),
            mend="a PNode needs it: pip install 'dcnr[pnode]' (the CPU build: --index-url https://download.pytorch.org/whl/cpu)",
            fatal=True,
        )
    return Check(name="torch", found=f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


def check_port(name: str, port: int) -> Check:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            ours = read_up_note()
            if ours is not None and any(a.endswith(f":{port}") for a in ours.address.split(",")):
                return Check(name=name, found=f"{port} is used by `dcnr up` (process {ours.pid})")
            if port == PNODE_PORT:
                return Check(name=name, found=f"{port} is taken: a PNode takes the next free one")
            return Check(
                name=name,
                found=f"{port} is taken",
                mend=f"end what listens there, or use --listen 127.0.0.1:{port + 100}",
            )
    return Check(name=name, found=f"{port} is free")


def check_proxy(environment: Mapping[str, str]) -> Check:
    """Proxies of the environment are meant for the outside; one that catches loopback breaks other local tools.

    DCNR's own links switch them off.
    """
    names = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
    proxies = {name: environment[name] for name in names if environment.get(name)}
    if not proxies:
        return Check(name="proxy", found="none")
    spared = {part.strip() for part in environment.get("no_proxy", environment.get("NO_PROXY", "")).split(",")}
    found = ", ".join(proxies)
    if "*" in spared or spared.issuperset(LOOPBACK):
        return Check(name="proxy", found=f"{found}, not for loopback")
    return Check(
        name="proxy",
        found=f"{found}, loopback included",
        mend=f"export no_proxy={','.join(sorted(spared - {''} | {*LOOPBACK}))}",
    )


def check_disk() -> Check:
    folder = state_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    few = free < 2 << 30
    mend = "free some space, or give another folder with --home" if few else ""
    if not os.access(folder, os.W_OK):
        mend = f"{folder} cannot be written: give another folder with --home"
    return Check(name="disk", found=f"{size(free)} free at {folder}", mend=mend)


def check_machine() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    few = memory.available < 2 * LIMITS.pnode_overhead_bytes
    return Check(
        name="machine",
        found=f"{cores} cores, {size(memory.total)} memory, {size(memory.available)} available",
        mend=f"a PNode needs {size(LIMITS.pnode_overhead_bytes)} and its VNodes: end other programs" if few else "",
    )


def check_store(url: str) -> Check:
    """As an orchestrator does at its start, races included. A store that is new gets its ``store.json``."""
    import asyncio

    from dcnr.adapters.store.opening import open_store

    try:
        store = asyncio.run(open_store(url, os.environ))
    except (StoreError, UsageError) as error:
        return Check(name="store", found=str(error), mend="see The store in the README", fatal=True)
    return Check(name="store", found=f"{store.url} is fit")


def check_network(given: str | None) -> Iterator[Check]:
    """Whether it answers, and whether its clock is ours. Raises nothing; tells nothing where no network is named."""
    from dcnr.adapters import clock

    try:
        with open_client(given) as client:
            before = clock.unix_s()
            status = client.status()
            after = clock.unix_s()
    except DCNRError as error:
        if given or read_up_note() is not None:
            yield Check(name="network", found=str(error), mend="start it, or correct --network", fatal=True)
        return
    yield Check(name="network", found=f"orchestrator {status.descriptor.peer[:12]} answers")
    if status.unix_s:
        yield check_clock(status.unix_s, before, after)


def check_clock(theirs: float, before: float, after: float) -> Check:
    """``theirs``: an orchestrator's wall clock at a moment between ``before`` and ``after`` of ours, all in seconds.

    Nothing in DCNR is decided by a wall clock; stores, certificates and people go by it.
    """
    ahead = max(0.0, before - theirs) or min(0.0, after - theirs)
    ours, other = moment(after), moment(theirs)
    if abs(ahead) <= CLOCKS_APART_MOST_S:
        return Check(name="clock", found=f"{ours}, as the orchestrator's")
    return Check(
        name="clock",
        found=f"{ours}, {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the orchestrator's, {other}",
        mend="set the clock that is wrong (timedatectl set-ntp true). Training goes on as it is, but times in logs and "
        "lists mislead, and an S3 store refuses whoever is too far from its own clock",
    )


def checks(store: str | None, network: str | None) -> Iterator[Check]:
    yield check_python()
    yield check_torch()
    yield check_port("orchestrator port", ORCHESTRATOR_PORT)
    yield check_port("pnode port", PNODE_PORT)
    yield check_proxy(os.environ)
    yield check_disk()
    yield check_machine()
    yield from check_network(network)
    if store is not None:
        yield check_store(store)


@command
def doctor(
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Check this store too: a folder or s3://bucket/prefix.")
    ] = None,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Check this machine, and the network where one is named or runs here, and say what to mend. Exit 1 where something
    is missing without which nothing works."""
    fatal = False
    for check in checks(store, network):
        fatal = fatal or check.fatal
        if json:
            print_json({"check": check.name, "ok": not check.mend, "found": check.found, "mend": check.mend})
            continue
        say(f"{'mend' if check.mend else 'ok':<5} {check.name:<18} {check.found}")
        if check.mend:
            say(f"{'':<24} {check.mend}")
    if fatal:
        raise typer.Exit(EXIT_FAILURE)
