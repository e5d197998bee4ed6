"""``dcnr bench placement``: how long it takes to decide who hosts what, in a network and among PNodes of a large size."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

from dcnr.errors import ComputeError
from dcnr.ids import PeerId
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.orchestrator.placement import Candidate, Problem, solve

VNODES, PNODES = 2000, 1000
WIDTH, ROWS = 64, 64
MEMORY_BYTES = 1 << 20
"""Of each PNode: room for a few layers, so that no small part of them could host the network."""
GOAL_S = 10.0


def measure(rounds: int) -> list[dict[str, Any]]:
    """The benchmark's one line."""
    problem = a_problem()
    samples = []
    for _ in range(rounds):
        begun = perf_counter()
        answer = solve(problem)
        samples.append(perf_counter() - begun)
        if isinstance(answer, str):
            raise ComputeError(f"nothing was placed: {answer}")
    value = median(samples)
    return [
        {
            "bench": "placement",
            "figure": "placement_seconds",
            "value": round(value, 4),
            "unit": "s",
            "against": f"{VNODES} VNodes in a chain, {PNODES} PNodes of {MEMORY_BYTES >> 10} KiB and of 7 speeds",
            "goal": GOAL_S,
            "holds": value < GOAL_S,
            "samples": samples,
        }
    ]


def a_problem() -> Problem:
    """A chain of layers that all PNodes together can hold, each of which has room for a few."""
    graph = Graph("chain")
    current = graph.input("x", [WIDTH], "float32")
    for _ in range(VNODES - 1):
        current = graph.linear(current, out_dim=WIDTH)
    graph.cost("mse", current, target="y")
    return Problem(
        network=analyse(graph.definition()),
        candidates=tuple(
            Candidate(
                peer=PeerId(f"{number:032x}"),
                numeric_class="measured",
                gflops=10.0 * (1 + number % 7),
                memory_bytes=MEMORY_BYTES,
            )
            for number in range(PNODES)
        ),
        rows=ROWS,
        training=True,
        optimizer="adamw",
        momentum=0.0,
        delay=0,
        prefer_class="",
        window_extra=1,
    )
