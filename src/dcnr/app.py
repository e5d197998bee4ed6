"""The composition root: the only place that joins a role to its adapters.

Everything heavy is imported inside the functions: an orchestrator never loads torch, and ``import dcnr.app`` loads
neither torch nor gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import json
import logging
import math
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dcnr.config import LIMITS, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN
from dcnr.errors import AddressInUse, Unavailable, UsageError
from dcnr.network.builder import Graph
from dcnr.protocol.messages import (
    Capabilities,
    Descriptor,
    Message,
    Register,
    Registered,
    SessionList,
    SessionQuery,
    Status,
)

if TYPE_CHECKING:
    from dcnr.adapters.files import HomeFolder
    from dcnr.adapters.grpc.links import LinkHub
    from dcnr.runtime.driver import Driver
    from dcnr.runtime.ports import ClientCalls, DataService, EventSink, ObjectService

logger = logging.getLogger(__name__)

_PNODE_HOST = "127.0.0.1"
_PNODE_PORTS = range(50051, 51051)
_SECRET_BYTES = 32
_PR_SET_PDEATHSIG = 1  # Of linux/prctl.h.


# --- Graph's adapters --------------------------------------------------------------------------------------


def _to_yaml(graph: Graph) -> str:
    """The network file of this graph."""
    from dcnr.adapters.yaml_network import dump_network

    return dump_network(graph.definition())


def _to_torch(graph: Graph, seed: int = 0) -> Any:
    """A plain ``torch.nn.Module`` of this graph, its weights those of a session with ``seed``: debugger and exporter."""
    from dcnr.adapters.torch.module import to_torch

    return to_torch(graph.definition(), seed)


# The graph is pure and knows neither YAML nor torch; its users should not have to know that.
setattr(Graph, "to_yaml", _to_yaml)  # noqa: B010
setattr(Graph, "to_torch", _to_torch)  # noqa: B010


# --- the two roles -----------------------------------------------------------------------------------------


def run_orchestrator(*, listen: str, home: Path, store: str | None = None, insecure: bool = False) -> NoReturn:
    """Run an orchestrator with its data service until it is told to end; then end this process with the exit code.

    ``store``: a folder, a ``file://`` or an ``s3://`` URL, ``home/store`` where it is ``None``. Raises :class:`AddressInUse`,
    :class:`UsageError`, :class:`Unavailable` (home), :class:`~dcnr.errors.StoreError`.
    """
    _check_listen(listen, insecure)
    with _process(home) as (folder, sink):
        code = asyncio.run(_orchestrator(listen, folder, store or str(home / "store"), sink))
    # The interpreter would wait for calls to a store that does not answer.
    _end(code)


def run_pnode(
    *,
    bootstrap: tuple[str, ...],
    home: Path,
    listen: str | None = None,
    memory_bytes: int | None = None,
    threads: int = 1,
    insecure: bool = False,
    http_proxy: str = "",
    upload_bytes_per_s: float = math.inf,
) -> NoReturn:
    """Run a PNode until it is told to end; then end this process with the exit code.

    ``listen`` ``None``: the first free port of 127.0.0.1 from 50051. ``memory_bytes`` for VNodes; ``None``: half of
    what is available. ``http_proxy``: what it dials goes through that proxy. ``upload_bytes_per_s``: what
    states that it sends may take of the line. Raises :class:`AddressInUse`, :class:`UsageError`, :class:`Unavailable` (home).
    """
    if listen is not None:
        _check_listen(listen, insecure)
    with _process(home) as (folder, sink):
        from dcnr.adapters.torch import environment

        # Before anything else loads torch: the number of threads reaches bits.
        environment.prepare(threads)
        capabilities = _measure(threads, memory_bytes)
        code = asyncio.run(_pnode(bootstrap, listen, http_proxy, upload_bytes_per_s, folder, capabilities, sink))
    # The interpreter would take a second to take torch apart, beside a compute thread that may still run.
    _end(code)


def _end(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


async def _orchestrator(listen: str, folder: HomeFolder, store_url: str, sink: EventSink) -> int:
    import psutil

    from dcnr.adapters import clock
    from dcnr.adapters.sampling import SamplingExecutor
    from dcnr.adapters.store.opening import open_store
    from dcnr.dataservice.service import DataService
    from dcnr.orchestrator.orchestrator import OrchestratorMachine
    from dcnr.orchestrator.placement import solve
    from dcnr.runtime.driver import Driver, Ports
    from dcnr.runtime.tensors import CountedTable, NumpyBackend
    from dcnr.runtime.worker import ThreadWorker

    store = await open_store(store_url, os.environ)
    secret = secrets.token_bytes(_SECRET_BYTES)
    driver = Driver(CountedTable(NumpyBackend()), LIMITS)
    data = DataService(store, secret, clock.monotonic, unfinished=partial(_unfinished, driver))
    hub = await _serve([listen], folder, "orchestrator", driver, driver, data)
    machine = OrchestratorMachine(
        peer=folder.peer,
        incarnation=folder.incarnation,
        addresses=hub.descriptor.addresses,
        secret=secret,
        limits=LIMITS,
        seed=_seed(folder),
        unix_s_at_zero=clock.unix_s() - clock.monotonic(),
        store=store.url,
    )
    this = psutil.Process()

    def complete(message: Message) -> Message:
        if isinstance(message, Status):
            return replace(message, resident_bytes=this.memory_info().rss, unix_s=clock.unix_s())
        return message

    _stop_on_signals(driver)
    _announce(hub)
    return await driver.run(
        machine,
        Ports(
            links=hub,
            home=folder,
            sink=sink,
            check_frame=machine.check_frame,
            complete=complete,
            store=store,
            workers=(ThreadWorker(SamplingExecutor(driver.table)),),
            plan=solve,
        ),
    )


async def _unfinished(calls: ClientCalls, dataset: str) -> list[str]:
    """Sessions under way that read ``dataset``; they are all known to this machine, and come in their order."""
    from dcnr.orchestrator.owner import ENDED

    reply = await calls.call(SessionQuery())
    if not isinstance(reply, SessionList):
        raise Unavailable(f"which sessions read dataset {dataset[:12]} could not be found out: {reply}")
    return [s.session for s in reply.sessions if s.dataset == dataset and s.state not in ENDED]


async def _pnode(
    bootstrap: tuple[str, ...],
    listen: str | None,
    http_proxy: str,
    upload_bytes_per_s: float,
    folder: HomeFolder,
    capabilities: Capabilities,
    sink: EventSink,
) -> int:
    from dcnr.adapters.grpc.client import DataClient, OrchestratorClient
    from dcnr.adapters.torch import environment
    from dcnr.adapters.torch.backend import TorchBackend
    from dcnr.adapters.torch.executor import TorchExecutor
    from dcnr.adapters.torch.state import serialise_snapshot
    from dcnr.dataservice.pacer import Pacer
    from dcnr.dataservice.shelf import Shelf
    from dcnr.pnode.pnode import FENCE, PNodeMachine
    from dcnr.runtime.driver import Driver, Ports
    from dcnr.runtime.tensors import CountedTable
    from dcnr.runtime.worker import ThreadWorker

    table = CountedTable(TorchBackend())
    driver = Driver(table, LIMITS)
    candidates = [listen] if listen is not None else [f"{_PNODE_HOST}:{port}" for port in _PNODE_PORTS]
    pacer = Pacer(upload_bytes_per_s)
    shelf = Shelf(folder, LIMITS, pacer)
    hub = await _serve(candidates, folder, "pnode", driver, None, None, shelf, http_proxy)
    machine = PNodeMachine(
        peer=folder.peer,
        incarnation=folder.incarnation,
        addresses=hub.descriptor.addresses,
        capabilities=capabilities,
        bootstrap=bootstrap,
        fence=folder.load(FENCE),
        limits=LIMITS,
        seed=_seed(folder),
    )

    async def register(address: str) -> Registered:
        async with OrchestratorClient(address, LIMITS, http_proxy) as client:
            message = Register(descriptor=hub.descriptor, capabilities=capabilities)
            reply: Registered = await client.call(message, LIMITS.dial_timeout_s)
            return reply

    _stop_on_signals(driver)
    joined = asyncio.create_task(_announce_when_joined(driver, hub))
    async with DataClient(driver.orchestrator_address, table, LIMITS, http_proxy, pacer) as transfer:
        try:
            return await driver.run(
                machine,
                Ports(
                    links=hub,
                    home=folder,
                    sink=sink,
                    workers=(ThreadWorker(TorchExecutor(table)),),
                    check_frame=machine.check_frame,
                    transfer=transfer,
                    serialise=serialise_snapshot,
                    admit=shelf.admit,
                    return_memory=environment.return_freed_memory,
                    register=register,
                ),
            )
        finally:
            joined.cancel()


async def _serve(
    candidates: list[str],
    folder: HomeFolder,
    role: str,
    driver: Driver,
    calls: ClientCalls | None,
    data: DataService | None,
    objects: ObjectService | None = None,
    http_proxy: str = "",
) -> LinkHub:
    """Listen on the first candidate that is free. Raises :class:`AddressInUse` where none is."""
    from dcnr.adapters.grpc.links import LinkHub
    from dcnr.adapters.grpc.server import serve

    descriptor = Descriptor(
        peer=folder.peer,
        incarnation=folder.incarnation,
        role=role,
        addresses=(),
        version_min=PROTOCOL_VERSION_MIN,
        version_max=PROTOCOL_VERSION_MAX,
    )
    hub = LinkHub(descriptor=descriptor, table=driver.table, events=driver, limits=LIMITS, http_proxy=http_proxy)
    for candidate in candidates:
        try:
            await serve(candidate, hub, calls, data, objects)
        except AddressInUse as error:
            if candidate == candidates[-1]:
                raise AddressInUse(f"{error}; choose another --listen") from error
        else:
            break
    hub.descriptor = replace(hub.descriptor, addresses=tuple(_reachable(a) for a in hub.descriptor.addresses))
    logger.info("%s %s listens on %s", role, folder.peer, hub.descriptor.addresses[0])
    return hub


# --- what a process of the network does around its role ----------------------------------------------------


@contextlib.contextmanager
def _process(home: Path) -> Iterator[tuple[HomeFolder, EventSink]]:
    """The home, locked, and logging into it; with ``DCNR_LIFELINE=1`` tied to the parent's life."""
    from dcnr.adapters import telemetry
    from dcnr.adapters.files import HomeFolder

    # Before gRPC is loaded: it would print its own line beside our error where a port is taken.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    supervised = _supervised()
    if supervised:
        threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    folder = HomeFolder(home)
    try:
        # A supervised process's stderr is a file without bound; the log in the home has the rest.
        yield folder, telemetry.configure(home, console=logging.WARNING if supervised else logging.INFO)
    finally:
        folder.close()


def _supervised() -> bool:
    return os.environ.get("DCNR_LIFELINE") == "1"


def _end_with_parent() -> None:
    """Only the parent holds the other end of our standard input: its end of file is the parent's death.

    A stopped process reads nothing, so Linux is asked to wake it then. The kernel does so unasked (SIGHUP and SIGCONT)
    only where all threads have stopped and whoever adopts the orphan is of another session: not under many a container.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    while os.read(0, 4096):
        pass
    os._exit(1)


def _announce(hub: LinkHub) -> None:
    """Tell a supervising parent that we are ready, in one line of JSON on stdout."""
    if _supervised():
        line = {"ready": True, "address": hub.descriptor.addresses[0], "peer": hub.descriptor.peer}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


async def _announce_when_joined(driver: Driver, hub: LinkHub) -> None:
    await driver.joined.wait()
    _announce(hub)


def _stop_on_signals(driver: Driver) -> None:
    """The first SIGTERM or SIGINT asks the machine to end; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: signal.Signals) -> None:
        for each in numbers:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        driver.shutdown(f"the process was told to end ({number.name})")

    for number in numbers:
        loop.add_signal_handler(number, stop, number)


def _seed(folder: HomeFolder) -> int:
    """Of a machine's own generator (jitter, back-off): another one for every start."""
    return int(folder.incarnation.nonce[:12], 16)


# --- addresses and capabilities ----------------------------------------------------------------------------


def _host(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{address!r} is no address: expected host:port with a port from 0 to 65535")
    return host.strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_listen(listen: str, insecure: bool) -> None:
    """No open port without authentication: beyond loopback only where the owner says so."""
    host = _host(listen)
    if not insecure and not _is_loopback(host):
        raise UsageError(
            f"{listen} is reachable from other machines and this version does not authenticate peers: "
            "listen on 127.0.0.1; on a network that you trust, `dcnr orchestrator` and `dcnr pnode` take --insecure"
        )


def _reachable(address: str) -> str:
    """What to tell others: an address of this machine in place of "all of them"."""
    host, _, port = address.rpartition(":")
    if host not in ("0.0.0.0", "[::]"):
        return address
    return f"{socket.gethostname()}:{port}"


def _measure(threads: int, memory_bytes: int | None) -> Capabilities:
    """What this machine offers. Raises :class:`Unavailable` where no memory would be left for VNodes."""
    import psutil

    from dcnr.adapters.torch.numeric_class import measure
    from dcnr.network.types import catalogue_digest

    started = time.perf_counter()
    numeric_class, class_facts, gflops = measure(threads)
    if memory_bytes is None:
        memory_bytes = psutil.virtual_memory().available // 2 - LIMITS.pnode_overhead_bytes
        if memory_bytes <= 0:
            raise Unavailable("no memory is left for VNodes; give --memory to offer some all the same")
    seconds = time.perf_counter() - started
    logger.info("numeric class %s, %.1f GFLOP/s, measured in %.1f s", numeric_class, gflops, seconds)
    return Capabilities(
        cores=os.cpu_count() or 1,
        memory_bytes=memory_bytes,
        architecture=platform.machine(),
        numeric_class=numeric_class,
        class_facts=class_facts,
        gflops=gflops,
        threads=threads,
        catalogue=catalogue_digest(),
        hostname=socket.gethostname(),
    )
