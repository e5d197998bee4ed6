"""One seed: build its world, let it run, heal, demand progress; many seeds: one summary.

``patches`` plant bugs: each replaces one line of a machine's source, in copies of the modules that only this run sees.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import canonical_json
from dcnr.orchestrator.placement import Candidate, Problem, training_problem
from dcnr.protocol.messages import Capabilities
from dcnr.session.dataset import Column, Manifest, Shard, Split, TokenizerRef, manifest_key
from dcnr.sim.client import Client
from dcnr.sim.compute import Oracle, Rows
from dcnr.sim.faults import Faults, Only, Scenario, scenario
from dcnr.sim.violation import Violation
from dcnr.sim.world import Process, Start, World, written

ROWS_TRAIN = 50
WHOLE = Only()
SETTLE_US = 25_000_000
"""After the session's end, until everything has to be given back."""
CALM_US = 6_000_000
"""After the session's end it is watched for this long although everything has been given back: longer than a lease."""
_KEPT = frozenset({"dcnr.pnode.tasks", "dcnr.orchestrator.placement"})
"""Modules whose classes the simulator itself uses; they decide nothing that a patch would plant."""
_ROLES = ("dcnr.pnode", "dcnr.orchestrator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """``old``, which occurs once in ``module``, becomes ``new``."""

    module: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one seed. ``trace``: readable lines; without a trace asked for, the last 40 before a violation."""

    seed: int
    violation: str
    trace_digest: str
    trace: tuple[str, ...]
    stats: dict[str, Any]
    only: Only = WHOLE

    @property
    def ok(self) -> bool:
        return not self.violation

    @property
    def summary(self) -> str:
        """One line."""
        s = self.stats
        told = f"{s['ended'] or 'no end'} after {s['virtual_s']:.1f} virtual s, {s['entries']} entries, {s['rollbacks']} rollbacks"
        faults = ", ".join(s["faults"]) or "no faults"
        return f"{told} ({faults})" if self.ok else f"{self.violation} ({faults})"

    @property
    def replay(self) -> str:
        """The one command that shows it again."""
        part = f" --only {self.only}" if self.only != WHOLE else ""
        return f"dcnr simulate --seeds {self.seed}..{self.seed}{part}"

    @property
    def invariant(self) -> str:
        """That was violated, or ''."""
        return self.violation.split(": ")[1] if self.violation else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    pnode: Any
    orchestrator: Any
    solve: Any


@contextmanager
def _planted(patches: Sequence[Patch]) -> Iterator[Machines]:
    """The machines, from patched sources where there are patches."""
    if not patches:
        yield _machines()
        return
    saved = {n: x for n, x in sys.modules.items() if n.startswith(_ROLES) and n not in (*_KEPT, *_ROLES)}
    for name in saved:
        del sys.modules[name]
    try:
        for patch in patches:
            _load_patched(patch)
        yield _machines()
    finally:
        for name in [n for n in sys.modules if n.startswith(_ROLES) and n not in (*_KEPT, *_ROLES)]:
            del sys.modules[name]
        sys.modules.update(saved)
        for name, module in saved.items():
            package, _, attribute = name.rpartition(".")
            setattr(sys.modules[package], attribute, module)


def _load_patched(patch: Patch) -> None:
    module = sys.modules.get(patch.module)
    spec = importlib.util.find_spec(patch.module)
    assert spec is not None
    assert spec.origin is not None
    source = getattr(module, "patched_source", None)
    if source is None:
        with open(spec.origin, encoding="utf-8") as file:
            source = file.read()
    if source.count(patch.old) != 1:
        raise ValueError(f"{patch.old!r} occurs {source.count(patch.old)} times in {patch.module}, not once")
    source = source.replace(patch.old, patch.new)
    module = importlib.util.module_from_spec(spec)
    sys.modules[patch.module] = module
    module.__dict__["patched_source"] = source
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    package, _, attribute = patch.module.rpartition(".")
    setattr(sys.modules[package], attribute, module)


def _machines() -> Machines:
    return Machines(
        pnode=importlib.import_module("dcnr.pnode.pnode").PNodeMachine,
        orchestrator=importlib.import_module("dcnr.orchestrator.orchestrator").OrchestratorMachine,
        solve=importlib.import_module("dcnr.orchestrator.placement").solve,
    )


def dataset(context: int) -> Manifest:
    """A dataset that fits the scenario's networks: text for a context, else the columns x, y and z."""

    def shard(number: int, count: int) -> tuple[Shard, ...]:
        return (Shard(sha256=f"{number:064x}", count=count),)  # type: ignore[arg-type]

    if context:
        column = Column(name="tokens", dtype="uint16", shape=())
        count = ROWS_TRAIN * context + 1
        split = Split(count=count, shards=(shard(1, count),))
        return Manifest(
            name="simulated",
            kind="text",
            stored=(column,),
            train=split,
            validation=split,
            tokenizer=TokenizerRef(kind="file", sha256=f"{2:064x}", vocab=8),  # type: ignore[arg-type]
            text_sha256=f"{3:064x}",
            source_bytes=1000,
        )
    columns = tuple(Column(name=n, dtype="float32", shape=(4,)) for n in ("x", "y", "z"))
    split = Split(count=ROWS_TRAIN, shards=tuple(shard(n, ROWS_TRAIN) for n in range(3)))
    return Manifest(name="simulated", kind="columns", stored=columns, train=split, validation=split)


def _columns(context: int, network: Network) -> dict[str, tuple[tuple[int, ...], str]]:
    if context:
        return {"tokens": ((context,), "int64"), "targets": ((context,), "int64")}
    return dict.fromkeys(("x", "y", "z"), ((4,), "float32"))


def _memory_bytes(plan: Scenario, network: Network, solve: Any) -> int:
    """Of each PNode: plenty, or so little that only all of them together can hold the network, for one session."""
    if plan.memory_share == 0:
        return 1 << 32
    smallest = 1 << 10
    while True:
        candidates = [
            Candidate(peer=_peer(n), numeric_class=_class(plan, n), gflops=1.0, memory_bytes=smallest)
            for n in range(plan.pnodes)
        ]
        problems = [
            training_problem(network, recipe, candidates, window_extra=plan.limits.window_extra)
            for recipe in plan.recipes
        ]
        if not any(isinstance(solve(problem), str) for problem in problems):
            return int(smallest * plan.memory_share)
        smallest = smallest * 5 // 4


def _solved_once(solve: Any) -> Any:
    """``solve`` is a pure function, and owners ask again whenever something may have changed."""
    known: dict[Any, Any] = {}

    def value(name: str, found: Any) -> Any:
        if name == "network":
            return found.id
        return tuple(sorted(found.items())) if isinstance(found, Mapping) else found

    def solved(problem: Problem) -> Any:
        key = tuple(value(f.name, getattr(problem, f.name)) for f in fields(problem))
        if key not in known:
            known[key] = solve(problem)
        return known[key]

    return solved


def _scattered(solve: Any, draw: random.Random, problem: Problem) -> Any:
    """A drawn placement where there is a solution: within its classes, whatever must stay together on one PNode."""
    answer = solve(problem)
    if isinstance(answer, str):
        return answer
    network = problem.network
    classes = {c.numeric_class for c in problem.candidates if c.peer in set(answer.spots.values())}
    peers = [c.peer for c in problem.candidates if c.numeric_class in classes]
    if len(classes) > 1 or problem.only is not None:
        return answer
    spots = {}
    for unit in network.placement_units():
        peer = draw.choice(peers)
        spots.update({v: peer for group in unit for v in network.groups[group].vnodes})
    spots = {v: spots[v] for v in network.vnodes}
    segments = network.segments({v: str(p) for v, p in spots.items()})
    return replace(answer, spots=spots, window=draw.randint(1, len(segments) + 2), why=dict.fromkeys(spots, "drawn"))


def _class(plan: Scenario, number: int) -> str:
    return f"{number % plan.classes + 1:064x}"


def run_seed(seed: int, patches: Sequence[Patch] = (), trace: bool = False, only: Only = WHOLE) -> Outcome:
    """Run one seed, or a part of it, to its end or to its first violation."""
    with _planted(patches) as machines:
        return replace(_run(only.of(scenario(seed)), seed, machines, trace), only=only)


def _run(plan: Scenario, seed: int, machines: Machines, trace: bool) -> Outcome:
    network = analyse(plan.definition)
    recipe = plan.recipe
    manifest = dataset(plan.context)
    rows = Rows(dataset=manifest.id, rows_train=manifest.rows("train", plan.context))
    oracles = [Oracle(network, each, rows) for each in plan.recipes]
    solve = _solved_once(machines.solve)
    not_finite = None
    if plan.not_finite and (updated := oracles[0].kernels.updated):
        not_finite = (VNodeId(updated[seed % len(updated)]), 1 + seed % recipe.steps)
    world = World(
        seed=seed,
        oracles=oracles,
        limits=plan.limits,
        planner=partial(_scattered, solve, random.Random(f"placements {seed}")) if plan.scatter else solve,
        columns=_columns(plan.context, network),
        latency_us=plan.latency_us,
        store_delay_us=plan.store_delay_us,
        store_habits=plan.store_habits,
        compute_us=plan.compute_us,
        keep_us=plan.keep_us,
        not_finite=not_finite,
        patience_us=2 * _slowest_us(plan, network) + 8_000_000,
        move_us=2_000_000 + 4 * plan.keep_us[1] + 40 * plan.store_delay_us[1] + 20 * plan.latency_us[1],
        trace=trace,
    )
    world.store.objects[manifest_key(manifest.id)] = manifest.to_bytes()
    memory_bytes = _memory_bytes(plan, network, solve)
    orchestrators = [_orchestrator(world, machines, plan, number) for number in range(plan.orchestrators)]
    pnodes = [_pnode(world, machines, plan, number, memory_bytes) for number in range(plan.pnodes)]
    for process, clock_ppm in zip((*orchestrators, *pnodes), plan.clocks_ppm, strict=False):
        process.clock_ppm = clock_ppm
    definition = canonical_json(network.definition)
    clients = [
        Client(world, orchestrators, definition, manifest.id, checkers, nonce, asked)
        for checkers, nonce, asked in zip(
            world.watch.sessions, ("the-only-session", "the-other-session"), (0, int(plan.apart)), strict=False
        )
    ]
    world.watch.causes = int(not_finite is not None)
    faults = Faults(world, clients, orchestrators, pnodes, plan)
    ended_us = [0]
    look_us = 0

    def done() -> bool:
        nonlocal look_us
        if not all(client.ended for client in clients) or faults.resume_due:
            ended_us[0] = 0
            return False
        if ended_us[0] == 0:
            ended_us[0] = world.now_us
        settled_us = world.now_us - max(ended_us[0], faults.last_us)
        if settled_us < CALM_US or world.now_us < look_us:
            return False
        look_us = world.now_us + 1_000_000
        return settled_us >= SETTLE_US or not any(p.table.live() for p in world.live_processes())

    allowance_us = _allowance_us(plan, network)
    violation = ""
    try:
        for process in (*orchestrators, *pnodes):
            world.at_us(world.random.randint(0, 500_000), partial(world.start, process))
        for number, client in enumerate(clients):
            world.at_us(world.random.randint(0, 1_000_000 * (1 + number)), client.start)
        if not world.run(lambda: max(faults.last_us, ended_us[0]) + allowance_us, done):
            state = "; ".join(f"step {c.seen} of {c.steps}, log of {len(c.checkers.log)} entries" for c in clients)
            raise Violation("LiveAndCalm", f"no end {allowance_us / 1e6:.0f} s after the last fault: {state}")
        for client in clients:
            _judge(client, faults, not_finite is not None)
        world.watch.at_end(world)
    except Violation as found:
        violation = str(found) if str(found).startswith("t=") else f"t={world.now_us / 1e6:.6f} world: {found}"
    return Outcome(
        seed=seed,
        violation=violation,
        trace_digest=world.trace_digest(),
        trace=tuple(written(entry) for entry in world.lines) if violation or trace else (),
        stats={
            "virtual_s": world.now_us / 1e6,
            "events": world.handled,
            "sessions": len(clients),
            "ended": " and ".join(dict.fromkeys(client.ended for client in clients)),
            "reason": "; ".join(filter(None, (client.reason for client in clients))),
            "waited": sum("waiting" in client.events for client in clients),
            "faults": tuple(faults.struck),
            "rollbacks": sum(each.rollbacks for each in world.watch.sessions),
            "entries": sum(len(each.log) for each in world.watch.sessions),
            "acquires": max(each.acquires for each in world.watch.sessions),
            "marks": world.calm.whole,
            "ghosts": world.store.ghosts,
            "list_lags": world.store.list_lags,
        },
    )


def _allowance_us(plan: Scenario, network: Network) -> int:
    """3 x (timeout + lease + slowest step), and the steps themselves; of two sessions at once, or one after the other."""
    slowest = _slowest_us(plan, network)
    limits = plan.limits
    timeouts_s = limits.red_after_s + limits.recover_wait_s + limits.link_grace_s + limits.transfer_timeout_s
    return int(3 * (timeouts_s * 1e6 + slowest)) + sum(recipe.steps for recipe in plan.recipes) * slowest


def _slowest_us(plan: Scenario, network: Network) -> int:
    """More than a step can take, with a checkpoint of it."""
    tasks = 3 * len(network.vnodes) + 3
    return (
        sum(recipe.microbatches for recipe in plan.recipes) * tasks * (plan.compute_us[1] * 4 + 2 * plan.latency_us[1])
        + 40 * plan.store_delay_us[1]
        + 4 * plan.keep_us[1]
    )


def _judge(client: Client, faults: Faults, not_finite: bool) -> None:
    """The session ended as its faults allow."""
    kinds = set(faults.struck)
    allowed = {"finished"}
    if "compute" in kinds or not_finite:
        allowed.add("failed")
    if kinds & {"stop", "stop_resume"}:
        allowed |= {"stopped", "suspended"}
    if kinds & {"store", "cut_orchestrator", "cut_store"}:
        allowed.add("suspended")
    if client.ended not in allowed:
        raise Violation("LiveAndCalm", f"the session is {client.ended} ({client.reason}) after {sorted(kinds)}")
    if client.ended in ("failed", "suspended") and not client.reason:
        raise Violation("LiveAndCalm", f"the session is {client.ended} without a reason")


def _peer(seed: int) -> PeerId:
    return PeerId(f"{seed:032x}")


def _orchestrator(world: World, machines: Machines, plan: Scenario, number: int) -> Process:
    name = f"orchestrator-{number + 1}" if plan.orchestrators > 1 else "orchestrator"

    def build(start: Start) -> Any:
        return machines.orchestrator(
            peer=start.peer,
            incarnation=start.incarnation,
            addresses=(start.address,),
            secret=start.secret,
            limits=plan.limits,
            seed=start.seed,
            unix_s_at_zero=plan.unix_s[number] - start.clock_s,
        )

    process = Process(
        name=name,
        role="orchestrator",
        peer=_peer(world.random.getrandbits(128)),
        address=f"{name}:50050",
        capabilities=_capabilities(name, "", 0, 1.0),
        build=build,
        speed=1.0,
    )
    world.add(process)
    return process


def _pnode(world: World, machines: Machines, plan: Scenario, number: int, memory_bytes: int) -> Process:
    name = f"pnode-{number + 1}"
    capabilities = _capabilities(name, _class(plan, number), memory_bytes, plan.speeds[number])

    def build(start: Start) -> Any:
        return machines.pnode(
            peer=start.peer,
            incarnation=start.incarnation,
            addresses=(start.address,),
            capabilities=start.capabilities,
            bootstrap=tuple(p.address for p in world.processes if p.role == "orchestrator"),
            fence=start.fence,
            limits=plan.limits,
            seed=start.seed,
        )

    process = Process(
        name=name,
        role="pnode",
        peer=_peer(world.random.getrandbits(128)),
        address=f"{name}:50051",
        capabilities=capabilities,
        build=build,
        speed=plan.speeds[number],
    )
    world.add(process)
    return process


def _capabilities(name: str, numeric_class: str, memory_bytes: int, speed: float) -> Capabilities:
    return Capabilities(
        cores=1,
        memory_bytes=memory_bytes,
        architecture="simulated",
        numeric_class=numeric_class,
        class_facts=("simulated",),
        gflops=10.0 / speed,
        threads=1,
        hostname=name,
    )


def _one(seed: int, trace: bool = False, only: Only = WHOLE) -> Outcome:
    return run_seed(seed, trace=trace, only=only)


def run(seeds: Sequence[int], jobs: int = 1, trace: bool = False, only: Only = WHOLE) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds."""
    if jobs <= 1:
        for seed in seeds:
            yield run_seed(seed, trace=trace, only=only)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(partial(_one, trace=trace, only=only), seeds, chunksize=4)
