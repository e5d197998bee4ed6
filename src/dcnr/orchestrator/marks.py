"""Fast regain: between commits, the state after a step that every host keeps, and one other PNode beside it.

A *mark* is whole when every VNode's state after the step is on two PNodes and the step is done. Then a loss costs the
steps since the mark instead of those since the commit, as long as one keeper of each state is there. The store sees
nothing of it before a rollback begins from it. Marks are a help and no promise: one that fails is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dcnr.ids import PeerId, SessionId, VNodeId
from dcnr.machine import Instant
from dcnr.network.analysis import Network
from dcnr.orchestrator.checkpoints import Checkpoints, Training
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.pace import Pace
from dcnr.orchestrator.session_log import SessionLog
from dcnr.protocol import messages as m
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.log import PLACING, Base, Keeper, manifest_key


@dataclass(slots=True, kw_only=True)
class Mark:
    step: int
    keepers: dict[VNodeId, tuple[m.Neighbour, ...]]
    """The VNode's host and that one's guard, as they were when it was taken, as far as they have not failed to give it."""
    guards: Mapping[PeerId, m.Neighbour] = field(default_factory=dict)
    """By host."""
    waiting: set[PeerId] = field(default_factory=set)
    """Hosts that have not acknowledged."""
    asked_at: Instant = Instant(0.0)
    done_at: Instant | None = None
    states: dict[VNodeId, StoredState] = field(default_factory=dict)


class Marks:
    """See the module's docstring. At most one is being taken; the newest whole one is known."""

    def __init__(
        self,
        *,
        desk: Desk,
        log: SessionLog,
        id: SessionId,
        network: Network,
        checkpoints: Checkpoints,
        training: Training,
    ) -> None:
        self.newest: Mark | None = None
        self._desk = desk
        self._log = log
        self._id = id
        self._checkpoints = checkpoints
        checkpoints.on_commit = self._overtaken
        self._training = training
        self._stateful = tuple(v for v, info in network.vnodes.items() if info.parameters)
        self._updating = tuple(v for v in network.vnodes if network.uses(v))
        self._taking: Mark | None = None
        self.wanted = False
        """A move waits for the next one: nothing is opened beyond it."""
        self._hold = 0
        """The step beyond which nothing is opened: its mark, or the commit that is due there, is under way."""
        limits = desk.limits
        self._pace = Pace(
            desk.now,
            prior_s=limits.loss_prior_s,
            least_s=limits.mark_least_s,
            cost_factor=limits.mark_cost_factor,
        )
        self.guards: set[PeerId] = set()
        """PNodes that were told to keep something."""
        self._distrusted: dict[PeerId, Instant] = {}
        """PNodes that did not keep what they should have, until when they are not asked again."""
        self.token = desk.token(f"marks/{id}")
        """Keepers give a state to whoever brings it; they compare it and nothing else."""

    # --- the mark as a base ---------------------------------------------------------------------------------

    def base(self) -> Mark | None:
        """The newest whole mark, if it is newer than the newest commit and each of its states has a keeper."""
        mark = self.newest
        if mark is None or mark.step <= self._log.fold.newest().step:
            return None
        return mark if all(self._keepers(mark, v) for v in mark.states) else None

    def gone(self) -> bool:
        """Whether one of the newest mark's states has no keeper that is there, or whose link may come back."""
        mark, lost = self.newest, self._desk.is_lost
        return mark is None or any(
            all(lost(k.peer, k.incarnation) for k in keepers) for keepers in mark.keepers.values()
        )

    def choose_base(self, then: Callable[[Base], None]) -> None:
        """The newest step whose states are all to be had: the newest commit's, or that of a mark, which is written down
        now."""
        mark = self.base()
        if mark is None:
            then(self._log.fold.newest())
            return
        manifest = self.manifest(mark)
        sha256 = manifest.sha256
        self._checkpoints.manifests[sha256] = manifest

        def written(found: bytes | None) -> None:
            if self._log.fold.newest().step >= mark.step:
                self.choose_base(then)  # The store took so long that a commit has overtaken it.
            else:
                then(Base(step=mark.step, manifest=sha256))

        self._desk.create(manifest_key(self._id, sha256), manifest.to_bytes(), written)

    def _keepers(self, mark: Mark, vnode: VNodeId) -> list[m.Neighbour]:
        return [k for k in mark.keepers[vnode] if self._is_here(k)]

    def _is_here(self, keeper: m.Neighbour) -> bool:
        node = self._desk.node(keeper.peer)
        return node is not None and node.descriptor.incarnation == keeper.incarnation

    def manifest(self, mark: Mark) -> Manifest:
        """What a rollback to ``mark`` names. States that never change are those of the newest commit."""
        previous = self._log.fold.newest()
        older = self._checkpoints.manifests[previous.manifest] if previous.manifest else self._checkpoints.initial
        states = {v: mark.states.get(v) or (older.states.get(v) if older else None) for v in self._stateful}
        losses, scales = self._checkpoints.losses, self._checkpoints.scales
        steps = range(previous.step + 1, mark.step + 1)
        return Manifest(
            step=mark.step,
            states={v: state for v, state in states.items() if state is not None},
            losses=tuple((t, losses[t]) for t in steps),
            scales=tuple((t, scales[t]) for t in steps if t in scales),
            previous=previous.manifest,
        )

    def holders(self) -> dict[VNodeId, m.Neighbour]:
        """Where hosts get the states of the placement's base, if it is the newest mark: from one of its keepers, who learns
        this owner's token. Tickets are to follow."""
        mark, fold = self.newest, self._log.fold
        if mark is None or mark.step != fold.base.step or not fold.on_pnodes():
            return {}
        found = {}
        for vnode in mark.states:
            host = fold.placement[vnode].peer
            keepers = self._keepers(mark, vnode) or list(mark.keepers[vnode])
            # Whoever leaves may be gone any moment, and whoever did not answer may be gone already.
            keepers.sort(key=lambda k: (self._desk.in_doubt(k.peer), self._desk.is_leaving(k.peer)))
            found[vnode] = next((k for k in keepers if k.peer == host), keepers[0])
        # Of an earlier owner's mark they know the token of then. Not before tickets with this one follow: hosts that have
        # theirs already bring the other, and PNodes know two.
        for peer in sorted({holder.peer for holder in found.values()} - self.guards):
            self._send_guard(peer)
        return found

    def drop_keeper(self, vnode: VNodeId, keeper: m.Neighbour) -> None:
        """A state could not be had from ``keeper``: another one is asked for it, if there is one."""
        self._desk.doubt(keeper.peer)
        mark = self.newest
        if mark is not None and vnode in mark.keepers:
            mark.keepers[vnode] = tuple(k for k in mark.keepers[vnode] if k.peer != keeper.peer)

    def logged(self, base: Base) -> dict[VNodeId, tuple[Keeper, ...]]:
        """What a placement's entry says of a base that is the newest mark; nothing of another one."""
        mark = self.newest
        if mark is None or base.manifest is None or base.step != mark.step or base == self._log.fold.newest():
            return {}
        return {
            v: tuple(Keeper(peer=k.peer, incarnation=k.incarnation, addresses=k.addresses) for k in keepers)
            for v, keepers in mark.keepers.items()
        }

    def recall(self) -> None:
        """If the base is a mark of an earlier owner, and nothing has followed, its keepers have it, as far as anybody knows."""
        fold = self._log.fold
        if fold.since not in PLACING:
            return
        manifest = None if fold.base.manifest is None else self._checkpoints.manifests.get(fold.base.manifest)
        if manifest is None or not fold.on_pnodes() or not fold.keepers.keys() <= manifest.states.keys():
            return
        self.newest = Mark(
            step=fold.base.step,
            keepers={
                v: tuple(m.Neighbour(peer=k.peer, incarnation=k.incarnation, addresses=k.addresses) for k in keepers)
                for v, keepers in fold.keepers.items()
            },
            states={v: manifest.states[v] for v in fold.keepers},
        )

    def _overtaken(self, step: int) -> None:
        """Hosts delete what is older than a commit, so that it is no base even if the commit turns out to be damaged."""
        if self.newest is not None and self.newest.step <= step:
            self.newest = None

    def forget(self) -> None:
        """Its states could not be had."""
        self.newest = None

    # --- taking one -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A placement starts. What was being taken of an older one does not count."""
        self._taking = None
        self.release()
        self._pace.saved(self._desk.now, 0.0)

    def end(self) -> None:
        """The session is commanded no more from here."""
        self._taking = self.newest = None
        self.release()

    def release(self) -> None:
        """Nothing waits for a mark."""
        self.wanted = False
        self._hold = 0

    def let_go(self) -> None:
        """The session has ended: nobody need keep anything for it."""
        for peer in sorted(self.guards):
            self._desk.send(peer, m.Marked(session=self._id, epoch=self._log.fold.epoch, step=0))

    def lost(self) -> None:
        """A host was lost: how often that happens decides how often a mark is taken."""
        self._pace.lost()

    def takes(self, step: int) -> bool:
        """Whether the state after this step is being kept."""
        return self._taking is not None and self._taking.step == step

    def gate(self, step: int) -> bool:
        """Before a step is opened: is its state to be kept? Then every host must have heard of it."""
        taking = self._taking
        if taking is not None:
            return not taking.waiting if taking.step == step else taking.step != self._hold
        if self._hold:
            if self._hold in (self._checkpoints.step_in_flight, self._log.fold.newest().step):
                return False
            self._hold = 0  # It was not stored after all.
        if self._checkpoints.due(step) or self._checkpoints.step_in_flight == step:
            if self.wanted and self._checkpoints.step_in_flight == step:
                self._hold_at(step)
            return True
        if not self.wanted and not self._pace.due(self._desk.now):
            return True
        taken = self._take(step)
        if taken and self.wanted:
            self._hold_at(step)
        return not taken

    def _hold_at(self, step: int) -> None:
        """Open nothing beyond ``step`` until the move; but nobody stands still for it for long."""
        self._hold = step
        instance = self._log.fold.instance

        def look() -> None:
            if self._hold == step and self._log.fold.instance == instance and self._training.running:
                self._desk.emit("move_given_up", self._id, {"step": step})
                self.release()
                self._training.go_on()

        self._desk.after(self._desk.limits.move_patience_s, look)

    def held(self) -> bool:
        """Whether the state that :attr:`wanted` asked for is whole, and nothing beyond it was opened."""
        if self._checkpoints.committing:
            return False  # It goes first: what it names is of this placement's instances.
        whole = self.newest is not None and self.newest.step == self._hold
        return self.wanted and self._hold > 0 and (whole or self._log.fold.newest().step == self._hold)

    def _take(self, step: int) -> bool:
        """Ask for it. False where there is nobody to keep it."""
        hosts, guards = self._training.hosts(), {}
        if any(self._desk.node(peer) is None for peer in hosts):
            return False
        for peer in hosts:
            guard = self._guard_of(peer)
            if guard is None:
                return False
            guards[peer] = guard
        for peer in sorted({*guards.values(), *hosts}):
            self._send_guard(peer)
        spots, neighbour = self._log.fold.placement, self._desk.neighbour
        self._taking = taking = Mark(
            step=step,
            keepers={v: (neighbour(spots[v].peer), neighbour(guards[spots[v].peer])) for v in self._updating},
            guards={host: neighbour(guard) for host, guard in guards.items()},
            waiting={spots[v].peer for v in self._updating},
            asked_at=self._desk.now,
        )
        for peer in sorted(taking.waiting):
            self._send_snapshot_at(peer)

        def look() -> None:
            if self._taking is taking:
                missing = {spots[v].peer for v in self._updating if v not in taking.states}
                self._fail(
                    f"it was not whole in time: {', '.join(sorted(missing)) or 'its step was not done'}", missing
                )

        self._desk.after(self._desk.limits.mark_patience_s, look)
        return True

    def _guard_of(self, host: PeerId) -> PeerId | None:
        """The next PNode behind ``host`` that can keep its states, on another machine if there is one. For a move that
        may be itself: then nothing has been lost."""
        desk, here = self._desk, self._desk.nodes[host].capabilities.hostname
        ring = [
            peer
            for peer, node in sorted(desk.nodes.items())
            if node.usable
            and not node.leaving
            and node.descriptor.addresses
            and peer != host
            and self._distrusted.get(peer, desk.now) <= desk.now
        ]
        ring.sort(key=lambda peer: (desk.nodes[peer].capabilities.hostname == here, peer < host, peer))
        if ring:
            return ring[0]
        return host if self.wanted and desk.nodes[host].descriptor.addresses else None

    def _send_guard(self, peer: PeerId) -> None:
        self.guards.add(peer)
        self._desk.send(peer, m.Guard(session=self._id, epoch=self._log.fold.epoch, token=self.token))

    def _send_snapshot_at(self, peer: PeerId) -> None:
        taking = self._taking
        assert taking is not None
        self._desk.send(
            peer,
            m.SnapshotAt(
                session=self._id,
                epoch=self._log.fold.epoch,
                step=taking.step,
                token=self.token,
                guard=(taking.guards[peer],),
            ),
        )

    def link_up(self, peer: PeerId) -> None:
        """A link is new: an older one may have lost what was said."""
        if peer in self.guards:
            self._send_guard(peer)
        if self._taking is not None and peer in self._taking.waiting:
            self._send_snapshot_at(peer)

    def answered(self, peer: PeerId, answer: m.SnapshotAnswer) -> bool:
        """Whether the answer is about a mark."""
        taking = self._taking
        if taking is None or taking.step != answer.step or answer.epoch != self._log.fold.epoch:
            return False
        if answer.accepted:
            taking.waiting.discard(peer)
        else:
            self._give_up()
        self._training.go_on()
        return True

    def failed(self, peer: PeerId, message: m.SnapshotFailed) -> bool:
        taking = self._taking
        if taking is None or taking.step != message.step or message.instance != self._log.fold.instance:
            return False
        self._fail(message.reason, {peer})
        return True

    def _fail(self, reason: str, hosts: set[PeerId]) -> None:
        """``hosts``: those whose guards have not kept it; they are not asked again for some time."""
        taking, desk = self._taking, self._desk
        assert taking is not None
        desk.emit("mark_failed", self._id, {"step": taking.step, "reason": reason})
        for host in hosts & taking.guards.keys():
            self._distrusted[taking.guards[host].peer] = Instant(desk.now + desk.limits.guard_distrust_s)
        self._give_up()
        self._training.go_on()

    def _give_up(self) -> None:
        taking, self._taking = self._taking, None
        assert taking is not None
        self.release()
        for peer in sorted(self._training.hosts()):
            self._desk.send(peer, m.Abandoned(session=self._id, epoch=self._log.fold.epoch, step=taking.step))
        limits, now = self._desk.limits, self._desk.now
        # One that was too slow has kept links busy all the same, and the next one may be no faster.
        pause_s = max(limits.mark_retry_s, limits.mark_cost_factor * (now - taking.asked_at))
        self._pace.put_off(Instant(now + pause_s))

    def node_lost(self, peer: PeerId) -> None:
        """A keeper that hosts nothing may be gone: then this one will never be whole."""
        taking = self._taking
        if taking is not None and any(k.peer == peer for keepers in taking.keepers.values() for k in keepers):
            self._give_up()
            self._training.go_on()

    def stored(self, peer: PeerId, message: m.Stored) -> bool:
        """Whether it is about a mark. A host says so until it is answered."""
        if message.instance != self._log.fold.instance or not self._training.active:
            return False
        newest, taking = self.newest, self._taking
        if newest is not None and newest.step == message.step:
            self._send_marked(peer, newest)
            return True
        known = taking is not None and taking.step == message.step and peer in taking.guards
        if taking is None or not known or message.vnode not in self._updating:
            return False
        taking.states[message.vnode] = StoredState(
            sha256=message.sha256,
            size_bytes=message.size_bytes,
            version=message.step,
            instance=message.instance,
        )
        self._look()
        return True

    def step_done(self) -> None:
        self._look()

    def _look(self) -> None:
        """Is it whole?"""
        taking, steps = self._taking, self._training.steps
        if taking is None or steps is None or steps.done_step < taking.step or not self._training.running:
            return
        taking.done_at = self._desk.now if taking.done_at is None else taking.done_at
        if any(v not in taking.states for v in self._updating):
            return
        self.newest, self._taking = taking, None
        for peer in sorted({*self.guards, *self._training.hosts()}):
            self._send_marked(peer, taking)
        self._pace.saved(self._desk.now, max(self._desk.now - taking.done_at, self._desk.limits.mark_cost_s))
        self._training.place_if_needed()

    def _send_marked(self, peer: PeerId, mark: Mark) -> None:
        marks = [mark] if self._taking is None else [mark, self._taking]
        kept = {
            state.sha256
            for each in marks
            for vnode, state in each.states.items()
            if peer in [k.peer for k in each.keepers[vnode]]
        }
        self._desk.send(
            peer,
            m.Marked(session=self._id, epoch=self._log.fold.epoch, step=mark.step, keep=tuple(sorted(kept))),
        )
