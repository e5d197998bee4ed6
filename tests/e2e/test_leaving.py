"""PNodes that leave, die, or are restarted one by one while a session goes on: what the log says, and the bits."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcnr
from dcnr.client.blocking import Client, Run
from dcnr.ids import LogIndex, SessionId
from dcnr.oracle import Trainer
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import SessionEvent, StepDone
from dcnr.session.log import Entry, log_key
from dcnr.session.record import Record

STEPS = 100
NEVER = 10_000
"""Steps between commits: more than there are, so the last step's is the only one."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("network"), 3, 1) as network:
        yield network


@pytest.fixture
def client(local: LocalNetwork) -> Iterator[Client]:
    for number, child in enumerate(local.pnodes):
        if not child.running:
            local.start_pnode(number)
    with dcnr.connect(local.address) as connected:
        while sum(node.colour == "green" and not node.leaving for node in connected.nodes()) < 3:
            pass  # The test's own time limit ends it.
        yield connected


def columns() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 64, size=(200, 17))
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": tokens[:, 1:].astype(np.int64)}


def network() -> dcnr.Graph:
    return dcnr.templates.gpt(layers=4, dim=64, heads=2, vocab=64, context=16, dropout=0.1)


def train(client: Client, steps: int = STEPS) -> Run:
    return client.train(
        network(),
        data=columns(),
        steps=steps,
        batch_size=8,
        microbatches=4,
        clip_norm=0.5,
        checkpoint_every=NEVER,
        seed=7,
    )


def log_of(local: LocalNetwork, run: Run) -> list[Entry]:
    found: list[Entry] = []
    while True:
        path: Path = local.home / "store" / log_key(SessionId(run.id), LogIndex(len(found) + 1))
        if not path.exists():
            return found
        found.append(Entry.from_bytes(path.read_bytes()))


def kinds(local: LocalNetwork, run: Run) -> list[str]:
    return [entry.kind.value for entry in log_of(local, run)]


def base_step(entry: Entry) -> int:
    folded: Any = entry.body["folded"]
    return int(folded["base"][0])


def steps_of(events: list[SessionEvent]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepDone)]


def assert_equals_oracle(run: Run, steps: int = STEPS) -> None:
    """Every loss, and the state object (weights and optimizer) of every VNode."""
    files = run.files()
    manifest = run.manifest(files)
    assert manifest.step == steps
    oracle = Trainer(network(), Record.from_bytes(files.record).recipe, columns())
    assert run.losses == {result.step: result.loss for result in oracle.run(steps)}
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in manifest.states.items()} == hashes


@pytest.mark.timeout(120)
def test_a_pnode_that_gets_sigterm_moves_its_vnodes_and_no_step_is_computed_again(
    local: LocalNetwork, client: Client
) -> None:
    run = train(client)
    seen: list[SessionEvent] = []
    for event in run:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == 10:
            local.kill(1, signal.SIGTERM)
    assert local.pnodes[1].process.wait(20) == 0
    assert steps_of(seen) == list(range(1, STEPS + 1))
    assert kinds(local, run)[:3] == ["Acquire", "Place", "Move"]
    assert "Rollback" not in kinds(local, run)
    move = log_of(local, run)[2]
    assert base_step(move) >= 10
    assert local.pnodes[1].peer not in {spot[0] for spot in move.body["folded"]["placement"].values()}
    assert_equals_oracle(run)


@pytest.mark.timeout(120)
def test_a_pnode_that_is_killed_between_commits_costs_the_steps_since_the_newest_mark(
    local: LocalNetwork, client: Client
) -> None:
    run = train(client)
    guarded = [local.home / f"pnode-{number}" / "guarded" / run.id for number in range(3)]
    seen: list[SessionEvent] = []
    kept_at = 0
    for event in run:
        seen.append(event)
        if not isinstance(event, StepDone):
            continue
        if not kept_at and all(folder.exists() for folder in guarded):
            kept_at = event.step
        if kept_at and event.step == kept_at + 5:  # By then what is kept is whole.
            local.kill(2)
    assert steps_of(seen) == list(range(1, STEPS + 1))
    (rollback,) = [entry for entry in log_of(local, run) if entry.kind.value == "Rollback"]
    assert base_step(rollback) > 0
    assert_equals_oracle(run)
    # It is finished: nobody keeps anything for others any more, but whoever was killed.
    while any(folder.exists() for folder in guarded[:2]):
        pass


@pytest.mark.timeout(150)
def test_a_rolling_restart_of_everything_withdraws_no_step(local: LocalNetwork, client: Client) -> None:
    steps = 2000
    run = train(client, steps)
    seen: list[int] = []
    restarted = 0
    for event in run:
        if not isinstance(event, StepDone):
            continue
        seen.append(event.step)
        if restarted < 3 and event.step >= 10 * (restarted + 1):
            local.kill(restarted, signal.SIGTERM)
            assert local.pnodes[restarted].process.wait(25) == 0
            local.start_pnode(restarted)
            restarted += 1
        elif restarted == 3:
            local.kill_orchestrator()
            local.start_orchestrator()
            restarted += 1
            last = event.step
        elif restarted == 4 and event.step > last + 20:
            run.stop()
            restarted += 1
    assert restarted == 5
    assert seen == list(range(1, len(seen) + 1))
    found = kinds(local, run)
    assert found.count("Move") >= 3
    assert "Rollback" not in found
    oracle = Trainer(network(), Record.from_bytes(run.files().record).recipe, columns())
    assert [run.losses[step] for step in seen] == [result.loss for result in oracle.run(len(seen))]
