"""``dcnr bench train``: two PNodes of one thread against one process of two threads, on the same model and batch.

Beside them ``torch.distributed.pipelining`` (1F1B over gloo, two processes of one thread), split where the network's first
placement was. All run in turn, the others' processes idle meanwhile. The first steps of every run are dropped: they pay for
page faults and for filling the pipeline. Nothing is clipped and no checkpoint is taken on any side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil

from dcnr.adapters.text import python_corpus
from dcnr.cli.bench_stage import stage
from dcnr.cli.output import warn
from dcnr.client.blocking import Client
from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.graph import Definition, canonical_json
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import Placed, StepDone
from dcnr.session.recipe import AdamW, Constant
from dcnr.wiring import connect

PNODES = 2
MODEL: dict[str, Any] = {"layers": 8, "dim": 512, "heads": 8, "vocab": 8192, "context": 128, "tied": False}
BATCH = 16
CONTEXT = 128
MICROBATCHES = (8, 16)
FULL_BATCH = 1
DROPPED = 2
MEASURED = 4
GOAL = 0.90
"""Of the tokens per second of one process with the same microbatches."""
ORCHESTRATOR_GOAL_BYTES = 150 << 20
PNODE_GOAL_BYTES = 100 << 20
"""Beyond what plain PyTorch needs for the same segment."""
BASELINE = "one process of 2 threads, eager PyTorch, fused AdamW"


@dataclass(slots=True)
class Samples:
    """Tokens per second of single steps; of the network also compute seconds per step and resident bytes."""

    tokens_per_s: list[float] = field(default_factory=list)
    compute_s: list[list[float]] = field(default_factory=list)
    """Of each PNode, by session."""
    pnode_bytes: list[list[int]] = field(default_factory=list)
    """Of each PNode, by step; the last step of a session, whose end takes a checkpoint, is left out."""
    orchestrator_bytes: list[int] = field(default_factory=list)
    """By step."""
    placed: list[Placed] = field(default_factory=list)
    """By session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one PNode computes, in the order in which a microbatch passes."""

    pnode: int
    vnodes: int
    definition: Definition
    in_flight: int
    """Microbatches it has open at once: all of the window on the first stage. The last runs backward as soon as it can."""


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Figures as they are known, each ready to be printed as JSON."""
    graph = templates.gpt(**MODEL)
    network = {count: Samples() for count in MICROBATCHES}
    pipelining = {count: Samples() for count in MICROBATCHES}
    baseline = {count: Samples() for count in (FULL_BATCH, *MICROBATCHES)}
    with tempfile.TemporaryDirectory(prefix="dcnr-bench-") as name, ExitStack() as children:
        home = Path(name)
        definition = home / "definition.json"
        definition.write_bytes(canonical_json(graph.definition()))
        plain = children.enter_context(child("dcnr.cli.bench_baseline", [definition], PNODES))
        local = children.enter_context(LocalNetwork(home, PNODES, 1))
        net = children.enter_context(connect(local.address))
        warn("preparing the text")
        dataset = net.add_data(python_corpus(), name="python", tokenizer=f"bpe:{MODEL['vocab']}")
        model = net.create_network(graph)
        stages: list[Stage] = []
        files: list[Path] = []
        ranks: list[Child] = []
        for turn in range(rounds):
            for count in MICROBATCHES:
                warn(f"round {turn + 1} of {rounds}: {count} microbatches")
                train_once(net, local, model, dataset, count, network[count])
                if not stages:
                    stages = split(graph.definition(), network[count].placed[0], [c.peer for c in local.pnodes])
                    files = [home / f"stage-{number}.json" for number in range(len(stages))]
                    for file, part in zip(files, stages, strict=True):
                        file.write_bytes(canonical_json(part.definition))
                    for rank in range(len(stages)):
                        arguments = [rank, home / "rendezvous", *files]
                        ranks.append(children.enter_context(child("dcnr.cli.bench_pipelining", arguments, 1)))
                pipelining[count].tokens_per_s += ask(ranks, count)[0]
                baseline[count].tokens_per_s += ask([plain], count)[0]
            baseline[FULL_BATCH].tokens_per_s += ask([plain], FULL_BATCH)[0]
        pnode_bytes = [resident(pid) for pid in local.pids]
        warn("the memory of plain PyTorch")
        first = MICROBATCHES[0]
        plain_bytes: list[list[int]] = []
        for file, part in zip(files, stages, strict=True):
            with child("dcnr.cli.bench_segment", [file], 1) as segment:
                last = part is stages[-1]
                plain_bytes += ask([segment], first, in_flight=part.in_flight, last=last)
    for count in MICROBATCHES:
        yield ratio(f"of_same_microbatches_{count}", network[count], baseline[count], GOAL)
        yield ratio(f"pipelining_of_same_microbatches_{count}", pipelining[count], baseline[count], side="pipelining")
        yield ratio(f"of_full_batch_{count}", network[count], baseline[FULL_BATCH])
        yield ceiling(count, network[count])
    orchestrator_bytes = [bytes_ for samples in network.values() for bytes_ in samples.orchestrator_bytes]
    yield figure(
        "orchestrator_resident", max(orchestrator_bytes), "bytes", against="its peak, looked at after every step",
        goal=ORCHESTRATOR_GOAL_BYTES, holds=max(orchestrator_bytes) < ORCHESTRATOR_GOAL_BYTES,
        samples={"network": orchestrator_bytes},
    )  # fmt: skip
    yield figure("pnode_resident", max(pnode_bytes), "bytes", samples={"network": pnode_bytes})
    yield memory(stages, network[first], plain_bytes)


def split(definition: Definition, placed: Placed, peers: Sequence[str]) -> list[Stage]:
    """The stages of a placement. Raises :class:`ComputeError` where it is no chain of one segment for each PNode."""
    network = analyse(definition)
    segments = network.segments({VNodeId(vnode): peer for vnode, peer in placed.vnodes.items()})
    if sorted(segment.host for segment in segments) != sorted(peers):
        raise ComputeError(f"{len(segments)} segments on {len(peers)} PNodes: pipelining needs one for each")
    return [
        Stage(
            pnode=peers.index(segment.host),
            vnodes=len(segment.vnodes),
            definition=stage(network, segment.vnodes),
            in_flight=1 if segment is segments[-1] else placed.window,
        )
        for segment in segments
    ]


def memory(stages: Sequence[Stage], network: Samples, plain_bytes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How much more than plain PyTorch the worse PNode has resident, at its peak over the steps of one microbatch count.

    Sessions whose placement is not that of ``stages``, the first one's, computed other segments and are left out.
    """
    same = [n for n, placed in enumerate(network.placed) if placed.vnodes == network.placed[0].vnodes]
    steps = len(network.pnode_bytes) // len(network.placed)
    kept = [sizes for n in same for sizes in network.pnode_bytes[n * steps : (n + 1) * steps]]
    each, more = [], []
    for part, plain in zip(stages, plain_bytes, strict=True):
        pnode = [sizes[part.pnode] for sizes in kept]
        more.append(max(pnode) - max(plain))
        each.append({"vnodes": part.vnodes, "network": pnode, "baseline": plain, "difference": more[-1]})
    value = max(more)
    return figure(
        "pnode_over_plain_pytorch", value, "bytes",
        against="one process of 1 thread for each PNode, eager PyTorch, fused AdamW, the same segment and as many "
        f"microbatches in flight ({', '.join(str(part.in_flight) for part in stages)}), its own allocator settings",
        goal=PNODE_GOAL_BYTES, holds=value <= PNODE_GOAL_BYTES, samples={"pnodes": each},
    )  # fmt: skip


def figure(
    name: str,
    value: float,
    unit: str,
    *,
    samples: dict[str, Any],
    against: str | None = None,
    goal: float | None = None,
    holds: bool | None = None,
) -> dict[str, Any]:
    """A benchmark's line. ``holds`` is ``None`` where there is no goal."""
    return {
        "bench": "train",
        "figure": name,
        "value": value,
        "unit": unit,
        "against": against,
        "goal": goal,
        "holds": holds,
        "samples": samples,
    }


def ratio(
    name: str, measured: Samples, baseline: Samples, goal: float | None = None, *, side: str = "network"
) -> dict[str, Any]:
    """Median tokens per second of one side over that of the baseline."""
    value = median(measured.tokens_per_s) / median(baseline.tokens_per_s)
    return figure(
        name,
        round(value, 4),
        "ratio",
        against=BASELINE,
        goal=goal,
        holds=None if goal is None else value >= goal,
        samples={side: measured.tokens_per_s, "baseline": baseline.tokens_per_s},
    )


def ceiling(count: int, network: Samples) -> dict[str, Any]:
    """The network's speed over what a perfect schedule would reach with the compute times that were measured.

    A pipeline of stages needs, for M microbatches, the slowest stage's time for all of them and one microbatch's time
    of the others to fill and drain (Narayanan et al., 2021).
    """
    limits = [BATCH * CONTEXT / (max(stages) + (sum(stages) - max(stages)) / count) for stages in network.compute_s]
    return figure(
        f"of_ceiling_{count}",
        round(median(network.tokens_per_s) / median(limits), 4),
        "ratio",
        against="tokens of a step / (slowest PNode + the others' sum / microbatches), in seconds that their compute threads "
        "were busy per step",
        samples={"network": network.tokens_per_s, "compute_s": network.compute_s},
    )


def train_once(net: Client, local: LocalNetwork, model: str, dataset: str, count: int, into: Samples) -> None:
    """One short session; adds the speed of its steps behind the first ones."""
    run = net.train(
        model,
        dataset,
        steps=DROPPED + MEASURED,
        batch_size=BATCH,
        microbatches=count,
        optimizer=AdamW(),
        schedule=Constant(),
        clip_norm=0.0,
        checkpoint_every=0,
    )
    before = time.monotonic()
    busy: list[float] = []
    for event in run:
        if isinstance(event, Placed):
            into.placed.append(event)
        if isinstance(event, StepDone):
            now = time.monotonic()
            if event.step == DROPPED:
                busy = [compute_seconds(pid) for pid in local.pids]
            if event.step > DROPPED:
                into.tokens_per_s.append(event.tokens / (now - before))
                into.orchestrator_bytes.append(resident(local.orchestrator.pid))
            if DROPPED < event.step < DROPPED + MEASURED:
                into.pnode_bytes.append([resident(pid) for pid in local.pids])
            if event.step == DROPPED + MEASURED:
                spent = zip((compute_seconds(pid) for pid in local.pids), busy, strict=True)
                into.compute_s.append([(after - started) / MEASURED for after, started in spent])
            before = now


def compute_seconds(pid: int) -> float:
    """CPU seconds of the process's busiest thread: the one that computes."""
    return max(thread.user_time + thread.system_time for thread in psutil.Process(pid).threads())


def resident(pid: int) -> int:
    """Bytes of the process in memory, shared libraries included."""
    size: int = psutil.Process(pid).memory_info().rss
    return size


@dataclass(frozen=True, slots=True)
class Child:
    """A process that answers each JSON line with one."""

    requests: IO[str]
    answers: IO[str]


@contextmanager
def child(module: str, arguments: Sequence[object], threads: int) -> Iterator[Child]:
    """Run a module of this package; the process ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *(str(argument) for argument in arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": loopback()},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Child(process.stdin, process.stdout)
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def loopback() -> str:
    """The name of the interface of 127.0.0.1: gloo would look up the machine's own name instead."""
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )


def ask(children: Sequence[Child], microbatches: int, **more: object) -> list[Any]:
    """The same request to all; each one's list of samples."""
    request = {"batch": BATCH, "microbatches": microbatches, "dropped": DROPPED, "measured": MEASURED, **more}
    # One that has ended takes no request, and answers with the end of its output.
    with suppress(BrokenPipeError):
        for one in children:
            one.requests.write(json.dumps(request) + "\n")
            one.requests.flush()
    lines = [one.answers.readline() for one in children]
    if not all(lines):
        raise ComputeError("a process of the comparison ended early; its complaint stands above")
    return [json.loads(line) for line in lines]
