"""Which PNode hosts which VNodes: a pure function of the network and of what the PNodes offer.

Placement balances time and honours memory, colocation, ties and numeric class. It can reach speed and
survival, never a bit of a weight. It searches from several starts and is not exact: small cases come within a tenth of
the best; where memory is so tight that few arrangements fit, it may be further off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network
from dcnr.network.memory import edge_bytes, memory, unit_cost

BACKWARD_WORK = 3.0
"""A training step costs about three forwards: one forward, and two products per product backward."""
KERNEL_SHARE = 0.4
"""Of the measured peak that the kernels of a small network reach (measured: 44 of 100 GFLOP/s on one thread)."""
LINK_BYTES_PER_S = 8e8
"""Measured on loopback with TLS; a slower link is found by the measured step times, not assumed here."""
FRAME_S = 2e-5
"""What a frame costs its PNode beside its bytes. Latency is no cost here: the window hides it."""
IMPROVE_MOST = 1500
"""Units x (units + PNodes) up to which moves and exchanges are tried: 27 units on 10 PNodes take 0.7 s (measured)."""
STAY_FACTOR = 1.03
"""A placement that is at most this much slower than the best is as good: then fewer moved VNodes decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A PNode that may host: ``memory_bytes`` is what is free for this network."""

    peer: PeerId
    numeric_class: str
    gflops: float
    memory_bytes: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """``spots``: every VNode in the file's order. ``why``: VNode to reason."""

    spots: Mapping[VNodeId, PeerId]
    window: int
    why: Mapping[VNodeId, str]
    stage_s: Mapping[PeerId, float]
    """Predicted seconds per microbatch and PNode, links included."""


@dataclass(slots=True, kw_only=True)
class _Unit:
    vnodes: tuple[VNodeId, ...]
    seconds_gflop: float
    """GFLOP per microbatch."""
    bytes: int


def solve(problem: Problem) -> Placement | str:
    """A placement, or the reason why there is none (with what is missing)."""
    if not problem.candidates:
        return "no PNode is here: start one with `dcnr pnode`, or wait for one to join"
    units = _units(problem)
    classes = sorted({c.numeric_class for c in problem.candidates})
    by_class = {k: [c for c in problem.candidates if c.numeric_class == k] for k in classes}
    order = sorted(classes, key=lambda k: (k != problem.prefer_class, -sum(c.gflops for c in by_class[k]), k))
    tries = [by_class[k] for k in order]
    if len(classes) > 1:
        tries.append(list(problem.candidates))
    for candidates in tries:
        candidates.sort(key=lambda c: (-c.gflops, c.peer))
        for assignment in _assignments(problem, units, candidates):
            answer = _finish(problem, units, candidates, assignment)
            if answer is not None:
                return answer
    need = sum(u.bytes for u in units)
    have = sum(c.memory_bytes for c in problem.candidates)
    largest = max(units, key=lambda u: u.bytes)
    room = max(c.memory_bytes for c in problem.candidates)
    if need > have:
        return (
            f"the network needs {_mb(need)}, the {len(problem.candidates)} PNodes together have {_mb(have)} free: "
            f"{_mb(need - have)} are missing"
        )
    if largest.bytes > room:
        return (
            f"{largest.vnodes[0]} and what must be with it need {_mb(largest.bytes)}, the largest PNode has "
            f"{_mb(room)} free: {_mb(largest.bytes - room)} are missing there"
        )
    return f"the network needs {_mb(need)} in pieces that do not fit the {_mb(have)} that the PNodes have free"


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _need(problem: Problem, vnodes: Sequence[VNodeId], window: int) -> int:
    return memory(
        problem.network,
        vnodes,
        rows=problem.rows,
        window=window,
        training=problem.training,
        delay=problem.delay,
        optimizer=problem.optimizer,
        momentum=problem.momentum,
    ).total


def _units(problem: Problem) -> list[_Unit]:
    network = problem.network
    window = 1 + problem.window_extra
    units = []
    for groups in network.placement_units():
        vnodes = tuple(v for g in groups for v in network.groups[g].vnodes if problem.only is None or v in problem.only)
        if vnodes:
            units.append(
                _Unit(
                    vnodes=vnodes,
                    seconds_gflop=unit_cost(network, groups)
                    * problem.rows
                    * (BACKWARD_WORK if problem.training else 1.0)
                    / (1e9 * KERNEL_SHARE),
                    bytes=_need(problem, vnodes, window),
                )
            )
    return units


def _split(problem: Problem, units: list[_Unit], candidates: list[Candidate]) -> list[int] | None:
    """Contiguous runs of units, in topological order, on the PNodes by speed: the least bottleneck that fits.

    For a given bottleneck a greedy fill decides; bisection finds the least one.
    """

    def fill(most_s: float) -> list[int] | None:
        assignment: list[int] = []
        host, seconds, held = 0, 0.0, 0
        for unit in units:
            while True:
                if host == len(candidates):
                    return None
                spent = unit.seconds_gflop / candidates[host].gflops
                if seconds + spent <= most_s and held + unit.bytes <= candidates[host].memory_bytes:
                    break
                host, seconds, held = host + 1, 0.0, 0
            assignment.append(host)
            seconds += spent
            held += unit.bytes
        return assignment

    high = sum(u.seconds_gflop for u in units) / min(c.gflops for c in candidates) + 1e-9
    best = fill(high)
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        found = fill(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


class _Stages:
    """What an assignment, the PNode of each unit, would cost."""

    def __init__(self, problem: Problem, units: list[_Unit], candidates: list[Candidate]) -> None:
        network = problem.network
        self._units = units
        self._candidates = candidates
        self._crossing: dict[tuple[int, int], float] = {}
        """Seconds that each end spends on the edges between two units, where these are on two PNodes."""
        where = {v: u for u, unit in enumerate(units) for v in unit.vnodes}
        for index, edge in enumerate(network.definition.edges):
            source, target = where.get(edge.source), where.get(edge.target)
            if source is None or target is None or source == target:
                continue
            twice = 2 if problem.training and index in network.gradient_edges else 1
            spent = twice * (FRAME_S + problem.rows * edge_bytes(network, index) / LINK_BYTES_PER_S)
            self._crossing[(source, target)] = self._crossing.get((source, target), 0.0) + spent

    def seconds(self, assignment: list[int]) -> list[float]:
        """Per PNode and microbatch, links included."""
        seconds = [0.0] * len(self._candidates)
        for unit, host in zip(self._units, assignment, strict=True):
            seconds[host] += unit.seconds_gflop / self._candidates[host].gflops
        for (source, target), spent in self._crossing.items():
            if assignment[source] != assignment[target]:
                seconds[assignment[source]] += spent
                seconds[assignment[target]] += spent
        return seconds

    def score(self, assignment: list[int]) -> tuple[float, float]:
        """(slowest PNode, sum of all). Infinite where memory does not suffice."""
        held = [0] * len(self._candidates)
        for unit, host in zip(self._units, assignment, strict=True):
            held[host] += unit.bytes
        if any(h > c.memory_bytes for h, c in zip(held, self._candidates, strict=True)):
            return (float("inf"), float("inf"))
        seconds = self.seconds(assignment)
        return (max(seconds), sum(seconds))


def _assignments(problem: Problem, units: list[_Unit], candidates: list[Candidate]) -> list[list[int]]:
    """Assignments worth trying, the best first: from several fresh starts, and from what is left of the current one.

    What is as fast as the best, give or take :data:`STAY_FACTOR`, is ordered by how many VNodes it moves: a VNode that
    stays finds its snapshot in its host's home.
    """
    stages = _Stages(problem, units, candidates)
    starts = [_split(problem, units, candidates), _spread(problem, units, candidates, {})]
    starts += [[host] * len(units) for host in range(len(candidates))]
    if problem.current:
        starts.append(_spread(problem, units, candidates, problem.current))
    found = [a for a in starts if a is not None and stages.score(a)[0] < float("inf")]
    if len(units) * (len(units) + len(candidates)) <= IMPROVE_MOST:
        found += [_improved(a, stages, len(candidates)) for a in found]

    def moved(assignment: list[int]) -> int:
        return sum(
            len(unit.vnodes)
            for unit, host in zip(units, assignment, strict=True)
            if problem.current.get(unit.vnodes[0]) != candidates[host].peer
        )

    scores = [stages.score(a) for a in found]
    enough = STAY_FACTOR * min((slowest for slowest, _ in scores), default=0.0)
    ranked = sorted(
        (s[0] > enough, moved(a) if problem.current and s[0] <= enough else 0, s, a)
        for s, a in zip(scores, found, strict=True)
    )
    return [a for *_, a in ranked]


def _spread(
    problem: Problem, units: list[_Unit], candidates: list[Candidate], current: Mapping[VNodeId, PeerId]
) -> list[int] | None:
    """``current`` stays; the other units go, the largest first, each to who has room and would be done with it first."""
    here = {c.peer: h for h, c in enumerate(candidates)}
    assignment = [here.get(current.get(unit.vnodes[0], PeerId("")), -1) for unit in units]
    seconds = [0.0] * len(candidates)
    held = [0] * len(candidates)
    for unit in sorted(range(len(units)), key=lambda u: (assignment[u] == -1, -units[u].bytes)):
        size, gflop = units[unit].bytes, units[unit].seconds_gflop
        if assignment[unit] == -1:
            fits = [h for h, c in enumerate(candidates) if held[h] + size <= c.memory_bytes]
            if not fits:
                return None
            assignment[unit] = min(fits, key=lambda h: seconds[h] + gflop / candidates[h].gflops)
        seconds[assignment[unit]] += gflop / candidates[assignment[unit]].gflops
        held[assignment[unit]] += size
    return assignment


def _improved(assignment: list[int], stages: _Stages, hosts: int) -> list[int]:
    """Single units moved, pairs of units exchanged, and all that two PNodes have exchanged, while that helps."""
    best = list(assignment)
    score = stages.score(best)
    for _ in range(50):
        before = score
        for unit in range(len(best)):
            moves = [[*best[:unit], host, *best[unit + 1 :]] for host in range(hosts)]
            moves += [_exchanged(best, unit, other) for other in range(unit)]
            for move in moves:
                found = stages.score(move)
                if found < score:
                    best, score = move, found
        for first, second in combinations(range(hosts), 2):
            move = [{first: second, second: first}.get(host, host) for host in best]
            found = stages.score(move)
            if found < score:
                best, score = move, found
        if score == before:
            break
    return best


def _exchanged(assignment: list[int], first: int, second: int) -> list[int]:
    exchanged = list(assignment)
    exchanged[first], exchanged[second] = exchanged[second], exchanged[first]
    return exchanged


def _finish(
    problem: Problem, units: list[_Unit], candidates: list[Candidate], assignment: list[int]
) -> Placement | None:
    """The window that fits, and reasons. ``None`` where even a window of 1 does not fit exactly."""
    network = problem.network
    host_of = {v: assignment[u] for u, unit in enumerate(units) for v in unit.vnodes}
    ordered = [v for v in network.vnodes if v in host_of]
    spots = {v: candidates[host_of[v]].peer for v in ordered}
    hosted = [[v for v in ordered if host_of[v] == h] for h in range(len(candidates))]
    window = len(network.segments({v: str(p) for v, p in spots.items()}, problem.only)) + problem.window_extra
    needs: list[int] = []
    while window >= 1:
        needs = [_need(problem, vnodes, window) if vnodes else 0 for vnodes in hosted]
        if all(n <= c.memory_bytes for n, c in zip(needs, candidates, strict=True)):
            break
        window -= 1
    else:
        return None
    work = [0.0] * len(candidates)
    for unit, host in zip(units, assignment, strict=True):
        work[host] += unit.seconds_gflop / candidates[host].gflops
    total = sum(work) or 1.0
    reasons = [
        f"{s / total:.0%} of the predicted work at {c.gflops:.0f} GFLOP/s, {_mb(n)} of {_mb(c.memory_bytes)} free, "
        f"class {c.numeric_class[:8]}"
        for c, s, n in zip(candidates, work, needs, strict=True)
    ]
    seconds = _Stages(problem, units, candidates).seconds(assignment)
    return Placement(
        spots=spots,
        window=window,
        why={v: reasons[host_of[v]] for v in ordered},
        stage_s={c.peer: s for c, s in zip(candidates, seconds, strict=True) if s},
    )
