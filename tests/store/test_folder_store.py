"""The folder store: the contract, and what only real files, processes and kills can show."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcnr.adapters.store import folder as store_module
from dcnr.adapters.store import opening
from dcnr.adapters.store.folder import FolderStore
from dcnr.errors import (
    AlreadyExists,
    CorruptObject,
    NotFound,
    NotInThisVersion,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from dcnr.runtime.ports import Store
from tests.contracts.store_contract import StoreContract, Stream, sha256_of


def open_store(url: str) -> Store:
    return asyncio.run(opening.open_store(url, {}))


def opened(path: Path) -> FolderStore:
    store = open_store(str(path))
    assert isinstance(store, FolderStore)
    return store


def strays(path: Path) -> list[str]:
    return os.listdir(path / ".tmp")


class TestFolderStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store((tmp_path / "store").as_uri())

    def test_it_has_no_addresses_to_sign(self, store: Store) -> None:
        assert asyncio.run(store.signed_get("a", 60.0)) is None


class TestOpening:
    def test_a_store_has_one_id_for_ever(self, tmp_path: Path) -> None:
        first = opened(tmp_path / "deep" / "er")
        identity = first.get_now("store.json")
        assert re.fullmatch(rb'{"format":1,"id":"[0-9a-f]{32}"}', identity)
        again = open_store((tmp_path / "deep" / "er").as_uri())
        assert asyncio.run(again.get("store.json")) == identity
        assert again.url == first.url == (tmp_path / "deep" / "er").as_uri()
        assert opened(tmp_path / "other").get_now("store.json") != identity

    def test_a_url_may_have_escapes(self, tmp_path: Path) -> None:
        open_store((tmp_path / "with space").as_uri())
        assert (tmp_path / "with space" / "store.json").is_file()

    @pytest.mark.parametrize("url", ["http://host/x", "memory://x"])
    def test_other_kinds_are_not_in_this_version(self, url: str) -> None:
        with pytest.raises(NotInThisVersion, match="not in this version"):
            open_store(url)

    def test_two_slashes_are_a_mistake(self) -> None:
        with pytest.raises(StoreError, match="three slashes"):
            open_store("file://home/me")

    def test_a_file_in_the_way_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreUnavailable, match=str(tmp_path / "file")):
            open_store(str(tmp_path / "file"))
        with pytest.raises(StoreUnavailable, match=str(tmp_path / "file")):
            open_store(str(tmp_path / "file" / "store"))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission_is_named(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(StoreUnavailable, match=r"(?s)Permission denied.*store"):
            open_store(str(tmp_path / "store"))

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that not even root can write")
    def test_a_place_that_takes_no_folders_is_named(self) -> None:
        with pytest.raises(StoreUnavailable, match=r"cannot be opened: No such file or directory \(/proc/store"):
            open_store("/proc/store")

    def test_a_damaged_identity_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "store.json").write_text("{}")
        with pytest.raises(CorruptObject, match=r"store\.json"):
            open_store(str(tmp_path))

    def test_a_later_format_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "store.json").write_text('{"format":2,"id":"x"}')
        with pytest.raises(StoreUnavailable, match="format 2"):
            open_store(str(tmp_path))

    def test_a_place_where_two_creators_win_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "exists", lambda self: False)
        monkeypatch.setattr(os, "link", os.replace)
        with pytest.raises(StoreUnavailable, match="two creators"):
            open_store(str(tmp_path))


class TestTrouble:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
    def test_a_failed_write_says_why_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        store = opened(tmp_path)

        def fail(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StoreUnavailable, match=os.strerror(code)) as caught:
                store.create_now("a/b", b"data")
        assert str(tmp_path) in str(caught.value)
        assert isinstance(caught.value, StoreFull) == (code == errno.ENOSPC)
        assert strays(tmp_path) == []
        with pytest.raises(NotFound):
            store.get_now("a/b")
        store.create_now("a/b", b"data")
        assert store.get_now("a/b") == b"data"

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_a_stream_whose_write_fails_says_why_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        store = opened(tmp_path)
        data = b"data"

        def fail(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        async def scenario() -> None:
            with monkeypatch.context() as patch:
                await store.create("a/a", b"")  # So that the folder needs no fsync of its own.
                patch.setattr(os, "fsync", fail)
                with pytest.raises(StoreUnavailable, match=os.strerror(code)):
                    await store.create_from("a/b", Stream(data), sha256_of(data))
            assert strays(tmp_path) == []
            assert await store.list("a/") == ["a/a"]
            await store.create_from("a/b", Stream(data), sha256_of(data))

        asyncio.run(scenario())

    def test_a_disk_that_fills_up_in_the_middle_of_a_stream_leaves_nothing(self, tmp_path: Path) -> None:
        """The limit on a file's size is a disk that is full to one process."""
        store = opened(tmp_path)
        chunks = [bytes([n]) * (1 << 20) for n in range(4)]
        stream = Stream(*chunks)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        async def scenario() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((1 << 20) + 1000, before[1]))
            try:
                with pytest.raises(StoreUnavailable, match=r"too large.*a/b"):
                    await store.create_from("a/b", stream, sha256_of(b"".join(chunks)))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert len(stream.left) == 2, "what comes after the failure is not read"
            assert strays(tmp_path) == []
            assert await store.list("a/") == []

        asyncio.run(scenario())

    @pytest.mark.parametrize("failure", [ConnectionError("gone"), asyncio.CancelledError(), None])
    def test_a_stream_that_breaks_off_or_is_not_its_name_leaves_no_file(
        self, tmp_path: Path, failure: BaseException | None
    ) -> None:
        store = opened(tmp_path)

        async def scenario() -> None:
            with pytest.raises(CorruptObject if failure is None else type(failure)):
                await store.create_from("a/b", Stream(b"x", failure=failure), sha256_of(b"xy"))
            assert strays(tmp_path) == []

        asyncio.run(scenario())

    @pytest.mark.parametrize("step", ["_temporary_file", "_publish"])
    def test_a_writer_cancelled_while_the_disk_works_waits_and_leaves_no_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        store = opened(tmp_path)
        working, go_on = threading.Event(), threading.Event()
        lock, sync_file = store_module._lock, store_module.sync_file

        def slow(descriptor: int, **options: bool) -> None:
            working.set()
            assert go_on.wait(60)
            (lock if options else sync_file)(descriptor, **options)

        async def scenario() -> None:
            await store.create("a/a", b"")
            monkeypatch.setattr(store_module, "_lock" if step == "_temporary_file" else "sync_file", slow)
            writer = asyncio.create_task(store.create_from("a/b", Stream(b"x"), sha256_of(b"x")))
            assert await asyncio.to_thread(working.wait, 60)
            writer.cancel()
            await asyncio.sleep(0)
            assert not writer.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await writer
            assert strays(tmp_path) == []
            # Once the bytes were checked, the thread goes through with it: a whole object or none.
            assert await store.list("a/") == (["a/a", "a/b"] if step == "_publish" else ["a/a"])

        asyncio.run(scenario())

    def test_a_name_that_is_taken_costs_no_byte_of_the_stream(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        stream = Stream(b"x")
        store.create_now("a", b"x")

        async def scenario() -> None:
            with pytest.raises(AlreadyExists):
                await store.create_from("a", stream, sha256_of(b"x"))

        asyncio.run(scenario())
        assert stream.left == [b"x"]

    def test_without_hard_links_it_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(source: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", fail)
        with pytest.raises(StoreUnavailable, match="hard links"):
            open_store(str(tmp_path))

    def test_a_root_that_is_gone_is_not_an_empty_store(self, tmp_path: Path) -> None:
        store = opened(tmp_path / "store")
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").mkdir()
        for call in (
            lambda: store.create_now("a/b", b""),
            lambda: store.get_now("a"),
            lambda: store.size_now("a"),
            lambda: asyncio.run(store.create_from("a/b", Stream(), sha256_of(b""))),
            lambda: store.put_hint_now("a/b", b""),
            lambda: store.list_now(""),
        ):
            with pytest.raises(StoreUnavailable, match="is gone"):
                call()
        assert list((tmp_path / "store").iterdir()) == []

    def test_an_object_is_no_folder_of_others(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        store.create_now("a", b"")
        with pytest.raises(StoreError, match="object already"):
            store.create_now("a/b", b"")
        store.create_now("c/d", b"")
        with pytest.raises(StoreError, match="prefix") as caught:
            store.create_now("c", b"")
        assert not isinstance(caught.value, AlreadyExists)

    def test_the_order_of_durability(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bytes before the name, the name before success, every new folder's entry before its content's."""
        store = opened(tmp_path)
        trace: list[str] = []
        fsync, link = os.fsync, os.link

        def traced_fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            trace.append("sync bytes" if path.parent.name == ".tmp" else f"sync {path.relative_to(tmp_path)}/")
            fsync(descriptor)

        def traced_link(source: Path, target: Path) -> None:
            trace.append(f"link {target.relative_to(tmp_path)}")
            link(source, target)

        if not Path("/proc/self/fd").is_dir():
            pytest.skip("names of open files come from /proc")
        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "link", traced_link)
        store.create_now("a/b/c", b"1")
        assert trace == ["sync ./", "sync a/", "sync bytes", "link a/b/c", "sync a/b/"]
        trace.clear()
        with pytest.raises(AlreadyExists):
            store.create_now("a/b/c", b"2")
        assert trace == ["sync a/b/"]
        trace.clear()
        asyncio.run(store.create_from("a/d/e", Stream(b"1", b"2"), sha256_of(b"12")))
        assert trace == ["sync a/", "sync bytes", "link a/d/e", "sync a/d/"]
        trace.clear()
        with pytest.raises(AlreadyExists):
            asyncio.run(store.create_from("a/d/e", Stream(b"2"), sha256_of(b"2")))
        assert trace == ["sync a/d/"]


# --- processes ---------------------------------------------------------------------------------------------


PRELUDE = """
import asyncio, os, signal, sys
from dcnr.adapters.store.opening import open_store
from dcnr.errors import AlreadyExists
def say(text):
    print(text, flush=True)
store = asyncio.run(open_store(sys.argv[1], {}))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    children: list[subprocess.Popen[str]] = []

    def begin(script: str, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(tmp_path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


STOP_AT = {
    "before the bytes are synced": "os.fsync = lambda fd: stop()",
    "before the link": "os.link = lambda a, b: stop()",
    "after the link": "link = os.link\nos.link = lambda a, b: (link(a, b), stop())",
}


class TestKilled:
    @pytest.mark.parametrize("point", STOP_AT)
    def test_at_any_point_an_object_is_whole_or_absent(self, tmp_path: Path, start: object, point: str) -> None:
        opened(tmp_path).create_now("log/1", b"")  # So that the folder needs no fsync of its own.
        child = start(  # type: ignore[operator]
            "def stop():\n    say('stopped')\n    signal.pause()\n"
            "store._make_folder(store.root / 'log')\n"
            + STOP_AT[point]
            + "\nstore.create_now('log/2', b'x' * 1000000)\n"
        )
        assert line(child) == "stopped"
        assert len(strays(tmp_path)) == 1
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        store = opened(tmp_path)
        assert strays(tmp_path) == []
        if point == "after the link":
            assert store.get_now("log/2") == b"x" * 1000000
            with pytest.raises(AlreadyExists):
                store.create_now("log/2", b"other")
        else:
            assert store.list_now("log/") == ["log/1"]
            store.create_now("log/2", b"other")
            assert store.get_now("log/2") == b"other"

    def test_in_the_middle_of_a_stream_nothing_can_be_seen(self, tmp_path: Path, start: object) -> None:
        child = start(  # type: ignore[operator]
            "import asyncio\n"
            "async def chunks():\n"
            "    yield b'x' * 1000000\n"
            "    say('stopped')\n"
            "    signal.pause()\n"
            "asyncio.run(store.create_from('a/b', chunks(), '0' * 64))\n"
        )
        assert line(child) == "stopped"
        assert len(strays(tmp_path)) == 1
        assert opened(tmp_path).list_now("a/") == []
        assert len(strays(tmp_path)) == 1, "a living writer's file is left alone"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        store = opened(tmp_path)
        assert strays(tmp_path) == []
        assert store.list_now("a/") == []

    def test_what_was_acknowledged_is_there(self, tmp_path: Path, start: object) -> None:
        child = start(  # type: ignore[operator]
            "import hashlib\n"
            "for n in range(100000):\n"
            "    data = str(n).encode() * 50000\n"
            "    key = 'objects/' + hashlib.sha256(data).hexdigest()\n"
            "    store.create_now(key, data)\n"
            "    say(key)\n"
        )
        acknowledged = [line(child) for _ in range(25)]
        os.kill(child.pid, signal.SIGKILL)
        store = opened(tmp_path)
        present = store.list_now("objects/")
        assert set(acknowledged) <= set(present)
        for key in present:
            assert hashlib.sha256(store.get_now(key)).hexdigest() == key.removeprefix("objects/")


class TestTwoWriters:
    def test_exactly_one_wins_each_name(self, tmp_path: Path, start: object) -> None:
        script = (
            "sys.stdin.readline()\n"
            "for n in range(200):\n"
            "    try:\n"
            "        store.create_now(f'log/{n:020}', sys.argv[2].encode() * 1000)\n"
            "        say(n)\n"
            "    except AlreadyExists:\n"
            "        pass\n"
            "say('end')\n"
        )
        writers = {name: start(script, name) for name in "ab"}  # type: ignore[operator]
        for child in writers.values():
            child.stdin.write("go\n")
            child.stdin.flush()
        won = {name: set(child.stdout.read().split()) - {"end"} for name, child in writers.items()}
        assert won["a"] | won["b"] == {str(n) for n in range(200)}
        assert not won["a"] & won["b"]
        store = opened(tmp_path)
        for name, numbers in won.items():
            for number in numbers:
                assert store.get_now(f"log/{int(number):020}") == name.encode() * 1000

    def test_a_starting_process_does_no_harm_to_a_writer(self, tmp_path: Path, start: object) -> None:
        opened(tmp_path)
        child = start(  # type: ignore[operator]
            "for n in range(300):\n"
            "    store.create_now(f'objects/{n}', bytes([n % 256]) * 100000)\n"
            "    store.put_hint_now('hint', b'hint')\n"
            "say('end')\n"
        )
        while child.poll() is None:
            opened(tmp_path)
        assert line(child) == "end"
        store = opened(tmp_path)
        for n in range(300):
            assert store.get_now(f"objects/{n}") == bytes([n % 256]) * 100000
