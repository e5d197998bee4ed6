"""One rank of ``torch.distributed.pipelining`` in ``dcnr bench train``: 1F1B over gloo, one thread, fused AdamW.

Arguments: rank, the rendezvous file, one file with the definition of every stage. Reads JSON requests from standard
input, answers each with a line of tokens per second, one for each measured step. Every rank gets every request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from dcnr.adapters.torch.environment import prepare
from dcnr.network.graph import Definition, from_canonical_json
from dcnr.network.node_type import integer

_TIMEOUT = timedelta(seconds=180)
"""A rank whose partner ended must not wait for gloo's half hour."""


def main() -> None:
    rank, rendezvous = int(sys.argv[1]), Path(sys.argv[2])
    stages = [from_canonical_json(Path(name).read_bytes()) for name in sys.argv[3:]]
    prepare(int(os.environ["OMP_NUM_THREADS"]))
    import torch
    from torch import Tensor, distributed, nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.nn import functional

    from dcnr.adapters.torch.backend import DTYPES
    from dcnr.adapters.torch.module import to_torch

    class Stage(nn.Module):
        """Takes its one input by position, as the schedules want it."""

        def __init__(self, definition: Definition) -> None:
            super().__init__()
            # A network without a cost trains nothing by itself.
            self.network = to_torch(definition).requires_grad_()
            (self.name,) = {entry.name for entry in definition.inputs}

        def forward(self, tensor: Tensor) -> Tensor:
            result: Tensor = self.network(**{self.name: tensor})
            return result

    torch.set_deterministic_debug_mode("default")
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(stages), timeout=_TIMEOUT
    )
    module = Stage(stages[rank])
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)
    (context,) = stages[0].inputs[0].shape
    vocab = integer(next(n.config for n in stages[0].nodes if n.type == "embedder"), "vocab_size")
    entering = stages[rank].inputs[0]

    for line in sys.stdin:
        request = json.loads(line)
        batch, count = request["batch"], request["microbatches"]
        # Shapes, dtypes and what needs a gradient; the schedule reads no more of them.
        example = torch.zeros(
            batch // count, *entering.shape, dtype=DTYPES[entering.dtype], requires_grad=entering.dtype != "int64"
        )
        made = module(example).detach().requires_grad_()
        pipeline = PipelineStage(
            module, rank, len(stages), torch.device("cpu"), input_args=(example,), output_args=(made,)
        )

        def loss(logits: Tensor, targets: Tensor, count: int = count) -> Tensor:
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / count

        # The loss is divided instead, which costs a pass over the gradients less.
        schedule = Schedule1F1B(pipeline, count, loss_fn=loss, scale_grads=False)
        torch.manual_seed(0)
        tokens = torch.randint(vocab, (batch, context + 1))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        samples = []
        for step in range(request["dropped"] + request["measured"]):
            started = time.perf_counter()
            if rank == 0:
                schedule.step(inputs)
            else:
                schedule.step(target=targets)
            # The schedule passes over what it takes for untrained in silence.
            assert all(parameter.grad is not None for parameter in module.parameters())
            optimizer.step()
            optimizer.zero_grad()
            if step >= request["dropped"]:
                samples.append(batch * context / (time.perf_counter() - started))
        sys.stdout.write(json.dumps(samples) + "\n")
        sys.stdout.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
