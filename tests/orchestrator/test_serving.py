"""Forward passes at the orchestrator: what is refused, and what is released whatever goes away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import dcnr
from dcnr.config import Limits
from dcnr.ids import Epoch, Incarnation, Instance, PeerId, SessionId, Sha256, VNodeId
from dcnr.machine import Compute, Computed, Handle, Instant, Plan, Planned, Release, Respond, Send, TensorRef
from dcnr.membership.liveness import Pulse
from dcnr.network.analysis import Network, analyse
from dcnr.orchestrator.desk import Desk, Node
from dcnr.orchestrator.owner import Owner
from dcnr.orchestrator.placement import solve
from dcnr.orchestrator.serving import ATTEMPTS, Read, Serving
from dcnr.orchestrator.targets import Targets
from dcnr.protocol import messages as m
from dcnr.session.checkpoint import Manifest, StoredState
from dcnr.session.log import Author, Base, Fold
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record
from tests.orchestrator.test_session_log import ME

PEERS = (PeerId("p1"), PeerId("p2"))


def network() -> Network:
    g = dcnr.Graph("double")
    x = g.input("x", [2], "float32")
    g.output("y", g.relu(x + x))
    g.output("z", g.linear(x, out_dim=3))
    return analyse(g.definition())


def with_a_cost() -> Network:
    g = dcnr.Graph("fitted")
    g.cost("mse", g.linear(g.input("x", [2], "float32"), out_dim=2), target="y", id="loss")
    return analyse(g.definition())


def a_generator() -> Network:
    g = dcnr.Graph("words")
    g.output("logits", g.linear(g.embedder(g.input("tokens", [4], "int64"), vocab_size=8, dim=2), out_dim=8))
    return analyse(g.definition())


def tensor(rows: int = 2, name: str = "x", width: int = 2) -> m.InlineTensor:
    return m.InlineTensor(column=name, shape=(rows, width), dtype="float32", data=bytes(4 * rows * width))


@dataclass
class Bench:
    """An orchestrator's serving, two PNodes played by the test, handles counted."""

    network: Network = field(default_factory=network)
    desk: Desk = field(init=False)
    handles: set[int] = field(default_factory=set)
    responses: list[m.Message] = field(default_factory=list)
    tickets: list[m.Tickets] = field(default_factory=list)
    opened: list[tuple[PeerId, m.OpenMicrobatch]] = field(default_factory=list)
    withdrawn: list[SessionId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.desk = Desk(
            author=Author(peer=ME.peer, incarnation=ME.incarnation),
            secret=b"0" * 32,
            limits=Limits(chunk_bytes=8),
            unix_s_at_zero=0.0,
        )
        for peer in PEERS:
            self.desk.nodes[peer] = Node(
                descriptor=m.Descriptor(
                    peer=peer,
                    incarnation=Incarnation(boot=1, nonce=peer),
                    role="pnode",
                    addresses=("a:1",),
                    version_min=1,
                    version_max=1,
                ),
                capabilities=m.Capabilities(
                    cores=1,
                    memory_bytes=1 << 20,
                    architecture="x",
                    numeric_class="c",
                    class_facts=(),
                    gflops=1.0,
                    threads=1,
                ),
                pulse=Pulse(heard_at=Instant(0.0)),
                linked=True,
            )
        self.serving = Serving(self.desk)
        found = self.network
        record = Record(
            network=found.id, network_name="double", dataset="", tokenizer="", context=0, rows_train=0,  # type: ignore[arg-type]
            rows_validation=8, valid_targets_per_row=0, recipe=Recipe(steps=1), groups=(), catalogue="",
            created_unix_s=0.0, nonce="",
        )  # fmt: skip
        self.owner = Owner(
            desk=self.desk,
            id=record.id,
            record=record,
            network=found,
            state=Fold(),
            targets=Targets({}),
            evaluate=self.serving.evaluate,
            superseded=lambda owner: None,
        )

    def ask(self, request: int = 1, **changed: Any) -> None:
        wanted = m.Forward(target="double", inputs=(tensor(),), rows=2)
        self.serving.forward(request, replace(wanted, **changed), self.owner)
        self.settle()

    def settle(self) -> None:
        """Plan, accept tickets and read bytes at once; keep the rest."""
        while self.desk.out:
            match self.desk.out.pop(0):
                case Plan(id=id, problem=problem):
                    self.desk.answer(id, Planned(id=id, answer=solve(problem)))
                case Compute(task=id, what=Read() as task):
                    self.desk.answer(id, Computed(task=id, result=bytes(min(task.count, 64))))
                case Send(peer=peer, message=m.Tickets() as tickets):
                    self.tickets.append(tickets)
                    answer = m.TicketAnswer(
                        session=tickets.session, epoch=Epoch(0), instance=Instance(0), accepted=True
                    )
                    self.serving.ticket_answer(peer, answer)
                case Send(peer=peer, message=m.OpenMicrobatch() as message):
                    self.opened.append((peer, message))
                case Send(message=m.Withdraw(session=session)):
                    self.withdrawn.append(session)
                case Respond(message=message):
                    self.responses.append(message)
                case Release(handles=handles):
                    self.handles -= set(handles)
                case _:
                    pass

    def evaluate(self, loss: Callable[[int], float]) -> list[tuple[float, int, str]]:
        """Evaluate the initial weights; the hosts report ``loss`` of each microbatch. Returns what comes of it."""
        found: list[tuple[float, int, str]] = []
        self.serving.evaluate(self.owner, Base(), 8, lambda *told: found.append(told))
        self.settle()
        for step in range(1, 5):
            peer, session = next((peer, opened.session) for peer, opened in self.opened if opened.step == step)
            for vnode in ("loss", "stranger"):
                report = m.Loss(
                    session=session, instance=Instance(0), vnode=VNodeId(vnode), step=step, microbatch=0, loss=loss(step)
                )  # fmt: skip
                self.serving.report(peer, report)
            for segment in range(len(PEERS)):
                done = m.Done(session=session, instance=Instance(0), segment=segment, step=step, microbatch=0)
                self.serving.report(peer, done)
            self.settle()
        return found

    def result(self, position: int, rows: int = 2) -> None:
        """A PNode sends an output of the newest microbatch."""
        output = self.owner.network.definition.outputs[position]
        spec = self.owner.network.vnodes[output.node_id].outputs[output.slot_id]
        handle = Handle(100 + len(self.opened) * 10 + position)
        self.handles.add(handle)
        frame = m.TensorFrame(
            session=self.tickets[-1].session, edge=-1 - position, direction=m.Direction.FORWARD,
            step=self.opened[-1][1].step, microbatch=0, source_instance=Instance(0), target_instance=Instance(0),
            target_incarnation=ME.incarnation,
            tensor=TensorRef(handle=handle, shape=(rows, *spec.shape), dtype=spec.dtype),
        )  # fmt: skip
        self.serving.frame(PEERS[0], frame)
        self.settle()

    def logits(self) -> int:
        """A PNode sends the logits of the newest position. Returns the task that draws the token."""
        handle = Handle(99)
        self.handles.add(handle)
        frame = m.TensorFrame(
            session=self.tickets[-1].session, edge=-1, direction=m.Direction.FORWARD, step=self.opened[-1][1].step,
            microbatch=0, source_instance=Instance(0), target_instance=Instance(0), target_incarnation=ME.incarnation,
            tensor=TensorRef(handle=handle, shape=(1, 1, 8), dtype="float32"),
        )  # fmt: skip
        self.serving.frame(PEERS[0], frame)
        (task,) = [effect.task for effect in self.desk.out if isinstance(effect, Compute)]
        self.settle()
        return task

    def done(self) -> None:
        """Every segment of the newest microbatch has finished."""
        session, step = self.tickets[-1].session, self.opened[-1][1].step
        for segment in range(len(PEERS)):
            report = m.Done(session=session, instance=Instance(0), segment=segment, step=step, microbatch=0)
            self.serving.report(PEERS[0], report)
        self.settle()


def test_outputs_come_in_pieces_and_the_last_batch_gives_everything_back() -> None:
    bench = Bench()
    bench.ask()
    assert {state.sha256 for tickets in bench.tickets for state in tickets.states} == {""}, "initial weights"
    assert bench.opened[0][1].inline == (tensor(),)
    bench.done()
    bench.result(1)
    assert len(bench.responses) == 1, "an output is missing"
    bench.result(0)
    first, *pieces = bench.responses
    assert first == m.Forwarded(session=bench.owner.id, step=0)
    assert [p.output for p in pieces if isinstance(p, m.Forwarded)] == ["y", "y", "z", "z", "z"]
    assert not bench.handles
    assert set(bench.withdrawn) == {bench.tickets[-1].session}


def test_what_cannot_be_validated_says_why() -> None:
    bench = Bench()
    bench.serving.validate(1, bench.owner)
    bench.settle()
    (refusal,) = bench.responses
    assert isinstance(refusal, m.Refusal)
    assert (refusal.kind, "no committed checkpoint" in refusal.reason) == ("Unavailable", True)
    told: list[tuple[float, int, str]] = []
    bench.owner.record = replace(bench.owner.record, rows_validation=0)
    bench.serving.evaluate(bench.owner, Base(step=1, manifest=Sha256("0" * 64)), 8, lambda *found: told.append(found))
    assert told == [(0.0, 0, "the dataset holds 0 rows out, fewer than a microbatch of 2")]


def test_batches_of_one_request_share_a_set() -> None:
    bench = Bench()
    bench.ask(last=False)
    bench.done()
    bench.result(0)
    bench.result(1)
    tickets = len(bench.tickets)
    bench.ask(request=2, step=0, inputs=(tensor(1),))
    assert len(bench.tickets) == tickets
    assert not bench.withdrawn
    assert bench.opened[-1][1].step == 2


def test_a_lost_host_costs_an_attempt_and_no_handle() -> None:
    bench = Bench()
    bench.ask()
    for attempt in range(ATTEMPTS):
        assert len({message.session for _, message in bench.opened}) == attempt + 1
        bench.result(0)
        bench.serving.node_lost(PeerId(bench.tickets[-1].placement[0].peer))
        bench.settle()
        assert not bench.handles
    assert isinstance(bench.responses[-1], m.Refusal)
    assert bench.responses[-1].kind == "Unavailable"


@pytest.mark.parametrize("how", ["answer", "report"])
def test_a_host_that_has_dropped_its_ticket_costs_an_attempt_and_blames_nobody(how: str) -> None:
    bench = Bench()
    bench.ask()
    session = bench.tickets[-1].session
    message: m.Message = m.TaskAnswer(
        session=session, instance=Instance(0), step=1, microbatch=0, accepted=False, reason="no ticket"
    )
    if how == "report":
        message = m.TaskFailed(
            session=session, instance=Instance(0), vnode="add", step=1, microbatch=0, cause="ticket", reason="gone",  # type: ignore[arg-type]
        )  # fmt: skip
    bench.serving.report(PEERS[0], message)
    bench.settle()
    assert bench.withdrawn
    assert len({opened.session for _, opened in bench.opened}) == 2, "it is asked again of a new set"
    assert not any(isinstance(response, m.Refusal) for response in bench.responses)


def test_a_client_that_goes_while_its_token_is_drawn_does_not_keep_the_next_one_waiting() -> None:
    bench = Bench(network=a_generator())
    commit = Base(step=1, manifest=Sha256("0" * 64))
    bench.owner.checkpoints.manifests[Sha256("0" * 64)] = Manifest(
        step=1,
        states={
            v: StoredState(sha256=Sha256("1" * 64), size_bytes=1, version=1, instance=Instance(2))
            for v, info in bench.network.vnodes.items()
            if info.parameters
        },
        losses=(),
        previous=None,
    )
    bench.owner._log.fold = replace(bench.owner.fold, commits=(commit,))
    for request in (1, 2):
        wanted = m.Generate(target="words", prompt=(1,), max_tokens=1, temperature=0.0, top_p=1.0, seed=0)
        bench.serving.generate(request, wanted, bench.owner)
        bench.settle()
    bench.done()
    drawn = bench.logits()
    bench.serving.gone(1)
    bench.desk.answer(drawn, Computed(task=drawn, result=3))
    bench.settle()
    assert bench.opened[-1][1].step == 2
    assert not bench.handles


def test_a_client_that_went_away_leaves_no_handle() -> None:
    bench = Bench()
    bench.ask()
    bench.result(0)
    bench.serving.gone(1)
    bench.settle()
    bench.result(1)
    bench.done()
    assert not bench.handles
    assert len(bench.responses) == 1
    assert bench.withdrawn


def test_tensors_that_cannot_be_computed_are_refused_at_once() -> None:
    bench = Bench()
    bench.ask()
    failed = m.TaskFailed(
        session=bench.tickets[-1].session, instance=Instance(0), vnode="add", step=1, microbatch=0,  # type: ignore[arg-type]
        cause="compute", reason="VNode add: index out of range",
    )  # fmt: skip
    bench.serving.report(PEERS[0], failed)
    bench.settle()
    assert bench.responses[-1] == m.Refusal(kind="ComputeError", reason="VNode add: index out of range")
    assert len(bench.tickets) == len(PEERS), "nobody tries again"


def test_a_result_that_never_came_is_not_done_whatever_a_host_says() -> None:
    bench = Bench()
    bench.ask()
    session = bench.tickets[-1].session
    for segment in (-1, -2, 77):
        report = m.Done(session=session, instance=Instance(0), segment=segment, step=1, microbatch=0)
        bench.serving.report(PEERS[0], report)
    bench.done()
    assert len(bench.responses) == 1
    bench.result(0)
    bench.result(1)
    assert len(bench.responses) > 1


def test_an_evaluation_adds_up_the_losses_that_it_asked_for() -> None:
    bench = Bench(network=with_a_cost())
    assert bench.evaluate(lambda step: 0.5) == [(2.0, 8, "")]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_evaluation_that_is_not_finite_is_skipped(bad: float) -> None:
    bench = Bench(network=with_a_cost())
    assert bench.evaluate(lambda step: bad if step == 2 else 0.5) == [
        (0.0, 0, f"the loss is {bad}, which is not finite")
    ]
    (skipped,) = [event for event in bench.desk.events if event.kind == "evaluation_skipped"]
    assert "not finite" in skipped.data


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"inputs": ()}, "input 'x': found nothing, expected float32"),
        ({"inputs": (tensor(3),)}, r"expected float32 \[2, 2\] or fewer rows"),
        ({"inputs": (tensor(), tensor())}, "an input twice"),
        ({"inputs": (replace(tensor(), shape=(2, 1 << 40)),)}, "found float32"),
        ({"inputs": (replace(tensor(), data=b"1234"),)}, "in 4 bytes"),
        ({"inputs": (replace(tensor(), dtype="int64"),)}, "found int64"),
        ({"rows": 0}, "found float32"),
        ({"step": 9}, "no step 9 any more"),
        ({"rows": 1 << 40}, "missing"),
    ],
)
def test_what_does_not_fit_opens_nothing(changed: dict[str, Any], reason: str) -> None:
    bench = Bench()
    bench.ask(**changed)
    refusal = bench.responses[-1]
    assert isinstance(refusal, m.Refusal)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal.reason)
    assert not bench.opened
