"""A recipe is data: out of range it is refused, and what it says of a step follows from the step alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnr.errors import ProtocolError, UsageError
from dcnr.ids import DatasetId, NetworkId
from dcnr.network.graph import json_bytes
from dcnr.session.recipe import (
    SCHEDULES,
    SGD,
    WSD,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Muon,
    Recipe,
    Schedule,
    grad_scale,
)
from dcnr.session.record import Record
from dcnr.session.rows import dataset_row, microbatch_rows

HUGE = 10**400
"""A whole number that JSON takes and no float does."""


def test_a_recipe_survives_its_json() -> None:
    recipe = Recipe(steps=7, batch_size=6, microbatches=3, optimizer=Muon(lr=0.01), schedule=Constant(warmup=2))
    assert Recipe.from_bytes(json_bytes(recipe.to_json())) == recipe


def test_a_recorded_recipe_keeps_what_its_momentum_meant() -> None:
    """Once the momentum of muon was that of nodes that choose sgd, too."""
    new = Recipe(steps=7, optimizer=Muon(momentum=0.9))
    assert new.optimizer.sgd_momentum == 0.0
    values = new.to_json()
    del values["optimizer"]["sgd_momentum"]
    assert Recipe.from_json(values).optimizer.sgd_momentum == 0.9


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 10, "microbatches": 4}, "10 is not divisible by 4"),
        ({"steps": 0}, "at least 1"),
        ({"optimizer": {"kind": "lion"}}, "unknown optimizer 'lion'"),
        ({"optimizer": {"lr": -1.0}}, "lr must be"),
        ({"optimizer": {"implementation": "fast"}}, "unknown implementation 'fast'"),
        ({"optimizer": {"betas": [2.0, 0.9]}}, "betas must be"),
        ({"optimizer": {"betas": [0.9]}}, "betas must be two numbers"),
        (
            {"optimizer": {"betas": ["0.9", 0.9]}},
            "the first of betas must be a finite number of at least 0, found '0.9'",
        ),
        ({"optimizer": {"betas": [0.9, HUGE]}}, "the second of betas must be a finite number"),
        (
            {"optimizer": {"lr": HUGE}},
            "lr must be a finite number of at least 0, found a number of more than 40 digits",
        ),
        ({"optimizer": {"lr": "3e-4"}}, "lr must be a finite number of at least 0, found '3e-4'"),
        ({"optimizer": {"lr": True}}, "lr must be a finite number of at least 0, found True"),
        ({"optimizer": {"eps": HUGE}}, "eps must be a finite number"),
        ({"optimizer": {"momentum": HUGE}}, "momentum must be a finite number"),
        ({"optimizer": {"weight_decay": HUGE}}, "weight decay must be a finite number"),
        ({"schedule": {"min_lr": HUGE}}, "min lr must be a finite number"),
        ({"schedule": {"decay_share": None}}, "decay must be a finite number of at least 0, found None"),
        ({"clip_norm": HUGE}, "clip norm must be a finite number"),
        ({"steps": HUGE}, "steps must be at most 9007199254740992, found a number of more than 40 digits"),
        ({"schedule": {"warmup": HUGE}}, "warmup must be at most"),
        ({"seed": -HUGE}, "seed must be at most"),
        ({"optimizer": {"lr": 1e308}, "schedule": {"warmup": 10}}, "lr must be smaller with a warmup of 10 steps"),
        ({"schedule": {"kind": "step"}}, "unknown schedule 'step'"),
        ({"schedule": {"warmup": -1}}, "warmup must be a whole number of at least 0"),
        ({"schedule": {"kind": "wsd", "decay_share": 1.5}}, "from 0 to 1, found 1.5"),
        ({"clip_scope": "layer"}, "unknown clip scope 'layer'"),
        ({"clip_norm": -1.0}, "clip norm"),
        ({"surprise": 1}, "malformed recipe"),
        ({"seed": "0"}, "seed must be a whole number, found '0'"),
        ({"steps": 5.0}, "steps must be a whole number, found 5.0"),
        ({"batch_size": True}, "batch size must be a whole number, found True"),
        ({"microbatches": 2.0}, "microbatches must be a whole number, found 2.0"),
        ({"delay": None}, "delay must be a whole number of at least 0, found None"),
        ({"schedule": {"warmup": "x"}}, "warmup must be a whole number of at least 0, found 'x'"),
        ({"checkpoint_every": "x"}, "checkpoint every must be a whole number of at least 0, found 'x'"),
        ({"eval_every": -1}, "eval every must be a whole number of at least 0, found -1"),
        ({"eval_batches": -4}, "eval batches must be a whole number of at least 1, found -4"),
        ({"optimizer": 5}, "malformed recipe"),
        ({"schedule": []}, "malformed recipe"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Recipe.from_bytes(json.dumps({"steps": 5, **values}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"steps":' * 100_000])
def test_what_is_no_recipe_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="malformed recipe"):
        Recipe.from_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"steps": 5, "batch_size": 10, "microbatches": 4}},
        {"recipe": {"steps": 5, "schedule": {"kind": "of another version"}}},
        {"recipe": 5},
        {"groups": 5},
        {"rewrites": 5},
        {"surprise": 1},
        {"init": ["s", float("inf"), "m"]},
    ],
)
def test_a_record_that_this_version_would_refuse_is_no_record(change: dict[str, object]) -> None:
    record = Record(
        network=NetworkId("n"), network_name="n", dataset=DatasetId("d"), tokenizer="", context=0, rows_train=1,
        rows_validation=0, valid_targets_per_row=0, recipe=Recipe(steps=5), groups=(), catalogue="", created_unix_s=0.0,
        nonce="n",
    )  # fmt: skip
    assert Record.from_bytes(record.to_bytes()) == record
    with pytest.raises(ProtocolError, match="malformed session record"):
        Record.from_bytes(json.dumps(json.loads(record.to_bytes()) | change).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"[" * 100_000])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed session record"):
        Record.from_bytes(data)


def test_the_rate_warms_up_and_follows_half_a_cosine() -> None:
    recipe = Recipe(steps=110, optimizer=AdamW(lr=1.0), schedule=Cosine(warmup=10, min_lr=0.1))
    assert [recipe.learning_rate(step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert recipe.learning_rate(11) == 1.0
    assert recipe.learning_rate(61) == pytest.approx(0.55)
    assert recipe.learning_rate(110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))


def test_a_line_falls_from_the_peak_towards_the_end() -> None:
    recipe = Recipe(steps=110, optimizer=AdamW(lr=1.0), schedule=Linear(warmup=10, min_lr=0.1))
    assert [recipe.learning_rate(step) for step in (1, 10, 11)] == [0.1, 1.0, 1.0]
    assert recipe.learning_rate(61) == pytest.approx(0.55)
    assert recipe.learning_rate(110) == pytest.approx(0.109)


def test_wsd_stays_at_the_peak_until_the_last_fifth() -> None:
    recipe = Recipe(steps=100, optimizer=AdamW(lr=1.0), schedule=WSD(warmup=10, min_lr=0.2))
    assert {recipe.learning_rate(step) for step in range(10, 82)} == {1.0}
    assert recipe.learning_rate(91) == pytest.approx(0.6)
    assert recipe.learning_rate(100) == pytest.approx(0.24)
    half = Recipe(steps=100, optimizer=AdamW(lr=1.0), schedule=WSD(decay_share=0.5))
    assert half.learning_rate(51) == 1.0 > half.learning_rate(52)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(steps=st.integers(1, 40), warmup=st.integers(0, 50), min_lr=st.floats(0, 1))
def test_every_rate_is_between_zero_and_the_peak(kind: str, steps: int, warmup: int, min_lr: float) -> None:
    """Also where the warm-up is longer than the run or reaches into the decay."""
    schedule = Schedule(kind=kind, warmup=warmup, min_lr=min_lr)
    recipe = Recipe(steps=steps, optimizer=AdamW(lr=1.0), schedule=schedule)
    rates = [recipe.learning_rate(step) for step in range(1, steps + 1)]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(
    lr=st.floats(0, allow_infinity=False),
    min_lr=st.floats(0, allow_infinity=False),
    steps=st.integers(1, 2**53),
    warmup=st.integers(0, 2**53),
    share=st.floats(0, 1),
)
def test_every_rate_of_an_accepted_recipe_is_finite(
    kind: str, lr: float, min_lr: float, steps: int, warmup: int, share: float
) -> None:
    schedule = Schedule(kind=kind, warmup=warmup, min_lr=min_lr, decay_share=share)
    if not math.isfinite(lr * min(warmup, steps)):
        with pytest.raises(UsageError, match="lr must be smaller with a warmup"):
            Recipe(steps=steps, optimizer=AdamW(lr=lr), schedule=schedule)
        return
    recipe = Recipe(steps=steps, optimizer=AdamW(lr=lr), schedule=schedule)
    for step in (1, 2, warmup, warmup + 1, (steps + 1) // 2, steps):
        assert not 1 <= step <= steps or math.isfinite(recipe.learning_rate(step)), step


def test_a_record_of_before_means_what_it_meant() -> None:
    """The JSON of a recipe before there were other schedules and scopes, and the rates that it gave, bit for bit."""
    old = {
        "steps": 7, "batch_size": 8, "microbatches": 4, "seed": 0, "mode": "exact", "delay": 0, "clip_norm": 1.0,
        "checkpoint_every": 20, "eval_every": 0, "eval_batches": 4,
        "optimizer": {"kind": "adamw", "lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
                      "momentum": 0.0, "implementation": "fused"},
        "schedule": {"kind": "cosine", "warmup": 2, "min_lr": 1e-5},
    }  # fmt: skip
    recipe = Recipe.from_bytes(json.dumps(old).encode())
    assert recipe == Recipe(steps=7, schedule=Cosine(warmup=2, min_lr=1e-5))
    assert recipe.optimizer.implementation == "fused"
    assert recipe.clips_network
    assert not recipe.clips_vnode
    cosine = [1e-5 + 0.5 * (3e-4 - 1e-5) * (1.0 + math.cos(math.pi * (done / 5))) for done in range(5)]
    assert [recipe.learning_rate(step) for step in range(1, 8)] == [3e-4 * 1 / 2, 3e-4 * 2 / 2, *cosine]
    constant = Recipe.from_bytes(json.dumps(old | {"schedule": {"kind": "constant", "warmup": 0}}).encode())
    assert {constant.learning_rate(step) for step in range(1, 8)} == {3e-4}


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


@pytest.mark.parametrize(
    ("what", "found", "expected"),
    [
        ("optimizer", "adamw", "optimizer: found 'adamw', expected dcnr.AdamW(...)"),
        ("optimizer", "adam", "optimizer: found 'adam', expected dcnr.Adam(...)"),
        ("optimizer", "moun", "optimizer: found 'moun', expected dcnr.Muon(...)"),
        ("optimizer", SGD, "expected dcnr.SGD(...)"),
        (
            "optimizer",
            3e-4,
            "found 0.0003, expected one of dcnr.AdamW(...), dcnr.Adam(...), dcnr.SGD(...), dcnr.Muon(...)",
        ),
        ("optimizer", Cosine(), "expected one of dcnr.AdamW(...), "),
        ("schedule", "cosine", "schedule: found 'cosine', expected dcnr.Cosine(...)"),
        ("schedule", "WSD", "schedule: found 'WSD', expected dcnr.WSD(...)"),
        ("schedule", Constant, "expected dcnr.Constant(...)"),
    ],
)
def test_an_optimizer_or_schedule_of_another_kind_is_answered_with_the_function(
    what: str, found: Any, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(steps=1, **{what: found})
    assert expected in str(caught.value)


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
