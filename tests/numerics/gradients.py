"""Gradients of a first step, to the last bit, through public names."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy

from dcnr.network.graph import Definition
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, Recipe
from tests.numerics.networks import Columns

Gradients = dict[str, np.ndarray[Any, Any]]


def first_step(
    definition: Definition,
    rows: Columns,
    *,
    microbatches: int = 1,
    clip_norm: float = 0.0,
    clip_scope: str = "network",
) -> tuple[Gradients, float, float]:
    """Gradients under ``<node id>.<name>``, loss and clipping factor of a batch of 8.

    SGD's momentum buffer after one step is the gradient itself; a change of weights would have lost digits.
    """
    recipe = Recipe(
        steps=1,
        batch_size=8,
        microbatches=microbatches,
        optimizer=SGD(lr=1.0, momentum=0.5),
        clip_norm=clip_norm,
        clip_scope=clip_scope,
    )
    trainer = Trainer(definition, recipe, rows)
    result = trainer.step()
    found = {}
    for vnode, data in trainer.state_objects().items():
        for key, value in safetensors.numpy.load(data).items():
            if key.endswith(".momentum_buffer"):
                found[f"{vnode}.{key.removeprefix('optim.').removesuffix('.momentum_buffer')}"] = value
    return dict(sorted(found.items())), result.loss, result.grad_scale
