"""Every random number of training: raw words of the counter-based generator Philox (Salmon et al., 2011).

A number is a function of its name (seed, VNode, parameter; or seed, VNode, step, row), never of what was drawn before,
so it does not depend on placement, microbatches or replays. Raw words are stable between numpy versions; numpy's
distributions and torch's generators are not.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from dcnr.ids import VNodeId
from dcnr.network.node_type import ParameterSpec

_CHUNK = 1 << 20
"""Normal values made at once: bounds the float64 work space to a few times 8 MiB."""


def _philox(*name: str | int) -> np.random.Philox:
    key = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little"))


def normal(
    *, seed: int, vnode: VNodeId, parameter: str, shape: tuple[int, ...], std: float, dtype: torch.dtype
) -> Tensor:
    """Normal(0, std) values by the method of Box and Muller (1958) on 53-bit uniforms, rounded once to ``dtype``."""
    values = torch.empty(shape, dtype=dtype)
    flat = values.view(-1)
    generator = _philox("weights", seed, vnode, parameter)
    for first in range(0, flat.numel(), _CHUNK):
        count = min(_CHUNK, flat.numel() - first)
        raw = generator.random_raw(count + count % 2)
        uniform = (raw >> np.uint64(11)).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((uniform[0::2] + 1.0) * 2.0**-53))
        angle = uniform[1::2] * (2.0 * np.pi * 2.0**-53)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count] * std
        flat[first : first + count].copy_(torch.from_numpy(pairs))
    return values


def initial(spec: ParameterSpec, *, seed: int, vnode: VNodeId, dtype: torch.dtype) -> Tensor:
    """A parameter at version 0."""
    match spec.init:
        case "normal":
            return normal(seed=seed, vnode=vnode, parameter=spec.name, shape=spec.shape, std=spec.std, dtype=dtype)
        case "zeros":
            return torch.zeros(spec.shape, dtype=dtype)
        case "ones":
            return torch.ones(spec.shape, dtype=dtype)
        case other:
            raise AssertionError(other)


def dropout_mask(
    *, seed: int, vnode: VNodeId, step: int, first_row: int, shape: tuple[int, ...], rate: float, dtype: torch.dtype
) -> Tensor:
    """Mask of ``shape`` [rows, ...] that holds 0 or 1 / (1 - rate). Row r of the step's batch has its own stream of
    32-bit words; an element is kept if its word is at least ``rate`` * 2**32."""
    mask = torch.empty(shape, dtype=dtype)
    rows, elements = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    threshold = np.uint32(int(rate * 2**32))
    kept = np.empty((rows, elements), dtype=np.bool_)
    for row in range(rows):
        words = _philox("dropout", seed, vnode, step, first_row + row).random_raw((elements + 1) // 2)
        np.greater_equal(words.view(np.uint32)[:elements], threshold, out=kept[row])
    mask.view(-1).copy_(torch.from_numpy(kept).view(-1))
    return mask.mul_(1.0 / (1.0 - rate))


def fixed_pattern(*, seed: int, length: int, rate: float) -> Tensor:
    """Booleans [length, length], True with probability ``rate``. Row r is the beginning of its own stream, so a shorter
    pattern is a corner of a longer one."""
    found = np.empty((length, length), dtype=np.bool_)
    threshold = np.uint32(int(rate * 2**32))
    for row in range(length):
        words = _philox("mask", seed, row).random_raw((length + 1) // 2)
        np.less(words.view(np.uint32)[:length], threshold, out=found[row])
    pattern = torch.empty((length, length), dtype=torch.bool)
    return pattern.copy_(torch.from_numpy(found))
