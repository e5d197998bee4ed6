"""What bf16 means, written out in plain torch; and that it trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dcnr.network.builder import Graph
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, AdamW, Constant, Recipe
from dcnr.session.rows import microbatch_rows
from tests.numerics.networks import gpt, mlp_rows, token_rows

BATCH, MICROBATCHES = 8, 4


@pytest.mark.parametrize("param_precision", ["", "float32"])
def test_gradients_add_up_and_weights_are_updated_in_float32(param_precision: str) -> None:
    g = Graph("small", "bf16", param_precision)
    g.cost("mse", g.linear(g.input("x", [8], "float32"), out_dim=4, id="only"), target="y")
    recipe = Recipe(
        steps=3,
        batch_size=BATCH,
        microbatches=MICROBATCHES,
        optimizer=SGD(lr=0.1),
        schedule=Constant(),
        clip_norm=0.0,
    )
    rows = mlp_rows(BATCH)
    trainer = Trainer(g, recipe, rows)
    weights = {name: torch.from_numpy(value) for name, value in trainer.state_dict().items()}
    # Half of the distance between two neighbours, as a share of the value.
    rounding = 2**-8 if param_precision == "" else 2**-23
    for step in range(1, 4):
        sums = {name: torch.zeros_like(value) for name, value in weights.items()}
        losses = []
        for microbatch in range(MICROBATCHES):
            picked = microbatch_rows(
                step=step, microbatch=microbatch, batch_size=BATCH, rows=2, total=BATCH, seed=recipe.seed
            )
            x, y = (torch.from_numpy(rows[column][list(picked)]) for column in "xy")
            used = {name: value.bfloat16().requires_grad_() for name, value in weights.items()}
            made = functional.linear(x.bfloat16(), used["only.weight"], used["only.bias"])
            loss = functional.mse_loss(made.float(), y, reduction="sum") / (BATCH * 4)
            losses.append(loss.item())
            for name, gradient in zip(used, torch.autograd.grad(loss, list(used.values())), strict=True):
                assert gradient.dtype == torch.bfloat16
                sums[name] += gradient.float()
        assert trainer.step().loss == sum(losses)
        for name, value in trainer.state_dict().items():
            expected = weights[name].double() - 0.1 * sums[name].double()
            weights[name] = torch.from_numpy(value)
            torch.testing.assert_close(weights[name].double(), expected, rtol=1.001 * rounding, atol=1e-9)


@pytest.mark.parametrize("param_precision", ["", "float32"])
def test_it_learns_nearly_as_float32_does(param_precision: str) -> None:
    """Sixteen rows, learned by heart."""
    rows = token_rows(16, vocab=40)
    recipe = Recipe(steps=60, batch_size=16, microbatches=2, optimizer=AdamW(lr=1e-2), schedule=Constant())
    exact = Trainer(gpt(tied=False), recipe, rows).run(60)
    found = Trainer(gpt(tied=False, precision="bf16", param_precision=param_precision), recipe, rows).run(60)
    assert exact[-1].loss < 0.5 * exact[0].loss
    assert found[0].loss == pytest.approx(exact[0].loss, rel=0.01)
    assert found[-1].loss < 0.6 * exact[0].loss
