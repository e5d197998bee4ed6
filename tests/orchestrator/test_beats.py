"""Who is alive, as one orchestrator counts it from the hints of the others."""

from __future__ import annotations

from typing import Any

import pytest

from dcnr.config import Limits
from dcnr.ids import Incarnation, PeerId, SessionId
from dcnr.machine import Instant, StoreFailed, StoreGet, StoreGot, StoreHint, StoreList, StoreListed
from dcnr.network.graph import json_bytes
from dcnr.orchestrator.beats import PREFIX, ROUNDS, Beats, beat_key
from dcnr.orchestrator.desk import Desk
from dcnr.session.log import Author

LIMITS = Limits(lease_s=3.0)
PAUSE_S = LIMITS.lease_s / ROUNDS
OTHER = PeerId("other")


def hint(counter: int, boot: int = 1, sessions: tuple[str, ...] = ()) -> bytes:
    value = {"incarnation": [boot, "n"], "counter": counter, "addresses": ["other:1"], "sessions": list(sessions)}
    return json_bytes(value)


class Observer:
    """One orchestrator's :class:`Beats`; ``hints`` is what the store holds of the others."""

    def __init__(self, seed: int = 1) -> None:
        me = Author(peer=PeerId("me"), incarnation=Incarnation(boot=1, nonce="m"))
        self.desk = Desk(author=me, secret=b"0" * 32, limits=LIMITS, unix_s_at_zero=0.0)
        self.told: list[frozenset[SessionId]] = []
        self.beats = Beats(desk=self.desk, seed=seed, addresses=("me:1",), told=self.told.append)
        self.hints: dict[PeerId, bytes] = {}
        self.written: list[bytes] = []
        self.lists = self.reads = True
        """Whether the store lists, and gives."""
        self.beats.go_round()
        self._settle()

    def _settle(self) -> None:
        while self.desk.out:
            effect: Any = self.desk.out.pop(0)
            match effect:
                case StoreList(id=id) if self.lists:
                    self.desk.answer(id, StoreListed(id=id, keys=tuple(beat_key(peer) for peer in self.hints)))
                case StoreGet(id=id, key=key) if self.reads:
                    peer = PeerId(key.removeprefix(PREFIX).split("/")[0])
                    self.desk.answer(id, StoreGot(id=id, data=self.hints.get(peer)))
                case StoreList(id=id) | StoreGet(id=id):
                    self.desk.answer(id, StoreFailed(id=id, reason="away"))
                case StoreHint(data=data):
                    self.written.append(data)

    def round(self, count: int = 1, after_s: float = PAUSE_S) -> None:
        for _ in range(count):
            self.desk.now = Instant(self.desk.now + after_s)
            self.desk.run_timers()
            self._settle()

    def sees_alive(self, rounds: int) -> None:
        """The other renews its hint before each."""
        for _ in range(rounds):
            self.hints[OTHER] = hint(len(self.written))
            self.round()


def rounds_until_expired(observer: Observer) -> int:
    for count in range(50):
        if observer.beats.expired(OTHER, 0.0):
            return count
        observer.round()
    raise AssertionError("it never expires")


def test_a_hint_is_written_as_often_as_was_promised_and_never_twice_the_same() -> None:
    observer = Observer()
    observer.round(5)
    assert len(observer.written) == len(set(observer.written)) == 3  # At every second round.


def test_who_renews_its_hint_is_alive() -> None:
    observer = Observer()
    observer.sees_alive(20)
    assert not observer.beats.expired(OTHER, 0.0)
    assert observer.beats.others() == ("other:1",)
    assert observer.beats.addresses(OTHER) == ("other:1",)


def test_a_hint_that_is_unchanged_for_a_lease_is_expired_and_not_before() -> None:
    observer = Observer()
    observer.sees_alive(3)
    # It was seen to change just now; the jitter is at most one pause.
    assert ROUNDS <= rounds_until_expired(observer) <= ROUNDS + 1
    assert observer.beats.others() == ()


def test_patience_comes_on_top() -> None:
    observer = Observer()
    observer.sees_alive(3)
    observer.round(ROUNDS + 1)
    assert observer.beats.expired(OTHER, 0.0)
    assert not observer.beats.expired(OTHER, 2 * PAUSE_S)
    observer.round(2)
    assert observer.beats.expired(OTHER, 2 * PAUSE_S)


def test_a_new_hint_starts_the_count_anew() -> None:
    observer = Observer()
    observer.sees_alive(1)
    observer.round(ROUNDS - 1)
    observer.sees_alive(1)
    observer.round(ROUNDS - 1)
    assert not observer.beats.expired(OTHER, 0.0)


def test_a_new_start_with_the_same_counter_is_a_sign_of_life() -> None:
    observer = Observer()
    observer.hints[OTHER] = hint(7)
    observer.round(ROUNDS)
    observer.hints[OTHER] = hint(7, boot=2)
    observer.round(ROUNDS - 1)
    assert not observer.beats.expired(OTHER, 0.0)


@pytest.mark.parametrize("what", ["lists", "reads"])
def test_time_in_which_nothing_could_be_read_condemns_nobody(what: str) -> None:
    observer = Observer()
    observer.sees_alive(3)
    setattr(observer, what, False)
    observer.round(100)
    setattr(observer, what, True)
    observer.round()  # The other was away as well, and has not written yet.
    assert not observer.beats.expired(OTHER, 0.0)
    observer.sees_alive(1)
    observer.round(ROUNDS - 1)
    assert not observer.beats.expired(OTHER, 0.0)


def test_time_in_which_this_process_was_paused_condemns_nobody() -> None:
    observer = Observer()
    observer.sees_alive(3)
    observer.round(after_s=1000.0)
    assert not observer.beats.expired(OTHER, 0.0)


def test_who_acts_is_alive_whatever_its_hint_says() -> None:
    observer = Observer()
    observer.sees_alive(1)
    observer.round(ROUNDS + 1)
    observer.beats.watch_anew(OTHER)
    assert not observer.beats.expired(OTHER, 0.0)
    assert rounds_until_expired(observer) >= ROUNDS


@pytest.mark.parametrize("alone", [True, False])
def test_an_owner_without_any_hint_expires_too(alone: bool) -> None:
    """It died before its first hint landed, or the hint was lost."""
    observer = Observer()
    if not alone:
        observer.hints[PeerId("third")] = hint(1)
    assert not observer.beats.expired(OTHER, 0.0)
    # The first round begins to count, as the first read of a hint does.
    assert ROUNDS + 1 <= rounds_until_expired(observer) <= ROUNDS + 2
    assert observer.beats.addresses(OTHER) == ()


NONSENSE = [
    b"", b"\xff", b"[]", b"7", b"{}", b"[" * 100_000, b'{"incarnation": 3}',
    b'{"incarnation": [1], "counter": 1, "addresses": [], "sessions": []}',
    b'{"incarnation": [1, "n"], "counter": "many", "addresses": [], "sessions": []}',
    b'{"incarnation": [1, "n"], "counter": 1e999, "addresses": [], "sessions": []}',
    b'{"incarnation": [1, "n"], "counter": 1, "addresses": 5, "sessions": []}',
    b'{"incarnation": [1, "n"], "counter": 1, "addresses": [], "sessions": null}',
]  # fmt: skip


@pytest.mark.parametrize("data", NONSENSE, ids=range(len(NONSENSE)))
def test_a_hint_that_makes_no_sense_is_as_good_as_none(data: bytes) -> None:
    observer = Observer()
    observer.hints[OTHER] = data
    observer.round()
    assert observer.beats.others() == ()
    assert ROUNDS <= rounds_until_expired(observer) <= ROUNDS + 2


def test_several_observers_do_not_lose_patience_at_one_moment() -> None:
    leases = {Observer(seed).beats._lease_s(OTHER) for seed in range(20)}
    assert len(leases) == 20
    assert min(leases) >= LIMITS.lease_s
    assert max(leases) < LIMITS.lease_s + PAUSE_S


def test_nobody_condemns_itself() -> None:
    observer = Observer()
    observer.round(50)
    assert not observer.beats.expired(PeerId("me"), 0.0)
    assert observer.beats.addresses(PeerId("me")) == ("me:1",)


def test_every_round_tells_which_sessions_the_others_own() -> None:
    observer = Observer()
    observer.hints = {
        OTHER: hint(1, sessions=("a", "b")),
        PeerId("third"): hint(1, sessions=("c",)),
        PeerId("me"): b"x",
    }
    observer.round()
    assert observer.told == [frozenset(), frozenset({"a", "b", "c"})]
    observer.reads = False
    observer.round()
    assert observer.told[-1] == frozenset()
