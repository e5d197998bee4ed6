"""A rewritten network trains as the written one does, from the same weights, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnr.adapters.torch.module import to_torch
from dcnr.oracle import Trainer
from dcnr.session.recipe import Adam, Recipe
from tests.network.test_rewrite import graph
from tests.numerics.networks import placements, token_rows


@pytest.mark.parametrize("explicit", [False, True])
def test_both_forms_train_alike(explicit: bool) -> None:
    definition = graph(explicit=explicit, order=(2, 0, 1), precision="float64").definition()
    rows = token_rows(vocab=11, context=6, ignored=0.2)
    recipe = Recipe(steps=10, batch_size=8, microbatches=2, optimizer=Adam(lr=1e-2), clip_norm=0.5)
    run, written = Trainer(definition, recipe, rows), Trainer(definition, recipe, rows, rewrites=())
    assert run.network.rewrites == ("attention_heads", "tied_head")
    assert written.network.rewrites == ()
    first, second = run.state_dict(), written.state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert np.array_equal(first[key], second[key]), key
    for _ in range(10):
        assert run.step().loss == pytest.approx(written.step().loss, rel=1e-12)
    after = written.state_dict()
    for key, array in run.state_dict().items():
        np.testing.assert_allclose(array, after[key], rtol=1e-9, atol=1e-12, err_msg=key)


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
