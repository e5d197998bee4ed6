"""The oracle's own rules: what it refuses, and that evaluation disturbs nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dcnr.errors import ComputeError, InvalidData, UsageError
from dcnr.ids import VNodeId
from dcnr.network.builder import Graph
from dcnr.oracle import Trainer
from dcnr.session.recipe import Adam, AdamW, Recipe
from tests.numerics.networks import gpt, mlp, mlp_rows, token_rows

RECIPE = Recipe(steps=10, batch_size=8, microbatches=2, optimizer=AdamW(lr=1e-2))


def test_it_learns() -> None:
    rows = token_rows(8, vocab=4)
    losses = [result.loss for result in Trainer(gpt(vocab=4), replace(RECIPE, steps=30), rows).run(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_graph_and_its_definition_are_the_same_network() -> None:
    definition, rows = gpt(), token_rows()
    graph = Trainer(Graph.from_definition(definition), RECIPE, rows)
    assert graph.step() == Trainer(definition, RECIPE, rows).step()


def test_evaluation_changes_nothing_and_drops_nothing() -> None:
    rows = token_rows(8)
    one, two = (Trainer(gpt(dropout=0.5), RECIPE, rows) for _ in range(2))
    before = one.loss(rows)
    assert one.loss(rows) == before
    assert one.step() == two.step()
    # The same node ids have the same weights; only dropout differs, and evaluation has none.
    assert Trainer(gpt(), RECIPE, rows).loss(rows) == before
    assert Trainer(gpt(dropout=0.5), RECIPE, rows).step().loss != before


def test_the_loss_is_the_weighted_sum_of_costs() -> None:
    rows = mlp_rows(8)
    definition = mlp()
    both = Trainer(definition, RECIPE, rows).loss(rows)
    single = []
    for index in (0, 1):
        costs = tuple(replace(c, weight=1.0 if i == index else 0.0) for i, c in enumerate(definition.costs))
        single.append(Trainer(replace(definition, costs=costs), RECIPE, rows).loss(rows))
    assert both == pytest.approx(single[0] + 0.3 * single[1], rel=1e-6)


def test_state_dict_names_a_tied_weight_once() -> None:
    names = Trainer(gpt(layers=1), RECIPE, token_rows()).state_dict().keys()
    assert "tok.weight" in names
    assert "head.weight" not in names
    assert "attention0.q.weight" in names


def test_what_is_refused() -> None:
    with pytest.raises(InvalidData, match="4 rows are fewer than a batch of 8"):
        Trainer(gpt(), RECIPE, token_rows(4))
    with pytest.raises(InvalidData, match="no column 'targets'"):
        Trainer(gpt(), RECIPE, {"tokens": token_rows()["tokens"]}).step()
    with pytest.raises(InvalidData, match="no column 'targets'"):
        Trainer(gpt(), RECIPE, token_rows()).loss({"tokens": token_rows()["tokens"]})
    with pytest.raises(InvalidData, match="one common number of rows"):
        Trainer(gpt(), RECIPE, {"tokens": np.zeros((9, 2)), "targets": np.zeros((8, 2))})
    with pytest.raises(UsageError, match="delay 1"):
        Trainer(gpt(), replace(RECIPE, delay=1), token_rows())
    with pytest.raises(UsageError, match="no cost"):
        Trainer(replace(mlp(), nodes=mlp().nodes[:-2], edges=mlp().edges[:-2], costs=()), RECIPE, mlp_rows())


def test_states_of_another_run_are_refused_by_name() -> None:
    trainer = Trainer(gpt(), RECIPE, token_rows())
    objects = trainer.state_objects()
    with pytest.raises(UsageError, match="tok"):
        trainer.load_states(0, {vnode: data for vnode, data in objects.items() if vnode != "tok"})
    with pytest.raises(UsageError, match=r"no state object for VNodes .*tok"):
        trainer.load_weights({})
    with pytest.raises(ComputeError, match="VNode norm"):
        trainer.load_states(0, objects | {VNodeId("norm"): objects[VNodeId("mlp0")]})
    other = Trainer(gpt(), replace(RECIPE, optimizer=Adam()), token_rows())
    other.load_states(0, objects)
    assert other.state_objects() == objects


def test_columns_are_taken_in_every_dtype_that_a_dataset_takes() -> None:
    rows = mlp_rows(16)
    rows = {**rows, "x": rows["x"].astype("float16").astype("float32")}
    like = {"x": rows["x"].astype("float16"), "y": rows["y"].astype(">f4"), "label": rows["label"].astype("int32")}
    assert Trainer(mlp(), RECIPE, like).run(2) == Trainer(mlp(), RECIPE, rows).run(2)
    assert Trainer(mlp(), RECIPE, rows).loss(like) == Trainer(mlp(), RECIPE, rows).loss(rows)
    with pytest.raises(InvalidData, match="column 'x': found dtype complex64"):
        Trainer(mlp(), RECIPE, {**rows, "x": rows["x"].astype("complex64")})
