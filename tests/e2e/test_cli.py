"""The command line against a real network of separate processes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dcnr.cli.main import app
from dcnr.runtime.supervisor import LocalNetwork
from tests.adapters.event_files import points

STEPS = 12
TRAIN = ["--batch-size", "4", "--microbatches", "2", "--checkpoint-every", "4"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("network"), 2, 1) as network:
        yield network


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network file and a text."""
    folder = tmp_path_factory.mktemp("files")
    sizes = ["--layers", "2", "--dim", "16", "--heads", "2", "--vocab", "300", "--context", "8"]
    made = CliRunner().invoke(app, ["network", "template", "gpt", *sizes])
    (folder / "small.yaml").write_text(made.stdout)
    (folder / "book.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(400)))
    return folder


@pytest.fixture
def dcnr(local: LocalNetwork) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), env={"DCNR_NETWORK": local.address})

    return invoke


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def trained(local: LocalNetwork, files: Path) -> list[dict[str, Any]]:
    """The JSON lines of a whole ``dcnr train``."""
    arguments = [
        "train",
        str(files / "small.yaml"),
        "--data",
        str(files / "book.txt"),
        "--steps",
        str(STEPS),
        "--tokenizer",
        "bpe:300",
        *TRAIN,
    ]
    result = CliRunner().invoke(app, [*arguments, "--eval-every", "4", "--json"], env={"DCNR_NETWORK": local.address})
    return lines(result)


def test_training_follows_the_session_to_its_end(trained: list[dict[str, Any]]) -> None:
    events = trained[1:]
    assert [e["step"] for e in events if e["event"] == "step_done"] == list(range(1, STEPS + 1))
    assert [e["step"] for e in events if e["event"] == "checkpoint_committed"][-1] == STEPS
    assert any(e["event"] == "evaluated" for e in events)
    assert events[-1]["event"] == "finished"


def test_the_network_tells_what_it_has(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    session = trained[0]["session"]
    (network,) = lines(dcnr("network", "list", "--json"))
    assert network["name"] == "gpt"
    assert json.loads(dcnr("network", "show", "gpt", "--json").stdout)["name"] == "gpt"
    (dataset,) = lines(dcnr("data", "list", "--json"))
    assert (dataset["name"], dataset["tokenizer"]) == ("book", "bpe:300")
    assert lines(dcnr("data", "show", dataset["dataset"][:10], "--json")) == [dataset]
    listed = next(s for s in lines(dcnr("session", "list", "--json")) if s["session"] == session)
    assert (listed["state"], listed["step"], listed["committed_step"]) == ("finished", STEPS, STEPS)
    (shown,) = lines(dcnr("session", "show", session[:10], "--json"))
    assert shown["recipe"]["microbatches"] == 2
    assert shown["commits"][-1] == STEPS
    assert len(lines(dcnr("nodes", "--json"))) == 2
    (status,) = lines(dcnr("status", "--json"))
    assert status["pnodes"] == 2
    kinds = {event["kind"] for event in lines(dcnr("events", "--json"))}
    assert {"placed", "finished"} <= kinds
    for tables in (["network", "list"], ["network", "show", "gpt"], ["data", "list"], ["session", "list"], ["nodes"]):
        assert dcnr(*tables).exit_code == 0
    assert re.search(r"^up for +(\d+ min )?\d+ s$", dcnr("status").stdout, re.MULTILINE)
    assert re.search(r"^memory +\d+\.\d MiB$", dcnr("status").stdout, re.MULTILINE)
    assert re.search(r"book +text +[\d.]+ k tokens +\d+ tokens", dcnr("data", "list").stdout)
    assert all(len(line) < 250 for line in dcnr("events").stdout.splitlines())
    assert "placement" in dcnr("session", "show", session).stdout


def test_what_the_network_did_is_explained(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    session = ("--session", trained[0]["session"])
    (located,) = lines(dcnr("explain", "head", *session, "--json"))
    assert located["vnode"] == "head"
    assert located["since_log_entry"] == 2
    assert "of the predicted work" in located["why"]
    assert [stage["pnode"] for stage in located["stages"]] == [located["pnode"]]
    assert "head" in located["stages"][0]["vnodes"]
    assert located["stages"][0]["seconds"] > 0
    assert located["stages"][0]["measured_s"] > 0
    shown = dcnr("explain", "head", *session).stdout
    assert re.search(r"^stages +\w{12} [\d.]+ ms/microbatch predicted, .* measured without links", shown, re.MULTILINE)
    (host,) = lines(dcnr("explain", located["pnode"], "--json"))
    assert host["pnode"] == located["pnode"]
    assert "GFLOP/s" in host["offers"]
    (step,) = lines(dcnr("explain", "3", *session, "--json"))
    losses = [event["loss"] for event in trained if event.get("event") == "step_done" and event["step"] == 3]
    assert [step["loss"]] == losses
    assert step["measured_step_s"] > 0
    for people in (dcnr("explain", "3", *session).stdout, dcnr("session", "show", session[1]).stdout):
        assert re.search(r"^(done|created) +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}$", people, re.MULTILINE), people
    assert 0 <= step["bubble"] < 1
    assert {vnode for stage in step["stages"] for vnode in stage["vnodes"]} >= {"head"}
    assert all(link["bytes_per_step"] > 0 for link in step["links"])
    assert located["pnode"][:12] in step["placement"]
    unknown = dcnr("explain", "haed")
    assert unknown.exit_code == 2
    assert "expected 'head'" in unknown.stderr
    assert dcnr("explain", "9999").exit_code == 2


def test_a_plan_is_for_the_pnodes_that_are_there(dcnr: Any, trained: list[dict[str, Any]], files: Path) -> None:
    (found,) = lines(dcnr("plan", str(files / "small.yaml"), "--json"))
    present = {node["peer"] for node in lines(dcnr("nodes", "--json"))}
    assert {stage["pnode"] for stage in found["stages"]} <= present
    assert found["step_s"] > 0


def test_a_finished_session_can_be_followed_again(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    again = lines(dcnr("session", "follow", trained[0]["session"], "--json"))
    losses = [e["loss"] for e in trained[1:] if e["event"] == "step_done"]
    assert [e["loss"] for e in again if e["event"] == "step_done"] == losses
    assert again[-1]["event"] == "finished"


def test_a_session_is_kept_in_a_folder_once_however_often_it_is_followed(
    dcnr: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    session = trained[0]["session"]
    done = [event for event in trained[1:] if event["event"] == "step_done"]
    follow = ("session", "follow", session[:12], "--log-dir", str(tmp_path), "--json")
    assert [e["event"] for e in lines(dcnr(*follow))] == ["placed"] + ["step_done"] * STEPS + ["finished"]
    assert [e["event"] for e in lines(dcnr(*follow))] == ["finished"]
    kept = [json.loads(line) for line in (tmp_path / f"{session}.jsonl").read_text().splitlines()]
    assert kept[0]["event"] == "placed"
    assert [{**event, "unix_s": 0} for event in kept[1:]] == [{**event, "unix_s": 0} for event in (*done, trained[-1])]
    losses = [(p.step, p.value) for p in points(tmp_path) if p.tag == "train/loss"]
    assert losses == [(e["step"], float(np.float32(e["loss"]))) for e in done]


def test_who_trains_with_a_folder_and_is_killed_goes_on_in_it(
    local: LocalNetwork, dcnr: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    process = start(
        local, "train", "gpt", "--data", "book", "--steps", "5000", *TRAIN, "--json", "--log-dir", str(tmp_path)
    )
    with process:
        assert process.stdout is not None
        session = json.loads(process.stdout.readline())["session"]
        for line in process.stdout:
            if json.loads(line).get("step", 0) >= 5:
                break
        process.kill()
    path = tmp_path / f"{session}.jsonl"
    before = [e for e in path.read_bytes().splitlines(keepends=True) if e.endswith(b"\n")]
    assert len(before) >= 5
    lines(dcnr("session", "stop", session, "--json"))
    assert dcnr("session", "follow", session, "--log-dir", str(tmp_path)).exit_code == 0
    assert path.read_bytes().startswith(b"".join(before))
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept[-1]["event"] == "stopped"
    steps = [event["step"] for event in kept if event["event"] == "step_done"]
    assert steps == list(range(1, steps[-1] + 1))


def test_validation_tells_loss_and_perplexity_of_the_newest_commit(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    session = trained[0]["session"]
    (found,) = lines(dcnr("session", "validate", session, "--json"))
    assert (found["session"], found["step"]) == (session, STEPS)
    assert found["rows"] > 0
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    said = dcnr("session", "validate", session).stdout
    assert said.startswith(f"step {STEPS}: validation loss {found['loss']:.4f}  perplexity {found['perplexity']:,.2f}")


def test_the_sessions_steps_are_recomputed_bit_for_bit(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    session = trained[0]["session"]
    (whole,) = lines(dcnr("session", "verify", session, "--json"))
    assert (whole["equal"], whole["base_step"], whole["last_step"]) == (True, 0, STEPS)
    assert whole["sha256_network"] == whole["sha256_recomputed"]
    # A busy machine may leave a checkpoint out, so the commits are asked for; deletion leaves at least two.
    (shown,) = lines(dcnr("session", "show", session, "--json"))
    *_, before, last = shown["commits"]
    (part,) = lines(dcnr("session", "verify", session, "--from", str(last - 1), "--to", str(last - 1), "--json"))
    assert (part["equal"], part["base_step"], part["last_step"]) == (True, before, last)
    plain = dcnr("session", "verify", session)
    assert plain.exit_code == 0
    assert plain.stdout.splitlines()[-1] == "equal"
    assert whole["sha256_network"] in plain.stdout
    assert dcnr("session", "verify", session, "--to", "99").exit_code == 1


def test_a_recomputation_that_differs_says_where(local: LocalNetwork, trained: list[dict[str, Any]]) -> None:
    """Against evidence in which one loss and one state were changed."""
    from dataclasses import replace

    import dcnr as package
    from dcnr.cli.verify import collect, recompute

    with package.connect(local.address) as net:
        evidence = collect(net, net.session(trained[0]["session"]), STEPS - 1, STEPS)
        (step, states), *_ = evidence.states.items()
        vnode = next(iter(states))
        forged = replace(
            evidence,
            losses={**evidence.losses, STEPS: evidence.losses[STEPS] + 1e-9},
            states={step: {**states, vnode: "0" * 64}},
        )
        verdict = recompute(net.address, forged)
    assert not verdict.equal
    assert verdict.sha256_network != verdict.sha256_recomputed
    assert any(f"step {STEPS}: the network's loss" in d for d in verdict.differences)
    assert any(f"VNode {vnode}" in d for d in verdict.differences)
    assert len(verdict.differences) == 2


def test_text_comes_from_the_newest_commit(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    ask = ["--max-tokens", "8", "--seed", "3", "--temperature", "1.0"]
    (by_session,) = lines(dcnr("generate", trained[0]["session"], "green bottles", *ask, "--json"))
    assert by_session["session"] == trained[0]["session"]
    assert by_session["step"] == STEPS
    assert by_session["text"]
    # By the network's name it is its newest session with a commit, whichever of these tests trained it.
    newest = [
        s for s in lines(dcnr("session", "list", "--json")) if s["committed_step"] and s["network_name"] == "gpt"
    ][-1]
    (by_name,) = lines(dcnr("generate", "gpt", "green bottles", *ask, "--json"))
    assert (by_name["session"], by_name["step"]) == (newest["session"], newest["committed_step"])
    plain = dcnr("generate", trained[0]["session"], "green bottles", *ask)
    assert plain.stdout == f"green bottles{by_session['text']}\n"
    assert f"step {STEPS}" in plain.stderr


def test_a_rate_that_explodes_fails_with_step_and_vnode(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    result = dcnr(
        "train",
        "gpt",
        "--data",
        "book",
        "--steps",
        "30",
        *TRAIN,
        "--optimizer",
        "sgd",
        "--lr",
        "1e38",
        "--clip-norm",
        "0",
    )
    assert result.exit_code == 1
    assert "failed: step 2, VNode embedder" in result.stderr
    assert "VNode" in result.stderr


def test_a_batch_that_cannot_be_cut_names_both_numbers(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    result = dcnr("train", "gpt", "--data", "book", "--steps", "1", "--batch-size", "6", "--microbatches", "4")
    assert result.exit_code == 2
    assert "batch size 6" in result.stderr
    assert "4 microbatches" in result.stderr


def test_a_batch_larger_than_the_data_is_refused(dcnr: Any, trained: list[dict[str, Any]]) -> None:
    result = dcnr("train", "gpt", "--data", "book", "--steps", "1", "--batch-size", "100000", "--microbatches", "1")
    assert result.exit_code == 1
    assert "100000" in result.stderr


def test_what_is_unknown_is_wrong_usage_and_named(dcnr: Any, trained: list[dict[str, Any]], tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", tokens=np.ones((1, 2), np.int64))
    for arguments in (
        ["session", "show", "zz"],
        ["session", "resume", "zz"],
        ["generate", "zz", "x"],
        ["forward", "zz", "--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")],
        ["train", "zz", "--data", "book", "--steps", "1"],
        ["train", "gpt", "--data", "zz", "--steps", "1"],
        ["data", "show", "zz"],
        ["data", "delete", "zz"],
        ["network", "show", "zz"],
    ):
        result = dcnr(*arguments)
        assert result.exit_code == 2, arguments
        assert "zz" in result.stderr


def start(local: LocalNetwork, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The program in a process of its own, in a group of its own as a terminal would give it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dcnr.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DCNR_NETWORK": local.address} | environment,
    )


def test_ctrl_c_detaches_and_the_session_can_be_stopped_and_resumed(
    local: LocalNetwork, dcnr: Any, trained: list[dict[str, Any]]
) -> None:
    process = start(local, "train", "gpt", "--data", "book", "--steps", "5000", *TRAIN, "--json")
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        session = json.loads(process.stdout.readline())["session"]
        for line in process.stdout:
            if json.loads(line).get("step", 0) >= 5 and "checkpoint_committed" in line:
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"dcnr session follow {session}" in said
    assert f"dcnr session stop {session}" in said
    (running,) = [s for s in lines(dcnr("session", "list", "--json")) if s["session"] == session]
    assert running["state"] == "running"
    (located,) = lines(dcnr("explain", "head", "--session", session, "--json"))
    (host,) = lines(dcnr("explain", located["pnode"], "--json"))
    assert [stage["pnode"] for stage in host["stages"]] == [located["pnode"]]
    assert host["stages"][0]["measured_s"] > 0
    (stopped,) = lines(dcnr("session", "stop", session, "--json"))
    assert stopped["state"] == "stopped"
    assert lines(dcnr("session", "follow", session, "--json"))[-1]["event"] == "stopped"
    (resumed,) = lines(dcnr("session", "resume", session, "--json"))
    assert resumed["state"] in ("running", "starting", "waiting", "recovering")
    (again,) = lines(dcnr("session", "stop", session, "--json"))
    assert again["state"] == "stopped"


def test_up_is_found_by_the_other_commands_and_ends_with_ctrl_c(local: LocalNetwork, tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "DCNR_NETWORK": "", "DCNR_PNODE_LISTEN": "127.0.0.1:0"}
    process = start(
        local, "up", "--pnodes", "2", "--listen", "127.0.0.1:0", "--home", str(tmp_path / "home"), **environment
    )
    with process:
        assert process.stdout is not None
        assert "network at 127.0.0.1:" in process.stdout.readline()
        found = CliRunner().invoke(app, ["nodes", "--json"], env=environment)
        ports = {int(node["addresses"][0].rpartition(":")[2]) for node in lines(found)}
        assert len(ports) == 2
        assert ports <= set(range(50051, 51051)), "a variable for a PNode that is started by hand is not for these"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert "dcnr up" in CliRunner().invoke(app, ["nodes"], env=environment).stderr


def test_a_taken_address_is_named_and_the_first_is_undisturbed(local: LocalNetwork, tmp_path: Path) -> None:
    process = start(local, "orchestrator", "--listen", local.address, "--home", str(tmp_path))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert local.address in said
    assert len(lines(CliRunner().invoke(app, ["nodes", "--json"], env={"DCNR_NETWORK": local.address}))) == 2
