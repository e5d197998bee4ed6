"""The snapshots of one host: a copy after an update, kept in the home, uploaded, and said until it is answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dcnr.ids import Instance, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Discard, Effect, Keep, Send, Upload
from dcnr.pnode import tasks
from dcnr.pnode.jobs import CONTROL, Ids, Job, State
from dcnr.protocol import messages as m
from dcnr.session.recipe import Recipe


class Hosting(Protocol):
    """What snapshots know of the host whose states they copy."""

    session: SessionId
    instance: Instance
    owner: PeerId
    recipe: Recipe
    ids: Ids
    out: list[Effect]
    states: dict[VNodeId, State]

    def queue(self, job: Job) -> None: ...

    def report(self, step: int, message: m.Message) -> None: ...

    def handles(self, vnodes: Iterable[VNodeId]) -> tasks.States: ...

    def updates_may_go_on(self) -> None:
        """Updates that :meth:`Snapshots.hold_back` has held up are tried again."""


@dataclass(slots=True, kw_only=True)
class _Plan:
    step: int
    token: str
    waiting: set[VNodeId]
    guard: m.Neighbour | None
    """The PNode that keeps the snapshot beside this one; ``None`` = it goes to the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    """A kept snapshot on its way to the store."""

    vnode: VNodeId
    step: int
    sha256: Sha256
    size_bytes: int


class Snapshots:
    """See the module's docstring. At most one for the store and one for another PNode is planned.

    Memory holds one copy of the states at a time: where one is still being written, the next copy waits, and with it
    the update that would change what is to be copied.
    """

    def __init__(self, host: Hosting, base_step: int, base: Iterable[Sha256]) -> None:
        """``base``: what the states here are loaded from; it stays until something newer is whole."""
        self.stored: dict[int, dict[VNodeId, m.Stored]] = {}
        """By step: what is said again until it is answered."""
        self._host = host
        self._plans: dict[int, _Plan] = {}
        self._copying: dict[int, int] = {}
        """By step: VNodes whose copy is being made or written."""
        self._deferred: list[tuple[int, list[VNodeId]]] = []
        """Copies that wait for the memory of an older step's."""
        self._keeps: dict[int, tuple[VNodeId, int]] = {}
        self._uploads: dict[int, _Object] = {}
        self._kept: dict[int, set[Sha256]] = {base_step: set(base)}
        self._committed = base_step
        self._marked = base_step
        self._unsent: list[_Object] = []
        """Kept while the owner changed: uploaded when the new one asks for the step."""

    def inherit(self, before: Snapshots) -> None:
        """What an older placement here kept of the base: other hosts may still be reading it. It stays as long as the base
        does."""
        self._kept[self._committed] |= before._kept.get(self._committed, set())

    # --- commands -------------------------------------------------------------------------------------------

    def plan(self, message: m.SnapshotAt) -> str:
        """Plan a snapshot after a step that is not opened yet. Returns the reason of a refusal, or ''."""
        states, step = self._host.states, message.step
        guard = message.guard[0] if message.guard else None
        known = self._plans.get(step)
        if known is not None:
            if not known.token:
                known.token = message.token
                unsent, self._unsent = self._unsent, []
                for found in unsent:
                    self._upload(found, known)
            return ""
        if step in self.stored:
            return ""
        if guard is not None and not guard.addresses:
            return f"PNode {guard.peer} has no address"
        late = [v for v, s in states.items() if s.updates and s.version >= step]
        if late and step < self._host.recipe.steps:
            return f"{late[0]} is already at version {states[late[0]].version}"
        for other in self._plans.values():
            if (other.guard is None) == (guard is None):
                return f"the snapshot of step {other.step} is not stored yet"
        # What never changes is in the store, or drawn from the seed: another PNode need not keep it.
        waiting = {v for v, s in states.items() if guard is None or s.updates}
        if not waiting:
            return ""
        self._plans[step] = _Plan(step=step, token=message.token, waiting=waiting, guard=guard)
        for vnode in states:
            self.loaded(vnode)
        if late:
            # The last state stands still, so it can be asked for again after a failure.
            self._copy(step, late)
        return ""

    def committed(self, step: int) -> None:
        """The log names the step's manifest."""
        for old in [s for s in self._plans if s <= step]:
            self._forget(old)
        self.stored = {s: v for s, v in self.stored.items() if s > step}
        self._committed = max(self._committed, step)
        self._discard()

    def marked(self, step: int) -> None:
        """The step is whole on PNodes."""
        self._forget(step)
        self.stored.pop(step, None)
        self._marked = max(self._marked, step)
        self._discard()

    def _discard(self) -> None:
        """What is of use: the newest commit or base, the newest step that is whole on PNodes, and what is under way."""
        newest = max(self._committed, self._marked)
        self._kept = {
            s: shas
            for s, shas in self._kept.items()
            if s >= newest or s == self._committed or s in self._plans or s in self.stored
        }
        if not self._keeps:  # What is being written has no name yet that could be kept: the next one discards.
            keep = tuple(sorted({sha for shas in self._kept.values() for sha in shas}))
            self._host.out.append(Discard(session=self._host.session, keep=keep))

    def abandoned(self, step: int) -> None:
        self._forget(step)
        self.stored.pop(step, None)
        self._kept.pop(step, None)
        self._discard()  # Of no use any more, and it may be what fills the disk.

    def _forget(self, step: int) -> None:
        """It is planned no more; what waited for its copies goes on."""
        self._plans.pop(step, None)
        self._unsent = [found for found in self._unsent if found.step != step]
        self._deferred = [(s, vnodes) for s, vnodes in self._deferred if s != step]
        self._host.updates_may_go_on()

    def adopted(self) -> None:
        """The owner has changed: what was being uploaded by the old one's leave waits for the new one's. Of what other
        PNodes keep the new one knows nothing."""
        for plan in list(self._plans.values()):
            if plan.guard is not None:
                self.abandoned(plan.step)
            else:
                plan.token = ""
                self._unsent += [found for found in self._uploads.values() if found.step == plan.step]
        self._uploads = {}

    def newest_step(self) -> int:
        """Of what is planned or stored and was not answered; 0 = nothing."""
        return max((0, *self.stored, *self._plans))

    def repeat_stored(self) -> None:
        for step in sorted(self.stored):
            for message in self.stored[step].values():
                self._host.out.append(Send(peer=self._host.owner, message=message))

    # --- what happens to states -----------------------------------------------------------------------------

    def loaded(self, vnode: VNodeId) -> None:
        """A state that nothing ever changes is copied as soon as it is there."""
        state = self._host.states[vnode]
        if state.updates or state.handle is None:
            return
        for plan in list(self._plans.values()):
            if vnode in plan.waiting:
                self._copy(plan.step, [vnode])

    def updated(self, step: int, vnodes: list[VNodeId]) -> None:
        """``vnodes`` are at version ``step`` now, and finite."""
        if vnodes and step in self._plans:
            self._copy(step, vnodes)

    def hold_back(self, vnodes: Iterable[VNodeId]) -> bool:
        """Whether one of them must not change yet: its copy waits for memory."""
        return any(v in waiting for _, waiting in self._deferred for v in vnodes)

    def _copy(self, step: int, vnodes: list[VNodeId]) -> None:
        self._plans[step].waiting.difference_update(vnodes)
        if any(s != step for s in self._copying):
            self._deferred.append((step, vnodes))
            return
        self._copying[step] = self._copying.get(step, 0) + len(vnodes)
        host = self._host

        def done(result: tasks.SnapshotDone) -> None:
            for vnode, copy in result.copies:
                keep = host.ids.next()
                self._keeps[keep] = (vnode, step)
                host.out.append(Keep(id=keep, session=host.session, handle=copy))

        host.queue(
            Job(
                rank=CONTROL,
                step=step,
                microbatch=host.recipe.microbatches + 1,
                vnode=vnodes[0],
                build=lambda: tasks.Snapshot(states=host.handles(vnodes)),
                done=done,
            )
        )

    def _written(self, step: int) -> None:
        """A copy takes no memory any more."""
        self._copying[step] -= 1
        if self._copying[step] == 0:
            del self._copying[step]
        if self._deferred and not self._copying:
            deferred, self._deferred = self._deferred, []
            for waiting, vnodes in deferred:
                self._copy(waiting, vnodes)
            self._host.updates_may_go_on()

    # --- transfers ------------------------------------------------------------------------------------------

    def owns(self, id: int) -> bool:
        return id in self._keeps or id in self._uploads

    def kept(self, id: int, sha256: Sha256, size_bytes: int) -> None:
        vnode, step = self._keeps.pop(id)
        self._kept.setdefault(step, set()).add(sha256)
        self._written(step)
        plan = self._plans.get(step)
        if plan is None:
            return
        found = _Object(vnode=vnode, step=step, sha256=sha256, size_bytes=size_bytes)
        if plan.token:
            self._upload(found, plan)
        else:
            self._unsent.append(found)

    def _upload(self, found: _Object, plan: _Plan) -> None:
        host = self._host
        upload = host.ids.next()
        self._uploads[upload] = found
        host.out.append(
            Upload(
                id=upload,
                peer=host.owner if plan.guard is None else plan.guard.peer,
                session=host.session,
                sha256=found.sha256,
                size_bytes=found.size_bytes,
                token=plan.token,
                address="" if plan.guard is None else plan.guard.addresses[0],
            )
        )

    def uploaded(self, id: int) -> None:
        host, found = self._host, self._uploads.pop(id)
        if found.step not in self._plans:
            return
        message = m.Stored(
            session=host.session,
            instance=host.instance,
            step=found.step,
            vnode=found.vnode,
            sha256=found.sha256,
            size_bytes=found.size_bytes,
        )
        self.stored.setdefault(found.step, {})[found.vnode] = message
        host.out.append(Send(peer=host.owner, message=message))

    def transfer_failed(self, id: int, reason: str) -> None:
        host = self._host
        if id in self._keeps:
            vnode, step = self._keeps.pop(id)
            self._written(step)
        else:
            found = self._uploads.pop(id)
            vnode, step = found.vnode, found.step
        if step not in self._plans:
            return
        self._forget(step)
        self.stored.pop(step, None)  # A part of it is none.
        host.report(
            step,
            m.SnapshotFailed(session=host.session, instance=host.instance, step=step, reason=f"{vnode}: {reason}"),
        )
