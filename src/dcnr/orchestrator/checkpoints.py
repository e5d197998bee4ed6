"""The checkpoints of one session: from the request for a snapshot to the commit, its verification, and its deletion.

A checkpoint is whole or it is not there: every object is stored before the manifest is, the manifest before the log
entry that names it. What is deleted is first dropped in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from dcnr.errors import ProtocolError
from dcnr.ids import LogIndex, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Instant, StoreDelete, StoreFailed, StoreList, StoreListed
from dcnr.network.analysis import Network
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.evaluations import Evaluations
from dcnr.orchestrator.pace import Pace
from dcnr.orchestrator.session_log import SessionLog
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol import messages as m
from dcnr.session import events
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.log import Base, Kind, manifest_key, object_key, objects_prefix
from dcnr.session.record import Record


class Training(Protocol):
    """What checkpoints know of the training that they keep, and whom they tell that it may go on."""

    steps: StepMachine | None

    @property
    def running(self) -> bool: ...

    @property
    def active(self) -> bool: ...

    def hosts(self) -> Mapping[PeerId, object]: ...

    def done_step(self) -> int:
        """The newest step that clients were told of."""

    def emit(self, event: events.SessionEvent) -> None: ...

    def go_on(self) -> None:
        """Open what may be opened: a gate has opened, or a checkpoint is out of the way."""

    @property
    def evaluations(self) -> Evaluations: ...

    def place_if_needed(self) -> None:
        """Hosts that were lost while a commit was written are replaced now, and those that a move waited for."""

    def finish_if_done(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """The snapshot in flight."""

    step: int
    waiting: set[PeerId]
    """Hosts that have not acknowledged ``SnapshotAt``."""
    stored: dict[VNodeId, StoredState] = field(default_factory=dict)
    done_at: Instant | None = None
    committing: bool = False


class Checkpoints:
    """See the module's docstring. At most one snapshot is in flight."""

    def __init__(
        self, *, desk: Desk, log: SessionLog, id: SessionId, network: Network, record: Record, training: Training
    ) -> None:
        self.manifests: dict[Sha256, Manifest] = {}
        self.losses: dict[int, float] = {}
        """Of every step done, for the manifests: those of its steps are in each."""
        self.scales: dict[int, float] = {}
        """The same for the factors by which gradients were clipped; 1.0 is left out."""
        self.initial: Manifest | None = None
        """Of the weights that the session began with, where they are another session's."""
        self.busy = False
        """A commit is being verified or older ones dropped: no snapshot meanwhile."""
        self.on_commit: Callable[[int], None] = lambda step: None
        """Told the step of every commit."""
        self._desk = desk
        self._log = log
        self._id = id
        self._network = network
        self._recipe = record.recipe
        self._init = record.init
        self._training = training
        self._stateful = tuple(v for v, info in network.vnodes.items() if info.parameters)
        self._checkpoint: Checkpoint | None = None
        self.wanted = False
        """The state after the next step is to be stored, whichever it is, and nothing beyond it opened."""
        self._hold = 0
        """The step beyond which nothing is opened."""
        self._gated = 0
        self._pace = Pace(desk.now, prior_s=desk.limits.fallback_prior_s, least_s=desk.limits.commit_least_s)
        """Of commits beyond those that the recipe asks for."""
        self._refusals = 0
        """How often in a row the last state could not be stored."""
        self._told: set[str] = set()
        """Reasons of these that were told."""
        self._pause_s = 0.0
        """Before the last state is asked for again."""
        self._again_at = Instant(0.0)
        self._verified: set[int] = set()
        self._garbage: set[str] = set()

    # --- what the store has ---------------------------------------------------------------------------------

    def load(self, then: Callable[[], None]) -> None:
        """Read the manifests of all commits, the newest first. A commit without one is a commit no more."""
        commits = self._log.fold.commits
        wanted = [c for c in reversed(commits) if c.manifest and c.manifest not in self.manifests]
        if not wanted:
            self._load_initial(then)
            return
        base = wanted[0]
        assert base.manifest is not None
        sha256 = base.manifest

        def got(data: bytes | None) -> None:
            try:
                if data is None:
                    raise ProtocolError("it is missing")
                manifest = Manifest.from_bytes(data, sha256)
                manifest.check(base.step, {v: self._version(v, base.step) for v in self._stateful})
                self.manifests[sha256] = manifest
            except ProtocolError as error:
                self._invalidate(base.step, f"its manifest cannot be used: {error}", lambda: self.load(then))
                return
            self.load(then)

        self._desk.get(manifest_key(self._id, sha256), got)

    def load_base(self, then: Callable[[], None]) -> None:
        """The same, and the manifest of a base that is no commit. Where that cannot be used it stays unknown."""
        base = self._log.fold.base
        sha256 = base.manifest
        if sha256 is None or sha256 in self.manifests or not self._log.fold.on_pnodes():
            self.load(then)
            return

        def got(data: bytes | None) -> None:
            try:
                manifest = Manifest.from_bytes(data or b"", sha256)
                manifest.check(base.step, {v: self._version(v, base.step) for v in self._stateful})
                self.manifests[sha256] = manifest
            except ProtocolError:
                pass  # Then the newest commit is all there is.
            self.load(then)

        self._desk.get(manifest_key(self._id, sha256), got)

    def _load_initial(self, then: Callable[[], None]) -> None:
        """The manifest of what the session began with. Where it is damaged, :attr:`initial` stays ``None``."""
        init = self._init
        if init is None or self.initial is not None:
            then()
            return

        def got(data: bytes | None) -> None:
            try:
                self.initial = Manifest.from_bytes(data or b"", init.manifest)
            except ProtocolError as error:
                self._training.emit(events.CheckpointDamaged(step=0, reason=f"the manifest it began with: {error}"))
            then()

        self._desk.get(manifest_key(self._id, init.manifest), got)

    def _version(self, vnode: VNodeId, step: int) -> int:
        """Of its state after ``step``: what is not trained stays as it began."""
        return step if self._network.uses(vnode) else 0

    def step_known(self, step: int, loss: float, scale: float) -> None:
        """A step is done: its part of the next manifest."""
        self.losses[step] = loss
        if scale != 1.0:
            self.scales[step] = scale

    def has_losses(self, step: int) -> bool:
        """Whether the losses since the newest commit are known up to ``step``."""
        return all(s in self.losses for s in range(self._log.fold.newest().step + 1, step + 1))

    def load_losses(self, then: Callable[[], None]) -> None:
        """Losses and clipping factors of all steps up to the newest commit or base, from its manifest back to the first."""
        self._load_losses(self._log.fold.furthest().manifest, [], then)

    def _load_losses(self, sha256: Sha256 | None, later: list[tuple[int, float]], then: Callable[[], None]) -> None:
        if sha256 is None:
            self.losses.update(dict(later))
            then()
            return
        known = self.manifests.get(sha256)
        if known is not None:
            self.scales.update(known.scales)
            self._load_losses(known.previous, [*known.losses, *later], then)
            return

        def got(data: bytes | None) -> None:
            try:
                manifest = Manifest.from_bytes(data or b"", sha256)
            except ProtocolError:
                # Losses are history, not state: a gap here must not stop a session.
                newest = self._log.fold.newest().manifest
                behind = sha256 == self._log.fold.base.manifest != newest
                self._load_losses(newest if behind else None, later, then)
                return
            self.scales.update(manifest.scales)
            self._load_losses(manifest.previous, [*manifest.losses, *later], then)

        self._desk.get(manifest_key(self._id, sha256), got)

    def check(self, base: Base, then: Callable[[], None]) -> None:
        """Read a base back whose manifest is known: a damaged one is a base no more. Then go on, if the session does."""
        assert base.manifest is not None
        states = self.manifests[base.manifest].states.values()

        def checked(damaged: Mapping[str, str]) -> None:
            if not self._training.active:
                return
            if damaged and any(c.step == base.step for c in self._log.fold.commits):
                key, found = next(iter(sorted(damaged.items())))
                self._invalidate(base.step, f"{key}: {found}", then)
            else:
                then()

        self._desk.check(tuple(dict.fromkeys(object_key(self._id, s.sha256) for s in states)), checked)

    def _invalidate(self, step: int, reason: str, then: Callable[[], None]) -> None:
        """This commit is damaged: never a base again."""
        if self._log.fold.owner != self._desk.author:
            # Only its owner may say so in the log; here it is merely of no use.
            self._log.fold = replace(self._log.fold, commits=tuple(c for c in self._log.fold.commits if c.step != step))
            then()
            return
        self._training.emit(events.CheckpointDamaged(step=step, reason=reason))
        self._verified.discard(step)
        self._log.append(Kind.INVALIDATE, lambda index: {"step": step, "reason": reason}, lambda index: then())

    # --- the snapshot in flight -----------------------------------------------------------------------------

    @property
    def committing(self) -> bool:
        """All its objects are there and its ``Commit`` is on the way: nothing stops it any more."""
        return self._checkpoint is not None and self._checkpoint.committing

    @property
    def step_in_flight(self) -> int:
        """Of the snapshot in flight; 0 = there is none."""
        return self._checkpoint.step if self._checkpoint is not None else 0

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is to be stored, if the store is not too slow."""
        every = self._recipe.checkpoint_every
        return step == self._recipe.steps or (every > 0 and step % every == 0)

    def _early(self, step: int) -> bool:
        """Whether steps are so slow, or losses that go back to a commit so frequent, that one before is worth it. It must
        be over when the recipe's next one is due: that is as far away as the newest commit, and a commit takes far less
        than the time between two."""
        every, last = self._recipe.checkpoint_every, self._recipe.steps
        if not every or not self._pace.due(self._desk.now):
            return False
        return min(every - step % every, last - step) >= step - self._log.fold.newest().step

    def newest_due(self) -> int:
        """Of the newest commit that the recipe asked for, as far as evaluations are concerned."""
        newest, every = self._log.fold.newest().step, self._recipe.checkpoint_every
        return newest - newest % every if every else newest

    def fell_back(self) -> None:
        """Steps are computed again from a base. How often that is a commit decides how often there is one."""
        if not self._log.fold.on_pnodes():
            self._pace.lost()

    def begin(self, base_step: int) -> None:
        """A placement starts from ``base_step``. Snapshots of an older one do not count."""
        self._checkpoint = None
        self._hold = 0
        self._gated = base_step
        self._refusals, self._told, self._pause_s, self._again_at = 0, set(), 0.0, self._desk.now

    def adopt(self, answers: Mapping[PeerId, m.Adopted], snapshot_at: int, opened_step: int) -> None:
        """Take over what an earlier owner had in flight. ``snapshot_at``: what all hosts plan; up to ``opened_step``
        all have acknowledged, what is planned beyond is asked for again before that step is opened."""
        newest = self._log.fold.newest().step
        self._gated = max(opened_step, newest)
        if newest < snapshot_at <= opened_step:
            # They wait for a token that this orchestrator's data service takes.
            asked = {peer for peer, answer in answers.items() if answer.snapshot_at == snapshot_at}
            self._checkpoint = Checkpoint(step=snapshot_at, waiting=asked)
        for peer, answer in sorted(answers.items()):
            step = answer.snapshot_at
            if self._checkpoint is not None and self._checkpoint.step == step:
                self._send_snapshot_at(peer, step)
            elif any(c.step == step for c in self._log.fold.commits):
                self._send_committed(peer, step)
            elif 0 < step <= opened_step:
                self._send_abandoned(peer, step)

    def forget(self) -> None:
        self._checkpoint = None

    def end(self) -> None:
        self._checkpoint = None
        self.busy = self.wanted = False

    def say_again(self, peer: PeerId) -> None:
        """A link is new: an older one may have lost the request."""
        if self._checkpoint is not None and peer in self._checkpoint.waiting:
            self._send_snapshot_at(peer, self._checkpoint.step)

    def gate(self, step: int) -> bool:
        """Before a step is opened: is it one whose state is to be stored? Then every host must have heard of it."""
        checkpoint = self._checkpoint
        if checkpoint is not None and checkpoint.step == step:
            return not checkpoint.waiting
        if self._hold:
            if self._hold in (self.step_in_flight, self._log.fold.newest().step):
                return False
            self._hold = 0  # It was abandoned.
        last = step == self._recipe.steps
        if step <= self._gated or not (self.due(step) or self.wanted or self._early(step)):
            return True
        if checkpoint is not None or self.busy:
            # A slow store makes checkpoints rarer. Only the last must not be missed, so it waits.
            return not last
        self._gated = step
        self._hold = step if self.wanted else 0
        self._snapshot_at(step)
        return False

    def held(self) -> bool:
        """Whether the state that :attr:`wanted` asked for is in a commit, and nothing beyond it was opened."""
        return self.wanted and self._hold > 0 and self._log.fold.newest().step == self._hold

    def _snapshot_at(self, step: int) -> None:
        hosts = self._training.hosts()
        self._checkpoint = Checkpoint(step=step, waiting=set(hosts))
        for peer in sorted(hosts):
            self._send_snapshot_at(peer, step)

    def _send_snapshot_at(self, peer: PeerId, step: int) -> None:
        token = self._desk.token(f"objects/{self._id}/write")
        self._desk.send(peer, m.SnapshotAt(session=self._id, epoch=self._log.fold.epoch, step=step, token=token))

    def answered(self, peer: PeerId, answer: m.SnapshotAnswer) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.step != answer.step or answer.epoch != self._log.fold.epoch:
            return
        if not answer.accepted:
            self._abandon(f"{peer}: {answer.reason}")
            return
        checkpoint.waiting.discard(peer)
        self._training.go_on()

    def failed(self, message: m.SnapshotFailed) -> None:
        checkpoint, instance = self._checkpoint, self._log.fold.instance
        if checkpoint is not None and checkpoint.step == message.step and message.instance == instance:
            self._abandon(message.reason)

    def _abandon(self, reason: str) -> None:
        checkpoint = self._checkpoint
        assert checkpoint is not None
        if checkpoint.committing:
            return
        self._checkpoint = None
        self._pace.put_off(Instant(self._desk.now + self._desk.limits.store_give_up_s))
        last = checkpoint.step == self._recipe.steps
        self._refusals += last
        # What is tried again for as long as a disk is full is told when it is new, and at the 1st, 2nd, 4th, 8th time.
        if not last or reason not in self._told or self._refusals & (self._refusals - 1) == 0:
            self._told |= {reason} if last else set()
            self._training.emit(events.CheckpointAbandoned(step=checkpoint.step, reason=reason))
        for peer in sorted(self._training.hosts()):
            self._send_abandoned(peer, checkpoint.step)
        if last:
            # The last state must be kept: it is asked for again, from hosts that stand still by then.
            instance, limits = self._log.fold.instance, self._desk.limits
            self._pause_s = min(max(limits.resend_after_s, 2 * self._pause_s), limits.checkpoint_retry_most_s)
            self._again_at = Instant(self._desk.now + self._pause_s)

            def again() -> None:
                if self._log.fold.instance == instance:
                    self._keep_last()

            self._desk.after(self._pause_s, again)
        self._training.go_on()

    def _send_abandoned(self, peer: PeerId, step: int) -> None:
        self._desk.send(peer, m.Abandoned(session=self._id, epoch=self._log.fold.epoch, step=step))

    def _keep_last(self) -> None:
        """All steps are done and no whole commit holds the last state: it stands still, so it is asked for once more."""
        last = self._recipe.steps
        steps = self._training.steps
        done = steps is not None and steps.done_step == last
        idle = self._checkpoint is None and not self.busy and self._desk.now >= self._again_at
        if self._training.running and done and idle and self._log.fold.newest().step != last:
            self._snapshot_at(last)

    def stored(self, peer: PeerId, message: m.Stored) -> None:
        """An object of this instance is in the store. A host says so until it is answered."""
        if message.instance != self._log.fold.instance or not self._training.active:
            return
        if any(c.step == message.step for c in self._log.fold.commits):
            self._send_committed(peer, message.step)
            return
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.step != message.step:
            if self._training.running:
                self._send_abandoned(peer, message.step)
            return
        checkpoint.stored[message.vnode] = StoredState(
            sha256=message.sha256,
            size_bytes=message.size_bytes,
            version=self._version(message.vnode, message.step),
            instance=message.instance,
        )
        self._commit_if_stored()

    def step_done(self) -> None:
        """Steps may have been finished: what waited for that goes on."""
        self._commit_if_stored()
        self._keep_last()

    # --- the commit -----------------------------------------------------------------------------------------

    def _commit_if_stored(self) -> None:
        checkpoint, steps = self._checkpoint, self._training.steps
        if checkpoint is None or checkpoint.committing or not self._training.running:
            return
        if steps is None or steps.done_step < checkpoint.step:
            return
        checkpoint.done_at = self._desk.now if checkpoint.done_at is None else checkpoint.done_at
        if any(v not in checkpoint.stored for v in self._stateful):
            return
        checkpoint.committing = True
        previous = self._log.fold.newest()
        steps_since = range(previous.step + 1, checkpoint.step + 1)
        manifest = Manifest(
            step=checkpoint.step,
            states={v: checkpoint.stored[v] for v in self._stateful},
            losses=tuple((t, self.losses[t]) for t in steps_since),
            previous=previous.manifest,
            scales=tuple((t, self.scales[t]) for t in steps_since if t in self.scales),
        )
        sha256 = manifest.sha256
        self.manifests[sha256] = manifest

        def created(found: bytes | None) -> None:
            # The name is its hash: whoever wrote it wrote these bytes.
            self._log.append(
                Kind.COMMIT,
                lambda index: {"step": manifest.step, "manifest": sha256},
                lambda index: self._committed(index, manifest, sha256),
            )

        self._desk.create(manifest_key(self._id, sha256), manifest.to_bytes(), created)

    def _send_committed(self, peer: PeerId, step: int) -> None:
        fold = self._log.fold
        base = next(c for c in fold.commits if c.step == step)
        assert base.manifest is not None
        self._desk.send(peer, m.Committed(session=self._id, epoch=fold.epoch, step=step, manifest=base.manifest))

    def _committed(self, index: LogIndex, manifest: Manifest, sha256: Sha256) -> None:
        base = Base(step=manifest.step, manifest=sha256)
        checkpoint = self._checkpoint
        if checkpoint is not None and checkpoint.step == manifest.step:
            assert checkpoint.done_at is not None
            self._pace.saved(self._desk.now, self._desk.now - checkpoint.done_at)
            self._checkpoint = None
        for peer in sorted(self._training.hosts()):
            self._send_committed(peer, manifest.step)
        self._training.emit(
            events.CheckpointCommitted(
                step=manifest.step,
                manifest=sha256,
                index=index,
                size_bytes=sum(s.size_bytes for s in manifest.states.values()),
            )
        )
        self.busy = True
        self.on_commit(base.step)
        if self.due(base.step) or self.wanted:  # Which steps are evaluated must not depend on the machines' pace.
            self._training.evaluations.look(base)
        self._verify(base, manifest)
        self._training.place_if_needed()

    def _verify(self, base: Base, manifest: Manifest) -> None:
        """Read the commit back; then drop what two verified commits make superfluous."""
        keys = tuple(dict.fromkeys(object_key(self._id, s.sha256) for s in manifest.states.values()))

        def checked(damaged: Mapping[str, str]) -> None:
            if damaged:
                key, reason = next(iter(sorted(damaged.items())))
                self._invalidate(base.step, f"{key}: {reason}", over)
            else:
                self._verified.add(base.step)
                self._drop_old(over)

        def over() -> None:
            self.busy = False
            self._training.finish_if_done()
            self._keep_last()
            self._training.go_on()

        self._desk.check(keys, checked)

    # --- deleting -------------------------------------------------------------------------------------------

    def _drop_old(self, then: Callable[[], None]) -> None:
        commits = self._log.fold.commits
        verified = [c.step for c in commits if c.step in self._verified]
        if len(verified) <= self._desk.limits.commits_kept:
            then()
            return
        oldest_kept = verified[-self._desk.limits.commits_kept]
        victim = commits[0]
        if victim.step >= oldest_kept:
            then()
            return

        def dropped(index: LogIndex) -> None:
            self._training.emit(events.CheckpointDropped(step=victim.step))
            self._verified.discard(victim.step)
            self._delete(victim)
            self._drop_old(then)

        self._log.append(Kind.DROP, lambda index: {"step": victim.step}, dropped)

    def _named(self) -> set[str]:
        """Objects that an undropped commit, the base or what the session began with names."""
        fold = self._log.fold
        named = {
            object_key(self._id, s.sha256)
            for c in (*fold.commits, fold.base)
            if c.manifest in self.manifests and c.manifest is not None
            for s in self.manifests[c.manifest].states.values()
        }
        if self.initial is not None:
            named |= {object_key(self._id, s.sha256) for s in self.initial.states.values()}
        return named

    def _delete(self, victim: Base) -> None:
        """Delete what nothing names any more; manifests stay, for they carry the losses."""
        kept = self._named()
        assert victim.manifest is not None
        gone = self.manifests.get(victim.manifest)
        if gone is not None:
            self._garbage |= {object_key(self._id, s.sha256) for s in gone.states.values()}
            if victim != self._log.fold.base:
                del self.manifests[victim.manifest]
        delete = tuple(sorted(self._garbage - kept))
        self._garbage &= kept
        if delete:
            self._desk.out.append(StoreDelete(keys=delete))

    def collect(self, *, delete: bool, then: Callable[[tuple[str, ...] | str], None]) -> None:
        """Find, and ``delete``, what abandoned snapshots have left in the store. ``then`` gets the keys, or why not now.
        No snapshot begins meanwhile: it could be of the same bytes as what is about to go."""
        if self._checkpoint is not None or self.busy:
            then("a checkpoint is being written, read back or dropped: try again in a moment")
            return
        self.busy = True

        def over(answer: tuple[str, ...] | str) -> None:
            self.busy = False
            then(answer)
            self._keep_last()
            self._training.go_on()

        def loaded() -> None:
            base = self._log.fold.base
            unknown = {c.manifest for c in (*self._log.fold.commits, base) if c.manifest} - self.manifests.keys()
            if self._init is not None and self.initial is None:
                over("the manifest that the session began with cannot be read")
            elif unknown and (self._training.active or unknown != {base.manifest}):
                # Of a session that has ended nobody loads the base any more.
                over("a manifest cannot be read, so nobody knows what it names")
            else:
                self._list(listed)

        def listed(found: set[str] | str) -> None:
            if isinstance(found, str) or not delete:
                over(found if isinstance(found, str) else tuple(sorted(found)))
            else:
                # Once more in the log: whoever was succeeded meanwhile deletes nothing of its successor's.
                self._prove(lambda index: remove(tuple(sorted(found))))

        def remove(keys: tuple[str, ...]) -> None:
            if not keys:
                over(keys)
                return
            self._desk.out.append(StoreDelete(keys=keys))

            def gone(found: set[str] | str) -> None:
                if isinstance(found, set) and found.isdisjoint(keys):
                    over(keys)
                else:
                    self._desk.after(self._desk.limits.store_retry_s, lambda: self._list(gone))

            self._list(gone)

        self.load(loaded)

    def _prove(self, then: Callable[[LogIndex], None]) -> None:
        """An entry that changes nothing, so that only the session's owner comes further. Of one that is under way it must
        not be ``Acquire``: hosts obey the epoch of their tickets."""
        if self._training.active:
            self._log.append(Kind.DROP, lambda index: {"step": 0}, then)
        else:
            self._log.acquire(then)

    def _list(self, then: Callable[[set[str] | str], None]) -> None:
        """Objects that nothing names, or why the store does not say."""

        def listed(event: StoreListed | StoreFailed) -> None:
            then(event.reason if isinstance(event, StoreFailed) else set(event.keys) - self._named())

        self._desk.ask(lambda id: StoreList(id=id, prefix=objects_prefix(self._id)), listed)
