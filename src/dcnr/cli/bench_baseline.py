"""The baseline of ``dcnr bench train``: the same network as a plain module in one process, eager, fused AdamW.

Reads JSON requests from standard input, answers each with a line of tokens per second, one for each measured step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from dcnr.adapters.torch.environment import prepare
from dcnr.network.graph import from_canonical_json
from dcnr.network.node_type import integer


def main() -> None:
    # The same allocator settings as a PNode's: they speed the baseline up too.
    prepare(int(os.environ["OMP_NUM_THREADS"]))
    import torch
    from torch.nn import functional

    from dcnr.adapters.torch.module import to_torch

    torch.set_deterministic_debug_mode("default")
    definition = from_canonical_json(Path(sys.argv[1]).read_bytes())
    module = to_torch(definition)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)
    (context,) = definition.inputs[0].shape
    vocab = integer(next(n.config for n in definition.nodes if n.type == "embedder"), "vocab_size")
    for line in sys.stdin:
        request = json.loads(line)
        batch, count = request["batch"], request["microbatches"]
        tokens = torch.randint(vocab, (batch, context + 1))
        slices = [(part[:, :-1].contiguous(), part[:, 1:].flatten()) for part in tokens.chunk(count)]
        samples = []
        for step in range(request["dropped"] + request["measured"]):
            started = time.perf_counter()
            for inputs, targets in slices:
                logits = module(tokens=inputs)
                (functional.cross_entropy(logits.flatten(0, 1), targets) / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= request["dropped"]:
                samples.append(batch * context / (time.perf_counter() - started))
        sys.stdout.write(json.dumps(samples) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
