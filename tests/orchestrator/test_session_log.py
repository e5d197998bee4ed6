"""Reading a log from any hint, appending, renewing, stepping down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.config import Limits
from dcnr.errors import ProtocolError
from dcnr.ids import Epoch, Incarnation, LogIndex, PeerId, SessionId
from dcnr.machine import StoreCreate, StoreCreated, StoreGet, StoreGot, StoreTaken
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.session_log import SessionLog, add_up, read_state
from dcnr.session.log import FOLDED, Author, Entry, Fold, Kind, head_key, log_key
from dcnr.session.recipe import Recipe
from tests.scenarios.stage import Stage

ID = SessionId("s")
ME = Author(peer=PeerId("me"), incarnation=Incarnation(boot=2, nonce="n"))
OTHER = Author(peer=PeerId("other"), incarnation=Incarnation(boot=1, nonce="o"))
EARLIER = Author(peer=PeerId("me"), incarnation=Incarnation(boot=1, nonce="e"))


def a_desk(author: Author = ME) -> Desk:
    return Desk(author=author, secret=b"0" * 32, limits=Limits(), unix_s_at_zero=0.0)


class Shelf:
    """A store that answers at once."""

    def __init__(self, desk: Desk, objects: dict[str, bytes]) -> None:
        self.desk = desk
        self.objects = objects
        self.read: list[str] = []

    def settle(self) -> None:
        while self.desk.out:
            effect = self.desk.out.pop(0)
            match effect:
                case StoreGet(id=id, key=key):
                    self.read.append(key)
                    self.desk.answer(id, StoreGot(id=id, data=self.objects.get(key)))
                case StoreCreate(id=id, key=key, data=data) if key in self.objects:
                    self.desk.answer(id, StoreTaken(id=id, data=self.objects[key]))
                case StoreCreate(id=id, key=key, data=data):
                    self.objects[key] = data
                    self.desk.answer(id, StoreCreated(id=id))
                case _:
                    pass


def entries_of_a_run() -> list[bytes]:
    """A real log: commits, drops, a lost PNode."""
    stage = Stage(pnodes=2, recipe=Recipe(steps=5, batch_size=1, microbatches=1, checkpoint_every=1))
    stage.run_until("orchestrator tells: step_done step=3")
    stage.kill(stage.pnodes[0])
    stage.run_to_end()
    return stage.entries()


LOG = entries_of_a_run()


def read(hint: bytes | None, log: list[bytes] = LOG) -> tuple[Fold | ProtocolError, list[str]]:
    objects = {log_key(ID, n): entry for n, entry in enumerate(log, 1)}
    if hint is not None:
        objects[head_key(ID)] = hint
    shelf = Shelf(a_desk(), objects)
    found: list[Fold | ProtocolError] = []
    read_state(shelf.desk, ID, found.append, found.append)
    shelf.settle()
    assert len(found) == 1
    return found[0], shelf.read


def test_the_run_is_worth_reading() -> None:
    kinds = [Entry.from_bytes(entry).kind for entry in LOG]
    assert {Kind.ACQUIRE, Kind.PLACE, Kind.ROLLBACK, Kind.COMMIT, Kind.DROP, Kind.FINISH} <= set(kinds)


@pytest.mark.parametrize("hint", range(len(LOG) + 1))
def test_every_hint_leads_to_the_same_state(hint: int) -> None:
    assert read(b"%d" % hint)[0] == add_up(LOG)


@pytest.mark.parametrize(
    "hint", [None, b"", b"0", b"-3", b"seven", b"\xff", b"9" * 19, b"9" * 5000, b"%d" % (len(LOG) + 1)]
)
def test_a_missing_or_wrong_hint_costs_time_only(hint: bytes | None) -> None:
    state, reads = read(hint)
    assert state == add_up(LOG)
    assert [key for key in reads if key != head_key(ID)][-len(LOG) - 1 :] == [
        log_key(ID, n) for n in range(1, len(LOG) + 2)
    ]


def test_a_good_hint_saves_what_comes_before_the_newest_folded_entry() -> None:
    newest = max(n for n, entry in enumerate(LOG, 1) if Entry.from_bytes(entry).kind in FOLDED)
    assert newest > 3
    reads = read(b"%d" % len(LOG))[1]
    assert log_key(ID, newest) in reads
    assert not {log_key(ID, n) for n in range(1, newest)} & set(reads)


def test_an_entry_that_cannot_follow_makes_the_log_unreadable() -> None:
    state, _ = read(b"1", [*LOG[:4], LOG[5]])
    assert isinstance(state, ProtocolError)
    state, _ = read(None, [*LOG[:3], b"rubbish"])
    assert isinstance(state, ProtocolError)


# --- appending ----------------------------------------------------------------------------------------------


def an_owner(objects: dict[str, bytes]) -> tuple[SessionLog, Shelf, list[str]]:
    shelf = Shelf(a_desk(), objects)
    lost: list[str] = []
    return SessionLog(desk=shelf.desk, id=ID, state=Fold(), superseded=lost.append), shelf, lost


def foreign(index: int, kind: Kind = Kind.ACQUIRE, author: Author = OTHER) -> bytes:
    body = {"folded": Fold().to_json()} if kind is Kind.ACQUIRE else {}
    return Entry(
        index=LogIndex(index), kind=kind, author=author, epoch=Epoch(1 if kind is not Kind.ACQUIRE else index),
        nonce=f"foreign {index}", body=body,
    ).to_bytes()  # fmt: skip


def test_entries_are_appended_one_at_a_time_in_their_order() -> None:
    log, shelf, _ = an_owner({})
    done: list[int] = []
    log.acquire(done.append)
    log.append(Kind.STOP, lambda index: {}, done.append)
    log.append(Kind.RESUME, lambda index: {}, done.append)
    assert sum(isinstance(effect, StoreCreate) for effect in shelf.desk.out) == 1
    shelf.settle()
    assert done == [1, 2, 3]
    assert log.fold == replace(add_up(list(shelf.objects.values())), last=LogIndex(3))
    assert log.fold.state == "running"


def test_before_its_first_acquire_an_owner_reads_on_past_late_entries_of_its_earlier_start() -> None:
    late = {log_key(ID, 1): foreign(1, author=EARLIER), log_key(ID, 2): foreign(2, Kind.STOP, EARLIER)}
    log, shelf, lost = an_owner(late)
    log.acquire(lambda index: None)
    shelf.settle()
    assert (log.fold.epoch, log.fold.owner, log.fold.state, lost) == (3, ME, "stopped", [])


@pytest.mark.parametrize("kind", [Kind.ACQUIRE, Kind.STOP])
def test_another_orchestrators_entry_in_its_place_ends_a_takeover(kind: Kind) -> None:
    log, shelf, lost = an_owner({log_key(ID, 1): foreign(1, kind)})
    log.acquire(lambda index: None)
    shelf.settle()
    assert lost == ["orchestrator other has written log entry 1"]
    assert log_key(ID, 2) not in shelf.objects


def test_an_owner_that_hears_of_a_newer_one_looks_and_steps_down() -> None:
    log, shelf, lost = an_owner({})
    log.acquire(lambda index: None)
    shelf.settle()
    log.look()
    shelf.settle()
    assert lost == []
    shelf.objects[log_key(ID, 2)] = foreign(2)
    log.look()
    shelf.settle()
    assert lost == ["orchestrator other has written log entry 2"]


@pytest.mark.parametrize("renews", [False, True])
def test_after_it_a_foreign_entry_means_to_step_down(renews: bool) -> None:
    log, shelf, lost = an_owner({log_key(ID, 2): foreign(2)})
    log.acquire(lambda index: None)
    shelf.settle()
    assert log.fold.owner == ME
    done: list[int] = []
    if renews:
        log.acquire(done.append)
    else:
        log.append(Kind.STOP, lambda index: {}, done.append)
    log.append(Kind.FINISH, lambda index: {}, done.append)
    shelf.settle()
    assert lost == ["orchestrator other has written log entry 2"]
    assert not done
    assert log_key(ID, 3) not in shelf.objects


def test_after_stepping_down_nothing_that_was_under_way_is_appended() -> None:
    log, shelf, lost = an_owner({log_key(ID, 2): foreign(2)})
    log.acquire(lambda index: None)
    log.append(Kind.STOP, lambda index: {}, lambda index: None)
    shelf.settle()
    assert lost
    done: list[int] = []
    log.append(Kind.COMMIT, lambda index: {"step": 1, "manifest": "m"}, done.append)
    shelf.settle()
    assert (done, sorted(shelf.objects)) == ([], [log_key(ID, 1), log_key(ID, 2)])


def test_its_own_bytes_are_known_after_an_append_of_unknown_outcome() -> None:
    log, shelf, lost = an_owner({})
    done: list[int] = []
    log.acquire(done.append)
    create = shelf.desk.out.pop()
    assert isinstance(create, StoreCreate)
    shelf.objects[create.key] = create.data
    shelf.desk.answer(create.id, StoreTaken(id=create.id, data=create.data))
    assert (done, lost) == ([1], [])


# --- renewing -----------------------------------------------------------------------------------------------


def test_acquire_is_renewed_directly_before_a_placement_and_never_elsewhere() -> None:
    recipe = Recipe(steps=6, batch_size=1, microbatches=1, checkpoint_every=1)
    stage = Stage(pnodes=3, recipe=recipe, limits=Limits(acquire_every=3))
    for step, pnode in ((3, 0), (5, 1)):
        stage.run_until(f"orchestrator tells: step_done step={step}")
        stage.kill(stage.pnodes[pnode])
    stage.run_to_end()
    assert stage.client.ended == "finished"
    log = [Entry.from_bytes(entry) for entry in stage.entries()]
    renewals = [entry for entry in log[1:] if entry.kind is Kind.ACQUIRE]
    assert renewals
    for entry in renewals:
        following = log[entry.index]
        assert following.kind is Kind.ROLLBACK
        assert following.epoch == Epoch(entry.index)
        told = [line for line in stage.lines if f"epoch={entry.index}" in line and "-> pnode" in line]
        assert told[0].split(": ")[1].startswith("Tickets ")
