"""A real S3 server (``tools/ceph-s3``): one for all test processes, started by the first that needs it, ended by the last.

Where Ceph is not installed the tests that need it are skipped, and fail where ``REQUIRE_S3`` is set, as in ``.ci/run``.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from tests.sources import ROOT

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw")
START_S = 100.0


@dataclass(frozen=True, slots=True)
class S3Server:
    folder: Path
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return keys() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def kill(self) -> None:
        self._tool("kill")

    def start(self) -> None:
        self._tool("start", str(self.port))

    def stop(self) -> None:
        self._tool("stop")

    def _tool(self, action: str, *more: str) -> None:
        done = subprocess.run(
            [str(ROOT / "tools" / "ceph-s3"), action, str(self.folder), *more],
            timeout=START_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def new_bucket(self) -> str:
        import obstore
        from obstore.store import S3Store

        name = f"bucket-{secrets.token_hex(8)}"
        store = S3Store(
            name,
            endpoint=f"http://127.0.0.1:{self.port}",
            client_options={"allow_http": True},
            access_key_id="access",
            secret_access_key="secret",
            region="us-east-1",
        )
        request = urllib.request.Request(obstore.sign(store, "PUT", "", timedelta(minutes=1)), data=b"", method="PUT")
        with urllib.request.urlopen(request, timeout=60):
            return name

    def unfinished_uploads(self, key: str) -> int:
        """Of an object: no listing shows them. The server keeps a note of each in a pool of its own."""
        notes = subprocess.run(
            ["rados", "-c", str(self.folder / "ceph.conf"), "-p", "default.rgw.buckets.non-ec", "ls"],
            timeout=START_S,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        return sum(f"_multipart_{key}." in note for note in notes)


def keys() -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": "access", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield file.fileno()


def _two_free_ports() -> int:
    """The first of two neighbours: the second is the monitor's."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[S3Server]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed: apt-get install radosgw ceph-mon ceph-osd"
        if os.environ.get("REQUIRE_S3"):
            pytest.fail(reason)
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    common = base if worker_id == "master" else base.parent
    folder, note = common / "s3", common / "s3.port"
    # A shared lock for as long as it is used here, an exclusive one while it starts or ends.
    with (common / "s3.users").open("a") as users:
        with _locked(common / "s3.changing", fcntl.LOCK_EX):
            fcntl.flock(users, fcntl.LOCK_SH)
            if note.exists():
                server = S3Server(folder, int(note.read_text()))
            else:
                server = S3Server(folder, _two_free_ports())
                server.start()
                note.write_text(str(server.port))
        yield server
        with _locked(common / "s3.changing", fcntl.LOCK_EX):
            fcntl.flock(users, fcntl.LOCK_UN)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # The last user ends it.
            server.stop()
            note.unlink()
            shutil.rmtree(folder)


@pytest.fixture
def s3(_server: S3Server) -> Iterator[S3Server]:
    """The server, which nobody kills during this test."""
    with _locked(_server.folder.parent / "s3.whole", fcntl.LOCK_SH):
        yield _server


@pytest.fixture
def s3_alone(_server: S3Server) -> Iterator[S3Server]:
    """The server, which nobody else uses during this test: it may be killed, and runs again at the end."""
    with _locked(_server.folder.parent / "s3.whole", fcntl.LOCK_EX):
        yield _server
        _server.start()
