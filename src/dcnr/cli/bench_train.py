"""``dcnr bench train``: two PNodes of one thread against one process of two threads, on the same model and batch.

Both sides run in turn, the network's processes idle while the baseline runs. The first steps of every run are dropped:
they pay for page faults and for filling the pipeline. Nothing is clipped and no checkpoint is taken on either side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from dcnr.adapters.text import python_corpus
from dcnr.cli.output import warn
from dcnr.client.blocking import Client
from dcnr.errors import ComputeError
from dcnr.network import templates
from dcnr.network.graph import canonical_json
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import StepDone
from dcnr.session.recipe import AdamW, Constant
from dcnr.wiring import connect

PNODES = 2
MODEL: dict[str, Any] = {"layers": 8, "dim": 512, "heads": 8, "vocab": 8192, "context": 128, "tied": False}
BATCH = 16
CONTEXT = 128
MICROBATCHES = (8, 16)
FULL_BATCH = 1
DROPPED = 2
MEASURED = 6
GOAL = 0.90
"""Of the tokens per second of one process with the same microbatches."""
ORCHESTRATOR_GOAL_BYTES = 150 << 20


@dataclass(slots=True)
class Samples:
    """Tokens per second of single steps, and compute seconds per step of each PNode (network only)."""

    tokens_per_s: list[float] = field(default_factory=list)
    compute_s: list[list[float]] = field(default_factory=list)


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Figures as they are known, each ready to be printed as JSON."""
    graph = templates.gpt(**MODEL)
    network = {count: Samples() for count in MICROBATCHES}
    baseline = {count: Samples() for count in (FULL_BATCH, *MICROBATCHES)}
    with tempfile.TemporaryDirectory(prefix="dcnr-bench-") as name:
        home = Path(name)
        definition = home / "definition.json"
        definition.write_bytes(canonical_json(graph.definition()))
        with LocalNetwork(home, PNODES, 1) as local, connect(local.address) as net, baseline_process(definition) as ask:
            warn("preparing the text")
            dataset = net.add_data(python_corpus(), name="python", tokenizer=f"bpe:{MODEL['vocab']}")
            model = net.create_network(graph)
            for turn in range(rounds):
                for count in MICROBATCHES:
                    warn(f"round {turn + 1} of {rounds}: {count} microbatches")
                    train_once(net, local, model, dataset, count, network[count])
                    baseline[count].tokens_per_s += ask(count)
                baseline[FULL_BATCH].tokens_per_s += ask(FULL_BATCH)
            orchestrator_bytes = psutil.Process(local.orchestrator.pid).memory_info().rss
            pnode_bytes = [psutil.Process(pid).memory_info().rss for pid in local.pids]
    for count in MICROBATCHES:
        yield ratio(f"of_same_microbatches_{count}", network[count], baseline[count], GOAL)
        yield ratio(f"of_full_batch_{count}", network[count], baseline[FULL_BATCH], None)
        yield ceiling(count, network[count])
    yield figure(
        "orchestrator_resident", orchestrator_bytes, "bytes", goal=ORCHESTRATOR_GOAL_BYTES,
        holds=orchestrator_bytes < ORCHESTRATOR_GOAL_BYTES, samples={"network": [orchestrator_bytes]},
    )  # fmt: skip
    yield figure("pnode_resident", max(pnode_bytes), "bytes", samples={"network": pnode_bytes})


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


def ratio(name: str, network: Samples, baseline: Samples, goal: float | None) -> dict[str, Any]:
    """Median tokens per second of the network over that of the baseline."""
    value = median(network.tokens_per_s) / median(baseline.tokens_per_s)
    return figure(
        name,
        round(value, 4),
        "ratio",
        against="one process of 2 threads, eager PyTorch",
        goal=goal,
        holds=None if goal is None else value >= goal,
        samples={"network": network.tokens_per_s, "baseline": baseline.tokens_per_s},
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
        against="the schedule's limit from the PNodes' own compute times",
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
        if isinstance(event, StepDone):
            now = time.monotonic()
            if event.step == DROPPED:
                busy = [compute_seconds(pid) for pid in local.pids]
            if event.step > DROPPED:
                into.tokens_per_s.append(event.tokens / (now - before))
            if event.step == DROPPED + MEASURED:
                spent = zip((compute_seconds(pid) for pid in local.pids), busy, strict=True)
                into.compute_s.append([(after - started) / MEASURED for after, started in spent])
            before = now


def compute_seconds(pid: int) -> float:
    """CPU seconds of the process's busiest thread: the one that computes."""
    return max(thread.user_time + thread.system_time for thread in psutil.Process(pid).threads())


@contextmanager
def baseline_process(definition: Path) -> Iterator[Any]:
    """A child with two threads; gives a function: microbatches to tokens per second of each measured step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dcnr.cli.bench_baseline", str(definition)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(PNODES), "MKL_NUM_THREADS": str(PNODES)},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(microbatches: int) -> list[float]:
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"batch": BATCH, "microbatches": microbatches, "dropped": DROPPED, "measured": MEASURED}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise ComputeError("the baseline's process ended early; its complaint stands above")
        found: list[float] = json.loads(answer)
        return found

    try:
        yield ask
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()
