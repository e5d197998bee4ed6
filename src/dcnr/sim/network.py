"""Simulated links: order per priority class, breaks that lose a suffix, dials that fail, pairs that are cut.

Times are integer microseconds of the world's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dcnr.ids import PeerId
from dcnr.machine import Handle, LinkDown, LinkUp, Received, TensorRef
from dcnr.protocol.messages import Refusal, Register, Registered, TensorFrame
from dcnr.sim.tensors import tensor_bytes

if TYPE_CHECKING:
    from dcnr.sim.world import Process, World

_NEVER = math.inf


@dataclass(slots=True, eq=False)
class Link:
    """One stream between two lives of two processes. Directions are named by their sender."""

    number: int
    dialler: Process
    acceptor: Process
    lives: tuple[int, int]
    cut_at: dict[PeerId, float] = field(default_factory=dict)
    """A frame of that sender that would arrive later is lost."""
    last_arrival: dict[tuple[PeerId, int], int] = field(default_factory=dict)
    """Per sender and priority class: nothing overtakes within a class."""

    def other(self, process: Process) -> Process:
        return self.acceptor if process is self.dialler else self.dialler

    def lives_on(self, process: Process) -> bool:
        return process.life == self.lives[0 if process is self.dialler else 1] and process.machine is not None


class Network:
    """All links of the world, and who can reach whom."""

    def __init__(self, world: World, latency_us: tuple[int, int]) -> None:
        self._world = world
        self._latency_us = latency_us
        self._bases: dict[tuple[str, str], int] = {}
        self._numbers = 0
        self._links: dict[int, Link] = {}
        self.cuts: dict[tuple[str, str], bool] = {}

    # --- reachability --------------------------------------------------------------------------------------

    def latency(self, a: str, b: str, size_bytes: int = 0) -> int:
        """One way: a base per pair, an exponential tail, 100 MB/s."""
        pair = (min(a, b), max(a, b))
        if pair not in self._bases:
            self._bases[pair] = self._world.random.randint(*self._latency_us)
        tail = self._world.random.expovariate(1.0) * 0.3 * self._bases[pair]
        return self._bases[pair] + int(tail) + size_bytes // 100

    def reachable(self, a: str, b: str) -> bool:
        return (min(a, b), max(a, b)) not in self.cuts

    def cut(self, a: Process, b: Process) -> None:
        """Nothing passes between two processes until :meth:`heal`."""
        self.cuts[min(a.name, b.name), max(a.name, b.name)] = True
        for link in self._between(a, b):
            self.break_link(link, "cut", slow=self._world.random.random() < 0.3)

    def heal(self, a: Process, b: Process) -> None:
        self.cuts.pop((min(a.name, b.name), max(a.name, b.name)), None)

    def _between(self, a: Process, b: Process) -> list[Link]:
        return [x for x in self._links.values() if {x.dialler.name, x.acceptor.name} == {a.name, b.name}]

    def links(self) -> list[Link]:
        return list(self._links.values())

    # --- frames --------------------------------------------------------------------------------------------

    def send(self, process: Process, peer: PeerId, message: Any) -> None:
        link = process.links.get(peer)
        if link is None:
            self._world.note(process, "no link", message)
            return
        priority, size = 0, 200
        value: Any = None
        handle: Handle | None = None
        if isinstance(message, TensorFrame):
            # The driver keeps a count of its own for as long as it needs the bytes.
            handle = message.tensor.handle
            value = process.table.get(handle)
            process.table.hold(handle)
            priority, size = 1, tensor_bytes(message.tensor.shape, message.tensor.dtype)
        receiver = link.other(process)
        arrival = self._world.now_us + self.latency(process.name, receiver.name, size)
        arrival = max(arrival, link.last_arrival.get((process.peer, priority), 0) + 1)
        link.last_arrival[process.peer, priority] = arrival
        life = process.life

        def arrive() -> None:
            if handle is not None and process.life == life and process.machine is not None:
                process.table.release(handle)
            lost = arrival > link.cut_at.get(process.peer, _NEVER) or receiver.links.get(process.peer) is not link
            if lost:
                self._world.note(receiver, "lost", message)
            else:
                self._world.on(receiver, lambda: self._receive(receiver, link, process, life, message, value))

        self._world.at_us(arrival, arrive)

    def _receive(self, receiver: Process, link: Link, sender: Process, life: int, message: Any, value: Any) -> None:
        incarnation = sender.incarnations[life]
        if isinstance(message, TensorFrame):
            assert receiver.machine is not None
            header = replace(message, tensor=replace(message.tensor, handle=Handle(0)))
            refusal = receiver.machine.check_frame(sender.peer, header)
            if refusal is not None:
                # Its bytes are not kept; the machine hears of it and answers.
                self._world.note(receiver, f"refuses: {refusal}", message)
                self._world.deliver(receiver, Received(peer=sender.peer, incarnation=incarnation, message=header))
                return
            tensor: TensorRef = receiver.table.tensor(
                value,
                f"received edge {message.edge} {message.direction.name} {message.step}/{message.microbatch}",
                message.tensor.shape,
                message.tensor.dtype,
                message.tensor.digest,
            )
            message = replace(message, tensor=tensor)
        self._world.deliver(receiver, Received(peer=sender.peer, incarnation=incarnation, message=message))

    # --- opening -------------------------------------------------------------------------------------------

    def dial(self, process: Process, peer: PeerId, addresses: tuple[str, ...]) -> None:
        world = self._world
        life = process.life

        def fail(reason: str, delay_us: int) -> None:
            world.after(
                delay_us,
                lambda: world.deliver(process, LinkDown(peer=peer, reason=reason, address=addresses[0])),
                process,
            )

        target = next((p for a in addresses for p in world.processes if p.address == a), None)
        if target is None:
            fail("no such address", 1000)
            return
        delay = self.latency(process.name, target.name)

        def knock() -> None:
            if process.life != life:
                return
            if target.machine is None or target.exiting:
                fail("connection refused", delay)
            elif not self.reachable(process.name, target.name):
                fail("timed out", world.random.randint(500_000, 2_000_000))
            elif target.paused:
                wait()
            elif peer and target.peer != peer:
                fail(f"{target.address} is {target.peer}", delay)
            elif target.role == "orchestrator":
                self._register(process, life, target, fail)
            else:
                self._open(process, life, target, target.life, fail)

        def wait() -> None:
            """A paused process accepts, and answers when it goes on, if that is soon enough."""
            over = [False]

            def goes_on() -> None:
                if not over[0]:
                    over[0] = True
                    knock()

            def timed_out() -> None:
                if not over[0]:
                    over[0] = True
                    fail("timed out", 0)

            world.on(target, goes_on, target.life)
            world.after(world.random.randint(2_000_000, 4_000_000), timed_out)

        world.after(delay, knock)

    def _register(self, process: Process, life: int, target: Process, fail: Any) -> None:
        """The unary call that comes before a link to an orchestrator."""
        world = self._world
        message = Register(descriptor=world.descriptor(process), capabilities=process.capabilities)
        answered = [False]
        target_life = target.life

        def reply(answer: Any, last: bool) -> None:
            if answered[0] or process.life != life:
                return
            answered[0] = True
            if isinstance(answer, Registered):
                self._open(process, life, target, target_life, fail)
            else:
                reason = answer.reason if isinstance(answer, Refusal) else f"unexpected answer {answer!r:.100}"
                fail(reason, self.latency(process.name, target.name))

        def timed_out() -> None:
            if not answered[0] and process.life == life:
                answered[0] = True
                fail("no answer to Register", 0)

        world.request(target, message, reply)
        world.after(3_000_000, timed_out)

    def _open(self, dialler: Process, life: int, acceptor: Process, acceptor_life: int, fail: Any) -> None:
        world = self._world
        first = self.latency(dialler.name, acceptor.name)
        second = first + self.latency(dialler.name, acceptor.name)

        def possible() -> bool:
            return (
                dialler.life == life
                and acceptor.life == acceptor_life
                and acceptor.machine is not None
                and dialler.machine is not None
                and self.reachable(dialler.name, acceptor.name)
            )

        self._numbers += 1
        link = Link(number=self._numbers, dialler=dialler, acceptor=acceptor, lives=(life, acceptor_life))

        def at_acceptor() -> None:
            if not possible():
                if dialler.life == life:
                    fail("connection lost", first)
                return
            old = acceptor.links.get(dialler.peer)
            crossed = old is not None and old.lives == link.lives and old is dialler.links.get(acceptor.peer)
            if old is not None and crossed and (old.dialler is dialler or old.dialler.peer < dialler.peer):
                # Both ends hold an open link already: of two crossed dials the lower peer id's stays.
                world.note(dialler, "crossed dial dropped", acceptor.name)
                return
            if old is not None:
                self._drop_end(old, acceptor, "replaced by a newer link")
            self._links[link.number] = link
            acceptor.links[dialler.peer] = link
            link.last_arrival[acceptor.peer, 0] = link.last_arrival[acceptor.peer, 1] = world.now_us + second - first
            world.on(acceptor, lambda: self._up(acceptor, link, dialler, life))
            world.at_us(world.now_us + second - first, at_dialler)

        def at_dialler() -> None:
            if link.number not in self._links or acceptor.links.get(dialler.peer) is not link:
                if dialler.life == life and dialler.machine is not None:
                    fail("connection lost", 0)
                return
            if not possible():
                self.break_link(link, "connection lost")
                if dialler.life == life and dialler.machine is not None:
                    fail("connection lost", 0)
                return
            old = dialler.links.get(acceptor.peer)
            if old is not None:
                self._drop_end(old, dialler, "replaced by a newer link")
            dialler.links[acceptor.peer] = link
            world.on(dialler, lambda: self._up(dialler, link, acceptor, acceptor_life))

        world.at_us(world.now_us + first, at_acceptor)

    def _up(self, process: Process, link: Link, other: Process, life: int) -> None:
        self._world.deliver(
            process,
            LinkUp(peer=other.peer, incarnation=other.incarnations[life], role=other.role, address=other.address),
        )

    # --- closing -------------------------------------------------------------------------------------------

    def _drop_end(self, link: Link, process: Process, reason: str | None) -> None:
        """One end goes away now; the other end hears of it by :meth:`break_link`."""
        other = link.other(process)
        if process.links.get(other.peer) is not link:
            return
        del process.links[other.peer]
        if reason is not None:
            self._world.on(process, lambda: self._world.deliver(process, LinkDown(peer=other.peer, reason=reason)))
        self.break_link(link, reason or "closed by the peer")

    def close(self, process: Process, peer: PeerId) -> None:
        """The machine closed it: no ``LinkDown`` here, one there."""
        link = process.links.get(peer)
        if link is not None:
            self._drop_end(link, process, None)

    def break_link(self, link: Link, reason: str, slow: bool = False, flush: bool = False) -> None:
        """Each direction loses what would arrive after its own cut; both ends hear of it at their own times.

        ``slow``: one end only notices seconds later. ``flush``: what was sent before still arrives.
        """
        if self._links.pop(link.number, None) is None:
            return
        world = self._world
        ends = (link.dialler, link.acceptor)
        slow_end = world.random.randrange(2)
        for position, process in enumerate(ends):
            other = link.other(process)
            cut = world.now_us + world.random.randint(0, 2 * self._latency_us[1])
            if flush:
                cut = max([cut, *(t for (p, _), t in link.last_arrival.items() if p == other.peer)])
            link.cut_at[other.peer] = cut
            heard = cut + world.random.randint(0, 50_000)
            if slow and position == slow_end:
                heard += world.random.randint(500_000, 4_000_000)
            world.at_us(heard, self._closer(link, process, other, reason))

    def _closer(self, link: Link, process: Process, other: Process, reason: str) -> Any:
        def close() -> None:
            if link.lives_on(process) and process.links.get(other.peer) is link:
                del process.links[other.peer]
                world.on(process, lambda: world.deliver(process, LinkDown(peer=other.peer, reason=reason)))

        world = self._world
        return close

    def died(self, process: Process, slow: bool, flush: bool) -> None:
        """A process ended: its ends vanish; its peers hear of it, after ``slow`` only by silence for a while."""
        process.links.clear()
        for link in self.links():
            if process in (link.dialler, link.acceptor):
                self.break_link(link, "peer closed the connection", slow=slow, flush=flush)
