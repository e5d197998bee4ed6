"""The imperative builder, and the templates that are written with it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

import dcnr
from dcnr.adapters.yaml_network import dump_network, load_network
from dcnr.errors import InvalidNetwork
from dcnr.ids import VNodeId
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import Definition, Position, canonical_json
from dcnr.network.rewrite import TRAINING, rewritten

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
        (lambda g, x: g.input("y", [4], "float23"), "input 'y': found dtype 'float23', expected 'float32'"),
        (lambda g, x: g.input("y", [4, 0], "int64"), r"input 'y': found shape \[4, 0\], expected sizes of 1 to"),
        (lambda g, x: g.input("y", "4", "int64"), "input 'y': found shape '4'"),
        (lambda g, x: g.input("y", [True], "int64"), "input 'y': found shape"),
        (lambda g, x: g.input("", [4], "int64"), "input '': expected a name"),
        (lambda g, x: g.relu(x, id=3), "node 3: expected a string as its id"),
        (lambda g, x: g.relu(3), "node 'relu': found 3, expected a tensor of this graph"),
        (lambda g, x: x + 3, "node 'add': found 3, expected a tensor of this graph"),
    ],
)
def test_wrong_calls(call, expected):
    g = Graph()
    with pytest.raises(InvalidNetwork, match=expected) as caught:
        call(g, g.input("x", [4], "float32"))
    line = call.__code__.co_firstlineno
    assert all(problem.startswith(f"{__file__}, line {line}: ") for problem in caught.value.problems)


def test_what_only_the_whole_shows_names_the_lines_too():
    g = Graph()
    x = g.input("x", [4], "float32")
    h = g.relu(x)
    g.output("twice", h)
    g.output("twice", h)
    g.cost("mse", h, target="")
    line = sys._getframe().f_lineno
    with pytest.raises(InvalidNetwork) as caught:
        g.definition()
    assert caught.value.problems == (
        f"{__file__}, line {line - 2}: node 'relu': found output 'twice' a second time, expected a name of its own",
        f"{__file__}, line {line - 1}: node 'cost': found cost 'cost' without target, expected a column's name",
    )


def test_templates_name_the_line_that_called_them():
    with pytest.raises(InvalidNetwork) as caught:
        templates.mlp(0, [2], 2)
    assert caught.value.problems[0].startswith(f"{__file__}, line {sys._getframe().f_lineno - 1}: input ")


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


def test_summary_is_a_table_with_totals():
    g = Graph("small")
    x = g.input("x", [4], "float32")
    h = g.linear(x, out_dim=8, trainable=False, alias="w", id="first")
    g.linear(h, out_dim=3, id="aside")
    g.cost("mse", g.linear(h, out_dim=2, id="last"), target="y")
    assert str(g.summary()).splitlines() == [
        "node   type    output shape  parameters  MFLOP/row  group",
        "---------------------------------------------------------",
        "first  linear  [8]                   40        0.0      0",
        "aside  linear  [3]                   27        0.0      1",
        "last   linear  [2]                   18        0.0      2",
        "cost   cost    []                     0        0.0      3",
        "---------------------------------------------------------",
        "small               4 nodes, 4 kernel groups, float32",
        "parameters          85",
        "trained             18",
        "size of parameters  0.0 MiB",
        "forward of one row  0.0 MFLOP",
    ]
    assert (g.summary().parameters, g.summary().trained) == (85, 18)


def test_gpt_demo_has_two_million_parameters():
    graph = templates.preset("demo")
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


@pytest.mark.parametrize(
    ("preset", "nodes", "parameters"), [("published-small", 139, 27_176_448), ("published-large", 183, 45_135_360)]
)
def test_published_topologies(preset, nodes, parameters):
    network = analyse(templates.preset(preset).definition())
    assert len(network.vnodes) == nodes
    assert sum(p.elements for info in network.vnodes.values() for p in info.parameters) == parameters
    assert sum(info.node.type == "attention_head" for info in network.vnodes.values()) % 8 == 0
    run = rewritten(network, TRAINING)
    assert run.rewrites == ("attention_heads", "tied_head")
    assert sum(info.node.type == "attention" for info in run.vnodes.values()) == (6 if preset.endswith("small") else 8)
    # A block is one kernel group before and after; only the head has become one with its cost.
    assert len(run.groups) == len(network.groups) - 1


def test_llama():
    network = analyse(templates.llama(layers=2, dim=64, heads=8, vocab=32, context=8).definition())
    by_hand = 2 * 32 * 64 + 2 * (2 * 64 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192) + 64
    assert sum(p.elements for info in network.vnodes.values() for p in info.parameters) == by_hand
    attention = network.vnodes["block_0_attention"].settings
    assert (attention["num_heads"], attention["num_kv_heads"], attention["out_bias"]) == (8, 4, False)
    tied = analyse(templates.llama(layers=1, dim=64, heads=4, vocab=32, context=8, tied=True).definition())
    assert tied.vnodes["head"].tied_to == "embedder"


def test_mlp():
    network = analyse(templates.mlp(inputs=4, hidden=[8, 8], outputs=2).definition())
    assert network.order == ("linear_0", "relu_0", "linear_1", "relu_1", "output", "loss")
    assert network.cost_targets()[0].shape == (2,)
    assert analyse(templates.mlp(4, [8], 3, cost="ce_logits").definition()).cost_targets()[0].dtype == "int64"


@pytest.mark.parametrize(
    ("file", "graph"),
    [
        ("gpt-demo.yaml", templates.preset("demo")),
        ("mlp.yaml", templates.mlp(inputs=4, hidden=[32, 32], outputs=1)),
        ("digits.yaml", templates.mlp(inputs=64, hidden=[64, 64], outputs=10, cost="ce_logits")),
        ("llama.yaml", templates.llama(layers=4, dim=128, heads=4, vocab=1024, context=64)),
        ("published-small.yaml", templates.preset("published-small")),
        ("published-large.yaml", templates.preset("published-large")),
    ],
)
def test_examples_are_the_templates(file, graph):
    assert load_network(EXAMPLES / file) == graph.definition()


def views() -> Graph:
    """Lists of numbers in configs, several inputs, aliases of types, costs with weights."""
    g = Graph("views", "float64")
    x, y = g.input("x", [4, 6], "float64", column="left"), g.input("y", [6, 4], "float64")
    h = g.transpose(g.stack(x, g.transpose(y, axes="[1, 0]"), axis=0), axes=(1, 0))
    g.output("flat", g.reshape(h, target_shape=[-1, 3]))
    for part in g.broadcast(h, num_outputs=2):
        g.cost("mse", g.dense(part, out_dim=2, init_std=1 / 3), target="z", weight=0.1)
    return g


@pytest.mark.parametrize(
    "graph",
    [
        mine(),
        views(),
        templates.preset("demo"),
        templates.gpt(layers=2, dim=16, heads=2, vocab=32, context=8, dropout=0.1, tied=False, precision="float64"),
        templates.mlp(inputs=4, hidden=[8, 8], outputs=2),
        *(dcnr.load(path) for path in sorted(EXAMPLES.glob("*.yaml"))),
    ],
    ids=lambda graph: graph.name,
)
def test_load_and_to_yaml_round_trip(graph: Graph, tmp_path: Path):
    path = tmp_path / "net.yaml"
    path.write_text(graph.to_yaml())
    again = dcnr.load(path)
    assert again.definition() == graph.definition()
    assert analyse(again.definition()).id == analyse(graph.definition()).id
    assert again.to_yaml() == graph.to_yaml()


def test_a_loaded_graph_names_its_file(tmp_path: Path):
    path = tmp_path / "net.yaml"
    path.write_text(mine().to_yaml())
    graph = dcnr.load(path)
    graph.output("embedder", graph.relu(graph.input("more", [2], "float32")))
    graph.output("embedder", graph.relu(graph.input("again", [2], "float32")))
    with pytest.raises(InvalidNetwork, match=f"{__file__}, line .*'relu_2': found output 'embedder' a second time"):
        graph.definition()
    assert dcnr.load(path).definition().nodes[1].at == Position(file="net.yaml", line=9, column=3)


def test_a_weight_of_a_cost_has_one_form() -> None:
    def made(weight: Any) -> Definition:
        g = Graph("weighted")
        g.cost("mse", g.linear(g.input("x", [4], "float32"), out_dim=2), target="y", weight=weight)
        return g.definition()

    assert canonical_json(made(2)) == canonical_json(made(2.0))
    assert type(made(2).costs[0].weight) is float
    for weight, found in ((True, "True"), ("2", "'2'"), (math.nan, "nan"), (10**400, "an integer of 1329 bits")):
        with pytest.raises(InvalidNetwork, match=f"found weight {found} at cost 'cost', expected a finite number"):
            made(weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 5}, "cost target: found int, expected a text"),
        ({"target": "\ud800"}, r"cost target: found '\\ud800', expected printable characters"),
        ({"target": "y" * 2000}, "of 2000 characters, expected at most 1000"),
    ],
)
def test_texts_are_texts(change: dict[str, Any], said: str) -> None:
    g = Graph("texts")
    g.cost("mse", g.linear(g.input("x", [4], "float32"), out_dim=2), **{"target": "y", **change})
    with pytest.raises(InvalidNetwork, match=said):
        g.definition()


def test_two_parameters_never_have_one_key() -> None:
    g = Graph("keys")
    x = g.input("x", [4, 8], "float32")
    first, second = g.attention(x, num_heads=2, id="a"), g.linear(x, out_dim=8, bias=False, id="a.q")
    g.cost("mse", first + second, target="y")
    with pytest.raises(
        InvalidNetwork, match=r"node 'a.q': found parameter 'a.q.weight' of node 'a' too, expected another"
    ):
        g.definition()


def test_an_input_may_be_a_single_number() -> None:
    g = Graph("class")
    h = g.embedder(g.input("class", [], "int64"), vocab_size=4, dim=3, position_encoding="none", id="e")
    g.cost("mse", h, target="y")
    definition = g.definition()
    assert definition.inputs[0].shape == ()
    assert analyse(definition).vnodes[VNodeId("e")].outputs[0].shape == (3,)
    assert load_network(dump_network(definition)) == definition
    limited = Graph("limited")
    with pytest.raises(InvalidNetwork, match=r"found input \[\] int64, expected \[T\] with T <= 5"):
        limited.embedder(limited.input("class", [], "int64"), vocab_size=4, dim=3, seq_len=5)


def test_a_tied_linear_has_no_bias_unless_it_is_asked_for() -> None:
    """So that the shortest way to write a tied head is one that is computed with its cost."""

    def rewrites(**config: Any) -> tuple[str, ...]:
        g = Graph("tied")
        h = g.embedder(g.input("tokens", [6], "int64"), vocab_size=9, dim=4, alias="tok", position_encoding="none")
        g.cost("ce_logits", g.linear(h, tie="tok", **config), target="targets")
        return rewritten(analyse(g.definition()), TRAINING).rewrites

    assert rewrites() == ("tied_head",)
    assert rewrites(bias=True) == ()
