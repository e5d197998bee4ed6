"""Where hosts stand together, as a new owner hears it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnr.ids import Epoch, Instance, PeerId, SessionId, VNodeId
from dcnr.machine import Instant
from dcnr.network.analysis import analyse
from dcnr.network.templates import mlp
from dcnr.orchestrator.adoption import Adoption, Standing, standing, untouched
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol import messages as m
from dcnr.session.recipe import Recipe

NETWORK = analyse(mlp(4, [4], 4).definition())
A, B = PeerId("a"), PeerId("b")
STEPS, MICROBATCHES, INSTANCE = 9, 2, Instance(2)
PLACEMENT = {v: (A if v in ("linear_0", "relu_0") else B) for v in NETWORK.vnodes}
STATEFUL = frozenset({A, B})


def machine() -> StepMachine:
    recipe = Recipe(steps=STEPS, batch_size=2, microbatches=MICROBATCHES)
    segments = NETWORK.segments({v: str(peer) for v, peer in PLACEMENT.items()})
    return StepMachine(network=NETWORK, segments=segments, recipe=recipe, base_step=0, window=4)


def adopted(version: int, **values: Any) -> m.Adopted:
    known: dict[str, Any] = {"instance": INSTANCE, "versions": ((VNodeId("v"), version),)}
    return m.Adopted(session=SessionId("s"), epoch=Epoch(3), **known | values)


def loss(step: int, microbatch: int) -> m.Loss:
    value = float(step + microbatch)
    return m.Loss(
        session=SessionId("s"), instance=INSTANCE, vnode=VNodeId("loss"), step=step, microbatch=microbatch, loss=value
    )


def of(a: m.Adopted, b: m.Adopted, losses: range, *, committed: int = 0) -> Standing | None:
    said = [(B, loss(step, microbatch)) for step in losses for microbatch in range(MICROBATCHES)]
    adoption = Adoption(waiting=set(), until=Instant(0.0), answers={A: a, B: b}, reports=[*said])
    return standing(adoption, machine(), committed, STATEFUL)


def test_hosts_that_are_equally_far() -> None:
    a = adopted(3, kept_from=4, open_microbatches=((4, 0),), scales=((2, 0.5),))
    b = adopted(3, kept_from=2, open_microbatches=((4, 1),), scales=((2, 0.5), (3, 0.25)))
    found = of(a, b, range(1, 5))
    assert found == Standing(
        done_step=3, last_opened=(4, 1), losses={1: 3.0, 2: 5.0, 3: 7.0}, scales={2: 0.5, 3: 0.25}, snapshot_at=0
    )


def test_the_newest_commit_is_done_whatever_hosts_still_keep() -> None:
    found = of(adopted(5, kept_from=-1), adopted(5, kept_from=0), range(0), committed=5)
    assert found is not None
    assert (found.done_step, found.last_opened, found.losses) == (5, None, {})


def test_what_was_opened_of_steps_that_are_done_is_open_no_more() -> None:
    found = of(adopted(3, kept_from=4, open_microbatches=((3, 1),)), adopted(3, kept_from=4), range(1, 4))
    assert found is not None
    assert found.last_opened is None


def test_a_host_that_is_behind_what_another_has_forgotten_means_to_go_back() -> None:
    assert of(adopted(3, kept_from=4), adopted(2, kept_from=1), range(1, 5)) is None
    assert of(adopted(3, kept_from=4), adopted(3, kept_from=1), range(1, 5)) is not None


@pytest.mark.parametrize("missing", [range(2, 5), range(1, 3), range(0)])
def test_a_loss_that_nobody_says_again_means_to_go_back(missing: range) -> None:
    assert of(adopted(3, kept_from=4), adopted(3, kept_from=4), missing) is None


def test_a_snapshot_goes_on_where_all_that_hold_states_plan_the_same() -> None:
    def at(a: int, b: int) -> int:
        found = of(adopted(0, snapshot_at=a), adopted(0, snapshot_at=b), range(0))
        assert found is not None
        return found.snapshot_at

    assert at(2, 2) == 2
    assert at(2, 0) == at(2, 4) == 0


def test_a_host_without_states_has_no_say_in_a_snapshot() -> None:
    adoption = Adoption(
        waiting=set(), until=Instant(0.0), answers={A: adopted(0, snapshot_at=2), B: adopted(0, versions=())}
    )
    found = standing(adoption, machine(), 0, frozenset({A}))
    assert found is not None
    assert found.snapshot_at == 2


@given(
    committed=st.integers(0, 4),
    far=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    kept=st.tuples(st.integers(-2, 7), st.integers(-2, 7)),
    unsaid=st.sets(st.tuples(st.integers(1, STEPS), st.integers(0, MICROBATCHES - 1)), max_size=3),
    repeated=st.booleans(),
)
def test_whatever_is_told_of_a_step_is_complete(
    committed: int, far: tuple[int, int], kept: tuple[int, int], unsaid: set[tuple[int, int]], repeated: bool
) -> None:
    """Either the session goes back, or every step up to ``done_step`` has its loss and was updated everywhere."""
    answers = {peer: adopted(version, kept_from=first) for peer, version, first in zip((A, B), far, kept, strict=True)}
    said = {(step, microbatch) for step in range(1, STEPS) for microbatch in range(MICROBATCHES)} - unsaid
    reports: list[tuple[PeerId, m.Message]] = [(B, loss(*key)) for key in sorted(said) * (1 + repeated)]
    found = standing(
        Adoption(waiting=set(), until=Instant(0.0), answers=answers, reports=reports), machine(), committed, STATEFUL
    )
    done = max(committed, *(first - 1 for first in kept))
    needed = {(step, microbatch) for step in range(committed + 1, done + 1) for microbatch in range(MICROBATCHES)}
    if found is None:
        assert min(far) < done or not needed <= said
    else:
        assert min(far) >= found.done_step == done
        assert found.losses == {step: 2.0 * step + 1 for step in range(committed + 1, done + 1)}


def taken_over(a: m.Adopted, b: m.Adopted, *said: tuple[PeerId, m.Message]) -> Adoption:
    return Adoption(waiting=set(), until=Instant(0.0), answers={A: a, B: b}, reports=[*said])


LATE = adopted(0, instance=Instance(0), versions=())


def test_a_placement_that_none_has_begun_may_still_be_told_to_the_others() -> None:
    fresh = adopted(4)
    assert untouched(taken_over(fresh, LATE), INSTANCE, 4)
    assert untouched(taken_over(LATE, LATE), INSTANCE, 4)
    assert untouched(taken_over(fresh, adopted(9, instance=Instance(1))), INSTANCE, 4)


@pytest.mark.parametrize(
    "begun", [adopted(4, open_microbatches=((5, 0),)), adopted(5), adopted(3), adopted(4, snapshot_at=5)]
)
def test_a_placement_that_one_has_begun_may_not(begun: m.Adopted) -> None:
    assert not untouched(taken_over(begun, LATE), INSTANCE, 4)


def test_whoever_has_failed_at_a_placement_has_begun_it_though_others_let_it_go_since() -> None:
    failed = m.TaskFailed(
        session=SessionId("s"),
        instance=INSTANCE,
        vnode=VNodeId("a"),
        step=0,
        microbatch=0,
        cause="compute",
        reason="no memory",
    )
    assert not untouched(taken_over(adopted(4), LATE, (A, failed)), INSTANCE, 4)
