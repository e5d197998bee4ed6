"""A bucket of a real S3 server: the contract, and what keys, networks and kills do to it."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import itertools
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from dcnr.adapters.grpc.signed import fetch
from dcnr.adapters.store.opening import open_store
from dcnr.adapters.store.s3 import S3Store
from dcnr.config import LIMITS, Limits
from dcnr.dataservice.service import DataService
from dcnr.errors import AlreadyExists, NotFound, Refused, StoreError, StoreFull, StoreUnavailable, Unreachable
from dcnr.ids import Sha256
from dcnr.runtime.ports import Store
from dcnr.session import tokens
from tests.contracts.store_contract import StoreContract, Stream, sha256_of
from tests.proxy import LOSE_ANSWER, REFUSE, SILENT, Fault, Proxy
from tests.s3_server import S3Server, keys

SHORT = replace(LIMITS, store_request_timeout_s=0.5, store_give_up_s=1.0)
PATIENT = replace(LIMITS, store_request_timeout_s=5.0, store_give_up_s=60.0)


@pytest.fixture
def environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.environment


@pytest.fixture
def bucket(s3: S3Server, environment: dict[str, str]) -> str:
    return s3.new_bucket()


def through(proxy: Proxy, bucket: str, limits: Limits = PATIENT) -> S3Store:
    return S3Store(bucket, "p", f"http://127.0.0.1:{proxy.port}", limits)


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, bucket: str, environment: dict[str, str]) -> Store:
        return asyncio.run(open_store(f"s3://{bucket}/some/where", environment))

    def test_two_prefixes_of_a_bucket_are_two_stores(self, bucket: str, environment: dict[str, str]) -> None:
        async def scenario() -> None:
            one = await open_store(f"s3://{bucket}/one", environment)
            two = await open_store(f"s3://{bucket}/two/", environment)
            whole = await open_store(f"s3://{bucket}", environment)
            await one.create("a", b"1")
            await two.create("a", b"2")
            assert (await one.get("a"), await two.get("a")) == (b"1", b"2")
            assert await whole.list("") == ["one/a", "one/store.json", "store.json", "two/a", "two/store.json"]
            assert await one.get("store.json") != await two.get("store.json")
            again = await open_store(f"s3://{bucket}/one", environment)
            assert await again.get("store.json") == await one.get("store.json")

        asyncio.run(scenario())

    def test_a_long_stream_without_its_hash_in_its_name_is_refused(self, store: Store) -> None:
        pieces = [b"x" * (1 << 20)] * 6
        with pytest.raises(StoreError, match="hash in its name"):
            asyncio.run(store.create_from("a/b", Stream(*pieces), sha256_of(b"".join(pieces))))

    def test_an_upload_that_ends_early_leaves_no_parts(self, s3: S3Server, store: Store) -> None:
        """Parts of an upload that nobody ends are in no listing, and are paid for."""
        name = hashlib.sha256(os.urandom(8)).hexdigest()
        under_way: list[int] = []

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(12):
                yield bytes(1 << 20)
            under_way.append(s3.unfinished_uploads(f"some/where/o/{name}"))
            raise ConnectionError

        with pytest.raises(ConnectionError):
            asyncio.run(store.create_from(f"o/{name}", chunks(), Sha256(name)))
        assert under_way == [1]
        assert s3.unfinished_uploads(f"some/where/o/{name}") == 0

    def test_more_streams_than_may_be_sent_at_once_all_arrive(self, store: Store) -> None:
        async def scenario() -> None:
            wholes = [bytes([n]) * (6 << 20) for n in range(6)]
            names = [sha256_of(whole) for whole in wholes]
            await asyncio.gather(
                *(
                    store.create_from(f"o/{n}", Stream(w[: 3 << 20], w[3 << 20 :]), n)
                    for n, w in zip(names, wholes, strict=True)
                )
            )
            assert await store.list("o/") == sorted(f"o/{name}" for name in names)

        asyncio.run(scenario())


class TestSignedAddresses:
    def test_they_give_one_object_for_a_while_and_nothing_else(self, bucket: str, environment: dict[str, str]) -> None:
        """To who has no keys."""

        async def scenario() -> None:
            store = await open_store(f"s3://{bucket}/p", environment)
            await store.create("a", b"weights")
            await store.create("b", b"other")
            url = await store.signed_get("a", 60.0)
            assert url is not None
            assert await asyncio.to_thread(fetch, url, 7) == b"weights"
            with pytest.raises(Unreachable, match="403"):
                await asyncio.to_thread(fetch, url.replace("/p/a?", "/p/b?"), 5)
            request = urllib.request.Request(url, data=b"forged!", method="PUT")
            with pytest.raises(urllib.error.HTTPError, match="403"):
                await asyncio.to_thread(urllib.request.urlopen, request)
            assert await store.get("a") == b"weights"

            short = await store.signed_get("a", 1.0)
            assert short is not None
            while await asyncio.to_thread(gives, short):
                pass

        asyncio.run(scenario())

    def test_the_data_service_gives_them_against_its_tokens(self, bucket: str, environment: dict[str, str]) -> None:
        async def scenario() -> None:
            secret, name = b"s" * 16, sha256_of(b"weights")
            key = f"sessions/s1/objects/{name}.safetensors"
            service = DataService(await open_store(f"s3://{bucket}/p", environment), secret, lambda: 100.0)
            read, write = (tokens.mint(secret, f"objects/s1/{right}", 200.0) for right in ("read", "write"))
            with pytest.raises(NotFound):
                await service.signed_object(key, read)
            await service.put_object(key, write, Stream(b"weights"))
            signed = await service.signed_object(key, read)
            assert signed is not None
            assert await asyncio.to_thread(fetch, signed[1], signed[0]) == b"weights"
            for token in (
                write,
                tokens.mint(secret, "objects/s2/read", 200.0),
                tokens.mint(secret, "objects/s1/read", 99.0),
            ):
                with pytest.raises(Refused):
                    await service.signed_object(key, token)

        asyncio.run(scenario())


class TestRefusedAtTheStart:
    """By name and reason."""

    def refusal(self, url: str, environment: dict[str, str]) -> str:
        limits = replace(LIMITS, store_open_s=0.5)
        with pytest.raises(StoreError) as caught:
            asyncio.run(open_store(url, environment, limits))
        assert url in str(caught.value) or "endpoint" in str(caught.value)
        return str(caught.value)

    def test_a_bucket_that_does_not_exist(self, environment: dict[str, str]) -> None:
        assert "has no bucket not-there: create it" in self.refusal("s3://not-there/x", environment)

    def test_a_key_that_the_server_does_not_know(
        self, bucket: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
        assert "does not know the key in AWS_ACCESS_KEY_ID" in self.refusal(f"s3://{bucket}/x", environment)

    def test_a_secret_that_is_not_the_keys(
        self, bucket: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        assert "AWS_SECRET_ACCESS_KEY is not the secret" in self.refusal(f"s3://{bucket}/x", environment)

    def test_an_endpoint_where_nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in keys().items():
            monkeypatch.setenv(name, value)
        with closed_port() as port:
            found = self.refusal("s3://bucket/x", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        assert f"at http://127.0.0.1:{port} cannot be used: Connection refused" in found

    def test_an_endpoint_that_never_answers(self, bucket: str, s3: S3Server) -> None:
        async def scenario() -> None:
            async with Proxy(s3.port, itertools.repeat(SILENT)) as proxy:
                limits = replace(LIMITS, store_open_s=0.5)
                with pytest.raises(StoreUnavailable, match="no answer in time"):
                    await open_store(f"s3://{bucket}/x", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}, limits)

        asyncio.run(scenario())

    def test_tls_that_the_server_does_not_speak(self, bucket: str, s3: S3Server) -> None:
        found = self.refusal(f"s3://{bucket}/x", {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{s3.port}"})
        assert "does not speak TLS" in found

    @pytest.mark.parametrize("endpoint", ["127.0.0.1:7480", "ftp://host", "http://"])
    def test_an_endpoint_that_is_none(self, endpoint: str) -> None:
        assert "http://host:port" in self.refusal("s3://bucket/x", {"AWS_ENDPOINT_URL_S3": endpoint})

    @pytest.mark.parametrize("url", ["s3://", "s3://B/x", "s3://bu/x", "s3://bucket/x?y=z", "s3://k:s@bucket/x"])
    def test_a_url_that_is_none(self, url: str) -> None:
        assert "expected s3://bucket/prefix" in self.refusal(url, {})

    def test_a_clock_that_is_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in keys().items():
            monkeypatch.setenv(name, value)
        with answering(403, "<Error><Code>RequestTimeTooSkewed</Code></Error>") as port:
            found = self.refusal("s3://bucket/x", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        year = time.strftime("%Y", time.gmtime())
        assert f"this machine's clock, which says {year}" in found
        assert "RequestTimeTooSkewed" in found

    @pytest.mark.parametrize(
        ("status", "code"), [(403, "QuotaExceeded"), (507, "XMinioStorageFull"), (507, "InsufficientStorage")]
    )
    def test_a_store_that_is_full_is_asked_once(self, status: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in keys().items():
            monkeypatch.setenv(name, value)
        # Asked again it would take everything.
        with answering(status, f"<Error><Code>{code}</Code></Error>", then=(200, "")) as port:
            store = S3Store("bucket", None, f"http://127.0.0.1:{port}", PATIENT)
            with pytest.raises(StoreFull, match=rf"s3://bucket .*is full.*{code}.*Make room"):
                asyncio.run(store.create("a/b", b"data"))

    def test_no_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """obstore then asks the machine's own cloud for some."""
        with answering(404, "") as port:
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
            found = self.refusal("s3://bucket/x", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        assert "there are no keys: set AWS_ACCESS_KEY_ID" in found


class TestBadNetwork:
    def test_a_create_whose_answer_is_lost_is_a_success(self, bucket: str, s3: S3Server) -> None:
        """The repetition finds the name taken, by itself."""

        async def scenario() -> None:
            async with Proxy(s3.port, [LOSE_ANSWER, LOSE_ANSWER]) as proxy:
                store = through(proxy, bucket)
                await store.create("a", b"mine")
                assert await store.get("a") == b"mine"
                assert proxy.connections > 1

        asyncio.run(scenario())

    def test_a_create_whose_answer_is_lost_does_not_win_over_another(self, bucket: str, s3: S3Server) -> None:
        async def scenario() -> None:
            async with Proxy(s3.port) as proxy:
                await through(proxy, bucket).create("a", b"theirs")
            async with Proxy(s3.port, [LOSE_ANSWER]) as proxy:
                with pytest.raises(AlreadyExists):
                    await through(proxy, bucket).create("a", b"mine")

        asyncio.run(scenario())

    def test_of_racing_creators_on_a_flaky_line_exactly_one_wins(self, bucket: str, s3: S3Server) -> None:
        async def scenario() -> None:
            chance = random.Random(1)
            faults = (
                chance.choice([Fault(), LOSE_ANSWER, REFUSE, Fault(up=chance.randint(1, 600))])
                for _ in itertools.count()
            )
            async with Proxy(s3.port, faults) as proxy:
                stores = [through(proxy, bucket) for _ in range(4)]
                for number in range(10):
                    outcomes = await asyncio.gather(
                        *(store.create(f"log/{number}", str(n).encode()) for n, store in enumerate(stores)),
                        return_exceptions=True,
                    )
                    (winner,) = [n for n, outcome in enumerate(outcomes) if outcome is None]
                    assert all(isinstance(o, AlreadyExists) for n, o in enumerate(outcomes) if n != winner)
                    assert await stores[0].get(f"log/{number}") == str(winner).encode()

        asyncio.run(scenario())

    def test_connections_that_break_cost_nothing_but_time(self, bucket: str, s3: S3Server) -> None:
        """Each breaks after some bytes in either direction; parts and answers are sent again."""

        async def scenario() -> None:
            chance = random.Random(2)
            faults = (
                Fault(up=chance.randint(1 << 20, 16 << 20), down=chance.randint(1 << 20, 8 << 20))
                for _ in itertools.count()
            )
            whole = chance.randbytes(23 << 20)
            name = sha256_of(whole)
            async with Proxy(s3.port, faults) as proxy:
                store = through(proxy, bucket)
                pieces = [whole[at : at + (1 << 20)] for at in range(0, len(whole), 1 << 20)]
                await store.create_from(f"o/{name}", Stream(*pieces), name)
                read = [await store.get(f"o/{name}", at, 1 << 20) for at in range(0, len(whole), 1 << 20)]
                assert b"".join(read) == whole
                assert await store.get(f"o/{name}", 3 << 20, 1 << 20) == whole[3 << 20 : 4 << 20]
                assert proxy.connections > 5

        asyncio.run(scenario())

    def test_a_server_that_hangs_once_is_asked_again(self, bucket: str, s3: S3Server) -> None:
        async def scenario() -> None:
            limits = replace(LIMITS, store_request_timeout_s=0.5)
            async with Proxy(s3.port, [SILENT]) as proxy:
                store = through(proxy, bucket, limits)
                await store.create("a", b"1")
                assert await store.get("a") == b"1"
            async with Proxy(s3.port, [Fault(down=0, hold=True)]) as proxy:
                store = through(proxy, bucket, limits)
                await store.create("b", b"2")
                assert await store.get("b") == b"2"

        asyncio.run(scenario())

    def test_a_server_that_is_away_is_unavailable_and_not_empty(self, bucket: str, s3: S3Server) -> None:
        async def scenario() -> None:
            async with Proxy(s3.port, itertools.repeat(REFUSE)) as proxy:
                store = through(proxy, bucket, replace(SHORT, store_give_up_s=0.2))
                whole = [b"x" * (1 << 20)] * 7
                name = sha256_of(b"".join(whole))
                for call in (
                    store.create("a", b""),
                    store.create_from("a", Stream(b"x"), sha256_of(b"x")),
                    store.create_from(f"a/{name}", Stream(*whole), name),
                    store.get("a"),
                    store.size("a"),
                    store.list("a"),
                    store.put_hint("a", b""),
                    store.delete("a"),
                ):
                    with pytest.raises(StoreUnavailable, match=f"s3://{bucket}/p at http://127.0.0.1:{proxy.port}"):
                        await call

        asyncio.run(scenario())

    def test_a_bucket_that_went_away_is_not_an_empty_store(self, environment: dict[str, str]) -> None:
        async def scenario() -> None:
            store = S3Store("went-away", "p", environment["AWS_ENDPOINT_URL"], LIMITS)
            for call in (store.create("a", b""), store.get("a"), store.size("a"), store.list("a"), store.delete("a")):
                with pytest.raises(StoreUnavailable, match="no bucket went-away"):
                    await call

        asyncio.run(scenario())

    def test_another_write_under_way_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Amazon answers 409 to a create while another of that name is under way; neither won yet."""
        for name, value in keys().items():
            monkeypatch.setenv(name, value)
        conflict = (409, "<Error><Code>ConditionalRequestConflict</Code></Error>")
        with answering(*conflict, then=(200, "")) as port:
            asyncio.run(S3Store("bucket", None, f"http://127.0.0.1:{port}", LIMITS).create("a", b""))
        refused = (412, "<Error><Code>PreconditionFailed</Code></Error>")
        with answering(*conflict, then=refused) as port:
            store = S3Store("bucket", None, f"http://127.0.0.1:{port}", LIMITS)
            with pytest.raises(AlreadyExists):
                asyncio.run(store.create("a", b""))

    def test_an_answer_of_an_overloaded_server_is_no_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in keys().items():
            monkeypatch.setenv(name, value)
        with answering(503, "<Error><Code>SlowDown</Code></Error>", then=(200, "")) as port:
            asyncio.run(S3Store("bucket", None, f"http://127.0.0.1:{port}", LIMITS).create("a", b""))


@pytest.mark.timeout(300)
class TestKilledServer:
    def test_what_was_acknowledged_is_there(self, s3_alone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """SIGKILL to all of it in the middle of writes, then a restart."""
        for name, value in s3_alone.environment.items():
            monkeypatch.setenv(name, value)
        bucket = s3_alone.new_bucket()

        async def scenario() -> None:
            store = S3Store(bucket, None, s3_alone.environment["AWS_ENDPOINT_URL"], SHORT)
            acknowledged: dict[str, bytes] = {}
            enough, killed = asyncio.Event(), asyncio.Event()

            async def write(writer: int) -> None:
                for number in itertools.count():
                    data = f"{writer} {number} ".encode() * 5000
                    key = f"o/{hashlib.sha256(data).hexdigest()}"
                    try:
                        await store.create(key, data)
                    except StoreUnavailable:
                        assert killed.is_set()
                        return
                    acknowledged[key] = data
                    if len(acknowledged) == 200:
                        enough.set()

            writers = [asyncio.create_task(write(writer)) for writer in range(4)]
            await enough.wait()
            killed.set()
            await asyncio.to_thread(s3_alone.kill)
            await asyncio.gather(*writers)
            await asyncio.to_thread(s3_alone.start)
            store = S3Store(bucket, None, s3_alone.environment["AWS_ENDPOINT_URL"], PATIENT)
            present = await store.list("o/")
            assert set(acknowledged) <= set(present)
            for key in present:
                data = await store.get(key)
                assert hashlib.sha256(data).hexdigest() == key.removeprefix("o/")
            with pytest.raises(AlreadyExists):
                await store.create(present[0], b"")
            with pytest.raises(NotFound):
                await store.get("o/none")

        asyncio.run(scenario())


def gives(url: str) -> bool:
    """Whether the address is a right still; any other trouble is none of its business."""
    try:
        return fetch(url, 7) == b"weights"
    except Unreachable as error:
        if "403" not in str(error):
            raise
        return False


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of nobody's: bound, so that no other test gets it, and never listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def answering(status: int, body: str, then: tuple[int, str] | None = None) -> Iterator[int]:
    """A server that answers every request so, or only the first and then otherwise."""
    answers = itertools.chain([(status, body)], itertools.repeat(then or (status, body)))

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = next(answers)
            self.send_response(status)
            self.send_header("ETag", '"0"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()
