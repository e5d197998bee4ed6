"""A failing seed is made small, and its smallest part is replayed by the one command that is printed."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dcnr import sim
from dcnr.cli.main import app
from dcnr.errors import UsageError
from dcnr.sim import Only, run_seed, shrink
from dcnr.sim.faults import scenario
from dcnr.sim.store import Habits
from tests.sim.planted import PLANTED


def test_a_planted_bug_that_needs_one_fault_is_shrunk_to_it() -> None:
    patches = (next(p.patch for p in PLANTED if p.name == "gradient applied twice"),)
    failed = next(o for o in (run_seed(s, patches) for s in range(5, 50)) if not o.ok and len(o.stats["faults"]) > 2)
    shrunk = shrink(failed, patches)
    assert shrunk.outcome.invariant == failed.invariant
    assert len(shrunk.faults) < len(scenario(failed.seed).faults)
    again = run_seed(failed.seed, patches, only=Only.parse(str(shrunk.outcome.only)))
    assert again.violation == shrunk.outcome.violation
    assert shrunk.outcome.replay == f"dcnr simulate --seeds {failed.seed}..{failed.seed} --only {again.only}"
    for smaller in again.only.smaller(scenario(failed.seed)):
        assert run_seed(failed.seed, patches, only=smaller).invariant != failed.invariant


def test_a_bug_that_shows_without_any_fault_is_shrunk_to_none() -> None:
    patches = (next(p.patch for p in PLANTED if p.name == "update before all microbatches are folded"),)
    failed = next(o for o in (run_seed(s, patches) for s in range(50)) if not o.ok and o.stats["faults"])
    shrunk = shrink(failed, patches)
    part = shrunk.outcome.only.of(scenario(failed.seed))
    assert shrunk.faults == part.faults == part.breaks_us == part.clocks_ppm == ()
    assert part.store_habits == Habits()
    assert (part.pnodes, part.orchestrators, part.recipe.steps) == (1, 1, 1)


def test_the_command_prints_the_smallest_part_and_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = (next(p.patch for p in PLANTED if p.name == "update before all microbatches are folded"),)
    failed = next(o for o in (run_seed(s, patches) for s in range(50)) if not o.ok)
    monkeypatch.setattr(sim, "run", lambda *_: iter([failed]))
    monkeypatch.setattr(sim, "shrink", lambda failed: shrink(failed, patches))
    result = CliRunner().invoke(app, ["simulate", "--seeds", str(failed.seed)])
    assert result.exit_code == 1
    told = result.stdout.splitlines()
    assert f"  replay it with: {failed.replay}" in told
    assert told[-1] == f"  replay that with: {shrink(failed, patches).outcome.replay}"
    assert "--only faults=none," in told[-1]


@pytest.mark.parametrize("text", ["", "faults=none", "faults=0+3,pnodes=2,orchestrators=1,steps=4,breaks=0"])
def test_a_part_is_written_as_it_is_read(text: str) -> None:
    assert str(Only.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["fault=1", "faults=", "faults=a", "pnodes=1+2", "pnodes=none", "steps=1,steps=2", "x"]
)
def test_a_part_that_is_none_is_refused_by_what_was_found(text: str) -> None:
    with pytest.raises(UsageError, match="expected NAME=NUMBER"):
        Only.parse(text)


def test_a_part_has_never_more_than_the_whole() -> None:
    whole = scenario(3)
    assert Only.parse("faults=0+99,pnodes=99,orchestrators=99,steps=99").of(whole).pnodes == whole.pnodes
    assert Only().of(whole) == whole
    assert Only.parse("steps=1,pnodes=0").of(whole).recipe.steps == 1
