"""What chaos plans, whom it may touch, and how it judges."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from dcnr import wiring
from dcnr.cli.chaos import show
from dcnr.cli.chaos_plan import (
    KINDS,
    LASTING,
    LONG_STOP_S,
    SHORT_STOP_S,
    Fault,
    faults,
    parse_duration,
    parse_kinds,
    windows,
)
from dcnr.cli.chaos_report import Report, Row
from dcnr.cli.chaos_run import Hand, hand, read_processes
from dcnr.cli.main import app
from dcnr.cli.place import up_note
from dcnr.cli.verify import Verdict
from dcnr.client.blocking import Run
from dcnr.config import LIMITS
from dcnr.errors import Unavailable, UnknownName, UsageError
from dcnr.runtime.switch import Switch, cut
from dcnr.session.events import Finished, Placed, SessionEvent, StepDone

ALL = tuple(KINDS)
KILL_STOP_RESTART = ("kill", "stop", "restart")
KILL = Fault(at_s=0, kind="kill", victim=0, lasts_s=0)
PARTITION = Fault(at_s=0, kind="partition", victim=0, lasts_s=9.0)
STOP = Fault(at_s=0, kind="stop", victim=0, lasts_s=9.0)

# --- the plan ----------------------------------------------------------------------------------------------


def test_a_seed_is_a_plan() -> None:
    plans = [faults(seed, for_s=300, every_s=20, kinds=ALL, victims=4) for seed in range(20)]
    assert plans == [faults(seed, for_s=300, every_s=20, kinds=ALL, victims=4) for seed in range(20)]
    assert len(set(plans)) == 20
    for plan in plans:
        times = [fault.at_s for fault in plan]
        gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
        assert all(10 - 0.01 <= gap <= 30 + 0.01 for gap in gaps)
        assert 300 - 30 <= times[-1] < 300
    drawn = [fault for plan in plans for fault in plan]
    assert {fault.kind for fault in drawn} == set(ALL)
    assert {fault.victim for fault in drawn} == {0, 1, 2, 3}
    stops = [fault.lasts_s for fault in drawn if fault.kind in LASTING]
    assert all(SHORT_STOP_S[0] <= s <= SHORT_STOP_S[1] or LONG_STOP_S[0] <= s <= LONG_STOP_S[1] for s in stops)
    assert min(stops) < LIMITS.red_after_s < max(stops)
    assert {fault.lasts_s for fault in drawn if fault.kind not in LASTING} == {0.0}


def test_what_a_plan_is_stays_the_same_on_every_machine() -> None:
    """Somebody else repeats it by its seed."""
    (first, *_) = faults(7, for_s=60, every_s=20, kinds=KILL_STOP_RESTART, victims=4)
    assert first == Fault(at_s=16.48, kind="kill", victim=2, lasts_s=0.0)


def test_other_kinds_come_at_the_same_times_to_the_same_victims() -> None:
    both, one = (faults(3, for_s=200, every_s=10, kinds=kinds, victims=3) for kinds in (ALL, ("stop",)))
    assert [(f.at_s, f.victim) for f in both] == [(f.at_s, f.victim) for f in one]


def test_windows_are_drawn_within_the_time() -> None:
    assert windows(1, for_s=100, count=3) == windows(1, for_s=100, count=3)
    for seed in range(20):
        drawn = windows(seed, for_s=100, count=3)
        assert list(drawn) == sorted(drawn)
        assert all(0 <= at_s < 100 for at_s in drawn)


def test_durations_are_read_with_their_unit() -> None:
    assert [parse_duration("--for", text) for text in ("90", "20s", "5m", "1.5h")] == [90, 20, 300, 5400]
    for text in ("", "0", "-3s", "5 days", "s", "nan"):
        with pytest.raises(UsageError, match="--for takes a duration"):
            parse_duration("--for", text)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--for", "soon", "--for takes a duration"),
        ("--kill-every", "0s", "--kill-every takes a duration"),
        ("--kill-every", "6m", "--kill-every 6m is too rare for --for 5m"),
        ("--for", "19s", "--kill-every 20s is too rare for --for 19s"),
        ("--for", "9s", "is too rare for --for 9s"),
        ("--faults", "kill,flood", "--faults takes some of kill, stop, restart, partition"),
        ("--faults", ",", "--faults takes some of"),
        ("--faults", "partition", "needs a network that was started with `dcnr up --cuttable`"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(
    option: str,
    value: str,
    said: str,
    tmp_path: Path,
    process: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    record(tmp_path, process)
    with up_note("127.0.0.1:1", tmp_path):
        result = CliRunner().invoke(app, ["chaos", "--session", "x", option, value])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
    assert value in result.stderr


# --- whom it may touch -------------------------------------------------------------------------------------


WAITING = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Its command line is that of a child of `dcnr up`."""
    with subprocess.Popen([*WAITING, "dcnr.cli.main", "--home", str(tmp_path)], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def record(folder: Path, process: subprocess.Popen[bytes], switch: str = "", **changed: Any) -> None:
    child = {
        "name": "pnode-0",
        "pid": process.pid,
        "process_created": psutil.Process(process.pid).create_time(),
        "ready": True,
        "home": str(folder),
        "peer": "p",
        "address": "127.0.0.1:1",
    }
    written = {"parent": os.getpid(), "switch": switch, "children": [child | changed]}
    (folder / "processes.json").write_text(json.dumps(written))


def struck(striking: Hand, fault: Fault, now_s: float = 0.0) -> tuple[str, str]:
    victim, skipped = striking.strike(fault, now_s)
    return victim.name, skipped


def test_a_process_that_is_not_what_the_record_says_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(WAITING, stdin=subprocess.PIPE) as other, hand(tmp_path, os.getpid()) as striking:
        record(tmp_path, other)
        assert struck(striking, KILL) == ("pnode-0", "it was dead already")
        assert other.poll() is None
        other.kill()


def test_a_process_is_known_by_its_start_parent_and_command_line(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    record(tmp_path, process)
    (victim,) = read_processes(tmp_path, os.getpid()).pnodes
    assert victim.process() is not None
    assert replace(victim, parent=1).process() is None
    record(tmp_path, process, process_created=psutil.Process(process.pid).create_time() - 5)
    assert read_processes(tmp_path, os.getpid()).pnodes[0].process() is None
    record(tmp_path, process, home=str(tmp_path / "other"))
    assert read_processes(tmp_path, os.getpid()).pnodes[0].process() is None
    with pytest.raises(Unavailable, match="expected `dcnr up`, process 1"):
        read_processes(tmp_path, 1)
    process.kill()
    process.wait()
    assert victim.process() is None


def test_who_is_stopped_goes_on_at_the_end_whatever_happens(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    record(tmp_path, process)

    def interrupted() -> None:
        with hand(tmp_path, os.getpid()) as striking:
            assert struck(striking, STOP, 1.0) == ("pnode-0", "")
            os.waitpid(process.pid, os.WUNTRACED)
            assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
            assert struck(striking, STOP, 2.0) == ("pnode-0", "it was stopped already")
            assert striking.undo(9.9) == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    os.waitpid(process.pid, os.WCONTINUED)
    assert psutil.Process(process.pid).status() != psutil.STATUS_STOPPED


def test_a_process_that_is_not_ready_is_let_start(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    with hand(tmp_path, os.getpid()) as striking:
        record(tmp_path, process, ready=False)
        assert struck(striking, KILL) == ("pnode-0", "it was not back yet")
        assert process.poll() is None
        record(tmp_path, process)
        assert struck(striking, KILL) == ("pnode-0", "")
        assert process.wait() == -signal.SIGKILL


def test_who_is_cut_off_can_be_reached_again_at_the_end(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    switch = Switch()
    switch.start()
    host, _, port = switch.address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = f"127.0.0.1:{listening.getsockname()[1]}"
        record(tmp_path, process, switch.address, address=target)
        with hand(tmp_path, os.getpid()) as striking:
            assert struck(striking, PARTITION, 1.0) == ("pnode-0", "")
            dialled = socket.create_connection((host, int(port)), 20.0)
            dialled.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert striking.undo(9.9) == []
            cut(switch.address, "another", "127.0.0.1:1").close()  # Answered after what was asked before.
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()
            assert striking.undo(10.0) == ["pnode-0 can be reached again"]
        with dialled:
            assert dialled.recv(99) == b"HTTP/1.1 200 OK\r\n\r\n"
    switch.stop()


def test_beyond_the_pnodes_the_victim_is_the_owner(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    record(tmp_path, process)
    written = json.loads((tmp_path / "processes.json").read_text())
    (child,) = written["children"]
    for number in range(2):
        written["children"].insert(0, child | {"name": f"orchestrator-{number}", "address": f"127.0.0.1:{number}"})
    (tmp_path / "processes.json").write_text(json.dumps(written))
    processes = read_processes(tmp_path, os.getpid())
    named = [processes.victim(number, owner).name for number, owner in ((0, "127.0.0.1:0"), (1, "127.0.0.1:0"))]
    assert named == ["pnode-0", "orchestrator-0"]
    assert processes.victim(1, "127.0.0.1:1").name == "orchestrator-1"
    assert processes.victim(1, "elsewhere:1") in processes.orchestrators


def test_a_network_that_cannot_be_cut_is_not_cut_unasked() -> None:
    assert parse_kinds(None, cuttable=False) == KILL_STOP_RESTART
    assert parse_kinds(None, cuttable=True) == ALL
    assert parse_kinds("partition, stop", cuttable=True) == ("partition", "stop")


def test_without_a_network_of_its_own_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["chaos", "--session", "x"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "`dcnr up` is not running" in result.stderr
    with up_note("127.0.0.1:1", tmp_path):
        result = CliRunner().invoke(app, ["chaos", "--session", "x"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "processes.json") in result.stderr


def test_a_seed_without_a_fault_is_refused(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    record(tmp_path, process)
    seed = next(s for s in range(99) if not faults(s, for_s=20.0, every_s=20.0, kinds=KILL_STOP_RESTART, victims=2))
    with up_note("127.0.0.1:1", tmp_path):
        result = CliRunner().invoke(app, ["chaos", "--session", "x", "--for", "20s", "--seed", str(seed)])
    assert result.exit_code == 2
    assert f"(seed {seed})" in result.stderr


def test_an_unknown_session_is_told_of_before_a_plan(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(wiring, "connect", lambda address: contextlib.nullcontext(NothingThere()))
    record(tmp_path, process)
    with up_note("127.0.0.1:1", tmp_path):
        result = CliRunner().invoke(app, ["chaos", "--session", "nobody"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: no session 'nobody'\n"


class NothingThere:
    def session(self, name: str) -> Run:
        raise UnknownName(f"no session {name!r}")


def test_two_hands_at_once_are_one_too_many(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    """Neither could tell what it has done. Whoever comes after the first has ended, or was killed, may."""
    record(tmp_path, process)
    for _ in range(2):
        with hand(tmp_path, os.getpid()) as first:
            with pytest.raises(Unavailable, match="another `dcnr chaos` is at work"), hand(tmp_path, os.getpid()):
                pass
            assert first.undo() == []


# --- the report --------------------------------------------------------------------------------------------


def done(step: int) -> StepDone:
    return StepDone(step=step, loss=1.0, learning_rate=0.1, grad_scale=1.0, tokens=1)


def placed(base_step: int) -> Placed:
    return Placed(index=9, base_step=base_step, window=1, vnodes={}, why={}, numeric_class="")


def row(at_s: float, done_before: int, kind: str = "kill", skipped: str = "") -> Row:
    fault = Fault(at_s=at_s, kind=kind, victim=0, lasts_s=0.0)
    return Row(fault=fault, name="pnode-0", at_s=at_s, done_before=done_before, skipped=skipped)


def verdict(*, equal: bool = True) -> Verdict:
    return Verdict(
        session="s", base_step=20, last_step=40, commits=(40,), equal=equal, sha256_network="a", sha256_recomputed="a",
        differences=() if equal else ("step 33 differs",),
    )  # fmt: skip


def told(report: Report, events: list[tuple[float, SessionEvent]]) -> list[list[Row]]:
    return [report.take(now_s, event) for now_s, event in events]


def test_regain_is_counted_to_the_step_that_was_running_when_the_loss_was_noticed() -> None:
    """A step that was all but done comes right after the kill: it says nothing about the recovery."""
    report = Report(step=10)
    report.add(row(100.0, 10))
    told(report, [(100.25, done(11)), (101.0, placed(5)), (104.5, done(12)), (105.0, done(13))])
    (only,) = report.rows
    assert (only.next_step_s, only.regain_s, only.lost_step) == (0.25, 4.5, 11)
    assert (report.waiting, report.went_on, report.step) == (False, True, 13)


def test_a_fault_that_moves_nothing_has_regained_with_the_next_step() -> None:
    report = Report(step=10)
    report.add(row(100.0, 10, "stop"))
    assert report.waiting
    assert told(report, [(103.0, done(11)), (104.0, done(12))]) == [[report.rows[0]], []]
    assert (report.rows[0].next_step_s, report.rows[0].regain_s) == (3.0, 3.0)


def test_a_step_that_was_on_its_way_is_no_regain() -> None:
    """An orchestrator's last words, say: nothing that comes later would take them back."""
    report = Report(step=10)
    report.add(row(100.0, 10))
    assert told(report, [(100.01, done(11)), (100.05, done(12)), (103.0, done(13))]) == [[], [], [report.rows[0]]]
    (only,) = report.rows
    assert (only.done_before, only.next_step_s, only.regain_s) == (12, 3.0, 3.0)


def test_a_second_fault_during_the_recovery_keeps_both_waiting() -> None:
    report = Report(step=10)
    report.add(row(100.0, 10))
    told(report, [(101.0, placed(5))])
    report.add(row(102.0, 10))
    told(report, [(103.0, placed(5)), (106.0, done(11))])
    assert [r.regain_s for r in report.rows] == [6.0, 4.0]


def test_all_is_well_only_if_everything_is() -> None:
    report = Report(step=10, verdicts=[verdict()])
    report.add(row(100.0, 10))
    told(report, [(103.0, done(11))])
    assert list(report.complaints()) == []
    assert report.to_json()["holds"] is True


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda report: report.rows.clear(), "no fault was done"),
        (lambda report: report.rows.__setitem__(0, row(1.0, 10, skipped="it was dead already")), "no fault was done"),
        (lambda report: report.add(row(104.0, 11)), "did not go on after kill of pnode-0 at 104.0 s"),
        (lambda report: report.take(105.0, done(14)), "steps were lost: 12, 13"),
        (lambda report: report.verdicts.clear(), "no steps were recomputed"),
        (lambda report: report.verdicts.append(verdict(equal=False)), "steps 21 to 40 differ .*: step 33 differs"),
        (lambda report: report.problems.append("the session ended: stopped"), "the session ended: stopped"),
    ],
)
def test_everything_that_is_not_as_promised_is_a_complaint(spoil: Any, said: str) -> None:
    report = Report(step=10, verdicts=[verdict()])
    report.add(row(100.0, 10))
    told(report, [(103.0, done(11))])
    spoil(report)
    (complaint,) = report.complaints()
    assert re.search(said, complaint)
    assert report.to_json()["holds"] is False


def test_a_session_that_finished_need_not_go_on() -> None:
    report = Report(step=10, verdicts=[verdict()])
    report.add(row(100.0, 11))
    told(report, [(103.0, Finished(step=11, loss=1.0))])
    assert list(report.complaints()) == []


def test_the_table_has_a_line_for_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(step=10, verdicts=[verdict()])
    report.add(row(100.0, 10))
    told(report, [(101.0, placed(5)), (104.5, done(11))])
    report.add(row(120.0, 11, skipped="it was not back yet"))
    report.add(Row(fault=STOP, name="pnode-1", at_s=130.0, done_before=11, idle=True))
    told(report, [(130.5, done(12))])
    assert list(report.table()) == [
        ("100.0 s", "kill", "pnode-0", "10", "4.50 s", "4.50 s", "placed anew"),
        ("120.0 s", "kill", "pnode-0", "11", "-", "-", "it was not back yet"),
        ("130.0 s", "stop 9 s", "pnode-1", "11", "0.50 s", "0.50 s", "idle"),
    ]
    show(report, {}, False)
    printed = capsys.readouterr().out
    assert "steps 21 to 40: equal, bit by bit" in printed
    assert "every bit is equal" in printed
