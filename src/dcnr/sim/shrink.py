"""A failing seed made small: fewer faults, processes and steps, as long as the same invariant breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcnr.sim.faults import Fault, scenario
from dcnr.sim.run import Outcome, Patch, run_seed

RUNS = 100
"""How often a part is tried; about a tenth of a second each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """The smallest part found. ``runs``: how many were tried."""

    outcome: Outcome
    faults: tuple[Fault, ...]
    runs: int


def shrink(failed: Outcome, patches: Sequence[Patch] = ()) -> Shrunk:
    """Drop one thing at a time, as delta debugging does (Zeller, 1999), until nothing can be dropped. A part counts only
    if it violates the same invariant: else it may be another bug."""
    assert failed.violation
    whole = scenario(failed.seed)
    runs = 0
    found = failed
    tried = {str(found.only)}
    progress = True
    while progress:
        progress = False
        for part in found.only.smaller(whole):
            if str(part) in tried or runs == RUNS:
                continue
            tried.add(str(part))
            runs += 1
            outcome = run_seed(failed.seed, patches, only=part)
            if outcome.invariant == failed.invariant:
                found, progress = outcome, True
                break
    return Shrunk(outcome=found, faults=found.only.of(whole).faults, runs=runs)
