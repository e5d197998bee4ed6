"""One-line bugs, each of which the simulator must find. ``old`` occurs exactly once in its module."""

from __future__ import annotations

from dataclasses import dataclass

from dcnr.sim import Patch

PNODE, HOST, SNAPSHOTS = "dcnr.pnode.pnode", "dcnr.pnode.host", "dcnr.pnode.snapshots"
OWNER, STEP, DESK = "dcnr.orchestrator.owner", "dcnr.orchestrator.step", "dcnr.orchestrator.desk"
CHECKPOINTS, MARKS, MOVES = "dcnr.orchestrator.checkpoints", "dcnr.orchestrator.marks", "dcnr.orchestrator.moves"
ORCHESTRATOR, SESSIONS, PACE = "dcnr.orchestrator.orchestrator", "dcnr.orchestrator.sessions", "dcnr.orchestrator.pace"

# Not here: to lose patience with an owner too early breaks nothing (tests/orchestrator/test_beats.py counts its lease), and
# that what was taken over leaves its room to nobody shows in too few seeds (tests/orchestrator/test_trouble.py).


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
        hint=5,
    ),
    _bug(
        "a session is taken over before all its hosts have answered",
        "dcnr.orchestrator.adoption",
        "        if not adoption.waiting:\n            self._whole(adoption)\n",
        "        self._whole(adoption)\n",
        "LiveAndCalm", "NoException",
        hint=1,
    ),
    _bug(
        "a host does not say again which losses it has told the last owner",
        HOST,
        "        for loss in self._losses:\n            self.out.append(Send(peer=owner, message=loss))\n",
        "",
        "LiveAndCalm",
        hint=55,
    ),
    _bug(
        "a new owner forgets what hosts have said while it waited for the others",
        OWNER,
        "                self._take(peer, message)\n            if not self.running:\n                return\n",
        "                pass\n            if not self.running:\n                return\n",
        "LiveAndCalm",
        hint=5,
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
    _bug(
        "a network that a put of unknown outcome has created is taken for a damaged one",
        ORCHESTRATOR,
        "if found not in (None, message.definition):",
        "if found is not None:",
        "ClientView",
        hint=1,
    ),
    _bug(
        "a put that failed is given up, whether or not it lands later",
        DESK,
        "                    self.after(self.limits.store_retry_s, ask)\n                case StoreCreated():",
        "                    pass\n                case StoreCreated():",
        "LiveAndCalm", "ClientView",
        hint=1,
    ),
    _bug(
        "what no list shows yet does not exist",
        SESSIONS,
        "if len(name) == _NETWORK_CHARACTERS and name.isalnum() and name not in (*self.networks, *unknown):",
        "if False:",
        "ClientView",
        hint=112,
    ),
    _bug(
        "a session that another clock has dated in the future is unreadable",
        SESSIONS,
        "                record = Record.from_bytes(data)\n",
        "                record = Record.from_bytes(data)\n"
        "                if record.created_unix_s > self._desk.unix_s():\n"
        "                    raise ProtocolError('it was made in the future')\n",
        "ClientView", "LiveAndCalm",
        hint=310,
    ),
    _bug(
        "timers mix the wall clock with the monotonic one",
        DESK,
        "heapq.heappush(self._timers, (self.now + delay_s,",
        "heapq.heappush(self._timers, (self.unix_s() + delay_s,",
        "LiveAndCalm", "ClientView",
        hint=1,
    ),
    _bug(
        "sessions on one PNode count their transfers each for itself",
        PNODE,
        "            ids=self._ids,\n",
        "            ids=Ids(),\n",
        "ClientView", "NoException", "BoundedConserved", "LiveAndCalm", "VersionRule", "Oracle", "CheckpointAtomic",
        hint=23,
    ),
    _bug(
        "a session that waits keeps what it has",
        OWNER,
        "        if not self._released:\n            # Whoever waits",
        "        if False:\n            # Whoever waits",
        "LiveAndCalm", "OlderFirst",
        hint=84,
    ),
    _bug(
        "nobody tells a session that waits that another has let go",
        ORCHESTRATOR,
        "                owner.withdrawn(peer, message)\n                self._poke()\n",
        "                owner.withdrawn(peer, message)\n",
        "LiveAndCalm",
        hint=30,
    ),
    _bug(
        "of sessions that wait the youngest is placed first",
        DESK,
        "oldest = min(self._to_place, key=lambda looking: looking[0])",
        "oldest = max(self._to_place, key=lambda looking: looking[0])",
        "OlderFirst",
        hint=49,
    ),
    _bug(
        "a move that was planned once is never looked at again",
        MOVES,
        "    def _planned(self, problem: Problem, answer: Placement | str) -> None:\n        self._planning = False\n",
        "    def _planned(self, problem: Problem, answer: Placement | str) -> None:\n",
        "Leaver", "LiveAndCalm",
        hint=7,
    ),
    _bug(
        "a PNode that is drained does not say so",
        PNODE,
        "leaving=self._draining or bool(self._departing),",
        "leaving=bool(self._departing),",
        "Leaver",
        hint=7,
    ),
    _bug(
        "who is refused a move again hears it once",
        MOVES,
        "            self.refuse(self._hopeless[1])\n",
        "            pass\n",
        "Leaver",
        hint=7,
    ),
    _bug(
        "a PNode that is told to end waits without end",
        PNODE,
        "        self._depart_by = Instant(self._now + self.limits.leave_patience_s)\n",
        "",
        "Leaver", "LiveAndCalm",
        hint=11,
    ),
    _bug(
        "the first mark waits as if one loss were sure to come first",
        PACE,
        "        self._next_at = Instant(now + max(pause_s, self._least_s))",
        "        self._next_at = Instant(now + max(pause_s, self._prior_s))",
        "MarksWhole",
        hint=3,
    ),
    _bug(
        "memory of what a placement replaces counts twice",
        PNODE,
        "missing = host.reserved_bytes - self._free_bytes() - before",
        "missing = host.reserved_bytes - self._free_bytes()",
        "LiveAndCalm",
        hint=268,
    ),
    _bug(
        "what is kept for others is never dropped",
        PNODE,
        "self._out.append(Discard(session=session, keep=message.keep, guarded=True))",
        "pass",
        "ShelfBounded",
        hint=50,
    ),
)  # fmt: skip
