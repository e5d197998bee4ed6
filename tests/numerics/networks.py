"""Networks of these tests, written as plain definitions so that they depend on nothing but the analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network
from dcnr.network.graph import ConfigValue, CostSpec, Definition, Edge, InputSpec, Node, OutputSpec

Columns = dict[str, np.ndarray[Any, Any]]


class Sketch:
    """Collects nodes and edges; a slot that several edges read is allowed, so residuals need no broadcast."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []

    def node(self, id: str, type: str, *sources: str | tuple[str, int], **config: ConfigValue) -> str:
        self.nodes.append(Node(id=VNodeId(id), type=type, config=config))
        for slot, source in enumerate(sources):
            name, source_slot = source if isinstance(source, tuple) else (source, 0)
            self.edges.append(Edge(source=VNodeId(name), source_slot=source_slot, target=VNodeId(id), target_slot=slot))
        return id


def gpt(
    *,
    layers: int = 2,
    dim: int = 32,
    heads: int = 4,
    vocab: int = 40,
    context: int = 12,
    precision: str = "float32",
    param_precision: str = "",
    dropout: float = 0.0,
    tied: bool = True,
    explicit_broadcast: bool = False,
    output: bool = True,
) -> Definition:
    """Pre-norm GPT with rotary positions. The embedder ``tok`` owns the head's weight where ``tied``.

    Without ``output`` nobody asks for logits: a tied head and its cost are then trained as one node."""
    s = Sketch()
    alias: dict[str, ConfigValue] = {"shared_weight_alias": "tokens"} if tied else {}
    h = s.node("tok", "embedder", vocab_size=vocab, dim=dim, position_encoding="none", **alias)
    residual: str | tuple[str, int]
    inner: str | tuple[str, int]
    for i in range(layers):
        for part in ("attention", "mlp"):
            name = f"{part}{i}"
            residual = inner = h
            if explicit_broadcast:
                both = s.node(f"{name}_both", "broadcast", h, num_outputs=2)
                inner, residual = (both, 0), (both, 1)
            h = s.node(f"{name}_norm", "layernorm", inner, dim=dim)
            if part == "attention":
                h = s.node(name, "attention", h, num_heads=heads, dim=dim)
            else:
                h = s.node(f"{name}_up", "linear", h, in_dim=dim, out_dim=4 * dim)
                h = s.node(f"{name}_gelu", "gelu", h)
                h = s.node(name, "linear", h, in_dim=4 * dim, out_dim=dim)
            if dropout:
                h = s.node(f"{name}_drop", "dropout", h, rate=dropout)
            h = s.node(f"{name}_add", "add", residual, h)
    h = s.node("norm", "layernorm", h, dim=dim)
    tie: dict[str, ConfigValue] = {"tie_weight_alias": "tokens"} if tied else {}
    h = s.node("head", "linear", h, in_dim=dim, out_dim=vocab, bias=False, **tie)
    s.node("loss", "cost", h, cost_function="ce_logits")
    return Definition(
        name="gpt",
        precision=precision,
        param_precision=param_precision,
        inputs=(InputSpec(name="tokens", node_id=VNodeId("tok"), column="tokens", dtype="int64", shape=(context,)),),
        nodes=tuple(s.nodes),
        edges=tuple(s.edges),
        outputs=(OutputSpec(name="logits", node_id=VNodeId("head")),) if output else (),
        costs=(CostSpec(name="ce", node_id=VNodeId("loss"), target="targets"),),
    )


def with_config(definition: Definition, own: Mapping[str, Mapping[str, ConfigValue]]) -> Definition:
    """``definition`` with further keys for some nodes."""
    nodes = tuple(replace(n, config=dict(n.config) | dict(own.get(n.id, {}))) for n in definition.nodes)
    return replace(definition, nodes=nodes)


def mlp(*, precision: str = "float32", width: int = 16) -> Definition:
    """Two costs of different weights over one trunk with three readers of one slot."""
    s = Sketch()
    s.node("trunk", "linear", in_dim=8, out_dim=width)
    s.node("act", "relu", "trunk")
    for i in range(3):
        s.node(f"branch{i}", "linear", "act", in_dim=width, out_dim=width)
    s.node("sum", "add", "branch0", "branch1", "branch2")
    s.node("out", "linear", "sum", in_dim=width, out_dim=4)
    s.node("side", "linear", "act", in_dim=width, out_dim=5)
    s.node("distance", "cost", "out", cost_function="mse")
    s.node("class", "cost", "side", cost_function="ce_logits")
    return Definition(
        name="mlp",
        precision=precision,
        inputs=(InputSpec(name="x", node_id=VNodeId("trunk"), column="x", dtype="", shape=(8,)),),
        nodes=tuple(s.nodes),
        edges=tuple(s.edges),
        costs=(
            CostSpec(name="distance", node_id=VNodeId("distance"), target="y", weight=1.0),
            CostSpec(name="class", node_id=VNodeId("class"), target="label", weight=0.3),
        ),
    )


def token_rows(rows: int = 64, *, vocab: int = 40, context: int = 12, ignored: float = 0.0, seed: int = 0) -> Columns:
    """Random tokens; a share of the targets is ignored (-100)."""
    random = np.random.default_rng(seed)
    text = random.integers(0, vocab, (rows, context + 1))
    targets = np.where(random.random((rows, context)) < ignored, -100, text[:, 1:])
    return {"tokens": text[:, :-1].copy(), "targets": targets}


def mlp_rows(rows: int = 64, *, precision: str = "float32", seed: int = 0) -> Columns:
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(rows, 8)).astype(precision),
        "y": random.normal(size=(rows, 4)).astype(precision),
        "label": random.integers(0, 5, (rows,)),
    }


def placements(network: Network) -> dict[str, dict[VNodeId, str]]:
    """Ways to cut a network: whole, one host per placement unit, two halves, and hosts in turn (many small segments)."""
    unit_of = {}
    for index, groups in enumerate(network.placement_units()):
        for group in groups:
            for vnode in network.groups[group].vnodes:
                unit_of[vnode] = index
    units = max(unit_of.values()) + 1
    return {
        "whole": dict.fromkeys(unit_of, "a"),
        "units": {vnode: str(unit) for vnode, unit in unit_of.items()},
        "halves": {vnode: "a" if unit < units // 2 else "b" for vnode, unit in unit_of.items()},
        "turns": {vnode: "abc"[unit % 3] for vnode, unit in unit_of.items()},
    }
