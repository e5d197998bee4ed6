"""A disk that is full, wherever it is: a real one, small enough to be filled."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dcnr
from dcnr.errors import StoreFull
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import CheckpointCommitted, Finished, Placed, StepDone, Waiting
from tests.e2e.test_exact import assert_equals_oracle, text_like_columns, train

STEPS = 30
SMALL = "24m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk(name)``: a folder below ``tmp_path`` that is a disk of 24 MiB."""
    with contextlib.ExitStack() as stack:

        def mounted(name: str) -> Path:
            folder = tmp_path / name
            folder.mkdir()
            try:
                words = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
                made = subprocess.run(words, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no mount(8) here, so no small disk")
            if made.returncode:
                pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mounted


def fill(folder: Path) -> Path:
    """Not a byte is left. Deleting what is returned frees the disk."""
    ballast = folder / "ballast"
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return ballast


def stderr_of(folder: Path) -> str:
    return (folder / "stderr.log").read_text()


@pytest.mark.timeout(300)
def test_a_pnode_that_cannot_write_its_fence_is_passed_over_and_taken_again(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    """Alone, its session waits and says why; beside another, the session is placed there."""
    columns = text_like_columns()
    full = disk("pnode-0")
    with LocalNetwork(tmp_path, 1, 1) as local, dcnr.connect(local.address) as client:
        ballast = fill(full)
        run = train(client, columns, STEPS)
        events = iter(run)
        waiting = next(event for event in events if isinstance(event, Waiting))
        assert "the fence could not be written" in waiting.reason
        assert "No space left on device" in waiting.reason
        assert not (full / "fence.json").exists()
        local.start_pnode()
        placed = [event for event in events if isinstance(event, Placed)]
        assert {peer for event in placed for peer in event.vnodes.values()} == {local.pnodes[1].peer}
        assert_equals_oracle(run, columns, STEPS)
        local.kill(1)
        ballast.unlink()
        again = train(client, columns, STEPS + 1)
        assert isinstance(list(again)[-1], Finished)
        assert (full / "fence.json").exists()
        assert "Traceback" not in stderr_of(full)


@pytest.mark.timeout(300)
def test_a_pnode_that_cannot_keep_states_costs_checkpoints_and_no_step(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    """Its own and those that it keeps for the other PNode."""
    columns = text_like_columns()
    full = disk("pnode-0")
    with LocalNetwork(tmp_path, 2, 1) as local, dcnr.connect(local.address) as client:
        run = train(client, columns, 3 * STEPS)
        steps, commits, ballast = [], [], None
        for event in run:
            if isinstance(event, StepDone):
                steps.append(event.step)
                if event.step == 3:
                    ballast = fill(full)
                elif event.step == STEPS:
                    assert ballast is not None
                    ballast.unlink()
            elif isinstance(event, CheckpointCommitted):
                commits.append(event.step)
        told = [event for event in client.events() if event.kind in ("checkpoint_abandoned", "mark_failed")]
        assert any("No space left on device" in event.data for event in told)
        assert steps == list(range(1, 3 * STEPS + 1))
        assert commits[-1] == 3 * STEPS
        assert all(child.running for child in local.pnodes)
        assert_equals_oracle(run, columns, 3 * STEPS)
        assert "Traceback" not in stderr_of(full)


@pytest.mark.timeout(300)
def test_a_store_that_is_full_costs_time_and_nothing_else(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    columns = text_like_columns()
    full = disk("store")
    with LocalNetwork(tmp_path, 2, 1) as local, dcnr.connect(local.address) as client:
        run = train(client, columns, STEPS)
        log = tmp_path / "orchestrator" / "log.jsonl"
        steps, commits, ballast = [], [], None
        for event in run:
            if isinstance(event, StepDone):
                steps.append(event.step)
                if event.step == 3:
                    ballast = fill(full)
                if event.step == 12:
                    assert ballast is not None
                    assert commits == []
                    while "No space left on device" not in log.read_text():
                        pass  # Hints are written every second; the test's own time limit ends it.
                    ballast.unlink()
            elif isinstance(event, CheckpointCommitted):
                commits.append(event.step)
        assert steps == list(range(1, STEPS + 1))
        assert commits[-1] == STEPS
        assert_equals_oracle(run, columns, STEPS)


@pytest.mark.timeout(100)
def test_what_a_full_store_does_not_take_is_refused_and_not_tried_for_minutes(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    columns = text_like_columns()
    full = disk("store")
    with LocalNetwork(tmp_path, 0, 1) as local, dcnr.connect(local.address) as client:
        ballast = fill(full)
        with pytest.raises(StoreFull, match=rf"store file://{full} is full: No space left.*Make room"):
            client.add_data(columns)
        words = [sys.executable, "-m", "dcnr.cli.main", "data", "add", str(Path(__file__)), "--network", local.address]
        refused = subprocess.run([*words, "--tokenizer", "bytes"], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"error: store file://{full} is full: No space left on device")
        ballast.unlink()
        client.add_data(columns)


@pytest.mark.timeout(300)
def test_an_orchestrator_whose_home_is_full_goes_on_and_does_not_start(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    columns = text_like_columns()
    full = disk("orchestrator")
    with LocalNetwork(tmp_path, 1, 1) as local, dcnr.connect(local.address) as client:
        ballast = fill(full)
        run = train(client, columns, STEPS)
        assert isinstance(list(run)[-1], Finished)
        assert_equals_oracle(run, columns, STEPS)
        local.kill_orchestrator()
        words = [sys.executable, "-m", "dcnr.cli.main", "orchestrator", "--listen", local.address]
        words += ["--home", str(full), "--store", str(tmp_path / "store")]
        refused = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert refused.returncode == 1
        assert refused.stderr.count("No space left on device") == 1
        assert f"home folder {full} cannot be used" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
        ballast.unlink()
        local.start_orchestrator()
        assert client.status().descriptor.peer == local.orchestrator.peer
