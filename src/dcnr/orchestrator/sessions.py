"""Every session and network of the store, as one of several orchestrators knows them.

A session that this orchestrator owns it commands. Any other it follows: it reads the log when it is asked, watches the
owner's hint, and takes the session over when that is renewed no more.
"""

from __future__ import annotations

from collections.abc import Callable

from dcnr.errors import DCNRError, ProtocolError
from dcnr.ids import NetworkId, PeerId, SessionId
from dcnr.machine import StoreFailed, StoreList, StoreListed
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import from_canonical_json
from dcnr.orchestrator.beats import Beats
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.naming import begun
from dcnr.orchestrator.owner import ENDED, Evaluate, Owner
from dcnr.orchestrator.session_log import read_entries, read_state
from dcnr.orchestrator.targets import Targets, load_targets
from dcnr.session.log import Entry, Fold, fold, record_key
from dcnr.session.record import Record

NOBODY = PeerId("")
"""Owns a session that has a record and no log yet."""
ID_CHARACTERS = 32
_NETWORK_CHARACTERS = 64


class Sessions:
    """See the module's docstring."""

    def __init__(self, *, desk: Desk, beats: Beats, evaluate: Evaluate) -> None:
        self.networks: dict[NetworkId, Network] = {}
        self.owners: dict[SessionId, Owner] = {}
        self.reading = 0
        """Reads of the start that are under way: until all are done nobody can say what does not exist."""
        self.superseded: Callable[[SessionId], None] = lambda session: None
        """Told of a session that another orchestrator turns out to own, once it is known who."""
        self._desk = desk
        self._beats = beats
        self._evaluate = evaluate
        self._being_read: dict[SessionId, list[Callable[[], None]]] = {}

    # --- starting -------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Find what the store holds: networks by name, and sessions that are to go on."""
        self._list("networks/", self._found_networks)
        self._list("sessions/", self._found_sessions)

    def _read_ends(self) -> None:
        self.reading -= 1

    def _list(self, prefix: str, then: Callable[[tuple[str, ...]], None]) -> None:
        self.reading += 1

        def ask() -> None:
            self._desk.ask(lambda id: StoreList(id=id, prefix=prefix), answered)

        def answered(event: StoreListed | StoreFailed) -> None:
            if isinstance(event, StoreListed):
                then(event.keys)
                self._read_ends()
            else:
                self._desk.after(self._desk.limits.store_retry_s, ask)

        ask()

    def _found_networks(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            if key.endswith("/definition.json"):
                self.reading += 1
                self.load_network(NetworkId(key.split("/")[1]), lambda network: self._read_ends())

    def _found_sessions(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            if key.endswith("/record.json"):
                self.reading += 1
                self.read(SessionId(key.split("/")[1]), self._read_ends)

    # --- networks -------------------------------------------------------------------------------------------

    def load_network(self, network: NetworkId, then: Callable[[Network | None], None]) -> None:
        if network in self.networks:
            then(self.networks[network])
            return

        def got(data: bytes | None) -> None:
            try:
                if data is None:
                    raise ValueError("it is missing")
                found = analyse(from_canonical_json(data))
                if found.id != network:
                    raise ValueError("it does not hash to its name")
                self.networks[network] = found
            except (DCNRError, ValueError, KeyError, TypeError) as error:
                self._desk.emit("network_unreadable", None, {"network": network, "reason": str(error)})
                then(None)
                return
            then(self.networks[network])

        self._desk.get(f"networks/{network}/definition.json", got)

    def find_network(self, name: str) -> Network:
        """By id, unique prefix of it, or name (the newest of that name). Raises :class:`UnknownName`."""
        exact = self.networks.get(NetworkId(name))
        if exact is not None:
            return exact
        named = [n for n in self.networks.values() if n.definition.name == name]
        if named:
            return named[-1]
        return self.networks[NetworkId(begun(name, self.networks, "network", "dcnr network list"))]

    # --- reading a session ----------------------------------------------------------------------------------

    def read(self, session: SessionId, then: Callable[[], None] = lambda: None) -> None:
        """Record, network, what the log adds up to; then own it or follow it."""
        if session in self._being_read:
            self._being_read[session].append(then)
            return
        self._being_read[session] = [then]

        def over() -> None:
            for each in self._being_read.pop(session):
                each()

        def unreadable(reason: str) -> None:
            self._desk.emit("session_unreadable", session, {"reason": reason})
            over()

        def got_record(data: bytes | None) -> None:
            try:
                if data is None:
                    raise ProtocolError("its record is missing")
                record = Record.from_bytes(data)
            except ProtocolError as error:
                unreadable(str(error))
                return
            self.load_network(record.network, lambda network: got_network(record, network))

        def got_network(record: Record, network: Network | None) -> None:
            if network is None:
                unreadable(f"network {record.network} is missing")
                return
            read_state(
                self._desk,
                session,
                lambda state: self._found(self.add(session, record, network, state, Targets({})), over),
                lambda error: unreadable(str(error)),
            )

        self._desk.get(record_key(session), got_record)

    def add(self, session: SessionId, record: Record, network: Network, state: Fold, targets: Targets) -> Owner:
        """What is known of a session from here on."""
        owner = Owner(
            desk=self._desk,
            id=session,
            record=record,
            network=network,
            state=state,
            targets=targets,
            evaluate=self._evaluate,
            superseded=self._superseded,
        )
        self.owners[session] = owner
        return owner

    def _found(self, owner: Owner, then: Callable[[], None]) -> None:
        owner.follow(owner.fold)
        if owner.phase != "followed":
            owner.load_history(then)
            return
        peer = _owner_of(owner)
        if peer == self._desk.author.peer:
            self._take_over(owner)  # An earlier start of this orchestrator owned it.
        else:
            self._beats.watch_anew(peer)
        then()

    def _superseded(self, owner: Owner) -> None:
        """Another orchestrator owns it: from now on it is followed."""
        if self.owners.get(owner.id) is owner:
            self.read(owner.id, lambda: self.superseded(owner.id))

    # --- taking over ----------------------------------------------------------------------------------------

    def look_around(self, owned: frozenset[SessionId]) -> None:
        """After a round of hints: are there new sessions, and is an owner silent?"""
        for session in owned - self.owners.keys():
            self.read(session)
        for session in owned & self.owners.keys():
            if self.owners[session].phase in ENDED:
                self.fresh(self.owners[session], lambda owner: None)  # It was resumed elsewhere.
        for owner in list(self.owners.values()):
            if owner.id in self._being_read:
                continue  # It is about to be another object's, with whoever follows it; that one alone may take it over.
            if owner.active:
                owner.look()  # Whoever was paused or cut off for long hears of its successor from the log alone.
            elif owner.phase == "followed" and self._silent(owner):
                self._desk.emit("taking_over", owner.id, {"silent": _owner_of(owner)})
                self._take_over(owner)

    def _silent(self, owner: Owner) -> bool:
        """Whether the session's owner does not see to it: it is not there, or it is cut off from every PNode and this
        orchestrator sees a host. Where none of them is linked here, another may take over without a rollback."""
        hosts, peer, desk = owner.hosts(), _owner_of(owner), self._desk
        here = [node for host in hosts if (node := desk.node(host)) is not None]
        if here:
            # PNodes that come back may find this one first: its owner gets as long to be found as a lease lasts.
            seen_s = max(desk.now - node.linked_at for node in here)
            return self._beats.expired(peer, 0.0) or (seen_s >= desk.limits.lease_s and self._beats.blind(peer))
        return self._beats.expired(peer, self._desk.limits.recover_wait_s if hosts else 0.0)

    def _take_over(self, owner: Owner) -> None:
        """Read on to the end of the log first: it may have gone on elsewhere, or have ended."""
        before = _owner_of(owner)

        def fresh(owner: Owner) -> None:
            if owner.phase != "followed":
                return
            if _owner_of(owner) != before:
                self._beats.watch_anew(_owner_of(owner))
                return
            owner.phase = "acquiring"
            load_targets(self._desk, owner.network, owner.record, got_targets, failed)

        def got_targets(targets: Targets) -> None:
            owner.opens.targets = targets
            owner.load_history(acquire)

        def acquire() -> None:
            if owner.phase == "acquiring":  # It may have been found with another owner meanwhile.
                owner.acquire()

        def failed(reason: str) -> None:
            self._desk.emit("session_unreadable", owner.id, {"reason": reason})
            owner.follow(owner.fold)
            self._beats.watch_anew(before)
            if before == self._desk.author.peer:
                self._desk.after(self._desk.limits.recover_wait_s, lambda: self._take_over(owner))

        self.fresh(owner, fresh)

    # --- being asked ----------------------------------------------------------------------------------------

    def find(self, name: str) -> Owner:
        """By id or unique prefix of it. Raises :class:`UnknownName`."""
        return self.owners[SessionId(begun(name, self.owners, "session", "dcnr session list"))]

    def fresh(self, owner: Owner, then: Callable[[Owner], None]) -> None:
        """``owner`` as the log has it now; its own sessions an orchestrator knows."""
        if owner.active:
            then(owner)
            return

        def read(found: list[bytes]) -> None:
            current = self.owners[owner.id]
            if current is not owner or owner.active or not found:
                then(current)
                return
            state = owner.fold
            try:
                for entry in map(Entry.from_bytes, found):
                    if entry.index > state.last:  # Somebody else who asked has read on meanwhile.
                        state = fold(state, entry)
            except ProtocolError as error:
                self._desk.emit("session_unreadable", owner.id, {"reason": str(error)})
                then(owner)
                return
            owner.follow(state)
            if owner.phase == "followed":
                self._beats.watch_anew(_owner_of(owner))
                then(owner)
            else:
                owner.load_history(lambda: then(owner))

        read_entries(self._desk, owner.id, owner.fold.last + 1, read)

    def all_fresh(self, then: Callable[[], None]) -> None:
        """Every session as its log has it now."""
        waiting = set(self.owners)
        if not waiting:
            then()
            return

        def done(owner: Owner) -> None:
            waiting.discard(owner.id)
            if not waiting:
                then()

        for owner in list(self.owners.values()):
            self.fresh(owner, done)

    def look(self, name: str, then: Callable[[], None]) -> None:
        """Somebody names what is not known here: another orchestrator may have made it a moment ago."""

        def ask() -> None:
            self._desk.ask(lambda id: StoreList(id=id, prefix="networks/"), listed)

        def listed(event: StoreListed | StoreFailed) -> None:
            if isinstance(event, StoreFailed):
                self._desk.after(self._desk.limits.store_retry_s, ask)
                return
            waiting = 1
            unknown = [
                n for k in event.keys if k.endswith("/definition.json") and (n := k.split("/")[1]) not in self.networks
            ]

            def one(*_: object) -> None:
                nonlocal waiting
                waiting -= 1
                if waiting == 0:
                    then()

            for network in unknown:
                waiting += 1
                self.load_network(NetworkId(network), one)
            if len(name) == _NETWORK_CHARACTERS and name.isalnum() and name not in (*self.networks, *unknown):
                # A list may not show yet what was created a moment ago; its own name does.
                waiting += 1
                self._desk.get(
                    f"networks/{name}/definition.json",
                    lambda data: one() if data is None else self.load_network(NetworkId(name), one),
                )
            if len(name) == ID_CHARACTERS and name.isalnum() and SessionId(name) not in self.owners:
                waiting += 1
                self.read(SessionId(name), one)
            one()

        ask()


def _owner_of(owner: Owner) -> PeerId:
    return owner.fold.owner.peer if owner.fold.owner is not None else NOBODY
