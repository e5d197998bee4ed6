"""What a definition must satisfy as a whole: edges, slots, cycles, ties, kernel groups, gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from dcnr.errors import InvalidNetwork
from dcnr.ids import VNodeId
from dcnr.network.analysis import NAMED_MOST, analyse
from dcnr.network.graph import (
    MetricSpec,
    OutputSpec,
    Position,
    canonical_json,
    from_canonical_json,
    network_id,
)
from tests.network.graphs import cost, edge, entry, network, node, problems


def tied(**head):
    """Embedding, block of two, head tied to the embedding, cost."""
    return network(
        node("e", "embedder", vocab_size=9, dim=4, seq_len=6, position_encoding="none", shared_weight_alias="tok"),
        node("a", "linear", in_dim=4, out_dim=4, colocate_group="g", colocate_policy="required"),
        node("b", "relu", colocate_group="g", colocate_policy="required"),
        node("h", "linear", **{"in_dim": 4, "out_dim": 9, "bias": False, "tie_weight_alias": "tok", **head}),
        node("c", "cost", cost_function="ce_logits"),
        edge("e", "a"),
        edge("a", "b"),
        edge("b", "h"),
        edge("h", "c"),
        cost("c"),
    )


def test_all_problems_are_reported_with_node_and_line():
    definition = network(
        replace(node("a", "linear", in_dim=4), at=Position(line=3)),
        replace(node("b", "relu"), at=Position(line=4)),
        replace(node("b", "relu"), at=Position(line=5)),
        replace(edge("a", "nowhere"), at=Position(line=7)),
        replace(edge("b", "a", 1, 2), at=Position(line=8)),
        replace(entry("a", dtype="int8"), at=Position(line=9)),
        replace(cost("b", target=""), at=Position(line=11)),
        outputs=(OutputSpec(name="out", node_id="b", slot_id=3, at=Position(line=10)),),
        metrics=(MetricSpec(name="m", type="speed", node_id="q", at=Position(line=12)),),
    )
    assert problems(definition) == (
        "line 3: node 'a': config key 'out_dim': found nothing, expected an integer",
        "line 5: node 'b': found a second node of this id, expected one (the first is at line 4)",
        "line 7: node 'nowhere': found no such node at edge 'a' -> 'nowhere', expected the id of a node",
        "line 8: node 'b': found output slot 1 at edge 'b' -> 'a', expected slot 0",
        "line 8: node 'a': found input slot 2 at edge 'b' -> 'a', expected slot 0",
        "line 9: node 'a': found input 'x' of dtype 'int8', expected one of float32, float64, int64",
        "line 4: node 'b': found nothing at input slot 0, expected an edge or an input",
        "line 5: node 'b': found nothing at input slot 0, expected an edge or an input",
        "line 10: node 'b': found output slot 3 at output 'out', expected slot 0",
        "line 11: node 'b': found type 'relu' at cost 'loss', expected a node of type 'cost'",
        "line 12: node 'q': found no such node at metric 'm', expected the id of a node",
        "line 11: node 'b': found cost 'loss' without target, expected a column's name",
    )


def test_a_slot_takes_one_feed():
    base = (node("a", "relu"), node("b", "relu"), entry("a"))
    assert "fed a second time" in problems(network(*base, edge("a", "b"), edge("a", "b")))[0]
    assert "fed a second time" in problems(network(*base, edge("a", "b"), entry("b", name="y")))[0]
    assert "found nothing at input slot 0" in problems(network(*base))[0]


def test_add_takes_slots_without_gaps():
    base = (node("a", "relu"), node("s", "add"), entry("a"), edge("a", "s"))
    assert problems(network(*base)) == ("node 's': found 1 inputs, expected two or more",)
    assert problems(network(*base, edge("a", "s", 0, 2))) == (
        "node 's': found nothing at input slot 1, expected an edge or an input",
    )
    shapes = network(*base, node("l", "linear", in_dim=4, out_dim=3), edge("a", "l"), edge("l", "s", 0, 1))
    assert problems(shapes) == ("node 's': found input [3] float32 at slot 1, expected [4] float32 as at slot 0",)


def test_cycle_is_named():
    definition = network(
        node("i", "relu"),
        node("s", "add"),
        node("r", "relu"),
        node("after", "relu"),
        entry("i"),
        edge("i", "s"),
        edge("r", "s", 0, 1),
        edge("s", "r"),
        edge("r", "after"),
    )
    assert problems(definition) == ("node 's': found a cycle: 's' -> 'r' -> 's', expected none",)


def test_given_shapes_are_checked():
    right = replace(node("a", "linear", in_dim=4, out_dim=3), input_shapes=((4,),), output_shapes=((3,),))
    assert analyse(network(right, entry("a")))
    wrong = replace(right, output_shapes=((5,),))
    assert problems(network(wrong, entry("a"))) == ("node 'a': output_shapes: found [[5]], expected [[3]]",)


def test_costs_and_outputs():
    lone = network(node("c", "cost", cost_function="mse"), entry("c"))
    assert problems(lone) == ("node 'c': found no entry in costs, expected one that names its target",)
    shown = replace(lone, costs=(cost("c"),), outputs=(OutputSpec(name="o", node_id="c"),))
    assert "losses are reported anyway" in problems(shown)[0]
    further = network(node("c", "cost", cost_function="mse"), node("r", "relu"), entry("c"), edge("c", "r"), cost("c"))
    assert any("expected no edge from a cost" in text for text in problems(further))
    assert analyse(network(node("r", "relu"), entry("r"))).definition.costs == ()


def test_empty_and_too_large():
    assert "nodes: found none, expected at least one" in problems(network())
    many = network(*(node(f"n{i}", "relu") for i in range(10_001)))
    assert problems(many) == ("nodes: found 10001, expected at most 10000",)
    assert problems(network(node("r", "relu"), entry("r"), precision="bfloat16")) == (
        "precision: found 'bfloat16', expected one of float32, float64, bf16",
    )


def test_ties():
    analysed = analyse(tied())
    head, owner = analysed.vnodes["h"], analysed.vnodes["e"]
    assert (head.tied_to, head.parameters, head.trainable) == ("e", (), False)
    assert (owner.tied_to, owner.trainable) == (None, True)
    assert analysed.uses("e") == ("e", "h")
    assert analysed.uses("h") == ()
    assert analysed.folds == {"e", "a", "h"}
    assert analysed.tie_classes() == (("e", "h"),)
    assert analysed.placement_units() == ((0, 2), (1,), (3,))


def test_tied_node_may_own_a_bias():
    analysed = analyse(tied(bias=True))
    assert [p.name for p in analysed.vnodes["h"].parameters] == ["bias"]
    assert analysed.uses("h") == ("h",)
    assert analysed.uses("e") == ("e", "h")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"tie_weight_alias": "token"}, "node 'h': found tie_weight_alias 'token', expected 'tok'"),
        ({"out_dim": 8}, "node 'h': found a tied weight of shape [8, 4], expected [9, 4] as at its owner 'e'"),
        ({"optimizer": "adam"}, "node 'h': config key 'optimizer': found it at a tied node"),
        ({"trainable": True}, "node 'h': config key 'trainable': found it at a tied node"),
        ({"shared_weight_alias": "z"}, "node 'h': found shared_weight_alias and tie_weight_alias, expected one"),
        (
            {"shared_weight_alias": "tok", "tie_weight_alias": None},
            "node 'h': found shared_weight_alias 'tok' a second time",
        ),
    ],
)
def test_bad_ties(head, expected):
    assert any(text.startswith(expected) for text in problems(tied(**head)))


def test_alias_needs_a_weight():
    bad = network(node("r", "relu", shared_weight_alias="w"), entry("r"))
    assert problems(bad) == (
        "node 'r': found shared_weight_alias at type 'relu', expected it at a type whose weight can be shared",
    )


def test_frozen_owner_is_folded_by_nobody():
    definition = tied()
    frozen = replace(definition.nodes[0], config={**definition.nodes[0].config, "trainable": "false"})
    analysed = analyse(replace(definition, nodes=(frozen, *definition.nodes[1:])))
    assert analysed.uses("e") == ()
    assert analysed.folds == {"a"}
    # Nothing trainable lies before the first edge, so no gradient runs there.
    assert analysed.gradient_edges == {1, 2, 3}


def test_gradient_edges_need_a_cost_after_and_a_parameter_before():
    analysed = analyse(
        network(
            node("i", "relu"),
            node("l", "linear", in_dim=4, out_dim=4),
            node("aside", "linear", in_dim=4, out_dim=4),
            node("c", "cost", cost_function="mse"),
            entry("i"),
            cost("c"),
            edge("i", "l"),
            edge("l", "aside"),
            edge("l", "c"),
        )
    )
    assert analysed.gradient_edges == {2}
    assert not analysed.vnodes["aside"].trainable
    assert analysed.vnodes["l"].trainable


def test_required_group_is_cut_into_connected_pieces():
    def grouped(name):
        return node(name, "relu", colocate_group="g", colocate_policy="required")

    analysed = analyse(
        network(
            grouped("a"),
            grouped("b"),
            node("m", "relu"),
            grouped("c"),
            node("d", "relu"),
            entry("a"),
            *(edge(*pair) for pair in pairwise("abmcd")),
        )
    )
    assert [group.vnodes for group in analysed.groups] == [("a", "b"), ("m",), ("c",), ("d",)]
    assert analysed.placement_units() == ((0, 2), (1,), (3,))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"colocate_group": "g"}, "config key 'colocate_group': found it without colocate_policy, expected both"),
        (
            {"colocate_policy": "required"},
            "config key 'colocate_policy': found it without colocate_group, expected both",
        ),
        (
            {"colocate_group": "g", "colocate_policy": "preferred"},
            "config key 'colocate_policy': found 'preferred', expected one of required",
        ),
    ],
)
def test_what_would_bind_nothing_is_refused(config, said):
    assert problems(network(node("a", "relu", **config), entry("a"))) == (f"node 'a': {said}",)


def test_group_in_a_cycle_is_refused():
    def grouped(name, group):
        return node(name, "add" if name == "z" else "relu", colocate_group=group, colocate_policy="required")

    definition = network(
        grouped("a", "g"),
        node("m", "relu"),
        grouped("z", "g"),
        entry("a"),
        edge("a", "m"),
        edge("m", "z"),
        edge("a", "z", 0, 1),
    )
    (found,) = problems(definition)
    assert found == (
        "node 'a': found required colocation group 'g' in a cycle: group 'g' -> node 'm' -> group 'g', "
        "expected groups that can be computed one after the other"
    )


def test_a_cycle_among_many_groups_is_named_once_for_the_first_of_them():
    """Every message names the cycle, so that all of 100 would be 100 times as long as one."""
    nodes = [
        node(f"{side}{i}", "add", colocate_group=f"g{i}", colocate_policy="required")
        for i in range(100)
        for side in "ab"
    ]
    edges = [edge(f"a{i}", f"b{i}") for i in range(100)] + [
        edge(f"a{i}", f"b{(i + 1) % 100}", 0, 1) for i in range(100)
    ]
    inputs = [entry(f"a{i}", name=f"x{i}{slot}", slot=slot) for i in range(100) for slot in range(2)]
    found = problems(network(*nodes, *edges, *inputs))
    assert len(found) == NAMED_MOST
    assert "group 'g0' -> group 'g1' -> " in found[0]
    assert "-> 81 more ->" in found[0]


def test_order_keeps_groups_together_whatever_the_file_order():
    required = {"colocate_group": "g", "colocate_policy": "required"}
    definition = network(
        node("i", "relu"),
        node("x1", "relu"),
        node("g1", "relu", **required),
        node("x2", "relu"),
        node("g2", "relu", **required),
        entry("i"),
        edge("i", "x1"),
        edge("i", "g1"),
        edge("x1", "x2"),
        edge("g1", "g2"),
    )
    analysed = analyse(definition)
    assert analysed.order == ("i", "x1", "g1", "g2", "x2")
    assert [info.group for info in map(analysed.vnodes.get, analysed.order)] == [0, 1, 2, 2, 3]


def test_one_tensor_may_enter_at_several_nodes():
    def two(shape):
        return network(node("a", "relu"), node("b", "relu"), entry("a"), entry("b", shape))

    assert len(analyse(two((4,))).definition.inputs) == 2
    assert "a second time with another column, dtype or shape" in problems(two((5,)))[0]


def test_canonical_form_round_trips():
    analysed = analyse(tied())
    data = canonical_json(analysed.definition)
    assert from_canonical_json(data) == analysed.definition
    assert analyse(from_canonical_json(data)).id == analysed.id == network_id(analysed.definition)


def test_ten_thousand_nodes():
    """A chain with a group every seven nodes; the file lists it backwards."""
    count = 10_000
    nodes = [
        node(f"n{i}", "relu", colocate_group=f"g{i // 7}", colocate_policy="required") for i in reversed(range(count))
    ]
    analysed = analyse(network(*nodes, entry("n0"), *(edge(f"n{i}", f"n{i + 1}") for i in range(count - 1))))
    assert analysed.order[:2] == ("n0", "n1")
    assert len(analysed.groups) == 1429
    hosts = {vnode: str(info.group % 3) for vnode, info in analysed.vnodes.items()}
    assert len(analysed.segments(hosts)) == 1429
    with pytest.raises(InvalidNetwork, match="found a cycle"):
        analyse(network(*nodes, *(edge(f"n{i}", f"n{(i + 1) % count}") for i in range(count))))


@pytest.mark.parametrize("type", ["learning_rate", "grad_norm", "weight_norm", "update_ratio"])
def test_metrics_of_weights_need_a_node_that_trains_weights(type: str) -> None:
    def metric(name: str) -> MetricSpec:
        return MetricSpec(name=name, type=type, node_id=VNodeId(name), at=Position(line=7))

    definition = tied(bias=True)
    assert analyse(replace(definition, metrics=(metric("e"), metric("a"), metric("h")))).metrics.keys() == {
        "e",
        "a",
        "h",
    }
    expected = "expected a node with trainable parameters, its own or tied ones"
    for without in ("b", "c"):
        assert problems(replace(definition, metrics=(metric(without),))) == (
            f"line 7: node '{without}': found {type} at metric '{without}' of a node without any, {expected}",
        )
    (measured,) = analyse(replace(tied(), metrics=(metric("h"),))).metrics
    assert measured == "e", "the tied weight is the embedder's, which knows all its gradients"
    nodes = tuple(
        replace(n, config=dict(n.config) | {"trainable": False}) if n.id == "a" else n for n in definition.nodes
    )
    assert problems(replace(definition, nodes=nodes, metrics=(metric("a"),))) == (
        f"line 7: node 'a': found {type} at metric 'a' of a node that is frozen, {expected}",
    )


def test_activation_rms_needs_an_output_slot_of_floating_point() -> None:
    def metric(node_id: str, slot_id: int = 0) -> MetricSpec:
        return MetricSpec(
            name="m", type="activation_rms", node_id=VNodeId(node_id), slot_id=slot_id, at=Position(line=7)
        )

    assert analyse(replace(tied(), metrics=(metric("b"),))).metrics == {"b": (metric("b"),)}
    assert problems(replace(tied(), metrics=(metric("b", 1),))) == (
        "line 7: node 'b': found output slot 1 at metric 'm', expected slot 0",
    )
    assert problems(replace(tied(), metrics=(metric("c"),))) == (
        "line 7: node 'c': found activation_rms at metric 'm' of a cost, expected another node: "
        "losses are reported anyway",
    )
    definition = network(
        node("p", "broadcast", num_outputs=1),
        node("e", "embedder", vocab_size=9, dim=4, seq_len=6, position_encoding="none"),
        edge("p", "e"),
        entry("p", name="tokens", dtype="int64", shape=(6,)),
    )
    assert problems(replace(definition, metrics=(metric("p"),))) == (
        "line 7: node 'p': found activation_rms at metric 'm' of an output of int64, expected one of floating point",
    )
