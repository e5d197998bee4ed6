"""Which PNode hosts which VNodes: a pure function of the network and of what the PNodes offer.

Placement balances time and honours memory, colocation, ties and numeric class. It can reach speed and
survival, never a bit of a weight. It searches from several starts. Where units and PNodes are few it then tries all
that could be better, so that the answer is the best there is; elsewhere it is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network
from dcnr.network.memory import Memory, edge_bytes, memory, unit_cost

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
EXACT_MOST = 10_000
"""PNodes to the power of units up to which the search is exhaustive: 13 units on 2 PNodes with hardly room take a second (measured)."""
STAY_FACTOR = 1.03
"""A placement that is at most this much slower than the best is as good: then fewer moved VNodes decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A PNode that may host: ``memory_bytes`` is what is free for this network."""

    peer: PeerId
    numeric_class: str
    gflops: float
    memory_bytes: int
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
    """Alone on a PNode: together units need less, for what passes between them is kept once."""
    weight_bytes: int
    """Of these, what they need wherever they are: weights, gradients, optimizer, snapshot."""


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
            stages = _Stages(problem, units[window], candidates, window)
            assignment = _assignment(problem, stages)
            if assignment is not None:
                return _finish(problem, stages, assignment)
    missing = _missing(problem, units[1], here)
    return f"{missing}; {lack}" if lacking else missing


def _missing(problem: Problem, units: list[_Unit], candidates: list[Candidate]) -> str:
    """Why it does not fit. ``units`` as they are with one microbatch open."""
    need = _need(problem, [v for u in units for v in u.vnodes], 1)
    have = sum(c.memory_bytes for c in candidates)
    largest = max(units, key=lambda u: u.bytes)
    room = max(c.memory_bytes for c in candidates)
    if need > have:
        return (
            f"the network needs {_mb(need)}, the {len(candidates)} PNodes together have {_mb(have)} free: "
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
            held = _memory(problem, vnodes, window)
            units.append(
                _Unit(
                    vnodes=vnodes,
                    seconds_gflop=unit_cost(network, groups)
                    * problem.rows
                    * (BACKWARD_WORK if problem.training else 1.0)
                    / (1e9 * KERNEL_SHARE),
                    bytes=held.total,
                    weight_bytes=held.total - held.activations - held.transient,
                )
            )
    return units


def _split(units: list[_Unit], candidates: list[Candidate]) -> list[int] | None:
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
    """What an assignment, the PNode of each unit, would cost with ``window`` open microbatches."""

    def __init__(self, problem: Problem, units: list[_Unit], candidates: list[Candidate], window: int) -> None:
        network = problem.network
        self.units = units
        self.candidates = candidates
        self._problem = problem
        self._window = window
        self.small = len(candidates) ** len(units) <= EXACT_MOST
        self._needs: dict[tuple[int, ...], int] = {}
        """Bytes of units that are hosted together."""
        self.crossing: dict[tuple[int, int], float] = {}
        """Seconds that each end spends on the edges between two units, where these are on two PNodes."""
        where = {v: u for u, unit in enumerate(units) for v in unit.vnodes}
        for index, edge in enumerate(network.definition.edges):
            source, target = where.get(edge.source), where.get(edge.target)
            if source is None or target is None or source == target:
                continue
            twice = 2 if problem.training and index in network.gradient_edges else 1
            spent = twice * (FRAME_S + problem.rows * edge_bytes(network, index) / LINK_BYTES_PER_S)
            ends = (min(source, target), max(source, target))
            self.crossing[ends] = self.crossing.get(ends, 0.0) + spent

    def seconds(self, assignment: list[int]) -> list[float]:
        """Per PNode and microbatch, links included."""
        seconds = [0.0] * len(self.candidates)
        for unit, host in zip(self.units, assignment, strict=True):
            seconds[host] += unit.seconds_gflop / self.candidates[host].gflops
        for (first, second), spent in self.crossing.items():
            if assignment[first] != assignment[second]:
                seconds[assignment[first]] += spent
                seconds[assignment[second]] += spent
        return seconds

    def fits(self, assignment: list[int]) -> bool:
        """In a small problem exactly, else as if every unit were alone on its PNode: it needs no more, and this is quick."""
        held = [0] * len(self.candidates)
        for unit, host in zip(self.units, assignment, strict=True):
            held[host] += unit.bytes
        for host, size in enumerate(held):
            room = self.candidates[host].memory_bytes
            if size <= room:
                continue
            if not self.small:
                return False
            here = tuple(u for u, h in enumerate(assignment) if h == host)
            if sum(self.units[u].weight_bytes for u in here) > room or self._together(here) > room:
                return False
        return True

    def _together(self, units: tuple[int, ...]) -> int:
        if units not in self._needs:
            self._needs[units] = _need(self._problem, [v for u in units for v in self.units[u].vnodes], self._window)
        return self._needs[units]

    def score(self, assignment: list[int]) -> tuple[float, float]:
        """(slowest PNode, sum of all). Infinite where memory does not suffice."""
        if not self.fits(assignment):
            return (float("inf"), float("inf"))
        seconds = self.seconds(assignment)
        return (max(seconds), sum(seconds))


def _assignment(problem: Problem, stages: _Stages) -> list[int] | None:
    """The best that is found, from several fresh starts and from what is left of the current one; ``None`` = nothing fits.

    Of what is as fast as the best, give or take :data:`STAY_FACTOR`, it is the one that moves the fewest VNodes: a VNode
    that stays finds its snapshot in its host's home.
    """
    units, candidates = stages.units, stages.candidates
    few = len(units) * (len(units) + len(candidates)) <= IMPROVE_MOST
    starts = [_split(units, candidates), _spread(units, candidates, {})]
    alone = ([host] * len(units) for host in range(len(candidates)))
    # Where nothing is improved, only the fastest PNode that has room for all is worth a look.
    starts += alone if few else [next(filter(stages.fits, alone), None)]
    if problem.current:
        starts.append(_spread(units, candidates, problem.current))
    found = [a for a in starts if a is not None and stages.fits(a)]
    if few:
        found += [_improved(a, stages) for a in found]
    if stages.small:
        best = _optimum(stages, min((stages.score(a)[0] for a in found), default=float("inf")))
        if best is not None:
            found.append(_improved(best, stages))

    def moved(assignment: list[int]) -> int:
        return sum(
            len(unit.vnodes)
            for unit, host in zip(units, assignment, strict=True)
            if problem.current.get(unit.vnodes[0]) != candidates[host].peer
        )

    scores = [stages.score(a) for a in found]
    enough = STAY_FACTOR * min((slowest for slowest, _ in scores), default=0.0)
    ranked = (
        (s[0] > enough, moved(a) if problem.current and s[0] <= enough else 0, s, a)
        for s, a in zip(scores, found, strict=True)
    )
    return min(ranked, default=(None,))[-1]


def _optimum(stages: _Stages, most_s: float) -> list[int] | None:
    """The assignment that fits with the least slowest stage, if that is less than ``most_s``: branch and bound.

    A branch ends where a stage is no faster than the best so far, or where weights alone do not fit: both only grow.
    """
    units, candidates = stages.units, stages.candidates
    links: list[list[tuple[int, float]]] = [[] for _ in units]
    for (first, second), spent in stages.crossing.items():
        links[second].append((first, spent))
    best: list[int] | None = None
    chosen: list[int] = []

    def extend(seconds: list[float], weights: list[int]) -> None:
        nonlocal best, most_s
        if len(chosen) == len(units):
            if stages.fits(chosen):
                best, most_s = list(chosen), max(seconds)
            return
        unit = units[len(chosen)]
        for host, candidate in enumerate(candidates):
            spent = list(seconds)
            spent[host] += unit.seconds_gflop / candidate.gflops
            for other, link_s in links[len(chosen)]:
                if chosen[other] != host:
                    spent[host] += link_s
                    spent[chosen[other]] += link_s
            held = list(weights)
            held[host] += unit.weight_bytes
            if max(spent) < most_s and held[host] <= candidate.memory_bytes:
                chosen.append(host)
                extend(spent, held)
                chosen.pop()

    extend([0.0] * len(candidates), [0] * len(candidates))
    return best


def _spread(units: list[_Unit], candidates: list[Candidate], current: Mapping[VNodeId, PeerId]) -> list[int] | None:
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


def _improved(assignment: list[int], stages: _Stages) -> list[int]:
    """Single units moved, pairs of units exchanged, and all that two PNodes have exchanged, while that helps."""
    hosts = len(stages.candidates)
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


def _finish(problem: Problem, stages: _Stages, assignment: list[int]) -> Placement:
    """The widest window that fits, up to a microbatch per segment and some more; and reasons."""
    network = problem.network
    units, candidates = stages.units, stages.candidates
    host_of = {v: assignment[u] for u, unit in enumerate(units) for v in unit.vnodes}
    ordered = [v for v in network.vnodes if v in host_of]
    spots = {v: candidates[host_of[v]].peer for v in ordered}
    hosted: list[list[VNodeId]] = [[] for _ in candidates]
    for vnode in ordered:
        hosted[host_of[vnode]].append(vnode)
    window = len(network.segments({v: str(p) for v, p in spots.items()}, problem.only)) + problem.window_extra

    held = [_memory(problem, vnodes, 1) for vnodes in hosted]
    for one, candidate in zip(held, candidates, strict=True):
        if one.activations:
            # At least 1, for the assignment fits with the window of ``stages``.
            window = min(window, 1 + (candidate.memory_bytes - one.total) // one.activations)
    needs = [one.total + (window - 1) * one.activations for one in held]
    work = [0.0] * len(candidates)
    for unit, host in zip(units, assignment, strict=True):
        work[host] += unit.seconds_gflop / candidates[host].gflops
    total = sum(work) or 1.0
    reasons = [
        f"{s / total:.0%} of the predicted work at {c.gflops:.0f} GFLOP/s, {_mb(n)} of {_mb(c.memory_bytes)} free, "
        f"class {c.numeric_class[:8]}"
        for c, s, n in zip(candidates, work, needs, strict=True)
    ]
    seconds = stages.seconds(assignment)
    return Placement(
        spots=spots,
        window=window,
        why={v: reasons[host_of[v]] for v in ordered},
        stage_s={c.peer: s for c, s in zip(candidates, seconds, strict=True) if s},
    )
