"""Learning rates against ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from dcnr.session.recipe import SGD, WSD, Constant, Cosine, Linear, Recipe, Schedule

STEPS, WARMUP, PEAK, LEAST = 50, 8, 0.3, 0.06


def _torch(kind: str) -> list[float]:
    """Rates of steps 1 to ``STEPS``: warm-up, then torch's own scheduler of that name."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
    left = STEPS - WARMUP
    plan: list[tuple[int, lr_scheduler.LRScheduler]] = [(0, warmup)]
    match kind:
        case "cosine":
            plan.append((WARMUP, lr_scheduler.CosineAnnealingLR(optimizer, T_max=left, eta_min=LEAST)))
        case "linear":
            falling = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=LEAST / PEAK, total_iters=left)
            plan.append((WARMUP, falling))
        case "wsd":
            plan.append((WARMUP, lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)))
            falling = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=LEAST / PEAK, total_iters=10)
            plan.append((STEPS - 10, falling))
        case _:
            plan.append((WARMUP, lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)))
    schedulers = [scheduler for _, scheduler in plan]
    whole = lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[first for first, _ in plan[1:]])
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    return rates


@pytest.mark.parametrize(
    "schedule",
    [Cosine(WARMUP, LEAST), Linear(WARMUP, LEAST), WSD(WARMUP, LEAST), Constant(WARMUP)],
    ids=lambda s: s.kind,
)
def test_rates_are_torchs(schedule: Schedule) -> None:
    recipe = Recipe(steps=STEPS, optimizer=SGD(lr=PEAK), schedule=schedule)
    np.testing.assert_allclose(
        [recipe.learning_rate(step) for step in range(1, STEPS + 1)], _torch(schedule.kind), rtol=1e-12
    )
