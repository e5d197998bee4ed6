"""Ready-made networks, as graphs that can be read, changed and built on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcnr.errors import UsageError
from dcnr.network.builder import Graph, Symbol
from dcnr.network.node_type import INIT_STD

GPT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # 2.0 M parameters: what one CPU core trains to text that looks like Python in two minutes.
    "demo": {"layers": 4, "dim": 192, "heads": 6, "vocab": 1024, "context": 128},
}


def gpt(
    layers: int = 6,
    dim: int = 256,
    heads: int = 8,
    vocab: int = 4096,
    context: int = 128,
    dropout: float = 0.0,
    tied: bool = True,
    name: str = "gpt",
    precision: str = "float32",
) -> Graph:
    """A decoder in pre-norm form (Radford et al., 2019) with rotary positions (Su et al., 2021).

    Takes int64 ``tokens`` [context] and ``targets`` [context], gives ``logits`` [context, vocab]. Each block is one kernel group
    ``block_<i>``. Projections that end a residual branch start at 0.02 / sqrt(2 * layers). ``tied``: the head is the embedding.
    """
    if dim % heads:
        raise UsageError(f"dim {dim} is not divisible by {heads} heads")
    graph = Graph(name, precision)
    residual_std = INIT_STD / math.sqrt(2 * layers)
    tokens = graph.input("tokens", [context], "int64")
    alias = "token_embedding" if tied else None
    hidden = graph.embedder(tokens, vocab_size=vocab, dim=dim, position_encoding="none", alias=alias, id="embedder")

    def dropped(x: Symbol) -> Symbol:
        return graph.dropout(x, rate=dropout) if dropout > 0 else x

    for block in range(layers):
        with graph.colocate(f"block_{block}"):
            mixed = graph.attention(graph.layernorm(hidden), num_heads=heads, output_init_std=residual_std)
            hidden = hidden + dropped(mixed)
            wide = graph.gelu(graph.linear(graph.layernorm(hidden), out_dim=4 * dim))
            hidden = hidden + dropped(graph.linear(wide, out_dim=dim, init_std=residual_std))
    final = graph.layernorm(hidden, id="final_layernorm")
    if tied:
        logits = graph.linear(final, tie=alias, bias=False, id="head")
    else:
        logits = graph.linear(final, out_dim=vocab, bias=False, id="head")
    graph.output("logits", logits)
    graph.cost("ce_logits", logits, target="targets", id="loss")
    return graph


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    cost: str = "mse",
    name: str = "mlp",
    precision: str = "float32",
) -> Graph:
    """Linear layers with relu between them: column ``x`` [inputs] to column ``y`` ([outputs] for mse, a class for ce_logits)."""
    graph = Graph(name, precision)
    current = graph.input("x", [inputs], precision)
    for index, width in enumerate(hidden):
        current = graph.linear(current, out_dim=width, id=f"linear_{index}")
        current = graph.relu(current, id=f"relu_{index}")
    result = graph.linear(current, out_dim=outputs, id="output")
    graph.output("prediction", result)
    graph.cost(cost, result, target="y", id="loss")
    return graph
