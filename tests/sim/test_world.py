"""The world's twins, driven by tiny scripted machines."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import Incarnation, PeerId
from dcnr.machine import (
    Dial,
    Effect,
    Event,
    Instant,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    Received,
    Request,
    Respond,
    Send,
    StoreCreate,
    StoreCreated,
    StoreFailed,
    StoreTaken,
    Tick,
)
from dcnr.network.analysis import analyse
from dcnr.network.templates import mlp
from dcnr.protocol.messages import Capabilities, Descriptor, Heartbeat, Register, Registered
from dcnr.session.recipe import Recipe
from dcnr.sim.compute import Oracle, Rows
from dcnr.sim.run import dataset
from dcnr.sim.store import Habits
from dcnr.sim.violation import Violation
from dcnr.sim.world import Process, Start, World

Script = Callable[["Scripted", Event], list[Effect]]


class Scripted:
    """A machine that answers each event with what its script says, and remembers what it saw."""

    def __init__(self, start: Start, script: Script) -> None:
        self.start = start
        self.script = script
        self.seen: list[Event] = []
        self.now = 0.0
        self.wake: float | None = None

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        self.now = now
        self.wake = None
        self.seen.append(event)
        return self.script(self, event)

    def deadline(self) -> Instant | None:
        return None if self.wake is None else Instant(self.wake)

    def check_frame(self, peer: PeerId, frame: Any) -> str | None:
        return None

    def of(self, kind: type) -> list[Any]:
        return [e for e in self.seen if isinstance(e, kind)]


def silent(machine: Scripted, event: Event) -> list[Effect]:
    return []


def welcoming(machine: Scripted, event: Event) -> list[Effect]:
    """An orchestrator that registers everybody."""
    if isinstance(event, Request) and isinstance(event.message, Register):
        me = Descriptor(
            peer=machine.start.peer,
            incarnation=machine.start.incarnation,
            role="orchestrator",
            addresses=(machine.start.address,),
            version_min=1,
            version_max=1,
        )
        return [Respond(id=event.id, message=Registered(descriptor=me, heartbeat_interval_s=0.5))]
    return []


def dialling(machine: Scripted, event: Event) -> list[Effect]:
    """Dials the orchestrator at its start and after every loss, and then says ten things."""
    if isinstance(event, Tick | LinkDown):
        return [Dial(peer=PeerId(""), addresses=("orchestrator:50050",))]
    if isinstance(event, LinkUp):
        return [
            Send(peer=event.peer, message=Heartbeat(sequence=n, memory_free_bytes=0, progress=())) for n in range(10)
        ]
    return []


CAPABILITIES = Capabilities(
    cores=1, memory_bytes=1, architecture="", numeric_class="", class_facts=(), gflops=1.0, threads=1
)


def a_world(seed: int, failure_share: float = 0.0) -> World:
    network = analyse(mlp(4, [4], 4).definition())
    return World(
        seed=seed,
        oracles=(Oracle(network, Recipe(steps=1), Rows(dataset=dataset(0).id, rows_train=10)),),
        limits=Limits(),
        planner=lambda problem: problem,
        columns={},
        latency_us=(1_000, 30_000),
        store_delay_us=(1_000, 10_000),
        store_habits=Habits(failure_share=failure_share),
        compute_us=(1, 2),
    )


def a_process(world: World, name: str, role: str, script: Script) -> Process:
    process = Process(
        name=name,
        role=role,
        peer=PeerId(name),
        address=f"{name}:50050",
        capabilities=CAPABILITIES,
        build=lambda start: Scripted(start, script),
        speed=1.0,
    )
    world.add(process)
    world.start(process)
    return process


def run_for(world: World, seconds: float) -> None:
    end = world.now_us + int(seconds * 1e6)
    world.run(lambda: end, lambda: False)
    world.now_us = end


@pytest.mark.parametrize("seed", range(20))
def test_frames_keep_their_order_and_a_break_loses_a_suffix(seed: int) -> None:
    world = a_world(seed)
    orchestrator = a_process(world, "orchestrator", "orchestrator", welcoming)
    pnode = a_process(world, "pnode", "pnode", dialling)
    machine = orchestrator.machine
    world.run(lambda: 10_000_000, lambda: bool(machine.of(LinkUp)) and bool(pnode.machine.of(LinkUp)))
    world.network.break_link(world.network.links()[0], "reset")
    run_for(world, 3)
    sequences = [e.message.sequence for e in machine.of(Received)]
    down = machine.seen.index(machine.of(LinkDown)[0])
    first = [e.message.sequence for e in machine.seen[:down] if isinstance(e, Received)]
    assert first == list(range(len(first)))
    assert sequences[len(first) :] == list(range(10))


def test_a_break_sometimes_loses_something_and_sometimes_not_all() -> None:
    lost = set()
    for seed in range(40):
        world = a_world(seed)
        orchestrator = a_process(world, "orchestrator", "orchestrator", welcoming)
        pnode = a_process(world, "pnode", "pnode", dialling)
        machine = orchestrator.machine
        world.run(lambda: 10_000_000, lambda pnode=pnode: bool(pnode.machine.of(LinkUp)))  # type: ignore[misc]
        world.network.break_link(world.network.links()[0], "reset")
        run_for(world, 3)
        down = machine.seen.index(machine.of(LinkDown)[0])
        lost.add(10 - sum(isinstance(e, Received) for e in machine.seen[:down]))
    assert 0 in lost
    assert any(n > 0 for n in lost)


def test_a_restarted_process_is_a_new_incarnation_and_its_peers_hear_of_the_old_ones_end() -> None:
    world = a_world(3)
    orchestrator = a_process(world, "orchestrator", "orchestrator", welcoming)
    pnode = a_process(world, "pnode", "pnode", dialling)
    run_for(world, 1)
    first = pnode.incarnation
    world.stop(pnode, "killed")
    run_for(world, 1)
    world.start(pnode)
    run_for(world, 1)
    ups = [e.incarnation for e in orchestrator.machine.of(LinkUp)]
    assert ups == [first, pnode.incarnation]
    assert pnode.incarnation.boot == first.boot + 1
    assert len(orchestrator.machine.of(LinkDown)) == 1


def test_a_paused_process_hears_everything_late_and_in_order() -> None:
    world = a_world(4)
    orchestrator = a_process(world, "orchestrator", "orchestrator", welcoming)
    pnode = a_process(world, "pnode", "pnode", dialling)
    world.run(lambda: 10_000_000, lambda: bool(pnode.machine.of(LinkUp)))
    world.pause(orchestrator)
    heard = len(orchestrator.machine.seen)
    run_for(world, 5)
    assert len(orchestrator.machine.seen) == heard
    world.unpause(orchestrator)
    assert [e.message.sequence for e in orchestrator.machine.of(Received)] == list(range(10))
    assert orchestrator.machine.now >= 5


def test_a_crash_may_lose_a_write_that_was_not_reported() -> None:
    outcomes = set()
    for seed in range(40):
        world = a_world(seed)

        def script(machine: Scripted, event: Event) -> list[Effect]:
            return [Persist(key="fence", data=b"new")] if isinstance(event, Tick) else []

        process = a_process(world, "pnode", "pnode", script)
        run_for(world, 0.005)
        reported = bool(process.machine.of(Persisted))
        world.stop(process, "killed")
        run_for(world, 1)
        assert not reported or process.home == {"fence": b"new"}
        outcomes.add((reported, "fence" in process.home))
    assert (False, False) in outcomes
    assert (False, True) in outcomes


def test_a_create_is_won_once_and_a_failed_one_may_have_landed() -> None:
    kinds: set[tuple[str, bool]] = set()
    for seed in range(60):
        world = a_world(seed, failure_share=0.5)

        def script(machine: Scripted, event: Event) -> list[Effect]:
            if isinstance(event, Tick):
                return [StoreCreate(id=n, key="k", data=b"%d" % n) for n in range(2)]
            return []

        process = a_process(world, "orchestrator", "orchestrator", script)
        run_for(world, 2)
        machine = process.machine
        assert len(machine.of(StoreCreated)) <= 1
        for event in machine.of(StoreCreated):
            assert world.store.objects["k"] == b"%d" % event.id
        for event in machine.of(StoreTaken):
            assert world.store.objects["k"] == event.data
        for event in machine.of(StoreFailed):
            kinds.add(("failed", world.store.objects.get("k") == b"%d" % event.id))
    assert kinds == {("failed", True), ("failed", False)}


def test_a_machine_that_wakes_itself_for_ever_is_seen() -> None:
    world = a_world(5)

    def script(machine: Scripted, event: Event) -> list[Effect]:
        machine.wake = machine.now
        return []

    a_process(world, "pnode", "pnode", script)
    with pytest.raises(Violation, match="a storm of events"):
        run_for(world, 1)


def test_an_exception_in_a_machine_is_a_violation_that_names_time_and_process() -> None:
    world = a_world(6)

    def script(machine: Scripted, event: Event) -> list[Effect]:
        raise KeyError("x")

    with pytest.raises(Violation, match=r"t=0\.000000 pnode: NoException: KeyError"):
        a_process(world, "pnode", "pnode", script)


def test_incarnations_differ_between_lives() -> None:
    world = a_world(7)
    process = a_process(world, "pnode", "pnode", silent)
    first: Incarnation = process.machine.start.incarnation
    world.stop(process, "killed")
    world.start(process)
    assert process.machine.start.incarnation.nonce != first.nonce


@pytest.mark.parametrize("clock_ppm", [-10_000, 0, 7, 10_000])
def test_a_clock_that_drifts_wakes_its_process_when_it_shows_the_deadline(clock_ppm: int) -> None:
    world = a_world(8)
    woken: list[tuple[float, int]] = []

    def script(machine: Scripted, event: Event) -> list[Effect]:
        woken.append((machine.now, world.now_us))
        machine.wake = machine.now + 1.0
        return []

    process = a_process(world, "pnode", "pnode", script)
    process.clock_ppm = clock_ppm
    run_for(world, 100)
    process.machine.wake = None
    (first, first_us), (last, last_us) = woken[1], woken[-1]
    periods = len(woken) - 2
    assert last - first == pytest.approx(periods, abs=0.001)
    assert last_us - first_us == pytest.approx(periods * 1e6 / (1 + clock_ppm / 1e6), abs=1000)
    assert all(later[0] - earlier[0] >= 1.0 for earlier, later in pairwise(woken[1:]))
