"""The machines survive their seeds, and a seed is a whole determined world."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dcnr.sim import run, run_seed
from dcnr.sim.faults import scenario

TWICE, CHUNK = 200, 50
SEEDS = int(os.environ.get("SIM_SEEDS", "500"))
"""The whole run before a change lands takes 2,000 (.ci/run)."""

# One line per seed: its number, whether every invariant held, the digest of its whole trace.
RUN_CHUNK = """
import sys
from dcnr.sim import run
for o in run(range(int(sys.argv[1]), int(sys.argv[2]))):
    print(o.seed, o.trace_digest, "ok" if o.ok else f"{o.violation} replay: {o.replay}")
"""


@pytest.mark.parametrize("first", range(0, TWICE, CHUNK))
@pytest.mark.timeout(300)
def test_every_invariant_holds_under_two_hash_seeds(first: int) -> None:
    """Sets of strings iterate in another order under another hash seed: nothing may follow from it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_CHUNK, str(first), str(first + CHUNK)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs[0]) == CHUNK
    assert [line for line in outputs[0] if not line.endswith(" ok")] == []
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("first", range(TWICE, SEEDS, CHUNK))
@pytest.mark.timeout(300)
def test_every_invariant_holds(first: int) -> None:
    assert [f"{o.violation} replay: {o.replay}" for o in run(range(first, first + CHUNK)) if not o.ok] == []


@pytest.mark.timeout(300)
def test_seeds_meet_what_they_are_for() -> None:
    """Otherwise the seeds would prove little: faults strike, sessions roll back, and still finish."""
    outcomes = list(run(range(60)))
    kinds = {kind for outcome in outcomes for kind in outcome.stats["faults"]}
    assert {"crash", "orchestrator", "pause", "break", "cut", "store", "compute", "leave", "damage"} <= kinds
    assert {"pause_orchestrator", "cut_orchestrator", "cut_store", "read_only"} <= kinds
    assert {"drain", "full"} <= kinds
    two = [outcome.stats for outcome in outcomes if outcome.stats["sessions"] == 2]
    assert len(two) > 5
    assert 0 < sum(stats["waited"] > 0 for stats in two) < len(two)  # One after the other, and both at once.
    assert sum(outcome.stats["marks"] > 0 for outcome in outcomes) > 20
    for habit in ("ghosts", "list_lags"):
        assert 12 <= sum(outcome.stats[habit] > 0 for outcome in outcomes) <= 28, habit
    assert sum(outcome.stats["acquires"] > 2 for outcome in outcomes) > 5  # Taken over, and taken over again.
    assert sum(scenario(outcome.seed).orchestrators > 1 for outcome in outcomes) > 30
    assert sum(outcome.stats["rollbacks"] for outcome in outcomes) > 20
    assert sum(outcome.stats["ended"] == "finished" for outcome in outcomes) > 40


def test_a_last_commit_that_is_damaged_when_it_is_a_base_already_is_computed_again() -> None:
    outcome = run_seed(2164)
    assert outcome.ok, outcome.violation


def test_an_evaluation_whose_first_rows_come_last_is_not_forgotten_by_its_hosts() -> None:
    outcome = run_seed(3172)
    assert outcome.ok, outcome.violation


def test_a_host_that_is_lost_before_it_hears_of_its_new_owner_has_room_for_its_session() -> None:
    outcome = run_seed(458)
    assert outcome.ok, outcome.violation


def test_a_suspend_while_a_mark_of_the_next_step_is_asked_for_keeps_the_step_after() -> None:
    outcome = run_seed(19)
    assert outcome.ok, outcome.violation


def test_a_network_that_no_list_shows_yet_is_found_by_its_name() -> None:
    outcome = run_seed(687)
    assert outcome.ok, outcome.violation


def test_a_commit_of_many_states_is_read_back_from_a_store_that_drops_every_fifth_call() -> None:
    outcome = run_seed(1357)
    assert outcome.ok, outcome.violation


def test_an_evaluation_whose_reports_a_broken_link_lost_hears_all_of_them_again() -> None:
    outcome = run_seed(1681)
    assert outcome.ok, outcome.violation


def test_hosts_keep_what_is_open_of_a_step_that_is_done_where_nothing_waits_for_a_segment() -> None:
    outcome = run_seed(3795)
    assert outcome.ok, outcome.violation


def test_an_owner_that_was_cut_off_and_succeeded_withdraws_nothing() -> None:
    outcome = run_seed(3797)
    assert outcome.ok, outcome.violation


def test_a_host_that_loads_only_after_its_owner_was_succeeded_reads_by_the_new_ones_leave() -> None:
    outcome = run_seed(3870)
    assert outcome.ok, outcome.violation


def test_a_move_whose_mark_a_commit_overtakes_goes_back_to_neither() -> None:
    outcome = run_seed(3434)
    assert outcome.ok, outcome.violation


@pytest.mark.parametrize("seed", [3910, 4425, 5583])
def test_who_steps_down_does_not_take_over_what_it_is_about_to_forget(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.ok, outcome.violation


@pytest.mark.parametrize("seed", [4835, 5088])
def test_a_loss_while_a_resume_is_written_places_once(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.ok, outcome.violation


def test_a_damaged_commit_is_not_replaced_by_a_mark_that_hosts_have_deleted() -> None:
    outcome = run_seed(3787)
    assert outcome.ok, outcome.violation


@pytest.mark.parametrize("seed", [2944, 3793])
def test_a_takeover_right_after_a_move_leaves_hosts_what_others_have_yet_to_load(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.ok, outcome.violation


def test_a_session_that_waits_goes_on_when_one_that_was_taken_over_beside_it_has_ended() -> None:
    outcome = run_seed(2394)
    assert outcome.ok, outcome.violation


def test_a_log_that_two_read_at_once_is_added_up_once() -> None:
    outcome = run_seed(5702)
    assert outcome.ok, outcome.violation


def test_a_seed_is_one_trace() -> None:
    first, second = (run_seed(3, trace=True) for _ in range(2))
    assert first.trace == second.trace
    assert first.trace_digest == second.trace_digest
    assert run_seed(4, trace=True).trace_digest != first.trace_digest
