"""What is wrong is told in one clear error, and loses nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dcnr
from dcnr.errors import InvalidData, NoCapacity
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import CheckpointCommitted, CheckpointDamaged, Finished, Placed, StepDone, Stopped
from dcnr.session.log import object_key
from tests.e2e.test_exact import assert_equals_oracle, text_like_columns, train

STEPS = 60


def test_an_altered_checkpoint_is_passed_over_and_no_bit_changes(tmp_path: Path) -> None:
    """The newest whole one is used, with the reason; what is computed again equals the oracle all the same."""
    columns = text_like_columns()
    with LocalNetwork(tmp_path, 2, 1) as local, dcnr.connect(local.address) as client:
        run = train(client, columns, STEPS)
        for event in run:
            if isinstance(event, CheckpointCommitted) and event.step >= 20:
                run.stop()
                break
        assert isinstance(list(run)[-1], Stopped)
        manifest = run.manifest(run.files())
        for number, state in enumerate(manifest.states.values()):
            path = tmp_path / "store" / object_key(run.id, state.sha256)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2] if number % 2 else bytes([data[0] ^ 1]) + data[1:])
        for home in tmp_path.glob("pnode-*"):
            shutil.rmtree(home / "snapshots")

        run.resume()
        seen = list(run)
        damaged = [event for event in seen if isinstance(event, CheckpointDamaged)]
        assert [event.step for event in damaged] == [manifest.step]
        assert "hash to" in damaged[0].reason
        assert min(event.base_step for event in seen if isinstance(event, Placed)) < manifest.step
        assert isinstance(seen[-1], Finished)
        assert_equals_oracle(run, columns, STEPS)


def test_a_network_larger_than_all_pnodes_says_how_much_is_missing(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path, 2, 1, memory_bytes=1 << 20) as local, dcnr.connect(local.address) as client:
        with pytest.raises(NoCapacity, match=r"the 2 PNodes together have .* MiB are missing"):
            train(client, text_like_columns(), STEPS)
        assert client.sessions() == ()


def test_a_dead_proxy_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with LocalNetwork(tmp_path, 1, 1) as local, dcnr.connect(local.address) as client:
        run = train(client, text_like_columns(), 2)
        assert [event.step for event in run if isinstance(event, StepDone)] == [1, 2]
        for name, content, said in (
            ("empty.txt", b"", "empty"),
            ("binary.txt", b"\xff\xfe\x00\x01" * 99, "not"),
        ):
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(InvalidData, match=said):
                client.add_data(str(path), tokenizer="bpe:300")


def test_a_store_that_cannot_be_one_ends_the_orchestrator_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    command = [sys.executable, "-m", "dcnr.cli.main", "orchestrator", "--listen", "127.0.0.1:0", "--home"]
    ended = subprocess.run(
        [*command, str(tmp_path / "home"), "--store", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert str(tmp_path / "file") in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def pnode(local: LocalNetwork, home: Path) -> subprocess.Popen[str]:
    """``dcnr pnode`` as its owner starts it, by hand."""
    words = [sys.executable, "-m", "dcnr.cli.main", "pnode", "--bootstrap", local.address, "--listen", "127.0.0.1:0"]
    return subprocess.Popen([*words, "--home", str(home)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_a_second_pnode_in_a_home_ends_with_the_firsts_process_id(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path, 1, 1) as local:
        second = pnode(local, tmp_path / "pnode-0")
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"is in use by process {local.pids[0]}; choose another --home" in " ".join(said.split())
        assert "Traceback" not in said
        assert local.pnodes[0].running


@pytest.mark.timeout(200)
def test_a_copied_home_is_refused_and_both_owners_are_told(tmp_path: Path) -> None:
    """The copy counts one start more than the original, as a restart would; but the original is at work."""
    columns = text_like_columns()
    with LocalNetwork(tmp_path, 1, 1) as local, dcnr.connect(local.address) as client:
        shutil.copytree(tmp_path / "pnode-0", tmp_path / "copy")
        copy = pnode(local, tmp_path / "copy")
        try:
            assert copy.stderr is not None
            refused = next(line for line in copy.stderr if "orchestrator_away" in line)
            assert local.address in refused
            said = (tmp_path / "copy" / "log.jsonl").read_text()
            assert "is at work" in said
            assert "this one a home of its own with --home" in said
            told = next(event for event in client.events(follow=True) if event.kind == "home_copied")
            assert local.pnodes[0].peer in told.data
            log = tmp_path / "pnode-0" / "log.jsonl"
            while "home_copied" not in log.read_text():
                pass
            run = train(client, columns, 20)
            assert isinstance(list(run)[-1], Finished)
            assert_equals_oracle(run, columns, 20)
            assert [node.colour for node in client.nodes()] == ["green"]
        finally:
            copy.kill()
            copy.communicate()
