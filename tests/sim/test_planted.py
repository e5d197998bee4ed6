"""Every planted bug is found, and by an invariant that it breaks."""

from __future__ import annotations

import pytest

from dcnr.sim import run_seed
from tests.sim.planted import PLANTED, Planted

SEEDS = 500


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
@pytest.mark.timeout(300)
def test_a_planted_bug_is_found(planted: Planted) -> None:
    for seed in (planted.hint, *range(SEEDS)):
        outcome = run_seed(seed, patches=(planted.patch,))
        if not outcome.ok:
            invariant = outcome.invariant
            assert invariant in planted.invariants, outcome.violation
            return
    pytest.fail(f"{planted.name} was not found in {SEEDS} seeds")
