"""What a PNode's memory is compared with in ``dcnr bench train``: its segment as a plain module with fused AdamW.

The argument is the file of the segment's definition. PyTorch is left as it is, the allocator too, with one thread. Reads
JSON requests from standard input, answers each with a line of resident bytes, the most of each measured step.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from dcnr.adapters.torch.backend import DTYPES
from dcnr.adapters.torch.module import to_torch
from dcnr.network.graph import from_canonical_json


def main() -> None:
    torch.set_num_threads(1)
    definition = from_canonical_json(Path(sys.argv[1]).read_bytes())
    # A network without a cost trains nothing by itself.
    module = to_torch(definition).requires_grad_()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)
    inputs = {entry.name: entry for entry in definition.inputs}
    process = psutil.Process()
    for line in sys.stdin:
        request = json.loads(line)
        count, in_flight, last = request["microbatches"], request["in_flight"], request["last"]
        rows = request["batch"] // count

        def fed(rows: int = rows) -> dict[str, Tensor]:
            """Token ids small enough for any vocabulary, or what a stage before would send, its gradient wanted."""
            return {
                name: torch.randint(2, (rows, *entry.shape))
                if entry.dtype == "int64"
                else torch.randn(rows, *entry.shape, dtype=DTYPES[entry.dtype], requires_grad=True)
                for name, entry in inputs.items()
            }

        def backward(output: Tensor, count: int = count, last: bool = last) -> None:
            if last:
                targets = torch.zeros(output.shape[:-1], dtype=torch.int64).flatten()
                torch.autograd.backward(functional.cross_entropy(output.flatten(0, 1), targets) / count)
            else:
                torch.autograd.backward(output, torch.randn_like(output))

        samples = []
        for step in range(request["dropped"] + request["measured"]):
            most, opened = 0, deque[Tensor]()
            for _ in range(count):
                opened.append(module(**fed()))
                most = max(most, process.memory_info().rss)
                if len(opened) == in_flight:
                    backward(opened.popleft())
            while opened:
                backward(opened.popleft())
            most = max(most, process.memory_info().rss)
            assert all(parameter.grad is not None for parameter in module.parameters())
            optimizer.step()
            optimizer.zero_grad()
            if step >= request["dropped"]:
                samples.append(most)
        sys.stdout.write(json.dumps(samples) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
