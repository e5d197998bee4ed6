"""Reading a checkpoint: generation, forward passes, evaluation, on read-only instances, never on weights in training.

A *set* is a placement of the VNodes that are needed, under serving tickets named by a nonce. It is in no log: losing
it loses nothing, for what was asked is simply asked again of a new set.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dcnr.config import Limits
from dcnr.ids import Epoch, Incarnation, Instance, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Compute, Computed, ComputeFailed, Instant, Release, TensorRef
from dcnr.network.analysis import Network
from dcnr.network.graph import canonical_json
from dcnr.network.node_type import DTYPE_BYTES
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.owner import Owner
from dcnr.orchestrator.placement import Placement
from dcnr.protocol import messages as m
from dcnr.protocol.messages import FrameStatus
from dcnr.session.checkpoint import Manifest
from dcnr.session.log import Base

RESULT = -1
"""Stands among the segments that a microbatch waits for: its result, which ``Done`` may overtake on the link."""
ATTEMPTS = 5
"""A request is asked of this many sets before it is refused: each loss of a PNode costs one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Compute task of an orchestrator: draw a token from logits [1, 1, vocabulary] (float). Result: the token's id.

    ``temperature`` 0 = the most probable; ``top_p`` keeps the least set of tokens of at least that probability
    (Holtzman et al., 2020). The draw is a function of (seed, position).
    """

    logits: TensorRef
    temperature: float
    top_p: float
    seed: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Compute task of an orchestrator: bytes ``first`` to ``first + count`` of a tensor, little endian, row-major."""

    tensor: TensorRef
    first: int
    count: int


@dataclass(slots=True, kw_only=True)
class Generation:
    """A client's request under way."""

    request: int
    wanted: m.Generate
    tokens: list[int]
    made: int = 0
    attempts: int = 0
    busy: bool = False
    """Its result is here and worked on; no microbatch is opened for it meanwhile."""


@dataclass(slots=True, kw_only=True)
class Pass:
    """One batch of a client's forward pass."""

    request: int
    wanted: m.Forward
    results: dict[int, TensorRef] = field(default_factory=dict)
    """By position among the set's results."""
    attempts: int = 0
    busy: bool = False


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Validation rows of a commit, in microbatches."""

    batches: tuple[tuple[int, ...], ...]
    rows: int
    targets: tuple[m.CostTargets, ...]
    """Of all batches together."""
    then: Callable[[float, int, str], None]
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    sent: int = 0
    done: int = 0


@dataclass(slots=True, kw_only=True)
class ServingSet:
    id: SessionId
    owner: Owner
    base: Base
    only: frozenset[VNodeId]
    results: tuple[m.OutputRef, ...]
    rows: int
    """Most rows of a microbatch: memory is reserved for these."""
    window: int = 1
    placement: dict[VNodeId, PeerId] = field(default_factory=dict)
    hosts: dict[PeerId, Incarnation] = field(default_factory=dict)
    segments: int = 0
    unticketed: set[PeerId] = field(default_factory=set)
    ready: bool = False
    dead: bool = False
    used_at: Instant
    step: int = 0
    """Number of the newest microbatch opened."""
    closed: int = 0
    waiting: dict[int, set[int]] = field(default_factory=dict)
    """Open microbatch to the segments that have not finished it."""
    opened: dict[int, dict[PeerId, m.OpenMicrobatch]] = field(default_factory=dict)
    asked: deque[Generation | Pass] = field(default_factory=deque)
    reading: Generation | Pass | None = None
    """Whom the open microbatch is for; its client may be gone by the time the result is there."""
    evaluation: Evaluation | None = None

    @property
    def network(self) -> Network:
        """With outputs it is the form that has them; losses are computed as in training."""
        return self.owner.served if self.results else self.owner.network


class Serving:
    """All sets of an orchestrator."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._sets: dict[SessionId, ServingSet] = {}
        self._unreadable: set[tuple[SessionId, int]] = set()
        """(session, step) of checkpoints that a host could not read: an older one is served."""

    # --- asking ---------------------------------------------------------------------------------------------

    def generate(self, request: int, wanted: m.Generate, owner: Owner) -> None:
        """Stream tokens from the owner's newest commit."""
        base = self._newest(owner)
        network = owner.served
        problem = _not_generative(network)
        if problem:
            self.desk.respond(request, m.Refusal(kind="UsageError", reason=problem))
            return
        if base.manifest is None:
            self.desk.respond(
                request,
                m.Refusal(
                    kind="Unavailable", reason=f"session {owner.id} has no committed checkpoint that can be read"
                ),
            )
            return
        output = network.results[0]
        vocabulary = network.vnodes[output.node_id].outputs[output.slot_id].shape[-1]
        if not wanted.prompt or any(not 0 <= t < vocabulary for t in wanted.prompt):
            self.desk.respond(
                request,
                m.Refusal(kind="UsageError", reason=f"the prompt needs at least one token, each below {vocabulary}"),
            )
            return
        first = m.Generated(token=-1, session=owner.id, step=base.step, dataset=owner.record.dataset)
        self.desk.respond(request, first, last=wanted.max_tokens < 1)
        if wanted.max_tokens < 1:
            return
        generation = Generation(request=request, wanted=wanted, tokens=list(wanted.prompt))
        result = m.OutputRef(vnode=output.node_id, slot=output.slot_id, last_position=True)
        self._ask(generation, owner, base, (result,), rows=1)

    def forward(self, request: int, wanted: m.Forward, owner: Owner) -> None:
        """One batch through the checkpoint that ``wanted`` names, else the newest, else the initial weights."""
        base = self._base(owner, wanted.step)
        if base is None:
            what = "no committed checkpoint that can be read" if wanted.step < 0 else f"no step {wanted.step} any more"
            self.desk.respond(request, m.Refusal(kind="Unavailable", reason=f"session {owner.id} has {what}"))
            return
        problem = _unfit(owner.served, wanted, self.desk.limits)
        if problem:
            self.desk.respond(request, m.Refusal(kind="InvalidData", reason=problem))
            return
        self.desk.respond(request, m.Forwarded(session=owner.id, step=base.step), last=False)
        results = tuple(m.OutputRef(vnode=o.node_id, slot=o.slot_id) for o in owner.served.results)
        self._ask(Pass(request=request, wanted=wanted), owner, base, results, wanted.rows)

    def _base(self, owner: Owner, step: int) -> Base | None:
        """The base of a forward pass. One that was dropped since its first batch is still served by its set."""
        held = [s.base for s in self._sets.values() if s.owner is owner and s.base.step == step and not s.dead]
        if held:
            return held[0]
        commits = [c for c in owner.fold.commits if (owner.id, c.step) not in self._unreadable]
        if step > 0:
            return next((c for c in commits if c.step == step), None)
        if step < 0 and owner.fold.commits:
            return commits[-1] if commits else None
        return Base()

    def _ask(
        self, asked: Generation | Pass, owner: Owner, base: Base, results: tuple[m.OutputRef, ...], rows: int
    ) -> None:
        """Of a set that is there, else of a new one."""
        for held in self._sets.values():
            same = held.owner is owner and held.base == base and held.results == results
            if same and held.rows >= rows and not held.dead:
                held.asked.append(asked)
                self._go_on(held)
                return
        self._start(owner, base, rows=rows, results=results, asked=deque([asked]))

    def _newest(self, owner: Owner) -> Base:
        """The newest commit that no host has failed to read, or init."""
        readable = [c for c in owner.fold.commits if (owner.id, c.step) not in self._unreadable]
        return readable[-1] if readable else Base()

    def evaluate(self, owner: Owner, base: Base, most_rows: int, then: Callable[[float, int, str], None]) -> None:
        """Loss of a commit over the first held-out rows: ``then(loss, rows, "")``, or ``then(0.0, 0, reason)``."""
        rows, size = min(owner.record.rows_validation, most_rows), owner.recipe.rows
        rows -= rows % size
        if rows == 0:
            reason = f"the dataset holds {owner.record.rows_validation} rows out, fewer than a microbatch of {size}"
            self.desk.emit("evaluation_skipped", owner.id, {"reason": reason})
            then(0.0, 0, reason)
            return
        evaluation = Evaluation(
            batches=tuple(tuple(range(first, first + size)) for first in range(0, rows, size)),
            rows=rows,
            targets=owner.opens.targets.of(owner.network, "validation", range(rows)),
            then=then,
        )
        self._start(owner, base, rows=size, evaluation=evaluation)

    def validate(self, request: int, owner: Owner) -> None:
        """All held-out rows, at the newest commit that can be read."""
        base = self._newest(owner)
        if base.manifest is None:
            reason = f"session {owner.id} has no committed checkpoint that can be read"
            self.desk.respond(request, m.Refusal(kind="Unavailable", reason=reason))
            return

        def evaluated(loss: float, rows: int, reason: str) -> None:
            if rows:
                self.desk.respond(request, m.Validated(session=owner.id, step=base.step, loss=loss, rows=rows))
            else:
                kind = "Unavailable" if owner.record.rows_validation >= owner.recipe.rows else "InvalidData"
                self.desk.respond(request, m.Refusal(kind=kind, reason=reason))

        self.evaluate(owner, base, owner.record.rows_validation, evaluated)

    def gone(self, request: int) -> None:
        """A client went away."""
        for held in self._sets.values():
            for asked in [a for a in held.asked if a.request == request]:
                held.asked.remove(asked)
                if isinstance(asked, Pass):
                    self._release(asked)

    # --- sets -----------------------------------------------------------------------------------------------

    def _start(
        self,
        owner: Owner,
        base: Base,
        *,
        rows: int,
        results: tuple[m.OutputRef, ...] = (),
        asked: deque[Generation | Pass] | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        if evaluation is not None:
            only = frozenset(owner.network.vnodes)
        else:
            only = owner.served.upstream(result.vnode for result in results)
        held = ServingSet(
            id=SessionId(f"serve-{self.desk.nonce()}"),
            owner=owner,
            base=base,
            only=only,
            results=results,
            rows=rows,
            used_at=self.desk.now,
            asked=asked or deque(),
            evaluation=evaluation,
        )
        self._sets[held.id] = held
        spots = owner.fold.placement
        here = owner.running and all(
            v in spots
            and (node := self.desk.node(spots[v].peer)) is not None
            and node.descriptor.incarnation == spots[v].incarnation
            for v in only
        )
        if here:
            self._manifest(held, {v: spots[v].peer for v in held.network.vnodes if v in only})
            return
        problem = replace(owner.problem(), network=held.network, training=False, only=only, rows=rows)

        def planned(answer: Placement | str) -> None:
            if held.dead:
                return
            if isinstance(answer, str):
                self._refuse(held, "NoCapacity", answer)
            else:
                self._manifest(held, dict(answer.spots))

        self.desk.plan(problem, planned)

    def _manifest(self, held: ServingSet, placement: dict[VNodeId, PeerId]) -> None:
        """The checkpoint's manifest, then tickets."""
        owner = held.owner
        sha256 = held.base.manifest
        if sha256 is None and owner.record.init is None:
            self._ticket(held, placement, None)
            return

        if (already := self._known(held)) is not None:
            self._ticket(held, placement, already)
            return

        def loaded() -> None:
            if held.dead:
                return
            if (found := self._known(held)) is None:
                self._lost(held, f"the checkpoint of step {held.base.step} cannot be read")
            else:
                self._ticket(held, placement, found)

        owner.checkpoints.load(loaded)

    @staticmethod
    def _known(held: ServingSet) -> Manifest | None:
        """The manifest of the set's base, if it has been read."""
        checkpoints, sha256 = held.owner.checkpoints, held.base.manifest
        return checkpoints.initial if sha256 is None else checkpoints.manifests.get(sha256)

    def _ticket(self, held: ServingSet, placement: dict[VNodeId, PeerId], manifest: Manifest | None) -> None:
        peers = sorted(set(placement.values()))
        if any(self.desk.node(peer) is None for peer in peers):
            self._lost(held, "a PNode left while its tickets were made")
            return
        held.placement = placement
        held.hosts = {peer: self.desk.nodes[peer].descriptor.incarnation for peer in peers}
        held.segments = len(held.network.segments({v: str(p) for v, p in placement.items()}, held.only))
        held.window = held.segments + 1 if held.evaluation is not None else 1
        held.unticketed = set(peers)
        for peer in peers:
            self.desk.send(peer, self._tickets(held, peer, manifest))

    def _tickets(self, held: ServingSet, peer: PeerId, manifest: Manifest | None) -> m.Tickets:
        owner = held.owner
        token = self.desk.token(f"objects/{owner.id}/read")
        if manifest is None:
            infos = held.network.vnodes.values()
            initial = [info.node.id for info in infos if info.parameters and held.placement.get(info.node.id) == peer]
            states = tuple(m.StateRef(vnode=v, sha256=Sha256(""), size_bytes=0, token="") for v in initial)
        else:
            states = tuple(
                m.StateRef(vnode=v, sha256=s.sha256, size_bytes=s.size_bytes, token=token)
                for v, s in manifest.states.items()
                if held.placement.get(v) == peer
            )
        return m.Tickets(
            session=held.id,
            epoch=Epoch(0),
            owner=self.desk.author.peer,
            instance=Instance(0),
            network=owner.network.id,
            definition=canonical_json(owner.written.definition),
            record=owner.record.to_bytes(),
            placement=tuple(m.Location(vnode=v, peer=p) for v, p in held.placement.items()),
            neighbours=tuple(self.desk.neighbour(p) for p in sorted(held.hosts)),
            window=held.window,
            base_step=held.base.step,
            states=states,
            serving=True,
            trained=owner.id,
            results=held.results,
            rows=held.rows,
            time_to_live_s=self.desk.limits.serving_ttl_s,
        )

    def ticket_answer(self, peer: PeerId, answer: m.TicketAnswer) -> None:
        held = self._sets.get(answer.session)
        if held is None or peer not in held.unticketed:
            return
        if not answer.accepted:
            self._refuse(held, "NoCapacity", f"{peer} cannot host it: {answer.reason}")
            return
        held.unticketed.discard(peer)
        if not held.unticketed:
            held.ready = True
            self._go_on(held)

    def node_lost(self, peer: PeerId) -> None:
        for held in list(self._sets.values()):
            if peer in held.hosts and not held.dead:
                self._lost(held, f"PNode {peer} is lost")

    def node_up(self, peer: PeerId) -> None:
        """Say again what an older link may have lost."""
        for held in list(self._sets.values()):
            if peer not in held.hosts:
                continue
            if self.desk.nodes[peer].descriptor.incarnation != held.hosts[peer]:
                self._lost(held, f"PNode {peer} has started anew")
                continue
            manifest = self._known(held)
            anew = held.base.manifest is None and held.owner.record.init is None
            if peer in held.unticketed and (manifest is not None or anew):
                self.desk.send(peer, self._tickets(held, peer, manifest))
            for messages in held.opened.values():
                if peer in messages:
                    self.desk.send(peer, messages[peer])

    def _lost(self, held: ServingSet, reason: str) -> None:
        """Ask again of a new set; what was generated so far is the new prefix.

        A checkpoint that was dropped meanwhile, or cannot be read, is replaced by the newest that can.
        """
        self._close(held)
        again: deque[Generation | Pass] = deque()
        for asked in held.asked:
            asked.attempts += 1
            asked.busy = False
            if isinstance(asked, Pass):
                self._release(asked)
            if asked.attempts < ATTEMPTS:
                again.append(asked)
            else:
                self.desk.respond(asked.request, m.Refusal(kind="Unavailable", reason=reason))
        base = self._newest(held.owner)
        there = held.base.manifest is None or held.base in held.owner.fold.commits
        if there and (held.owner.id, held.base.step) not in self._unreadable:
            base = held.base
        elif base.manifest is None or any(isinstance(asked, Pass) for asked in again):
            # A client that was told one step must not get outputs of another.
            for asked in again:
                self.desk.respond(asked.request, m.Refusal(kind="CorruptObject", reason=reason))
            again.clear()
        if again:
            self._start(held.owner, base, rows=held.rows, results=held.results, asked=again)
        if held.evaluation is not None:
            self._skipped(held.owner, held.base, held.evaluation, reason)

    def _refuse(self, held: ServingSet, kind: str, reason: str) -> None:
        self._close(held)
        for asked in held.asked:
            self.desk.respond(asked.request, m.Refusal(kind=kind, reason=reason))
        if held.evaluation is not None:
            self._skipped(held.owner, held.base, held.evaluation, reason)

    def _skipped(self, owner: Owner, base: Base, evaluation: Evaluation, reason: str) -> None:
        self.desk.emit("evaluation_skipped", owner.id, {"step": base.step, "reason": reason})
        evaluation.then(0.0, 0, reason)

    def _close(self, held: ServingSet) -> None:
        held.dead = True
        self._sets.pop(held.id, None)
        for peer in sorted(held.hosts):
            if self.desk.node(peer) is not None:
                self.desk.send(peer, m.Withdraw(session=held.id, epoch=Epoch(0), before=Instance(1)))

    def expire(self) -> None:
        """Withdraw sets that nobody has used for half their time to live: hosts drop theirs at the whole."""
        for held in list(self._sets.values()):
            idle = not held.asked and held.evaluation is None
            if idle and self.desk.now - held.used_at > self.desk.limits.serving_ttl_s / 2:
                self._close(held)

    # --- running --------------------------------------------------------------------------------------------

    def _go_on(self, held: ServingSet) -> None:
        held.used_at = self.desk.now
        if not held.ready or held.dead:
            return
        evaluation = held.evaluation
        # Counted from the oldest that is open: hosts forget what is further behind the newest than the window.
        while (
            evaluation is not None
            and evaluation.sent < len(evaluation.batches)
            and held.step - held.closed < held.window
        ):
            rows = evaluation.batches[evaluation.sent]
            evaluation.sent += 1
            self._open(held, rows=rows, targets=evaluation.targets)
        if held.asked and not held.waiting and not held.asked[0].busy:
            held.reading = held.asked[0]
            self._open(held, tensors=self._tensors(held, held.reading))

    @staticmethod
    def _tensors(held: ServingSet, asked: Generation | Pass) -> tuple[m.InlineTensor, ...]:
        """What the network takes, by the names of its inputs."""
        if isinstance(asked, Pass):
            return asked.wanted.inputs
        tail = asked.tokens[-held.owner.record.context :]
        data = b"".join(t.to_bytes(8, "little") for t in tail)
        (entry,) = held.network.definition.inputs
        return (m.InlineTensor(column=entry.name, shape=(1, len(tail)), dtype="int64", data=data),)

    def _open(
        self,
        held: ServingSet,
        *,
        rows: tuple[int, ...] = (),
        targets: tuple[m.CostTargets, ...] = (),
        tensors: tuple[m.InlineTensor, ...] = (),
    ) -> None:
        """Rows of the dataset, or (``tensors``) explicit ones."""
        owner = held.owner
        definition = held.network.definition
        held.step += 1
        columns: dict[PeerId, dict[str, None]] = {}
        for entry in definition.inputs:
            if entry.node_id in held.placement:
                name = entry.name if tensors else entry.column
                columns.setdefault(held.placement[entry.node_id], {})[name] = None
        for cost in definition.costs:
            if cost.node_id in held.placement:
                columns.setdefault(held.placement[cost.node_id], {})[cost.target] = None
        messages: dict[PeerId, m.OpenMicrobatch] = {}
        for peer, names in columns.items():
            inline: tuple[m.InlineTensor, ...] = ()
            refs: tuple[m.RowsRef, ...] = ()
            if tensors:
                inline = tuple(tensor for tensor in tensors if tensor.column in names)
            else:
                refs = (
                    m.RowsRef(
                        dataset=owner.record.dataset,
                        split="validation",
                        context=owner.record.context,
                        rows=rows,
                        columns=tuple(names),
                        token=self.desk.token(f"rows/{owner.record.dataset}"),
                    ),
                )
            messages[peer] = m.OpenMicrobatch(
                session=held.id,
                epoch=Epoch(0),
                instance=Instance(0),
                step=held.step,
                microbatch=0,
                rows=refs,
                valid_targets=targets,
                inline=inline,
                done_step=held.closed,
            )
        results = {RESULT - position for position in range(len(held.results))}
        held.waiting[held.step] = set(range(held.segments)) | results
        held.opened[held.step] = messages
        for peer, message in messages.items():
            self.desk.send(peer, message)

    def report(self, peer: PeerId, message: m.Message) -> None:
        """What hosts of a set say of its microbatches. What nobody asked them for is ignored."""
        held = self._sets.get(SessionId(getattr(message, "session", "")))
        if held is None or peer not in held.hosts:
            return
        match message:
            case m.Done(step=step, segment=segment) if segment >= 0:
                self._done(held, step, segment)
            case m.Loss(step=step, vnode=vnode, loss=loss):
                costs = [c.node_id for c in held.network.definition.costs]
                if held.evaluation is not None and step in held.waiting and vnode in costs:
                    held.evaluation.losses[(step, costs.index(vnode))] = loss
            case m.TaskFailed(cause=cause, reason=reason):
                if cause == "state":
                    self._unreadable.add((held.owner.id, held.base.step))
                    data = {"step": held.base.step, "peer": peer, "reason": reason}
                    self.desk.emit("checkpoint_unreadable", held.owner.id, data)
                if cause == "compute" and isinstance(held.reading, Pass) and held.reading in held.asked:
                    # The same tensors would fail anywhere; whoever else waits asks a new set.
                    held.asked.remove(held.reading)
                    self._release(held.reading)
                    self.desk.respond(held.reading.request, m.Refusal(kind="ComputeError", reason=reason))
                self._lost(held, reason)
            case m.TaskAnswer(accepted=False, reason=reason):
                # It had a ticket before anything was opened, so it has dropped it.
                self._lost(held, f"{peer}: {reason}")
            case _:
                pass

    def _done(self, held: ServingSet, step: int, what: int) -> None:
        """A segment of a microbatch, or its result, is done with."""
        waiting = held.waiting.get(step)
        if waiting is None or what not in waiting:
            return
        waiting.discard(what)
        if not waiting:
            self._finish(held, step)

    def _finish(self, held: ServingSet, step: int) -> None:
        del held.waiting[step]
        del held.opened[step]
        while held.closed < held.step and held.closed + 1 not in held.waiting:
            held.closed += 1
        evaluation = held.evaluation
        if evaluation is not None:
            evaluation.done += 1
            if evaluation.done == len(evaluation.batches):
                costs = held.network.definition.costs
                total = sum(
                    cost.weight * sum(evaluation.losses.get((s, i), 0.0) for s in range(1, held.step + 1))
                    for i, cost in enumerate(costs)
                )
                held.evaluation = None
                self._close(held)
                if math.isfinite(total):
                    evaluation.then(total, evaluation.rows, "")
                else:
                    self._skipped(held.owner, held.base, evaluation, f"the loss is {total}, which is not finite")
                return
        reading = held.reading
        if isinstance(reading, Pass):
            if reading in held.asked and not reading.busy:
                held.asked.remove(reading)
                self._deliver(held, reading)
            if reading.wanted.last and not held.asked:
                self._close(held)
                return
        self._go_on(held)

    # --- results ---------------------------------------------------------------------------------------------

    def check_frame(self, frame: m.TensorFrame) -> str | None:
        """A reason not to keep a result's bytes."""
        held = self._sets.get(frame.session)
        if held is None or not 0 <= RESULT - frame.edge < len(held.results):
            return "nobody waits for this result"
        output = held.results[RESULT - frame.edge]
        spec = held.network.vnodes[output.vnode].outputs[output.slot]
        wanted = (1, 1, *spec.shape[1:]) if output.last_position else (held.rows, *spec.shape)
        shape = frame.tensor.shape
        # Fewer rows, and shorter sequences, are legal.
        fits = len(shape) == len(wanted) and all(0 < size <= most for size, most in zip(shape, wanted, strict=True))
        if not fits or frame.tensor.dtype != spec.dtype:
            return f"found {frame.tensor.dtype} {list(frame.tensor.shape)}, expected {spec.dtype} {list(wanted)}"
        return None

    def frame(self, peer: PeerId, frame: m.TensorFrame) -> None:
        """A result: an output of a forward pass, or the logits of the newest position."""
        held = self._sets.get(frame.session)
        kept = frame.tensor.handle != 0
        status = FrameStatus.STALE
        reading = held.reading if held is not None else None
        if kept and held is not None and reading is not None and self.check_frame(frame) is None:
            if frame.edge not in held.waiting.get(frame.step, ()):
                status = FrameStatus.DUPLICATE
            elif reading in held.asked:
                status = FrameStatus.ACCEPTED
            else:
                # Its client went away; the microbatch is over all the same.
                self._done(held, frame.step, frame.edge)
        self.desk.send(
            peer,
            m.FrameAck(
                session=frame.session,
                edge=frame.edge,
                direction=frame.direction,
                step=frame.step,
                microbatch=frame.microbatch,
                source_instance=frame.source_instance,
                target_instance=frame.target_instance,
                status=status,
            ),
        )
        if status is not FrameStatus.ACCEPTED or held is None or reading is None:
            if kept:
                self.desk.out.append(Release(handles=(frame.tensor.handle,)))
        elif isinstance(reading, Pass):
            reading.results[RESULT - frame.edge] = frame.tensor
            self._done(held, frame.step, frame.edge)
        else:
            reading.busy = True
            self._done(held, frame.step, frame.edge)
            self._sample(held, reading, frame.tensor)

    def _sample(self, held: ServingSet, generation: Generation, logits: TensorRef) -> None:
        """Draw the next token."""
        wanted = generation.wanted
        task = Sample(
            logits=logits,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            position=generation.made,
        )

        def sampled(event: Computed | ComputeFailed) -> None:
            self.desk.out.append(Release(handles=(logits.handle,)))
            if held.dead:
                return
            if generation not in held.asked:
                pass  # Its client went away; the others still wait.
            elif isinstance(event, ComputeFailed):
                held.asked.remove(generation)
                self.desk.respond(generation.request, m.Refusal(kind="ComputeError", reason=event.reason))
            else:
                self._token(held, generation, int(event.result))
            self._go_on(held)

        self.desk.ask(lambda id: Compute(task=id, worker=0, what=task), sampled)

    def _token(self, held: ServingSet, generation: Generation, token: int) -> None:
        generation.busy = False
        generation.tokens.append(token)
        generation.made += 1
        last = generation.made >= generation.wanted.max_tokens
        owner = held.owner
        self.desk.respond(
            generation.request,
            m.Generated(token=token, session=owner.id, step=held.base.step, dataset=owner.record.dataset),
            last=last,
        )
        if last:
            held.asked.remove(generation)

    def _deliver(self, held: ServingSet, done: Pass) -> None:
        """Send a batch's outputs piece by piece; the set is free for others meanwhile."""
        outputs = held.network.results
        pieces = [
            (position, first)
            for position in range(len(outputs))
            for first in range(0, _bytes(done.results[position]), self.desk.limits.chunk_bytes)
        ]

        def read(number: int) -> None:
            position, first = pieces[number]
            tensor = done.results[position]
            task = Read(tensor=tensor, first=first, count=self.desk.limits.chunk_bytes)

            def sent(event: Computed | ComputeFailed) -> None:
                assert isinstance(event, Computed), "a view of bytes cannot fail"
                last = number + 1 == len(pieces)
                piece = m.Forwarded(
                    session=held.owner.id,
                    step=held.base.step,
                    output=outputs[position].name,
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    data=event.result,
                )
                self.desk.respond(done.request, piece, last=last)
                if last:
                    self._release(done)
                else:
                    read(number + 1)

            self.desk.ask(lambda id: Compute(task=id, worker=0, what=task), sent)

        read(0)

    def _release(self, done: Pass) -> None:
        self.desk.out.append(Release(handles=tuple(tensor.handle for tensor in done.results.values())))
        done.results = {}


def _bytes(tensor: TensorRef) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _unfit(network: Network, wanted: m.Forward, limits: Limits) -> str:
    """Why a batch cannot be computed, or ''. Whoever asked has checked this; nobody relies on it."""
    definition = network.definition
    outputs = [network.vnodes[o.node_id].outputs[o.slot_id] for o in network.results]
    if not outputs:
        return f"network {definition.name!r} has neither an output nor a cost"
    if sum(spec.bytes for spec in outputs) > limits.forward_row_bytes:
        return f"the outputs of one row are larger than {limits.forward_row_bytes} bytes"
    given = {tensor.column: tensor for tensor in wanted.inputs}
    if len(given) < len(wanted.inputs):
        return "found an input twice, expected each once"
    needed = network.upstream(o.node_id for o in network.results)
    for entry in definition.inputs:
        if entry.node_id not in needed:
            continue
        tensor = given.get(entry.name)
        if tensor is None:
            return f"input {entry.name!r}: found nothing, expected {entry.dtype}"
        shape, most = tensor.shape, (wanted.rows, *entry.shape)
        fits = len(shape) == len(most) and all(0 < size <= limit for size, limit in zip(shape, most, strict=True))
        size = math.prod(shape) * DTYPE_BYTES[entry.dtype]
        if not fits or tensor.dtype != entry.dtype or len(tensor.data) != size or shape[0] != wanted.inputs[0].shape[0]:
            found = f"{tensor.dtype} {list(shape)} in {len(tensor.data)} bytes"
            return f"input {entry.name!r}: found {found}, expected {entry.dtype} {list(most)} or fewer rows"
    return ""


def _not_generative(network: Network) -> str:
    """Why no text can be generated from a network, or ''."""
    definition = network.definition
    if not network.results:
        return f"network {definition.name!r} has neither an output nor a cost: generation needs logits"
    if len(definition.inputs) != 1 or definition.inputs[0].dtype != "int64" or len(definition.inputs[0].shape) != 1:
        return f"network {definition.name!r} does not take one sequence of tokens"
    output = network.results[0]
    if len(network.vnodes[output.node_id].outputs[output.slot_id].shape) != 2:
        return f"output {output.name!r} of network {definition.name!r} is not [tokens, vocabulary]"
    return ""
