"""A rewritten network trains as the written one does, from the same weights, to rounding; unless what the session chose
takes each node as a unit (Muon, clipping by each VNode's own norm): then the rewritten node is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dcnr.adapters.torch.module import to_torch
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, Adam, AdamW, Muon, Optimizer, Recipe
from tests.network.test_rewrite import graph
from tests.numerics.networks import placements, token_rows

ROWS = token_rows(vocab=11, context=6, ignored=0.2)


def both(explicit: bool, **options: Any) -> tuple[Trainer, Trainer]:
    """Trainers of the rewritten and of the written form, of one recipe."""
    definition = graph(explicit=explicit, order=(2, 0, 1), precision="float64").definition()
    recipe = Recipe(steps=10, batch_size=8, microbatches=2, **options)
    run, written = Trainer(definition, recipe, ROWS), Trainer(definition, recipe, ROWS, rewrites=())
    assert run.network.rewrites == ("attention_heads", "tied_head")
    assert written.network.rewrites == ()
    return run, written


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    "optimizer", [Adam(lr=1e-2), AdamW(lr=1e-2, weight_decay=0.1), SGD(lr=0.5, momentum=0.9)], ids=lambda o: o.kind
)
def test_both_forms_train_alike(explicit: bool, optimizer: Optimizer) -> None:
    run, written = both(explicit, optimizer=optimizer, clip_norm=0.5)
    first, second = run.state_dict(), written.state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert np.array_equal(first[key], second[key]), key
    for _ in range(10):
        assert run.step().loss == pytest.approx(written.step().loss, rel=1e-12)
    after = written.state_dict()
    for key, array in run.state_dict().items():
        np.testing.assert_allclose(array, after[key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": Muon(lr=1e-2)}, {"optimizer": SGD(lr=1.0), "clip_norm": 1e-3, "clip_scope": "vnode"}],
    ids=["muon", "clip-scope-vnode"],
)
def test_what_takes_a_node_as_a_unit_takes_the_rewritten_one(options: dict[str, Any]) -> None:
    """The first loss is that of the same weights; then the heads are trained as one node, not each by itself."""
    run, written = both(False, **options)
    before = run.state_dict()
    assert run.step().loss == pytest.approx(written.step().loss, rel=1e-12)
    mine, theirs = run.state_dict(), written.state_dict()
    moved = {key: (mine[key] - before[key], theirs[key] - before[key]) for key in before}
    assert not np.allclose(*moved["h0.v.weight"], rtol=1e-2, atol=0.0)
    # A linear outside the heads is the same unit in both forms.
    np.testing.assert_allclose(*moved["project.weight"], rtol=1e-6, atol=1e-12)


def test_the_bits_of_a_rewritten_network_are_those_of_any_split() -> None:
    definition = graph().definition()
    rows = token_rows(vocab=11, context=6)
    recipe = Recipe(steps=3, batch_size=4, microbatches=2)
    whole = Trainer(definition, recipe, rows)
    whole.run(3)
    for name, placement in placements(whole.network).items():
        split = Trainer(definition, recipe, rows, placement=placement)
        split.run(3)
        assert split.state_objects() == whole.state_objects(), name


def test_weights_of_a_rewritten_session_fit_the_module_of_the_file() -> None:
    g = graph()
    rows = token_rows(vocab=11, context=6)
    trainer = Trainer(g, Recipe(steps=2, batch_size=4, microbatches=2), rows)
    trainer.run(2)
    module = to_torch(g.definition())
    module.load_state_dict({key: torch.from_numpy(array) for key, array in trainer.state_dict().items()})
    with torch.no_grad():
        logits = module(tokens=torch.from_numpy(rows["tokens"]))
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 11), torch.from_numpy(rows["targets"]).reshape(-1), label_smoothing=0.1
    )
    assert trainer.loss(rows) == pytest.approx(loss.item(), rel=1e-5)
