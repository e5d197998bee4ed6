"""Entries survive their bytes, cannot follow out of order or by a stranger, and add up from any that sums up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dcnr.errors import ProtocolError, Refused
from dcnr.ids import Epoch, Incarnation, Instance, LogIndex, PeerId, Sha256, VNodeId
from dcnr.session import tokens
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.log import Author, Base, Entry, Fold, Kind, Spot, fold, placed

ME = Author(peer=PeerId("me"), incarnation=Incarnation(boot=1, nonce="a"))
OTHER = Author(peer=PeerId("other"), incarnation=Incarnation(boot=4, nonce="b"))
SPOT = Spot(peer=PeerId("p"), incarnation=Incarnation(boot=2, nonce="c"), worker=0, numeric_class="k")


def entry(index: int, kind: Kind, body: dict[str, Any], author: Author = ME, epoch: int = 1) -> Entry:
    return Entry(index=LogIndex(index), kind=kind, author=author, epoch=Epoch(epoch), nonce=f"n{index}", body=body)


def history() -> list[Entry]:
    state = Fold()
    entries = [entry(1, Kind.ACQUIRE, {"folded": state.to_json()})]
    state = fold(state, entries[-1])
    place = placed(state, index=LogIndex(2), placement={VNodeId("v"): SPOT}, window=3, base=Base())
    entries.append(entry(2, Kind.PLACE, {"folded": place.to_json()}))
    entries.append(entry(3, Kind.COMMIT, {"step": 5, "manifest": "m5"}))
    entries.append(entry(4, Kind.COMMIT, {"step": 10, "manifest": "m10"}))
    entries.append(entry(5, Kind.DROP, {"step": 5}))
    return entries


def add_up(entries: list[Entry]) -> Fold:
    state = Fold()
    for each in entries:
        state = fold(state, Entry.from_bytes(each.to_bytes()))
    return state


def test_a_log_adds_up() -> None:
    state = add_up(history())
    assert (state.last, state.epoch, state.instance, state.state) == (5, 1, 2, "running")
    assert state.placement == {VNodeId("v"): SPOT}
    assert state.commits == (Base(step=10, manifest=Sha256("m10")),)
    assert state.newest().step == 10


def test_reading_may_start_at_an_entry_that_sums_up() -> None:
    entries = history()
    whole = add_up(entries)
    again = entry(6, Kind.ACQUIRE, {"folded": whole.to_json()}, OTHER, epoch=6)
    assert add_up([again]) == add_up([*entries, again])
    with pytest.raises(ProtocolError, match="cannot follow"):
        add_up([entries[2]])


def test_a_gap_or_a_stranger_is_refused() -> None:
    entries = history()
    with pytest.raises(ProtocolError, match="cannot follow entry 3"):
        add_up([*entries[:3], entries[4]])
    with pytest.raises(ProtocolError, match="does not own"):
        add_up([*entries, entry(6, Kind.STOP, {}, OTHER)])


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"index":1}', b"\xff", b"[" * 100_000])
def test_what_is_no_entry_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Entry.from_bytes(data)


@pytest.mark.parametrize("folded", [5, [], {}, {"placement": 5}, {"placement": []}, {"commits": [5]}])
def test_a_folded_state_that_is_none_is_refused(folded: Any) -> None:
    whole = Fold().to_json()
    with pytest.raises(ProtocolError, match="malformed Acquire at log entry 1"):
        fold(
            Fold(),
            entry(1, Kind.ACQUIRE, {"folded": whole | folded if isinstance(folded, dict) and folded else folded}),
        )


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"states":5}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed manifest"):
        Manifest.from_bytes(data)


def test_a_manifest_survives_its_bytes_and_no_change_of_them() -> None:
    stored = StoredState(sha256=Sha256("0" * 64), size_bytes=3, version=5, instance=Instance(2))
    manifest = Manifest(step=5, states={VNodeId("v"): stored}, losses=((4, 0.1), (5, 1 / 3)), previous=None)
    assert Manifest.from_bytes(manifest.to_bytes(), manifest.sha256) == manifest
    with pytest.raises(ProtocolError, match="does not hash"):
        Manifest.from_bytes(manifest.to_bytes() + b" ", manifest.sha256)


WHOLE = {
    VNodeId("a"): StoredState(sha256=Sha256("0" * 64), size_bytes=3, version=5, instance=Instance(2)),
    VNodeId("b"): StoredState(sha256=Sha256("1" * 64), size_bytes=3, version=5, instance=Instance(2)),
    VNodeId("frozen"): StoredState(sha256=Sha256("2" * 64), size_bytes=3, version=0, instance=Instance(2)),
}
EXPECTED = {VNodeId("a"): 5, VNodeId("b"): 5, VNodeId("frozen"): 0}


@pytest.mark.parametrize(
    ("states", "step", "reason"),
    [
        ({}, 5, r"has no state: a \(0 states, 3 are expected\)"),
        ({v: s for v, s in WHOLE.items() if v != "b"}, 5, "has no state: b"),
        (WHOLE | {VNodeId("x"): WHOLE[VNodeId("a")]}, 5, "has a state of a stranger: x"),
        (WHOLE, 4, "it is of step 4, and its commit of step 5"),
        (WHOLE | {VNodeId("b"): replace(WHOLE[VNodeId("b")], version=4)}, 5, "of b is of step 4, expected 5"),
        (WHOLE | {VNodeId("frozen"): replace(WHOLE[VNodeId("frozen")], version=5)}, 5, "of frozen is of step 5"),
        (WHOLE | {VNodeId("b"): replace(WHOLE[VNodeId("b")], instance=Instance(9))}, 5, "instances 2, 9"),
    ],
)
def test_an_empty_or_mixed_manifest_is_none(states: dict[VNodeId, StoredState], step: int, reason: str) -> None:
    Manifest(step=5, states=WHOLE, losses=(), previous=None).check(5, EXPECTED)
    with pytest.raises(ProtocolError, match=reason):
        Manifest(step=step, states=states, losses=(), previous=None).check(5, EXPECTED)


def test_a_token_is_for_one_scope_one_process_and_a_while() -> None:
    secret = b"s" * 16
    token = tokens.mint(secret, "objects/a/read", 10.0)
    tokens.check(secret, token, "objects/a/read", 9.9)
    for wrong, scope, now_s in (
        (secret, "objects/a/write", 1.0),
        (secret, "objects/a/read", 10.1),
        (b"t" * 16, "objects/a/read", 1.0),
    ):
        with pytest.raises(Refused):
            tokens.check(wrong, token, scope, now_s)
    with pytest.raises(Refused, match="malformed"):
        tokens.check(secret, "nonsense", "objects/a/read", 1.0)
