"""Estimates of memory and work, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import MetricSpec
from dcnr.network.memory import edge_bytes, memory, unit_cost
from dcnr.network.node_type import HEAD_CHUNK
from dcnr.network.rewrite import TRAINING, rewritten
from dcnr.network.templates import mlp
from tests.network.test_analysis import tied

EMBEDDING, LINEAR = 9 * 4 * 4, (16 + 4) * 4


def estimate(vnodes, **options):
    return memory(analyse(tied()), vnodes, **{"rows": 2, "window": 3, "training": True, **options})


def test_weights_gradients_and_optimizer_state():
    everything = estimate(analyse(tied()).order)
    assert everything.weights == EMBEDDING + LINEAR
    assert everything.gradients == 2 * EMBEDDING + LINEAR, "the embedding has a sum per use"
    assert everything.optimizer == 2 * everything.weights
    assert everything.snapshot == everything.weights + everything.optimizer
    assert everything.total == sum(
        getattr(everything, part)
        for part in ("weights", "gradients", "optimizer", "snapshot", "activations", "transient")
    )


def test_an_update_ratio_compares_with_a_copy_of_the_nodes_weights():
    def transient(type, **options):
        graph = Graph("wide")
        graph.cost("mse", graph.attention(graph.input("x", [2, 64], "float32"), num_heads=1, id="a"), target="y")
        metrics = (MetricSpec(name="m", type=type, node_id="a"),)
        network = analyse(replace(graph.definition(), metrics=metrics))
        tensors = 2 * network.vnodes["a"].activation_bytes_per_row
        return memory(network, network.order, rows=1, window=1, **options).transient, tensors

    found, tensors = transient("weight_norm", training=True)
    assert found == 64 * 64 * 4 + tensors, "the gradient of one matrix"
    assert transient("update_ratio", training=True) == ((4 * 64 * 64 + 64) * 4, tensors)
    assert transient("update_ratio", training=False) == (tensors, tensors)


@pytest.mark.parametrize(("rows", "logits"), [(1, 16 * 65536), (8, HEAD_CHUNK)])
def test_a_task_holds_the_gradient_that_it_adds_and_a_heads_chunk(rows, logits):
    g = Graph("wide")
    h = g.embedder(g.input("tokens", [16], "int64"), vocab_size=65536, dim=64, position_encoding="none", alias="t")
    g.cost("ce_logits", g.linear(h, tie="t", bias=False), target="targets", id="loss")
    network = rewritten(analyse(g.definition()), TRAINING)
    for vnode, more in (("embedder", 0), ("loss", 2 * logits * 4)):
        tensors = 2 * rows * network.vnodes[vnode].activation_bytes_per_row
        found = memory(network, [vnode], rows=rows, window=1, training=True).transient
        assert found == tensors + more + 65536 * 64 * 4


def test_delay_and_optimizers():
    assert estimate(["e"], delay=1).gradients == 2 * 2 * EMBEDDING
    assert estimate(["a"], optimizer="muon").optimizer == 16 * 4 + 2 * 4 * 4
    assert estimate(["e"], optimizer="muon").optimizer == 2 * EMBEDDING
    assert estimate(["a"], optimizer="sgd").optimizer == 0
    assert estimate(["a"], optimizer="sgd", momentum=0.9).optimizer == LINEAR


def test_activations_grow_with_the_window_and_with_borders():
    network = analyse(tied())
    per_row = sum(network.vnodes[v].activation_bytes_per_row for v in ("a", "b"))
    # The tensor that arrives, and its gradient that leaves.
    arriving = 2 * edge_bytes(network, 0)
    assert edge_bytes(network, 0) == 6 * 4 * 4
    assert estimate(["a", "b"]).activations == 3 * 2 * (per_row + arriving)
    assert estimate(["a", "b"], window=1, rows=1).activations == per_row + arriving


def test_serving_keeps_weights_only():
    served = estimate(["a", "b"], training=False)
    assert (served.gradients, served.optimizer, served.snapshot) == (0, 0, 0)
    assert served.weights == LINEAR
    assert served.activations < estimate(["a", "b"]).activations


def test_work_is_additive():
    network = analyse(tied())
    groups = range(len(network.groups))
    assert unit_cost(network, groups) == sum(unit_cost(network, (group,)) for group in groups)
    assert unit_cost(network, (2,)) > network.vnodes["h"].flops_per_row


def test_bf16_is_two_bytes_where_nothing_adds_up():
    def found(param_precision, training=True):
        built = mlp(16, [32], 4, precision="bf16", param_precision=param_precision)
        network = analyse(built.definition())
        return network, memory(network, network.order, rows=1, window=1, training=training)

    count = (16 * 32 + 32) + (32 * 4 + 4)
    network, everything = found("")
    assert (everything.weights, everything.gradients, everything.optimizer) == (2 * count, 4 * count, 8 * count)
    assert everything.snapshot == 2 * count + 8 * count
    tensors = 2 * max(info.activation_bytes_per_row for info in network.vnodes.values())
    assert everything.transient == 4 * 16 * 32 + tensors, "a gradient is added up in float32"
    assert [edge_bytes(network, edge) for edge in range(3)] == [2 * 32, 2 * 32, 2 * 4]
    network, everything = found("float32")
    # What is computed with is a copy, which no checkpoint holds.
    assert (everything.weights, everything.gradients, everything.optimizer) == (6 * count, 4 * count, 8 * count)
    assert everything.snapshot == 4 * count + 8 * count
    assert found("float32", training=False)[1].weights == 6 * count
    assert found("", training=False)[1].weights == 2 * count


def test_an_update_of_bf16_takes_one_nodes_weights_in_float32():
    g = Graph("wide", "bf16")
    g.cost("mse", g.attention(g.input("x", [2, 64], "float32"), num_heads=1), target="y")
    network = analyse(g.definition())
    updating = memory(network, network.order, rows=1, window=1, training=True).transient
    assert updating == 4 * (4 * 64 * 64 + 64)


def test_nodes_that_cast_a_tied_weight_alike_share_the_copy():
    graph = Graph("tied", "bf16", "float32")
    made = graph.embedder(graph.input("tokens", [3], "int64"), vocab_size=9, dim=4, alias="w", position_encoding="none")
    for name in "ab":
        graph.cost("ce_logits", graph.linear(made, tie="w", bias=False), target=name)
    network = analyse(graph.definition())
    # The embedder takes its rows from the weight as it is stored.
    assert memory(network, network.order, rows=1, window=1, training=True).weights == (4 + 2) * 9 * 4
