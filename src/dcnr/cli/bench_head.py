"""``dcnr bench head``: the memory of a tied head with its cross entropy, as it is written and as it is trained.

As the main module it is the measured process: it trains one step of embedding, head and cost of the larger published
network, with one thread, and prints how far its memory rose above where it stood with weights and optimizer in place.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median
from typing import Any

import psutil

VOCAB, DIM, CONTEXT, ROWS = 32_768, 512, 512, 4
FORMS = ("written", "run")


def measure(rounds: int) -> list[dict[str, Any]]:
    """The benchmark's one line."""
    samples: dict[str, list[int]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            done = subprocess.run([sys.executable, "-m", __name__, form], capture_output=True, text=True, check=True)
            samples[form].append(int(done.stdout))
    value = median(samples["run"]) / median(samples["written"])
    return [
        {
            "bench": "head",
            "figure": "tied_head_memory",
            "value": round(value, 4),
            "unit": "ratio",
            "against": f"a linear and a cost of their own: [{ROWS}, {CONTEXT}, {DIM}] to a vocabulary of {VOCAB}, forward and "
            "backward, peak bytes above weights and optimizer",
            "goal": None,
            "holds": None,
            "samples": samples,
        }
    ]


def train_one_step(form: str) -> int:
    """Bytes that a step adds at its most, the gradients of the weights included: both forms have them."""
    from dcnr.adapters.torch.environment import prepare

    prepare(1)
    import numpy as np

    from dcnr.network.builder import Graph
    from dcnr.network.rewrite import TRAINING
    from dcnr.oracle import Trainer
    from dcnr.session.recipe import Recipe

    graph = Graph("head")
    hidden = graph.embedder(
        graph.input("tokens", [CONTEXT], "int64"), vocab_size=VOCAB, dim=DIM, position_encoding="none", alias="tok"
    )
    graph.cost("ce_logits", graph.linear(hidden, tie="tok", bias=False), target="targets")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, CONTEXT))
    trainer = Trainer(
        graph,
        Recipe(steps=1, batch_size=ROWS, microbatches=1),
        {"tokens": tokens, "targets": tokens},
        rewrites=TRAINING if form == "run" else (),
    )
    before = psutil.Process().memory_info().rss
    trainer.step()
    unit = 1 if sys.platform == "darwin" else 1024
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak - before


if __name__ == "__main__":
    sys.stdout.write(f"{train_one_step(sys.argv[1])}\n")
