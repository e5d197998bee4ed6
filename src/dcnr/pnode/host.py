"""One session's VNodes on this PNode, under one ticket: from the first frame to the update and the snapshot.

A host is created by a ticket and dropped by the next one. It never asks where a neighbour lives beyond
"here" or a peer, and never waits: whatever completes calls back in, and what has become possible is queued.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dcnr.config import Limits
from dcnr.ids import Epoch, Incarnation, PeerId, SessionId, VNodeId
from dcnr.machine import (
    Download,
    Effect,
    Fetch,
    Handle,
    Instant,
    Release,
    Send,
    TensorRef,
)
from dcnr.network.analysis import Network, Segment
from dcnr.network.node_type import DTYPE_BYTES
from dcnr.pnode import tasks
from dcnr.pnode.jobs import BACKWARD, CONTROL, FORWARD, Ids, Job, State
from dcnr.pnode.snapshots import Snapshots
from dcnr.protocol import messages as m
from dcnr.protocol.messages import Direction, FrameStatus
from dcnr.session.recipe import Recipe

FrameKey = tuple[int, Direction, int, int]
"""(edge, direction, step, microbatch): with the instances of the host, what is consumed once."""


@dataclass(slots=True, kw_only=True)
class Part:
    """One microbatch at one segment."""

    inputs: dict[int, TensorRef] = field(default_factory=dict)
    grads: dict[int, TensorRef] = field(default_factory=dict)
    saved: Handle | None = None
    forward_queued: bool = False
    forward_done: bool = False
    backward_queued: bool = False
    closed: bool = False
    forward_s: float = 0.0
    squares: tuple[m.MetricValue, ...] = ()
    """Of activations that the network measures; they go with the microbatch's ``Done``."""


@dataclass(slots=True, kw_only=True)
class Microbatch:
    """One microbatch at this host: its parts, and the rows that sources and costs share."""

    parts: dict[int, Part]
    opened: m.OpenMicrobatch | None = None
    columns: dict[str, TensorRef] | None = None


@dataclass(slots=True, kw_only=True)
class Unacknowledged:
    """A frame that is sent again on every new link until it is answered."""

    peer: PeerId
    frame: m.TensorFrame
    again_at: Instant | None = None
    """Set after ``NO_TICKET``: a ticket may be under way."""
    pause_s: float = 0.1


class Host:
    """See the module's docstring. Effects are appended to ``out``, which the root machine drains."""

    def __init__(
        self,
        *,
        tickets: m.Tickets,
        network: Network,
        recipe: Recipe,
        me: PeerId,
        incarnation: Incarnation,
        ids: Ids,
        limits: Limits,
        out: list[Effect],
    ) -> None:
        self.tickets = tickets
        self.network = network
        self.recipe = recipe
        self.me = me
        self.ids = ids
        self.limits = limits
        self.out = out
        self.session = tickets.session
        self.epoch = tickets.epoch
        self.owner = tickets.owner
        self.instance = tickets.instance
        self.serving = tickets.serving
        self.accepted = False
        self.fence_written = False
        self.dropped = False
        self.reserved_bytes = 0
        self.tasks_done = 0
        self.local_loads = 0
        self.neighbours = {n.peer: n for n in tickets.neighbours}
        self.neighbours[me] = m.Neighbour(peer=me, incarnation=incarnation, addresses=())
        placement = {place.vnode: str(place.peer) for place in tickets.placement}
        only = frozenset(placement) if tickets.serving else None
        everything = network.segments(placement, only)
        self.segments = {s.index: s for s in everything if s.host == me}
        self._enters = {edge: s for s in everything for edge in s.in_edges}
        self._leaves = {edge: s for s in everything for edge in s.out_edges}
        refs = {ref.vnode: ref for ref in tickets.states}
        needed = [v for s in self.segments.values() for v in s.states]
        missing = sorted({v for v in needed if v not in refs})
        if missing:
            raise ValueError(f"the ticket names no state for {', '.join(missing)}")
        self.states = {
            v: State(
                ref=refs[v],
                updates=bool(network.uses(v)) and not self.serving,
                version=tickets.base_step,
                segments=frozenset(s.index for s in self.segments.values() if v in s.states),
            )
            for v in dict.fromkeys(needed)
        }
        self._loading = False
        self._sources: dict[VNodeId, Handle] = {}
        self._downloads: dict[int, VNodeId] = {}
        self._fetches: dict[int, tuple[int, int]] = {}
        self._microbatches: dict[tuple[int, int], Microbatch] = {}
        self._open: set[tuple[int, int]] = set()
        self._folded: dict[int, set[int]] = {}
        self._forwards: dict[tuple[int, int], int] = {}
        """(step, segment without backward) to the microbatches it has done."""
        self._next_backward: dict[int, tuple[int, int]] = {}
        self._summarised: dict[int, set[VNodeId]] = {}
        self._scales: dict[int, float] = {}
        self._seen: dict[FrameKey, str | None] = {}
        # A serving set numbers its microbatches from 1, whatever the step of its checkpoint.
        self._before = 0 if tickets.serving else tickets.base_step
        self._newest_step = self._before
        self._jobs: list[tuple[int, int, int, int, Job]] = []
        self._job_count = 0
        self.unacknowledged: dict[FrameKey, Unacknowledged] = {}
        self._reports: list[tuple[int, m.Message]] = []
        self._losses: list[m.Loss] = []
        """Since the newest commit: what a new owner cannot know otherwise."""
        self._last_opened = (0, 0)
        """(step, microbatch); a new owner goes on behind the last of all hosts."""
        self._unread_states: set[VNodeId] = set()
        self._unread_rows: set[tuple[int, int]] = set()
        """(step, microbatch)."""
        self._closed: dict[int, float] = {}
        """(step, clipping factor) since the newest commit."""
        self.snapshots = Snapshots(self, tickets.base_step, (r.sha256 for r in refs.values() if r.sha256))
        self._held_back: list[tuple[int, list[VNodeId], float]] = []
        """Updates (step, VNodes, clipping factor) that wait until what they change is copied."""

    # --- what may run ---------------------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """The most urgent job, taken off the queue."""
        return heapq.heappop(self._jobs)[4] if self._jobs else None

    def has_job(self) -> bool:
        return bool(self._jobs)

    def queue(self, job: Job) -> None:
        self._job_count += 1
        heapq.heappush(self._jobs, (job.rank, job.step, job.microbatch, self._job_count, job))

    # --- reports to the owner -------------------------------------------------------------------------------

    def report(self, step: int, message: m.Message) -> None:
        """Send, and keep for the next link: the owner's window bounds how many steps a lost suffix can hold."""
        self._newest_step = max(self._newest_step, step)
        kept_from = self._kept_from()
        if self._reports and self._reports[0][0] < kept_from:
            self._reports = [r for r in self._reports if r[0] >= kept_from]
        self._reports.append((step, message))
        if isinstance(message, m.Loss) and not self.serving:
            self._losses.append(message)
        self.out.append(Send(peer=self.owner, message=message))

    def _kept_from(self) -> int:
        """Reports of this step and later ones are all kept."""
        microbatches = 1 if self.serving else self.recipe.microbatches  # What is read comes in steps of one.
        return self._newest_step - self.tickets.window // microbatches - 2

    def link_up(self, peer: PeerId) -> None:
        """Say again what an older link may have lost."""
        if peer == self.owner:
            for _, message in self._reports:
                self.out.append(Send(peer=peer, message=message))
            self.snapshots.repeat_stored()
        for pending in self.unacknowledged.values():
            if pending.peer == peer:
                self._send(pending)

    def fail(self, vnode: VNodeId, step: int, microbatch: int, cause: str, reason: str) -> None:
        self.report(
            step,
            m.TaskFailed(
                session=self.session,
                instance=self.instance,
                vnode=vnode,
                step=step,
                microbatch=microbatch,
                cause=cause,
                reason=reason,
            ),
        )

    # --- a new owner ----------------------------------------------------------------------------------------

    def adopt(self, epoch: Epoch, owner: PeerId, token: str) -> None:
        """Obey ``owner`` from now on, and tell it where this host stands. Asked again, only tell it again."""
        if epoch != self.epoch:
            self.epoch, self.owner = epoch, owner
            self.snapshots.adopted()
            # What was to be read by the old owner's leave, or could not be by the end, is read again by the new one's.
            self._reports = [
                (step, message)
                for step, message in self._reports
                if not (isinstance(message, m.TaskFailed) and message.cause in ("data", "state"))
            ]
            for state in self.states.values():
                if not state.ref.holder:
                    state.ref = replace(state.ref, token=token)
            downloads, self._downloads = {*self._downloads.values(), *self._unread_states}, {}
            for vnode in sorted(downloads):
                self._download(vnode)
            unread, self._fetches = {*self._fetches.values(), *self._unread_rows}, {}
            self._open -= unread
            self._unread_states, self._unread_rows = set(), set()
        for loss in self._losses:
            self.out.append(Send(peer=owner, message=loss))
        self.link_up(owner)
        self.out.append(
            Send(
                peer=owner,
                message=m.Adopted(
                    session=self.session,
                    epoch=epoch,
                    instance=self.instance,
                    versions=tuple((v, s.version) for v, s in self.states.items() if s.updates),
                    open_microbatches=(self._last_opened,) if self._last_opened[0] else (),
                    snapshot_at=self.snapshots.newest_step(),
                    kept_from=self._kept_from(),
                    scales=tuple(sorted(self._closed.items())),
                ),
            )
        )

    def committed(self, step: int) -> None:
        """The log names the step's manifest, and in it every loss up to it."""
        self.snapshots.committed(step)
        self._losses = [loss for loss in self._losses if loss.step > step]
        self._closed = {s: scale for s, scale in self._closed.items() if s > step}

    # --- state ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Lazily: at the first frame or open."""
        if self._loading:
            return
        self._loading = True
        for vnode, state in self.states.items():
            if state.ref.sha256:
                self._download(vnode)
            else:
                self._queue_load(vnode, None)

    def _download(self, vnode: VNodeId) -> None:
        ref = self.states[vnode].ref
        download = self.ids.next()
        self._downloads[download] = vnode
        self.out.append(
            Download(
                id=download,
                peer=ref.holder[0].peer if ref.holder else self.owner,
                session=self._stored_in(),
                sha256=ref.sha256,
                size_bytes=ref.size_bytes,
                token=ref.token,
                address=ref.holder[0].addresses[0] if ref.holder else "",
            )
        )

    def _stored_in(self) -> SessionId:
        """The session whose objects are read: for serving, the one that was trained (its token names it)."""
        return self.tickets.trained if self.serving else self.session

    def downloaded(self, id: int, handle: Handle, local: bool) -> None:
        vnode = self._downloads.pop(id)
        self.local_loads += local
        self._sources[vnode] = handle
        self._queue_load(vnode, handle)

    def _queue_load(self, vnode: VNodeId, source: Handle | None) -> None:
        def done(result: tasks.Loaded) -> None:
            if source is not None:
                self.out.append(Release(handles=(self._sources.pop(vnode),)))
            state = self.states[vnode]
            state.handle = result.state
            if all(s.handle is not None for s in self.states.values()):
                self.report(
                    self._before,
                    m.Loaded(
                        session=self.session,
                        instance=self.instance,
                        vnodes=tuple(self.states),
                        local=self.local_loads,
                    ),
                )
            self.snapshots.loaded(vnode)
            self._fire_all()

        self.queue(
            Job(
                rank=CONTROL,
                step=self.tickets.base_step,
                microbatch=0,
                vnode=vnode,
                build=lambda: tasks.Load(
                    network=self.network,
                    recipe=self.recipe,
                    vnode=vnode,
                    source=source,
                    training=not self.serving,
                    begin=source is not None and self.tickets.base_step == 0,
                ),
                done=done,
            )
        )

    def _states_of(self, segment: Segment) -> tasks.States:
        return tuple((v, handle) for v in segment.states if (handle := self.states[v].handle) is not None)

    def _has_version(self, segment: Segment, step: int) -> bool:
        wanted = self.recipe.forward_version(step)
        for vnode in segment.states:
            state = self.states[vnode]
            if state.handle is None or (state.updates and state.version != wanted):
                return False
        return True

    # --- microbatches ---------------------------------------------------------------------------------------

    def _microbatch(self, step: int, microbatch: int) -> Microbatch:
        key = (step, microbatch)
        found = self._microbatches.get(key)
        if found is None:
            found = Microbatch(parts={index: Part() for index in self.segments})
            self._microbatches[key] = found
        return found

    def open(self, message: m.OpenMicrobatch) -> None:
        """A source's or cost's microbatch starts: fetch its rows. Repeated messages are answered again."""
        key = (message.step, message.microbatch)
        reason = "" if key in self._open else self._cannot_open(message)
        self.out.append(
            Send(
                peer=self.owner,
                message=m.TaskAnswer(
                    session=self.session,
                    instance=self.instance,
                    step=message.step,
                    microbatch=message.microbatch,
                    accepted=not reason,
                    reason=reason,
                ),
            )
        )
        if reason or key in self._open:
            return
        self._open.add(key)
        self._last_opened = max(self._last_opened, key)
        self._open = {k for k in self._open if k[0] > message.done_step}
        self._load()
        self._microbatch(*key).opened = message
        fetch = self.ids.next()
        self._fetches[fetch] = key
        self.out.append(Fetch(id=fetch, peer=self.owner, ref=message.inline if message.inline else message.rows[0]))

    def _cannot_open(self, message: m.OpenMicrobatch) -> str:
        """Why a microbatch makes no sense here, or ''. Nothing that comes over the wire may raise later."""
        step, microbatch = message.step, message.microbatch
        steps, microbatches = (step, 1) if self.serving else (self.recipe.steps, self.recipe.microbatches)
        if not (1 <= step <= steps and 0 <= microbatch < microbatches):
            return f"no microbatch {microbatch} of step {step} in this session"
        if (step, microbatch) not in self._microbatches and len(self._microbatches) >= self.tickets.window:
            return f"more than {self.tickets.window} microbatches are open"
        for tensor in message.inline:
            size = DTYPE_BYTES.get(tensor.dtype, 0) * math.prod(tensor.shape)
            if size != len(tensor.data) or min(tensor.shape, default=0) < 1:
                found = f"{tensor.dtype} {list(tensor.shape)} in {len(tensor.data)} bytes"
                return f"{tensor.column!r}: found {found}, expected a tensor that fills them"
        definition = self.network.definition
        needed = {
            entry.name if message.inline else entry.column
            for segment in self.segments.values()
            for entry in (definition.inputs[i] for i in segment.inputs)
        }
        costs = [definition.costs[c] for segment in self.segments.values() for c in segment.costs]
        needed |= {cost.target for cost in costs}
        given = {t.column for t in message.inline} or {c for rows in message.rows[:1] for c in rows.columns}
        if missing := sorted(needed - given):
            return f"no values of {', '.join(missing)}"
        if uncounted := sorted({cost.node_id for cost in costs} - {c.vnode for c in message.valid_targets}):
            return f"no count of valid targets of {', '.join(uncounted)}"
        return "" if given else "it names no rows"

    def fetched(self, id: int, tensors: tuple[TensorRef, ...]) -> None:
        key = self._fetches.pop(id)
        work = self._microbatches[key]
        assert work.opened is not None
        names = tuple(t.column for t in work.opened.inline) if work.opened.inline else work.opened.rows[0].columns
        work.columns = dict(zip(names, tensors, strict=True))
        self._fire(*key)

    def transfer_failed(self, id: int, reason: str) -> None:
        if id in self._downloads:
            vnode = self._downloads.pop(id)
            self._unread_states.add(vnode)
            self.fail(vnode, self._before, 0, "state", reason)
        elif id in self._fetches:
            step, microbatch = self._fetches.pop(id)
            self._unread_rows.add((step, microbatch))
            first = min(self.segments.values(), key=lambda s: s.index).vnodes[0]
            self.fail(first, step, microbatch, "data", reason)
        else:
            self.snapshots.transfer_failed(id, reason)

    # --- frames ---------------------------------------------------------------------------------------------

    def status(self, frame: m.TensorFrame) -> tuple[FrameStatus, str]:
        """What a frame deserves, by its header alone. ``ACCEPTED`` = it is wanted and there is room."""
        forward = frame.direction is Direction.FORWARD
        ends = self._enters if forward else self._leaves
        segment = ends.get(frame.edge)
        if segment is None or segment.index not in self.segments:
            return FrameStatus.REFUSED, f"edge {frame.edge} does not end here"
        if not forward and frame.edge not in segment.grads_in:
            return FrameStatus.REFUSED, f"edge {frame.edge} carries no gradient"
        if not self.serving and not (
            1 <= frame.step <= self.recipe.steps and 0 <= frame.microbatch < self.recipe.microbatches
        ):
            return FrameStatus.REFUSED, f"no microbatch {frame.microbatch} of step {frame.step} in this session"
        edge = self.network.definition.edges[frame.edge]
        spec = self.network.vnodes[edge.source].outputs[edge.source_slot]
        wanted = (self.tickets.rows, *spec.shape)
        shape = frame.tensor.shape
        fits = (
            len(shape) == len(wanted) and all(0 < s <= w for s, w in zip(shape, wanted, strict=True))
            if self.serving
            else shape == wanted
        )
        if not fits or frame.tensor.dtype != spec.dtype:
            return (
                FrameStatus.REFUSED,
                f"edge {frame.edge} ({edge.source} to {edge.target}): found {frame.tensor.dtype} {list(shape)}, "
                f"expected {spec.dtype} {list(wanted)}",
            )
        if self._key(frame) in self._seen or frame.step < self._forgotten_before():
            return FrameStatus.DUPLICATE, ""
        work = self._microbatches.get((frame.step, frame.microbatch))
        if work is None and len(self._microbatches) >= self.tickets.window:
            return FrameStatus.REFUSED, f"more than {self.tickets.window} microbatches are open"
        return FrameStatus.ACCEPTED, ""

    @staticmethod
    def _key(frame: m.TensorFrame) -> FrameKey:
        return (frame.edge, frame.direction, frame.step, frame.microbatch)

    def _forgotten_before(self) -> int:
        """Steps below this are over here: whatever still comes of them was consumed."""
        return self._newest_step - self.tickets.window - 1

    def diverges(self, frame: m.TensorFrame) -> bool:
        """The same key came with other bytes."""
        known = self._seen.get(self._key(frame))
        return known is not None and frame.tensor.digest is not None and known != frame.tensor.digest

    def frame(self, frame: m.TensorFrame) -> None:
        """Take an accepted frame; its tensor is ours now."""
        self._load()
        self._deliver(frame.edge, frame.direction, frame.step, frame.microbatch, frame.tensor)

    def _deliver(self, edge: int, direction: Direction, step: int, microbatch: int, tensor: TensorRef) -> None:
        self._seen[(edge, direction, step, microbatch)] = tensor.digest
        segment = (self._enters if direction is Direction.FORWARD else self._leaves)[edge]
        part = self._microbatch(step, microbatch).parts[segment.index]
        (part.inputs if direction is Direction.FORWARD else part.grads)[edge] = tensor
        self._fire(step, microbatch)

    def _emit(self, edge: int, direction: Direction, step: int, microbatch: int, tensor: TensorRef) -> None:
        """Hand a tensor to the segment at the other end of an edge: here, or on a peer."""
        other = (self._enters if direction is Direction.FORWARD else self._leaves)[edge]
        peer = PeerId(other.host)
        if peer == self.me:
            self._deliver(edge, direction, step, microbatch, tensor)
        else:
            self._emit_frame(peer, edge, direction, step, microbatch, tensor)

    def _emit_frame(
        self, peer: PeerId, edge: int, direction: Direction, step: int, microbatch: int, tensor: TensorRef
    ) -> None:
        neighbour = self.neighbours.get(peer)
        frame = m.TensorFrame(
            session=self.session,
            edge=edge,
            direction=direction,
            step=step,
            microbatch=microbatch,
            source_instance=self.instance,
            target_instance=self.instance,
            target_incarnation=neighbour.incarnation if neighbour else Incarnation(boot=0, nonce=""),
            tensor=tensor,
        )
        pending = Unacknowledged(peer=peer, frame=frame)
        self.unacknowledged[self._key(frame)] = pending
        self._send(pending)

    def _send(self, pending: Unacknowledged) -> None:
        pending.again_at = None
        self.out.append(Send(peer=pending.peer, message=pending.frame))

    def acknowledged(self, now: Instant, peer: PeerId, ack: m.FrameAck) -> None:
        key = (ack.edge, ack.direction, ack.step, ack.microbatch)
        pending = self.unacknowledged.get(key)
        if pending is None or pending.peer != peer:
            return
        match ack.status:
            case FrameStatus.NO_TICKET if self.serving:
                # Nothing is opened before all have their tickets, so the receiver has dropped its own.
                del self.unacknowledged[key]
                self.out.append(Release(handles=(pending.frame.tensor.handle,)))
                edge = self.network.definition.edges[max(ack.edge, 0)]
                self.fail(edge.source, ack.step, ack.microbatch, "ticket", f"{peer} has dropped its ticket")
            case FrameStatus.NO_TICKET:
                pending.again_at = Instant(now + pending.pause_s)
                pending.pause_s = min(2 * pending.pause_s, self.limits.redial_most_s)
            case FrameStatus.ACCEPTED | FrameStatus.DUPLICATE | FrameStatus.STALE | FrameStatus.REFUSED:
                del self.unacknowledged[key]
                self.out.append(Release(handles=(pending.frame.tensor.handle,)))
                if ack.status is FrameStatus.REFUSED:
                    edge = self.network.definition.edges[max(ack.edge, 0)]
                    self.fail(edge.source, ack.step, ack.microbatch, "compute", f"{peer} refused: {ack.reason}")

    def send_again(self, now: Instant) -> Instant | None:
        """Repeat frames that found no ticket. Returns when to come back."""
        soonest: Instant | None = None
        for pending in self.unacknowledged.values():
            if pending.again_at is not None and pending.again_at <= now:
                self._send(pending)
            if pending.again_at is not None and (soonest is None or pending.again_at < soonest):
                soonest = pending.again_at
        return soonest

    # --- firing ---------------------------------------------------------------------------------------------

    def _fire_all(self) -> None:
        for key in sorted(self._microbatches):
            self._fire(*key)

    def _fire(self, step: int, microbatch: int) -> None:
        work = self._microbatches.get((step, microbatch))
        if work is None:
            return
        for index, part in work.parts.items():
            segment = self.segments[index]
            if not part.forward_queued:
                self._try_forward(step, microbatch, work, segment, part)
            elif part.forward_done and segment.backward and not part.backward_queued:
                self._try_backward(step, microbatch, segment, part)

    def _try_forward(self, step: int, microbatch: int, work: Microbatch, segment: Segment, part: Part) -> None:
        if len(part.inputs) < len(segment.in_edges) or (segment.by_reference and work.columns is None):
            return
        if not self._has_version(segment, step):
            return
        part.forward_queued = True
        definition = self.network.definition
        inputs = [part.inputs[edge] for edge in segment.in_edges]
        valid: tuple[int, ...] = ()
        if segment.by_reference:
            assert work.columns is not None
            assert work.opened is not None
            counts = {c.vnode: c.count for c in work.opened.valid_targets}
            valid = tuple(counts[definition.costs[c].node_id] for c in segment.costs)
            entries = (definition.inputs[i] for i in segment.inputs)
            inputs += [work.columns[entry.name if work.opened.inline else entry.column] for entry in entries]
            inputs += [work.columns[definition.costs[c].target] for c in segment.costs]
        wanted = tuple(
            (position, (r.vnode, r.slot, r.last_position))
            for position, r in enumerate(self.tickets.results)
            if r.vnode in segment.vnodes
        )

        def done(result: tasks.ForwardDone) -> None:
            part.forward_done = True
            part.saved = result.saved
            part.forward_s = result.seconds
            part.squares = result.squares
            self.out.append(Release(handles=tuple(t.handle for t in part.inputs.values())))
            part.inputs = {}
            for cost, loss in zip(segment.costs, result.losses, strict=True):
                self.report(
                    step,
                    m.Loss(
                        session=self.session,
                        instance=self.instance,
                        vnode=definition.costs[cost].node_id,
                        step=step,
                        microbatch=microbatch,
                        loss=loss,
                    ),
                )
            for (position, _), tensor in zip(wanted, result.results, strict=True):
                self._emit_frame(self.owner, -1 - position, Direction.FORWARD, step, microbatch, tensor)
            if not segment.backward or self.serving:
                self._close(step, microbatch, segment, part, 0.0)
            for edge, tensor in zip(segment.out_edges, result.outputs, strict=True):
                self._emit(edge, Direction.FORWARD, step, microbatch, tensor)
            if not segment.backward and not self.serving:
                key = (step, segment.index)
                self._forwards[key] = self._forwards.get(key, 0) + 1
                if self._forwards[key] == self.recipe.microbatches:
                    del self._forwards[key]
                    self._fold(step, segment)
            self._fire(step, microbatch)

        self.queue(
            Job(
                rank=FORWARD,
                step=step,
                microbatch=microbatch,
                vnode=segment.vnodes[0],
                build=lambda: tasks.Forward(
                    network=self.network,
                    recipe=self.recipe,
                    segment=segment,
                    states=self._states_of(segment),
                    inputs=tuple(inputs),
                    valid_targets=valid,
                    step=step,
                    microbatch=microbatch,
                    first_row=microbatch * self.tickets.rows,
                    training=not self.serving,
                    results=tuple(r for _, r in wanted),
                ),
                done=done,
            )
        )

    def _try_backward(self, step: int, microbatch: int, segment: Segment, part: Part) -> None:
        if len(part.grads) < len(segment.grads_in) or self.serving:
            return
        expected = self._next_backward.get(segment.index, (self.tickets.base_step + 1, 0))
        if (step, microbatch) != expected:
            return
        part.backward_queued = True
        grads = tuple(part.grads[edge] for edge in segment.grads_in)
        saved = part.saved
        assert saved is not None

        def build() -> tasks.Task:
            part.saved = None  # the task takes over its count
            return tasks.Backward(
                network=self.network,
                segment=segment,
                saved=saved,
                states=self._states_of(segment),
                grads=grads,
                step=step,
                microbatch=microbatch,
            )

        def done(result: tasks.BackwardDone) -> None:
            part.grads = {}
            self.out.append(Release(handles=tuple(g.handle for g in grads)))
            last = microbatch + 1 == self.recipe.microbatches
            following = (step + 1, 0) if last else (step, microbatch + 1)
            self._next_backward[segment.index] = following
            self._close(step, microbatch, segment, part, result.seconds)
            for edge, tensor in zip(segment.grads_out, result.grads, strict=True):
                self._emit(edge, Direction.BACKWARD, step, microbatch, tensor)
            if last:
                self._fold(step, segment)
            self._fire(*following)

        self.queue(
            Job(
                rank=BACKWARD,
                step=step,
                microbatch=microbatch,
                vnode=segment.vnodes[0],
                build=build,
                done=done,
            )
        )

    def _close(self, step: int, microbatch: int, segment: Segment, part: Part, backward_s: float) -> None:
        """The segment's last task for the microbatch is done."""
        part.closed = True
        work = self._microbatches[(step, microbatch)]
        if all(p.closed for p in work.parts.values()):
            if work.columns:
                self.out.append(Release(handles=tuple(t.handle for t in work.columns.values())))
            del self._microbatches[(step, microbatch)]
        self.report(
            step,
            m.Done(
                session=self.session,
                instance=self.instance,
                segment=segment.index,
                step=step,
                microbatch=microbatch,
                forward_s=part.forward_s,
                backward_s=backward_s,
                squares=part.squares,
            ),
        )
        old = self._forgotten_before()
        if self._seen and next(iter(self._seen))[2] < old:
            self._seen = {key: digest for key, digest in self._seen.items() if key[2] >= old}

    # --- updates --------------------------------------------------------------------------------------------

    def _fold(self, step: int, segment: Segment) -> None:
        """A segment has done its last microbatch: VNodes that no other segment here still reads or folds may be
        summarised or updated. Also a use without a gradient must have read the old version before it goes."""
        folded = self._folded.setdefault(step, set())
        folded.add(segment.index)
        ready = [
            v
            for v, state in self.states.items()
            if state.updates and segment.index in state.segments and state.segments <= folded
        ]
        if folded >= set(self.segments):
            del self._folded[step]
        if not ready:
            return
        if not self.recipe.clips_network:
            self._queue_update(step, ready, 1.0)
            return

        def done(result: tasks.Summarized) -> None:
            self._summarised.setdefault(step, set()).update(ready)
            self.report(
                step,
                m.StepSummaries(
                    session=self.session,
                    instance=self.instance,
                    step=step,
                    summaries=tuple(
                        m.StepSummary(vnode=v, grad_sq=grad_sq, finite=finite)
                        for v, grad_sq, finite in result.summaries
                    ),
                ),
            )

        self.queue(
            Job(
                rank=CONTROL,
                step=step,
                microbatch=self.recipe.microbatches,
                vnode=ready[0],
                build=lambda: tasks.Summarize(network=self.network, states=self.handles(ready), step=step),
                done=done,
            )
        )

    def handles(self, vnodes: Iterable[VNodeId]) -> tasks.States:
        return tuple((v, handle) for v in vnodes if (handle := self.states[v].handle) is not None)

    def step_close(self, message: m.StepClose) -> None:
        """The clipping factor is known: every VNode that was summarised updates. A repetition finds nothing to do."""
        ready = [v for v in self.states if v in self._summarised.get(message.step, ())]
        self._summarised.pop(message.step, None)
        self._closed.setdefault(message.step, message.grad_scale)
        if ready:
            self._queue_update(message.step, ready, message.grad_scale)

    def updates_may_go_on(self) -> None:
        held_back, self._held_back = self._held_back, []
        for step, vnodes, scale in held_back:
            self._queue_update(step, vnodes, scale)

    def _queue_update(self, step: int, vnodes: list[VNodeId], scale: float) -> None:
        if self.snapshots.hold_back(vnodes):
            self._held_back.append((step, vnodes, scale))
            return

        def done(result: tasks.UpdateDone) -> None:
            for v in vnodes:
                self.states[v].version = step
            self.report(
                step,
                m.Updated(
                    session=self.session,
                    instance=self.instance,
                    step=step,
                    vnodes=tuple(vnodes),
                    not_finite=result.not_finite,
                    update_s=result.seconds,
                    metrics=result.metrics,
                ),
            )
            self.snapshots.updated(step, [v for v in vnodes if v not in result.not_finite])
            self._fire_all()

        self.queue(
            Job(
                rank=CONTROL,
                step=step,
                microbatch=self.recipe.microbatches,
                vnode=vnodes[0],
                build=lambda: tasks.Update(
                    network=self.network,
                    recipe=self.recipe,
                    states=self.handles(vnodes),
                    step=step,
                    grad_scale=scale,
                ),
                done=done,
            )
        )

    # --- the end --------------------------------------------------------------------------------------------

    def owns(self, id: int) -> bool:
        """Whether a transfer is this host's."""
        return id in self._downloads or id in self._fetches or self.snapshots.owns(id)

    def retire(self) -> None:
        """Nothing more begins. Handles stay until tasks that are under way have returned."""
        self.dropped = True
        self._jobs = []

    def release(self) -> None:
        """Give back every handle; no task of this host is under way."""
        handles: list[Handle] = [s.handle for s in self.states.values() if s.handle is not None]
        handles += self._sources.values()
        for work in self._microbatches.values():
            handles += [t.handle for t in (work.columns or {}).values()]
            for part in work.parts.values():
                handles += [t.handle for t in part.inputs.values()]
                handles += [t.handle for t in part.grads.values()]
                if part.saved is not None:
                    handles.append(part.saved)
        handles += [p.frame.tensor.handle for p in self.unacknowledged.values()]
        self.unacknowledged = {}
        self._microbatches = {}
        self._sources = {}
        self.states = {}
        if handles:
            self.out.append(Release(handles=tuple(handles)))
