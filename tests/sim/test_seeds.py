"""The machines survive their seeds, and a seed is a whole determined world."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dcnr.sim import run, run_seed

SEEDS, CHUNK = 100, 10


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
@pytest.mark.timeout(300)
def test_every_invariant_holds(first: int) -> None:
    for outcome in run(range(first, first + CHUNK)):
        shown = "\n".join(outcome.trace)
        assert outcome.ok, f"{outcome.violation}\nreplay: {outcome.replay}\n{shown}"


@pytest.mark.timeout(300)
def test_seeds_meet_what_they_are_for() -> None:
    """Otherwise the hundred seeds would prove little: faults strike, sessions roll back, and still finish."""
    outcomes = list(run(range(60)))
    kinds = {kind for outcome in outcomes for kind in outcome.stats["faults"]}
    assert {"crash", "orchestrator", "pause", "break", "cut", "store", "compute", "leave", "damage"} <= kinds
    assert sum(outcome.stats["rollbacks"] for outcome in outcomes) > 20
    assert sum(outcome.stats["ended"] == "finished" for outcome in outcomes) > 40


def test_a_seed_is_one_trace() -> None:
    first, second = (run_seed(3, trace=True) for _ in range(2))
    assert first.trace == second.trace
    assert first.trace_digest == second.trace_digest
    assert run_seed(4, trace=True).trace_digest != first.trace_digest


def test_traces_do_not_depend_on_the_hash_seed() -> None:
    """Sets of strings iterate in another order under another hash seed: nothing may follow from it."""
    code = "from dcnr.sim import run_seed\nfor s in range(0, 60, 4): print(run_seed(s, trace=True).trace_digest)"

    def digests(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout

    first = digests("1")
    assert len(first.split()) == 15
    assert first == digests("2")
