"""States: their bytes, their strict reading, and optimizers against torch's own on the same gradients."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from dcnr.adapters.torch.state import StateCopy, VNodeState, layout, serialise_snapshot
from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import ConfigValue, Definition
from dcnr.session.recipe import SGD, Adam, AdamW, Muon, Optimizer, Recipe
from tests.numerics.networks import gpt

OPTIMIZERS = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    "adam": Adam(lr=0.01, weight_decay=0.1),
    "sgd": SGD(lr=0.1, weight_decay=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9),
    "muon": Muon(lr=0.01, weight_decay=0.1),
    "for-loop": replace(AdamW(lr=0.01), implementation="for-loop"),
    "foreach": replace(AdamW(lr=0.01), implementation="foreach"),
}
ATTENTION = VNodeId("attention0")
EMBEDDER = VNodeId("tok")


def _recipe(optimizer: Optimizer) -> Recipe:
    return Recipe(steps=100, optimizer=optimizer)


def _with(definition: Definition, node: str, **config: ConfigValue) -> Network:
    nodes = tuple(replace(n, config=dict(n.config) | config) if n.id == node else n for n in definition.nodes)
    return analyse(replace(definition, nodes=nodes))


def _gradient(state: VNodeState, step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=random) for name, p in state.parameters.items()}


def _step(state: VNodeState, step: int, *, lr: float = 0.01, scale: float = 1.0) -> bool:
    state.sums(step)[state.vnode] = _gradient(state, step)
    return state.update(step=step, learning_rate=lr, grad_scale=scale).finite


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("vnode", [ATTENTION, EMBEDDER, VNodeId("norm")])
def test_a_loaded_state_goes_on_with_the_same_bits(name: str, vnode: VNodeId) -> None:
    network, recipe = analyse(gpt()), _recipe(OPTIMIZERS[name])
    state = VNodeState.initial(network, recipe, vnode, training=True)
    for step in (1, 2):
        assert list(layout(network, recipe, vnode)) == sorted(safetensors.numpy.load(state.to_bytes()))
        again = VNodeState.load(network, recipe, vnode, state.to_bytes(), training=True)
        before = state.to_bytes()
        assert _step(state, step)
        assert _step(again, step)
        assert state.to_bytes() == again.to_bytes() != before


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum", "for-loop", "foreach"])
def test_optimizers_are_torchs(name: str) -> None:
    chosen = OPTIMIZERS[name]
    network, recipe = analyse(gpt()), _recipe(chosen)
    state = VNodeState.initial(network, recipe, ATTENTION, training=True)
    mine = {key: value.clone() for key, value in state.parameters.items()}
    how: dict[str, Any] = {"fused": chosen.implementation == "fused", "foreach": chosen.implementation == "foreach"}
    groups = [{"params": [p], "weight_decay": chosen.weight_decay if p.dim() > 1 else 0.0} for p in mine.values()]
    theirs: torch.optim.Optimizer
    match chosen.kind:
        case "sgd":
            theirs = torch.optim.SGD(groups, lr=0.03, momentum=chosen.momentum, **how)
        case "adam":
            theirs = torch.optim.Adam(groups, lr=0.03, betas=chosen.betas, eps=chosen.eps, **how)
        case _:
            theirs = torch.optim.AdamW(groups, lr=0.03, betas=chosen.betas, eps=chosen.eps, **how)
    for step in (1, 2, 3):
        for key, gradient in _gradient(state, step).items():
            mine[key].grad = gradient * 0.5
        theirs.step()
        _step(state, step, lr=0.03, scale=0.5)
        assert all(torch.equal(mine[key], value) for key, value in state.parameters.items())


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum", "muon"])
def test_weights_of_bf16_are_updated_in_float32_and_rounded_once(name: str) -> None:
    recipe = _recipe(OPTIMIZERS[name])
    network, wide = analyse(gpt(precision="bf16")), analyse(gpt())
    state = VNodeState.initial(network, recipe, ATTENTION, training=True)
    for step in (1, 2, 3):
        # As if the weights had always been what bfloat16 made of them, and nothing else had been rounded.
        before = state.copy().tensors
        assert {key: tensor.dtype for key, tensor in before.items() if key.startswith("optim.")} == {
            key: torch.float32 for key in before if key.startswith("optim.")
        }
        copy = StateCopy(tensors={key: tensor.float() for key, tensor in before.items()})
        other = VNodeState.load(wide, recipe, ATTENTION, serialise_snapshot(copy), training=True)
        state.sums(step)[ATTENTION] = _gradient(other, step)
        state.update(step=step, learning_rate=0.03, grad_scale=0.5)
        other.sums(step)[ATTENTION] = _gradient(other, step)
        other.update(step=step, learning_rate=0.03, grad_scale=0.5)
        for key, value in other.parameters.items():
            assert state.parameters[key].dtype == torch.bfloat16
            assert torch.equal(state.parameters[key], value.bfloat16())
    again = VNodeState.load(network, recipe, ATTENTION, state.to_bytes(), training=True)
    assert again.to_bytes() == state.to_bytes()
    for one in (state, again):
        one.sums(4)[ATTENTION] = _gradient(other, 4)
        one.update(step=4, learning_rate=0.03, grad_scale=1.0)
    assert again.to_bytes() == state.to_bytes()


def test_a_cast_weight_follows_its_update() -> None:
    state = VNodeState.initial(analyse(gpt()), _recipe(OPTIMIZERS["adamw"]), ATTENTION, training=True)
    first = state.weight("q.weight", torch.bfloat16)
    assert state.weight("q.weight", torch.bfloat16) is first
    assert state.weight("q.weight", torch.float32) is state.parameters["q.weight"]
    _step(state, 1)
    second = state.weight("q.weight", torch.bfloat16)
    assert torch.equal(second, state.parameters["q.weight"].bfloat16())
    assert not torch.equal(first, second)


def test_implementations_differ_in_bits_so_the_recipe_names_one() -> None:
    """Foreach and the plain loop agree. New sessions are fused, and their record says so."""
    network = analyse(gpt())
    found = {}
    for implementation in ("fused", "foreach", "for-loop"):
        recipe = _recipe(replace(AdamW(lr=0.01), implementation=implementation))
        state = VNodeState.initial(network, recipe, ATTENTION, training=True)
        for step in range(1, 9):
            _step(state, step)
        found[implementation] = state.to_bytes()
    assert found["foreach"] == found["for-loop"] != found["fused"]
    assert Recipe(steps=1).to_json()["optimizer"]["implementation"] == "fused"


def test_muon_is_for_the_matrices_of_linear_and_attention() -> None:
    network = analyse(gpt(tied=False))
    for node, matrix in (("attention0", "q.weight"), ("mlp0", "weight"), ("head", "weight")):
        vnode = VNodeId(node)
        state = VNodeState.initial(network, _recipe(OPTIMIZERS["muon"]), vnode, training=True)
        expected = state.parameters[matrix].clone()
        optimizer = torch.optim.Muon([expected], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        expected.grad = _gradient(state, 1)[matrix]
        optimizer.step()
        _step(state, 1)
        assert torch.equal(expected, state.parameters[matrix])
    slots = {key.rpartition(".")[2] for key in layout(network, _recipe(OPTIMIZERS["muon"]), EMBEDDER)}
    assert slots == {"weight", "exp_avg", "exp_avg_sq", "step"}
    bias = [key for key in layout(network, _recipe(OPTIMIZERS["muon"]), VNodeId("mlp0")) if "bias" in key]
    assert bias == ["optim.bias.exp_avg", "optim.bias.exp_avg_sq", "optim.bias.step", "param.bias"]


def test_a_nodes_own_choices_beat_the_sessions() -> None:
    recipe = _recipe(OPTIMIZERS["sgd"])
    network = _with(gpt(), "mlp0", optimizer="adamw", weight_decay=0.3, lr_scale=0.5)
    vnode = VNodeId("mlp0")
    state = VNodeState.initial(network, recipe, vnode, training=True)
    expected = {key: value.clone() for key, value in state.parameters.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [expected["weight"]], "weight_decay": 0.3},
            {"params": [expected["bias"]], "weight_decay": 0.0},
        ],
        lr=0.005,
        fused=True,
    )
    for key, gradient in _gradient(state, 1).items():
        expected[key].grad = gradient
    theirs.step()
    _step(state, 1, lr=0.01)
    assert all(torch.equal(expected[key], value) for key, value in state.parameters.items())


def test_a_node_that_chooses_sgd_has_no_momentum_of_another_optimizer() -> None:
    network, vnode = _with(gpt(), "mlp0", optimizer="sgd"), VNodeId("mlp0")
    muon = OPTIMIZERS["muon"]
    assert [key for key in layout(network, _recipe(muon), vnode) if key.startswith("optim")] == []
    state = VNodeState.initial(network, _recipe(muon), vnode, training=True)
    mine = {key: value.clone() for key, value in state.parameters.items()}
    theirs = torch.optim.SGD([{"params": [mine["weight"]], "weight_decay": 0.1}, {"params": [mine["bias"]]}], lr=0.01)
    for step in (1, 2):
        for key, gradient in _gradient(state, step).items():
            mine[key].grad = gradient
        theirs.step()
        _step(state, step)
    for key, value in state.parameters.items():
        torch.testing.assert_close(value, mine[key], rtol=1e-6, atol=1e-7)
    # A session that was recorded with it has it, and its checkpoints are read.
    recorded = _recipe(replace(muon, sgd_momentum=muon.momentum))
    assert "optim.weight.momentum_buffer" in layout(network, recorded, vnode)
    assert "optim.weight.momentum_buffer" in layout(network, _recipe(OPTIMIZERS["momentum"]), vnode)


def test_a_frozen_vnode_keeps_weights_alone() -> None:
    network = _with(gpt(), "mlp0", trainable=False)
    assert list(layout(network, _recipe(AdamW()), VNodeId("mlp0"))) == ["param.bias", "param.weight"]


def test_weights_are_read_without_the_optimizer() -> None:
    network, recipe = analyse(gpt()), _recipe(AdamW())
    state = VNodeState.initial(network, recipe, ATTENTION, training=True)
    reader = VNodeState.load(network, recipe, ATTENTION, state.to_bytes(), training=False)
    assert all(torch.equal(reader.parameters[key], value) for key, value in state.parameters.items())
    assert len(reader.to_bytes()) < len(state.to_bytes()) / 2


def test_equal_states_have_equal_bytes_and_a_copy_stays() -> None:
    network, recipe = analyse(gpt()), _recipe(AdamW())
    first, second = (VNodeState.initial(network, recipe, ATTENTION, training=True) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    copy = first.copy()
    _step(first, 1)
    assert hashlib.sha256(serialise_snapshot(copy)).digest() == hashlib.sha256(second.to_bytes()).digest()
    other = VNodeState.initial(network, replace(recipe, seed=1), ATTENTION, training=True)
    assert other.to_bytes() != second.to_bytes()


def test_tensors_of_a_state_are_aligned_as_torch_aligns() -> None:
    network, recipe = analyse(gpt()), _recipe(AdamW())
    data = VNodeState.initial(network, recipe, ATTENTION, training=True).to_bytes()
    state = VNodeState.load(network, recipe, ATTENTION, data, training=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.parameters.values())


def _damaged(data: bytes) -> dict[str, tuple[bytes, str]]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def rewritten(change: dict[str, Any]) -> bytes:
        text = json.dumps({key: value for key, value in (header | change).items() if value}).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    weight = header["param.o.weight"]
    return {
        "empty": (b"", "0 bytes"),
        "cut in the header": (data[:40], "truncated header"),
        "cut in a tensor": (data[:-3], "param.v.weight"),
        "longer": (data + b"\0", "expected"),
        "noise": (bytes(8) + data, "Expecting value"),
        "missing": (rewritten({"param.o.weight": None}), "param.o.weight.*missing"),
        "unknown": (rewritten({"param.z": weight}), "param.z.*not expected"),
        "dtype": (rewritten({"param.o.weight": weight | {"dtype": "F64"}}), "param.o.weight.*F64"),
        "shape": (rewritten({"param.o.weight": weight | {"shape": [16, 64]}}), r"param.o.weight.*\[16, 64\]"),
        "offsets": (rewritten({"param.o.weight": weight | {"data_offsets": [0, 9]}}), r"param.o.weight.*\[0, 9\]"),
    }


def test_a_damaged_state_object_is_refused_by_name() -> None:
    network, recipe = analyse(gpt()), _recipe(AdamW())
    data = VNodeState.initial(network, recipe, ATTENTION, training=True).to_bytes()
    for damaged, expected in _damaged(data).values():
        for training in (True, False):
            with pytest.raises(ComputeError, match=f"attention0.*{expected}"):
                VNodeState.load(network, recipe, ATTENTION, damaged, training=training)


def test_a_state_object_of_another_optimizer_is_refused() -> None:
    network = analyse(gpt())
    data = VNodeState.initial(network, _recipe(AdamW()), ATTENTION, training=True).to_bytes()
    with pytest.raises(ComputeError, match=r"attention0.*optim.k.weight.exp_avg.*not expected"):
        VNodeState.load(network, _recipe(SGD()), ATTENTION, data, training=True)


def test_gradients_of_uses_are_added_once() -> None:
    network, recipe = analyse(gpt()), _recipe(SGD(lr=1.0))
    assert network.uses(EMBEDDER) == ("tok", "head")
    state = VNodeState.initial(network, recipe, EMBEDDER, training=True)
    shape = state.parameters["weight"].shape
    state.sums(1)[VNodeId("head")] = {"weight": torch.full(shape, 2.0)}
    state.sums(1)[VNodeId("tok")] = {"weight": torch.full(shape, 1.0)}
    assert state.grad_square(1) == 9.0 * np.prod(shape)
    assert state.update(step=1, learning_rate=0.0, grad_scale=1.0).finite
    assert state.sums(1) == {}


def test_an_infinite_gradient_is_noticed() -> None:
    network, recipe = analyse(gpt()), _recipe(SGD(lr=1.0))
    state = VNodeState.initial(network, recipe, VNodeId("norm"), training=True)
    assert not _step(state, 1, lr=float("inf"))


def test_a_state_begins_with_the_weights_of_another_optimizers_object() -> None:
    network = analyse(gpt())
    source = VNodeState.initial(network, _recipe(AdamW(lr=0.1)), ATTENTION, training=True)
    _step(source, 1)
    data = source.to_bytes()
    for optimizer in OPTIMIZERS.values():
        begun = VNodeState.begin(network, _recipe(optimizer), ATTENTION, data, training=True)
        fresh = VNodeState.initial(network, _recipe(optimizer), ATTENTION, training=True)
        found, zero = safetensors.numpy.load(begun.to_bytes()), safetensors.numpy.load(fresh.to_bytes())
        assert found.keys() == zero.keys()
        for key, value in found.items():
            theirs = source.parameters[key.removeprefix("param.")].numpy() if key.startswith("param.") else zero[key]
            assert np.array_equal(value, theirs), key
        assert _step(begun, 1)


def test_weights_to_begin_with_that_do_not_fit_are_refused_by_name() -> None:
    network, recipe = analyse(gpt()), _recipe(SGD())
    data = VNodeState.initial(network, _recipe(AdamW()), ATTENTION, training=True).to_bytes()
    cases = _damaged(data)
    for name in (
        "empty",
        "cut in the header",
        "cut in a tensor",
        "noise",
        "missing",
        "unknown",
        "dtype",
        "shape",
        "offsets",
    ):
        damaged, expected = cases[name]
        with pytest.raises(ComputeError, match=f"attention0.*{expected}"):
            VNodeState.begin(network, recipe, ATTENTION, damaged, training=True)
