"""What any registered PNode or client may say without ending the orchestrator."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import Incarnation, Instance, PeerId, VNodeId
from dcnr.machine import Received
from dcnr.network.analysis import analyse
from dcnr.network.graph import canonical_json, json_bytes
from dcnr.network.templates import mlp
from dcnr.protocol import messages as m
from dcnr.session.dataset import manifest_key
from dcnr.session.recipe import Recipe
from dcnr.sim.run import dataset
from tests.scenarios.stage import Stage

STRANGER = VNodeId("stranger")


def a_stage() -> Stage:
    return Stage(pnodes=2, recipe=Recipe(steps=3, batch_size=2, microbatches=1, checkpoint_every=1))


def asked(stage: Stage, message: m.Message) -> list[m.Message]:
    """Replies of the orchestrator."""
    replies: list[m.Message] = []
    stage.world.request(stage.orchestrator, message, lambda reply, last: replies.append(reply))
    stage.run_for(1.0)
    return replies


# --- objects that are not what their names say --------------------------------------------------------------


def test_a_damaged_definition_makes_no_network_and_damaged_data_no_session() -> None:
    stage = a_stage()
    stage.run_for(1.0)
    objects = stage.world.store.objects
    network = analyse(mlp(4, [5], 4).definition())
    definition = canonical_json(network.definition)
    objects[f"networks/{network.id}/definition.json"] = definition.replace(b"4", b"5")
    (refusal,) = asked(stage, m.CreateNetwork(definition=definition))
    assert isinstance(refusal, m.Refusal)
    assert refusal.kind == "CorruptObject"
    assert f"networks/{network.id}/definition.json is damaged" in refusal.reason
    del objects[f"networks/{network.id}/definition.json"]
    assert asked(stage, m.CreateNetwork(definition=definition)) == [m.NetworkCreated(network=network.id)]
    assert asked(stage, m.CreateNetwork(definition=definition)) == [m.NetworkCreated(network=network.id)]

    manifest = dataset(0)
    objects[manifest_key(manifest.id)] = replace(manifest, name="another").to_bytes()
    session = m.CreateSession(
        network=network.id, dataset=manifest.id, recipe=json_bytes(Recipe(steps=1).to_json()), nonce="another"
    )
    (refusal,) = asked(stage, session)
    assert isinstance(refusal, m.Refusal)
    assert (refusal.kind, manifest.id in refusal.reason) == ("CorruptObject", True)


def test_what_the_store_does_not_take_is_refused_with_its_reason_before_the_call_ends() -> None:
    """A network is offered to it on; so is a session, and its client is told so."""
    stage = Stage(pnodes=1, recipe=Recipe(steps=3, batch_size=2, microbatches=1), client_at_s=100.0)
    stage.run_for(1.0)
    network = analyse(mlp(4, [4], 4).definition())
    create = m.CreateNetwork(definition=canonical_json(network.definition))
    stage.world.store.read_only = True
    replies: list[m.Message] = []
    stage.world.request(stage.orchestrator, create, lambda reply, last: replies.append(reply))
    stage.run_for(stage.limits.create_patience_s - 0.5)
    assert replies == []
    stage.run_for(1.0)
    (refusal,) = replies
    assert isinstance(refusal, m.Refusal)
    assert refusal.kind == "StoreUnavailable"
    assert "the store takes no writes" in refusal.reason
    assert stage.limits.create_patience_s < stage.limits.request_timeout_s
    stage.world.store.read_only = False
    assert asked(stage, create) == [m.NetworkCreated(network=network.id)]
    stage.world.store.read_only = True
    recipe = json_bytes(Recipe(steps=3, batch_size=2, microbatches=1).to_json())
    session = m.CreateSession(network=network.id, dataset=dataset(0).id, recipe=recipe, nonce="mine")
    replies.clear()
    stage.world.request(stage.orchestrator, session, lambda reply, last: replies.append(reply))
    stage.run_for(stage.limits.create_patience_s + 0.5)
    (refusal,) = replies
    assert isinstance(refusal, m.Refusal)
    assert "begins as soon as the store takes its record" in refusal.reason
    stage.world.store.read_only = False
    stage.run_for(1.0)
    assert isinstance(asked(stage, session)[0], m.SessionCreated)
    assert sum("tells: session_created" in line for line in stage.lines) == 1


# --- reports ------------------------------------------------------------------------------------------------

REPORTS: dict[str, Any] = {
    "summary of a stranger": lambda step, session: m.StepSummaries(
        session=session, instance=Instance(2), step=step,
        summaries=tuple(m.StepSummary(vnode=VNodeId(f"{STRANGER}{n}"), grad_sq=1.0, finite=True) for n in range(9)),
    ),
    "loss of microbatch 77": lambda step, session: m.Loss(
        session=session, instance=Instance(2), vnode=VNodeId("loss"), step=step, microbatch=77, loss=0.5
    ),
    "loss of a stranger": lambda step, session: m.Loss(
        session=session, instance=Instance(2), vnode=STRANGER, step=step, microbatch=0, loss=0.5
    ),
    "update of strangers": lambda step, session: m.Updated(
        session=session, instance=Instance(2), step=step, not_finite=(), update_s=0.0,
        vnodes=tuple(VNodeId(f"{STRANGER}{n}") for n in range(9)),
    ),
    "done of a stranger": lambda step, session: m.Done(
        session=session, instance=Instance(2), segment=77, step=step, microbatch=0, forward_s=0.0, backward_s=0.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("report", REPORTS)
def test_a_host_that_reports_what_it_was_not_asked_for_changes_nothing(report: str) -> None:
    stage = a_stage()
    stage.run_until("orchestrator tells: step_done step=1")
    host, session = stage.pnodes[0], stage.checkers.session
    message = REPORTS[report](2, session)
    stage.world.deliver(stage.orchestrator, Received(peer=host.peer, incarnation=host.incarnation, message=message))
    stage.run_to_end()
    assert stage.client.ended == "finished"
    assert not any("Rollback" in line for line in stage.lines)


def test_a_pnode_that_hosts_nothing_has_nothing_to_report() -> None:
    stage = Stage(pnodes=3, recipe=Recipe(steps=3, batch_size=2, microbatches=1, checkpoint_every=1))
    spare = stage.pnodes[2]
    stage.run_until(f"{spare.name} starts as boot 1")
    stage.kill(spare)
    stage.run_until("log 2: Place")
    stage.start(spare)
    stage.run_until("orchestrator tells: step_done step=1")
    session = stage.checkers.session
    assert session is not None
    failed = m.TaskFailed(
        session=session, instance=Instance(2), vnode=VNodeId("output"), step=2, microbatch=0, cause="divergence", reason=""
    )  # fmt: skip
    stage.run_for(0.01)
    stage.world.deliver(stage.orchestrator, Received(peer=spare.peer, incarnation=spare.incarnation, message=failed))
    stage.run_to_end()
    assert stage.client.ended == "finished"


# --- registering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gflops", [0.0, -1.0, math.nan, math.inf])
def test_a_speed_that_cannot_be_is_refused(gflops: float) -> None:
    stage = a_stage()
    stage.run_until("pnode-2 starts as boot 1")
    capabilities = replace(stage.pnodes[0].capabilities, gflops=gflops)
    descriptor = m.Descriptor(
        peer=PeerId("f" * 32), incarnation=Incarnation(boot=1, nonce="n"), role="pnode", addresses=("x:1",),
        version_min=1, version_max=1,
    )  # fmt: skip
    (reply,) = asked(stage, m.Register(descriptor=descriptor, capabilities=capabilities))
    assert isinstance(reply, m.Refusal)
    assert reply.reason == f"a PNode must measure a finite speed above 0 GFLOP/s, found {gflops}"


@pytest.mark.parametrize("addresses", [("x" * 301,), ("x:1",) * 9], ids=["long", "many"])
def test_addresses_that_would_fill_the_log_are_refused(addresses: tuple[str, ...]) -> None:
    """Entries repeat them for every state that a PNode keeps."""
    stage = a_stage()
    stage.run_until("pnode-2 starts as boot 1")
    descriptor = m.Descriptor(
        peer=PeerId("f" * 32), incarnation=Incarnation(boot=1, nonce="n"), role="pnode", addresses=addresses,
        version_min=1, version_max=1,
    )  # fmt: skip
    (reply,) = asked(stage, m.Register(descriptor=descriptor, capabilities=stage.pnodes[0].capabilities))
    assert isinstance(reply, m.Refusal)
    assert reply.reason.startswith("a PNode names at most 8 addresses of 300 characters, found ")


# --- tasks that hang ----------------------------------------------------------------------------------------


def colours(stage: Stage) -> dict[str, str]:
    (reply,) = asked(stage, m.ListNodes())
    assert isinstance(reply, m.NodeList)
    return {node.capabilities.hostname: node.colour for node in reply.nodes}


def test_a_pnode_whose_task_hangs_is_not_taken_back_before_it_returns() -> None:
    stage = Stage(pnodes=2, recipe=Recipe(steps=9, batch_size=2, microbatches=1, checkpoint_every=1))
    hanging = stage.pnodes[1]
    stage.run_until("orchestrator tells: step_done step=2")
    while hanging.computing:
        stage.run_for(0.0005)
    hanging.computing = True  # The worker never comes to what it is handed next.
    stage.world.watch.causes += 1
    stage.run_for(13.0)
    for _ in range(4):
        stage.run_for(1.3)
        assert colours(stage)[hanging.name] == "gone"
    assert sum("pnode_gone" in line for line in stage.lines) == 1
    assert not any("pnode_back" in line for line in stage.lines)
    stage.run_to_end()
    assert stage.client.ended == "finished"


def test_a_pnode_that_is_gone_for_long_is_forgotten_and_may_come_back() -> None:
    limits = Limits(node_forgotten_s=20.0)
    stage = Stage(pnodes=2, recipe=Recipe(steps=2, batch_size=2, microbatches=1), limits=limits)
    stage.run_to_end()
    stage.kill(stage.pnodes[1])
    stage.run_for(15.0)
    assert colours(stage)["pnode-2"] == "gone"
    stage.run_for(10.0)
    assert set(colours(stage)) == {"pnode-1"}
    stage.start(stage.pnodes[1])
    stage.run_for(2.0)
    assert colours(stage)["pnode-2"] == "green"
