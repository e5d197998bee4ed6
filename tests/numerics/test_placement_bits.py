"""However kernel groups are joined into segments, every bit is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import ConfigValue, Definition
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, WSD, Adam, AdamW, Cosine, Linear, Muon, Optimizer, Recipe
from tests.numerics.networks import Columns, gpt, mlp, mlp_rows, placements, token_rows, with_config

OPTIMIZERS = {
    "adamw": AdamW(lr=1e-2, weight_decay=0.1),
    "adam": Adam(lr=1e-2),
    "sgd": SGD(lr=0.1, momentum=0.9),
    "muon": Muon(lr=1e-2, weight_decay=0.1),
}


def _run(
    network: Network, rows: Columns, optimizer: Optimizer, placement: dict[VNodeId, str] | None
) -> tuple[dict[VNodeId, bytes], list[tuple[float, float]]]:
    recipe = Recipe(
        steps=6, batch_size=8, microbatches=4, optimizer=optimizer, schedule=Cosine(warmup=2), clip_norm=0.5
    )
    trainer = Trainer(network, recipe, rows, placement=placement)
    results = trainer.run(6)
    return trainer.state_objects(), [(result.loss, result.grad_scale) for result in results]


def _colocated(definition: Definition) -> Definition:
    """Both layers' feed-forward parts as required groups: kernel groups of several VNodes."""
    nodes = []
    for node in definition.nodes:
        config = dict(node.config)
        if node.id.startswith("mlp"):
            config |= {"colocate_group": node.id[:4], "colocate_policy": "required"}
        nodes.append(replace(node, config=config))
    return replace(definition, nodes=tuple(nodes))


@pytest.mark.parametrize("output", [True, False], ids=["logits", "no logits"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tied_gpt_with_dropout_clipping_and_microbatches(optimizer: str, output: bool) -> None:
    rows = token_rows(ignored=0.2)
    network = Trainer(gpt(dropout=0.1, output=output), Recipe(steps=6), rows).network
    assert ("tied_head" in network.rewrites) is not output
    whole = _run(network, rows, OPTIMIZERS[optimizer], None)
    assert any(scale < 1.0 for _, scale in whole[1])
    for placement in placements(network).values():
        assert _run(network, rows, OPTIMIZERS[optimizer], placement) == whole


MIXED: Mapping[str, Mapping[str, ConfigValue]] = {
    "attention0": {"activation_precision": "float32", "optimizer": "muon"},
    "mlp0_gelu": {"precision": "float64"},
    "mlp1": {"param_precision": "bf16", "activation_precision": "float64", "optimizer": "sgd"},
    "loss": {"cost_precision": "float64"},
}
"""Every way for a node to differ from a bf16 network with weights of float32."""


@pytest.mark.parametrize(
    "definition",
    [
        gpt(explicit_broadcast=True, tied=False),
        _colocated(gpt(dropout=0.2)),
        gpt(precision="float64"),
        gpt(precision="bf16", dropout=0.2),
        _colocated(gpt(precision="bf16", param_precision="float32", explicit_broadcast=True)),
        with_config(gpt(precision="bf16", param_precision="float32"), MIXED),
    ],
)
def test_other_forms_of_the_network(definition: Definition) -> None:
    network, rows = analyse(definition), token_rows()
    whole = _run(network, rows, OPTIMIZERS["adamw"], None)
    for placement in placements(network).values():
        assert _run(network, rows, OPTIMIZERS["adamw"], placement) == whole


def test_three_readers_of_a_slot_and_two_costs() -> None:
    network, rows = analyse(mlp()), mlp_rows()
    whole = _run(network, rows, OPTIMIZERS["sgd"], None)
    for placement in placements(network).values():
        assert _run(network, rows, OPTIMIZERS["sgd"], placement) == whole


def test_clipping_by_vnode_and_other_schedules() -> None:
    network, rows = analyse(gpt(dropout=0.1)), token_rows(ignored=0.2)
    recipe = Recipe(steps=6, batch_size=8, microbatches=4, optimizer=AdamW(lr=1e-2), clip_norm=0.05)
    ways = [replace(recipe, clip_scope="vnode", schedule=schedule) for schedule in (Linear(warmup=2), WSD(warmup=2))]
    found = set()
    for way in (recipe, *ways):
        whole = Trainer(network, way, rows)
        results = whole.run(6)
        for placement in placements(network).values():
            other = Trainer(network, way, rows, placement=placement)
            assert other.run(6) == results
            assert other.state_objects() == whole.state_objects()
        found.add(whole.state_objects()[VNodeId("tok")])
    assert len(found) == 3, "schedule and scope reach the weights"


def test_a_frozen_vnode_never_changes() -> None:
    definition = gpt()
    nodes = tuple(
        replace(n, config=dict(n.config) | {"trainable": False}) if n.id in ("attention0", "tok") else n
        for n in definition.nodes
    )
    network, rows = analyse(replace(definition, nodes=nodes)), token_rows()
    initial = Trainer(network, Recipe(steps=6), rows).state_objects()
    whole = _run(network, rows, OPTIMIZERS["adamw"], None)
    same = {vnode for vnode, data in whole[0].items() if data == initial[vnode]}
    assert same == {"attention0", "tok"}
    for placement in placements(network).values():
        assert _run(network, rows, OPTIMIZERS["adamw"], placement) == whole


def test_order_of_edges_is_the_order_of_the_fold() -> None:
    """The check above can fail: another order of the file's edges gives other bits."""
    definition = mlp()
    other = replace(definition, edges=tuple(reversed(definition.edges)))
    rows = mlp_rows()
    first = _run(analyse(definition), rows, OPTIMIZERS["sgd"], None)[0]
    second = _run(analyse(other), rows, OPTIMIZERS["sgd"], None)[0]
    assert first[VNodeId("trunk")] != second[VNodeId("trunk")]


def test_going_on_from_state_objects_gives_the_same_bits() -> None:
    network, rows = analyse(gpt(dropout=0.1)), token_rows()
    recipe = Recipe(steps=6, batch_size=8, microbatches=2, optimizer=OPTIMIZERS["muon"], schedule=Cosine())
    straight = Trainer(network, recipe, rows)
    first = straight.run(3)
    resumed = Trainer(network, recipe, rows, placement=placements(network)["halves"])
    resumed.load_states(3, straight.state_objects())
    assert straight.run(3) == resumed.run(3)
    assert straight.state_objects() == resumed.state_objects()
    assert [result.step for result in first] == [1, 2, 3]
