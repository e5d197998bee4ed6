"""Every node type's arithmetic: exact derivatives (gradcheck in float64), torch.nn's values, and the bounds that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dcnr.adapters.torch import library
from dcnr.adapters.torch.backend import DTYPES
from dcnr.adapters.torch.library import LIBRARY, valid_targets
from dcnr.adapters.torch.words import fixed_pattern
from dcnr.ids import VNodeId
from dcnr.network.graph import ConfigValue
from dcnr.network.node_type import Call, Example, Settings, TensorSpec, compute_dtype
from dcnr.network.types import CATALOGUE, cost_target, normalise_config

ROWS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """An example of a type, as two rows of tensors."""

    type: str
    example: Example
    precision: str = "float64"

    @property
    def settings(self) -> Settings:
        normalised = normalise_config(CATALOGUE[self.type], self.example.config, self.precision)
        assert not normalised.problems
        return normalised.settings

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        dtype = "int64" if self.example.indexes else compute_dtype(self.settings)
        return tuple(TensorSpec(shape=shape, dtype=dtype) for shape in self.example.inputs)

    def tensors(self) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Inputs [rows, ...], weights by name, and a cost's target: the same values whatever the precision."""
        random = torch.Generator().manual_seed(3)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=random)

        shapes = [(ROWS, *shape) for shape in self.example.inputs]
        dtype = DTYPES[compute_dtype(self.settings)]
        if self.example.indexes:
            inputs = [torch.randint(0, self.example.indexes, shape, generator=random) for shape in shapes]
        else:
            inputs = [normal(shape) for shape in shapes]
        if self.example.positive:
            inputs = [tensor.softmax(-1) for tensor in inputs]
        # Half-size weights, so that softmax is not so sharp that float32 itself misses the default tolerances.
        specs = CATALOGUE[self.type].parameters(self.settings)
        weights = {spec.name: (normal(spec.shape) / 2).to(dtype) for spec in specs}
        return (
            [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs],
            weights,
            self._target(random),
        )

    def _target(self, random: torch.Generator) -> Tensor | None:
        kind = CATALOGUE[self.type]
        if not kind.is_cost:
            return None
        spec = cost_target(self.type, self.settings, self.specs[0])
        shape = (ROWS, *spec.shape)
        if spec.dtype != "int64":
            return torch.randn(shape, dtype=torch.float64, generator=random).to(DTYPES[spec.dtype])
        classes = self.settings.get("out_dim") or self.specs[0].shape[-1]
        assert isinstance(classes, int)
        target = torch.randint(0, classes, shape, generator=random)
        ignored = kind.ignored(self.settings)
        assert ignored is not None
        target[0, 1] = ignored
        return target

    def run(self, inputs: list[Tensor], weights: dict[str, Tensor], *, training: bool = True) -> tuple[Tensor, ...]:
        target = self.tensors()[2]
        call = Call(
            vnode=VNodeId("node"),
            settings=self.settings,
            seed=1,
            step=2,
            first_row=4,
            training=training,
            target=target,
            valid=5,
        )
        found = CATALOGUE[self.type].kernel(LIBRARY, tuple(inputs), weights, call)
        assert isinstance(found, tuple)
        return found


CASES = {
    f"{kind.name} {number}": Case(type=kind.name, example=example)
    for kind in CATALOGUE.values()
    for number, example in enumerate(kind.examples)
}


def made(type_name: str, config: dict[str, ConfigValue], *inputs: tuple[int, ...], precision: str = "float64") -> Case:
    return Case(type=type_name, example=Example(config=config, inputs=inputs), precision=precision)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_derivatives(name: str) -> None:
    case = CASES[name]
    inputs, weights, _ = case.tensors()
    floating = [tensor for tensor in inputs if tensor.is_floating_point()]
    names = list(weights)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors[: len(floating)]) or inputs
        return case.run(given, dict(zip(names, tensors[len(floating) :], strict=True)))

    wanted = [tensor.requires_grad_() for tensor in (*floating, *weights.values())]
    assert torch.autograd.gradcheck(function, wanted)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", CASES)
def test_outputs_have_the_shapes_that_the_catalogue_says(name: str) -> None:
    case = CASES[name]
    inputs, weights, _ = case.tensors()
    expected = CATALOGUE[case.type].shape(case.settings, case.specs)
    outputs = case.run(inputs, weights)
    lead = () if CATALOGUE[case.type].is_cost else (ROWS,)
    assert [tuple(found.shape) for found in outputs] == [(*lead, *spec.shape) for spec in expected]
    assert [found.dtype for found in outputs] == [DTYPES[spec.dtype] for spec in expected]
    assert len(outputs) == CATALOGUE[case.type].outputs(case.settings)


@pytest.mark.parametrize("name", CASES)
def test_kernels_write_into_nothing_they_were_given(name: str) -> None:
    case = CASES[name]
    inputs, weights, _ = case.tensors()
    before = [tensor.clone() for tensor in (*inputs, *weights.values())]
    case.run(inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *weights.values()), strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not CATALOGUE[case.type].is_cost])
def test_a_row_is_computed_from_that_row_alone(name: str) -> None:
    case = CASES[name]
    inputs, weights, _ = case.tensors()
    whole = case.run(inputs, weights, training=False)
    first = case.run([tensor[:1] for tensor in inputs], weights, training=False)
    torch.testing.assert_close([found[:1] for found in whole], list(first))


# --- torch.nn's values -------------------------------------------------------------------------------------


def _attention(case: Case, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Attention by its formula, with rotary positions written as transformers writes them."""
    s = case.settings
    heads, groups, size = s.get("num_heads", 1), s.get("num_kv_heads", 1), s["head_dim"]
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    assert isinstance(size, int)
    rows, length, _ = x.shape

    def part(name: str, count: int) -> Tensor:
        found = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))
        found = found.view(rows, length, count, size)
        if f"{name}_norm.weight" in w:
            norm = nn.RMSNorm(size, eps=1e-6)
            found = torch.func.functional_call(norm, {"weight": w[f"{name}_norm.weight"]}, (found,))
        return found.transpose(1, 2)

    q, k, v = part("q", heads), part("k", groups), part("v", groups)
    if s["position_encoding"] == "rope":
        scaling = s.get("rope_scaling") or 1.0
        assert isinstance(scaling, float)
        frequency = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(length, dtype=torch.float64) / scaling, frequency)
        cos, sin = (
            turn.to(x.dtype) for turn in (torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin())
        )

        def rotate_half(t: Tensor) -> Tensor:
            first, second = t[..., : size // 2], t[..., size // 2 :]
            return torch.cat([-second, first], dim=-1)

        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / size**0.5
    if s["causal"]:
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    window = s.get("window")
    if isinstance(window, int):
        near = torch.ones(length, length, dtype=torch.bool)
        far = ~near.tril(window - 1) | ~near.triu(1 - window)
        scores = scores.masked_fill(far, float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, heads * size)
    if "o.weight" in w:
        mixed = mixed @ w["o.weight"].T + w.get("o.bias", torch.zeros((), dtype=x.dtype))
    return mixed


def _cost(case: Case, x: Tensor, target: Tensor) -> Tensor:
    s = case.settings
    if s.get("cost_function") == "mse":
        return nn.MSELoss(reduction="sum")(x, target) / 5
    ignored, smoothing, z = s["ignore_index"], s["label_smoothing"], s["z_loss"]
    assert isinstance(ignored, int)
    assert isinstance(smoothing, float)
    assert isinstance(z, float)
    flat, classes = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    counts = classes != ignored
    if s.get("cost_function") == "ce":
        entropy = (1 - smoothing) * nn.NLLLoss(ignore_index=ignored, reduction="sum")(flat.log(), classes)
        return (entropy - smoothing * flat[counts].log().mean(-1).sum()) / 5
    entropy = nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=smoothing, reduction="sum")(flat, classes)
    return (entropy + z * (flat[counts].logsumexp(-1) ** 2).sum()) / 5


def _reference(case: Case, inputs: list[Tensor], weights: dict[str, Tensor], target: Tensor | None) -> list[Tensor]:
    """The same by torch.nn, or by formula where torch.nn has no such module."""
    (x, *rest), s = inputs, case.settings

    def module(layer: nn.Module, **given: Tensor) -> list[Tensor]:
        found: Tensor = torch.func.functional_call(layer, given or weights, (x,))
        return [found]

    match case.type:
        case "linear":
            return module(nn.Linear(4, 5, bias="bias" in weights))
        case "embedder":
            table = module(nn.Embedding(7, 4), weight=weights["weight"])[0]
            if "position.weight" in weights:
                positions = {"weight": weights["position.weight"]}
                table = table + torch.func.functional_call(nn.Embedding(6, 4), positions, (torch.arange(5),))
            return [table]
        case "layernorm":
            eps = s["eps"]
            assert isinstance(eps, float)
            return module(nn.LayerNorm(4, eps=eps, bias="bias" in weights))
        case "rmsnorm":
            return module(nn.RMSNorm(4, eps=1e-5))
        case "attention" | "attention_head":
            return [_attention(case, x, weights)]
        case "mask":
            length, value = x.shape[-1], s["mask_val"]
            assert isinstance(value, float)
            hidden = (
                torch.ones(length, length, dtype=torch.bool).triu(1) if s["causal"] else torch.zeros(length, length)
            )
            if s["random_prob"]:
                hidden = fixed_pattern(seed=5, length=length, rate=0.5).logical_and(torch.eye(length) == 0)
            return [torch.where(hidden.bool(), torch.tensor(value, dtype=x.dtype), x)]
        case "gelu":
            return module(nn.GELU(approximate=str(s["approximate"])))
        case "relu" | "silu" | "tanh" | "sigmoid":
            layers = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
            return module(layers[case.type]())
        case "softmax":
            return module(nn.Softmax(dim=-1))
        case "swiglu":
            return [x[..., :2] * nn.SiLU()(x[..., 2:])]
        case "dropout":
            return module(nn.Dropout(0.4).eval())
        case "scale":
            return [x * -0.3]
        case "broadcast":
            return [x, x, x]
        case "stack":
            return [torch.cat(inputs, 1 if s["axis"] == 0 else 2)]
        case "add":
            return [x + rest[0] + rest[1]]
        case "multiply":
            return [x * rest[0] * rest[1]]
        case "matmul":
            return [torch.einsum("...ij,...jk->...ik", x, rest[0])]
        case "reshape":
            return [x.view(ROWS, *((2, 6) if s["target_shape"] == (2, -1) else (4, 3, 1)))]
        case "transpose":
            return [x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)]
        case "slice":
            return [{(1, -1): x[:, :, 1:-1], (-2, None): x[:, -2:], (0, 2): x[:, :2]}[s["start"], s["stop"]]]
        case "flatten":
            return module(nn.Flatten())
        case "tied_lm_head_ce":
            assert target is not None
            return [_cost(case, x @ weights["weight"].T, target)]
        case "cost":
            assert target is not None
            return [_cost(case, x, target)]
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_values_and_gradients_equal_torch(name: str, precision: str) -> None:
    case = Case(type=CASES[name].type, example=CASES[name].example, precision=precision)
    inputs, weights, target = case.tensors()
    wanted = [t.requires_grad_() for t in (*inputs, *weights.values()) if t.is_floating_point()]
    ours, theirs = case.run(inputs, weights, training=False), _reference(case, inputs, weights, target)
    torch.testing.assert_close(list(ours), theirs)
    seeds = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in theirs]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, seeds), torch.autograd.grad(theirs, wanted, seeds))


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_float64_rounded(name: str) -> None:
    """Values and gradients, from the same rounded inputs: torch's kernels add up in float32, and round what they give."""
    case = Case(type=CASES[name].type, example=CASES[name].example, precision="bf16")
    inputs, weights, _ = case.tensors()
    whole = Case(type=case.type, example=case.example)

    def derived(case: Case, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
        def given(tensor: Tensor) -> Tensor:
            copy = tensor.detach() if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype)
            return copy.requires_grad_() if copy.is_floating_point() else copy

        taken, read = [given(t) for t in inputs], {key: given(t) for key, t in weights.items()}
        found = case.run(taken, read)
        wanted = [t for t in (*taken, *read.values()) if t.is_floating_point()]
        seeds = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in found]
        return list(found), list(torch.autograd.grad(found, wanted, seeds))

    rounded, exact = derived(case, None), derived(whole, torch.float64)
    expected = torch.float32 if CATALOGUE[case.type].is_cost else torch.bfloat16
    assert {t.dtype for t in (*rounded[0], *rounded[1])} == {expected}
    for found, true in zip((*rounded[0], *rounded[1]), (*exact[0], *exact[1]), strict=True):
        size = max(1.0, true.abs().max().item())
        torch.testing.assert_close(found.double(), true, rtol=0.0, atol=2**-6 * size)


# --- what single types promise ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention 0", "attention 3", "attention_head 0"])
def test_rows_do_not_see_later_positions(name: str) -> None:
    case = CASES[name]
    inputs, weights, _ = case.tensors()
    (before,) = case.run(inputs, weights)
    changed = inputs[0].clone()
    changed[:, 3:] += 1.0
    (after,) = case.run([changed], weights)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_window_hides_what_is_older() -> None:
    case = made("attention", {"num_heads": 2, "dim": 8, "window": 2}, (6, 8))
    inputs, weights, _ = case.tensors()
    (before,) = case.run(inputs, weights)
    changed = inputs[0].clone()
    changed[:, 0] += 1.0
    (after,) = case.run([changed], weights)
    assert not torch.allclose(before[:, :2], after[:, :2])
    assert torch.equal(before[:, 2:], after[:, 2:])


def test_a_fixed_pattern_is_a_corner_of_a_longer_one() -> None:
    whole = fixed_pattern(seed=9, length=64, rate=0.25)
    assert torch.equal(fixed_pattern(seed=9, length=7, rate=0.25), whole[:7, :7])
    assert not torch.equal(fixed_pattern(seed=8, length=64, rate=0.25), whole)
    assert 0.2 < whole.double().mean().item() < 0.3


def test_a_step_without_valid_targets_has_loss_zero() -> None:
    settings = CASES["cost 1"].settings
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    call = Call(vnode=VNodeId("node"), settings=settings, target=torch.full((2, 3), -100), valid=0)
    (loss,) = CATALOGUE["cost"].kernel(LIBRARY, (x,), {}, call)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert not grad.any()


def test_valid_targets_are_counted() -> None:
    target = torch.tensor([[0, -100, 3], [2, 1, -100]])
    assert valid_targets("cost", CASES["cost 1"].settings, target) == 4
    assert valid_targets("cost", CASES["cost 2"].settings, target) == 5
    assert valid_targets("cost", CASES["cost 0"].settings, torch.zeros(2, 3, 4)) == 24
    assert valid_targets("tied_lm_head_ce", CASES["tied_lm_head_ce 0"].settings, target) == 4


def test_a_cost_in_double_precision_loses_less() -> None:
    def loss(precision: str) -> float:
        config: dict[str, ConfigValue] = {"cost_function": "ce_logits", "cost_precision": precision}
        case = made("cost", config, (400, 50), precision="float32")
        inputs, weights, _ = case.tensors()
        (found,) = case.run([inputs[0].float().to(DTYPES[precision])], weights)
        assert found.dtype == DTYPES[precision]
        return found.item()

    exact = made("cost", {"cost_function": "ce_logits"}, (400, 50))
    inputs, weights, _ = exact.tensors()
    (true,) = exact.run([inputs[0].float().double()], weights)
    assert loss("float64") == pytest.approx(true.item(), rel=6e-8)


class _Largest:
    """The largest result of any operation while it is active, in elements."""

    def __init__(self) -> None:
        self.elements = 0

    def watch(self) -> torch.utils._python_dispatch.TorchDispatchMode:
        outer = self

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(  # type: ignore[override]
                self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
            ) -> object:
                result = func(*args, **(kwargs or {}))  # type: ignore[dict-item]
                if isinstance(result, Tensor):
                    outer.elements = max(outer.elements, result.numel())
                return result

        return Mode()


def test_a_head_with_its_cost_never_holds_the_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "HEAD_CHUNK", 1 << 12)
    config: dict[str, ConfigValue] = {"in_dim": 8, "out_dim": 512, "tie_weight_alias": "head"}
    case = made("tied_lm_head_ce", config, (100, 8))
    inputs, weights, target = case.tensors()
    wanted = [tensor.requires_grad_() for tensor in (*inputs, *weights.values())]
    largest = _Largest()
    with largest.watch():
        (loss,) = case.run(inputs, weights)
        grads = torch.autograd.grad(loss, wanted)
    # Logits of all positions would be 2 * 100 * 512 elements; a chunk is 8 of them, as large as the weight.
    assert largest.elements == 512 * 8
    assert target is not None
    expected = _cost(case, inputs[0] @ weights["weight"].T, target)
    torch.testing.assert_close((loss, *grads), (expected, *torch.autograd.grad(expected, wanted)))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_no_more_is_kept_for_backward_than_the_catalogue_says(name: str, precision: str) -> None:
    """What autograd saves, besides the inputs, the weights and the outputs themselves."""
    case = Case(type=CASES[name].type, example=CASES[name].example, precision=precision)
    inputs, weights, target = case.tensors()
    for tensor in (*inputs, *weights.values()):
        if tensor.is_floating_point():
            tensor.requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = case.run(inputs, weights)
    given = [*inputs, *weights.values(), *outputs, *([] if target is None else [target])]
    for tensor in given:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    kind, settings = CATALOGUE[case.type], case.settings
    specs = kind.shape(settings, case.specs)
    # Angles, and patterns of [T, T], are kept once however many rows there are.
    shared = 4 * sum(spec.shape[0] * 2 * 8 for spec in case.specs if spec.shape) + 64
    assert sum(saved.values()) <= ROWS * kind.kept(settings, case.specs, specs) + shared
