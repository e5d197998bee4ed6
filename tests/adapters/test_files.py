import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcnr.adapters.files import HomeFolder
from dcnr.errors import Unavailable
from dcnr.ids import SessionId, Sha256

SESSION = SessionId("0123abc")
DATA = b"weights"
SHA256 = Sha256(hashlib.sha256(DATA).hexdigest())


def test_the_name_stays_and_every_start_counts(tmp_path: Path) -> None:
    first = HomeFolder(tmp_path / "home")
    first.close()
    second = HomeFolder(tmp_path / "home")
    second.close()
    assert second.peer == first.peer
    assert len(first.peer) == 32
    assert (first.incarnation.boot, second.incarnation.boot) == (1, 2)
    assert first.incarnation.nonce != second.incarnation.nonce


def test_a_second_process_is_refused_by_the_first_ones_pid(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    script = "import sys; from pathlib import Path; from dcnr.adapters.files import HomeFolder; HomeFolder(Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"is in use by process {os.getpid()}" in second.stderr
    home.close()
    assert HomeFolder(tmp_path).incarnation.boot == 2, "a refused start counts no boot"


def test_a_damaged_boot_counter_is_not_counted_anew(tmp_path: Path) -> None:
    HomeFolder(tmp_path).close()
    (tmp_path / "boot").write_text("garbage")
    with pytest.raises(Unavailable, match="cannot be used"):
        HomeFolder(tmp_path)


def test_what_is_persisted_is_whole_and_there_again(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    assert home.load("fence.json") is None
    home.persist("fence.json", b"one")
    home.persist("fence.json", b"two")
    assert home.load("fence.json") == b"two"
    assert not list(tmp_path.glob(".fence*")), "no temporary file is left"


def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = HomeFolder(tmp_path)
    home.persist("fence.json", b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        home.persist("fence.json", b"two")
    assert home.load("fence.json") == b"one"
    assert not list(tmp_path.glob(".fence*"))


@pytest.mark.parametrize(
    "key", ["../x", "a/b", "", ".hidden", "lock", "boot", "peer_id", "snapshots", "guarded", "a\0b"]
)
def test_names_cannot_leave_the_home_or_overwrite_its_own(tmp_path: Path, key: str) -> None:
    home = HomeFolder(tmp_path)
    with pytest.raises(ValueError, match="name"):
        home.persist(key, b"")
    if key not in ("lock", "boot", "peer_id", "snapshots", "guarded"):
        with pytest.raises(ValueError, match="plain name"):
            home.keep_snapshot(SessionId(key), SHA256, DATA)


def test_snapshots_are_kept_checked_and_discarded(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    other = Sha256(hashlib.sha256(b"other").hexdigest())
    assert home.snapshot(SESSION, SHA256) is None
    home.keep_snapshot(SESSION, SHA256, DATA)
    home.keep_snapshot(SESSION, other, b"other")
    home.discard_snapshots(SESSION, frozenset([SHA256]))
    assert home.snapshot(SESSION, SHA256) == DATA
    assert home.snapshot(SESSION, other) is None
    home.discard_snapshots(SESSION, frozenset())
    assert not (tmp_path / "snapshots" / SESSION).exists()


def test_a_damaged_snapshot_is_deleted(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    home.keep_snapshot(SESSION, SHA256, DATA)
    path = tmp_path / "snapshots" / SESSION / f"{SHA256}.safetensors"
    path.write_bytes(b"weight5")
    assert home.snapshot(SESSION, SHA256, checked=False) == b"weight5", "whoever takes it hashes it"
    assert home.snapshot(SESSION, SHA256) is None
    assert not path.exists()


def test_what_is_kept_for_others_lies_apart_and_is_checked(tmp_path: Path) -> None:
    home = HomeFolder(tmp_path)
    other = Sha256(hashlib.sha256(b"other").hexdigest())
    assert home.guarded(SESSION, SHA256) is None
    home.keep_guarded(SESSION, SHA256, DATA)
    home.keep_guarded(SESSION, other, b"other")
    home.keep_snapshot(SESSION, other, b"other")
    assert home.snapshot(SESSION, SHA256) is None
    home.discard_guarded(SESSION, frozenset([SHA256]))
    assert home.guarded(SESSION, SHA256) == DATA
    assert home.guarded(SESSION, other) is None
    assert home.snapshot(SESSION, other) == b"other"
    path = tmp_path / "guarded" / SESSION / f"{SHA256}.safetensors"
    path.write_bytes(DATA + b"!")
    assert home.guarded(SESSION, SHA256) is None
    assert not path.exists()
    home.discard_guarded(SESSION, frozenset())
    assert not path.parent.exists()
    home.discard_snapshots(SESSION, frozenset([other]))
    assert home.snapshot(SESSION, other) == b"other"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\0b"])
def test_what_is_kept_for_others_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    home = HomeFolder(tmp_path)
    with pytest.raises(ValueError, match="name"):
        home.keep_guarded(SessionId(name), SHA256, DATA)
    with pytest.raises(ValueError, match="name"):
        home.keep_guarded(SESSION, Sha256(name), DATA)
