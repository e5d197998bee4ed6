"""Real faults on a real `dcnr up`: the command that a user runs to be convinced, and the bits that it is about."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcnr
from dcnr.cli.chaos_plan import faults
from dcnr.oracle import Trainer
from dcnr.session.events import CheckpointCommitted, StepDone
from dcnr.session.record import Record
from tests.e2e.test_exact import small_gpt, text_like_columns, train

pytestmark = pytest.mark.timeout(400)  # Many starts of processes, on machines that do other things meanwhile.

SEED = 3730
"""Kills a PNode, stops another for longer than the network's patience, kills the orchestrator."""
OPTIONS = ["--for", "14s", "--kill-every", "4s", "--faults", "kill,stop", "--seed", str(SEED)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"XDG_STATE_HOME": str(tmp_path)}


@pytest.fixture
def address(environment: dict[str, str]) -> Iterator[str]:
    """Of a `dcnr up` with three PNodes that runs meanwhile."""
    command = [sys.executable, "-m", "dcnr.cli.main", "up", "--pnodes", "3", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as up:
        try:
            assert up.stdout is not None
            yield up.stdout.readline().split()[2].rstrip(":")
            assert up.poll() is None
        finally:
            up.send_signal(signal.SIGINT)
    assert up.returncode == 130


def test_chaos_costs_no_step_and_no_bit(address: str, environment: dict[str, str]) -> None:
    columns = text_like_columns()
    with dcnr.connect(address) as client:
        run = train(client, columns, steps=100_000)
        next(event for event in run if isinstance(event, CheckpointCommitted))
        command = [sys.executable, "-m", "dcnr.cli.main", "chaos", "--session", run.id[:12], *OPTIONS, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        run.stop()
        steps = [event.step for event in run if isinstance(event, StepDone)]
        assert steps == list(range(1, steps[-1] + 1))
        files = run.files()
        manifest = run.manifest(files)

    planned = faults(SEED, for_s=14, every_s=4, kinds=("kill", "stop"), victims=4)
    assert told["plan"] == [fault.to_json() for fault in planned]
    assert [(fault["fault"], fault["process"]) for fault in told["faults"]] == [
        ("kill", "pnode-1"),
        ("stop", "pnode-2"),
        ("kill", "orchestrator"),
    ]
    assert all(fault["regain_s"] >= fault["next_step_s"] > 0 for fault in told["faults"])
    assert told["lost_steps"] == []
    assert told["windows"]
    assert all(window["equal"] for window in told["windows"])

    # The same session in one process, where nothing fails.
    oracle = Trainer(small_gpt(), Record.from_bytes(files.record).recipe, columns)
    losses = {result.step: result.loss for result in oracle.run(manifest.step)}
    assert {step: run.losses[step] for step in losses} == losses
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in manifest.states.items()} == hashes
    assert manifest.step > max(fault["done_before"] for fault in told["faults"])
