"""The promise: weights, optimizer state and losses of a distributed run equal those of one process, bit for bit."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import dcnr
from dcnr.client.blocking import Client, Run
from dcnr.oracle import Trainer
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import PNodeLost, RecoveryPhase, SessionEvent, StepDone
from dcnr.session.recipe import Optimizer, Schedule
from dcnr.session.record import Record

STEPS = 20
LONG = 80
"""Steps of the runs that something happens to: they must still be under way when it does."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    """One network that the tests below let grow, and mend after what they did to it."""
    with LocalNetwork(tmp_path_factory.mktemp("network"), 1, 1) as network:
        yield network


@pytest.fixture
def client(local: LocalNetwork) -> Iterator[Client]:
    with dcnr.connect(local.address) as connected:
        yield connected


def ensure_pnodes(local: LocalNetwork, count: int) -> None:
    for number in range(count):
        if number >= len(local.pnodes):
            local.start_pnode()
        elif not local.pnodes[number].running:
            local.start_pnode(number)


def text_like_columns(rows: int = 200, context: int = 16, vocabulary: int = 64) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(rows, context + 1))
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": tokens[:, 1:].astype(np.int64)}


def small_gpt() -> dcnr.Graph:
    """Tied, with dropout: everything whose order could show in the bits."""
    return dcnr.templates.gpt(layers=4, dim=64, heads=2, vocab=64, context=16, dropout=0.1)


def train(
    client: Client,
    columns: dict[str, np.ndarray],
    steps: int,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    clip_scope: str = "network",
) -> Run:
    return client.train(
        small_gpt(),
        data=columns,
        steps=steps,
        batch_size=8,
        microbatches=4,
        optimizer=optimizer or dcnr.AdamW(lr=1e-2),
        schedule=schedule or dcnr.Cosine(warmup=3),
        clip_norm=0.5,
        clip_scope=clip_scope,
        checkpoint_every=5,
        seed=7,
    )


def assert_equals_oracle(run: Run, columns: dict[str, np.ndarray], steps: int) -> None:
    """Every loss, and the state object (weights and optimizer) of every VNode."""
    files = run.files()
    manifest = run.manifest(files)
    assert manifest.step == steps
    oracle = Trainer(small_gpt(), Record.from_bytes(files.record).recipe, columns)
    losses = {result.step: result.loss for result in (oracle.step() for _ in range(steps))}
    assert run.losses == losses
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in manifest.states.items()} == hashes


@pytest.mark.parametrize("pnodes", [1, 2, 3])
def test_any_number_of_pnodes_computes_the_same_bits(local: LocalNetwork, client: Client, pnodes: int) -> None:
    ensure_pnodes(local, pnodes)
    columns = text_like_columns()
    run = train(client, columns, STEPS)
    events = list(run)
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, STEPS + 1))
    # Not from the event ``Placed``: a client that begins to follow a moment later has missed it.
    assert len({place.peer for place in run.info().placement}) == pnodes
    assert_equals_oracle(run, columns, STEPS)
    # Clipped by VNode nobody waits for the norm of all; the network grows, so this comes before the next number.
    run = train(client, columns, STEPS, dcnr.SGD(lr=0.1, momentum=0.9), dcnr.WSD(warmup=3, min_lr=1e-3), "vnode")
    assert len(list(run)) > STEPS
    assert len({place.peer for place in run.info().placement}) == pnodes
    assert_equals_oracle(run, columns, STEPS)


def test_muon_computes_the_same_bits(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 2)
    columns = text_like_columns()
    run = train(client, columns, STEPS, dcnr.Muon(lr=1e-2, weight_decay=0.1))
    assert len(list(run)) > STEPS
    assert_equals_oracle(run, columns, STEPS)


def test_a_killed_pnode_changes_no_bit(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 3)
    columns = text_like_columns()
    run = train(client, columns, LONG)
    seen: list[SessionEvent] = []
    for event in run:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == 7:
            local.kill(1)
    assert [e.step for e in seen if isinstance(e, StepDone)] == list(range(1, LONG + 1))
    assert [type(e) for e in seen].count(PNodeLost) == 1
    phases = [e.phase for e in seen if isinstance(e, RecoveryPhase)]
    assert phases == ["detected", "decided", "logged", "ticketed", "loaded", "regained"]
    assert_equals_oracle(run, columns, LONG)


def test_sigterm_is_an_announced_loss(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 3)
    columns = text_like_columns()
    run = train(client, columns, LONG)
    lost: list[PNodeLost] = []
    for event in run:
        if isinstance(event, StepDone) and event.step == 8:
            local.kill(0, signal.SIGTERM)
        if isinstance(event, PNodeLost):
            lost.append(event)
    assert len(lost) == 1
    assert lost[0].reason.startswith("it left")
    assert_equals_oracle(run, columns, LONG)


def test_a_killed_orchestrator_changes_no_bit(local: LocalNetwork, client: Client) -> None:
    """Started again, it acquires the session, rolls back to the newest commit and goes on; clients come back."""
    ensure_pnodes(local, 2)
    columns = text_like_columns()
    run = train(client, columns, LONG)
    steps: list[int] = []
    for event in run:
        if isinstance(event, StepDone):
            steps.append(event.step)
            if event.step == 12:
                local.kill_orchestrator()
                local.start_orchestrator()
    assert steps == list(range(1, LONG + 1))
    assert_equals_oracle(run, columns, LONG)
