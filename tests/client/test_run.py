"""What a follower of a session sees, whatever the connection does."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from dcnr.client.connect import AsyncClient
from dcnr.client.run import AsyncRun
from dcnr.errors import NotFound, SessionFailed, Unreachable
from dcnr.ids import DatasetId, Instance, SessionId, Sha256, VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import Definition, canonical_json, network_id
from dcnr.protocol.messages import (
    CommitInfo,
    FollowSession,
    ReadSession,
    SessionFiles,
    SessionInfo,
    SessionList,
    SessionQuery,
    Validated,
)
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.events import Failed, Finished, SessionEvent, StepDone, Stopped
from dcnr.session.log import manifest_key, object_key
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record
from tests.client.fake import QUICK, FakeNetwork, Script, info, record


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1.0 / number, learning_rate=0.1, grad_scale=1.0, tokens=8)


FINISHED = Finished(step=3, loss=1 / 3)


def follow(
    streams: Sequence[Script], *, state: SessionInfo | Exception | None = None
) -> tuple[list[SessionEvent], FakeNetwork, AsyncRun]:
    """Every event of a run over a network with these streams; ``state`` answers questions for the session."""
    answer = state if isinstance(state, Exception) else SessionList(sessions=(state or info(),))
    fake = FakeNetwork({SessionQuery: answer}, streams)

    async def reading() -> tuple[list[SessionEvent], AsyncRun]:
        run = AsyncRun(AsyncClient("here", fake.toolkit(), QUICK), SessionId("s"))
        return [event async for event in run], run

    events, run = asyncio.run(reading())
    return events, fake, run


def test_events_come_in_order_until_the_last() -> None:
    script = [record(step(1)), record(step(2)), record(step(3)), record(FINISHED), record(step(99))]
    events, _, run = follow([script])
    assert events == [step(1), step(2), step(3), FINISHED]
    assert run.losses == {1: 1.0, 2: 0.5, 3: 1 / 3}


def test_steps_that_were_seen_are_dropped() -> None:
    script = [record(step(1)), record(step(2)), record(step(1)), record(step(2)), record(step(3)), record(FINISHED)]
    assert follow([script])[0] == [step(1), step(2), step(3), FINISHED]


def test_a_lost_connection_is_dialled_again_after_the_last_step() -> None:
    first: Script = [record(step(1)), record(step(2)), Unreachable("gone")]
    second: Script = [Unreachable("still gone")]
    third: Script = [record(step(2)), record(step(3)), record(FINISHED)]
    events, fake, _ = follow([first, second, third])
    assert events == [step(1), step(2), step(3), FINISHED]
    followed = [m.after_step for m in fake.asked if isinstance(m, FollowSession)]
    assert followed == [0, 2, 2]


def test_a_stream_that_ends_early_is_opened_again_while_the_session_runs() -> None:
    assert follow([[record(step(1))], [record(step(2)), record(FINISHED)]])[0] == [step(1), step(2), FINISHED]


def test_an_end_that_was_missed_is_told_all_the_same() -> None:
    ended = info(state="finished", step=3, loss=0.25)
    assert follow([[record(step(1))]], state=ended)[0] == [step(1), Finished(step=3, loss=0.25)]


def test_a_stopped_session_ends_the_iteration() -> None:
    assert follow([[record(step(1)), record(Stopped(step=1))]])[0] == [step(1), Stopped(step=1)]


def test_a_failed_session_raises_its_reason() -> None:
    with pytest.raises(SessionFailed, match=r"session failed: step 2, VNode head: not finite"):
        follow([[record(Failed(step=2, vnode="head", reason="step 2, VNode head: not finite"))]])


def test_a_failure_that_was_missed_raises_too() -> None:
    with pytest.raises(SessionFailed, match="out of luck"):
        follow([[]], state=info(state="failed", step=2, reason="out of luck"))


def test_a_network_that_stays_away_is_given_up() -> None:
    class Patience(Exception):
        pass

    # Every look costs 40 s of patience, which is 60 s: after the third the follower gives up.
    fake = FakeNetwork({}, [[Unreachable("gone")], [Unreachable("gone")], [Unreachable("gone")], [Patience()]])
    limits = QUICK.__class__(redial_first_s=40.0, redial_most_s=40.0)
    waited: list[float] = []

    async def reading() -> None:
        client = AsyncClient("here", fake.toolkit(), limits)

        async def no_wait(seconds: float) -> None:
            waited.append(seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dcnr.client.run.asyncio.sleep", no_wait)
            async for _ in AsyncRun(client, SessionId("s")):
                pass

    with pytest.raises(Unreachable):
        asyncio.run(reading())
    assert waited == [40.0, 40.0]


def trained() -> tuple[Definition, Record]:
    """A network of one VNode with a weight, and a session of it."""
    g = Graph("small")
    g.cost("mse", g.linear(g.input("x", [3], "float32"), out_dim=2, bias=False, id="head"), target="y")
    definition = g.definition()
    return definition, Record(
        network=network_id(definition),
        network_name="small",
        dataset=DatasetId("d"),
        tokenizer="",
        context=0,
        rows_train=8,
        rows_validation=0,
        valid_targets_per_row=0,
        recipe=Recipe(steps=5),
        groups=(),
        catalogue="",
        created_unix_s=0.0,
        nonce="",
    )


def stored_session() -> tuple[FakeNetwork, np.ndarray]:
    """A session with one commit of one VNode with a weight and its optimizer."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = save({"param.weight": weight, "optim.weight.exp_avg": np.zeros((2, 3), np.float32)})
    sha256 = Sha256(hashlib.sha256(data).hexdigest())
    state = StoredState(sha256=sha256, size_bytes=len(data), version=5, instance=Instance(2))
    manifest = Manifest(step=5, states={VNodeId("head"): state}, losses=(), previous=None)
    definition, of = trained()
    files = SessionFiles(
        session=SessionId("s"),
        record=of.to_bytes(),
        definition=canonical_json(definition),
        entries=(),
        commits=(CommitInfo(step=5, manifest=manifest.sha256),),
        token="right",
        rows_token="",
    )
    fake = FakeNetwork({ReadSession: files})
    fake.objects[manifest_key(SessionId("s"), manifest.sha256)] = manifest.to_bytes()
    fake.objects[object_key(SessionId("s"), sha256)] = data
    return fake, weight


def read_weights(fake: FakeNetwork) -> dict[str, np.ndarray]:
    async def reading() -> dict[str, np.ndarray]:
        return await AsyncRun(AsyncClient("here", fake.toolkit(), QUICK), SessionId("s")).state_dict()

    return asyncio.run(reading())


def test_weights_are_the_newest_commits_without_the_optimizer() -> None:
    fake, weight = stored_session()
    weights = read_weights(fake)
    assert list(weights) == ["head.weight"]
    np.testing.assert_array_equal(weights["head.weight"], weight)
    assert weights["head.weight"].flags.writeable


def test_a_session_without_a_commit_has_no_weights() -> None:
    fake, _ = stored_session()
    answer = fake.answers[ReadSession]
    assert isinstance(answer, SessionFiles)
    fake.answers[ReadSession] = SessionFiles(
        session=answer.session, record=b"", definition=b"", entries=(), commits=(), token="right", rows_token=""
    )
    with pytest.raises(NotFound, match="no commit yet"):
        read_weights(fake)


def head(kind: str, **config: Any) -> Graph:
    g = Graph("head")
    tokens = g.input("tokens", [4], "int64")
    hidden = g.embedder(tokens, vocab_size=7, dim=3, position_encoding="none", alias="tok")
    if kind == "tied_lm_head_ce":
        g.cost(kind, hidden, tie="tok", target="targets", **config)
    elif kind == "mse":
        g.cost(kind, hidden, target="y", **config)
    else:
        g.cost(kind, g.linear(hidden, tie="tok", bias=False), target="targets", **config)
    return g


@pytest.mark.parametrize(
    ("graph", "entropy"),
    [
        (head("ce_logits"), True),
        (head("tied_lm_head_ce"), True),
        (head("ce_logits", label_smoothing=0.1), False),
        (head("ce_logits", z_loss=0.01), False),
        (head("tied_lm_head_ce", z_loss=0.01), False),
        (head("ce_logits", weight=0.5), False),
        (head("mse"), False),
    ],
)
def test_a_perplexity_is_that_of_a_mean_cross_entropy_and_of_nothing_else(graph: Graph, entropy: bool) -> None:
    fake, _ = stored_session()
    files = fake.answers[ReadSession]
    assert isinstance(files, SessionFiles)
    fake.answers[ReadSession] = replace(files, definition=canonical_json(analyse(graph.definition()).definition))
    fake.streams = [[Validated(session=SessionId("s"), step=5, loss=2.0, rows=3)]]

    async def validating() -> float | None:
        return (await AsyncRun(AsyncClient("here", fake.toolkit(), QUICK), SessionId("s")).validate()).perplexity

    assert asyncio.run(validating()) == (math.exp(2.0) if entropy else None)
