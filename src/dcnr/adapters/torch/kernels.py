"""The arithmetic of every node type: one function per entry of the catalogue.

A kernel takes tensors with the batch axis first, never writes into them, and keeps nothing between calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcnr.adapters.torch.fanout import fan_out
from dcnr.adapters.torch.words import dropout_mask
from dcnr.ids import VNodeId
from dcnr.network.types import CATALOGUE, Settings, flag, integer, number, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a kernel may depend on besides tensors: all of it is in the record or follows from (step, row)."""

    vnode: VNodeId
    settings: Settings
    seed: int = 0
    step: int = 0
    first_row: int = 0
    """Position of the first row in the step's batch."""
    training: bool = False
    target: Tensor | None = None
    """Of a cost."""
    valid: int = 0
    """Valid targets of the whole step, of a cost."""


Tensors = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]
Kernel = Callable[[Tensors, Weights, Call], Tensors]


def _linear(inputs: Tensors, weights: Weights, _: Call) -> Tensors:
    return (functional.linear(inputs[0], weights["weight"], weights.get("bias")),)


def _embedder(inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    found = functional.embedding(inputs[0], weights["weight"])
    if text(call.settings, "position_encoding") == "learned":
        found = found + weights["position.weight"][: inputs[0].shape[1]]
    return (found,)


def _layernorm(inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    dim, eps = integer(call.settings, "dim"), number(call.settings, "eps")
    return (functional.layer_norm(inputs[0], (dim,), weights["weight"], weights.get("bias"), eps),)


@functools.lru_cache(maxsize=32)
def _angles(length: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, head_dim / 2], computed in float64 and rounded once."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = torch.outer(torch.arange(length, dtype=torch.float64), theta**-powers).unsqueeze(1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Rotary positions (Su et al., 2021) on [B, T, heads, head_dim]: element i turns with element i + head_dim / 2."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(tensor, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    turned = torch.empty(tensor.shape, dtype=tensor.dtype)
    half = tensor.shape[-1] // 2
    first, second = tensor[..., :half], tensor[..., half:]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin, value=direction)
    return turned


def _attention(inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    settings = call.settings
    heads, groups, size = (integer(settings, key) for key in ("num_heads", "num_kv_heads", "head_dim"))
    rows, length, _ = inputs[0].shape
    turned = text(settings, "position_encoding") == "rope"
    projected = []
    for name, tensor, count in zip("qkv", fan_out(inputs[0], (False,) * 3), (heads, groups, groups), strict=True):
        part = functional.linear(tensor, weights[f"{name}.weight"], weights.get(f"{name}.bias")).view(
            rows, length, count, size
        )
        if turned and name != "v":
            cos, sin = _angles(length, size, number(settings, "rope_theta"), part.dtype)
            part = _Rotate.apply(part, cos, sin)  # type: ignore[no-untyped-call]
        projected.append(part.transpose(1, 2))
    q, k, v = projected
    mixed = functional.scaled_dot_product_attention(
        q, k, v, is_causal=flag(settings, "causal"), enable_gqa=groups != heads
    )
    found = mixed.transpose(1, 2).reshape(rows, length, heads * size)
    if flag(settings, "output_projection"):
        found = functional.linear(found, weights["o.weight"], weights.get("o.bias"))
    return (found,)


def _gelu(inputs: Tensors, _: Weights, call: Call) -> Tensors:
    return (functional.gelu(inputs[0], approximate=text(call.settings, "approximate")),)


def _relu(inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (functional.relu(inputs[0]),)


def _dropout(inputs: Tensors, _: Weights, call: Call) -> Tensors:
    rate = number(call.settings, "rate")
    if not call.training or rate == 0.0:
        return (inputs[0],)
    mask = dropout_mask(
        seed=call.seed,
        vnode=call.vnode,
        step=call.step,
        first_row=call.first_row,
        shape=tuple(inputs[0].shape),
        rate=rate,
        dtype=inputs[0].dtype,
    )
    return (inputs[0] * mask,)


def _broadcast(inputs: Tensors, _: Weights, call: Call) -> Tensors:
    return fan_out(inputs[0], (False,) * integer(call.settings, "num_outputs"))


def _add(inputs: Tensors, _weights: Weights, _call: Call) -> Tensors:
    return (functools.reduce(torch.add, inputs),)


def _cost(inputs: Tensors, _: Weights, call: Call) -> Tensors:
    """Sum over this microbatch's valid targets / valid targets of the whole step, so that the split changes nothing."""
    assert call.target is not None
    match text(call.settings, "cost_function"):
        case "ce_logits":
            total = functional.cross_entropy(
                inputs[0].reshape(-1, inputs[0].shape[-1]),
                call.target.reshape(-1),
                ignore_index=integer(call.settings, "ignore_index"),
                reduction="sum",
            )
        case "mse":
            if call.target.shape != inputs[0].shape:
                raise ValueError(f"target of shape {list(call.target.shape)}, expected {list(inputs[0].shape)}")
            total = functional.mse_loss(inputs[0], call.target, reduction="sum")
        case other:
            raise AssertionError(other)
    return (total / max(call.valid, 1),)


def valid_targets(settings: Settings, target: Tensor) -> int:
    """How many targets of a cost count: those that are not ignored, or every element of an mse target."""
    if settings["cost_function"] == "ce_logits":
        return int((target != integer(settings, "ignore_index")).sum())
    return target.numel()


KERNELS: dict[str, Kernel] = {
    "linear": _linear,
    "embedder": _embedder,
    "layernorm": _layernorm,
    "attention": _attention,
    "gelu": _gelu,
    "relu": _relu,
    "dropout": _dropout,
    "broadcast": _broadcast,
    "add": _add,
    "cost": _cost,
}

if KERNELS.keys() != CATALOGUE.keys():
    raise ImportError(f"node types without a kernel, or kernels without a type: {KERNELS.keys() ^ CATALOGUE.keys()}")
