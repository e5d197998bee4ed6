"""What ``--log-dir`` keeps, whatever ends the follower."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from dcnr.adapters.tensorboard import EventFile
from dcnr.cli.log_dir import SessionLog
from dcnr.cli.main import app
from dcnr.cli.training import follow_or_detach
from dcnr.client.blocking import Run
from dcnr.errors import InvalidData, ProtocolError, Unavailable
from dcnr.ids import SessionId
from dcnr.session.events import (
    CheckpointCommitted,
    Evaluated,
    Finished,
    Placed,
    PNodeLost,
    SessionEvent,
    StepDone,
    Stopped,
    VNodeMoved,
)
from tests.adapters.event_files import points


def step(number: int) -> StepDone:
    metrics = {"loss": 0.125 * number} if number == 2 else {}
    return StepDone(step=number, loss=1.0 / number, learning_rate=0.25, grad_scale=0.5, tokens=100, metrics=metrics)


EVENTS: list[SessionEvent] = [
    step(1),
    PNodeLost(peer="p", reason="größer", vnodes=("a", "b")),
    VNodeMoved(vnode="a", source="p", target="q", index=4, why="half the work"),
    step(2),
    CheckpointCommitted(step=2, manifest="m", index=5, size_bytes=7),
    Evaluated(step=2, loss=0.75, rows=8),
    step(3),
    Finished(step=3, loss=1 / 3),
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes at every look: 100 tokens a step are 100 tokens per second."""
    seconds: Iterator[int] = count(1000)
    monkeypatch.setattr("dcnr.cli.display.time.monotonic", lambda: float(next(seconds)))


def write(folder: Path, events: list[SessionEvent]) -> int:
    """Follow with these events; returns the step after which they were asked for."""
    with SessionLog(folder, "s") as log:
        after = log.last_step
        assert list(log.record(events)) == events
    return after


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "s.jsonl").read_text("utf-8").splitlines()]


def told(events: list[SessionEvent]) -> list[dict[str, Any]]:
    """The events as they look in the file, without the time."""
    return [json.loads(json.dumps({"event": event.kind, **event.data()})) for event in events]


def without_time(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "unix_s"} for line in found]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points(folder):
        found.setdefault(point.tag, []).append((point.step, round(point.value, 5)))
    return found


def test_every_event_is_a_line_and_numbers_are_scalars(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    assert write(folder, EVENTS) == 0
    assert without_time(lines(folder)) == told(EVENTS)
    assert all(isinstance(line["unix_s"], float) for line in lines(folder))
    assert scalars(folder) == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, 0.33333)],
        "train/learning_rate": [(1, 0.25), (2, 0.25), (3, 0.25)],
        "train/grad_scale": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "train/tokens_per_s": [(2, 100.0), (3, 100.0)],
        "validation/loss": [(2, 0.75)],
        "metrics/loss": [(2, 0.25)],
    }


def test_every_event_is_in_the_files_before_it_is_shown(tmp_path: Path) -> None:
    with SessionLog(tmp_path, "s") as log:
        for number, _ in enumerate(log.record(EVENTS), start=1):
            assert len(lines(tmp_path)) == number


def test_following_again_goes_on_after_the_last_step(tmp_path: Path) -> None:
    assert write(tmp_path, EVENTS[:4]) == 0
    assert write(tmp_path, EVENTS[4:]) == 2
    assert without_time(lines(tmp_path)) == told(EVENTS)
    assert [number for number, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_the_end_of_a_session_stands_once_however_often_it_is_followed(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    assert write(tmp_path, EVENTS[-1:]) == 3
    assert without_time(lines(tmp_path)) == told(EVENTS)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_placement_stands_once_and_a_new_one_too(tmp_path: Path) -> None:
    def placed(index: int) -> Placed:
        return Placed(index=index, base_step=0, window=2, vnodes={"a": "p"}, why={"a": "free"}, numeric_class="c")

    write(tmp_path, [placed(2)])
    assert write(tmp_path, [placed(2), step(1), placed(7), placed(7)]) == 0
    assert without_time(lines(tmp_path)) == told([placed(2), step(1), placed(7)])


def test_a_session_that_is_stopped_twice_at_one_step_with_something_between_says_so(tmp_path: Path) -> None:
    events: list[SessionEvent] = [step(1), Stopped(step=1), EVENTS[1], Stopped(step=1)]
    write(tmp_path, events)
    assert without_time(lines(tmp_path)) == told(events)


@pytest.mark.parametrize("cut", [1, 20, 60], ids=lambda n: f"{n} bytes short")
def test_a_line_that_a_kill_cut_off_is_dropped_and_its_step_comes_again(tmp_path: Path, cut: int) -> None:
    write(tmp_path, EVENTS[:4])
    path = tmp_path / "s.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert write(tmp_path, EVENTS[3:]) == 1
    assert without_time(lines(tmp_path)) == told(EVENTS)


def test_sessions_have_lines_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    with SessionLog(tmp_path, "other") as log:
        assert log.last_step == 0


@pytest.mark.parametrize(
    "line",
    [
        *("nonsense", "[1]", "null", '{"step": 3}', '{"event": "step_done", "step": null}'),
        *('{"event": "step_done", "step": 1e999}', "[" * 100_000),
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_not_ours_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, EVENTS[:1])
    path = tmp_path / "s.jsonl"
    text = path.read_text() + line + "\n"
    path.write_text(text)
    with pytest.raises(InvalidData, match=r"s\.jsonl, line 2: found .*expected a JSON object of an event"):
        SessionLog(tmp_path, "s")
    assert path.read_text() == text


def test_two_followers_do_not_write_the_same_lines(tmp_path: Path) -> None:
    with SessionLog(tmp_path, "s"), pytest.raises(Unavailable, match="being written by another follower"):
        SessionLog(tmp_path, "s")
    with SessionLog(tmp_path, "s"):
        pass


def test_a_session_cannot_be_named_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="no name of a file"):
        SessionLog(tmp_path / "logs", "../s")


def test_a_disk_that_is_full_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with SessionLog(tmp_path, "s") as log:
        monkeypatch.setattr(EventFile, "add", full)
        with pytest.raises(Unavailable, match="cannot be written: No space left on device"):
            log.add(step(1))
    assert lines(tmp_path) == []


TRAIN = ("train", "net", "--data", "d", "--steps", "1")


@pytest.mark.parametrize("command", [TRAIN, ("session", "follow", "s")], ids=["train", "follow"])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_trained(
    tmp_path: Path, command: tuple[str, ...], below: str
) -> None:
    """There is no network here: the folder is looked at first."""
    taken = tmp_path / "taken"
    taken.write_text("a file")
    result = CliRunner().invoke(app, [*command, "--log-dir", str(taken / below)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: --log-dir: {taken / below} cannot be written: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [TRAIN, ("session", "follow", "s")], ids=["train", "follow"])
def test_a_folder_that_is_not_there_yet_is_fine(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands get as far as looking for a network."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("DCNR_NETWORK", raising=False)
    result = CliRunner().invoke(app, [*command, "--log-dir", str(tmp_path / "new" / "logs")])
    assert result.exit_code == 1
    assert "dcnr up" in result.stderr
    assert list((tmp_path / "new" / "logs").iterdir()) == []


class Interrupted:
    """A run whose follower presses Ctrl-C after two steps."""

    id = SessionId("s")

    def events(self, after_step: int = 0) -> Iterator[SessionEvent]:
        yield step(after_step + 1)
        yield step(after_step + 2)
        raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my logs"
    for _ in range(2):
        follow_or_detach(cast(Run, Interrupted()), 9, "here:1", json=True, log_dir=folder)
    again = next(line for line in capsys.readouterr().err.splitlines() if "follow it" in line)
    assert shlex.split(again)[2:] == ["dcnr", "session", "follow", "s", "--network", "here:1", "--log-dir", str(folder)]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]


def test_nobody_follows_what_is_detached(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*TRAIN, "--log-dir", str(tmp_path / "logs"), "--detach"])
    assert result.exit_code == 2
    assert "dcnr session follow ID --log-dir DIR" in result.stderr
    assert not (tmp_path / "logs").exists()
