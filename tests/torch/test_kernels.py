"""Every kernel: exact derivatives (gradcheck in float64), and torch.nn's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from dcnr.adapters.torch.kernels import KERNELS, Call, valid_targets
from dcnr.ids import VNodeId
from dcnr.network.graph import ConfigValue
from dcnr.network.types import CATALOGUE, Settings, normalise_config

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel call with inputs [rows, ...] of given shapes; ``tokens`` is a vocabulary's size where inputs are indexes."""

    type: str
    config: dict[str, ConfigValue] = field(default_factory=dict)
    inputs: Shapes = ((2, 3, 4),)
    tokens: int = 0
    target: Callable[[], Tensor] | None = None
    valid: int = 1

    @property
    def settings(self) -> Settings:
        normalised = normalise_config(CATALOGUE[self.type], self.config, "float64")
        assert not normalised.problems
        return normalised.settings


CASES = {
    "linear": Case(type="linear", config={"in_dim": 4, "out_dim": 5}),
    "linear without bias": Case(type="linear", config={"in_dim": 4, "out_dim": 5, "bias": False}),
    "embedder": Case(
        type="embedder",
        config={"vocab_size": 7, "dim": 4, "seq_len": 6, "position_encoding": "learned"},
        inputs=((2, 5),),
        tokens=7,
    ),
    "embedder without positions": Case(
        type="embedder", config={"vocab_size": 7, "dim": 4, "position_encoding": "none"}, inputs=((2, 5),), tokens=7
    ),
    "layernorm": Case(type="layernorm", config={"dim": 4}),
    "layernorm without bias": Case(type="layernorm", config={"dim": 4, "bias": False, "eps": 1e-3}),
    "attention": Case(type="attention", config={"num_heads": 2, "dim": 8}, inputs=((2, 5, 8),)),
    "attention, grouped heads, biases": Case(
        type="attention",
        config={"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "dim": 6, "input_dim": 3, "qkv_bias": True},
        inputs=((2, 5, 3),),
    ),
    "attention, whole view": Case(
        type="attention",
        config={
            "num_heads": 2,
            "dim": 4,
            "causal": False,
            "position_encoding": "none",
            "output_projection": False,
        },
        inputs=((2, 5, 4),),
    ),
    "gelu": Case(type="gelu"),
    "gelu tanh": Case(type="gelu", config={"approximate": "tanh"}),
    "relu": Case(type="relu"),
    "dropout": Case(type="dropout", config={"rate": 0.4}),
    "broadcast": Case(type="broadcast", config={"num_outputs": 3}),
    "add": Case(type="add", inputs=((2, 3), (2, 3), (2, 3))),
    "mse": Case(
        type="cost", config={"cost_function": "mse"}, target=lambda: torch.linspace(-1, 1, 24).view(2, 3, 4).double()
    ),
    "ce_logits": Case(
        type="cost",
        config={"cost_function": "ce_logits"},
        target=lambda: torch.tensor([[0, -100, 3], [2, 1, -100]]),
        valid=5,
    ),
}


def _tensors(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    if case.tokens:
        inputs = [torch.randint(0, case.tokens, shape, generator=random) for shape in case.inputs]
    else:
        inputs = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in case.inputs]
    weights = {
        # Half-size weights, so that softmax is not so sharp that float32 itself misses the default tolerances.
        spec.name: torch.randn(spec.shape, dtype=torch.float64, generator=random) / 2
        for spec in CATALOGUE[case.type].parameters(case.settings)
    }
    return inputs, weights


def _run(case: Case, inputs: list[Tensor], weights: dict[str, Tensor], *, training: bool = True) -> tuple[Tensor, ...]:
    call = Call(
        vnode=VNodeId("node"),
        settings=case.settings,
        seed=1,
        step=2,
        first_row=4,
        training=training,
        target=None if case.target is None else case.target(),
        valid=case.valid,
    )
    return KERNELS[case.type](tuple(inputs), weights, call)


def test_every_type_has_a_case() -> None:
    assert {case.type for case in CASES.values()} == CATALOGUE.keys()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_derivatives(name: str) -> None:
    case = CASES[name]
    inputs, weights = _tensors(case)
    floating = [] if case.tokens else inputs
    names = list(weights)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors[: len(floating)]) or inputs
        return _run(case, given, dict(zip(names, tensors[len(floating) :], strict=True)))

    wanted = [tensor.requires_grad_() for tensor in (*floating, *weights.values())]
    assert torch.autograd.gradcheck(function, wanted)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", CASES)
def test_kernels_write_into_nothing_they_were_given(name: str) -> None:
    case = CASES[name]
    inputs, weights = _tensors(case)
    before = [tensor.clone() for tensor in (*inputs, *weights.values())]
    _run(case, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *weights.values()), strict=True))


class _Attention(nn.Module):
    """Attention by its formula, with rotary positions written as transformers writes them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.settings = case.settings

    def forward(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        s = self.settings
        heads, groups, size = s["num_heads"], s["num_kv_heads"], s["head_dim"]
        assert isinstance(heads, int)
        assert isinstance(groups, int)
        assert isinstance(size, int)
        rows, length, _ = x.shape

        def part(name: str, count: int) -> Tensor:
            made = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))
            return made.view(rows, length, count, size).transpose(1, 2)

        q, k, v = part("q", heads), part("k", groups), part("v", groups)
        if s["position_encoding"] == "rope":
            frequency = 10000.0 ** -(torch.arange(0, size, 2, dtype=x.dtype) / size)
            angle = torch.outer(torch.arange(length, dtype=x.dtype), frequency)
            cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

            def rotate_half(t: Tensor) -> Tensor:
                first, second = t[..., : size // 2], t[..., size // 2 :]
                return torch.cat([-second, first], dim=-1)

            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / size**0.5
        if s["causal"]:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, heads * size)
        if s["output_projection"]:
            mixed = mixed @ w["o.weight"].T + w.get("o.bias", torch.zeros((), dtype=x.dtype))
        return mixed


def _reference(case: Case, inputs: list[Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
    """The same by torch.nn, or by formula where torch.nn has no such module."""
    (x, *rest), s = inputs, case.settings
    match case.type:
        case "linear":
            linear = nn.Linear(4, 5, bias="bias" in weights)
            return [torch.func.functional_call(linear, weights, (x,))]
        case "embedder":
            table = torch.func.functional_call(nn.Embedding(7, 4), {"weight": weights["weight"]}, (x,))
            if "position.weight" in weights:
                positions = {"weight": weights["position.weight"]}
                table = table + torch.func.functional_call(nn.Embedding(6, 4), positions, (torch.arange(5),))
            return [table]
        case "layernorm":
            eps = s["eps"]
            assert isinstance(eps, float)
            norm = nn.LayerNorm(4, eps=eps, bias="bias" in weights)
            return [torch.func.functional_call(norm, weights, (x,))]
        case "attention":
            return [_Attention(case)(x, weights)]
        case "gelu":
            return [nn.GELU(approximate=str(s["approximate"]))(x)]
        case "relu":
            return [nn.ReLU()(x)]
        case "dropout":
            return [nn.Dropout(0.4).eval()(x)]
        case "broadcast":
            return [x, x, x]
        case "add":
            return [x + rest[0] + rest[1]]
        case _:
            assert case.target is not None
            if s["cost_function"] == "mse":
                return [nn.MSELoss(reduction="sum")(x, case.target())]
            return [nn.CrossEntropyLoss(reduction="sum")(x.view(-1, 4), case.target().view(-1)) / 5]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs, weights = _tensors(case)
    inputs = [t if case.tokens else t.to(dtype) for t in inputs]
    weights = {key: t.to(dtype) for key, t in weights.items()}
    if case.target is not None and case.target().is_floating_point():
        case = Case(**(vars(case) | {"target": lambda: CASES[name].target().to(dtype)}))  # type: ignore[misc]
    wanted = [t.requires_grad_() for t in (*inputs, *weights.values()) if t.is_floating_point()]
    ours, theirs = _run(case, inputs, weights, training=False), _reference(case, inputs, weights)
    torch.testing.assert_close(list(ours), theirs)
    seeds = [torch.linspace(-1, 2, t.numel(), dtype=dtype).view(t.shape) for t in theirs]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, seeds), torch.autograd.grad(theirs, wanted, seeds))


def test_rows_do_not_see_later_positions() -> None:
    case = CASES["attention"]
    inputs, weights = _tensors(case)
    (before,) = _run(case, inputs, weights)
    changed = inputs[0].clone()
    changed[:, 3:] += 1.0
    (after,) = _run(case, [changed], weights)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_step_without_valid_targets_has_loss_zero() -> None:
    case = Case(type="cost", config={"cost_function": "ce_logits"}, target=lambda: torch.full((2, 3), -100), valid=0)
    inputs, _ = _tensors(case)
    (loss,) = _run(case, [inputs[0].requires_grad_()], {})
    (grad,) = torch.autograd.grad(loss, inputs)
    assert loss.item() == 0.0
    assert not grad.any()


def test_valid_targets_are_counted() -> None:
    assert valid_targets(CASES["ce_logits"].settings, torch.tensor([[0, -100, 3], [2, 1, -100]])) == 4
    assert valid_targets(CASES["mse"].settings, torch.zeros(2, 3, 4)) == 24
