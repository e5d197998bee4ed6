"""A client of several orchestrators: the next where one is silent, the owner where another is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from dcnr.client.connect import AsyncClient
from dcnr.client.run import AsyncRun
from dcnr.config import Limits
from dcnr.errors import NotOwner, Unreachable
from dcnr.ids import NetworkId, SessionId
from dcnr.protocol.messages import (
    Controlled,
    ControlSession,
    EventRecord,
    FollowSession,
    GetStatus,
    Message,
    NetworkCreated,
    Refusal,
    SessionList,
    SessionQuery,
)
from dcnr.session.events import Finished, SessionEvent, StepDone
from tests.client.fake import QUICK, FakeNetwork, Script, info, record

FINISHED = Finished(step=4, loss=0.25)
SILENCE = EventRecord(sequence=0, unix_s=0.0, kind="", session="", data="")
LEASE_OF_A_SECOND = replace(QUICK, lease_s=1.0)
GONE, NOT_MINE = Unreachable("gone"), Refusal(kind="NotOwner", reason="another owns it")
STEPPED_DOWN = EventRecord(sequence=1, unix_s=0.0, kind="stepped_down", session="s", data="{}")
Answers = dict[type[Message], Any]


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1.0 / number, learning_rate=0.1, grad_scale=1.0, tokens=8)


def dead(streams: int = 20) -> FakeNetwork:
    return FakeNetwork({SessionQuery: GONE, ControlSession: GONE}, [[GONE]] * streams)


def follower(*owners: str, streams: int = 20) -> FakeNetwork:
    """It owns nothing, and says who does."""
    answer = SessionList(sessions=(info(owner_addresses=owners),))
    return FakeNetwork({SessionQuery: answer, ControlSession: NOT_MINE}, [[NOT_MINE]] * streams)


def owner(*streams: Script) -> FakeNetwork:
    answers: Answers = {SessionQuery: SessionList(sessions=(info(),)), ControlSession: Controlled(session=SessionId("s"), state="stopped")}  # fmt: skip
    return FakeNetwork(answers, streams)


def with_client(
    networks: Mapping[str, FakeNetwork],
    work: Callable[[AsyncClient], Any],
    addresses: str | None = None,
    limits: Limits = QUICK,
) -> Any:
    toolkit = replace(
        FakeNetwork().toolkit(),
        open_calls=lambda address: networks[address],
        open_data=lambda address: networks[address],
    )

    async def working() -> Any:
        async with AsyncClient(",".join(networks) if addresses is None else addresses, toolkit, limits) as client:
            return await work(client)

    return asyncio.run(working())


async def followed(client: AsyncClient) -> list[SessionEvent]:
    return [e async for e in AsyncRun(client, SessionId("s")) if isinstance(e, StepDone | Finished)]


def asked_after(network: FakeNetwork) -> list[int]:
    return [message.after_step for message in network.asked if isinstance(message, FollowSession)]


ALL = [step(1), step(2), step(3), step(4), FINISHED]


def test_the_next_is_asked_where_the_first_does_not_answer() -> None:
    a, b = dead(), owner([record(event) for event in ALL])
    assert with_client({"a": a, "b": b}, followed) == ALL
    assert (len(a.asked), asked_after(b)) == (1, [0])


def test_a_stream_whose_owner_dies_goes_on_elsewhere_after_the_last_step_that_was_seen() -> None:
    a = FakeNetwork({SessionQuery: GONE}, [[record(step(1)), record(step(2)), GONE], *[[GONE]] * 20])
    b = owner([record(step(2)), record(step(3)), record(step(4)), record(FINISHED)])
    assert with_client({"a": a, "b": b}, followed) == ALL
    assert asked_after(b) == [2]


def test_a_stream_waits_while_nobody_owns_the_session_and_goes_on_once_somebody_does() -> None:
    a = FakeNetwork({SessionQuery: GONE}, [[record(step(1)), GONE], *[[GONE]] * 20])
    b = follower("a")
    b.streams[3] = [record(step(2)), record(step(3)), record(step(4)), record(FINISHED)]
    assert with_client({"a": a, "b": b}, followed) == ALL
    assert asked_after(b) == [1, 1, 1, 1]


def test_an_owner_that_steps_down_sends_its_followers_to_its_successor_that_they_did_not_know() -> None:
    """Its last word ends the stream; asked again, it names who owns the session now."""
    a = follower("c")
    a.streams[0] = [record(step(1)), record(step(2)), STEPPED_DOWN]
    c = owner([record(step(3)), record(step(4)), record(FINISHED)])
    assert with_client({"a": a, "c": c}, followed, "a") == ALL
    assert (asked_after(a), asked_after(c)) == ([0, 2], [2])


def test_a_command_reaches_the_owner_that_a_refusal_leads_to() -> None:
    a, b, c = follower("c"), follower("c"), owner()
    state = with_client({"a": a, "b": b, "c": c}, lambda client: AsyncRun(client, SessionId("s")).stop(), "a,b")
    assert state == "stopped"
    assert not b.asked
    assert [type(message) for message in c.asked] == [ControlSession]


@pytest.mark.parametrize(
    ("networks", "error"),
    [
        ({"a": dead(), "b": dead()}, Unreachable),
        ({"a": follower(), "b": follower()}, NotOwner),
        ({"a": follower("b"), "b": follower("a")}, NotOwner),
        ({"a": dead(), "b": follower("a")}, NotOwner),
    ],
)
def test_each_is_asked_once_where_none_can_answer(networks: dict[str, FakeNetwork], error: type[Exception]) -> None:
    with pytest.raises(error):
        with_client(networks, lambda client: AsyncRun(client, SessionId("s")).stop())
    for network in networks.values():
        assert sum(isinstance(message, ControlSession) for message in network.asked) == 1


class Quiet(FakeNetwork):
    """Where its script has ``SILENCE`` it says nothing until it has been asked for ``signs`` signs of life. Where it
    ``hangs``, it gives these, and never says anything again."""

    def __init__(self, script: Script, signs: int, *, hangs: bool) -> None:
        super().__init__({}, [script, *[[SILENCE]] * 20])
        self.signs = signs
        self.hangs = hangs
        self.enough = asyncio.Event()

    async def call(self, message: Message) -> Message:
        assert isinstance(message, GetStatus)
        if sum(isinstance(asked, GetStatus) for asked in self.asked) == self.signs and self.hangs:
            await asyncio.Event().wait()
        self.asked.append(message)
        if sum(isinstance(asked, GetStatus) for asked in self.asked) == self.signs:
            self.enough.set()
        return NetworkCreated(network=NetworkId("anything that is an answer"))

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        self.asked.append(message)
        for item in self.streams.pop(0):
            assert isinstance(item, Message)
            if item is not SILENCE:
                yield item
            else:
                await (asyncio.Event() if self.hangs else self.enough).wait()


@pytest.mark.parametrize("signs", [0, 1])
def test_an_owner_that_hangs_is_turned_from_and_nobody_is_sent_back_to_it(signs: int) -> None:
    """Whoever is asked next says for a while that it owns the session."""
    a = Quiet([record(step(1)), SILENCE], signs, hangs=True)
    b = follower("a")
    b.streams[3] = [record(step(2)), record(step(3)), record(step(4)), record(FINISHED)]
    assert with_client({"a": a, "b": b}, followed, limits=LEASE_OF_A_SECOND) == ALL
    assert (asked_after(a), asked_after(b)) == ([0], [1, 1, 1, 1])


def test_an_owner_that_has_nothing_to_tell_and_gives_signs_of_life_is_not_turned_from() -> None:
    a, b = Quiet([record(step(1)), SILENCE, *(record(event) for event in ALL[1:])], 2, hangs=False), owner()
    assert with_client({"a": a, "b": b}, followed, limits=LEASE_OF_A_SECOND) == ALL
    assert not b.asked


def test_every_connection_is_closed_in_the_end() -> None:
    a, b = dead(), owner([record(FINISHED)])
    with_client({"a": a, "b": b}, followed)
    assert (a.closed, b.closed) == (2, 2)


@pytest.mark.parametrize("text", ["a", " a ", "a,", ",a,,"])
def test_addresses_are_separated_by_commas(text: str) -> None:
    assert with_client({"a": owner([record(FINISHED)])}, followed, text) == [FINISHED]


def test_of_a_session_that_another_runs_that_one_is_asked_and_where_it_is_silent_the_log_is_believed() -> None:
    stale, fresh = info(owner_addresses=("b",), step=20, loss=float("nan")), info(owner_addresses=("b",), step=27)
    a, b = (
        FakeNetwork({SessionQuery: SessionList(sessions=(stale,))}),
        FakeNetwork({SessionQuery: SessionList(sessions=(fresh,))}),
    )
    assert with_client({"a": a, "b": b}, lambda client: client.sessions(), "a") == (fresh,)
    assert with_client({"a": a, "b": b}, lambda client: AsyncRun(client, SessionId("s")).info(), "a") == fresh
    found = with_client({"a": a, "b": dead()}, lambda client: client.sessions(), "a")
    assert [i.step for i in found] == [20]
