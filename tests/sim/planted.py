"""One-line bugs, each of which the simulator must find. ``old`` occurs exactly once in its module."""

from __future__ import annotations

from dataclasses import dataclass

from dcnr.sim import Patch

PNODE, HOST, SNAPSHOTS = "dcnr.pnode.pnode", "dcnr.pnode.host", "dcnr.pnode.snapshots"
OWNER, STEP, DESK = "dcnr.orchestrator.owner", "dcnr.orchestrator.step", "dcnr.orchestrator.desk"
CHECKPOINTS, MARKS = "dcnr.orchestrator.checkpoints", "dcnr.orchestrator.marks"

# Not here: to lose patience with an owner too early breaks nothing (tests/orchestrator/test_beats.py counts its lease).


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """``invariants``: those that may be the first to see it. ``hint``: a seed that found it once; tried first, to save time."""

    name: str
    patch: Patch
    invariants: frozenset[str]
    hint: int


def _bug(name: str, module: str, old: str, new: str, *invariants: str, hint: int = 0) -> Planted:
    patch = Patch(module=module, old=old, new=new)
    return Planted(name=name, patch=patch, invariants=frozenset(invariants), hint=hint)


PLANTED = (
    _bug(
        "no instance check on frames",
        PNODE,
        "if frame.target_instance < host.instance or frame.source_instance < host.instance:",
        "if False:",
        "FrameFence", "NoException", "BoundedConserved", "Oracle", "LiveAndCalm",
        hint=111,
    ),
    _bug(
        "no dedupe of frames",
        HOST,
        "if self._key(frame) in self._seen or frame.step < self._forgotten_before():",
        "if False:",
        "BoundedConserved", "NoException", "LiveAndCalm", "UpdateOnce",
        hint=34,
    ),
    _bug(
        "acknowledged before the fence is persisted",
        PNODE,
        "        self._raise_fence(tickets.session, tickets.epoch, tickets.owner, tickets.instance, persisted)",
        "        self._raise_fence(tickets.session, tickets.epoch, tickets.owner, tickets.instance, persisted); "
        "self._accept(host)",
        "CommandFence",
    ),
    _bug(
        "stored is said before the upload is done",
        SNAPSHOTS,
        "        self._uploads[upload] = found\n",
        "        self._uploads[upload] = found; host.out.append(Send(peer=host.owner, "
        "message=m.Stored(session=host.session, instance=host.instance, step=found.step, vnode=found.vnode, "
        "sha256=found.sha256, size_bytes=found.size_bytes)))\n",
        "CheckpointAtomic",
    ),
    _bug(
        "update before all microbatches are folded",
        HOST,
        "            last = microbatch + 1 == self.recipe.microbatches\n            following",
        "            last = True\n            following",
        "UpdateOnce", "LiveAndCalm", "Oracle",
    ),
    _bug(
        "gradient applied twice",
        HOST,
        "        self._summarised.pop(message.step, None)\n",
        "",
        "UpdateOnce", "VersionRule", "NoException",
        hint=5,
    ),
    _bug(
        "clipping sums in the order of arrival",
        STEP,
        "grad_scale([known.squares[v] for v in self.updating], self.recipe.clip_norm)",
        "grad_scale(list(known.squares.values()), self.recipe.clip_norm)",
        "Oracle",
    ),
    _bug(
        "inputs are not released",
        HOST,
        "            self.out.append(Release(handles=tuple(t.handle for t in part.inputs.values())))\n",
        "",
        "BoundedConserved",
    ),
    _bug(
        "rollback to a step that no commit names",
        OWNER,
        "window=answer.window, base=base)",
        "window=answer.window, base=Base(step=self.done_step(), manifest=base.manifest))",
        "VersionRule", "Oracle", "UpdateOnce", "CheckpointAtomic", "NoException", "LiveAndCalm",
    ),
    _bug(
        "a step is done before every VNode has updated",
        STEP,
        "            if len(known.updated) < len(self.updating):\n                break\n",
        "",
        "ClientView",
    ),
    _bug(
        "one microbatch more than the window is open",
        STEP,
        "return len(self._open) < self.window and",
        "return len(self._open) <= self.window and",
        "BoundedConserved", "LiveAndCalm",
    ),
    _bug(
        "forward does not wait for the version",
        HOST,
        "if not self._has_version(segment, step):",
        "if False:",
        "VersionRule",
    ),
    _bug(
        "backward does not keep the order of microbatches",
        HOST,
        "if (step, microbatch) != expected:",
        "if False:",
        "UpdateOnce", "NoException",
    ),
    _bug(
        "frames are not sent again on a new link",
        HOST,
        "            if pending.peer == peer:\n                self._send(pending)",
        "            if pending.peer == peer:\n                pass",
        "LiveAndCalm",
    ),
    _bug(
        "an append of unknown outcome counts as done",
        DESK,
        "self.after(self.limits.store_retry_s, ask)",
        "then(None)",
        "LogLinear", "CheckpointAtomic", "ClientView", "NoException",
    ),
    _bug(
        "deletion takes what a kept commit names",
        CHECKPOINTS,
        "delete = tuple(sorted(self._garbage - kept))",
        "delete = tuple(sorted(self._garbage))",
        "CheckpointAtomic",
    ),
    _bug(
        "a new owner does not tell hosts again what is open",
        OWNER,
        "                self._open(*key)  # Again, to all: whoever has it knows that.\n",
        "                pass\n",
        "LiveAndCalm",
        hint=139,
    ),
    _bug(
        "a session is taken over before all its hosts have answered",
        "dcnr.orchestrator.adoption",
        "        if not adoption.waiting:\n            self._whole(adoption)\n",
        "        self._whole(adoption)\n",
        "LiveAndCalm", "NoException",
        hint=3,
    ),
    _bug(
        "a host does not say again which losses it has told the last owner",
        HOST,
        "        for loss in self._losses:\n            self.out.append(Send(peer=owner, message=loss))\n",
        "",
        "LiveAndCalm",
        hint=8,
    ),
    _bug(
        "a new owner forgets what hosts have said while it waited for the others",
        OWNER,
        "                self._take(peer, message)\n            if not self.running:\n                return\n",
        "                pass\n            if not self.running:\n                return\n",
        "LiveAndCalm",
        hint=1,
    ),
    _bug(
        "an update does not wait for the copy of what it changes",
        SNAPSHOTS,
        "        return any(v in waiting for _, waiting in self._deferred for v in vnodes)\n",
        "        return False\n",
        "Oracle", "VersionRule", "CheckpointAtomic", "LiveAndCalm",
        hint=2,
    ),
    _bug(
        "an update that has waited for a copy is forgotten",
        HOST,
        "            self._queue_update(step, vnodes, scale)\n\n    def _queue_update",
        "            pass\n\n    def _queue_update",
        "LiveAndCalm",
        hint=2,
    ),
    _bug(
        "the manifest of a mark lacks the losses of its first step",
        MARKS,
        "range(previous.step + 1, mark.step + 1)",
        "range(previous.step + 2, mark.step + 1)",
        "Oracle",
        hint=16,
    ),
    _bug(
        "the memory of a copy is never free again",
        SNAPSHOTS,
        "        self._copying[step] -= 1\n        if self._copying[step] == 0:",
        "        self._copying[step] -= 1\n        if False:",
        "LiveAndCalm",
    ),
    _bug(
        "what another PNode keeps is discarded when the mark is whole",
        MARKS,
        "keep=tuple(sorted(kept))",
        "keep=()",
        "LiveAndCalm", "CheckpointAtomic",
        hint=27,
    ),
    _bug(
        "whoever was succeeded takes from hosts what it held",
        OWNER,
        '        if self.phase == "followed":\n            return  # What it once held',
        "        if False:\n            return  # What it once held",
        "LiveAndCalm",
        hint=210,
    ),
)  # fmt: skip
