"""Which network a command talks to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dcnr.cli.place import find_network, read_up_note, state_folder, up_note
from dcnr.errors import Unreachable


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_given_address_beats_the_note() -> None:
    with up_note("127.0.0.1:1", Path("home")):
        assert find_network("127.0.0.1:2") == "127.0.0.1:2"
        assert find_network(None) == "127.0.0.1:1"


def test_the_note_lasts_as_long_as_its_network() -> None:
    with up_note("127.0.0.1:1", Path("home")):
        note = read_up_note()
        assert note is not None
        assert note.pid == os.getpid()
        assert note.home == Path("home").resolve()
    with pytest.raises(Unreachable):
        find_network(None)


def test_a_newer_note_is_left_alone() -> None:
    with up_note("127.0.0.1:1", Path("home")):
        path = state_folder() / "up.json"
        other = json.loads(path.read_text()) | {"pid": os.getppid(), "process_created": 0.0}
        path.write_text(json.dumps(other))
    assert json.loads(path.read_text())["pid"] == os.getppid()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"address": "a:1", "pid": 999999999, "process_created": 0, "home": "/"}',
        # This process, but another start of it: the number was used again after a kill.
        json.dumps({"address": "a:1", "pid": os.getpid(), "process_created": 1.0, "home": "/"}),
    ],
    ids=["empty", "no fields", "no object", "gone", "used again"],
)
def test_a_stale_or_broken_note_is_ignored(text: str) -> None:
    state_folder().mkdir(parents=True)
    (state_folder() / "up.json").write_text(text)
    assert read_up_note() is None
