"""The imperative builder, and the templates that are written with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dcnr.adapters.yaml_network import load_network
from dcnr.errors import InvalidNetwork
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import Position

EXAMPLES = Path(__file__).parents[2] / "examples"


def mine() -> Graph:
    g = Graph("mine")
    x = g.input("tokens", [128], "int64")
    h = g.embedder(x, vocab_size=96, dim=32, alias="tok")
    with g.colocate("block_0"):
        h = h + g.attention(g.layernorm(h), num_heads=4, head_dim=8)
        h = h + g.relu(h)
    g.cost("ce_logits", g.linear(h, tie="tok"), target="targets", weight=0.5)
    return g


def test_readable_ids_and_inferred_config():
    definition = mine().definition()
    assert [node.id for node in definition.nodes] == [
        "embedder",
        "block_0_layernorm",
        "block_0_attention",
        "block_0_add",
        "block_0_relu",
        "block_0_add_2",
        "linear",
        "cost",
    ]
    network = analyse(definition)
    assert network.vnodes["linear"].settings["out_dim"] == 96
    assert network.vnodes["linear"].tied_to == "embedder"
    assert network.vnodes["embedder"].settings["seq_len"] == 128
    assert [group.vnodes for group in network.groups][1] == tuple(node.id for node in definition.nodes[1:6])
    assert definition.costs[0].weight == 0.5
    assert definition.inputs[0].column == "tokens"


def test_residuals_feed_one_slot_to_several_nodes():
    network = analyse(mine().definition())
    assert [len(edges) for edges in network.vnodes["embedder"].out_edges] == [2]


def test_broadcast_returns_every_output():
    g = Graph()
    first, second = g.broadcast(g.input("x", [4], "float32"))
    g.output("sum", g.add(first, second, id="total"))
    assert g.definition().outputs[0].node_id == "total"


def test_one_input_at_two_nodes():
    g = Graph()
    x = g.input("x", [4], "float32", column="measurements")
    g.relu(x)
    g.gelu(x)
    assert [(i.name, i.node_id, i.column) for i in g.definition().inputs] == [
        ("x", "relu", "measurements"),
        ("x", "gelu", "measurements"),
    ]


def test_errors_name_the_callers_line():
    g = Graph()
    x = g.input("x", [4], "float32")
    with pytest.raises(InvalidNetwork) as caught:
        g.linear(x, in_dim=5, out_dim=2, id="bad")
    line = sys._getframe().f_lineno - 1
    (problem,) = caught.value.problems
    assert problem == f"{__file__}, line {line}: node 'bad': found input [4] float32, expected [.., 5] (in_dim)"
    made = g.relu(x)
    assert g.definition().nodes[0].at == Position(file=__file__, line=sys._getframe().f_lineno - 1)
    assert made.shape == (4,)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda g, x: g.linear(x), "config key 'out_dim': found nothing"),
        (lambda g, x: g.linear(x, tie="tok"), "found tie 'tok', expected an alias given before"),
        (lambda g, x: g.relu(x, x), "found 2 inputs, expected 1"),
        (lambda g, x: g.add(x), "found 1 inputs, expected two or more"),
        (lambda g, x: g.relu(Graph().input("x", [4], "float32")), "expected a tensor of this graph"),
        (lambda g, x: g.relu(g.relu(x, id="r"), id="r"), "found a second node of this id"),
        (lambda g, x: g.output("o", x), "expected the output of a node"),
        (lambda g, x: g.input("x", [4], "float32"), "input 'x': found it a second time"),
        (lambda g, x: g.dropout(x, rate=2), "config key 'rate': found 2, expected less than 1"),
    ],
)
def test_wrong_calls(call, expected):
    g = Graph()
    with pytest.raises(InvalidNetwork, match=expected):
        call(g, g.input("x", [4], "float32"))


def test_unknown_method():
    with pytest.raises(AttributeError, match=r"'lineer'.*expected 'linear'"):
        Graph().lineer  # noqa: B018


def test_from_definition_goes_on():
    definition = mine().definition()
    graph = Graph.from_definition(definition)
    assert graph.definition() == definition
    more = graph.input("more", [128], "int64")
    graph.embedder(more, tie="tok", id="again", position_encoding="none")
    assert analyse(graph.definition()).uses("embedder") == ("embedder", "linear")
    assert analyse(graph.definition()).vnodes["again"].tied_to == "embedder"


def test_summary_is_a_table():
    table = str(mine().summary())
    assert "block_0_attention" in table
    assert f"{mine().summary().parameters:,} parameters" in table


def test_gpt_demo_has_two_million_parameters():
    graph = templates.gpt(**templates.GPT_PRESETS["demo"])
    network = analyse(graph.definition())
    by_hand = 1024 * 192 + 4 * (2 * 2 * 192 + (4 * 192 * 192 + 192) + (8 * 192 * 192 + 5 * 192)) + 2 * 192
    assert graph.summary().parameters == by_hand == 1_974_144
    assert [group.vnodes[0] for group in network.groups if len(group.vnodes) > 1] == [
        f"block_{i}_layernorm" for i in range(4)
    ]
    std = {p.name: p.std for p in network.vnodes["block_0_attention"].parameters}
    assert std["o.weight"] == pytest.approx(0.02 / 8**0.5)
    assert std["q.weight"] == 0.02
    assert network.vnodes["head"].tied_to == "embedder"
    assert network.vnodes["head"].outputs[0].shape == (128, 1024)


def test_gpt_untied_with_dropout():
    network = analyse(
        templates.gpt(layers=2, dim=16, heads=2, vocab=32, context=8, dropout=0.1, tied=False).definition()
    )
    assert network.tie_classes() == ()
    assert sum(info.node.type == "dropout" for info in network.vnodes.values()) == 4
    assert network.vnodes["head"].trainable


def test_templates_in_float64():
    for graph in (templates.gpt(2, 16, 2, 32, 8, precision="float64"), templates.mlp(4, [8], 2, precision="float64")):
        infos = analyse(graph.definition()).vnodes.values()
        assert {p.dtype for info in infos for p in info.parameters} == {"float64"}


def test_mlp():
    network = analyse(templates.mlp(inputs=4, hidden=[8, 8], outputs=2).definition())
    assert network.order == ("linear_0", "relu_0", "linear_1", "relu_1", "output", "loss")
    assert network.cost_targets()[0].shape == (2,)
    assert analyse(templates.mlp(4, [8], 3, cost="ce_logits").definition()).cost_targets()[0].dtype == "int64"


@pytest.mark.parametrize(
    ("file", "graph"),
    [
        ("gpt-demo.yaml", templates.gpt(**templates.GPT_PRESETS["demo"])),
        ("mlp.yaml", templates.mlp(inputs=4, hidden=[32, 32], outputs=1)),
    ],
)
def test_examples_are_the_templates(file, graph):
    assert load_network(EXAMPLES / file) == graph.definition()
