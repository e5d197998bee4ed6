"""The same GPT by hand from torch.nn and torch.optim, sharing no code with the catalogue's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, Adam, AdamW, Constant, Optimizer, Recipe
from dcnr.session.rows import microbatch_rows
from tests.numerics.gradients import Gradients, first_step
from tests.numerics.networks import Columns, gpt, token_rows

DIM, HEADS, VOCAB, CONTEXT, LAYERS, BATCH = 32, 4, 40, 12, 2, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.o = nn.Linear(DIM, DIM)
        self.mlp_norm = nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        size = DIM // HEADS
        normed = self.attention_norm(x)
        q, k, v = (part(normed).view(rows, length, HEADS, size).transpose(1, 2) for part in (self.q, self.k, self.v))
        frequency = 10000.0 ** -(torch.arange(0, size, 2, dtype=x.dtype) / size)
        angle = torch.outer(torch.arange(length, dtype=x.dtype), frequency).repeat(1, 2)

        def rotate(t: Tensor) -> Tensor:
            half = torch.cat([-t[..., size // 2 :], t[..., : size // 2]], dim=-1)
            return t * angle.cos() + half * angle.sin()

        scores = rotate(q) @ rotate(k).transpose(-1, -2) / size**0.5
        scores = scores + torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(rows, length, DIM)
        x = x + self.o(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T

    def named(self) -> dict[str, Tensor]:
        """Parameters under the network's names."""
        renamed = {"tokens": "tok", "norm": "norm"}
        for i in range(LAYERS):
            block = f"blocks.{i}"
            renamed |= {f"{block}.{part}": f"attention{i}.{part}" for part in "qkvo"}
            renamed |= {f"{block}.attention_norm": f"attention{i}_norm", f"{block}.mlp_norm": f"mlp{i}_norm"}
            renamed |= {f"{block}.up": f"mlp{i}_up", f"{block}.down": f"mlp{i}"}
        found = {}
        for name, parameter in self.named_parameters():
            module, _, last = name.rpartition(".")
            found[f"{renamed[module]}.{last}"] = parameter
        return found


@dataclass
class Run:
    """``gradients`` of the first step, ``weights`` after the last."""

    gradients: Gradients
    weights: Gradients
    losses: list[float]


def _by_hand(start: Gradients, rows: Columns, recipe: Recipe, optimizer: type, **how: object) -> Run:
    model = HandWritten().to(torch.from_numpy(start["tok.weight"]).dtype)
    named = model.named()
    assert named.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(start[name]))
    matrices = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() == 1]
    decay = recipe.optimizer.weight_decay
    stepper = optimizer([{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], **how)
    run = Run(gradients={}, weights={}, losses=[])
    for step in range(1, recipe.steps + 1):
        chosen = microbatch_rows(
            step=step, microbatch=0, batch_size=BATCH, rows=BATCH, total=len(rows["tokens"]), seed=recipe.seed
        )
        logits = model(torch.from_numpy(rows["tokens"][list(chosen)]))
        targets = torch.from_numpy(rows["targets"][list(chosen)])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        stepper.zero_grad()
        loss.backward()
        if step == 1:
            run.gradients = _arrays({name: p.grad for name, p in named.items()})
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        stepper.step()
        run.losses.append(loss.item())
    run.weights = _arrays(named)
    return run


def _arrays(tensors: Mapping[str, Tensor | None]) -> Gradients:
    return {name: t.detach().numpy().copy() for name, t in tensors.items() if t is not None}


def _recipe(optimizer: Optimizer, steps: int = 20, clip_norm: float = 1.0) -> Recipe:
    return Recipe(
        steps=steps,
        batch_size=BATCH,
        microbatches=2,
        optimizer=optimizer,
        schedule=Constant(),
        clip_norm=clip_norm,
    )


@pytest.mark.parametrize(
    ("optimizer", "torchs", "how"),
    [
        (Adam(lr=1e-3), torch.optim.Adam, {"lr": 1e-3}),
        (AdamW(lr=1e-3, weight_decay=0.1), torch.optim.AdamW, {"lr": 1e-3}),
        (SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_float64_weights_after_twenty_steps(optimizer: Optimizer, torchs: type, how: dict[str, object]) -> None:
    rows, recipe = token_rows(ignored=0.1), _recipe(optimizer)
    trainer = Trainer(gpt(precision="float64"), recipe, rows)
    theirs = _by_hand(trainer.state_dict(), rows, recipe, torchs, **how)
    losses = [result.loss for result in trainer.run(20)]
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-9)
    for name, value in trainer.state_dict().items():
        np.testing.assert_allclose(value, theirs.weights[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_float32_gradients_of_the_first_step() -> None:
    rows, recipe = token_rows(), _recipe(SGD(lr=1.0), steps=1, clip_norm=0.0)
    mine, _, _ = first_step(gpt(), rows, microbatches=2)
    theirs = _by_hand(Trainer(gpt(), recipe, rows).state_dict(), rows, recipe, torch.optim.SGD, lr=1.0).gradients
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.linalg.norm(mine[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


def test_float32_losses_of_twenty_steps() -> None:
    rows, recipe = token_rows(), _recipe(Adam(lr=1e-3))
    trainer = Trainer(gpt(), recipe, rows)
    theirs = _by_hand(trainer.state_dict(), rows, recipe, torch.optim.Adam, lr=1e-3).losses
    np.testing.assert_allclose([result.loss for result in trainer.run(20)], theirs, rtol=0, atol=1e-4)
