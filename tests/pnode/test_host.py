"""A PNode's promises: the fence before the answer, what frames deserve, what fits, what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import DatasetId, Epoch, Incarnation, Instance, SessionId, Sha256, VNodeId
from dcnr.machine import (
    Compute,
    Computed,
    ComputeFailed,
    Discard,
    Emit,
    Exit,
    Fetch,
    Fetched,
    Handle,
    Keep,
    Kept,
    Persist,
    Persisted,
    PersistFailed,
    Release,
    Upload,
    Uploaded,
)
from dcnr.pnode import tasks
from dcnr.protocol import messages as m
from dcnr.protocol.messages import Direction, FrameStatus
from tests.pnode.lab import EDGE, ME, NETWORK, OTHER, SESSION, Lab, tickets


@pytest.fixture
def lab() -> Lab:
    made = Lab()
    made.link()
    return made


# --- the fence ----------------------------------------------------------------------------------------------


def test_the_fence_is_written_before_the_ticket_is_accepted(lab: Lab) -> None:
    lab.hear(tickets(epoch=3, instance=5))
    (persist,) = lab.take(Persist)
    assert list(json.loads(persist.data)[SESSION]) == [3, "o" * 32, 5]
    assert not lab.said(m.TicketAnswer)
    assert lab.receive(lab.frame(instance=5)).status is FrameStatus.NO_TICKET
    lab.do(Persisted(key=persist.key))
    (answer,) = lab.said(m.TicketAnswer)
    assert (answer.accepted, answer.epoch, answer.instance) == (True, 3, 5)
    assert lab.receive(lab.frame(instance=5)).status is FrameStatus.ACCEPTED


def test_a_fence_that_cannot_be_written_refuses_the_ticket(lab: Lab) -> None:
    lab.hear(tickets())
    (persist,) = lab.take(Persist)
    lab.do(PersistFailed(key=persist.key, reason="disk full"))
    (answer,) = lab.said(m.TicketAnswer)
    assert not answer.accepted
    assert answer.reason == "the fence could not be written: disk full"
    (told,) = (emit for emit in lab.take(Emit) if emit.kind == "fence_not_written")
    assert told.data["reason"] == "disk full", "its owner is who can make room"
    assert lab.receive(lab.frame()).status is FrameStatus.NO_TICKET


def test_an_older_epoch_is_told_so_also_after_a_restart() -> None:
    lab = Lab(fence=json.dumps({SESSION: [7, "another", 9]}).encode())
    lab.link()
    lab.hear(tickets(epoch=3, instance=5))
    (stale,) = lab.said(m.StaleEpoch)
    assert (stale.current, stale.owner) == (7, "another")
    assert not lab.take(Persist)
    lab.open(epoch=6, instance=8)
    assert len(lab.said(m.StaleEpoch)) == 1
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(6), before=Instance(100)))
    assert len(lab.said(m.StaleEpoch)) == 1
    assert not lab.said(m.Withdrawn)


def test_a_command_of_another_epoch_than_the_tickets_is_not_obeyed(lab: Lab) -> None:
    lab.accept(tickets(epoch=3, instance=5))
    lab.open(epoch=4, instance=5)
    assert [a.accepted for a in lab.said(m.TaskAnswer)] == [False]
    lab.open(epoch=3, instance=5)
    assert [a.accepted for a in lab.said(m.TaskAnswer)] == [True]


def test_a_repeated_ticket_is_answered_again_and_changes_nothing(lab: Lab) -> None:
    lab.accept()
    lab.hear(tickets())
    assert not lab.take(Persist)
    assert [a.accepted for a in lab.said(m.TicketAnswer)] == [True]


def test_an_older_instance_is_refused_and_a_newer_one_replaces(lab: Lab) -> None:
    lab.accept(tickets(instance=5))
    lab.hear(tickets(instance=4))
    (answer,) = lab.said(m.TicketAnswer)
    assert (answer.accepted, answer.reason) == (False, "instance 5 is current here")
    lab.accept(tickets(instance=6))
    assert lab.receive(lab.frame(instance=5)).status is FrameStatus.STALE


# --- frames -------------------------------------------------------------------------------------------------


def test_a_frame_without_a_ticket_is_sent_again_later(lab: Lab) -> None:
    assert lab.receive(lab.frame()).status is FrameStatus.NO_TICKET
    lab.accept()
    assert lab.receive(lab.frame(instance=3)).status is FrameStatus.NO_TICKET
    assert lab.receive(lab.frame()).status is FrameStatus.ACCEPTED


def test_a_frame_of_an_older_instance_or_for_another_start_is_stale(lab: Lab) -> None:
    lab.accept(tickets(instance=5))
    assert lab.receive(lab.frame(instance=4)).status is FrameStatus.STALE
    assert lab.receive(lab.frame(instance=5, source_instance=Instance(4))).status is FrameStatus.STALE
    other = Incarnation(boot=9, nonce="x")
    assert lab.receive(lab.frame(instance=5, target_incarnation=other)).status is FrameStatus.STALE


def test_what_the_fence_remembers_makes_a_frame_stale_after_the_withdrawal(lab: Lab) -> None:
    lab.accept(tickets(instance=5))
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(6)))
    assert len(lab.said(m.Withdrawn)) == 1
    assert lab.receive(lab.frame(instance=4)).status is FrameStatus.STALE


def test_the_same_frame_twice_is_a_duplicate_and_its_bytes_are_given_back(lab: Lab) -> None:
    lab.accept()
    assert lab.receive(lab.frame()).status is FrameStatus.ACCEPTED
    lab.take(Release)
    again = lab.frame()
    lab.hear(again, OTHER)
    (ack,) = lab.said(m.FrameAck, OTHER)
    assert ack.status is FrameStatus.DUPLICATE
    assert [r.handles for r in lab.take(Release)] == [(again.tensor.handle,)]
    assert not lab.said(m.TaskFailed)


@pytest.mark.parametrize(
    ("rows", "dtype", "found"),
    [(3, "float32", "found float32 [3, 4]"), (2, "float64", "found float64 [2, 4]")],
)
def test_a_wrong_shape_or_dtype_is_refused_and_named(lab: Lab, rows: int, dtype: str, found: str) -> None:
    lab.accept()
    ack = lab.receive(lab.frame(tensor=lab.tensor(rows, dtype)))
    assert ack.status is FrameStatus.REFUSED
    assert ack.reason == f"edge {EDGE} (relu_0 to output): {found}, expected float32 [2, 4]"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"edge": 0}, "edge 0 does not end here"),
        ({"edge": 99}, "edge 99 does not end here"),
        ({"direction": Direction.BACKWARD}, f"edge {EDGE} does not end here"),
        ({"step": 4}, "no microbatch 0 of step 4 in this session"),
        ({"microbatch": 1}, "no microbatch 1 of step 1 in this session"),
    ],
)
def test_a_frame_that_cannot_be_meant_is_refused(lab: Lab, changes: dict[str, Any], reason: str) -> None:
    lab.accept()
    ack = lab.receive(lab.frame(**changes))
    assert (ack.status, ack.reason) == (FrameStatus.REFUSED, reason)


def test_more_microbatches_than_the_window_are_refused(lab: Lab) -> None:
    lab.accept(tickets(window=2))
    assert [lab.receive(lab.frame(step)).status for step in (1, 2)] == [FrameStatus.ACCEPTED] * 2
    assert lab.receive(lab.frame(3)).status is FrameStatus.REFUSED


def test_other_bytes_under_the_same_name_are_a_divergence_that_names_edge_and_sender(lab: Lab) -> None:
    lab.accept()
    lab.receive(lab.frame())
    ack = lab.receive(lab.frame(tensor=lab.tensor(digest="other")))
    assert ack.status is FrameStatus.DUPLICATE
    (failed,) = lab.said(m.TaskFailed)
    assert (failed.cause, failed.vnode) == ("divergence", "relu_0")
    assert failed.reason == f"{OTHER} sent other bytes for edge {EDGE} (relu_0 to output) than came before"


@pytest.mark.parametrize(("known", "told"), [(VNodeId("loss"), "loss"), (None, "output")])
def test_a_failed_task_names_the_vnode_that_failed_if_it_is_known(lab: Lab, known: VNodeId | None, told: str) -> None:
    """Else the first of its segment."""
    lab.accept()
    lab.open()
    lab.receive(lab.frame())
    while not lab.said(m.Loss):
        for fetch in lab.take(Fetch):
            lab.do(Fetched(id=fetch.id, tensors=(lab.tensor(digest=None),)))
        (compute,) = lab.take(Compute)
        if isinstance(compute.what, tasks.Forward):
            assert compute.what.segment.vnodes == ("output", "loss")
            lab.do(ComputeFailed(task=compute.task, reason="out of range", vnode=known))
            break
        lab.do(Computed(task=compute.task, result=tasks.Loaded(state=lab.handle())))
    (failed,) = lab.said(m.TaskFailed)
    assert (failed.cause, failed.vnode, failed.reason) == ("compute", told, "out of range")


def test_a_frame_is_said_again_on_every_link_until_it_is_answered(lab: Lab) -> None:
    lab.accept()
    lab.link(OTHER)
    lab.open()
    lab.receive(lab.frame())
    lab.work()
    (gradient,) = lab.said(m.TensorFrame, OTHER)
    assert gradient.direction is Direction.BACKWARD
    lab.link(OTHER)
    assert lab.said(m.TensorFrame, OTHER) == [gradient]
    lab.hear(
        m.FrameAck(
            session=SESSION, edge=EDGE, direction=Direction.BACKWARD, step=1, microbatch=0,
            source_instance=Instance(2), target_instance=Instance(2), status=FrameStatus.ACCEPTED,
        ),
        OTHER,
    )  # fmt: skip
    lab.link(OTHER)
    assert not lab.said(m.TensorFrame, OTHER)
    assert (gradient.tensor.handle,) in [r.handles for r in lab.take(Release)]


# --- serving ------------------------------------------------------------------------------------------------


def serving_tickets() -> m.Tickets:
    made = tickets(epoch=0, instance=0, window=9)
    return replace(made, serving=True, trained=SESSION, session=SessionId("serve-1"), time_to_live_s=120.0)


def serving_frame(lab: Lab, step: int) -> m.TensorFrame:
    return lab.frame(step, instance=0, session=SessionId("serve-1"))


def test_a_serving_instance_that_frames_reach_lives_and_an_idle_one_ends(lab: Lab) -> None:
    lab.accept(serving_tickets())
    for step in range(1, 5):
        lab.wait(100.0)
        assert lab.receive(serving_frame(lab, step)).status is FrameStatus.ACCEPTED
        lab.work()
    lab.wait(121.0)
    assert lab.receive(serving_frame(lab, 5)).status is FrameStatus.NO_TICKET


def test_a_serving_neighbour_that_has_dropped_its_ticket_is_told_to_the_owner_once() -> None:
    lab = Lab()
    lab.link()
    lab.link(OTHER)
    placement = tuple(m.Location(vnode=v, peer=ME if v in ("linear_0", "relu_0") else OTHER) for v in NETWORK.vnodes)
    states = tuple(m.StateRef(vnode=v, sha256=Sha256(""), size_bytes=0, token="") for v in ("linear_0", "output"))  # type: ignore[arg-type]
    lab.accept(replace(serving_tickets(), placement=placement, states=states))
    column = NETWORK.definition.inputs[0].column
    rows = m.RowsRef(dataset=DatasetId("d"), split="validation", context=0, rows=(0, 1), columns=(column,), token="")
    lab.hear(
        m.OpenMicrobatch(
            session=SessionId("serve-1"), epoch=Epoch(0), instance=Instance(0), step=1, microbatch=0, rows=(rows,),
            valid_targets=(),
        )
    )  # fmt: skip
    lab.work()
    (frame,) = lab.said(m.TensorFrame, OTHER)
    lab.take(Release)
    lab.hear(
        m.FrameAck(
            session=frame.session, edge=frame.edge, direction=frame.direction, step=1, microbatch=0,
            source_instance=Instance(0), target_instance=Instance(0), status=FrameStatus.NO_TICKET,
        ),
        OTHER,
    )  # fmt: skip
    (failed,) = lab.said(m.TaskFailed)
    assert (failed.cause, failed.vnode) == ("ticket", "relu_0")
    assert [r.handles for r in lab.take(Release)] == [(frame.tensor.handle,)]
    lab.wait(5.0)
    assert not lab.said(m.TensorFrame, OTHER)


# --- memory -------------------------------------------------------------------------------------------------


def test_a_ticket_that_does_not_fit_is_refused_with_the_missing_bytes() -> None:
    roomy = Lab()
    roomy.link()
    roomy.accept()
    needed = (1 << 30) - heartbeat(roomy).memory_free_bytes
    assert needed > 0
    lab = Lab(memory_bytes=needed - 1)
    lab.link()
    lab.hear(tickets())
    (answer,) = lab.said(m.TicketAnswer)
    assert (answer.accepted, answer.missing_bytes) == (False, 1)
    assert answer.reason == f"needs {needed} bytes, {needed - 1} are free"
    assert not lab.take(Persist)
    exact = Lab(memory_bytes=needed)
    exact.link()
    exact.accept()
    assert heartbeat(exact).memory_free_bytes == 0


def heartbeat(lab: Lab) -> m.Heartbeat:
    lab.said(m.Heartbeat)
    lab.wait(Limits().heartbeat_interval_s)
    return lab.said(m.Heartbeat)[-1]


def test_a_ticket_that_makes_no_sense_is_refused_with_its_reason(lab: Lab) -> None:
    good = tickets()
    values = {name: getattr(good, name) for name in good.__slots__}
    lab.hear(m.Tickets(**values | {"definition": b"{}"}))
    lab.hear(m.Tickets(**values | {"states": ()}))
    answers = lab.said(m.TicketAnswer)
    assert [a.accepted for a in answers] == [False, False]
    assert answers[1].reason == "the ticket cannot be used: the ticket names no state for output"
    assert not lab.take(Persist)


def test_a_ticket_that_replaces_another_waits_until_that_ones_task_has_returned(lab: Lab) -> None:
    lab.accept()
    lab.receive(lab.frame())
    lab.hear(tickets(instance=3))
    lab.take(Persist)
    lab.do(Persisted(key="fence.json"))
    assert not lab.said(m.TicketAnswer)
    done = lab.work()
    assert any(isinstance(task, tasks.Load) for task in done)
    assert [a.instance for a in lab.said(m.TicketAnswer)] == [3]


# --- snapshots ----------------------------------------------------------------------------------------------


def snapshot_at(lab: Lab, step: int) -> m.SnapshotAnswer:
    lab.hear(m.SnapshotAt(session=SESSION, epoch=Epoch(1), step=step, token="right"))
    (answer,) = lab.said(m.SnapshotAnswer)
    return answer


def keep(lab: Lab, sha256: str) -> Upload:
    """The home has it; now it is uploaded."""
    (kept,) = lab.take(Keep)
    lab.do(Kept(id=kept.id, sha256=Sha256(sha256), size_bytes=100))
    (upload,) = lab.take(Upload)
    return upload


def test_a_snapshot_is_copied_after_its_update_kept_uploaded_and_only_then_said(lab: Lab) -> None:
    lab.accept()
    assert snapshot_at(lab, 2).accepted
    lab.train(1)
    assert not lab.take(Keep)
    lab.train(2)
    upload = keep(lab, "2" * 64)
    assert (upload.sha256, upload.token) == ("2" * 64, "right")
    assert not lab.said(m.Stored)
    lab.do(Uploaded(id=upload.id))
    (stored,) = lab.said(m.Stored)
    assert (stored.vnode, stored.step, stored.sha256, stored.size_bytes) == ("output", 2, "2" * 64, 100)


def test_stored_is_repeated_until_the_commit_and_older_snapshots_go_then(lab: Lab) -> None:
    lab.accept()
    for step in (1, 2):
        assert snapshot_at(lab, step).accepted
        lab.train(step)
        lab.do(Uploaded(id=keep(lab, str(step) * 64).id))
        assert len(lab.said(m.Stored)) == 1
        lab.wait(Limits().stored_repeat_s + 0.1)
        assert [s.step for s in lab.said(m.Stored)] == [step]
        lab.hear(m.Committed(session=SESSION, epoch=Epoch(1), step=step, manifest=Sha256("")))
        assert [d.keep for d in lab.take(Discard)] == [(str(step) * 64,)]
        lab.wait(Limits().stored_repeat_s + 0.1)
        assert not lab.said(m.Stored)


def test_a_commit_that_is_said_again_leaves_the_snapshot_that_is_being_written(lab: Lab) -> None:
    lab.accept()
    for step in (1, 2):
        assert snapshot_at(lab, step).accepted
        lab.train(step)
        if step == 1:
            lab.do(Uploaded(id=keep(lab, "1" * 64).id))
            lab.hear(m.Committed(session=SESSION, epoch=Epoch(1), step=1, manifest=Sha256("")))
            assert len(lab.take(Discard)) == 1
    lab.hear(m.Committed(session=SESSION, epoch=Epoch(1), step=1, manifest=Sha256("")))
    assert not lab.take(Discard), "the file of step 2 has no name yet"
    lab.do(Uploaded(id=keep(lab, "2" * 64).id))
    lab.hear(m.Committed(session=SESSION, epoch=Epoch(1), step=2, manifest=Sha256("")))
    assert [d.keep for d in lab.take(Discard)] == [("2" * 64,)]


@pytest.mark.parametrize("since", ["accepted", "withdrawn", "restarted"])
def test_a_finished_session_leaves_no_snapshot(since: str) -> None:
    lab = Lab(fence=json.dumps({SESSION: [1, "o" * 32, 2]}).encode() if since == "restarted" else None)
    lab.link()
    if since != "restarted":
        lab.accept()
    if since == "withdrawn":
        lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(3)))
        assert not lab.take(Discard)
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(9), forget_snapshots=True))
    assert [(d.session, d.keep, d.guarded) for d in lab.take(Discard)] == [(SESSION, (), False), (SESSION, (), True)]
    lab.hear(m.Withdraw(session=SessionId("../x"), epoch=Epoch(1), before=Instance(9), forget_snapshots=True))
    assert not lab.take(Discard), "nothing of it was ever here"


def test_a_snapshot_of_a_step_that_is_over_is_refused(lab: Lab) -> None:
    lab.accept()
    lab.train(1)
    answer = snapshot_at(lab, 1)
    assert (answer.accepted, answer.reason) == (False, "output is already at version 1")


def test_the_last_state_stands_still_and_can_be_asked_for_again(lab: Lab) -> None:
    lab.accept(tickets(steps=1))
    lab.train(1)
    assert snapshot_at(lab, 1).accepted
    lab.work()
    assert keep(lab, "1" * 64).sha256 == "1" * 64


def test_an_abandoned_snapshot_makes_room_for_the_next(lab: Lab) -> None:
    lab.accept()
    assert snapshot_at(lab, 1).accepted
    assert snapshot_at(lab, 2).reason == "the snapshot of step 1 is not stored yet"
    lab.hear(m.Abandoned(session=SESSION, epoch=Epoch(1), step=1))
    assert snapshot_at(lab, 2).accepted


# --- order and accounts -------------------------------------------------------------------------------------


def test_a_second_step_is_not_run_forward_before_the_update_of_the_first(lab: Lab) -> None:
    lab.accept()
    lab.open(1)
    lab.open(2)
    lab.receive(lab.frame(1))
    lab.receive(lab.frame(2))
    done = lab.work()
    assert [t.step for t in done if isinstance(t, tasks.Forward)] == [1]
    lab.hear(m.StepClose(session=SESSION, epoch=Epoch(1), instance=Instance(2), step=1, grad_scale=0.25))
    done = lab.work()
    assert [type(t).__name__ for t in done][:2] == ["Update", "Forward"]
    assert next(t for t in done if isinstance(t, tasks.Update)).grad_scale == 0.25
    lab.hear(m.StepClose(session=SESSION, epoch=Epoch(1), instance=Instance(2), step=1, grad_scale=0.25))
    assert not lab.work()


def test_a_withdrawn_host_gives_back_every_handle(lab: Lab) -> None:
    lab.accept()
    lab.open()
    lab.receive(lab.frame())
    first = lab.handle()
    lab.work()
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(3)))
    returned = [handle for release in lab.take(Release) for handle in release.handles]
    assert len(returned) == len(set(returned))
    assert Handle(0) not in returned
    assert max(returned) > first
    assert heartbeat(lab).memory_free_bytes == 1 << 30


def test_clipped_by_vnode_it_updates_without_asking_anyone(lab: Lab) -> None:
    lab.accept(tickets(clip_scope="vnode"))
    lab.open()
    lab.receive(lab.frame())
    assert [type(t).__name__ for t in lab.work()][-2:] == ["Backward", "Update"]
    assert not lab.said(m.StepSummaries)
    assert [u.step for u in lab.said(m.Updated)] == [1]


# --- tasks that do not return -------------------------------------------------------------------------------


def hang(lab: Lab) -> None:
    """A task is handed to the worker, and never comes back."""
    lab.accept()
    lab.receive(lab.frame())
    assert lab.take(Compute)


def test_the_age_of_a_hanging_task_is_told_with_every_session_that_waits_for_it(lab: Lab) -> None:
    hang(lab)
    lab.wait(11.0)
    assert heartbeat(lab).progress[0].task_age_s > 11.0
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(3)))
    assert heartbeat(lab).progress[0].task_age_s > 11.0, "its session is gone, its task is not"
    lab.accept(replace(tickets(), session=SessionId("t" * 32)))
    assert {p.session: p.task_age_s > 11.0 for p in heartbeat(lab).progress} == {"t" * 32: True, SESSION: True}


def test_a_worker_whose_task_never_returns_ends_its_process_once_the_session_is_gone(lab: Lab) -> None:
    hang(lab)
    lab.wait(500.0)
    assert not lab.take(Exit), "its orchestrator decides"
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(3)))
    assert [e.code for e in lab.take(Exit)] == [1]
    assert len(lab.said(m.Leave)) == 1


def test_a_slow_task_may_return_after_its_session_is_gone(lab: Lab) -> None:
    hang_limit_s = Limits().task_age_floor_s
    lab.accept()
    lab.receive(lab.frame())
    (compute,) = lab.take(Compute)
    lab.hear(m.Withdraw(session=SESSION, epoch=Epoch(1), before=Instance(3)))
    lab.wait(3 * hang_limit_s)
    lab.do(Computed(task=compute.task, result=tasks.Loaded(state=lab.handle())))
    lab.wait(20 * hang_limit_s)
    assert not lab.take(Exit)
    assert not heartbeat(lab).progress


def test_a_pause_of_the_process_makes_no_task_old_and_no_serving_instance_unused(lab: Lab) -> None:
    hang(lab)
    lab.accept(serving_tickets())
    lab.wait(1.0)
    lab.now += 1000.0
    assert max(p.task_age_s for p in heartbeat(lab).progress) < 3.0
    assert lab.receive(serving_frame(lab, 1)).status is FrameStatus.ACCEPTED


# --- commands that make no sense ----------------------------------------------------------------------------

VALUES = m.InlineTensor(column="y", shape=(2, 4), dtype="float32", data=bytes(32))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": ()}, "no values of y"),
        ({"step": 0}, "no microbatch 0 of step 0 in this session"),
        ({"step": 4}, "no microbatch 0 of step 4 in this session"),
        ({"microbatch": 1}, "no microbatch 1 of step 1 in this session"),
        ({"valid_targets": ()}, "no count of valid targets of loss"),
        ({"inline": (replace(VALUES, column="z"),)}, "no values of y"),
        ({"inline": (replace(VALUES, shape=(1 << 40, 4)),)}, "found float32 [1099511627776, 4] in 32 bytes"),
        ({"inline": (replace(VALUES, shape=(-2, -4)),)}, "found float32 [-2, -4] in 32 bytes"),
        ({"inline": (replace(VALUES, dtype="complex3"),)}, "found complex3 [2, 4] in 32 bytes"),
    ],
)
def test_a_microbatch_that_cannot_be_meant_is_refused(lab: Lab, changes: dict[str, Any], reason: str) -> None:
    lab.accept()
    lab.open()
    lab.said(m.TaskAnswer)
    (good,) = lab.take(Fetch)
    rows = (good.ref,)
    valid = (m.CostTargets(vnode=NETWORK.definition.costs[0].node_id, count=8),)
    values: dict[str, Any] = {"step": 2, "microbatch": 0, "rows": rows, "valid_targets": valid}
    if "microbatch" in changes:
        values["step"] = 1
    opened = m.OpenMicrobatch(session=SESSION, epoch=Epoch(1), instance=Instance(2), **values | changes)
    lab.hear(opened)
    (answer,) = lab.said(m.TaskAnswer)
    assert not answer.accepted
    assert reason in answer.reason
    assert not lab.take(Fetch)
    lab.receive(lab.frame())
    lab.work()
    assert not lab.said(m.TaskFailed)


def test_more_microbatches_than_the_window_are_not_opened(lab: Lab) -> None:
    lab.accept(tickets(window=2))
    for step in (1, 2, 3, 1):
        lab.open(step)
    assert [a.accepted for a in lab.said(m.TaskAnswer)] == [True, True, False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"session": "../x"},
        {"session": ""},
        {"serving": True, "trained": "a/b"},
        {"states": (m.StateRef(vnode=NETWORK.order[2], sha256=Sha256("../x"), size_bytes=0, token=""),)},
    ],
)
def test_names_that_would_leave_the_home_are_refused(lab: Lab, changes: dict[str, Any]) -> None:
    lab.hear(replace(tickets(), **changes))
    (answer,) = lab.said(m.TicketAnswer)
    assert answer.reason.startswith("the ticket cannot be used: ")
    assert not lab.take(Persist)
