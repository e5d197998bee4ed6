"""Which orchestrators of the same store are alive: each overwrites a hint of its own, and watches the others'.

Wall clocks are never compared. Only time counts in which this process looked, could read, and saw the same hint again:
a store that is away or an observer that was paused condemns nobody. Being wrong costs nothing but a takeover too
early; what makes it safe is the log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcnr.ids import PeerId, SessionId
from dcnr.machine import Instant, StoreFailed, StoreGet, StoreGot, StoreHint, StoreList, StoreListed
from dcnr.network.graph import json_bytes
from dcnr.orchestrator.desk import Desk

PREFIX = "orchestrators/"
ROUNDS = 6
"""The others' hints are read this many times within a lease, and one's own is written at every second of these."""


def beat_key(peer: PeerId) -> str:
    return f"{PREFIX}{peer}/beat"


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the hint of one orchestrator said last, and for how long it has been seen unchanged."""

    stamp: tuple[Any, ...] = ()
    addresses: tuple[str, ...] = ()
    unchanged_s: float = 0.0
    blind_s: float = 0.0
    """For how long it has said that it sees no PNode."""
    read_at: Instant | None = None


class Beats:
    """See the module's docstring. ``told`` is called after every round, with sessions that others say they own."""

    def __init__(
        self, *, desk: Desk, seed: int, addresses: tuple[str, ...], told: Callable[[frozenset[SessionId]], None]
    ) -> None:
        self._desk = desk
        self._seed = seed
        self._addresses = addresses
        self._told = told
        self._me = desk.author.peer
        self._counter = 0
        self._rounds = 0
        self._seen: dict[PeerId, Seen] = {}
        self.owned: Callable[[], list[SessionId]] = list

    @property
    def _pause_s(self) -> float:
        return self._desk.limits.lease_s / ROUNDS

    # --- what is known --------------------------------------------------------------------------------------

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where an orchestrator said it is; nothing for one that has never been seen."""
        return self._addresses if peer == self._me else self._seen.get(peer, Seen()).addresses

    def others(self) -> tuple[str, ...]:
        """Addresses of the others that are alive."""
        return tuple(
            sorted(
                a for p, s in self._seen.items() if s.stamp and s.unchanged_s < self._lease_s(p) for a in s.addresses
            )
        )

    def expired(self, peer: PeerId, patience_s: float) -> bool:
        """Whether another orchestrator has been watched for a lease, and ``patience_s``, and did not renew its hint."""
        if peer == self._me:
            return False
        seen = self._seen.setdefault(peer, Seen())
        return seen.unchanged_s >= self._lease_s(peer) + patience_s

    def blind(self, peer: PeerId) -> bool:
        """Whether another orchestrator has seen no PNode for a lease: it is alive and commands nobody."""
        return peer != self._me and self._seen.get(peer, Seen()).blind_s >= self._lease_s(peer)

    def watch_anew(self, peer: PeerId) -> None:
        """It has just been seen to act."""
        seen = self._seen.setdefault(peer, Seen())
        seen.unchanged_s = seen.blind_s = 0.0

    def _lease_s(self, peer: PeerId) -> float:
        """With jitter, so that of several observers one is usually the first."""
        word = hashlib.blake2b(f"{self._seed}/{peer}".encode(), digest_size=4).digest()
        return self._desk.limits.lease_s + self._pause_s * int.from_bytes(word, "little") / 2**32

    # --- the round ------------------------------------------------------------------------------------------

    def go_round(self) -> None:
        """Write one's own hint or not, read the others', and come back for ever."""
        self._rounds += 1
        if self._rounds % 2:
            self._write()
        self._desk.after(self._pause_s, self.go_round)
        self._desk.ask(lambda id: StoreList(id=id, prefix=PREFIX), self._listed)

    def _write(self) -> None:
        self._counter += 1
        author = self._desk.author
        value = {
            "incarnation": [author.incarnation.boot, author.incarnation.nonce],
            "counter": self._counter,
            "addresses": list(self._addresses),
            "sessions": list(self.owned()),
            "blind": not any(node.usable for node in self._desk.nodes.values()),
        }
        self._desk.out.append(StoreHint(key=beat_key(self._me), data=json_bytes(value)))

    def _listed(self, event: StoreListed | StoreFailed) -> None:
        if isinstance(event, StoreFailed):
            return
        keys = {PeerId(key.split("/")[1]): key for key in event.keys if key.endswith("/beat")}
        keys.pop(self._me, None)
        owned: set[SessionId] = set()
        waiting = set(keys)
        for peer in [p for p in self._seen if p not in keys]:
            self._count(peer, (), (), blind=False)  # It has never written one, or nobody lists it yet.

        def read(peer: PeerId) -> Callable[[StoreGot | StoreFailed], None]:
            def got(event: StoreGot | StoreFailed) -> None:
                if isinstance(event, StoreGot):
                    stamp, addresses, sessions, blind = _parsed(event.data)
                    self._count(peer, stamp, addresses, blind=blind)
                    owned.update(sessions)
                waiting.discard(peer)
                if not waiting:
                    self._told(frozenset(owned))

            return got

        for peer, key in sorted(keys.items()):
            self._desk.ask(lambda id, key=key: StoreGet(id=id, key=key), read(peer))  # type: ignore[misc]
        if not waiting:
            self._told(frozenset())

    def _count(self, peer: PeerId, stamp: tuple[Any, ...], addresses: tuple[str, ...], *, blind: bool) -> None:
        seen, now = self._seen.setdefault(peer, Seen()), self._desk.now
        since_s = min(now - seen.read_at, 2 * self._pause_s) if seen.read_at is not None else 0.0
        seen.unchanged_s += since_s
        seen.blind_s = seen.blind_s + since_s if blind else 0.0
        if stamp != seen.stamp:
            seen.stamp, seen.addresses, seen.unchanged_s = stamp, addresses, 0.0
        seen.read_at = now


def _parsed(data: bytes | None) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[SessionId, ...], bool]:
    """Stamp, addresses, sessions, whether it sees no PNode; a hint that makes no sense is as good as none."""
    try:
        value = json.loads(data or b"")
        boot, nonce = value["incarnation"]
        stamp = (int(boot), str(nonce), int(value["counter"]))
        addresses = tuple(str(a) for a in value["addresses"])
        return stamp, addresses, tuple(SessionId(str(s)) for s in value["sessions"]), bool(value.get("blind"))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return (), (), (), False
