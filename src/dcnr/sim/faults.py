"""What a seed stands for: a whole configuration, and the faults that befall it.

Faults wait for a step to be opened, for an entry of the log, or for a time, so that they also hit what comes after a fault.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from dcnr.config import Limits
from dcnr.errors import UsageError
from dcnr.ids import VNodeId
from dcnr.machine import Effect, Send
from dcnr.network.builder import Graph, Symbol
from dcnr.network.graph import Definition
from dcnr.network.templates import gpt, mlp
from dcnr.protocol.messages import DrainNode, OpenMicrobatch
from dcnr.session.log import Kind, object_key
from dcnr.session.recipe import Recipe
from dcnr.sim.store import Habits

if TYPE_CHECKING:
    from dcnr.sim.checkers import Checkers
    from dcnr.sim.client import Client
    from dcnr.sim.world import Process, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``trigger``: ``step`` (opened), ``entry``, ``rollback`` or ``acquire`` (durable), or ``time``; ``when``: its number,
    or microseconds.

    ``first`` and ``second`` pick processes (modulo how many there are).
    """

    kind: str
    trigger: str
    when: int
    delay_us: int
    first: int
    second: int
    duration_us: int
    coin: bool

    def __str__(self) -> str:
        when = f"{self.when / 1e6:.3f} s" if self.trigger == "time" else f"{self.trigger} {self.when}"
        return f"{self.kind} at {when} + {self.delay_us / 1e6:.3f} s, for {self.duration_us / 1e6:.3f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a seed determines before the world starts."""

    definition: Definition
    recipe: Recipe
    context: int
    pnodes: int
    orchestrators: int
    classes: int
    speeds: tuple[float, ...]
    memory_share: float
    """Of what the network needs on one PNode; 0 = plenty."""
    latency_us: tuple[int, int]
    store_delay_us: tuple[int, int]
    store_habits: Habits
    compute_us: tuple[int, int]
    keep_us: tuple[int, int]
    """To write a state: of a few kilobytes, or of so many megabytes that steps go by meanwhile."""
    not_finite: bool
    faults: tuple[Fault, ...]
    scatter: bool
    """Placements are drawn instead of solved: whatever is placed where must not be able to reach a bit."""
    breaks_us: tuple[int, ...]
    """When some link breaks and may be dialled again at once: links of a bad day, which must cost nothing but resends."""
    limits: Limits
    second: Recipe | None = None
    """Of another session at the same time: the same network, on the same PNodes."""
    apart: bool = False
    """The second one's client asks another orchestrator first, which then owns it."""
    clocks_ppm: tuple[int, ...] = ()
    """How much faster than the world's each process's monotonic clock runs, orchestrators first; none = all at its pace."""
    unix_s: tuple[float, ...] = ()
    """What each orchestrator's wall clock showed when the world began."""

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """One per session."""
        return (self.recipe,) if self.second is None else (self.recipe, self.second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """The part of a seed's scenario that is run. As text ``faults=0+3,pnodes=2,breaks=0``; '' = all of it."""

    faults: tuple[int, ...] | None = None
    """Which of them strike, by their place in the scenario."""
    pnodes: int | None = None
    orchestrators: int | None = None
    steps: int | None = None
    breaks: int | None = None
    """0 = no bad day of links."""
    habits: int | None = None
    """0 = the store does at once and in order what it is told."""
    clocks: int | None = None
    """0 = all at one pace."""
    nonfinite: int | None = None
    """0 = no state ever is."""
    second: int | None = None
    """0 = there is one session."""

    @classmethod
    def parse(cls, text: str) -> Only:
        """Raises :class:`UsageError`."""
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            numbers = [] if (name, value) == ("faults", "none") else value.split("+")
            known = name in cls.__dataclass_fields__ and name not in values
            if not known or not all(n.isdecimal() for n in numbers) or (name != "faults" and len(numbers) != 1):
                names = ", ".join(cls.__dataclass_fields__)
                raise UsageError(f"found {part!r}; expected NAME=NUMBER, or faults=0+3 or faults=none, of {names}")
            values[name] = tuple(map(int, numbers)) if name == "faults" else int(value)
        return cls(**values)

    def __str__(self) -> str:
        shown = []
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "faults" and value is not None:
                shown.append(f"faults={'+'.join(map(str, value)) or 'none'}")
            elif value is not None:
                shown.append(f"{name}={value}")
        return ",".join(shown)

    def of(self, plan: Scenario) -> Scenario:
        """Never more than the scenario has."""
        least = {n: max(1, min(getattr(self, n) or whole, whole)) for n, whole in _sizes(plan).items()}
        faults = plan.faults
        return replace(
            plan,
            faults=faults if self.faults is None else tuple(faults[i] for i in self.faults if i < len(faults)),
            pnodes=least["pnodes"],
            orchestrators=least["orchestrators"],
            recipe=replace(plan.recipe, steps=least["steps"]),
            second=None
            if plan.second is None or self.second == 0
            else replace(plan.second, steps=min(least["steps"], plan.second.steps)),
            breaks_us=() if self.breaks == 0 else plan.breaks_us,
            store_habits=Habits() if self.habits == 0 else plan.store_habits,
            clocks_ppm=() if self.clocks == 0 else plan.clocks_ppm,
            not_finite=plan.not_finite and self.nonfinite != 0,
        )

    def smaller(self, plan: Scenario) -> Iterator[Only]:
        """Every part with one thing less, what explains most first. ``plan``: the whole scenario."""
        kept = tuple(range(len(plan.faults))) if self.faults is None else self.faults
        now = self.of(plan)
        if kept:
            yield replace(self, faults=())
        for index in reversed(kept):
            yield replace(self, faults=tuple(i for i in kept if i != index))
        if now.breaks_us:
            yield replace(self, breaks=0)
        if now.store_habits != Habits():
            yield replace(self, habits=0)
        if now.clocks_ppm:
            yield replace(self, clocks=0)
        if now.not_finite:
            yield replace(self, nonfinite=0)
        if now.second is not None:
            yield replace(self, second=0)
        for name, size in _sizes(now).items():
            for less in dict.fromkeys((1, size // 2, size - 1)):
                if 0 < less < size:
                    yield replace(self, **cast(Any, {name: less}))


def _sizes(plan: Scenario) -> dict[str, int]:
    return {"orchestrators": plan.orchestrators, "pnodes": plan.pnodes, "steps": plan.recipe.steps}


_PROMPT_US = 100_000
"""Latency up to which a broken link is dialled again well within ``link_grace_s``."""

KINDS = {
    "crash": 6, "orchestrator": 3, "pause": 3, "pause_orchestrator": 1, "break": 4, "cut": 2, "cut_orchestrator": 2,
    "store": 2, "compute": 2, "leave": 2, "stop": 1, "stop_resume": 2, "damage": 1,
}  # fmt: skip
"""Kinds of faults and how often each is drawn."""


def _branching() -> Graph:
    """Two costs, a shared trunk, an explicit broadcast, and a frozen branch."""
    graph = Graph("branching")
    x = graph.input("x", [4], "float32")
    trunk = graph.relu(graph.linear(x, out_dim=4, id="trunk"), id="trunk_relu")
    first, second, third = graph.broadcast(trunk, num_outputs=3, id="split")
    left = graph.linear(first, out_dim=4, id="left")
    right = graph.linear(second, out_dim=4, id="right")
    frozen = graph.layernorm(third, trainable=False, id="frozen")
    graph.cost("mse", graph.linear(left + frozen, out_dim=4, id="head_a"), target="y", weight=0.7, id="cost_a")
    graph.cost("mse", graph.linear(right, out_dim=4, id="head_b"), target="z", weight=0.3, id="cost_b")
    return graph


def _random(draw: random.Random) -> Graph:
    """A random acyclic graph: implicit fan-out, residuals, ties, colocation."""
    graph = Graph("random")
    layers: list[Symbol] = [graph.input("x", [4], "float32")]
    alias = False
    for number in range(draw.randint(3, 8)):
        source = draw.choice(layers[-3:])
        kind = draw.choice(("linear", "linear", "linear", "relu", "layernorm", "add", "tied"))
        if kind == "add" and len(layers) > 2:
            made = graph.add(layers[-1], draw.choice(layers[1:-1]), id=f"n{number}")
        elif kind == "relu":
            made = graph.relu(source, id=f"n{number}")
        elif kind == "layernorm":
            made = graph.layernorm(source, trainable=draw.random() < 0.8, id=f"n{number}")
        elif kind == "tied" and alias:
            made = graph.linear(source, tie="shared", bias=False, id=f"n{number}")
        elif kind == "tied":
            made = graph.linear(source, out_dim=4, bias=False, alias="shared", id=f"n{number}")
            alias = True
        else:
            made = graph.linear(source, out_dim=4, id=f"n{number}")
        layers.append(made)
    head = graph.linear(layers[-1], out_dim=4, id="head")
    graph.cost("mse", head, target="y", id="cost")
    return graph


def _network(draw: random.Random) -> tuple[Definition, int]:
    """A definition, and the context of its dataset (0 for columns)."""
    kind = draw.choice(("mlp", "gpt", "branching", "random", "random"))
    if kind == "gpt":
        graph = gpt(layers=draw.randint(1, 3), dim=4, heads=1, vocab=8, context=4, dropout=draw.choice((0.0, 0.1)))
        return graph.definition(), 4
    if kind == "mlp":
        return mlp(4, [4] * draw.randint(1, 4), 4).definition(), 0
    graph = _branching() if kind == "branching" else _random(draw)
    return graph.definition(), 0


def scenario(seed: int) -> Scenario:
    """A pure function of the seed."""
    draw = random.Random(f"scenario {seed}")
    definition, context = _network(draw)
    microbatches = draw.choice((1, 1, 2, 2, 3, 4))
    steps = draw.randint(3, 10)
    recipe = Recipe(
        steps=steps,
        batch_size=microbatches * draw.choice((1, 2)),
        microbatches=microbatches,
        seed=draw.getrandbits(16),
        clip_norm=draw.choice((0.0, 1.0, 1.0, 30.0)),
        checkpoint_every=draw.choice((0, 1, 2, 3, 5)),
        eval_every=draw.choice((0, 0, 2, 3)),
        eval_batches=draw.choice((1, 2)),
    )
    pnodes = draw.choice((1, 2, 2, 3, 3, 4, 5))
    count = draw.choice((0, 1, 1, 2, 2, 3, 4, 6))
    faults = tuple(_fault(draw, steps) for _ in range(count))
    not_finite = draw.random() < 0.03
    latency_us = draw.choice(((100, 2_000), (100, 2_000), (100, 50_000), (5_000, 80_000), (1_000, 200_000)))
    memory_share = draw.choice((0.0, 0.0, 0.0, 1.2))
    breaks_us: list[int] = []
    if draw.random() < 0.4 and latency_us[1] <= _PROMPT_US:
        # A dial needs several trips; links that break again before it is through are as good as cut.
        prompt = latency_us[1] <= 2_000
        at_us, mean_us = 300_000, draw.choice((30_000, 100_000, 500_000) if prompt else (500_000, 1_000_000))
        for _ in range(draw.randint(5, 30)):
            at_us += int(draw.expovariate(1.0) * mean_us) + 1
            breaks_us.append(at_us)
    plan = Scenario(
        definition=definition,
        recipe=recipe,
        context=context,
        pnodes=pnodes,
        orchestrators=1,
        classes=draw.choice((1, 1, 1, 2)),
        speeds=tuple(draw.choice((1.0, 1.0, 1.5, 4.0)) for _ in range(pnodes)),
        memory_share=memory_share,
        latency_us=latency_us,
        store_delay_us=draw.choice(((200, 2_000), (5_000, 60_000))),
        store_habits=Habits(failure_share=draw.choice((0.0, 0.0, 0.05, 0.2))),
        compute_us=draw.choice(((200, 2_000), (1_000, 30_000), (20_000, 200_000))),
        keep_us=(500, 30_000),
        not_finite=not_finite,
        faults=faults,
        scatter=memory_share == 0 and draw.random() < 0.7,
        breaks_us=tuple(breaks_us),
        limits=Limits(
            transfer_timeout_s=60.0,
            serving_ttl_s=20.0,
            recover_wait_s=draw.choice((5.0, 30.0)),
            mark_least_s=draw.choice((0.02, 0.1, 1.0)),
            mark_cost_factor=draw.choice((0.0, 50.0)),
            mark_retry_s=0.5,
            commit_least_s=random.Random(f"commits {seed}").choice((0.5, 30.0)),
            rebalance_every_s=random.Random(f"rebalance {seed}").choice((0.5, 10.0)),
            rebalance_steps=1,
            move_cost_s=0.01,
        ),
    )
    # Drawn last, so that a seed means what it meant before there was a choice.
    later = random.Random(f"orchestrators {seed}")
    plan = replace(plan, orchestrators=later.choice((1, 2, 2, 3)))
    if plan.orchestrators > 1 and later.random() < 0.5:
        plan = replace(plan, faults=(*plan.faults, *_succession(later)))
    plan = replace(plan, recipe=replace(recipe, clip_scope=draw.choice(("network", "network", "network", "vnode"))))
    return _second(seed, _leavers(seed, _disks(seed, _clocks(seed, _duel(seed, _store(seed, plan))))))


def _second(seed: int, plan: Scenario) -> Scenario:
    """Every eighth seed has two sessions, each half as long, on PNodes that hold both, or one, or perhaps both. Where they
    hold one, every other seed loses a PNode for a while, so that both wait."""
    draw = random.Random(f"second {seed}")
    if draw.random() >= 1 / 8:
        return plan
    microbatches = draw.choice((1, 2, 3))
    recipe = replace(plan.recipe, steps=min(plan.recipe.steps, draw.randint(3, 4)))
    second = replace(
        recipe,
        steps=draw.randint(2, 4),
        batch_size=microbatches * draw.choice((1, 2)),
        microbatches=microbatches,
        seed=recipe.seed + 1,
        clip_norm=draw.choice((0.0, 1.0)),
        checkpoint_every=draw.choice((0, 1, 2)),
    )
    memory_share = draw.choice((0.0, 1.2, 1.2, 2.4))
    faults = tuple(
        replace(fault, when=1 + fault.when % recipe.steps) if fault.trigger == "step" else fault
        for fault in plan.faults
    )
    apart = draw.random() < 0.5
    if memory_share == 1.2 and draw.random() < 0.5:
        lost = replace(_fault(draw, recipe.steps), kind="crash", trigger="step", when=1 + draw.randrange(recipe.steps))
        faults = (*faults, replace(lost, duration_us=draw.randint(1_500_000, 4_000_000)))
    return replace(
        plan,
        recipe=recipe,
        second=second,
        apart=apart,
        faults=faults,
        memory_share=memory_share,
        scatter=plan.scatter and memory_share == 0,
    )


def _disks(seed: int, plan: Scenario) -> Scenario:
    """Every third seed has disks so slow, or states so large, that the next copy is there before the last one is written;
    in every sixth one a disk is full for a while."""
    draw = random.Random(f"disks {seed}")
    slow_us = draw.choice((100_000, 500_000, 1_500_000))
    if draw.random() < 1 / 3:
        plan = replace(plan, keep_us=(20_000, slow_us))
    full = replace(_fault(draw, plan.recipe.steps), kind="full")
    return replace(plan, faults=(*plan.faults, full)) if draw.random() < 1 / 6 else plan


def _leavers(seed: int, plan: Scenario) -> Scenario:
    """Every sixth seed has a PNode that is drained for a while, half of these from the first step on and nothing beside it."""
    draw = random.Random(f"leavers {seed}")
    if draw.random() >= 1 / 6:
        return plan
    drained = replace(_fault(draw, plan.recipe.steps), kind="drain")
    if draw.random() < 0.5:
        return replace(plan, faults=(*plan.faults, drained))
    drained = replace(drained, trigger="step", when=1, duration_us=30_000_000)
    return replace(plan, faults=(drained,), breaks_us=(), recipe=replace(plan.recipe, steps=max(12, plan.recipe.steps)))


def _store(seed: int, plan: Scenario) -> Scenario:
    """Stores of many makers: each habit for a third of the seeds."""
    draw = random.Random(f"store {seed}")
    ghosts, lags, closes = (draw.random() < 1 / 3 for _ in range(3))
    habits = replace(
        plan.store_habits,
        ghost_share=draw.choice((0.05, 0.3)) if ghosts else 0.0,
        ghost_us=draw.choice((1_000_000, 8_000_000)),
        list_lag_us=draw.choice((500_000, 4_000_000)) if lags else 0,
    )
    closed = [replace(_fault(draw, plan.recipe.steps), kind="read_only") for _ in range(draw.choice((1, 1, 2)))]
    return replace(plan, store_habits=habits, faults=(*plan.faults, *closed) if closes else plan.faults)


def _duel(seed: int, plan: Scenario) -> Scenario:
    """Two orchestrators that each take the other for dead: the owner is paused or loses the store while its PNodes hear it,
    and so does whoever succeeds it, by when the first is back."""
    draw = random.Random(f"duel {seed}")
    if plan.orchestrators == 1 or draw.random() < 2 / 3:
        return plan
    kinds = ("pause_orchestrator", "cut_store")
    first = replace(
        _fault(draw, plan.recipe.steps),
        kind=draw.choice(kinds),
        trigger="step",
        when=draw.randint(1, plan.recipe.steps),
        duration_us=draw.randint(4_000_000, 9_000_000),
    )
    second = replace(
        _fault(draw, plan.recipe.steps),
        kind=draw.choice(kinds),
        trigger="acquire",
        when=2,
        delay_us=draw.choice((0, draw.randint(0, 500_000), draw.randint(0, 4_000_000))),
        duration_us=draw.randint(4_000_000, 12_000_000),
    )
    return replace(plan, faults=(*plan.faults, first, second))


def _clocks(seed: int, plan: Scenario) -> Scenario:
    """For half of the seeds clocks up to 1 % fast or slow; wall clocks up to 30 days off for all."""
    draw = random.Random(f"clocks {seed}")
    off_s = 30 * 86_400.0
    drift = draw.random() < 0.5
    processes = plan.orchestrators + plan.pnodes
    return replace(
        plan,
        clocks_ppm=tuple(draw.randint(-10_000, 10_000) for _ in range(processes)) if drift else (),
        unix_s=tuple(1.8e9 + draw.uniform(-off_s, off_s) for _ in range(plan.orchestrators)),
    )


def _succession(draw: random.Random) -> tuple[Fault, ...]:
    """An owner dies, and whoever takes over meets trouble while it does."""
    first = replace(
        _fault(draw, 3), kind="orchestrator", trigger="step", duration_us=draw.randint(6_000_000, 15_000_000)
    )
    second = replace(
        _fault(draw, 3),
        kind=draw.choice(("orchestrator", "pause_orchestrator", "pause_orchestrator", "cut_orchestrator", "crash")),
        trigger="acquire",
        when=2,
        delay_us=draw.randint(0, 200_000),
        duration_us=draw.choice((draw.randint(100_000, 3_000_000), draw.randint(6_000_000, 15_000_000))),
    )
    return first, second


def _fault(draw: random.Random, steps: int) -> Fault:
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    trigger = draw.choice(("step", "step", "entry", "entry", "rollback", "time"))
    when = {
        "step": draw.randint(1, steps),
        "entry": draw.randint(1, 3 + steps),
        "rollback": draw.choice((1, 1, 2)),
        "time": draw.randint(0, 5_000_000),
    }
    duration = draw.choice(
        (draw.randint(1_000, 300_000), draw.randint(300_000, 3_000_000), draw.randint(6_000_000, 15_000_000))
    )
    return Fault(
        kind=kind,
        trigger=trigger,
        when=when[trigger],
        delay_us=draw.choice((0, draw.randint(0, 20_000), draw.randint(0, 500_000))),
        first=draw.getrandbits(8),
        second=draw.getrandbits(8),
        duration_us=duration,
        coin=draw.random() < 0.5,
    )


class Faults:
    """Arms a scenario's faults in a world and carries them out."""

    def __init__(
        self,
        world: World,
        clients: list[Client],
        orchestrators: list[Process],
        pnodes: list[Process],
        scenario: Scenario,
    ) -> None:
        self._world = world
        self._clients = clients
        self._orchestrators = orchestrators
        self._pnodes = pnodes
        self._scenario = scenario
        self._waiting: dict[tuple[str, int], list[Fault]] = {}
        self.last_us = 0
        """When the last fault that struck was over."""
        self.struck: list[str] = []
        self.resume_due: list[Client] = []
        self._opened = 0
        for fault in scenario.faults:
            if fault.trigger == "time":
                world.at_us(fault.when, self._striker(fault))
            else:
                self._waiting.setdefault((fault.trigger, fault.when), []).append(fault)
        for time_us in scenario.breaks_us:
            world.at_us(time_us, self._bad_day)
        self._entries: Counter[tuple[str, str]] = Counter()
        """By session and kind."""
        world.on_effect = self._effect
        world.on_entry = self._entry

    def _effect(self, process: Process, effect: Effect) -> None:
        if isinstance(effect, Send) and isinstance(effect.message, OpenMicrobatch):
            step = effect.message.step
            if step > self._opened:
                self._opened = step
                self._trigger("step", step)

    def _entry(self, session: str, index: int, kind: str) -> None:
        self._trigger("entry", index)
        self._entries[session, kind] += 1
        if kind in (Kind.ROLLBACK, Kind.ACQUIRE):
            self._trigger(kind.lower(), self._entries[session, kind])

    def _trigger(self, name: str, number: int) -> None:
        for fault in self._waiting.pop((name, number), []):
            self._world.after(fault.delay_us, self._striker(fault))

    def _striker(self, fault: Fault) -> Callable[[], None]:
        return lambda: self._strike(fault)

    def _over(self, after_us: int, *, trouble: bool = True) -> None:
        """``trouble``: nothing is owed before."""
        self.last_us = max(self.last_us, self._world.now_us + after_us)
        if trouble:
            self._world.calm.trouble(after_us)

    def _strike(self, fault: Fault) -> None:
        world = self._world
        if self._over_for_all():
            return
        pnode = self._pnodes[fault.first % len(self._pnodes)]
        other = self._pnodes[fault.second % len(self._pnodes)]
        orchestrator = self._commanding(fault)
        causes = 0
        match fault.kind:
            case "crash":
                causes = self._crash(pnode, fault)
            case "orchestrator":
                # Its hosts go on; while it is away, nothing that befalls them is noticed before it is back.
                self._crash(orchestrator, fault)
            case "pause" if pnode.machine is not None and not pnode.paused:
                causes = int(fault.duration_us > (300_000 if self._links_break() else 4_000_000))
                world.pause(pnode)
                life = pnode.life
                world.after(fault.duration_us, lambda: world.unpause(pnode) if pnode.life == life else None)
                self._over(fault.duration_us)
            case "pause_orchestrator" if orchestrator.machine is not None and not orchestrator.paused:
                causes = int(fault.duration_us > 300_000 and self._links_break())
                world.pause(orchestrator)
                life = orchestrator.life
                world.after(
                    fault.duration_us, lambda: world.unpause(orchestrator) if orchestrator.life == life else None
                )
                self._over(fault.duration_us)
            case "break":
                links = world.network.links()
                if links:
                    link = links[fault.first % len(links)]
                    causes = int(fault.coin or self._scenario.latency_us[1] > _PROMPT_US)
                    world.line(None, f"link {link.dialler.name} - {link.acceptor.name} breaks")
                    world.network.break_link(link, "reset", slow=fault.coin)
                    self._over(5_000_000)
            case "cut" if pnode is not other:
                causes = 2
                self._cut(pnode, other, fault)
            case "cut_orchestrator":
                causes = 1
                self._cut(pnode, orchestrator, fault)
            case "store":
                world.line(None, "the store is away")
                world.store.away = True

                def back() -> None:
                    world.line(None, "the store is back")
                    world.store.away = False

                world.after(fault.duration_us, back)
                self._over(fault.duration_us)
            case "read_only":
                world.line(None, "the store takes no writes")
                world.store.read_only = True

                def writable() -> None:
                    world.line(None, "the store takes writes again")
                    world.store.read_only = False

                world.after(fault.duration_us, writable)
                self._over(fault.duration_us)
            case "cut_store" if orchestrator.name not in world.store.cut_from:
                world.line(None, f"{orchestrator.name} does not reach the store")
                world.store.cut_from.add(orchestrator.name)

                def reached() -> None:
                    world.line(None, f"{orchestrator.name} reaches the store again")
                    world.store.cut_from.discard(orchestrator.name)

                world.after(fault.duration_us, reached)
                self._over(fault.duration_us)
            case "compute":
                causes = 1 + int(fault.coin)
                pnode.fail_next += causes
                self._over(2_000_000)
            case "leave" if pnode.machine is not None:
                # It moves away what it hosts, if it can in time.
                causes = 1
                world.shutdown(pnode, "SIGTERM")
                self._restart(pnode, fault, trouble=False)
            case "drain" if pnode.machine is not None:
                self._drain(pnode, orchestrator, on=True)
                world.after(fault.duration_us, lambda: self._drain(pnode, orchestrator, on=False))
                self._over(fault.duration_us + 1_000_000, trouble=False)
            case "full" if not pnode.full:
                world.line(None, f"the disk of {pnode.name} is full")
                pnode.full = True

                def emptied() -> None:
                    world.line(None, f"the disk of {pnode.name} has room again")
                    pnode.full = False

                world.after(fault.duration_us, emptied)
                self._over(fault.duration_us)
            case "stop" | "stop_resume":
                client = self._clients[fault.first % len(self._clients)]
                client.control("suspend" if fault.second % 2 else "stop")
                self._over(1_000_000)
                if fault.kind == "stop_resume":
                    self.resume_due.append(client)
                    self._resume(client, fault)
            case "damage":
                causes = self._damage(fault)
                self._over(1_000_000)
            case _:
                return
        self.struck.append(fault.kind)
        world.watch.causes += causes

    def _commanding(self, fault: Fault) -> Process:
        """The owner more often than not; any other as well."""
        owner = self._checkers(fault).fold.owner
        owning = [p for p in self._orchestrators if owner is not None and p.peer == owner.peer]
        return owning[0] if owning and fault.second % 4 else self._orchestrators[fault.first % len(self._orchestrators)]

    def _checkers(self, fault: Fault) -> Checkers:
        """Of the session that it is about."""
        return self._clients[fault.first % len(self._clients)].checkers

    def _over_for_all(self) -> bool:
        return all(client.ended for client in self._clients)

    def _links_break(self) -> bool:
        """While a process is paused it is not dialled: over a link that breaks, a short pause is too long already."""
        return bool(self._scenario.breaks_us) or any(
            f.kind in ("break", "cut_orchestrator") for f in self._scenario.faults
        )

    def _bad_day(self) -> None:
        links = self._world.network.links()
        if links and not self._over_for_all():
            link = links[self._world.random.randrange(len(links))]
            self._world.line(None, f"link {link.dialler.name} - {link.acceptor.name} breaks")
            self._world.network.break_link(link, "reset")
            self._over(2_000_000)

    def _crash(self, process: Process, fault: Fault) -> int:
        if process.machine is None:
            return 0
        # A process that loses power does not close its sockets.
        self._world.stop(process, "killed", slow=fault.coin and fault.duration_us > 300_000)
        self._restart(process, fault)
        return 1

    def _drain(self, pnode: Process, orchestrator: Process, *, on: bool) -> None:
        """As a user does it; who does not want it any more says so until it is heard."""
        if orchestrator.machine is not None:
            self._world.request(orchestrator, DrainNode(peer=pnode.peer, on=on), lambda reply, last: None)

        def look() -> None:
            if self._world.calm.is_leaving(pnode):
                self._drain(pnode, orchestrator, on=False)

        if not on:
            self._world.after(1_000_000, look)

    def _restart(self, process: Process, fault: Fault, *, trouble: bool = True) -> None:
        life = process.life

        def start() -> None:
            if process.machine is None:
                self._world.start(process)
            elif process.life == life:
                # It moves away what it hosts, or was paused when it was told and has not heard it yet.
                self._restart(process, fault, trouble=trouble)

        self._world.after(fault.duration_us, start)
        self._over(fault.duration_us, trouble=trouble)

    def _cut(self, a: Process, b: Process, fault: Fault) -> None:
        world = self._world
        world.line(None, f"{a.name} and {b.name} are cut off from each other")
        world.network.cut(a, b)

        def heal() -> None:
            world.line(None, f"{a.name} and {b.name} reach each other again")
            world.network.heal(a, b)

        world.after(fault.duration_us, heal)
        self._over(fault.duration_us + 3_000_000)

    def _resume(self, client: Client, fault: Fault) -> None:
        def look() -> None:
            if client.ended in ("stopped", "suspended"):
                self.resume_due.remove(client)
                client.control("resume")
                # Earlier failures are forgiven, so the same one may cost a rollback again.
                self._world.watch.causes += int(self._scenario.not_finite)
                self._over(1_000_000)
            elif client.ended:
                self.resume_due.remove(client)
            else:
                self._world.after(200_000, look)

        self._world.after(fault.duration_us, look)

    def _damage(self, fault: Fault) -> int:
        """An object of the newest commit is lost or altered."""
        checkers = self._checkers(fault)
        commits = checkers.fold.commits
        if not commits or checkers.session is None or commits[-1].manifest is None:
            return 0
        states = checkers.manifests[commits[-1].manifest].states
        vnode = VNodeId(sorted(states)[fault.first % len(states)])
        key = object_key(checkers.session, states[vnode].sha256)
        if key in self._world.store.damaged or key not in self._world.store.objects:
            return 0
        self._world.line(None, f"{key} is damaged")
        self._world.store.damage(key, missing=fault.coin)
        return len(commits)
