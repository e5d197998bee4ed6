"""The log of a session: its entries, their bytes, and what they add up to.

``log/<n>`` holds one JSON object each, n = 20 digits from 1, created once and never changed. Only the log
decides: whatever does not follow from record and log is an entry first and an action afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from dcnr.errors import ProtocolError
from dcnr.ids import Epoch, Incarnation, Instance, LogIndex, PeerId, SessionId, Sha256, VNodeId
from dcnr.network.graph import json_bytes


class Kind(StrEnum):
    ACQUIRE = "Acquire"
    PLACE = "Place"
    ROLLBACK = "Rollback"
    MOVE = "Move"
    RESTORE = "Restore"
    COMMIT = "Commit"
    DROP = "Drop"
    INVALIDATE = "Invalidate"
    SUSPEND = "Suspend"
    RESUME = "Resume"
    STOP = "Stop"
    FINISH = "Finish"
    FAIL = "Fail"


def log_key(session: SessionId, index: int) -> str:
    return f"sessions/{session}/log/{index:020d}"


def head_key(session: SessionId) -> str:
    return f"sessions/{session}/log/HEAD"


def record_key(session: SessionId) -> str:
    return f"sessions/{session}/record.json"


def manifest_key(session: SessionId, sha256: Sha256) -> str:
    return f"sessions/{session}/manifests/{sha256}.json"


def objects_prefix(session: SessionId) -> str:
    return f"sessions/{session}/objects/"


def object_key(session: SessionId, sha256: Sha256) -> str:
    return f"{objects_prefix(session)}{sha256}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    peer: PeerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry. ``nonce`` tells an author its own bytes from another's after an append of unknown outcome."""

    index: LogIndex
    kind: Kind
    author: Author
    epoch: Epoch
    nonce: str
    body: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        return json_bytes(
            {
                "index": self.index,
                "kind": self.kind.value,
                "author": self.author.peer,
                "incarnation": [self.author.incarnation.boot, self.author.incarnation.nonce],
                "epoch": self.epoch,
                "nonce": self.nonce,
                "body": dict(self.body),
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> Entry:
        """Raises :class:`ProtocolError` on anything that is not an entry."""
        try:
            value = json.loads(data)
            boot, nonce = value["incarnation"]
            return Entry(
                index=LogIndex(int(value["index"])),
                kind=Kind(value["kind"]),
                author=Author(peer=PeerId(value["author"]), incarnation=Incarnation(boot=int(boot), nonce=str(nonce))),
                epoch=Epoch(int(value["epoch"])),
                nonce=str(value["nonce"]),
                body=dict(value["body"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(f"malformed log entry: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Where a placement starts: the state after ``step``, as ``manifest`` names it; step 0 = init(seed)."""

    step: int = 0
    manifest: Sha256 | None = None

    def to_json(self) -> list[Any]:
        return [self.step, self.manifest]

    @staticmethod
    def from_json(value: Any) -> Base:
        step, manifest = value
        return Base(step=int(step), manifest=None if manifest is None else Sha256(manifest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where a VNode is: its PNode, which start of it, its worker, and the numeric class."""

    peer: PeerId
    incarnation: Incarnation
    worker: int
    numeric_class: str

    def to_json(self) -> list[Any]:
        return [self.peer, self.incarnation.boot, self.incarnation.nonce, self.worker, self.numeric_class]

    @staticmethod
    def from_json(value: Any) -> Spot:
        peer, boot, nonce, worker, numeric_class = value
        return Spot(
            peer=PeerId(peer),
            incarnation=Incarnation(boot=int(boot), nonce=str(nonce)),
            worker=int(worker),
            numeric_class=str(numeric_class),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """A start of a PNode that has a VNode's state of the base, and where that PNode can be reached."""

    peer: PeerId
    incarnation: Incarnation
    addresses: tuple[str, ...]

    def to_json(self) -> list[Any]:
        return [self.peer, self.incarnation.boot, self.incarnation.nonce, list(self.addresses)]

    @staticmethod
    def from_json(value: Any) -> Keeper:
        peer, boot, nonce, addresses = value
        return Keeper(
            peer=PeerId(peer),
            incarnation=Incarnation(boot=int(boot), nonce=str(nonce)),
            addresses=tuple(str(address) for address in addresses),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What the entries up to ``last`` add up to. Pure: :func:`fold` of one entry after another."""

    last: LogIndex = LogIndex(0)
    epoch: Epoch = Epoch(0)
    owner: Author | None = None
    state: str = "new"
    """new, running, suspended, stopped, finished, failed."""
    reason: str = ""
    instance: Instance = Instance(0)
    """Index of the newest Place, Rollback or Move."""
    placement: Mapping[VNodeId, Spot] = field(default_factory=dict)
    window: int = 0
    base: Base = field(default_factory=Base)
    keepers: Mapping[VNodeId, tuple[Keeper, ...]] = field(default_factory=dict)
    """Who has the states of the base, where that is no commit."""
    commits: tuple[Base, ...] = ()
    """Neither dropped nor invalidated, ascending."""
    failures: tuple[tuple[int, str], ...] = ()
    """(step, VNode) of task failures that a Rollback answered: the second at one step appends Fail."""
    since: str = ""
    """Kind of the newest entry that is no ``Acquire``: whether anything has happened since a placement."""

    def newest(self) -> Base:
        """The newest commit, or init."""
        return self.commits[-1] if self.commits else Base()

    def spots(self) -> dict[VNodeId, PeerId]:
        """The PNode of every VNode."""
        return {v: spot.peer for v, spot in self.placement.items()}

    def on_pnodes(self) -> bool:
        """Whether the placement's base is no commit: a state that only PNodes hold."""
        return self.base.manifest is not None and self.base.step > self.newest().step

    def furthest(self) -> Base:
        """The newest commit, or the base where that is newer: it may be a state that only PNodes hold."""
        return max(self.newest(), self.base, key=lambda base: base.step)

    def to_json(self) -> dict[str, Any]:
        """What ``Acquire`` and placements carry, so that reading a log stays short."""
        return {
            "state": self.state,
            "reason": self.reason,
            "instance": self.instance,
            "placement": {v: s.to_json() for v, s in self.placement.items()},
            "window": self.window,
            "base": self.base.to_json(),
            "keepers": {v: [k.to_json() for k in keepers] for v, keepers in self.keepers.items()},
            "commits": [c.to_json() for c in self.commits],
            "failures": [list(f) for f in self.failures],
            "since": self.since,
        }


def _from_json(value: Mapping[str, Any], before: Fold) -> Fold:
    return replace(
        before,
        state=str(value["state"]),
        reason=str(value["reason"]),
        instance=Instance(int(value["instance"])),
        placement={VNodeId(v): Spot.from_json(s) for v, s in value["placement"].items()},
        window=int(value["window"]),
        base=Base.from_json(value["base"]),
        keepers={VNodeId(v): tuple(map(Keeper.from_json, keepers)) for v, keepers in value.get("keepers", {}).items()},
        commits=tuple(Base.from_json(c) for c in value["commits"]),
        failures=tuple((int(s), str(v)) for s, v in value["failures"]),
        since=str(value.get("since", "")),
    )


PLACING = frozenset({Kind.PLACE, Kind.ROLLBACK, Kind.MOVE})
"""Kinds that name a place for every VNode."""
FOLDED = frozenset({Kind.ACQUIRE, *PLACING})
"""Kinds that carry the folded state: a reader may start at the newest of these."""


def fold(state: Fold, entry: Entry) -> Fold:
    """``state`` after ``entry``. Raises :class:`ProtocolError` where an entry cannot follow (LogLinear)."""
    if entry.index != state.last + 1 and not (entry.kind in FOLDED and state.last == 0):
        raise ProtocolError(f"log entry {entry.index} cannot follow entry {state.last}")
    if entry.kind is not Kind.ACQUIRE and state.owner is not None and entry.author != state.owner:
        raise ProtocolError(f"log entry {entry.index} is by {entry.author.peer}, who does not own the session")
    body = entry.body
    try:
        if entry.kind in FOLDED:
            state = _from_json(body["folded"], state)
        state = replace(state, last=entry.index, epoch=entry.epoch)
        if entry.kind is not Kind.ACQUIRE:
            state = replace(state, since=entry.kind.value)
        match entry.kind:
            case Kind.ACQUIRE:
                return replace(state, owner=entry.author, epoch=Epoch(entry.index))
            case Kind.PLACE | Kind.ROLLBACK | Kind.MOVE:
                return replace(state, owner=state.owner or entry.author)
            case Kind.COMMIT:
                commit = Base(step=int(body["step"]), manifest=Sha256(body["manifest"]))
                return replace(state, commits=(*state.commits, commit))
            case Kind.DROP | Kind.INVALIDATE:
                step = int(body["step"])
                return replace(state, commits=tuple(c for c in state.commits if c.step != step))
            case Kind.SUSPEND:
                return replace(state, state="suspended", reason=str(body.get("reason", "")))
            case Kind.RESUME:
                return replace(state, state="running", reason="", failures=())
            case Kind.STOP:
                return replace(state, state="stopped")
            case Kind.FINISH:
                return replace(state, state="finished")
            case Kind.FAIL:
                return replace(state, state="failed", reason=str(body["reason"]))
            case Kind.RESTORE:
                raise ProtocolError(f"log entry {entry.index}: {entry.kind.value} is not in this version")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ProtocolError(f"malformed {entry.kind.value} at log entry {entry.index}: {error}") from error


def placed(state: Fold, *, index: LogIndex, placement: Mapping[VNodeId, Spot], window: int, base: Base) -> Fold:
    """The folded state that a ``Place``, ``Rollback`` or ``Move`` at ``index`` carries; a commit needs no keepers."""
    return replace(
        state,
        instance=Instance(index),
        placement=dict(placement),
        window=window,
        base=base,
        keepers={},
        state="running",
        reason="",
    )
