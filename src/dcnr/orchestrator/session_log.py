"""A session's log: reading it from the newest entry that sums up what came before, and appending to it.

Its end is where the first entry is missing, whatever ``log/HEAD`` says. An owner appends one entry at a time, until the
outcome is known, and never beside another owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dcnr.errors import ProtocolError
from dcnr.ids import Epoch, LogIndex, SessionId
from dcnr.machine import StoreHint
from dcnr.orchestrator.desk import Desk
from dcnr.session.log import FOLDED, Entry, Fold, Kind, fold, head_key, log_key

Body = Callable[[LogIndex], Mapping[str, Any]]
"""An entry's body, made when its turn comes: only then its index and the state before it are known."""


HINT_DIGITS = 20
"""As many as the name of an entry has: a longer hint is none."""


def read_entries(desk: Desk, id: SessionId, first: int, then: Callable[[list[bytes]], None]) -> None:
    """The entries from ``first`` up to the first missing one, as they are stored."""
    found: list[bytes] = []

    def got(data: bytes | None) -> None:
        if data is None:
            then(found)
            return
        found.append(data)
        desk.get(log_key(id, first + len(found)), got)

    desk.get(log_key(id, first), got)


def add_up(entries: list[bytes]) -> Fold:
    """Raises :class:`ProtocolError` where one cannot be read or cannot follow."""
    state = Fold()
    for entry in entries:
        state = fold(state, Entry.from_bytes(entry))
    return state


def read_state(
    desk: Desk, id: SessionId, then: Callable[[Fold], None], unreadable: Callable[[ProtocolError], None]
) -> None:
    """What the whole log adds up to: back from the hint ``log/HEAD`` to an entry that carries the folded state, then
    forward. A hint that is missing, old or wrong costs time and nothing else: then everything is read from entry 1."""

    def forward(first: int) -> None:
        def read(found: list[bytes]) -> None:
            try:
                state = add_up(found)
            except ProtocolError as error:
                unreadable(error)
                return
            then(state)

        read_entries(desk, id, first, read)

    def back(index: int) -> None:
        def got(data: bytes | None) -> None:
            try:
                entry = Entry.from_bytes(data or b"")
            except ProtocolError:
                forward(1)
                return
            if entry.index != index:
                forward(1)
            elif entry.kind in FOLDED:
                forward(index)
            else:
                back(index - 1)

        if index <= 1:
            forward(1)
        else:
            desk.get(log_key(id, index), got)

    def hinted(data: bytes | None) -> None:
        known = data is not None and len(data) <= HINT_DIGITS and data.isdigit()
        back(int(data) if data is not None and known else 1)

    desk.get(head_key(id), hinted)


@dataclass(slots=True, kw_only=True)
class Append:
    kind: Kind
    body: Body
    then: Callable[[LogIndex], None]


class SessionLog:
    """The log of one session, as its owner writes it. ``superseded`` is told why it can be written no more."""

    def __init__(self, *, desk: Desk, id: SessionId, state: Fold, superseded: Callable[[str], None]) -> None:
        self.fold = state
        """What the entries so far add up to."""
        self.acquired = b""
        """The newest ``Acquire`` of this owner, as it is stored: hosts believe a new epoch with it."""
        self._desk = desk
        self._id = id
        self._superseded = superseded
        self._queue: deque[Append] = deque()
        self._appending = False
        self._closed = False
        """Another owner writes here: nothing that was under way may still be appended."""

    @property
    def appending(self) -> bool:
        """An append is under way, its outcome unknown."""
        return self._appending

    def append(self, kind: Kind, body: Body, then: Callable[[LogIndex], None]) -> None:
        """Append behind what is queued. ``then`` gets the index once the entry is durable and folded.

        After stepping down nothing is appended and ``then`` is not called.
        """
        if self._closed:
            return
        self._queue.append(Append(kind=kind, body=body, then=then))
        self._next()

    def acquire(self, then: Callable[[LogIndex], None]) -> None:
        """Take the session: the index of the entry is the new epoch. For its owner that only renews the number."""
        self.append(Kind.ACQUIRE, lambda index: {"folded": self.fold.to_json()}, then)

    def _next(self) -> None:
        if self._appending or not self._queue:
            return
        self._appending = True
        append = self._queue[0]
        index = LogIndex(self.fold.last + 1)
        entry = Entry(
            index=index,
            kind=append.kind,
            author=self._desk.author,
            epoch=Epoch(index) if append.kind is Kind.ACQUIRE else self.fold.epoch,
            nonce=self._desk.nonce(),
            body=append.body(index),
        )

        def answered(found: bytes | None) -> None:
            self._appending = False
            if found is None or _is(found, entry):
                self._queue.popleft()
                self.fold = fold(self.fold, entry)
                if entry.kind is Kind.ACQUIRE:
                    self.acquired = entry.to_bytes()
                self._desk.out.append(StoreHint(key=head_key(self._id), data=str(index).encode()))
                append.then(index)
                self._next()
            else:
                self._foreign(found, append)

        self._desk.create(log_key(self._id, index), entry.to_bytes(), answered)

    def _foreign(self, found: bytes, append: Append) -> None:
        """Another has written here. Before our first ``Acquire`` that may be a late entry of an earlier start of ours:
        read on. Anybody else's is a sign of life of the owner, or the ``Acquire`` of a newer one: step down."""
        ours = self.fold.owner == self._desk.author
        try:
            entry = Entry.from_bytes(found)
            self.fold = fold(self.fold, entry)
        except ProtocolError as error:
            self._step_down(f"log entry {self.fold.last + 1} cannot be read: {error}")
            return
        if append.kind is Kind.ACQUIRE and not ours and entry.author.peer == self._desk.author.peer:
            self._next()
        else:
            self._step_down(f"orchestrator {entry.author.peer} has written log entry {entry.index}")

    def look(self) -> None:
        """A host says that there is a newer owner: read what it has written, and step down if it is so."""
        if self._appending or self._closed:
            return  # The append under way will find it.
        self._desk.get(log_key(self._id, self.fold.last + 1), self._looked)

    def _looked(self, found: bytes | None) -> None:
        if found is None or self._appending or self._closed:
            return
        try:
            entry = Entry.from_bytes(found)
        except ProtocolError as error:
            self._step_down(f"log entry {self.fold.last + 1} cannot be read: {error}")
            return
        if entry.index == self.fold.last + 1 and entry.author != self._desk.author:
            self._step_down(f"orchestrator {entry.author.peer} has written log entry {entry.index}")

    def _step_down(self, reason: str) -> None:
        self._queue.clear()
        self._closed = True
        self._superseded(reason)


def _is(found: bytes, entry: Entry) -> bool:
    """Our own bytes, which an append of unknown outcome has left there."""
    try:
        return Entry.from_bytes(found).nonce == entry.nonce
    except ProtocolError:
        return False
