"""torch's optimizers without its compilers: nothing of those is imported, and not a bit differs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dcnr.adapters.torch import optimizers

TRAIN = """
import sys
import dcnr.adapters.torch.environment as environment
environment.prepare(1)
import torch
from dcnr.adapters.torch import numeric_class, optimizers
numeric_class.measure(1)
weight = torch.ones(4, 4)
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Muon):
    weight.grad = torch.full((4, 4), 0.5)
    optimizers.step(kind([weight], lr=0.1))
assert not torch.equal(weight, torch.ones(4, 4))
print(*sorted({name for name in sys.modules if name in ("torch._dynamo", "torch._inductor", "sympy")}))
"""


def test_training_imports_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
        (torch.optim.Muon, {"momentum": 0.9}),
    ],
    ids=["adamw fused", "adamw foreach", "adam", "sgd", "muon"],
)
def test_a_step_is_torchs_own_step(kind: Any, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(8, 6, generator=generator)
    weights = (first.clone(), first.clone())
    plain, ours = (kind([weight], lr=0.01, **options) for weight in weights)
    for _ in range(3):
        gradient = torch.randn(8, 6, generator=generator)
        for weight in weights:
            weight.grad = gradient.clone()
        plain.step()
        optimizers.step(ours)
        assert torch.equal(*weights)
        assert torch.is_grad_enabled()
    assert not torch.equal(weights[1], first)
