"""Where the network is: ``--network``, ``DCNR_NETWORK``, else the one that ``dcnr up`` runs on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcnr.errors import Unreachable

if TYPE_CHECKING:
    from dcnr.client.blocking import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class UpNote:
    """What ``dcnr up`` leaves for the other commands: where its orchestrators are, its own process id, its home."""

    address: str
    """Of all orchestrators, separated by commas."""
    pid: int
    home: Path


def state_folder() -> Path:
    """The user's state folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dcnr"


def read_up_note() -> UpNote | None:
    """``None`` where there is none, or where its process is gone (it was killed and could not clean up)."""
    import psutil

    try:
        note = json.loads((state_folder() / "up.json").read_text())
        address, pid, created = str(note["address"]), int(note["pid"]), float(note["process_created"])
        home = Path(note["home"])
        # A process id is used again sooner or later; together with the process's start it is not.
        if abs(psutil.Process(pid).create_time() - created) > 1.0:
            return None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return UpNote(address=address, pid=pid, home=home)


@contextmanager
def up_note(address: str, home: Path) -> Iterator[None]:
    """Tell the other commands about this process's network for as long as the block runs."""
    import psutil

    path = state_folder() / "up.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {
        "address": address,
        "pid": os.getpid(),
        "process_created": psutil.Process().create_time(),
        "home": str(home.resolve()),
    }
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(note))
    fresh.replace(path)
    try:
        yield
    finally:
        current = read_up_note()
        if current is not None and current.pid == os.getpid():
            path.unlink(missing_ok=True)


def find_network(given: str | None) -> str:
    """Raises :class:`Unreachable` where nothing says where the network is."""
    if given:
        return given
    note = read_up_note()
    if note is None:
        raise Unreachable("no network is named and `dcnr up` is not running on this machine")
    return note.address


def open_client(given: str | None) -> Client:
    """A client of the network that :func:`find_network` finds."""
    from dcnr.wiring import connect

    return connect(find_network(given))
