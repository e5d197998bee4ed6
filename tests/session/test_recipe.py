"""A recipe is data: out of range it is refused, and what it says of a step follows from the step alone."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnr.errors import UsageError
from dcnr.network.graph import json_bytes
from dcnr.session.recipe import AdamW, Constant, Cosine, Muon, Recipe, grad_scale
from dcnr.session.rows import dataset_row, microbatch_rows


def test_a_recipe_survives_its_json() -> None:
    recipe = Recipe(steps=7, batch_size=6, microbatches=3, optimizer=Muon(lr=0.01), schedule=Constant(warmup=2))
    assert Recipe.from_bytes(json_bytes(recipe.to_json())) == recipe


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 10, "microbatches": 4}, "10 is not divisible by 4"),
        ({"steps": 0}, "at least 1"),
        ({"optimizer": {"kind": "lion"}}, "unknown optimizer 'lion'"),
        ({"optimizer": {"lr": -1.0}}, "lr must be"),
        ({"optimizer": {"betas": [2.0, 0.9]}}, "betas must be"),
        ({"schedule": {"kind": "wsd"}}, "unknown schedule 'wsd'"),
        ({"clip_norm": -1.0}, "clip norm"),
        ({"surprise": 1}, "malformed recipe"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Recipe.from_bytes(json.dumps({"steps": 5, **values}).encode())


def test_the_rate_warms_up_and_follows_half_a_cosine() -> None:
    recipe = Recipe(steps=110, optimizer=AdamW(lr=1.0), schedule=Cosine(warmup=10, min_lr=0.1))
    assert [recipe.learning_rate(step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert recipe.learning_rate(11) == 1.0
    assert recipe.learning_rate(61) == pytest.approx(0.55)
    assert recipe.learning_rate(110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))


def test_weights_of_a_step_are_those_after_the_one_before() -> None:
    recipe = Recipe(steps=9)
    assert [recipe.forward_version(step) for step in (1, 2, 9)] == [0, 1, 8]
    late = Recipe(steps=9, delay=1)
    assert [late.forward_version(step) for step in (1, 2, 9)] == [0, 0, 7]


def test_the_clipping_factor_is_a_fold_in_order() -> None:
    assert grad_scale([9.0, 16.0], 0.0) == 1.0
    assert grad_scale([9.0, 16.0], 10.0) == 1.0
    assert grad_scale([9.0, 16.0], 2.5) == pytest.approx(0.5, rel=1e-6)
    assert grad_scale([1e16, 1.0, 1.0], 1.0) != grad_scale([1.0, 1.0, 1e16], 1.0)


@given(total=st.integers(1, 300), seed=st.integers(0, 2**31), data_epoch=st.integers(0, 3))
def test_each_data_epoch_is_a_permutation(total: int, seed: int, data_epoch: int) -> None:
    first = data_epoch * total
    assert sorted(dataset_row(first + i, total, seed) for i in range(total)) == list(range(total))


@given(step=st.integers(1, 50), seed=st.integers(0, 99))
def test_microbatches_cut_the_batch_in_order(step: int, seed: int) -> None:
    def batch(microbatches: int) -> list[int]:
        size = 8 // microbatches
        return [
            row
            for m in range(microbatches)
            for row in microbatch_rows(step=step, microbatch=m, batch_size=8, rows=size, total=61, seed=seed)
        ]

    assert batch(1) == batch(2) == batch(8)
