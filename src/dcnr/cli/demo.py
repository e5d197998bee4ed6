"""``dcnr demo``: a local network trains a language model, loses a PNode, and loses no bit.

:func:`demo` starts everything, :mod:`dcnr.cli.story` follows the session and kills a PNode halfway, :func:`summary` judges.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcnr.cli.output import EXIT_FAILURE, command, print_table, say

if TYPE_CHECKING:
    from dcnr.cli.story import Facts
    from dcnr.client.blocking import Client, Run

PNODES = 3
STEPS = 450


@command
def demo(
    steps: Annotated[int, typer.Option(min=20, help="Training steps; a PNode is killed after half of them.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of the rows.")] = 0,
) -> None:
    """Train a small language model on three PNodes, kill one halfway, and check that no bit was lost."""
    # Before gRPC is loaded: this process starts others later on.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from dcnr.adapters.text import python_corpus
    from dcnr.adapters.yaml_network import dump_network
    from dcnr.cli.story import Story
    from dcnr.network import templates
    from dcnr.network.analysis import analyse
    from dcnr.runtime.supervisor import LocalNetwork
    from dcnr.session.dataset import Manifest
    from dcnr.session.recipe import Cosine, Muon
    from dcnr.wiring import connect

    begun = time.monotonic()
    files = python_corpus()
    with tempfile.TemporaryDirectory(prefix="dcnr-demo-") as name:
        home = Path(name)
        say(f"starting one orchestrator and {PNODES} PNodes of one thread, each a process of its own")
        with LocalNetwork(home, PNODES, 1) as local, connect(local.address) as net:
            say(f"network at {local.address} after {time.monotonic() - begun:.1f} s")
            network_file = home / "demo.yaml"
            network_file.write_text(dump_network(templates.preset("demo").definition()))
            network, definition = net.network(net.create_network(network_file))
            analysed = analyse(definition)
            parameters = sum(math.prod(p.shape) for v in analysed.vnodes.values() for p in v.parameters)
            say(
                f"network file {network_file.name}: {len(definition.nodes)} VNodes, {parameters / 1e6:.1f} M parameters"
            )
            dataset, data = net.dataset(net.add_data(files, name="python", tokenizer="bpe:1024", split=0.05))
            manifest = Manifest.from_bytes(data)
            say(
                f"text: {len(files)} files of Python's standard library, {manifest.source_bytes / 1e6:.1f} MB, "
                f"{manifest.train.count:,} tokens, sha256 {manifest.text_sha256}"
            )
            run = net.train(
                network,
                dataset,
                steps=steps,
                batch_size=8,
                microbatches=4,
                optimizer=Muon(lr=1e-2),
                schedule=Cosine(warmup=20),
                clip_norm=1.0,
                checkpoint_every=15,
                eval_every=100,
                seed=seed,
            )
            say(f"session {run.id}: {steps} steps on {PNODES} PNodes")
            facts = Story(local, net, run, analysed, steps).tell()
            generate_text(net, run, facts)
            verify(local.address, facts)
    if not summary(facts, time.monotonic() - begun):
        raise typer.Exit(EXIT_FAILURE)


def generate_text(net: Client, run: Run, facts: Facts) -> None:
    """Text from the last commit, through the PNodes that are left."""
    from dcnr.cli.story import PROMPT, SAMPLE_TOKENS

    if facts.text_early:
        say(f"text from the first commit: {(PROMPT + facts.text_early)!r}")
    say("text through the network, from the last commit:")
    sys.stdout.write(f"  {PROMPT}")
    for piece in net.generate(run.id, PROMPT, 2 * SAMPLE_TOKENS, 0.8, 0.95, 1):
        facts.text += piece
        sys.stdout.write(piece.replace("\n", "\n  "))
        sys.stdout.flush()
    sys.stdout.write("\n")


def verify(address: str, facts: Facts) -> None:
    """Recompute the steps around the kill in one process and print both hashes."""
    from dcnr.cli.verify import recompute

    if facts.evidence is None:
        say("no commit after the kill, so nothing to verify")
        return
    evidence = facts.evidence
    say(f"recomputing steps {evidence.base_step + 1} to {evidence.last_step}, the kill among them, in one process")
    facts.verdict = recompute(address, evidence)
    say(f"sha256 of all states, network    {facts.verdict.sha256_network}")
    say(f"sha256 of all states, recomputed {facts.verdict.sha256_recomputed}")
    for difference in facts.verdict.differences[:5]:
        say(f"  {difference}")


def summary(facts: Facts, total_s: float) -> bool:
    """Print the judgement; ``True`` only if everything that the demo promises came true."""
    first, last = min(facts.losses, default=0), max(facts.losses, default=0)
    validations = "  ".join(f"{loss:.3f} ({step})" for step, loss in facts.validations)
    promises = [
        (
            "loss fell",
            facts.loss_fell,
            f"{facts.losses.get(first, 0.0):.3f} to {facts.losses.get(last, 0.0):.3f}; validation {validations}",
        ),
        (
            "kill survived",
            facts.survived,
            f"PNode {facts.killed} at step {facts.killed_at_step}; back to step {facts.base_step}, "
            f"{facts.replayed} steps replayed, {sum(p.ms for p in facts.recovery):,.0f} ms of recovery",
        ),
        (
            "bits equal",
            facts.equal,
            f"steps {facts.verdict.base_step + 1} to {facts.verdict.last_step}" if facts.verdict else "not verified",
        ),
        ("text from the network", bool(facts.text.strip()), f"{len(facts.text)} characters"),
    ]
    say("")
    print_table(("promise", "kept", "found"), ((n, "yes" if kept else "NO", found) for n, kept, found in promises))
    speed = facts.tokens / facts.train_s if facts.train_s else 0.0
    say(f"{last} steps in {facts.train_s:.0f} s of training, {speed:,.0f} tokens/s, {total_s:.0f} s in all")
    return all(kept for _, kept, _ in promises)
