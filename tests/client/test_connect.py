"""Creating and asking, against a network in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcnr.client.blocking import Client
from dcnr.client.connect import AsyncClient
from dcnr.errors import (
    InvalidData,
    InvalidNetwork,
    NoCapacity,
    NotFound,
    ProtocolError,
    Refused,
    UnknownName,
    UsageError,
)
from dcnr.ids import DatasetId, NetworkId, SessionId
from dcnr.network import templates
from dcnr.network.graph import canonical_json
from dcnr.protocol.messages import (
    CreateNetwork,
    CreateSession,
    EventRecord,
    Generate,
    Generated,
    GetNetwork,
    GetStatus,
    NetworkCreated,
    NetworkDefinition,
    Refusal,
    SessionCreated,
    SessionInfo,
    SessionList,
    SessionQuery,
)
from dcnr.session.recipe import AdamW, Cosine, Recipe
from tests.client.fake import QUICK, FakeNetwork, info, session_record

GPT = templates.gpt(layers=1, dim=8, heads=2, vocab=300, context=4)


def ask(fake: FakeNetwork, question: Callable[[AsyncClient], Any]) -> Any:
    async def asking() -> Any:
        async with AsyncClient("here", fake.toolkit(), QUICK) as net:
            return await question(net)

    return asyncio.run(asking())


@pytest.mark.parametrize(
    ("kind", "error"),
    [("NoCapacity", NoCapacity), ("InvalidNetwork", InvalidNetwork), ("os", Refused), ("DoesNotExist", Refused)],
)
def test_a_refusal_raises_the_error_that_it_names(kind: str, error: type[Exception]) -> None:
    fake = FakeNetwork({GetStatus: Refusal(kind=kind, reason="3 GiB missing")})
    with pytest.raises(error, match="3 GiB missing"):
        ask(fake, lambda net: net.status())


def test_an_answer_of_another_kind_is_a_protocol_error() -> None:
    fake = FakeNetwork({GetStatus: NetworkCreated(network=NetworkId("x"))})
    with pytest.raises(ProtocolError, match="GetStatus was answered by NetworkCreated"):
        ask(fake, lambda net: net.status())


def trainable() -> FakeNetwork:
    return FakeNetwork(
        {
            CreateNetwork: NetworkCreated(network=NetworkId("net-id")),
            CreateSession: SessionCreated(session=SessionId("session-id")),
            GetNetwork: NetworkDefinition(network=NetworkId("net-id"), definition=canonical_json(GPT.definition())),
        }
    )


def test_a_recipe_that_cannot_be_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    fake = trainable()
    wrong: Any = "adamw"
    with pytest.raises(UsageError, match=r"optimizer: found 'adamw', expected dcnr\.AdamW"):
        ask(fake, lambda net: net.train(GPT, "books", steps=7, optimizer=wrong))
    assert not fake.asked


def test_training_creates_network_dataset_and_session(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    fake = trainable()
    run = ask(
        fake,
        lambda net: net.train(
            GPT,
            str(text),
            tokenizer="bpe:300",
            steps=7,
            batch_size=4,
            microbatches=2,
            optimizer=AdamW(lr=0.5),
            schedule=Cosine(warmup=3),
            seed=9,
        ),
    )
    assert run.id == "session-id"
    created, _, session = fake.asked
    assert isinstance(created, CreateNetwork)
    assert created.definition == canonical_json(GPT.definition())
    assert isinstance(session, CreateSession)
    assert session.network == "net-id"
    assert session.dataset in fake.datasets
    recipe = Recipe.from_bytes(session.recipe)
    assert recipe == Recipe(
        steps=7, batch_size=4, microbatches=2, optimizer=AdamW(lr=0.5), schedule=Cosine(warmup=3), seed=9
    )
    manifest = json.loads(fake.datasets[session.dataset])
    named = {s["sha256"] for split in manifest["splits"].values() for s in split["shards"]["tokens"]}
    assert named | {manifest["tokenizer"]["sha256"]} == {Path(key).stem for key in fake.objects}


def test_a_recipe_that_cannot_be_is_refused_before_anything_is_created() -> None:
    fake = trainable()
    with pytest.raises(UsageError, match=r"batch size 6 .* 4 microbatches"):
        ask(fake, lambda net: net.train(GPT, "nowhere", steps=1, batch_size=6, microbatches=4))
    assert fake.asked == []


def test_data_may_be_a_dataset_that_exists() -> None:
    fake = trainable()
    fake.datasets["books"] = b"{}"
    ask(fake, lambda net: net.train(GPT, "books", steps=1))
    session = fake.asked[-1]
    assert isinstance(session, CreateSession)
    assert session.dataset == "books"


def test_data_that_is_nothing_is_refused_with_its_name() -> None:
    with pytest.raises(UnknownName, match="'nowhere' is neither a file"):
        ask(trainable(), lambda net: net.train(GPT, "nowhere", steps=1))


def test_a_network_may_be_a_file_or_a_name(tmp_path: Path) -> None:
    from dcnr.adapters.yaml_network import dump_network

    file = tmp_path / "gpt.yaml"
    file.write_text(dump_network(GPT.definition()))
    fake = trainable()
    assert ask(fake, lambda net: net.create_network(file)) == "net-id"
    assert isinstance(fake.asked[-1], CreateNetwork)
    fake.answers[GetNetwork] = NetworkDefinition(
        network=NetworkId("found"), definition=canonical_json(GPT.definition())
    )
    assert ask(fake, lambda net: net.create_network("gpt")) == "found"
    other = replace(GPT.definition(), precision="bf16")
    for model in (GPT, file, "gpt"):
        assert ask(fake, lambda net, model=model: net.create_network(model, "bf16")) == "net-id"
        assert fake.asked[-1] == CreateNetwork(definition=canonical_json(other))
    with pytest.raises(InvalidNetwork, match="found 'half', expected one of float32, float64, bf16"):
        ask(fake, lambda net: net.create_network("gpt", "half"))
    with pytest.raises(UsageError, match=r"no network file .*missing\.yaml"):
        ask(fake, lambda net: net.create_network("missing.yaml"))


class TestText:
    """Generation finds the session, its tokenizer, and gives whole characters."""

    def network(self, tmp_path: Path, reply: str, tokenizer: str = "bpe:256") -> FakeNetwork:
        from dcnr.adapters.text import load_tokenizer

        text = tmp_path / "book.txt"
        text.write_text("naïve café, naïve café\n" * 200)
        fake = FakeNetwork()
        ask(fake, lambda net: net.add_data(str(text), tokenizer=tokenizer))
        dataset = DatasetId(*fake.datasets)
        ((key, data),) = ((key, data) for key, data in fake.objects.items() if key.endswith(".json"))
        record = session_record(dataset, Path(key).stem)
        tokens = [-1, *load_tokenizer(data).encode(reply)]
        committed = info(session=SessionId("new"), dataset=dataset, record=record, committed_step=4)
        older = info(session=SessionId("old"), dataset=dataset, record=record, committed_step=9)
        running = info(session=SessionId("young"), dataset=dataset, record=record)
        fake.answers[SessionQuery] = SessionList(sessions=(older, committed, running))
        fake.streams = [[Generated(token=t, session=SessionId("new"), step=4, dataset=dataset) for t in tokens]]
        return fake

    def test_pieces_are_whole_characters_of_the_newest_commit(self, tmp_path: Path) -> None:
        fake = self.network(tmp_path, "naïve é")
        with Client("here", fake.toolkit()) as net:
            pieces = list(net.generate("net", "caf", max_tokens=9, temperature=0.0, top_p=0.5, seed=3))
        assert "".join(pieces) == "naïve é"
        assert "\ufffd" not in "".join(pieces)
        request = fake.asked[-1]
        assert isinstance(request, Generate)
        assert (request.target, request.max_tokens, request.temperature, request.top_p, request.seed) == (
            "new",
            9,
            0.0,
            0.5,
            3,
        )
        assert len(request.prompt) == 3

    def test_a_special_token_in_a_prompt_is_text(self, tmp_path: Path) -> None:
        """What the tokenizer's file reserves comes from nobody's words; and so it is when the dataset is gone."""
        from dcnr.adapters.text import train_tokenizer

        document = json.loads(train_tokenizer(["naïve café"], 256).to_json())
        document["added_tokens"] = [
            {"id": 256, "content": "<|endoftext|>", "single_word": False, "lstrip": True, "rstrip": True,
             "normalized": False, "special": True}
        ]  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        fake = self.network(tmp_path, "<|endoftext|>", str(tmp_path / "tokenizer.json"))
        ask(fake, lambda net: net.delete_data(*fake.datasets))
        with Client("here", fake.toolkit()) as net:
            assert "".join(net.generate("net", "naïve <|endoftext|>")) == "<|endoftext|>"
        request = fake.asked[-1]
        assert isinstance(request, Generate)
        assert 256 not in request.prompt
        assert len(request.prompt) == len("naïve <|endoftext|>".encode())

    def test_columns_have_no_text(self) -> None:
        fake = FakeNetwork()
        trained = info(record=session_record(DatasetId("d" * 64), ""), committed_step=4)
        fake.answers[SessionQuery] = SessionList(sessions=(trained,))
        with Client("here", fake.toolkit()) as net, pytest.raises(InvalidData, match="s was trained on columns"):
            list(net.generate("net", "abc"))

    def test_a_session_without_a_commit_has_no_text(self, tmp_path: Path) -> None:
        fake = self.network(tmp_path, "x")
        with pytest.raises(NotFound, match="no commit yet"):
            ask(fake, lambda net: net.newest_commit("young"))
        with pytest.raises(UnknownName, match="no session and no trained network 'other'"):
            ask(fake, lambda net: net.newest_commit("other"))


def committed(*ids: str, network: str = "n" * 64, name: str = "net") -> tuple[SessionInfo, ...]:
    return tuple(
        info(session=SessionId(i), network=NetworkId(network), network_name=name, committed_step=1) for i in ids
    )


SESSIONS = (
    *committed("abcd1111", "abcd2222", network="beef" + "0" * 60),
    *committed("dada1111", network="feed" + "0" * 60, name="abcd1"),
)


@pytest.mark.parametrize(
    ("target", "session"),
    [
        ("abcd1111", "abcd1111"),
        ("abcd1111"[:5] + "1", "abcd1111"),
        # A name that somebody chose is that network, whatever begins so.
        ("abcd1", "dada1111"),
        ("beef", "abcd2222"),
        ("net", "abcd2222"),
    ],
)
def test_what_text_comes_from_is_named_whole_or_by_its_only_beginning(target: str, session: str) -> None:
    fake = FakeNetwork({SessionQuery: SessionList(sessions=SESSIONS)})
    assert ask(fake, lambda net: net.newest_commit(target)).session == session


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ("", UnknownName, "no session and no trained network ''"),
        ("dad", UnknownName, "no trained network 'dad'"),
        ("abcd", UsageError, "'abcd' is the beginning of several ids: abcd1111, abcd2222"),
    ],
)
def test_what_could_be_anything_is_refused(target: str, error: type[Exception], said: str) -> None:
    fake = FakeNetwork({SessionQuery: SessionList(sessions=SESSIONS)})
    with pytest.raises(error, match=said):
        ask(fake, lambda net: net.newest_commit(target))


def test_bytes_that_are_no_text_are_refused() -> None:
    """As Python keeps them in the arguments of a command."""
    fake = FakeNetwork({SessionQuery: SessionList(sessions=SESSIONS)})
    with Client("here", fake.toolkit()) as net:
        with pytest.raises(UsageError, match=r"the prompt 'a\\udcff': found no UTF-8 at character 2"):
            list(net.generate("net", "a\udcff"))
        with pytest.raises(UsageError, match="the dataset's name"):
            net.dataset("\udcff")
        with pytest.raises(UsageError, match="the dataset's name"):
            net.delete_data("\udcff")


def test_the_blocking_client_iterates_and_closes() -> None:
    records = [EventRecord(sequence=n, unix_s=0.0, kind="x", session="", data="{}") for n in (1, 2, 3)]
    fake = FakeNetwork(streams=[records])
    with Client("here", fake.toolkit()) as net:
        events = net.events()
        assert next(events) == records[0]
    assert fake.closed == 2
    # Given up before its end, after its client: it must not wait for a loop that is gone.
    events.close()


def test_a_text_that_does_not_fit_the_network_is_not_even_uploaded(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(str(number * 7919) for number in range(1500)))
    fake = trainable()
    with pytest.raises(InvalidData, match="tokens, the dataset's tokenizer makes 3"):
        ask(fake, lambda net: net.train(GPT, str(text), tokenizer="bpe:350", steps=7))
    with pytest.raises(InvalidData, match="fewer than a batch of 4000"):
        ask(fake, lambda net: net.train(GPT, str(text), steps=7, batch_size=4000, microbatches=1))
    assert fake.objects == {}
    assert fake.datasets == {}


def test_a_tokenizer_for_columns_is_refused() -> None:
    from dcnr.wiring import TOOLKIT

    fake = trainable()
    toolkit = replace(fake.toolkit(), prepare=TOOLKIT.prepare)

    async def asking() -> None:
        async with AsyncClient("here", toolkit, QUICK) as net:
            await net.train(GPT, {"x": [1, 2]}, tokenizer="bytes", steps=7)

    with pytest.raises(UsageError, match=r"these data are columns, .* leave --tokenizer out"):
        asyncio.run(asking())
    assert fake.objects == {}


def test_a_tokenizer_for_a_dataset_that_exists_is_refused() -> None:
    with pytest.raises(UsageError, match="leave --tokenizer out"):
        ask(trainable(), lambda net: net.train(GPT, "book", tokenizer="bpe:300", steps=7))
