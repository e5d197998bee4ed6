"""Copies of states: for the store and for another PNode, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dcnr.ids import Epoch, Incarnation, Instance, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Discard, Effect, Handle, Keep, Send, Upload
from dcnr.pnode import tasks
from dcnr.pnode.jobs import Ids, Job, State
from dcnr.pnode.snapshots import Snapshots
from dcnr.protocol import messages as m
from dcnr.session.recipe import Recipe

SESSION, OWNER = SessionId("s" * 32), PeerId("o" * 32)
A, B, FIXED = VNodeId("a"), VNodeId("b"), VNodeId("fixed")
GUARD = m.Neighbour(peer=PeerId("g" * 32), incarnation=Incarnation(boot=1, nonce="g"), addresses=("guard:1",))
E = TypeVar("E", bound=Effect)


def name(vnode: VNodeId, step: int) -> Sha256:
    """What the state of ``vnode`` after ``step`` is called."""
    return Sha256(f"{vnode}@{step}")


class Bench:
    """A host of two VNodes that train and one that never changes. Jobs run when the test says so."""

    def __init__(self, base_step: int = 0, *, fixed: bool = True) -> None:
        self.session, self.instance, self.owner = SESSION, Instance(2), OWNER
        self.recipe = Recipe(steps=100, batch_size=1, microbatches=1, checkpoint_every=2)
        self.ids = Ids()
        self.out: list[Effect] = []
        self.states = {
            v: State(ref=m.StateRef(vnode=v, sha256=Sha256(""), size_bytes=0, token=""), updates=v != FIXED,
                     version=base_step, handle=Handle(number))
            for number, v in enumerate((A, B, FIXED) if fixed else (A, B), start=1)
        }  # fmt: skip
        self.jobs: list[Job] = []
        self.reports: list[m.Message] = []
        self.released = 0
        self._handles = 100
        self.copies: dict[Handle, tuple[VNodeId, int]] = {}
        self.snapshots = Snapshots(self, base_step, [name(v, base_step) for v in self.states])

    # --- Hosting --------------------------------------------------------------------------------------------

    def queue(self, job: Job) -> None:
        self.jobs.append(job)

    def report(self, step: int, message: m.Message) -> None:
        self.reports.append(message)

    def handles(self, vnodes: Iterable[VNodeId]) -> tasks.States:
        return tuple((v, self.states[v].handle or Handle(0)) for v in vnodes)

    def updates_may_go_on(self) -> None:
        self.released += 1

    # --- playing --------------------------------------------------------------------------------------------

    def plan(self, step: int, *, guard: bool, token: str = "t") -> str:
        return self.snapshots.plan(
            m.SnapshotAt(session=SESSION, epoch=Epoch(1), step=step, token=token, guard=(GUARD,) if guard else ())
        )

    def update(self, step: int, *vnodes: VNodeId) -> None:
        for v in vnodes:
            assert not self.snapshots.hold_back([v])
            self.states[v].version = step
        self.snapshots.updated(step, list(vnodes))

    def copy(self) -> None:
        """The worker makes the oldest copy: of the states as they are now."""
        job = self.jobs.pop(0)
        task = job.build()
        assert isinstance(task, tasks.Snapshot)
        copies = []
        for vnode, _ in task.states:
            self._handles += 1
            version = self.states[vnode].version if self.states[vnode].updates else 0
            self.copies[Handle(self._handles)] = vnode, version
            copies.append((vnode, Handle(self._handles)))
        job.done(tasks.SnapshotDone(copies=tuple(copies)))

    def take(self, kind: type[E]) -> list[E]:
        found = [effect for effect in self.out if isinstance(effect, kind)]
        self.out = [effect for effect in self.out if not isinstance(effect, kind)]
        return found

    def keep(self, effect: Keep) -> None:
        self.snapshots.kept(effect.id, name(*self.copies[effect.handle]), 5)

    def write(self) -> list[Upload]:
        """Everything that is to be copied is copied and written; what goes up then."""
        while self.jobs:
            self.copy()
            for effect in self.take(Keep):
                self.keep(effect)
        return self.take(Upload)

    def stored(self) -> list[m.Stored]:
        return [e.message for e in self.take(Send) if isinstance(e.message, m.Stored)]

    def discarded(self) -> set[Sha256]:
        """What the newest ``Discard`` leaves."""
        return set(self.take(Discard)[-1].keep)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- two plans ----------------------------------------------------------------------------------------------


def test_what_a_placement_before_kept_of_the_base_stays_until_something_newer_is_whole() -> None:
    """After a move others read their states here, and whatever is given up meanwhile must not take them away."""
    before, after = Bench(), Bench(5)
    before.snapshots._kept[5] = {Sha256("of another host now")}
    after.snapshots.inherit(before.snapshots)
    after.plan(7, guard=True)
    after.snapshots.abandoned(7)
    (discard,) = after.take(Discard)
    assert set(discard.keep) == {Sha256("of another host now"), name(A, 5), name(B, 5), name(FIXED, 5)}
    after.snapshots.marked(8)
    (discard,) = after.take(Discard)
    assert Sha256("of another host now") in discard.keep, "the newest commit, or base, is kept"
    after.snapshots.committed(9)
    (discard,) = after.take(Discard)
    assert Sha256("of another host now") not in discard.keep


def test_one_for_the_store_and_one_for_another_pnode_at_once(bench: Bench) -> None:
    assert bench.plan(2, guard=False, token="store") == ""
    assert bench.plan(1, guard=True, token="guard") == ""
    assert "not stored yet" in bench.plan(3, guard=True)
    assert "not stored yet" in bench.plan(4, guard=False)
    bench.update(1, A, B)
    first = bench.write()
    bench.update(2, A, B)
    second = bench.write()
    to_guard = [u for u in (*first, *second) if u.address]
    to_store = [u for u in (*first, *second) if not u.address]
    assert {(u.sha256, u.peer, u.address, u.token) for u in to_guard} == {
        (name(v, 1), GUARD.peer, "guard:1", "guard") for v in (A, B)
    }
    assert {(u.sha256, u.peer, u.token) for u in to_store} == {
        *((name(v, 2), OWNER, "store") for v in (A, B)),
        (name(FIXED, 0), OWNER, "store"),  # What never changes is in the store, and no other PNode keeps it.
    }
    for upload in (*to_guard, *to_store):
        bench.snapshots.uploaded(upload.id)
    assert {(x.vnode, x.step, x.sha256) for x in bench.stored()} == {
        (A, 1, name(A, 1)), (B, 1, name(B, 1)), (A, 2, name(A, 2)), (B, 2, name(B, 2)), (FIXED, 2, name(FIXED, 0))
    }  # fmt: skip


def test_a_request_that_is_repeated_changes_nothing(bench: Bench) -> None:
    assert bench.plan(1, guard=True) == bench.plan(1, guard=True) == ""
    bench.update(1, A, B)
    for upload in bench.write():
        bench.snapshots.uploaded(upload.id)
    assert len(bench.stored()) == 2
    assert bench.plan(1, guard=True) == ""
    assert bench.jobs == []
    bench.snapshots.repeat_stored()
    assert len(bench.stored()) == 2


def test_a_step_that_is_computed_already_is_refused(bench: Bench) -> None:
    bench.update(1, A)
    assert "already at version 1" in bench.plan(1, guard=True)


def test_a_host_of_nothing_that_changes_has_nothing_to_keep_for_a_mark() -> None:
    bench = Bench()
    del bench.states[A], bench.states[B]
    assert bench.plan(1, guard=True) == ""
    assert bench.jobs == []
    assert bench.plan(2, guard=True) == ""  # It has not planned the first one.


# --- one copy in memory -------------------------------------------------------------------------------------


def two_at_once() -> tuple[Bench, list[Keep]]:
    """Step 1's copies are being written when step 2's states are there."""
    bench = Bench(fixed=False)
    bench.plan(1, guard=True)
    bench.plan(2, guard=False)
    bench.update(1, A, B)
    bench.copy()
    writing = bench.take(Keep)
    bench.update(2, A, B)
    return bench, writing


def test_a_copy_waits_for_an_older_one_and_the_update_waits_with_it() -> None:
    bench, writing = two_at_once()
    assert bench.jobs == []
    assert bench.snapshots.hold_back([A])
    assert bench.snapshots.hold_back([B, A])
    bench.keep(writing[0])
    assert bench.jobs == []
    released = bench.released
    bench.keep(writing[1])
    assert bench.released == released + 1
    assert not bench.snapshots.hold_back([A, B])
    assert {u.sha256 for u in bench.write()} >= {name(A, 2), name(B, 2)}


def test_a_write_that_fails_lets_the_waiting_copy_go_on() -> None:
    bench, writing = two_at_once()
    bench.snapshots.transfer_failed(writing[0].id, "no space left on device")
    (failed,) = bench.reports
    assert isinstance(failed, m.SnapshotFailed)
    assert (failed.step, failed.reason) == (1, "a: no space left on device")
    bench.keep(writing[1])
    assert not bench.snapshots.hold_back([A, B])
    assert {u.sha256 for u in bench.write()} == {name(A, 2), name(B, 2)}


@pytest.mark.parametrize("how", ["abandoned", "committed"])
def test_a_copy_that_is_wanted_no_more_holds_nothing_up(how: str) -> None:
    bench, writing = two_at_once()
    released = bench.released
    if how == "abandoned":
        bench.snapshots.abandoned(2)
    else:
        bench.snapshots.committed(2)
    assert bench.released > released
    assert not bench.snapshots.hold_back([A, B])
    for effect in writing:
        bench.keep(effect)
    assert bench.jobs == []


def test_what_does_not_wait_is_not_held_back() -> None:
    bench = Bench(fixed=False)
    bench.plan(1, guard=True)
    bench.plan(2, guard=False)
    bench.update(1, A)
    bench.copy()
    bench.update(1, B)
    bench.update(2, A)
    assert bench.snapshots.hold_back([A])
    assert not bench.snapshots.hold_back([B])


# --- what stays in the home ---------------------------------------------------------------------------------


def keep_all(bench: Bench, step: int, *, guard: bool) -> None:
    assert bench.plan(step, guard=guard) == ""
    bench.update(step, *(v for v, s in bench.states.items() if s.updates))
    for upload in bench.write():
        bench.snapshots.uploaded(upload.id)
    bench.stored()


def of(step: int, *vnodes: VNodeId) -> set[Sha256]:
    return {name(v, step) for v in vnodes or (A, B)}


def test_commits_and_marks_discard_what_is_older_than_both() -> None:
    bench = Bench(fixed=False)
    keep_all(bench, 1, guard=True)
    bench.snapshots.marked(1)
    assert bench.discarded() == of(0) | of(1)  # What the placement began with, and the newest mark.
    keep_all(bench, 2, guard=False)
    bench.snapshots.committed(2)
    assert bench.discarded() == of(2)
    keep_all(bench, 3, guard=True)
    bench.snapshots.marked(3)
    assert bench.discarded() == of(2) | of(3)
    keep_all(bench, 5, guard=True)
    bench.snapshots.marked(5)
    assert bench.discarded() == of(2) | of(5)
    keep_all(bench, 6, guard=False)
    bench.snapshots.committed(6)
    assert bench.discarded() == of(6)


def test_what_is_under_way_is_not_discarded() -> None:
    bench = Bench(fixed=False)
    bench.plan(1, guard=False)
    bench.update(1, A, B)
    uploads = bench.write()  # The store takes its time.
    keep_all(bench, 2, guard=True)
    bench.snapshots.marked(2)
    assert bench.discarded() == of(0) | of(1) | of(2)
    for upload in uploads:
        bench.snapshots.uploaded(upload.id)
    assert len(bench.stored()) == 2
    bench.snapshots.committed(1)
    assert bench.discarded() == of(1) | of(2)


def test_nothing_is_discarded_while_something_is_written() -> None:
    """It has no name yet that could be left out."""
    bench, writing = two_at_once()
    bench.snapshots.marked(1)
    assert not bench.take(Discard)
    for effect in writing:
        bench.keep(effect)
    bench.write()
    bench.snapshots.committed(2)
    assert bench.discarded() == of(2)


def test_what_was_abandoned_goes_with_the_next_discard() -> None:
    bench = Bench(fixed=False)
    keep_all(bench, 1, guard=True)
    bench.snapshots.abandoned(1)
    assert not bench.snapshots.stored
    keep_all(bench, 2, guard=True)
    bench.snapshots.marked(2)
    assert bench.discarded() == of(0) | of(2)


# --- a new owner --------------------------------------------------------------------------------------------


def test_a_new_owner_is_told_of_the_store_alone() -> None:
    bench = Bench(fixed=False)
    bench.plan(1, guard=True)
    bench.plan(2, guard=False, token="old")
    bench.update(1, A, B)
    lost = bench.write()
    bench.update(2, A, B)
    going_up = bench.write()
    bench.snapshots.adopted()
    assert bench.snapshots.newest_step() == 2
    for upload in (*lost, *going_up):
        assert not bench.snapshots.owns(upload.id)
    assert bench.plan(2, guard=False, token="new") == ""
    again = bench.take(Upload)
    assert {(u.sha256, u.token, u.address) for u in again} == {(name(A, 2), "new", ""), (name(B, 2), "new", "")}
    assert bench.plan(3, guard=True) == ""  # Marks begin anew.


def test_an_update_that_waited_for_a_marks_copy_goes_on_under_a_new_owner() -> None:
    bench = Bench(fixed=False)
    bench.plan(1, guard=False)
    bench.plan(2, guard=True)
    bench.update(1, A, B)
    bench.copy()
    bench.update(2, A, B)
    assert bench.snapshots.hold_back([A])
    released = bench.released
    bench.snapshots.adopted()
    assert not bench.snapshots.hold_back([A])
    assert bench.released > released
    assert bench.snapshots.newest_step() == 1


# --- any order ----------------------------------------------------------------------------------------------


class Play(RuleBasedStateMachine):
    """Requests, updates, copies, writes, transfers and the owner's words in any order that a host can see."""

    @initialize()
    def begin(self) -> None:
        self.bench = Bench(fixed=False)
        self.writing: list[Keep] = []
        self.uploads: list[Upload] = []
        self.newest = 0

    def _look(self) -> None:
        self.writing += self.bench.take(Keep)
        self.uploads += self.bench.take(Upload)

    @rule(guard=st.booleans(), ahead=st.integers(1, 2))
    def asked(self, guard: bool, ahead: int) -> None:
        step = max(s.version for s in self.bench.states.values()) + ahead
        self.bench.plan(step, guard=guard)

    @rule(vnode=st.sampled_from([A, B]))
    def update(self, vnode: VNodeId) -> None:
        version = self.bench.states[vnode].version
        other = min(s.version for s in self.bench.states.values())
        pending = any(vnode in (v for v, _ in job.build().states) for job in self.bench.jobs)  # type: ignore[union-attr]
        # The worker makes copies before later updates; and no VNode is two steps ahead of another.
        if not pending and version <= other and not self.bench.snapshots.hold_back([vnode]):
            self.bench.update(version + 1, vnode)

    @precondition(lambda self: self.bench.jobs)
    @rule()
    def copied(self) -> None:
        self.bench.copy()
        self._look()
        for effect in self.writing:
            vnode, version = self.bench.copies[effect.handle]
            assert version <= self.bench.states[vnode].version

    @precondition(lambda self: self.writing)
    @rule(fails=st.booleans(), data=st.data())
    def written(self, fails: bool, data: st.DataObject) -> None:
        effect = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if fails:
            self.bench.snapshots.transfer_failed(effect.id, "no space left on device")
        else:
            self.bench.keep(effect)
        self._look()

    @precondition(lambda self: self.uploads)
    @rule(fails=st.booleans(), data=st.data())
    def sent(self, fails: bool, data: st.DataObject) -> None:
        upload = self.uploads.pop(data.draw(st.integers(0, len(self.uploads) - 1)))
        if not self.bench.snapshots.owns(upload.id):
            return
        if fails:
            self.bench.snapshots.transfer_failed(upload.id, "it went away")
        else:
            self.bench.snapshots.uploaded(upload.id)
            for stored in self.bench.stored():
                assert stored.sha256 == name(stored.vnode, stored.step), "a state of another step"

    @precondition(lambda self: any(len(found) == 2 for found in self.bench.snapshots.stored.values()))
    @rule(committed=st.booleans())
    def answered(self, committed: bool) -> None:
        snapshots = self.bench.snapshots
        step = next(s for s, found in snapshots.stored.items() if len(found) == 2)
        names = {x.sha256 for x in snapshots.stored[step].values()}
        (snapshots.committed if committed else snapshots.marked)(step)
        self.newest = max(self.newest, step)
        for effect in self.bench.take(Discard):
            assert step < self.newest or names <= set(effect.keep)

    @rule()
    def adopted(self) -> None:
        self.bench.snapshots.adopted()

    @rule(data=st.data())
    def abandoned(self, data: st.DataObject) -> None:
        steps = sorted(self.bench.snapshots._plans)
        if steps:
            self.bench.snapshots.abandoned(data.draw(st.sampled_from(steps)))

    @invariant()
    def one_step_is_copied_at_a_time(self) -> None:
        if hasattr(self, "bench"):
            steps = {job.step for job in self.bench.jobs} | {self.bench.copies[e.handle][1] for e in self.writing}
            assert len(steps) <= 1

    def teardown(self) -> None:
        """Whatever happened: once all is written, nothing waits."""
        if not hasattr(self, "bench"):
            return
        while self.bench.jobs or self.writing:
            while self.bench.jobs:
                self.bench.copy()
                self._look()
            while self.writing:
                self.bench.keep(self.writing.pop())
        assert not self.bench.snapshots.hold_back([A, B])


Play.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPlay = Play.TestCase
