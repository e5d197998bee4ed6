"""The same GPT by hand from torch.nn and torch.optim, sharing no code with the catalogue's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcnr.network.graph import ConfigValue
from dcnr.oracle import Trainer
from dcnr.session.recipe import SGD, Adam, AdamW, Constant, Cosine, Muon, Optimizer, Recipe
from dcnr.session.rows import microbatch_rows
from tests.numerics.gradients import Gradients, first_step
from tests.numerics.networks import Columns, gpt, placements, token_rows, with_config

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


Steppers = Callable[[dict[str, Tensor]], list[torch.optim.Optimizer]]
"""torch's optimizers for parameters by name."""


def _decaying_matrices(recipe: Recipe, optimizer: type, **how: object) -> Steppers:
    """One optimizer; weight decay for parameters of two or more dimensions alone."""

    def make(named: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
        matrices = [p for p in named.values() if p.dim() > 1]
        others = [p for p in named.values() if p.dim() == 1]
        decay = recipe.optimizer.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return [optimizer(groups, **how)]

    return make


def _by_hand(start: Gradients, rows: Columns, recipe: Recipe, steppers: Steppers) -> Run:
    model = HandWritten().to(torch.from_numpy(start["tok.weight"]).dtype)
    named = model.named()
    assert named.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(start[name]))
    optimizers = steppers(named)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda done: recipe.learning_rate(done + 1) / recipe.optimizer.lr)
        for o in optimizers
    ]
    run = Run(gradients={}, weights={}, losses=[])
    for step in range(1, recipe.steps + 1):
        chosen = microbatch_rows(
            step=step, microbatch=0, batch_size=BATCH, rows=BATCH, total=len(rows["tokens"]), seed=recipe.seed
        )
        logits = model(torch.from_numpy(rows["tokens"][list(chosen)]))
        targets = torch.from_numpy(rows["targets"][list(chosen)])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        if step == 1:
            run.gradients = _arrays({name: p.grad for name, p in named.items()})
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
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


@pytest.mark.parametrize("output", [True, False], ids=["logits", "no logits"])
@pytest.mark.parametrize(
    ("optimizer", "torchs", "how"),
    [
        (Adam(lr=1e-3), torch.optim.Adam, {"lr": 1e-3}),
        (AdamW(lr=1e-3, weight_decay=0.1), torch.optim.AdamW, {"lr": 1e-3}),
        (SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_float64_weights_after_twenty_steps(
    optimizer: Optimizer, torchs: type, how: dict[str, object], output: bool
) -> None:
    rows, recipe = token_rows(ignored=0.1), _recipe(optimizer)
    trainer = Trainer(gpt(precision="float64", output=output), recipe, rows)
    assert ("tied_head" in trainer.network.rewrites) is not output
    theirs = _by_hand(trainer.state_dict(), rows, recipe, _decaying_matrices(recipe, torchs, **how))
    losses = [result.loss for result in trainer.run(20)]
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-9)
    for name, value in trainer.state_dict().items():
        np.testing.assert_allclose(value, theirs.weights[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_muon_with_adamw_for_the_rest() -> None:
    rows, recipe = token_rows(), _recipe(Muon(lr=1e-3, weight_decay=0.1), steps=10)
    trainer = Trainer(gpt(precision="float64"), recipe, rows)

    def steppers(named: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
        matrices = [p for name, p in named.items() if p.dim() == 2 and name != "tok.weight"]
        vectors = [p for p in named.values() if p.dim() == 1]
        rest = [{"params": [named["tok.weight"]], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=1e-3)]

    start = trainer.state_dict()
    theirs = _by_hand(start, rows, recipe, steppers)
    losses = [result.loss for result in trainer.run(10)]
    # Muon orthogonalises in bfloat16, so that a last bit of a gradient may become a sixteenth one of a step.
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-4)
    for name, value in trainer.state_dict().items():
        moved = np.linalg.norm(theirs.weights[name] - start[name])
        assert np.linalg.norm(value - theirs.weights[name]) < 0.02 * moved, name


OWN: dict[str, dict[str, ConfigValue]] = {
    "attention0": {"trainable": False},
    "attention0_norm": {"lr_scale": 0.25},
    "mlp0": {"optimizer": "sgd"},
    "mlp0_up": {"weight_decay": 0.0},
    "attention1": {"optimizer": "adam", "weight_decay": 0.05, "lr_scale": 2.0},
}


def test_every_nodes_own_choices_beside_the_sessions() -> None:
    """Frozen, another optimizer, another decay, another rate; under a schedule and clipping of the whole network."""
    rows = token_rows()
    recipe = replace(_recipe(AdamW(lr=1e-3, weight_decay=0.1)), schedule=Cosine(warmup=4, min_lr=1e-5))
    definition = with_config(gpt(precision="float64"), OWN)
    trainer = Trainer(definition, recipe, rows)

    def steppers(named: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        for name, parameter in named.items():
            own = OWN.get(name.partition(".")[0], {})
            if own.get("trainable") is False:
                parameter.requires_grad_(False)
                continue
            kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.get(str(own.get("optimizer")), torch.optim.AdamW)
            decay = float(own.get("weight_decay", 0.1) or 0.0) if parameter.dim() > 1 else 0.0
            made.append(kind([parameter], lr=1e-3 * float(own.get("lr_scale", 1.0) or 0.0), weight_decay=decay))
        return made

    start = trainer.state_dict()
    theirs = _by_hand(start, rows, recipe, steppers)
    losses = [result.loss for result in trainer.run(20)]
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-9)
    for name, value in trainer.state_dict().items():
        np.testing.assert_allclose(value, theirs.weights[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.array_equal(value, start[name]) == name.startswith("attention0."), name
    for placement in placements(trainer.network).values():
        other = Trainer(definition, recipe, rows, placement=placement)
        assert [result.loss for result in other.run(20)] == losses
        assert other.state_objects() == trainer.state_objects()


def test_float32_gradients_of_the_first_step() -> None:
    rows, recipe = token_rows(), _recipe(SGD(lr=1.0), steps=1, clip_norm=0.0)
    mine, _, _ = first_step(gpt(), rows, microbatches=2)
    steppers = _decaying_matrices(recipe, torch.optim.SGD, lr=1.0)
    theirs = _by_hand(Trainer(gpt(), recipe, rows).state_dict(), rows, recipe, steppers).gradients
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.linalg.norm(mine[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


def test_float32_losses_of_twenty_steps() -> None:
    rows, recipe = token_rows(), _recipe(Adam(lr=1e-3))
    trainer = Trainer(gpt(), recipe, rows)
    theirs = _by_hand(trainer.state_dict(), rows, recipe, _decaying_matrices(recipe, torch.optim.Adam, lr=1e-3)).losses
    np.testing.assert_allclose([result.loss for result in trainer.run(20)], theirs, rtol=0, atol=1e-4)
