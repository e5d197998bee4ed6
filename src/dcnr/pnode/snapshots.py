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


@dataclass(slots=True, kw_only=True)
class _Plan:
    step: int
    token: str
    waiting: set[VNodeId]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    """A kept snapshot on its way to the store."""

    vnode: VNodeId
    step: int
    sha256: Sha256
    size_bytes: int


class Snapshots:
    """See the module's docstring. At most one is planned."""

    def __init__(self, host: Hosting) -> None:
        self.stored: dict[int, dict[VNodeId, m.Stored]] = {}
        """By step: what is said again until it is answered."""
        self._host = host
        self._plan: _Plan | None = None
        self._keeps: dict[int, tuple[VNodeId, int]] = {}
        self._uploads: dict[int, _Object] = {}
        self._kept: dict[int, set[Sha256]] = {}
        self._unsent: list[_Object] = []
        """Kept while the owner changed: uploaded when the new one asks for the step."""

    # --- commands -------------------------------------------------------------------------------------------

    def plan(self, message: m.SnapshotAt) -> str:
        """Plan a snapshot after a step that is not opened yet. Returns the reason of a refusal, or ''."""
        states, step = self._host.states, message.step
        if self._plan is not None and self._plan.step == step:
            if not self._plan.token:
                self._plan.token = message.token
                unsent, self._unsent = self._unsent, []
                for found in unsent:
                    self._upload(found, message.token)
            return ""
        if step in self.stored:
            return ""
        late = [v for v, s in states.items() if s.updates and s.version >= step]
        if late and step < self._host.recipe.steps:
            return f"{late[0]} is already at version {states[late[0]].version}"
        if self._plan is not None:
            return f"the snapshot of step {self._plan.step} is not stored yet"
        if not states:
            return ""
        self._plan = _Plan(step=step, token=message.token, waiting=set(states))
        for vnode in states:
            self.loaded(vnode)
        if late:
            # The last state stands still, so it can be asked for again after a failure.
            self._copy(late)
        return ""

    def committed(self, step: int) -> None:
        """The log names the step's manifest: only its snapshots are of use here."""
        if self._plan is not None and self._plan.step <= step:
            self._plan = None
            self._unsent = []
        self.stored = {s: v for s, v in self.stored.items() if s > step}
        self._kept = {s: v for s, v in self._kept.items() if s >= step}
        if not self._keeps:  # What is being written has no name yet that could be kept: the next commit discards.
            keep = tuple(sorted(sha for shas in self._kept.values() for sha in shas))
            self._host.out.append(Discard(session=self._host.session, keep=keep))

    def abandoned(self, step: int) -> None:
        if self._plan is not None and self._plan.step == step:
            self._plan = None
            self._unsent = []
        self.stored.pop(step, None)
        self._kept.pop(step, None)
        # Snapshots of the base are not in ``_kept`` until the first commit here, so nothing is discarded before it.

    def adopted(self) -> None:
        """The owner has changed: what was being uploaded by the old one's leave waits for the new one's."""
        if self._plan is not None:
            self._plan.token = ""
        self._unsent += self._uploads.values()
        self._uploads = {}

    def newest_step(self) -> int:
        """Of what is planned or stored and was not answered; 0 = nothing."""
        return max((0, *self.stored, *([self._plan.step] if self._plan is not None else [])))

    def repeat_stored(self) -> None:
        for step in sorted(self.stored):
            for message in self.stored[step].values():
                self._host.out.append(Send(peer=self._host.owner, message=message))

    # --- what happens to states -----------------------------------------------------------------------------

    def loaded(self, vnode: VNodeId) -> None:
        """A state that nothing ever changes is copied as soon as it is there."""
        state, plan = self._host.states[vnode], self._plan
        if plan is not None and not state.updates and state.handle is not None and vnode in plan.waiting:
            self._copy([vnode])

    def updated(self, step: int, vnodes: list[VNodeId]) -> None:
        """``vnodes`` are at version ``step`` now, and finite."""
        if vnodes and self._plan is not None and self._plan.step == step:
            self._copy(vnodes)

    def _copy(self, vnodes: list[VNodeId]) -> None:
        host, plan = self._host, self._plan
        assert plan is not None
        step = plan.step
        plan.waiting.difference_update(vnodes)

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

    # --- transfers ------------------------------------------------------------------------------------------

    def owns(self, id: int) -> bool:
        return id in self._keeps or id in self._uploads

    def kept(self, id: int, sha256: Sha256, size_bytes: int) -> None:
        vnode, step = self._keeps.pop(id)
        self._kept.setdefault(step, set()).add(sha256)
        if self._plan is None or self._plan.step != step:
            return
        found = _Object(vnode=vnode, step=step, sha256=sha256, size_bytes=size_bytes)
        if self._plan.token:
            self._upload(found, self._plan.token)
        else:
            self._unsent.append(found)

    def _upload(self, found: _Object, token: str) -> None:
        host = self._host
        upload = host.ids.next()
        self._uploads[upload] = found
        host.out.append(
            Upload(
                id=upload,
                peer=host.owner,
                session=host.session,
                sha256=found.sha256,
                size_bytes=found.size_bytes,
                token=token,
            )
        )

    def uploaded(self, id: int) -> None:
        host, found = self._host, self._uploads.pop(id)
        if self._plan is None or self._plan.step != found.step:
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
        else:
            found = self._uploads.pop(id)
            vnode, step = found.vnode, found.step
        if self._plan is not None and self._plan.step == step:
            self._plan = None
            self._unsent = []
            self.stored.pop(step, None)  # A part of it is none.
        host.report(
            step,
            m.SnapshotFailed(session=host.session, instance=host.instance, step=step, reason=f"{vnode}: {reason}"),
        )
