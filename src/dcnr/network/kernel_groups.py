"""Kernel groups and topological orders: linear in nodes and edges, ties broken by the file's order.

Nodes are positions 0..n-1 in the file, edges pairs of positions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Edges = Sequence[tuple[int, int]]


class Pieces:
    """Union-find with path halving; the representative of a piece is its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, member: int) -> int:
        parent = self._parent
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low


def topological_order(count: int, edges: Edges) -> list[int]:
    """Smallest position first among those that are ready (Kahn, 1962). Shorter than ``count`` where there is a cycle."""
    waiting = [0] * count
    after: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        waiting[target] += 1
        after[source].append(target)
    ready = [position for position in range(count) if not waiting[position]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        position = heapq.heappop(ready)
        order.append(position)
        for target in after[position]:
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, target)
    return order


def find_cycle(count: int, edges: Edges, order: Sequence[int]) -> list[int]:
    """One cycle among the positions that ``order`` left out, in the direction of its edges."""
    left = set(range(count)).difference(order)
    before: dict[int, int] = {}
    for source, target in edges:
        if source in left and target in left:
            # Any predecessor that is left over will do: each such node has one, so walking back must come round.
            before.setdefault(target, source)
    walk: list[int] = []
    seen: dict[int, int] = {}
    position = min(left)
    while position not in seen:
        seen[position] = len(walk)
        walk.append(position)
        position = before[position]
    cycle = walk[seen[position] :][::-1]
    start = cycle.index(min(cycle))
    return cycle[start:] + cycle[:start]


def kernel_pieces(required: Sequence[str | None], edges: Edges) -> list[int]:
    """Kernel group of each node, as the smallest position in it.

    ``required`` names a node's required colocation group; each is cut into its connected pieces, any other node is alone.
    """
    pieces = Pieces(len(required))
    for source, target in edges:
        if required[source] is not None and required[source] == required[target]:
            pieces.join(source, target)
    return [pieces.find(position) for position in range(len(required))]
