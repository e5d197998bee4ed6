"""A small stage: one orchestrator or several, some PNodes and a client of the simulator, whose conversation is written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcnr.config import Limits
from dcnr.ids import PeerId
from dcnr.machine import Effect, Emit, Send
from dcnr.network.analysis import analyse
from dcnr.network.graph import canonical_json
from dcnr.network.templates import mlp
from dcnr.orchestrator.orchestrator import OrchestratorMachine
from dcnr.orchestrator.placement import Placement, Problem
from dcnr.pnode.pnode import PNodeMachine
from dcnr.protocol import messages as m
from dcnr.session.dataset import manifest_key
from dcnr.session.log import log_key
from dcnr.session.recipe import Recipe
from dcnr.sim.checkers import Checkers
from dcnr.sim.client import Client
from dcnr.sim.compute import Oracle, Rows
from dcnr.sim.run import ROWS_TRAIN, dataset
from dcnr.sim.store import Habits
from dcnr.sim.world import Process, Start, World

MOST_US = 240_000_000
ORCHESTRATOR = "orchestrator:50050"
"""The first one: PNodes and others start with this address alone."""
SHOWN = (
    "edge", "direction", "step", "microbatch", "segment", "vnode", "epoch", "instance", "base_step", "window", "before",
    "accepted", "status", "cause", "action", "after_step", "current",
)  # fmt: skip
"""Fields of messages that a transcript shows: what decides, no measurements, no hashes."""
EVENT_DATA = frozenset({"step", "index", "base_step", "first", "last", "phase", "source", "target", "old", "new"})
UNSPOKEN = (m.Heartbeat, m.EventRecord, m.NetworkCreated, m.Registered)
"""Heartbeats come by the clock; events are shown where they are emitted; the rest says nothing."""


def halves(problem: Problem) -> Placement | str:
    """The units in topological order, cut into as many equal runs as there are PNodes: no measurement decides."""
    peers = [c.peer for c in problem.candidates]
    if not peers:
        return "no PNode is here"
    units = problem.network.placement_units()
    spots = {}
    for number, groups in enumerate(units):
        peer = peers[number * len(peers) // len(units)]
        spots.update({v: peer for group in groups for v in problem.network.groups[group].vnodes})
    spots = {v: spots[v] for v in problem.network.vnodes}
    return Placement(spots=spots, window=2, why=dict.fromkeys(spots, "its half"), stages={})


class Stage:
    """``lines`` is the conversation so far. Nothing breaks by itself: a test makes it happen, at a line that it waits for."""

    def __init__(
        self,
        *,
        pnodes: int,
        recipe: Recipe,
        limits: Limits | None = None,
        seed: int = 1,
        orchestrators: int = 1,
        compute_s: float = 0.005,
        client_at_s: float = 0.1,
    ) -> None:
        network = analyse(mlp(4, [4], 4).definition())
        manifest = dataset(0)
        self.limits = limits or Limits()
        self.lines: list[str] = []
        self.world = World(
            seed=seed,
            oracles=(Oracle(network, recipe, Rows(dataset=manifest.id, rows_train=ROWS_TRAIN)),),
            limits=self.limits,
            planner=halves,
            columns=dict.fromkeys(("x", "y", "z"), ((4,), "float32")),
            latency_us=(1_000, 1_000),
            store_delay_us=(2_000, 2_000),
            store_habits=Habits(),
            compute_us=(round(1e6 * compute_s), round(1e6 * compute_s)),
            disks_fail=False,
        )
        self.world.store.objects[manifest_key(manifest.id)] = manifest.to_bytes()
        self.world.on_effect = self._effect
        self.world.on_entry = self._entry
        self.orchestrator = self._process("orchestrator", ORCHESTRATOR, 0, self._orchestrator)
        self.orchestrators = [
            self.orchestrator,
            *(
                self._process(f"orchestrator-{n}", f"orchestrator-{n}:50050", 100 + n, self._orchestrator)
                for n in range(2, orchestrators + 1)
            ),
        ]
        self.pnodes = [self._process(f"pnode-{n}", f"pnode-{n}:50051", n, self._pnode) for n in range(1, pnodes + 1)]
        self.client = Client(
            self.world,
            self.orchestrators,
            canonical_json(network.definition),
            manifest.id,
            self.checkers,
        )
        for number, process in enumerate((*self.orchestrators, *self.pnodes)):
            self.world.at_us(1_000 * number, lambda process=process: self.start(process))  # type: ignore[misc]
        self.world.at_us(round(1e6 * client_at_s), self.client.start)

    def _process(self, name: str, address: str, number: int, build: Callable[[Start], Any]) -> Process:
        process = Process(
            name=name,
            role=name.partition("-")[0],
            peer=PeerId(f"{number:032x}"),
            address=address,
            capabilities=m.Capabilities(
                cores=1,
                memory_bytes=1 << 30,
                architecture="simulated",
                numeric_class="c" * 64,
                class_facts=(),
                gflops=10.0,
                threads=1,
                hostname=name,
            ),
            build=build,
            speed=1.0,
        )
        self.world.add(process)
        return process

    def _orchestrator(self, start: Start) -> OrchestratorMachine:
        return OrchestratorMachine(
            peer=start.peer,
            incarnation=start.incarnation,
            addresses=(start.address,),
            secret=start.secret,
            limits=self.limits,
            seed=start.seed,
        )

    def _pnode(self, start: Start) -> PNodeMachine:
        return PNodeMachine(
            peer=start.peer,
            incarnation=start.incarnation,
            addresses=(start.address,),
            capabilities=start.capabilities,
            bootstrap=(ORCHESTRATOR,),
            fence=start.fence,
            limits=self.limits,
            seed=start.seed,
        )

    @property
    def checkers(self) -> Checkers:
        """Those of its only session."""
        return self.world.watch.sessions[0]

    # --- what happens --------------------------------------------------------------------------------------

    def start(self, process: Process) -> None:
        self.world.start(process)
        self.lines.append(f"{process.name} starts as boot {process.boot}")

    def kill(self, process: Process) -> None:
        self.lines.append(f"{process.name} is killed")
        self.world.watch.causes += 1
        self.world.stop(process, "killed")

    def leave(self, process: Process) -> None:
        """It gets SIGTERM."""
        self.lines.append(f"{process.name} is told to end")
        self.world.watch.causes += 1
        self.world.shutdown(process, "SIGTERM")

    def slow_store(self, delay_s: float) -> None:
        """From now on a call takes this long to land, and as long again to be answered."""
        delay_us = round(1e6 * delay_s)
        self.world.store.delay_us = (delay_us, delay_us)

    def run_for(self, seconds: float) -> None:
        over: list[bool] = []
        self.world.after(round(1e6 * seconds), lambda: over.append(True))
        assert self.world.run(lambda: MOST_US, lambda: bool(over))

    def run_till(self, done: Callable[[], bool], what: str = "it") -> None:
        """Until ``done`` says so."""
        if not self.world.run(lambda: MOST_US, done):
            newest = "\n".join(self.lines[-20:])
            raise AssertionError(f"within {MOST_US / 1e6:.0f} simulated seconds never: {what}\nlast:\n{newest}")

    def run_until(self, *lines: str) -> None:
        """Until the conversation's newest lines contain these, in any order."""
        seen, missing = [len(self.lines)], set(lines)

        def done() -> bool:
            new, seen[0] = self.lines[seen[0] :], len(self.lines)
            missing.difference_update(new)
            return not missing

        if not self.world.run(lambda: MOST_US, done):
            # Hints and heartbeats go on for ever, so a stage never falls idle: simulated time has an end instead.
            newest = "\n".join(self.lines[-20:])
            raise AssertionError(
                f"within {MOST_US / 1e6:.0f} simulated seconds never happened: {missing}\nlast:\n{newest}"
            )

    def run_to_end(self) -> None:
        assert self.world.run(lambda: MOST_US, lambda: bool(self.client.ended)), "the session does not end"
        self.lines.append(f"client sees the session {self.client.ended}")

    def entries(self) -> list[bytes]:
        """The session's log as it is stored."""
        session, objects = self.checkers.session, self.world.store.objects
        assert session is not None
        return [objects[log_key(session, n)] for n in range(1, len(self.checkers.log) + 1)]

    # --- how it is written ---------------------------------------------------------------------------------

    def _name(self, peer: object) -> str:
        return next((p.name for p in self.world.processes if p.peer == peer), str(peer))

    def _effect(self, process: Process, effect: Effect) -> None:
        match effect:
            case Send(message=m.FrameAck(status=m.FrameStatus.ACCEPTED)):
                pass  # One for every frame.
            case Send(peer=peer, message=message) if not isinstance(message, UNSPOKEN):
                self.lines.append(f"{process.name} -> {self._name(peer)}: {self._message(peer, message)}")
            case Emit(kind=kind, data=data):
                told = "".join(f" {k}={self._value(v)}" for k, v in data.items() if k in EVENT_DATA and v != "")
                self.lines.append(f"{process.name} tells: {kind}{told}")
            case _:
                pass

    def _entry(self, session: str, index: int, kind: str) -> None:
        self.lines.append(f"log {index}: {kind}")

    def _value(self, value: object) -> str:
        return value.name if isinstance(value, m.Direction | m.FrameStatus) else self._name(value)

    def _message(self, peer: PeerId, message: m.Message) -> str:
        words = [type(message).__name__]
        words += [f"{name}={self._value(getattr(message, name))}" for name in SHOWN if hasattr(message, name)]
        if isinstance(message, m.Tickets):
            words.append(f"hosts={','.join(place.vnode for place in message.placement if place.peer == peer)}")
            words.append(f"states={'commit' if any(ref.sha256 for ref in message.states) else 'init'}")
        if isinstance(message, m.Updated):
            words.append(f"vnodes={','.join(message.vnodes)}")
        if isinstance(message, m.TensorFrame):
            words.append(f"for={message.target_instance}")
        return " ".join(words)
