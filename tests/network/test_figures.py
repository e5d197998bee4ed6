"""What a network costs, against sums by hand."""

from __future__ import annotations

from dcnr.ids import VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.figures import figures, tokens_per_row
from dcnr.network.memory import memory
from dcnr.network.templates import gpt, mlp
from tests.network.test_analysis import tied


def test_totals_parts_and_edges_of_a_perceptron() -> None:
    network = analyse(mlp(16, [32, 8], 4).definition())
    found = figures(network, rows=3, window=2, optimizer="sgd", momentum=0.0)
    sizes = [(16, 32), (32, 8), (8, 4)]
    assert found.total.parameters == sum(i * o + o for i, o in sizes)
    assert sum(part.parameters for part in found.vnodes) == found.total.parameters
    assert sum(part.flops_per_row for part in found.groups) == found.total.flops_per_row
    products = [part.flops_per_row for part in found.vnodes if network.vnodes[part.vnodes[0]].node.type == "linear"]
    assert products == [2 * i * o for i, o in sizes]
    assert found.tokens_per_row == 1
    assert found.flops_per_token == found.total.flops_per_row
    assert [e.bytes_per_row for e in found.edges] == [4 * size for size in (32, 32, 8, 8, 4)]
    assert [e.bytes_per_microbatch for e in found.edges] == [12 * size for size in (32, 32, 8, 8, 4)]
    assert all(e.gradient for e in found.edges)
    everything = memory(network, network.vnodes, rows=3, window=2, training=True, optimizer="sgd")
    assert found.total.training == everything
    assert found.total.serving.weights == 4 * found.total.parameters
    assert found.total.serving.total < found.total.training.total


def test_a_token_is_a_position_and_a_tied_weight_counts_once() -> None:
    network = analyse(gpt(layers=1, dim=32, heads=2, vocab=64, context=16).definition())
    found = figures(network, rows=1, window=2, optimizer="adamw", momentum=0.0)
    assert found.tokens_per_row == 16
    assert found.flops_per_token == found.total.flops_per_row / 16
    shared = figures(analyse(tied()), rows=1, window=2, optimizer="adamw", momentum=0.0)
    assert {part.vnodes: part.parameters for part in shared.vnodes}[(VNodeId("h"),)] == 0


def test_columns_of_class_numbers_are_no_text() -> None:
    """Targets are no inputs: only what enters counts."""
    assert tokens_per_row(analyse(mlp(16, [32], 4, "ce_logits").definition())) == 1
