"""``dcnr bench recovery``: what the death of a PNode or an orchestrator costs, and what checkpoints cost.

A session trains on three PNodes of one thread with the settings that a user gets. PNodes are killed at points spread
over the interval between commits, for what is computed again grows with the distance from the last one. Who died is
started again, as `dcnr up` does. All times are a client's: they end when it hears of the step.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcnr.adapters.store.opening import open_store
from dcnr.cli.bench_train import figure
from dcnr.cli.output import warn
from dcnr.client.blocking import Client, Run
from dcnr.config import LIMITS
from dcnr.errors import ComputeError, DCNRError
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.runtime.supervisor import Keeper, LocalNetwork
from dcnr.session.events import CheckpointCommitted, RecoveryPhase, SessionEvent, StepDone
from dcnr.session.log import Entry, Kind

PNODES = 3
ORCHESTRATORS = 2
PRESET = "demo"
HEAVY: dict[str, Any] = {"layers": 8, "dim": 256, "heads": 8, "vocab": 8192, "context": 32}
"""8.4 M parameters, with AdamW 100 MB of state."""
ROWS = 512
BATCH = 8
MICROBATCHES = 4
CHECKPOINT_EVERY = 20
DROPPED = 3
SAMPLES = 5
OFFSETS = (2, 6, 10, 14, 18)
"""Steps after one whose state is kept at which a PNode is killed, in turn: spread over the interval between two."""
STEADY = 5
"""Steps right before a kill that tell how long one takes."""
KILL_EVERY_S = 30.0
BRIEF_S, FULL_S = 90.0, 600.0
SLOWDOWN_STEPS = 3 * CHECKPOINT_EVERY
PATIENCE_S = 180.0

REGAIN_GOAL_S, REGAIN_GOAL_STEPS = 3.0, 2.0
SUCCESSION_GOAL_S = LIMITS.lease_s + 1.0
THROUGHPUT_GOAL = 0.95
CHECKPOINT_GOAL = 1.3
SLOWDOWN_GOAL = 0.02


class Following:
    """A session's events with the time at which each came, also while nobody asks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0
        self.committed = 0
        self.done_at: list[float] = []
        """Of the steps that came since :meth:`settle`, the last one first heard at its end."""
        self._heard: queue.Queue[tuple[float, SessionEvent | DCNRError | None]] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        try:
            for event in self.run:
                self._heard.put((time.monotonic(), event))
            self._heard.put((time.monotonic(), None))
        except DCNRError as error:
            self._heard.put((time.monotonic(), error))
        except CancelledError:
            pass

    def next(self, timeout_s: float = PATIENCE_S) -> tuple[float, SessionEvent] | None:
        """``None`` where nothing came. Raises :class:`ComputeError` where the session is over."""
        try:
            at, event = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None or isinstance(event, DCNRError):
            raise ComputeError(f"session {self.run.id} ended while it was measured: {event or 'without an error'}")
        if isinstance(event, StepDone):
            self.step = event.step
            self.done_at.append(at)
        if isinstance(event, CheckpointCommitted):
            self.committed = event.step
        return at, event

    def until(self, enough: Callable[[SessionEvent], bool]) -> float:
        """When the first event came that is ``enough``. Raises :class:`ComputeError` where none comes in time."""
        while (heard := self.next()) is not None:
            if enough(heard[1]):
                return heard[0]
        raise ComputeError(f"session {self.run.id} did not go on within {PATIENCE_S:g} s after step {self.step}")

    def settle(self) -> None:
        """Take what has come meanwhile; from here on steps are counted anew."""
        while not self._heard.empty():
            self.next(0.0)
        self.done_at.clear()


@dataclass(slots=True, kw_only=True)
class Loss:
    """A PNode was killed: what followed, in seconds."""

    regain_s: float
    step_s: float
    """An undisturbed step before it."""
    idle_s: float
    """Between the last step before and the first one after it, beyond an undisturbed step."""
    steps_after_commit: int
    phases_ms: dict[str, float] = field(default_factory=dict)


def measure(rounds: int, full: bool = False, store: str | None = None) -> Iterator[dict[str, Any]]:
    """Figures as they are known. ``full``: ten minutes of training under kills instead of one and a half. ``store``: in
    place of a new folder; what the sessions write stays there."""
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # Before gRPC is loaded: processes are started later on.
    from dcnr.wiring import connect

    samples = max(SAMPLES, rounds)
    with (
        tempfile.TemporaryDirectory(prefix="dcnr-bench-") as name,
        LocalNetwork(Path(name), PNODES, 1, orchestrators=ORCHESTRATORS, store=store) as local,
        connect(local.address) as net,
    ):
        model, heavy = templates.preset(PRESET), templates.gpt(**HEAVY)
        following = Following(start(net, model, steps=10**6))
        losses = []
        for number in range(samples):
            warn(f"kill {number + 1} of {samples} of a PNode")
            losses.append(lose(local, following, OFFSETS[number % len(OFFSETS)]))
        yield from regains(losses)
        deaths = []
        for number in range(samples):
            warn(f"kill {number + 1} of {samples} of the session's orchestrator")
            deaths.append(behead(local, following))
        yield succession(deaths)
        following.run.stop()
        yield throughput(net, local, model, FULL_S if full else BRIEF_S)
        yield from checkpoints(net, heavy, store or str(Path(name) / "bare"), samples)
        yield slowdown(net, model, rounds)


def start(
    net: Client, model: Graph, *, steps: int, checkpoint_every: int = CHECKPOINT_EVERY, batch: int = BATCH
) -> Run:
    return net.train(
        model,
        columns(model),
        steps=steps,
        batch_size=batch,
        microbatches=MICROBATCHES,
        checkpoint_every=checkpoint_every,
    )


def columns(model: Graph) -> dict[str, Any]:
    """Random tokens of the network's context: what is learned is not measured."""
    definition = model.definition()
    (context,) = definition.inputs[0].shape
    tokens = np.random.default_rng(0).integers(0, 256, size=(ROWS, context + 1))
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": tokens[:, 1:].astype(np.int64)}


# --- a PNode dies ------------------------------------------------------------------------------------------


def busiest(local: LocalNetwork, run: Run) -> int:
    """The number of the running PNode with the most VNodes of the session."""
    peers: list[str] = [place.peer for place in run.info().placement]
    return max(
        (n for n, child in enumerate(local.pnodes) if child.running), key=lambda n: peers.count(local.pnodes[n].peer)
    )


def lose(local: LocalNetwork, following: Following, offset: int) -> Loss:
    """Kill the PNode with the most VNodes, ``offset`` steps after one that is kept; it is back when this returns."""
    following.settle()
    following.until(
        lambda event: (
            isinstance(event, StepDone) and len(following.done_at) > STEADY and event.step % CHECKPOINT_EVERY == offset
        )
    )
    step_s = median(after - before for before, after in steady(following.done_at))
    steps_after_commit = following.step - following.committed
    victim = busiest(local, following.run)
    phases: dict[str, float] = {}

    def regained(event: SessionEvent) -> bool:
        if isinstance(event, RecoveryPhase):
            phases[event.phase] = event.ms
        return "regained" in phases

    killed_at = time.monotonic()
    local.kill(victim)
    following.until(regained)
    # The step that was running is told right before that it is regained.
    before_at, regained_at = following.done_at[-2:]
    local.start_pnode(victim)
    return Loss(
        regain_s=regained_at - killed_at,
        step_s=step_s,
        idle_s=regained_at - before_at - step_s,
        steps_after_commit=steps_after_commit,
        phases_ms=phases,
    )


def steady(times: Sequence[float]) -> list[tuple[float, float]]:
    """The last :data:`STEADY` pairs of times that follow each other."""
    return list(zip(times[-STEADY - 1 :], times[-STEADY:], strict=False))


def regains(losses: Sequence[Loss]) -> Iterator[dict[str, Any]]:
    step_s = median(loss.step_s for loss in losses)
    value, goal = median(loss.regain_s for loss in losses), REGAIN_GOAL_S + REGAIN_GOAL_STEPS * step_s
    parts = [
        {
            "regain_s": round(loss.regain_s, 3),
            "step_s": round(loss.step_s, 4),
            "steps_after_commit": loss.steps_after_commit,
            "phases_ms": loss.phases_ms,
        }
        for loss in losses
    ]
    yield line(
        "regain_s", value, "s",
        against=f"{REGAIN_GOAL_S:g} s and {REGAIN_GOAL_STEPS:g} of the undisturbed steps of {step_s:.3f} s before each kill; "
        f"a commit every {CHECKPOINT_EVERY} steps",
        goal=goal, holds=value <= goal, samples={"losses": parts},
    )  # fmt: skip
    lost = [PNODES * loss.idle_s for loss in losses]
    yield line(
        "lost_pnode_seconds", median(lost), "s",
        against=f"{PNODES} PNodes, from the last step before the kill to the first one after it, less one undisturbed step",
        samples={"network": [round(value, 3) for value in lost]},
    )  # fmt: skip


# --- an orchestrator dies ----------------------------------------------------------------------------------


def owner(local: LocalNetwork, run: Run) -> tuple[int, list[Entry]]:
    """The number of the orchestrator that owns the session, and the session's log."""
    entries = [Entry.from_bytes(data) for data in run.files().entries]
    peer = next(entry.author.peer for entry in reversed(entries) if entry.kind is Kind.ACQUIRE)
    return [child.peer for child in local.orchestrators].index(peer), entries


def withdrawn(entries: Sequence[Entry], done: int) -> int:
    """Of ``done`` steps, how many the rollbacks among ``entries`` had computed again."""
    bases = [int(entry.body["folded"]["base"][0]) for entry in entries if entry.kind is Kind.ROLLBACK]
    return max((done - base for base in bases), default=0)


def behead(local: LocalNetwork, following: Following) -> tuple[float, int]:
    """Kill the session's owner: seconds until a step beyond those done before, and how many of those were withdrawn.

    It is back when this returns.
    """
    following.settle()
    following.until(lambda event: isinstance(event, StepDone) and len(following.done_at) > STEADY)
    number, before = owner(local, following.run)
    following.settle()
    done = following.step
    killed_at = time.monotonic()
    local.kill_orchestrator(number)
    at = following.until(reached(done + 1))
    local.start_orchestrator(number)
    return at - killed_at, withdrawn(owner(local, following.run)[1][len(before) :], done)


def succession(deaths: Sequence[tuple[float, int]]) -> dict[str, Any]:
    value, steps = median(s for s, _ in deaths), max(count for _, count in deaths)
    samples = {"seconds": [round(s, 3) for s, _ in deaths], "steps_withdrawn": [count for _, count in deaths]}
    return line(
        "succession_s", value, "s",
        against=f"SIGKILL of the owner, one of {ORCHESTRATORS} orchestrators, until a new step; no step withdrawn",
        goal=SUCCESSION_GOAL_S, holds=value <= SUCCESSION_GOAL_S and steps == 0, samples=samples,
    )  # fmt: skip


# --- speed under kills -------------------------------------------------------------------------------------


def throughput(net: Client, local: LocalNetwork, model: Graph, for_s: float) -> dict[str, Any]:
    """The same session twice, once under kills; who died is started again as `dcnr up` does it."""
    speeds: dict[str, list[float]] = {}
    for name in ("undisturbed", "killed"):
        warn(f"{for_s:g} s of training, {name}")
        following = Following(start(net, model, steps=10**6))
        following.until(reached(DROPPED))
        speeds[name] = under_kills(local, following, for_s, kills=name == "killed")
        following.run.stop()
    value = sum(speeds["killed"]) / sum(speeds["undisturbed"])
    return line(
        "throughput_under_kills", value, "ratio",
        against=f"{for_s:g} s without a kill; a PNode is killed every {KILL_EVERY_S:g} s. Samples: tokens per second, by "
        f"{KILL_EVERY_S:g} s",
        goal=THROUGHPUT_GOAL, holds=value >= THROUGHPUT_GOAL, samples=speeds,
    )  # fmt: skip


def under_kills(local: LocalNetwork, following: Following, for_s: float, *, kills: bool) -> list[float]:
    """Tokens per second in each stretch of :data:`KILL_EVERY_S`, in whose middle the kill is."""
    keeper = Keeper(local, warn)
    tokens = [0] * int(for_s // KILL_EVERY_S)
    begun = time.monotonic()
    killed = 0
    while (now := time.monotonic()) < begun + len(tokens) * KILL_EVERY_S:
        if kills and killed < len(tokens) and now >= begun + (killed + 0.5) * KILL_EVERY_S:
            local.kill(busiest(local, following.run))
            killed += 1
        keeper.look(now)
        heard = following.next(0.05)
        if heard is not None and isinstance(heard[1], StepDone):
            stretch = int((heard[0] - begun) // KILL_EVERY_S)
            if stretch < len(tokens):
                tokens[stretch] += heard[1].tokens
    for number, child in enumerate(local.pnodes):
        if not child.running:
            local.start_pnode(number)
        elif not child.look(PATIENCE_S):
            raise ComputeError(f"{child.name} did not come back; its log is {child.log}")
    return [round(count / KILL_EVERY_S, 1) for count in tokens]


# --- checkpoints -------------------------------------------------------------------------------------------


def checkpoints(net: Client, model: Graph, store: str, samples: int) -> Iterator[dict[str, Any]]:
    """The last commit of short sessions: nothing trains beside it, on either side."""
    parameters = sum(math.prod(p.shape) for v in analyse(model.definition()).vnodes.values() for p in v.parameters)
    times, puts, sizes = [], [], []
    for number in range(samples):
        warn(f"checkpoint {number + 1} of {samples}")
        run = start(net, model, steps=2, checkpoint_every=0, batch=MICROBATCHES)
        done_at = math.nan
        for event in run:
            if isinstance(event, StepDone):
                done_at = time.monotonic()
            if isinstance(event, CheckpointCommitted):
                times.append(time.monotonic() - done_at)
        states = {str(vnode): state.size_bytes for vnode, state in run.manifest(run.files()).states.items()}
        sizes.append(sum(states.values()))
        puts.append(asyncio.run(put(store, states)))
    value = median(times) / median(puts)
    yield line(
        "checkpoint_of_bare_put", value, "ratio",
        against="the same bytes put into a store of the same kind at once, durably. Samples: seconds from the step's end to "
        "the commit; seconds of the put",
        goal=CHECKPOINT_GOAL, holds=value <= CHECKPOINT_GOAL, samples={"network": times, "baseline": puts},
    )  # fmt: skip
    # AdamW keeps two moments for every parameter.
    yield line(
        "checkpoint_bytes", median(sizes) / (12 * parameters), "ratio",
        against=f"float32 weights and AdamW's two moments of {parameters / 1e6:.1f} M parameters, {12 * parameters:,} bytes",
        samples={"network": sizes},
    )  # fmt: skip


async def put(url: str, sizes: Mapping[str, int]) -> float:
    """Seconds that objects of these sizes take, all at once."""
    store = await open_store(url, os.environ)
    prefix = f"bare/{secrets.token_hex(8)}"
    objects = {f"{prefix}/{vnode}": os.urandom(size) for vnode, size in sizes.items()}
    begun = time.perf_counter()
    await asyncio.gather(*(store.create(key, data) for key, data in objects.items()))
    taken = time.perf_counter() - begun
    await asyncio.gather(*(store.delete(key) for key in objects))
    return taken


def slowdown(net: Client, model: Graph, rounds: int) -> dict[str, Any]:
    """Seconds for the same steps with checkpoints and without, in turn."""
    seconds: dict[int, list[float]] = {CHECKPOINT_EVERY: [], 0: []}
    for turn in range(rounds):
        for every, taken in seconds.items():
            warn(f"round {turn + 1} of {rounds}: {f'a checkpoint every {every} steps' if every else 'no checkpoints'}")
            following = Following(start(net, model, steps=10**6, checkpoint_every=every))
            first, last = (following.until(reached(step)) for step in (DROPPED, DROPPED + SLOWDOWN_STEPS))
            taken.append(last - first)
            following.run.stop()
    value = 1.0 - median(seconds[0]) / median(seconds[CHECKPOINT_EVERY])
    return line(
        "slowdown_by_checkpoints", value, "ratio",
        against=f"{SLOWDOWN_STEPS} steps without checkpoints; with one every {CHECKPOINT_EVERY}. Samples: seconds",
        goal=SLOWDOWN_GOAL, holds=value <= SLOWDOWN_GOAL,
        samples={"network": seconds[CHECKPOINT_EVERY], "baseline": seconds[0]},
    )  # fmt: skip


def reached(step: int) -> Callable[[SessionEvent], bool]:
    return lambda event: isinstance(event, StepDone) and event.step >= step


def line(name: str, value: float, unit: str, *, goal: float | None = None, **more: Any) -> dict[str, Any]:
    rounded = None if goal is None else round(goal, 4)
    return figure(name, round(value, 4), unit, goal=rounded, **more) | {"bench": "recovery"}
