"""Rewrites: what they recognise, what they leave alone, and that both forms are one network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.builder import Graph, Symbol
from dcnr.network.graph import Definition, MetricSpec, OutputSpec
from dcnr.network.rewrite import SERVING, TRAINING, as_run, as_written, computed_in, rewritten

HEADS = 3


def graph(
    *,
    explicit: bool = False,
    order: tuple[int, ...] = (0, 1, 2),
    tied: bool = True,
    precision: str = "float32",
    **changed: Any,
) -> Graph:
    """Heads by hand, stacked, and a head over a vocabulary. ``changed`` is config of the second attention head."""
    g = Graph("heads", precision)
    x = g.input("tokens", [6], "int64")
    h = g.embedder(x, vocab_size=11, dim=12, position_encoding="rope", alias="tok", id="tok")
    with g.colocate("block"):
        normed = g.rmsnorm(h, id="norm")
        read: tuple[Symbol, ...] = g.broadcast(normed, HEADS + 1) if explicit else (normed,) * (HEADS + 1)
        heads = [
            g.attention_head(read[i], id=f"h{i}", **{"head_dim": 4, "bias": True, **(changed if i == 1 else {})})
            for i in range(HEADS)
        ]
        stacked = g.stack(*(heads[i] for i in order), id="stack")
        h = h + g.linear(stacked, out_dim=12, id="project") + read[HEADS]
    logits = g.linear(h, tie="tok", bias=False, id="head") if tied else g.linear(h, out_dim=11, bias=False, id="head")
    g.cost("ce_logits", logits, target="targets", id="loss", label_smoothing=0.1)
    return g


def run(definition: Definition, names: tuple[str, ...] = TRAINING) -> Network:
    return rewritten(analyse(definition), names)


def test_what_a_rewrite_takes_in_says_where_it_went() -> None:
    written = analyse(graph().definition())
    heads = {f"h{number}": ("stack", "attention_heads") for number in range(HEADS)}
    assert computed_in(written, rewritten(written, TRAINING)) == {**heads, "head": ("loss", "tied_head")}
    assert computed_in(written, rewritten(written, SERVING)) == heads
    assert computed_in(written, written) == {}


def test_both_are_recognised() -> None:
    written = analyse(graph().definition())
    found = rewritten(written, TRAINING)
    assert found.id == written.id
    assert found.rewrites == ("attention_heads", "tied_head")
    assert found.heads == {"stack": ("h0", "h1", "h2")}
    kinds = {node.id: node.type for node in found.definition.nodes}
    assert kinds["stack"] == "attention"
    assert kinds["loss"] == "tied_lm_head_ce"
    assert not kinds.keys() & {"h0", "h1", "h2", "head"}
    attention, loss = found.vnodes[VNodeId("stack")], found.vnodes[VNodeId("loss")]
    assert {p.name: p.shape for p in attention.parameters} == {
        "q.weight": (12, 12),
        "q.bias": (12,),
        "k.weight": (12, 12),
        "k.bias": (12,),
        "v.weight": (12, 12),
        "v.bias": (12,),
    }
    assert attention.settings["colocate_group"] == "block"
    assert loss.tied_to == "tok"
    assert loss.settings["label_smoothing"] == 0.1
    assert found.uses(VNodeId("tok")) == ("tok", "loss")
    assert sum(p.elements for v in found.vnodes.values() for p in v.parameters) == sum(
        p.elements for v in written.vnodes.values() for p in v.parameters
    )


def test_serving_keeps_the_logits() -> None:
    found = run(graph().definition(), SERVING)
    assert found.rewrites == ("attention_heads",)
    assert VNodeId("head") in found.vnodes


def test_nothing_is_named_that_changes_nothing() -> None:
    definition = graph(tied=False, head_dim=4, causal=False).definition()
    written = analyse(definition)
    assert rewritten(written, TRAINING) is written


@pytest.mark.parametrize("explicit", [False, True])
def test_heads_may_read_one_slot_or_those_of_a_broadcast(explicit: bool) -> None:
    assert run(graph(explicit=explicit).definition()).heads == {"stack": ("h0", "h1", "h2")}


def test_heads_come_in_the_order_of_the_stack() -> None:
    assert run(graph(order=(2, 0, 1)).definition()).heads == {"stack": ("h2", "h0", "h1")}


@pytest.mark.parametrize(
    "changed",
    [
        {"causal": False},
        {"bias": False},
        {"lr_scale": 0.5},
        {"trainable": False},
        {"rope_theta": 100.0},
        {"init_std": 0.1},
    ],
)
def test_heads_that_differ_are_left_alone(changed: dict[str, Any]) -> None:
    assert run(graph(**changed).definition()).rewrites == ("tied_head",)


@pytest.mark.parametrize(
    ("optimizer", "rewrites"), [("muon", ("tied_head",)), ("sgd", ("attention_heads", "tied_head"))]
)
def test_heads_of_muon_are_left_alone(optimizer: str, rewrites: tuple[str, ...]) -> None:
    """It orthogonalises each node's matrices: one stacked matrix is another training."""
    definition = graph().definition()
    nodes = (
        replace(node, config={**node.config, "optimizer": optimizer}) if node.type == "attention_head" else node
        for node in definition.nodes
    )
    assert run(replace(definition, nodes=tuple(nodes))).rewrites == rewrites


def _with_output(definition: Definition, node: str) -> Definition:
    return replace(definition, outputs=(OutputSpec(name="out", node_id=VNodeId(node)),))


@pytest.mark.parametrize("node", ["h1", "stack"])
def test_an_attention_that_is_an_output_is_left_alone(node: str) -> None:
    assert run(_with_output(graph().definition(), node)).rewrites == ("tied_head",)


def test_logits_that_are_an_output_are_left_alone() -> None:
    assert run(_with_output(graph().definition(), "head")).rewrites == ("attention_heads",)


def test_what_a_metric_names_is_left_alone() -> None:
    definition = graph().definition()
    metrics = tuple(MetricSpec(name=node, type="learning_rate", node_id=VNodeId(node)) for node in ("h0",))
    assert run(replace(definition, metrics=metrics)).rewrites == ("tied_head",)


def test_a_head_that_somebody_else_reads_is_left_alone() -> None:
    g = Graph("read")
    x = g.input("x", [6, 8], "float32")
    h = g.relu(x)
    heads = [g.attention_head(h, head_dim=4) for _ in range(2)]
    g.cost("mse", g.stack(*heads), target="y")
    g.cost("mse", heads[0], target="z")
    assert run(g.definition()).rewrites == ()


def test_heads_of_different_readings_are_left_alone() -> None:
    g = Graph("apart")
    x = g.input("x", [6, 8], "float32")
    heads = [g.attention_head(g.relu(x), head_dim=4), g.attention_head(g.gelu(x), head_dim=4)]
    g.cost("mse", g.stack(*heads), target="y")
    assert run(g.definition()).rewrites == ()


def test_a_rewritten_network_is_a_network() -> None:
    """It can be analysed again, and rewriting it again changes nothing."""
    found = run(graph().definition())
    again = analyse(found.definition)
    assert again.definition == found.definition
    assert rewritten(again, TRAINING) is again


def test_tensors_go_from_one_form_to_the_other_and_back() -> None:
    found = run(graph(order=(2, 0, 1)).definition())
    random = np.random.default_rng(0)
    held = {
        f"{vnode}.{spec.name}": random.normal(size=spec.shape)
        for vnode, info in found.vnodes.items()
        for spec in info.parameters
    }
    written = as_written(found, held, lambda array, first, last: array[first:last])
    expected = analyse(graph(order=(2, 0, 1)).definition())
    assert {key: array.shape for key, array in written.items()} == {
        f"{vnode}.{spec.name}": spec.shape for vnode, info in expected.vnodes.items() for spec in info.parameters
    }
    assert np.array_equal(written["h2.q.weight"], held["stack.q.weight"][:4])
    back = as_run(found, written, np.concatenate)
    assert back.keys() == held.keys()
    assert all(np.array_equal(back[key], held[key]) for key in held)
