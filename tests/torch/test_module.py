from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dcnr.adapters.torch.module import to_torch
from dcnr.errors import UsageError
from dcnr.ids import VNodeId
from dcnr.network.graph import Edge, Node
from dcnr.oracle import Trainer
from dcnr.session.recipe import Recipe
from tests.numerics.networks import gpt, mlp, mlp_rows, token_rows


def test_a_trained_state_loads_and_computes_the_same_loss() -> None:
    definition, rows = gpt(dropout=0.1, explicit_broadcast=True), token_rows()
    trainer = Trainer(definition, Recipe(steps=3, batch_size=8), rows)
    trainer.run(3)
    module = to_torch(definition).eval()
    state = {name: torch.from_numpy(value) for name, value in trainer.state_dict().items()}
    assert module.state_dict().keys() == state.keys()
    assert "head.weight" not in state
    module.load_state_dict(state)
    logits = module(tokens=torch.from_numpy(rows["tokens"]))
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 40), torch.from_numpy(rows["targets"]).view(-1))
    assert loss.item() == pytest.approx(trainer.loss(rows), rel=1e-6)


def test_initial_weights_are_a_sessions() -> None:
    trainer = Trainer(mlp(), Recipe(steps=1, seed=5), mlp_rows())
    module = to_torch(mlp(), seed=5)
    for name, value in trainer.state_dict().items():
        assert np.array_equal(module.state_dict()[name].numpy(), value)


def test_several_costs_give_what_they_compare_by_name() -> None:
    outputs = to_torch(mlp())(x=torch.zeros(2, 8))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {"distance": (2, 4), "class": (2, 5)}


def test_it_trains_like_any_module() -> None:
    module = to_torch(gpt(dropout=0.1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tokens = torch.from_numpy(token_rows(4)["tokens"])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(tokens=tokens).view(-1, 40), tokens.view(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_node_may_be_called_like_a_method() -> None:
    definition = mlp()
    renamed = {"trunk": "train", "act": "float"}

    def new(name: str) -> VNodeId:
        return VNodeId(renamed.get(name, name))

    module = to_torch(
        replace(
            definition,
            nodes=tuple(Node(id=new(n.id), type=n.type, config=n.config) for n in definition.nodes),
            edges=tuple(
                Edge(source=new(e.source), source_slot=e.source_slot, target=new(e.target), target_slot=e.target_slot)
                for e in definition.edges
            ),
            inputs=tuple(replace(i, node_id=new(i.node_id)) for i in definition.inputs),
        )
    )
    assert "train.weight" in module.state_dict()
    assert module.train().training


def test_other_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\['text'\].*\['tokens'\]"):
        to_torch(gpt())(text=torch.zeros(1, 2, dtype=torch.int64))
