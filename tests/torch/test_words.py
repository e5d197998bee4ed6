from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnr.adapters.torch.words import dropout_mask, normal
from dcnr.ids import VNodeId

NODE = VNodeId("drop")


def _mask(first_row: int, rows: int, **other: object) -> torch.Tensor:
    named: dict[str, object] = {"seed": 1, "vnode": NODE, "step": 3} | other
    return dropout_mask(
        first_row=first_row,
        shape=(rows, 33, 5),
        rate=0.25,
        dtype=torch.float32,
        **named,  # type: ignore[arg-type]
    )


def test_a_row_of_a_mask_does_not_know_its_microbatch() -> None:
    whole = _mask(0, 8)
    for rows in (1, 2, 4):
        parts = [_mask(first, rows) for first in range(0, 8, rows)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 4}, {"vnode": VNodeId("drop2")}])
def test_every_part_of_the_name_counts(other: dict[str, object]) -> None:
    assert not torch.equal(_mask(0, 2), _mask(0, 2, **other))


def test_a_mask_keeps_the_mean() -> None:
    mask = dropout_mask(seed=0, vnode=NODE, step=1, first_row=0, shape=(16, 10_000), rate=0.25, dtype=torch.float64)
    assert sorted(mask.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)


def test_normal_values_are_normal_and_named() -> None:
    def draw(parameter: str, shape: tuple[int, ...]) -> np.ndarray:  # type: ignore[type-arg]
        values = normal(seed=7, vnode=NODE, parameter=parameter, shape=shape, std=0.02, dtype=torch.float64)
        return values.numpy()

    values = draw("weight", (300, 333)) / 0.02
    assert abs(values.mean()) < 0.02
    assert values.std() == pytest.approx(1.0, abs=0.01)
    assert (values**4).mean() == pytest.approx(3.0, abs=0.15)
    assert (draw("weight", (300, 333)) / 0.02 == values).all()
    assert (draw("other", (300, 333)) / 0.02 != values).all()
    assert draw("odd", (3,)).shape == (3,)
    # A prefix of the same words: the shape is no part of the name.
    assert (draw("weight", (7,)) / 0.02 == values.reshape(-1)[:7]).all()


def test_initial_values_round_once() -> None:
    named = {"seed": 7, "vnode": NODE, "parameter": "weight", "shape": (50,), "std": 0.02}
    wide = normal(dtype=torch.float64, **named)  # type: ignore[arg-type]
    narrow = normal(dtype=torch.float32, **named)  # type: ignore[arg-type]
    assert torch.equal(narrow, wide.float())
