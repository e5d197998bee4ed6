"""Two orchestrators over one store, in processes of their own: one is killed in mid-training, the other goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dcnr
from dcnr.client.blocking import Client
from dcnr.ids import LogIndex, SessionId
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.log import Entry, log_key

STEPS = 60
KILL_AT = 7


def wait_for_nodes(client: Client, count: int) -> None:
    """Until it is linked to that many PNodes; the test's own time limit ends it otherwise."""
    while sum(node.colour == "green" for node in client.nodes()) < count:
        pass


def a_pnode_that_knows(network: LocalNetwork, *addresses: str) -> None:
    arguments = ["pnode", "--bootstrap", ",".join(addresses), "--listen", "127.0.0.1:0"]
    child = network._spawn("pnode-of-both", arguments)
    network.pnodes.append(child)
    network._wait_ready(child)


def log_of(store: Path, session: str) -> list[Entry]:
    found: list[Entry] = []
    while (path := store / log_key(SessionId(session), LogIndex(len(found) + 1))).exists():
        found.append(Entry.from_bytes(path.read_bytes()))
    return found


@pytest.mark.timeout(200)
def test_another_orchestrator_takes_over_and_nobody_notices(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(400)))
    store = tmp_path / "store"
    with (
        LocalNetwork(tmp_path / "first", 1, store=str(store)) as first,  # Its PNode is told of this one alone.
        LocalNetwork(tmp_path / "second", 0, store=str(store)) as second,
        dcnr.connect(f"{first.address},{second.address}") as client,
        dcnr.connect(second.address) as other,
    ):
        a_pnode_that_knows(second, first.address, second.address)
        wait_for_nodes(client, 2)
        wait_for_nodes(other, 2)
        run = client.train(
            dcnr.templates.gpt(layers=2, dim=16, heads=2, vocab=256, context=8),
            data=str(book),
            tokenizer="bytes",
            steps=STEPS,
            batch_size=4,
            microbatches=2,
            checkpoint_every=5,
        )
        steps, ended = [], ""
        for event in run:
            if isinstance(event, dcnr.StepDone):
                steps.append(event.step)
                if event.step == KILL_AT:
                    first.kill_orchestrator()
            ended = event.kind
        assert steps == list(range(1, STEPS + 1))
        assert ended == "finished"
        log = log_of(store, run.id)
        owners = list(dict.fromkeys(entry.author.peer for entry in log))
        assert owners == [first.orchestrator.peer, second.orchestrator.peer]
        kinds = [entry.kind.value for entry in log]
        assert (kinds.count("Acquire"), kinds.count("Place"), kinds.count("Rollback")) == (2, 1, 0)
        verify = [sys.executable, "-m", "dcnr.cli.main", "session", "verify", run.id, "--network", second.address]
        verified = subprocess.run(verify, capture_output=True, text=True, timeout=100)
        assert verified.returncode == 0, verified.stdout + verified.stderr
