"""The split of a batch changes nothing beyond rounding, and masks not at all."""

from __future__ import annotations

import numpy as np
import pytest

from dcnr.network.graph import Definition
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, Recipe
from tests.numerics.gradients import first_step
from tests.numerics.networks import Columns, gpt, mlp, mlp_rows, token_rows

CASES: dict[str, tuple[Definition, Columns]] = {
    "ignored targets": (gpt(precision="float64"), token_rows(ignored=0.6)),
    "dropout": (gpt(precision="float64", dropout=0.3), token_rows(ignored=0.1)),
    "two costs": (mlp(precision="float64"), mlp_rows(precision="float64")),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_a_step_agree(name: str) -> None:
    definition, rows = CASES[name]
    found = [first_step(definition, rows, microbatches=microbatches)[:2] for microbatches in (1, 2, 4, 8)]
    gradients, loss = found[0]
    assert any(np.abs(gradient).max() > 1e-3 for gradient in gradients.values())
    for other, other_loss in found[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for key, gradient in gradients.items():
            np.testing.assert_allclose(other[key], gradient, rtol=1e-12, atol=1e-12)


def test_a_microbatch_without_valid_targets_is_harmless() -> None:
    rows = token_rows(8)
    rows["targets"][:] = -100
    trainer = Trainer(gpt(), Recipe(steps=1, batch_size=8, microbatches=8, optimizer=SGD(lr=1.0)), rows)
    before = trainer.state_dict()
    assert trainer.step().loss == 0.0
    assert all(np.array_equal(before[key], value) for key, value in trainer.state_dict().items())
