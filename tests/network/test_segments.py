"""Segments of random graphs under random placements, and of one graph by hand."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, reject, settings

from dcnr.errors import InvalidNetwork
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import Definition
from dcnr.network.node_type import TensorSpec
from tests.network.graphs import cost, edge, entry, network, node
from tests.network.test_analysis import tied

HOSTS = ("A", "B", "C")


@st.composite
def definitions(draw: st.DrawFn) -> Definition:
    """Random DAGs of one-input nodes and adds with random required groups, in a random file order."""
    count = draw(st.integers(2, 12))
    nodes, parts = [], []
    for position in range(count):
        sources = draw(st.lists(st.integers(0, position - 1), max_size=3)) if position else []
        group = draw(st.sampled_from((None, None, "g", "h")))
        config = {} if group is None else {"colocate_group": group, "colocate_policy": "required"}
        frozen = {"trainable": draw(st.booleans())}
        if len(sources) > 1:
            nodes.append(node(f"n{position}", "add", **config))
        elif draw(st.booleans()):
            nodes.append(node(f"n{position}", "linear", in_dim=2, out_dim=2, **config, **frozen))
        else:
            nodes.append(node(f"n{position}", "relu", **config))
        if not sources:
            parts.append(entry(f"n{position}", (2,), name=f"x{position}"))
        parts.extend(edge(f"n{source}", f"n{position}", 0, slot) for slot, source in enumerate(sources))
    for position in draw(st.sets(st.integers(0, count - 1), max_size=2)):
        nodes.append(node(f"c{position}", "cost", cost_function="mse"))
        parts.extend((edge(f"n{position}", f"c{position}"), cost(f"c{position}", name=f"loss{position}")))
    return network(*draw(st.permutations(nodes)), *draw(st.permutations(parts)))


@st.composite
def placed(draw: st.DrawFn) -> tuple[Network, dict[str, str]]:
    definition = draw(definitions())
    try:
        analysed = analyse(definition)
    except InvalidNetwork as refusal:
        # The only fault that these graphs can have: others are raised on.
        if not all("in a cycle" in text for text in refusal.problems):
            raise
        reject()
    placement = {}
    for unit in analysed.placement_units():
        host = draw(st.sampled_from(HOSTS))
        placement.update({vnode: host for group in unit for vnode in analysed.groups[group].vnodes})
    return analysed, placement


@settings(max_examples=200, deadline=None)
@given(placed())
def test_segments_of_random_placements(case: tuple[Network, dict[str, str]]) -> None:
    analysed, placement = case
    edges = analysed.definition.edges
    place = {vnode: index for index, vnode in enumerate(analysed.order)}
    assert sorted(place) == sorted(analysed.vnodes)
    assert all(place[e.source] < place[e.target] for e in edges)
    groups = [analysed.vnodes[vnode].group for vnode in analysed.order]
    assert groups == sorted(groups), "groups are contiguous and in topological order"

    segments = analysed.segments(placement)
    assert sorted(v for s in segments for v in s.vnodes) == sorted(analysed.vnodes)
    where = {vnode: segment.index for segment in segments for vnode in segment.vnodes}
    assert [segment.index for segment in segments] == list(range(len(segments)))
    for group in analysed.groups:
        assert len({where[vnode] for vnode in group.vnodes}) == 1
    for index, e in enumerate(edges):
        source, target = segments[where[e.source]], segments[where[e.target]]
        crosses = source.index != target.index
        assert source.index <= target.index, "the quotient is acyclic and segments are in its order"
        assert (index in source.out_edges) == crosses == (index in target.in_edges)
        bears = index in analysed.gradient_edges
        assert (index in source.grads_in) == (crosses and bears) == (index in target.grads_out)
    for segment in segments:
        assert all(placement[vnode] == segment.host for vnode in segment.vnodes)
        assert list(segment.vnodes) == sorted(segment.vnodes, key=place.__getitem__)
        assert segment.backward == bool(segment.grads_out or segment.folds)
        assert {where[analysed.definition.inputs[i].node_id] for i in segment.inputs} <= {segment.index}
        assert {where[analysed.definition.costs[i].node_id] for i in segment.costs} <= {segment.index}
    assert sorted(i for s in segments for i in s.inputs) == list(range(len(analysed.definition.inputs)))
    assert sorted(i for s in segments for i in s.costs) == list(range(len(analysed.definition.costs)))


@settings(max_examples=100, deadline=None)
@given(placed())
def test_gradient_edges_by_their_definition(case: tuple[Network, dict[str, str]]) -> None:
    analysed, _ = case
    edges = analysed.definition.edges
    costs = {c.node_id for c in analysed.definition.costs}

    def closure(start: set[str], forward: bool) -> set[str]:
        found = set(start)
        while True:
            further = {e.target if forward else e.source for e in edges if (e.source if forward else e.target) in found}
            if further <= found:
                return found
            found |= further

    for index, e in enumerate(edges):
        upstream = closure({e.source}, forward=False)
        trained = any(
            info.node.config.get("trainable", True) and info.parameters
            for info in (analysed.vnodes[vnode] for vnode in upstream)
        )
        reaches = bool(closure({e.target}, forward=True) & costs)
        assert (index in analysed.gradient_edges) == (trained and reaches)


def test_three_segments_by_hand() -> None:
    analysed = analyse(tied())
    first, second, third = analysed.segments({"e": "A", "a": "B", "b": "B", "h": "A", "c": "A"})
    assert (first.host, first.vnodes, first.states, first.inputs) == ("A", ("e",), ("e",), (0,))
    assert (first.out_edges, first.grads_in, first.grads_out, first.folds) == ((0,), (0,), (), ("e",))
    assert (second.host, second.vnodes, second.states) == ("B", ("a", "b"), ("a",))
    assert (second.in_edges, second.out_edges, second.grads_out, second.grads_in) == ((0,), (2,), (0,), (2,))
    # The head reads its owner's state, which another segment of this host holds too.
    assert (third.vnodes, third.states, third.folds, third.costs) == (("h", "c"), ("e",), ("h",), (0,))
    assert third.backward
    assert first.by_reference
    assert third.by_reference
    assert not second.by_reference


def test_segments_come_in_the_order_of_their_quotient() -> None:
    """The last VNode of the second chain joins a segment whose first VNode comes early in the network's order."""
    chains = [("p0", "p1", "p2"), ("q0", "q1", "q2")]
    analysed = analyse(
        network(
            *(node(vnode, "relu") for chain in chains for vnode in chain),
            *(edge(chain[i], chain[i + 1]) for chain in chains for i in range(2)),
            entry("p0", name="p"),
            entry("q0", name="q"),
        )
    )
    found = analysed.segments({"p0": "A", "p1": "B", "p2": "C", "q0": "B", "q1": "A", "q2": "C"})
    assert [segment.vnodes for segment in found] == [("p0",), ("q0",), ("p1",), ("q1",), ("p2", "q2")]


def test_serving_leaves_costs_out() -> None:
    analysed = analyse(tied())
    hosts = dict.fromkeys(analysed.order, "A")
    (segment,) = analysed.segments(hosts, only=frozenset(analysed.order) - {"c"})
    assert segment.vnodes == ("e", "a", "b", "h")
    assert (segment.out_edges, segment.costs, segment.inputs) == ((), (), (0,))
    assert analysed.vnodes["h"].outputs == (TensorSpec(shape=(6, 9), dtype="float32"),)
