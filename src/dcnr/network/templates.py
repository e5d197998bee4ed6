"""Ready-made networks, as graphs that can be read, changed and built on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcnr.errors import UsageError
from dcnr.network.builder import Graph, Symbol
from dcnr.network.node_type import INIT_STD


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
    param_precision: str = "",
) -> Graph:
    """A decoder in pre-norm form (Radford et al., 2019) with rotary positions (Su et al., 2021).

    Takes int64 ``tokens`` [context] and ``targets`` [context], gives ``logits`` [context, vocab]. Each block is one kernel group
    ``block_<i>``. Projections that end a residual branch start at 0.02 / sqrt(2 * layers). ``tied``: the head is the embedding.
    """
    if dim % heads:
        raise UsageError(f"dim {dim} is not divisible by {heads} heads")
    graph = Graph(name, precision, param_precision)
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


def llama(
    layers: int = 6,
    dim: int = 256,
    heads: int = 8,
    kv_heads: int | None = None,
    vocab: int = 4096,
    context: int = 128,
    hidden: int | None = None,
    tied: bool = False,
    name: str = "llama",
    precision: str = "float32",
    param_precision: str = "",
) -> Graph:
    """A decoder as in Touvron et al., 2023: rmsnorm, rotary positions, grouped heads (Ainslie et al., 2023), swiglu, no biases.

    Takes and gives what :func:`gpt` does. ``kv_heads``: heads of keys and values, half of ``heads`` where it is even.
    ``hidden``: width of the feed-forward, 8/3 of ``dim`` in steps of 32. Its first linear holds the value, then the gate.
    """
    if dim % heads:
        raise UsageError(f"dim {dim} is not divisible by {heads} heads")
    graph = Graph(name, precision, param_precision)
    residual_std = INIT_STD / math.sqrt(2 * layers)
    kv_heads = kv_heads or (heads // 2 if heads % 2 == 0 else heads)
    hidden = hidden or 32 * math.ceil(8 * dim / 3 / 32)
    tokens = graph.input("tokens", [context], "int64")
    alias = "token_embedding" if tied else None
    x = graph.embedder(tokens, vocab_size=vocab, dim=dim, position_encoding="rope", alias=alias, id="embedder")
    for block in range(layers):
        with graph.colocate(f"block_{block}"):
            x = x + graph.attention(
                graph.rmsnorm(x), num_heads=heads, num_kv_heads=kv_heads, out_bias=False, output_init_std=residual_std
            )
            wide = graph.swiglu(graph.linear(graph.rmsnorm(x), out_dim=2 * hidden, bias=False))
            x = x + graph.linear(wide, out_dim=dim, bias=False, init_std=residual_std)
    final = graph.rmsnorm(x, id="final_rmsnorm")
    shared: dict[str, Any] = {"tie": alias} if tied else {"out_dim": vocab}
    logits = graph.linear(final, bias=False, id="head", **shared)
    graph.output("logits", logits)
    graph.cost("ce_logits", logits, target="targets", id="loss")
    return graph


def published(
    layers: int = 6,
    dim: int = 512,
    heads: int = 8,
    vocab: int = 10_000,
    context: int = 128,
    dropout: float = 0.1,
    name: str = "published",
    precision: str = "float32",
    param_precision: str = "",
) -> Graph:
    """A decoder whose attention heads are nodes of their own, whose every fan-out is a ``broadcast``, and whose tied head
    comes after a gated layer.

    Takes ``tokens`` and ``targets`` [context]. It declares no output, so that in training the logits are never held whole;
    generation reads them at the cost. Each block is one kernel group.
    """
    if dim % heads:
        raise UsageError(f"dim {dim} is not divisible by {heads} heads")
    graph = Graph(name, precision, param_precision)
    residual_std = INIT_STD / math.sqrt(2 * layers)
    tokens = graph.input("tokens", [context], "int64")
    x = graph.embedder(
        tokens, vocab_size=vocab, dim=dim, position_encoding="rope", alias="token_embedding", id="embedder"
    )
    for block in range(layers):
        with graph.colocate(f"block_{block}"):
            inner, residual = graph.broadcast(x)
            readings = graph.broadcast(graph.layernorm(inner), heads)
            mixed = graph.stack(*(graph.attention_head(reading, head_dim=dim // heads) for reading in readings))
            projected = graph.linear(mixed, out_dim=dim, init_std=residual_std)
            x = residual + graph.dropout(projected, rate=dropout)
            inner, residual = graph.broadcast(x)
            wide = graph.gelu(graph.linear(graph.layernorm(inner), out_dim=4 * dim))
            narrow = graph.linear(wide, out_dim=dim, init_std=residual_std)
            x = residual + graph.dropout(narrow, rate=dropout)
    wide = graph.linear(graph.layernorm(x, id="final_layernorm"), out_dim=8 * dim, id="head_up")
    narrow = graph.linear(graph.swiglu(wide, id="head_gate"), out_dim=dim, id="head_down")
    logits = graph.linear(narrow, tie="token_embedding", bias=False, id="logits")
    graph.cost("ce_logits", logits, target="targets", id="loss")
    return graph


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    cost: str = "mse",
    name: str = "mlp",
    precision: str = "float32",
    param_precision: str = "",
) -> Graph:
    """Linear layers with relu between them: column ``x`` [inputs] to column ``y`` ([outputs] for mse, a class for ce_logits)."""
    graph = Graph(name, precision, param_precision)
    current = graph.input("x", [inputs], "float64" if precision == "float64" else "float32")
    for index, width in enumerate(hidden):
        current = graph.linear(current, out_dim=width, id=f"linear_{index}")
        current = graph.relu(current, id=f"relu_{index}")
    result = graph.linear(current, out_dim=outputs, id="output")
    graph.output("prediction", result)
    graph.cost(cost, result, target="y", id="loss")
    return graph


PRESETS: Mapping[str, tuple[str, Callable[..., Graph], Mapping[str, Any]]] = {
    # 2.0 M parameters: what one CPU core trains to text that looks like Python in two minutes.
    "demo": ("gpt", gpt, {"layers": 4, "dim": 192, "heads": 6, "vocab": 1024, "context": 128}),
    # 27 M and 45 M parameters.
    "published-small": ("gpt", published, {"layers": 6, "vocab": 10_000, "context": 128}),
    "published-large": ("gpt", published, {"layers": 8, "vocab": 32_768, "context": 512}),
}
"""By name: the template that they belong to, what builds them, and their sizes."""


def preset(name: str, **changed: Any) -> Graph:
    """A network of :data:`PRESETS`, with some of its sizes ``changed``."""
    _, build, sizes = PRESETS[name]
    return build(**{**sizes, **changed})
