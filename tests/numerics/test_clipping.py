"""The clipping factor against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.numerics.gradients import first_step
from tests.numerics.networks import gpt, token_rows


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_the_factor_is_clip_grad_norm(precision: str, tolerance: float, clip_norm: float) -> None:
    definition, rows = gpt(precision=precision), token_rows()
    whole, _, unclipped = first_step(definition, rows)
    clipped, _, scale = first_step(definition, rows, clip_norm=clip_norm)
    assert unclipped == 1.0
    parameters = []
    for gradient in whole.values():
        parameter = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=torch.from_numpy(gradient).dtype))
        parameter.grad = torch.from_numpy(gradient).clone()
        parameters.append(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    assert scale == pytest.approx(min(1.0, clip_norm / (norm + 1e-6)), rel=tolerance)
    assert (scale < 1.0) == (clip_norm < 1.0)
    for mine, theirs in zip(clipped.values(), parameters, strict=True):
        assert theirs.grad is not None
        np.testing.assert_allclose(mine, theirs.grad.numpy(), rtol=10 * tolerance)


def test_by_vnode_each_ones_own_gradients_are_clipped() -> None:
    definition, rows, most = gpt(precision="float64"), token_rows(), 0.05
    whole, _, _ = first_step(definition, rows)
    clipped, _, scale = first_step(definition, rows, clip_norm=most, clip_scope="vnode")
    assert scale == 1.0, "there is no factor of the whole network"
    factors = set()
    for vnode in {name.partition(".")[0] for name in whole}:
        names = [name for name in whole if name.partition(".")[0] == vnode]
        parameters = []
        for name in names:
            parameter = torch.nn.Parameter(torch.zeros(whole[name].shape, dtype=torch.float64))
            parameter.grad = torch.from_numpy(whole[name]).clone()
            parameters.append(parameter)
        factors.add(min(1.0, most / (torch.nn.utils.clip_grad_norm_(parameters, most).item() + 1e-6)))
        for name, theirs in zip(names, parameters, strict=True):
            assert theirs.grad is not None
            np.testing.assert_allclose(clipped[name], theirs.grad.numpy(), rtol=1e-11, err_msg=name)
    assert len(factors) > 2
    assert 1.0 in factors
