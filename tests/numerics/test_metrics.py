"""Metrics of a network: their values by hand, the same wherever VNodes are placed, and no bit of training changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dcnr.ids import VNodeId
from dcnr.network.analysis import METRICS, analyse
from dcnr.network.graph import Definition, MetricSpec
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, AdamW, Cosine, Recipe
from tests.numerics.networks import gpt, mlp, mlp_rows, placements, token_rows, with_config


def measured(definition: Definition, *wanted: tuple[str, str]) -> Definition:
    """With metrics of these (type, node), named ``<type> of <node>``."""
    metrics = (MetricSpec(name=f"{type} of {node}", type=type, node_id=VNodeId(node)) for type, node in wanted)
    return replace(definition, metrics=tuple(metrics))


EVERYWHERE = [(type, node) for type in METRICS for node in ("tok", "attention0", "mlp1", "norm")] + [
    ("activation_rms", node) for node in ("mlp0_gelu", "attention1_drop", "mlp1_add", "head")
]


@pytest.mark.parametrize("clip_scope", ["network", "vnode"])
def test_every_metric_is_the_same_wherever_vnodes_are_and_changes_no_bit(clip_scope: str) -> None:
    definition, rows = gpt(dropout=0.1), token_rows(ignored=0.2)
    network = analyse(measured(definition, *EVERYWHERE))
    recipe = Recipe(
        steps=4,
        batch_size=8,
        microbatches=4,
        optimizer=AdamW(lr=1e-2),
        schedule=Cosine(warmup=2),
        clip_norm=0.05,
        clip_scope=clip_scope,
    )
    plain, whole = Trainer(definition, recipe, rows), Trainer(network, recipe, rows)
    unmeasured, results = plain.run(4), whole.run(4)
    assert all(list(result.metrics) == [m.name for m in network.definition.metrics] for result in results)
    assert [replace(result, metrics={}) for result in results] == unmeasured
    assert whole.state_objects() == plain.state_objects()
    for placement in placements(network).values():
        assert Trainer(network, recipe, rows, placement=placement).run(4) == results


def test_values_by_hand() -> None:
    """One step of SGD with clipping, in float64, through torch alone."""
    definition = with_config(mlp(precision="float64"), {"branch1": {"lr_scale": 0.5}})
    wanted = [(type, node) for type in METRICS for node in ("trunk", "branch1", "side")] + [("activation_rms", "act")]
    rows = mlp_rows(precision="float64")
    recipe = Recipe(steps=1, batch_size=8, microbatches=4, optimizer=SGD(lr=0.1), clip_norm=0.01)
    trainer = Trainer(measured(definition, *wanted), recipe, rows)
    before = trainer.state_dict()
    taken: list[int] = []
    take = trainer._rows.take
    trainer._rows.take = lambda column, which: taken.extend(which if column == "x" else ()) or take(column, which)  # type: ignore[method-assign, func-returns-value]
    result = trainer.step()
    after = trainer.state_dict()
    assert len(taken) == 8

    w = {name: torch.from_numpy(value).requires_grad_() for name, value in before.items()}
    x, y, label = (torch.from_numpy(rows[name][taken]) for name in ("x", "y", "label"))

    def linear(name: str, given: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(given, w[f"{name}.weight"], w[f"{name}.bias"])

    trunk = linear("trunk", x)
    act = trunk.relu()
    branches = [linear(f"branch{i}", act) for i in range(3)]
    side = linear("side", act)
    out = linear("out", branches[0] + branches[1] + branches[2])
    loss = torch.nn.functional.mse_loss(out, y) + 0.3 * torch.nn.functional.cross_entropy(side, label)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert result.grad_scale < 1.0, "a norm of gradients is one before they are clipped"

    def norm(*parts: np.ndarray) -> float:
        return float(np.sqrt(sum(np.square(part).sum() for part in parts)))

    expected = {}
    for node in ("trunk", "branch1", "side"):
        names = [f"{node}.weight", f"{node}.bias"]
        expected[f"learning_rate of {node}"] = 0.05 if node == "branch1" else 0.1
        expected[f"grad_norm of {node}"] = norm(*(w[n].grad.numpy() for n in names))  # type: ignore[union-attr]
        expected[f"weight_norm of {node}"] = norm(*(after[n] for n in names))
        expected[f"update_ratio of {node}"] = norm(*(after[n] - before[n] for n in names)) / norm(
            *(before[n] for n in names)
        )
    for node, value in (("trunk", trunk), ("branch1", branches[1]), ("side", side), ("act", act)):
        expected[f"activation_rms of {node}"] = value.square().mean().sqrt().item()
    assert result.metrics == pytest.approx(expected, rel=1e-10)
    assert result.metrics["learning_rate of branch1"] == 0.05


def test_a_metric_without_a_value_is_left_out() -> None:
    """Weights that were all zero have no relative update."""
    definition = with_config(mlp(), {"side": {"lr_scale": 1.0}})
    names = ("update_ratio", "weight_norm")
    network = analyse(measured(definition, *((name, "side") for name in names)))
    recipe = Recipe(steps=2, batch_size=8, optimizer=SGD(lr=0.1))
    trainer = Trainer(network, recipe, mlp_rows())
    for tensor in trainer._states[VNodeId("side")].parameters.values():
        tensor.zero_()
    assert [sorted(result.metrics) for result in trainer.run(2)] == [
        ["weight_norm of side"],
        ["update_ratio of side", "weight_norm of side"],
    ]
