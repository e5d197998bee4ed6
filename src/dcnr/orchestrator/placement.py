"""Which PNode hosts which VNodes: a pure function of the network and of what the PNodes offer.

Placement makes the slowest PNode as fast as it can, its links included, and honours memory, colocation, ties and numeric
class. It can reach speed and survival, never a bit of a weight. It searches from several starts. Where the units are few
it then tries all that could be much better, so that the answer is as good as the best there is; elsewhere it is not exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network
from dcnr.network.memory import Memory, edge_bytes, memory, unit_cost
from dcnr.session.recipe import Recipe

BACKWARD_WORK = 3.0
"""A training step costs about three forwards: one forward, and two products per product backward."""
KERNEL_SHARE = 0.4
"""Of the measured peak that the kernels of a small network reach (measured: 44 of 100 GFLOP/s on one thread)."""
LINK_BYTES_PER_S = 8e8
"""Where a PNode reports nothing: measured on loopback with TLS; a slower link shows in the measured times, not here."""
FRAME_S = 2e-5
"""What a frame costs its PNode beside its bytes. Latency is no cost here: the window hides it."""
SLOWEST_GFLOPS = 1e-6
"""A PNode that says less is taken to be as slow as this, so that times stay within bounds."""
IMPROVE_MOST = 2000
"""Units x (units + PNodes) up to which moves and exchanges are tried: 27 units on 10 PNodes take 0.3 s (measured)."""
EXACT_UNITS_MOST = 24
"""Units up to which the search with bounds is tried."""
BRANCHES_MOST = 10_000
"""PNodes of single units that this search tries before it is content: 0.2 s (measured). Seven units on four PNodes have
22,000, of which it tries a few hundred."""
GOOD_ENOUGH = 1.01
"""What it does not look for: gains of less than one in a hundred."""
STAY_FACTOR = 1.03
"""A placement that is at most this much slower than the best is as good: then fewer moved VNodes decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A PNode that may host: ``memory_bytes`` is what is free for this network."""

    peer: PeerId
    numeric_class: str
    gflops: float
    memory_bytes: int
    link_bytes_per_s: float = LINK_BYTES_PER_S
    catalogue: str = ""
    """Digest of the node types that it knows; empty = not compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    network: Network
    candidates: tuple[Candidate, ...]
    rows: int
    training: bool
    optimizer: str
    momentum: float
    delay: int
    prefer_class: str
    """The class that the session has run on; empty = none yet."""
    window_extra: int
    only: frozenset[VNodeId] | None = None
    current: Mapping[VNodeId, PeerId] = field(default_factory=dict)
    """Where the VNodes are now, lost PNodes included; empty = nowhere yet."""
    catalogue: str = ""
    """Digest of the node types that the network was made with; empty = not compared."""

    def has_room(self, needs: Mapping[PeerId, int]) -> bool:
        """Whether its PNodes have that many bytes each."""
        room = {c.peer: c.memory_bytes for c in self.candidates}
        return all(size <= room.get(peer, 0) for peer, size in needs.items())


def training_problem(
    network: Network, recipe: Recipe, candidates: Iterable[Candidate], *, window_extra: int, catalogue: str = ""
) -> Problem:
    """To train ``network``, which runs nowhere yet, by ``recipe``."""
    return Problem(
        network=network,
        candidates=tuple(candidates),
        rows=recipe.rows,
        training=True,
        optimizer=recipe.optimizer.kind,
        momentum=recipe.optimizer.momentum,
        delay=recipe.delay,
        prefer_class="",
        window_extra=window_extra,
        catalogue=catalogue,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Predicted seconds per microbatch of what a PNode hosts, forward and backward."""

    compute_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.links_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """``spots``: every VNode in the file's order. ``why``: VNode to reason."""

    spots: Mapping[VNodeId, PeerId]
    window: int
    why: Mapping[VNodeId, str]
    stages: Mapping[PeerId, Stage]
    """Of the PNodes that host something, in the problem's order."""


@dataclass(slots=True, kw_only=True)
class _Link:
    """The edges between a unit and another, where these are on two PNodes. Both ends spend the time."""

    unit: int
    frames: int = 0
    bytes: int = 0
    """Per microbatch, gradients that come back included."""
    kept_bytes: int = 0
    """What this unit keeps of them, for all open microbatches."""
    kept_there_bytes: int = 0
    """What the other keeps."""


@dataclass(slots=True, kw_only=True)
class _Unit:
    """VNodes that go to one PNode together. Memory is split into what adds up over units and what does not."""

    vnodes: tuple[VNodeId, ...]
    gflop: float
    """Per microbatch, at the kernels' share of the peak."""
    alone_bytes: int
    """Of this unit hosted alone."""
    held_bytes: int
    """Whatever else is with it, without what its links keep."""
    transient_bytes: int
    """While one task runs: the largest of those together counts."""
    links: dict[int, _Link] = field(default_factory=dict)
    """By the other unit."""


def solve(problem: Problem) -> Placement | str:
    """A placement, or the reason why there is none (with what is missing)."""
    here = [c for c in problem.candidates if not problem.catalogue or c.catalogue in ("", problem.catalogue)]
    lacking = len(problem.candidates) - len(here)
    lack = f"{lacking} PNode{'s lack' if lacking > 1 else ' lacks'} this network's node types"
    if not here:
        return lack if lacking else "no PNode is here: start one with `dcnr pnode`, or wait for one to join"
    classes = sorted({c.numeric_class for c in here})
    by_class = {k: [c for c in here if c.numeric_class == k] for k in classes}
    order = sorted(classes, key=lambda k: (k != problem.prefer_class, -sum(c.gflops for c in by_class[k]), k))
    tries = [by_class[k] for k in order]
    if len(classes) > 1:
        tries.append(here)
    # One microbatch computes as well as two, only slower: better than waiting for memory.
    windows = sorted({1 + problem.window_extra, 1}, reverse=True)
    units = {window: _units(problem, window) for window in windows}
    for candidates in tries:
        candidates.sort(key=lambda c: (-c.gflops, c.peer))
        for window in windows:
            stages = _Stages(units[window], candidates)
            assignment = _assignment(problem, stages)
            if assignment is not None:
                return _finish(problem, stages, assignment)
    missing = _missing(problem, units[1], here)
    return f"{missing}; {lack}" if lacking else missing


def _missing(problem: Problem, units: list[_Unit], candidates: list[Candidate]) -> str:
    """Why it does not fit. ``units`` as they are with one microbatch open."""
    need = _need(problem, [v for u in units for v in u.vnodes], 1)
    have = sum(c.memory_bytes for c in candidates)
    largest = max(units, key=lambda u: u.alone_bytes)
    room = max(c.memory_bytes for c in candidates)
    if need > have:
        return (
            f"the network needs {_mb(need)}, the {len(candidates)} PNodes together have {_mb(have)} free: "
            f"{_mb(need - have)} are missing"
        )
    if largest.alone_bytes > room:
        return (
            f"{largest.vnodes[0]} and what must be with it need {_mb(largest.alone_bytes)}, the largest PNode has "
            f"{_mb(room)} free: {_mb(largest.alone_bytes - room)} are missing there"
        )
    return f"the network needs {_mb(need)} in pieces that do not fit the {_mb(have)} that the PNodes have free"


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _memory(problem: Problem, vnodes: Sequence[VNodeId], window: int) -> Memory:
    return memory(
        problem.network,
        vnodes,
        rows=problem.rows,
        window=window,
        training=problem.training,
        delay=problem.delay,
        optimizer=problem.optimizer,
        momentum=problem.momentum,
    )


def _need(problem: Problem, vnodes: Sequence[VNodeId], window: int) -> int:
    return _memory(problem, vnodes, window).total


def _units(problem: Problem, window: int) -> list[_Unit]:
    network = problem.network
    units = []
    for groups in network.placement_units():
        vnodes = tuple(v for g in groups for v in network.groups[g].vnodes if problem.only is None or v in problem.only)
        if vnodes:
            need = _memory(problem, vnodes, window)
            work = unit_cost(network, groups) * problem.rows * (BACKWARD_WORK if problem.training else 1.0)
            units.append(
                _Unit(
                    vnodes=vnodes,
                    gflop=work / (1e9 * KERNEL_SHARE),
                    alone_bytes=need.total,
                    held_bytes=need.total - need.transient,
                    transient_bytes=need.transient,
                )
            )
    where = {v: u for u, unit in enumerate(units) for v in unit.vnodes}
    for index, edge in enumerate(network.definition.edges):
        source, target = where.get(edge.source), where.get(edge.target)
        if source is None or target is None or source == target:
            continue
        size = problem.rows * edge_bytes(network, index)
        gradient = index in network.gradient_edges
        frames = 2 if problem.training and gradient else 1
        arriving = window * size * (2 if gradient else 1)
        # Without a backward the sender keeps what leaves. An output with several readers counts as if one were elsewhere.
        alone = network.vnodes[edge.source].out_edges[edge.source_slot] == (index,)
        leaving = window * size if alone and not problem.training else 0
        for one, other, here, there in ((source, target, leaving, arriving), (target, source, arriving, leaving)):
            link = units[one].links.setdefault(other, _Link(unit=other))
            link.frames += frames
            link.bytes += frames * size
            link.kept_bytes += here
            link.kept_there_bytes += there
            units[one].held_bytes -= here
    return units


class _Stages:
    """An assignment, the PNode of each unit (-1 = none yet), and what it costs, kept up to date unit by unit.

    Times are whole picoseconds, so that taking a unit away undoes exactly what putting it there did.
    """

    def __init__(self, units: list[_Unit], candidates: list[Candidate]) -> None:
        self.units = units
        self.candidates = candidates
        self.hosts = range(len(candidates))
        self.load([-1] * len(units))

    def load(self, assignment: Sequence[int]) -> None:
        """Begin anew with ``assignment``."""
        self.assignment = [-1] * len(self.units)
        self.spent = [0] * len(self.candidates)
        """Per PNode and microbatch, links to units that are assigned included."""
        self.members: list[set[int]] = [set() for _ in self.candidates]
        self._held = [0] * len(self.candidates)
        self._open = [0] * len(self.candidates)
        """Bytes for links to units that are assigned nowhere yet: needed unless these come here."""
        self._transient = [0] * len(self.candidates)
        for unit, host in enumerate(assignment):
            if host != -1:
                self.put(unit, host)

    def put(self, unit: int, host: int) -> None:
        """Assign a unit that is assigned nowhere."""
        self._change(unit, host, 1)
        self.assignment[unit] = host
        self.members[host].add(unit)
        self._transient[host] = max(self._transient[host], self.units[unit].transient_bytes)

    def take(self, unit: int) -> int:
        """Undo :meth:`put`; answers where it was."""
        host = self.assignment[unit]
        self.assignment[unit] = -1
        self.members[host].remove(unit)
        self._transient[host] = max((self.units[u].transient_bytes for u in self.members[host]), default=0)
        self._change(unit, host, -1)
        return host

    def _change(self, unit: int, host: int, sign: int) -> None:
        self.spent[host] += sign * self.compute(unit, host)
        self._held[host] += sign * self.units[unit].held_bytes
        for link in self.units[unit].links.values():
            other = self.assignment[link.unit]
            if other == -1:
                self._open[host] += sign * link.kept_bytes
                continue
            self._open[other] -= sign * link.kept_there_bytes
            if other != host:
                self.spent[host] += sign * self._link(link, host)
                self.spent[other] += sign * self._link(link, other)
                self._held[host] += sign * link.kept_bytes
                self._held[other] += sign * link.kept_there_bytes

    def compute(self, unit: int, host: int) -> int:
        return round(1e12 * self.units[unit].gflop / max(self.candidates[host].gflops, SLOWEST_GFLOPS))

    def _link(self, link: _Link, host: int) -> int:
        return round(1e12 * (link.frames * FRAME_S + link.bytes / self.candidates[host].link_bytes_per_s))

    def need(self, host: int) -> int:
        """Bytes of what is there, once all units are assigned; before that, what it needs at least."""
        return self._held[host] + self._transient[host]

    def may_fit(self, hosts: Iterable[int]) -> bool:
        return all(self.need(host) <= self.candidates[host].memory_bytes for host in hosts)

    def fits(self, hosts: Iterable[int]) -> bool:
        """Wherever units that are assigned nowhere yet go."""
        return all(self.need(host) + self._open[host] <= self.candidates[host].memory_bytes for host in hosts)

    def score(self) -> tuple[int, int]:
        """(slowest PNode, sum of all)."""
        return (max(self.spent), sum(self.spent))

    def around(self, unit: int) -> set[int]:
        """Its PNode, and those of the units that it exchanges tensors with."""
        return {self.assignment[other] for other in (unit, *self.units[unit].links)} - {-1}


def _assignment(problem: Problem, stages: _Stages) -> list[int] | None:
    """The best that is found, from several fresh starts and from what is left of the current one; ``None`` = nothing fits.

    Of what is as fast as the best, give or take :data:`STAY_FACTOR`, it is the one that moves the fewest VNodes: a VNode
    that stays finds its snapshot in its host's home.
    """
    units, candidates = stages.units, stages.candidates
    few = len(units) * (len(units) + len(candidates)) <= IMPROVE_MOST
    here = {c.peer: h for h, c in enumerate(candidates)}
    stays = [here.get(problem.current.get(unit.vnodes[0], PeerId("")), -1) for unit in units]
    starts = [_split(stages), _spread(stages, [-1] * len(units))]
    if problem.current:
        starts.append(_spread(stages, stays))
    stages.load([0] * len(units))
    # All on the fastest PNode that has the room.
    starts.append(next(([h] * len(units) for h in stages.hosts if stages.need(0) <= candidates[h].memory_bytes), None))
    found: dict[tuple[int, ...], tuple[int, int]] = {}

    def keep() -> None:
        found[tuple(stages.assignment)] = stages.score()

    for start in starts:
        if start is None:
            continue
        stages.load(start)
        if stages.fits(stages.hosts):
            keep()
            if few:
                _improve(stages)
                keep()
    if len(units) <= EXACT_UNITS_MOST:
        searched = _search(stages, min(found.values(), default=None))
        if searched is not None:
            stages.load(searched)
            _improve(stages)
            keep()

    def moved(assignment: Sequence[int]) -> int:
        return sum(len(unit.vnodes) for unit, old, new in zip(units, stays, assignment, strict=True) if old != new)

    enough = STAY_FACTOR * min((slowest for slowest, _ in found.values()), default=0)
    ranked = ((s[0] > enough, moved(a) if problem.current and s[0] <= enough else 0, s, a) for a, s in found.items())
    best = min(ranked, default=(None,))[-1]
    return None if best is None else list(best)


def _split(stages: _Stages) -> list[int] | None:
    """Contiguous runs of units, in topological order, on the PNodes by speed: about the least bottleneck that fits.

    For a given bottleneck a greedy fill decides; bisection finds the least one.
    """
    units = range(len(stages.units))

    def fill(most: float) -> list[int] | None:
        stages.load([-1] * len(units))
        host = 0
        for unit in units:
            while True:
                stages.put(unit, host)
                if stages.spent[host] <= most and stages.fits([host]):
                    break
                stages.take(unit)
                host += 1
                if host == len(stages.hosts):
                    return None
        return stages.assignment

    best = fill(float("inf"))
    low, high = 0, max(stages.spent)
    while best is not None and high - low > high // 1000:
        middle = (low + high) // 2
        found = fill(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _spread(stages: _Stages, stays: Sequence[int]) -> list[int] | None:
    """Units go where ``stays`` says; the others, the largest first, each to who has room and would be done with it first."""
    stages.load(stays)
    for unit in sorted((u for u, host in enumerate(stays) if host == -1), key=lambda u: -stages.units[u].alone_bytes):
        for host in sorted(stages.hosts, key=lambda h: stages.spent[h] + stages.compute(unit, h)):
            stages.put(unit, host)
            if stages.fits([host]):
                break
            stages.take(unit)
        else:
            return None
    return stages.assignment


def _improve(stages: _Stages) -> None:
    """Single units moved, pairs of units exchanged, and all that two PNodes have exchanged, while that helps."""
    units, where = range(len(stages.units)), stages.assignment

    def attempt(moves: Mapping[int, int]) -> bool:
        before = stages.score()
        old = {unit: stages.take(unit) for unit in moves}
        for unit, host in moves.items():
            stages.put(unit, host)
        if stages.score() < before and stages.fits(stages.hosts):
            return True
        for unit in moves:
            stages.take(unit)
        for unit, host in old.items():
            stages.put(unit, host)
        return False

    gained = True
    while gained:
        gained = False
        for unit in units:
            for host in stages.hosts:
                gained |= host != where[unit] and attempt({unit: host})
            for other in range(unit):
                gained |= where[other] != where[unit] and attempt({unit: where[other], other: where[unit]})
        for pair in combinations(stages.hosts, 2):
            here, there = (sorted(stages.members[host]) for host in pair)
            gained |= attempt(dict.fromkeys(here, pair[1]) | dict.fromkeys(there, pair[0]))


def _search(stages: _Stages, known: tuple[int, int] | None) -> list[int] | None:
    """The assignment that fits with about the least slowest stage, if that is better than ``known``: branch and bound.

    Units in order. A branch ends where a stage is no faster than the best so far, where all together could not do the
    rest in time, or where a PNode's memory is full: what is needed only grows.
    """
    units, speeds = range(len(stages.units)), [max(c.gflops, SLOWEST_GFLOPS) for c in stages.candidates]
    rest = [sum(unit.gflop for unit in stages.units[first:]) for first in range(len(units) + 1)]
    most = float("inf") if known is None else known[0] / GOOD_ENOUGH
    best: list[int] | None = None
    branches = 0
    stages.load([-1] * len(units))

    def extend(unit: int) -> None:
        nonlocal best, most, branches
        if unit == len(units):
            best, most = list(stages.assignment), max(stages.spent) / GOOD_ENOUGH
            return
        empty = set()
        for host in sorted(stages.hosts, key=lambda h: stages.spent[h] + stages.compute(unit, h)):
            if branches == BRANCHES_MOST:
                return
            # Of PNodes that are alike and empty one is enough.
            kind = replace(stages.candidates[host], peer=PeerId(""))
            if not stages.members[host]:
                if kind in empty:
                    continue
                empty.add(kind)
            branches += 1
            stages.put(unit, host)
            done = sum(s * v for s, v in zip(stages.spent, speeds, strict=True))
            if (
                max(stages.spent) < most
                and done + 1e12 * rest[unit + 1] < most * sum(speeds)
                and stages.may_fit(stages.around(unit))
            ):
                extend(unit + 1)
            stages.take(unit)

    extend(0)
    return best


def _finish(problem: Problem, stages: _Stages, assignment: list[int]) -> Placement:
    """The widest window that fits, up to a microbatch per segment and some more; and reasons."""
    network, candidates = problem.network, stages.candidates
    peers = {v: candidates[host].peer for unit, host in zip(stages.units, assignment, strict=True) for v in unit.vnodes}
    spots = {v: peers[v] for v in network.vnodes if v in peers}
    window = len(network.segments({v: str(p) for v, p in spots.items()}, problem.only)) + problem.window_extra
    times = predicted(problem, spots)
    hosts = [c for c in candidates if c.peer in times]
    held = [_memory(problem, [v for v, peer in spots.items() if peer == c.peer], 1) for c in hosts]
    for one, host in zip(held, hosts, strict=True):
        if one.activations:
            # At least 1, for the assignment fits with the window of ``stages``.
            window = min(window, 1 + (host.memory_bytes - one.total) // one.activations)
    total = sum(stage.compute_s for stage in times.values()) or 1.0
    why = {
        c.peer: f"{times[c.peer].compute_s / total:.0%} of the predicted work at {c.gflops:.0f} GFLOP/s, "
        f"{_mb(one.total + (window - 1) * one.activations)} of {_mb(c.memory_bytes)} free, class {c.numeric_class[:8]}"
        for c, one in zip(hosts, held, strict=True)
    }
    return Placement(spots=spots, window=window, why={v: why[peer] for v, peer in spots.items()}, stages=times)


def predicted(problem: Problem, spots: Mapping[VNodeId, PeerId]) -> dict[PeerId, Stage]:
    """Of a placement, whoever made it, on the problem's candidates: in their order, those that host something."""
    units, candidates = _units(problem, 1), list(problem.candidates)
    here = {c.peer: h for h, c in enumerate(candidates)}
    stages = _Stages(units, candidates)
    stages.load([here[spots[unit.vnodes[0]]] for unit in units])
    found = {}
    for host in stages.hosts:
        if stages.members[host]:
            compute = sum(stages.compute(unit, host) for unit in stages.members[host])
            found[candidates[host].peer] = Stage(
                compute_s=compute / 1e12, links_s=(stages.spent[host] - compute) / 1e12
            )
    return found
