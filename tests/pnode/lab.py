"""One PNode's machine on a bench: events in, effects out, its worker and home played by hand."""

from __future__ import annotations

from typing import Any, TypeVar

from dcnr.config import Limits
from dcnr.ids import DatasetId, Epoch, Incarnation, Instance, PeerId, SessionId, Sha256
from dcnr.machine import (
    Compute,
    Computed,
    Effect,
    Event,
    Fetch,
    Fetched,
    Handle,
    Instant,
    LinkUp,
    Persist,
    Persisted,
    Received,
    Send,
    TensorRef,
    Tick,
)
from dcnr.network.analysis import analyse
from dcnr.network.graph import canonical_json
from dcnr.network.templates import mlp
from dcnr.pnode import tasks
from dcnr.pnode.pnode import PNodeMachine
from dcnr.protocol import messages as m
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record

NETWORK = analyse(mlp(4, [4], 4).definition())
RECIPE = Recipe(steps=3, batch_size=2, microbatches=1, checkpoint_every=1)
SESSION = SessionId("s" * 32)
ORCHESTRATOR, ME, OTHER = PeerId("o" * 32), PeerId("b" * 32), PeerId("a" * 32)
BOOT = {peer: Incarnation(boot=1, nonce=peer[:1]) for peer in (ORCHESTRATOR, ME, OTHER)}
ADDRESS = "orchestrator:1"
EDGE = 1
"""From ``relu_0``, which the other PNode hosts, to ``output`` here."""

M = TypeVar("M")


def tickets(
    *,
    epoch: int = 1,
    instance: int = 2,
    base_step: int = 0,
    window: int = 2,
    steps: int = 3,
    clip_scope: str = "network",
) -> m.Tickets:
    """Inputs on the other PNode, ``output`` and ``loss`` here."""
    recipe = Recipe(steps=steps, batch_size=2, microbatches=1, checkpoint_every=1, clip_scope=clip_scope)
    record = Record(
        network=NETWORK.id,
        network_name="mlp",
        dataset=DatasetId("d"),
        tokenizer="",
        context=0,
        rows_train=10,
        rows_validation=0,
        valid_targets_per_row=0,
        recipe=recipe,
        groups=(),
        catalogue="",
        created_unix_s=0.0,
        nonce="n",
    )
    hosts = {v: OTHER if v in ("linear_0", "relu_0") else ME for v in NETWORK.vnodes}
    return m.Tickets(
        session=SESSION,
        epoch=Epoch(epoch),
        owner=ORCHESTRATOR,
        instance=Instance(instance),
        network=NETWORK.id,
        definition=canonical_json(NETWORK.definition),
        record=record.to_bytes(),
        placement=tuple(m.Location(vnode=v, peer=p) for v, p in hosts.items()),
        neighbours=tuple(m.Neighbour(peer=p, incarnation=BOOT[p], addresses=(p,)) for p in (OTHER, ME)),
        window=window,
        base_step=base_step,
        states=(m.StateRef(vnode=NETWORK.order[2], sha256=Sha256(""), size_bytes=0, token=""),),
        rows=2,
    )


class Lab:
    def __init__(
        self, *, memory_bytes: int = 1 << 30, fence: bytes | None = None, limits: Limits | None = None
    ) -> None:
        self.now = 0.0
        self.out: list[Effect] = []
        """Effects that nothing here has answered."""
        self._handles = 1000
        self.machine = PNodeMachine(
            peer=ME,
            incarnation=BOOT[ME],
            addresses=("me:1",),
            capabilities=m.Capabilities(
                cores=1, memory_bytes=memory_bytes, architecture="", numeric_class="", class_facts=(), gflops=1.0, threads=1
            ),
            bootstrap=(ADDRESS,),
            fence=fence,
            limits=limits or Limits(),
            seed=0,
        )  # fmt: skip
        self.do(Tick())

    def do(self, *events: Event) -> None:
        for event in events:
            self.out += self.machine.handle(Instant(self.now), event)

    def wait(self, seconds: float) -> None:
        """Time passes; the machine is woken when it wants to be."""
        end = self.now + seconds
        while (deadline := self.machine.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.do(Tick())
        self.now = end

    def link(self, peer: PeerId = ORCHESTRATOR) -> None:
        role = "orchestrator" if peer == ORCHESTRATOR else "pnode"
        self.do(
            LinkUp(peer=peer, incarnation=BOOT[peer], role=role, address=ADDRESS if role == "orchestrator" else peer)
        )

    def hear(self, message: m.Message, peer: PeerId = ORCHESTRATOR) -> None:
        self.do(Received(peer=peer, incarnation=BOOT[peer], message=message))

    # --- what it wants -------------------------------------------------------------------------------------

    def take(self, kind: type[M]) -> list[M]:
        """Effects of a kind, once."""
        found: list[M] = [effect for effect in self.out if isinstance(effect, kind)]
        self.out = [effect for effect in self.out if not isinstance(effect, kind)]
        return found

    def said(self, kind: type[M], peer: PeerId = ORCHESTRATOR) -> list[M]:
        """Messages of a kind to a peer, once."""
        sends = [e for e in self.out if isinstance(e, Send) and e.peer == peer and isinstance(e.message, kind)]
        self.out = [effect for effect in self.out if effect not in sends]
        found: list[M] = [e.message for e in sends if isinstance(e.message, kind)]
        return found

    # --- playing the world ---------------------------------------------------------------------------------

    def handle(self) -> Handle:
        self._handles += 1
        return Handle(self._handles)

    def tensor(self, rows: int = 2, dtype: str = "float32", digest: str | None = "digest") -> TensorRef:
        return TensorRef(handle=self.handle(), shape=(rows, 4), dtype=dtype, digest=digest)

    def accept(self, message: m.Tickets | None = None) -> None:
        """A ticket, its fence written, its answer heard."""
        self.hear(message or tickets())
        for _ in self.take(Persist):
            self.do(Persisted(key="fence.json"))
        assert [a.accepted for a in self.said(m.TicketAnswer)] == [True]

    def open(self, step: int = 1, epoch: int = 1, instance: int = 2) -> None:
        self.hear(
            m.OpenMicrobatch(
                session=SESSION,
                epoch=Epoch(epoch),
                instance=Instance(instance),
                step=step,
                microbatch=0,
                rows=(
                    m.RowsRef(dataset=DatasetId("d"), split="train", context=0, rows=(0, 1), columns=("y",), token=""),
                ),
                valid_targets=(m.CostTargets(vnode=NETWORK.definition.costs[0].node_id, count=8),),
            )
        )

    def frame(self, step: int = 1, instance: int = 2, **changes: Any) -> m.TensorFrame:
        values: dict[str, Any] = {
            "session": SESSION,
            "edge": EDGE,
            "direction": m.Direction.FORWARD,
            "step": step,
            "microbatch": 0,
            "source_instance": Instance(instance),
            "target_instance": Instance(instance),
            "target_incarnation": BOOT[ME],
            "tensor": self.tensor(),
        }
        return m.TensorFrame(**(values | changes))

    def receive(self, frame: m.TensorFrame) -> m.FrameAck:
        """As the driver does it: what the header refuses comes without its bytes."""
        if self.machine.check_frame(OTHER, frame) is not None:
            header = TensorRef(
                handle=Handle(0), shape=frame.tensor.shape, dtype=frame.tensor.dtype, digest=frame.tensor.digest
            )
            frame = m.TensorFrame(**{name: getattr(frame, name) for name in frame.__slots__} | {"tensor": header})
        self.hear(frame, OTHER)
        (ack,) = self.said(m.FrameAck, OTHER)
        return ack

    def work(self) -> list[tasks.Task]:
        """Do everything that the worker and the data service are asked for, until nothing is left."""
        done: list[tasks.Task] = []
        while True:
            fetches, computes = self.take(Fetch), self.take(Compute)
            if not fetches and not computes:
                return done
            for compute in computes:
                done.append(compute.what)
                self.do(Computed(task=compute.task, result=self._result(compute.what)))
            for fetch in fetches:
                self.do(Fetched(id=fetch.id, tensors=(self.tensor(digest=None),)))

    def _result(self, task: tasks.Task) -> Any:
        match task:
            case tasks.Load():
                return tasks.Loaded(state=self.handle())
            case tasks.Forward(segment=segment):
                outputs = tuple(self.tensor() for _ in segment.out_edges)
                losses = tuple(0.5 for _ in segment.costs)
                return tasks.ForwardDone(outputs=outputs, results=(), saved=self.handle(), losses=losses, seconds=0.0)
            case tasks.Backward(segment=segment):
                return tasks.BackwardDone(grads=tuple(self.tensor() for _ in segment.grads_out), seconds=0.0)
            case tasks.Summarize(states=states):
                return tasks.Summarized(summaries=tuple((v, 1.0, True) for v, _ in states))
            case tasks.Update():
                return tasks.UpdateDone(not_finite=(), seconds=0.0)
            case tasks.Snapshot(states=states):
                return tasks.SnapshotDone(copies=tuple((v, self.handle()) for v, _ in states))

    def train(self, step: int) -> None:
        """One whole step, up to its update."""
        self.open(step)
        assert self.receive(self.frame(step)).status is m.FrameStatus.ACCEPTED
        self.work()
        self.hear(m.StepClose(session=SESSION, epoch=Epoch(1), instance=Instance(2), step=step, grad_scale=1.0))
        self.work()
        assert [u.step for u in self.said(m.Updated)] == [step]
