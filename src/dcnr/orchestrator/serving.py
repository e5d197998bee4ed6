"""Reading a committed checkpoint: generation and evaluation on read-only instances, never on weights in training.

A *set* is a placement of the VNodes that are needed, under serving tickets named by a nonce. It is in no log: losing
it loses nothing, for what was asked is simply asked again of a new set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dcnr.ids import Epoch, Incarnation, Instance, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Compute, Computed, ComputeFailed, Instant, Release, TensorRef
from dcnr.network.analysis import Network
from dcnr.network.graph import canonical_json
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


@dataclass(slots=True, kw_only=True)
class Generation:
    """A client's request under way."""

    request: int
    wanted: m.Generate
    tokens: list[int]
    made: int = 0
    attempts: int = 0
    sampling: bool = False


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Validation rows of a commit, in microbatches."""

    batches: tuple[tuple[int, ...], ...]
    rows: int
    then: Callable[[float, int], None]
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
    generations: deque[Generation] = field(default_factory=deque)
    reading: Generation | None = None
    """Whose next token the open microbatch is for; its client may be gone by the time the result is there."""
    evaluation: Evaluation | None = None


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
        network = owner.network
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
        output = network.definition.outputs[0]
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
        for held in self._sets.values():
            if held.owner is owner and held.base == base and held.results and not held.dead:
                held.generations.append(generation)
                self._go_on(held)
                return
        self._start(owner, base, generations=deque([generation]))

    def _newest(self, owner: Owner) -> Base:
        """The newest commit that no host has failed to read, or init."""
        readable = [c for c in owner.fold.commits if (owner.id, c.step) not in self._unreadable]
        return readable[-1] if readable else Base()

    def evaluate(self, owner: Owner, base: Base, then: Callable[[float, int], None]) -> None:
        """Validation loss of a commit: ``then(loss, rows)``, rows 0 where it could not be had."""
        rows = min(owner.record.rows_validation, owner.recipe.eval_batches * owner.recipe.batch_size)
        size = owner.recipe.rows
        rows -= rows % size
        if rows == 0:
            self.desk.emit("evaluation_skipped", owner.id, {"reason": "the dataset has too few validation rows"})
            then(0.0, 0)
            return
        batches = tuple(tuple(range(first, first + size)) for first in range(0, rows, size))
        self._start(owner, base, evaluation=Evaluation(batches=batches, rows=rows, then=then))

    def gone(self, request: int) -> None:
        """A client went away."""
        for held in self._sets.values():
            held.generations = deque(g for g in held.generations if g.request != request)

    # --- sets -----------------------------------------------------------------------------------------------

    def _start(
        self,
        owner: Owner,
        base: Base,
        *,
        generations: deque[Generation] | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        definition = owner.network.definition
        if evaluation is not None:
            only = frozenset(owner.network.vnodes)
            results: tuple[m.OutputRef, ...] = ()
        else:
            output = definition.outputs[0]
            only = ancestors(owner.network, output.node_id)
            results = (m.OutputRef(vnode=output.node_id, slot=output.slot_id, last_position=True),)
        held = ServingSet(
            id=SessionId(f"serve-{self.desk.nonce()}"),
            owner=owner,
            base=base,
            only=only,
            results=results,
            used_at=self.desk.now,
            generations=generations or deque(),
            evaluation=evaluation,
        )
        self._sets[held.id] = held
        spots = owner.fold.placement
        here = owner.running and all(
            (node := self.desk.node(spots[v].peer)) is not None and node.descriptor.incarnation == spots[v].incarnation
            for v in only
        )
        if here:
            self._manifest(held, {v: spots[v].peer for v in owner.network.vnodes if v in only})
            return
        problem = replace(owner.problem(), training=False, only=only)

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
        assert sha256 is not None
        known = owner.checkpoints.manifests.get(sha256)
        if known is not None:
            self._ticket(held, placement, known)
            return

        def loaded() -> None:
            found = owner.checkpoints.manifests.get(sha256)
            if held.dead:
                return
            if found is None:
                self._lost(held, f"the checkpoint of step {held.base.step} cannot be read")
            else:
                self._ticket(held, placement, found)

        owner.checkpoints.load(loaded)

    def _ticket(self, held: ServingSet, placement: dict[VNodeId, PeerId], manifest: Manifest) -> None:
        peers = sorted(set(placement.values()))
        if any(self.desk.node(peer) is None for peer in peers):
            self._lost(held, "a PNode left while its tickets were made")
            return
        held.placement = placement
        held.hosts = {peer: self.desk.nodes[peer].descriptor.incarnation for peer in peers}
        held.segments = len(held.owner.network.segments({v: str(p) for v, p in placement.items()}, held.only))
        held.window = held.segments + 1 if held.evaluation is not None else 1
        held.unticketed = set(peers)
        for peer in peers:
            self.desk.send(peer, self._tickets(held, peer, manifest))

    def _tickets(self, held: ServingSet, peer: PeerId, manifest: Manifest) -> m.Tickets:
        owner = held.owner
        token = self.desk.token(f"objects/{owner.id}/read")
        return m.Tickets(
            session=held.id,
            epoch=Epoch(0),
            owner=self.desk.author.peer,
            instance=Instance(0),
            network=owner.network.id,
            definition=canonical_json(owner.network.definition),
            record=owner.record.to_bytes(),
            placement=tuple(m.Location(vnode=v, peer=p) for v, p in held.placement.items()),
            neighbours=tuple(self.desk.neighbour(p) for p in sorted(held.hosts)),
            window=held.window,
            base_step=held.base.step,
            states=tuple(
                m.StateRef(vnode=v, sha256=s.sha256, size_bytes=s.size_bytes, token=token)
                for v, s in manifest.states.items()
                if held.placement.get(v) == peer
            ),
            serving=True,
            trained=owner.id,
            results=held.results,
            rows=owner.recipe.rows if held.evaluation is not None else 1,
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
            manifest = held.owner.checkpoints.manifests.get(held.base.manifest or Sha256(""))
            if peer in held.unticketed and manifest is not None:
                self.desk.send(peer, self._tickets(held, peer, manifest))
            for messages in held.opened.values():
                if peer in messages:
                    self.desk.send(peer, messages[peer])

    def _lost(self, held: ServingSet, reason: str) -> None:
        """Ask again of a new set; what was generated so far is the new prefix.

        A checkpoint that was dropped meanwhile, or cannot be read, is replaced by the newest that can.
        """
        self._close(held)
        again: deque[Generation] = deque()
        for generation in held.generations:
            generation.attempts += 1
            generation.sampling = False
            if generation.attempts < ATTEMPTS:
                again.append(generation)
            else:
                self.desk.respond(generation.request, m.Refusal(kind="Unavailable", reason=reason))
        base = self._newest(held.owner)
        if base.manifest is None:
            for generation in again:
                self.desk.respond(generation.request, m.Refusal(kind="CorruptObject", reason=reason))
        elif again:
            same = held.base in held.owner.fold.commits and (held.owner.id, held.base.step) not in self._unreadable
            self._start(held.owner, held.base if same else base, generations=again)
        if held.evaluation is not None:
            self.desk.emit("evaluation_skipped", held.owner.id, {"step": held.base.step, "reason": reason})
            held.evaluation.then(0.0, 0)

    def _refuse(self, held: ServingSet, kind: str, reason: str) -> None:
        self._close(held)
        for generation in held.generations:
            self.desk.respond(generation.request, m.Refusal(kind=kind, reason=reason))
        if held.evaluation is not None:
            self.desk.emit("evaluation_skipped", held.owner.id, {"step": held.base.step, "reason": reason})
            held.evaluation.then(0.0, 0)

    def _close(self, held: ServingSet) -> None:
        held.dead = True
        self._sets.pop(held.id, None)
        for peer in sorted(held.hosts):
            if self.desk.node(peer) is not None:
                self.desk.send(peer, m.Withdraw(session=held.id, epoch=Epoch(0), before=Instance(1)))

    def expire(self) -> None:
        """Withdraw sets that nobody has used for half their time to live: hosts drop theirs at the whole."""
        for held in list(self._sets.values()):
            idle = not held.generations and held.evaluation is None
            if idle and self.desk.now - held.used_at > self.desk.limits.serving_ttl_s / 2:
                self._close(held)

    # --- running --------------------------------------------------------------------------------------------

    def _go_on(self, held: ServingSet) -> None:
        held.used_at = self.desk.now
        if not held.ready or held.dead:
            return
        evaluation = held.evaluation
        while evaluation is not None and evaluation.sent < len(evaluation.batches) and len(held.waiting) < held.window:
            rows = evaluation.batches[evaluation.sent]
            evaluation.sent += 1
            self._open(held, rows=rows, count=evaluation.rows)
        if held.generations and not held.waiting and not held.generations[0].sampling:
            held.reading = held.generations[0]
            self._open(held, prefix=held.reading.tokens)

    def _open(
        self, held: ServingSet, *, rows: tuple[int, ...] = (), count: int = 0, prefix: list[int] | None = None
    ) -> None:
        owner = held.owner
        definition = owner.network.definition
        held.step += 1
        columns: dict[PeerId, dict[str, None]] = {}
        for entry in definition.inputs:
            if entry.node_id in held.placement:
                columns.setdefault(held.placement[entry.node_id], {})[entry.column] = None
        for cost in definition.costs:
            if cost.node_id in held.placement:
                columns.setdefault(held.placement[cost.node_id], {})[cost.target] = None
        targets = tuple(
            m.CostTargets(vnode=cost.node_id, count=count * (owner.record.valid_targets_per_row or target.elements))
            for cost, target in zip(definition.costs, owner.network.cost_targets(), strict=True)
        )
        messages: dict[PeerId, m.OpenMicrobatch] = {}
        for peer, names in columns.items():
            inline: tuple[m.InlineTensor, ...] = ()
            refs: tuple[m.RowsRef, ...] = ()
            if prefix is not None:
                tail = prefix[-owner.record.context :]
                data = b"".join(t.to_bytes(8, "little") for t in tail)
                inline = tuple(
                    m.InlineTensor(column=name, shape=(1, len(tail)), dtype="int64", data=data) for name in names
                )
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
        held.waiting[held.step] = set(range(held.segments)) | ({RESULT} if prefix is not None else set())
        held.opened[held.step] = messages
        for peer, message in messages.items():
            self.desk.send(peer, message)

    def report(self, peer: PeerId, message: m.Message) -> None:
        match message:
            case m.Done(session=session, step=step, segment=segment):
                held = self._sets.get(session)
                if held is not None:
                    self._done(held, step, segment)
            case m.Loss(session=session, step=step, vnode=vnode, loss=loss):
                held = self._sets.get(session)
                if held is not None and held.evaluation is not None:
                    costs = [c.node_id for c in held.owner.network.definition.costs]
                    held.evaluation.losses[(step, costs.index(vnode))] = loss
            case m.TaskFailed(session=session, cause=cause, reason=reason):
                held = self._sets.get(session)
                if held is None:
                    return
                if cause == "state":
                    self._unreadable.add((held.owner.id, held.base.step))
                    data = {"step": held.base.step, "peer": peer, "reason": reason}
                    self.desk.emit("checkpoint_unreadable", held.owner.id, data)
                self._lost(held, reason)
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
                costs = held.owner.network.definition.costs
                total = sum(
                    cost.weight * sum(evaluation.losses.get((s, i), 0.0) for s in range(1, held.step + 1))
                    for i, cost in enumerate(costs)
                )
                held.evaluation = None
                self._close(held)
                evaluation.then(total, evaluation.rows)
                return
        self._go_on(held)

    # --- tokens ---------------------------------------------------------------------------------------------

    def check_frame(self, frame: m.TensorFrame) -> str | None:
        """A reason not to keep a result's bytes."""
        held = self._sets.get(frame.session)
        if held is None or not held.results or frame.edge != -1:
            return "nobody waits for this result"
        output = held.results[0]
        spec = held.owner.network.vnodes[output.vnode].outputs[output.slot]
        wanted = (1, 1, *spec.shape[1:])
        if frame.tensor.shape != wanted or frame.tensor.dtype != spec.dtype:
            return f"found {frame.tensor.dtype} {list(frame.tensor.shape)}, expected {spec.dtype} {list(wanted)}"
        return None

    def frame(self, peer: PeerId, frame: m.TensorFrame) -> None:
        """The logits of the newest position: draw the next token."""
        held = self._sets.get(frame.session)
        kept = frame.tensor.handle != 0
        status = FrameStatus.STALE
        generation = held.reading if held is not None else None
        if kept and held is not None and generation is not None and self.check_frame(frame) is None:
            if RESULT not in held.waiting.get(frame.step, ()):
                status = FrameStatus.DUPLICATE
            elif generation in held.generations:
                status = FrameStatus.ACCEPTED
            else:
                # Its client went away; the microbatch is over all the same.
                self._done(held, frame.step, RESULT)
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
        if status is not FrameStatus.ACCEPTED or held is None or generation is None:
            if kept:
                self.desk.out.append(Release(handles=(frame.tensor.handle,)))
            return
        generation.sampling = True
        self._done(held, frame.step, RESULT)
        wanted = generation.wanted
        task = Sample(
            logits=frame.tensor,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            position=generation.made,
        )

        def sampled(event: Computed | ComputeFailed) -> None:
            self.desk.out.append(Release(handles=(frame.tensor.handle,)))
            if held.dead or generation not in held.generations:
                return
            if isinstance(event, ComputeFailed):
                held.generations.remove(generation)
                self.desk.respond(generation.request, m.Refusal(kind="ComputeError", reason=event.reason))
            else:
                self._token(held, generation, int(event.result))
            self._go_on(held)

        self.desk.ask(lambda id: Compute(task=id, worker=0, what=task), sampled)

    def _token(self, held: ServingSet, generation: Generation, token: int) -> None:
        generation.sampling = False
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
            held.generations.remove(generation)


def ancestors(network: Network, vnode: VNodeId) -> frozenset[VNodeId]:
    """A VNode and everything upstream of it, owners of tied weights included."""
    edges = network.definition.edges
    found: set[VNodeId] = set()
    stack = [vnode]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found.add(current)
        info = network.vnodes[current]
        if info.tied_to is not None:
            stack.append(info.tied_to)
        stack += [edges[e].source for e in info.in_edges if e is not None]
    return frozenset(found)


def _not_generative(network: Network) -> str:
    """Why no text can be generated from a network, or ''."""
    definition = network.definition
    if not definition.outputs:
        return f"network {definition.name!r} declares no output: generation needs logits"
    if len(definition.inputs) != 1 or definition.inputs[0].dtype != "int64" or len(definition.inputs[0].shape) != 1:
        return f"network {definition.name!r} does not take one sequence of tokens"
    output = definition.outputs[0]
    if len(network.vnodes[output.node_id].outputs[output.slot_id].shape) != 2:
        return f"output {output.name!r} of network {definition.name!r} is not [tokens, vocabulary]"
    return ""
