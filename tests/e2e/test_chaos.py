"""Real faults on a real `dcnr up`: the command that a user runs to be convinced, and the bits that it is about."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import dcnr
from dcnr.cli.chaos_plan import faults
from dcnr.oracle import Trainer
from dcnr.session.events import CheckpointCommitted, StepDone
from dcnr.session.record import Record
from tests.e2e.test_exact import small_gpt, text_like_columns, train
from tests.s3_server import S3Server

pytestmark = pytest.mark.timeout(400)  # Many starts of processes, on machines that do other things meanwhile.


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of `dcnr chaos`, and what follows from them."""

    seed: int
    for_s: int
    kinds: tuple[str, ...]
    befalls: tuple[tuple[str, str], ...]
    """Fault and process; the owner is whichever orchestrator it is by then."""


PLAN = Plan(
    seed=3737,
    for_s=18,
    kinds=("kill", "stop", "partition"),
    # The owner dies while the VNodes of the one that is cut off are being placed, and the last stop outlasts patience.
    befalls=(("kill", "pnode-1"), ("partition", "pnode-2"), ("kill", "owner"), ("stop", "pnode-0")),
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"XDG_STATE_HOME": str(tmp_path)}


@contextmanager
def up(environment: dict[str, str], *options: str) -> Iterator[str]:
    """The addresses of a `dcnr up` with three PNodes and two orchestrators that runs meanwhile."""
    size = ["--pnodes", "3", "--orchestrators", "2", "--listen", "127.0.0.1:0"]
    command = [sys.executable, "-m", "dcnr.cli.main", "up", *size, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stdout is not None
            yield running.stdout.readline().split()[2].rstrip(":")
            assert running.poll() is None
        finally:
            running.send_signal(signal.SIGINT)
    assert running.returncode == 130


@pytest.fixture
def store(request: pytest.FixtureRequest, environment: dict[str, str]) -> list[str]:
    """A bucket of a real S3 server where there is one, else the folder that is the default."""
    try:
        s3: S3Server = request.getfixturevalue("s3")
    except pytest.skip.Exception:
        return []
    environment |= s3.environment
    return ["--store", f"s3://{s3.new_bucket()}/network"]


def test_chaos_costs_no_step_and_no_bit(environment: dict[str, str], store: list[str]) -> None:
    with up(environment, "--cuttable", *store) as address:
        befall(address, environment, PLAN)


def befall(address: str, environment: dict[str, str], plan: Plan) -> None:
    """What `dcnr chaos` does to a session there, and what becomes of it."""
    columns = text_like_columns()
    options = ["--for", f"{plan.for_s}s", "--kill-every", "4s", "--seed", str(plan.seed)]
    with dcnr.connect(address) as client:
        run = train(client, columns, steps=100_000)
        next(event for event in run if isinstance(event, CheckpointCommitted))
        command = [sys.executable, "-m", "dcnr.cli.main", "chaos", "--session", run.id[:12], *options, "--json"]
        command += ["--faults", ",".join(plan.kinds)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        run.stop()
        steps = [event.step for event in run if isinstance(event, StepDone)]
        assert steps == list(range(1, steps[-1] + 1))
        files = run.files()
        manifest = run.manifest(files)

    planned = faults(plan.seed, for_s=plan.for_s, every_s=4, kinds=plan.kinds, victims=4)
    assert told["plan"] == [fault.to_json() for fault in planned]
    named = [name if (name := fault["process"]).startswith("pnode") else "owner" for fault in told["faults"]]
    assert [(fault["fault"], name) for fault, name in zip(told["faults"], named, strict=True)] == list(plan.befalls)
    assert [fault["skipped"] for fault in told["faults"]] == [""] * len(planned)
    assert all(fault["regain_s"] >= fault["next_step_s"] > 0 for fault in told["faults"])
    assert any(fault["placed_anew"] for fault in told["faults"])
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
