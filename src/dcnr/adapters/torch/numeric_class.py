"""Which machines compute the same bits: found out by computing, not by trusting version numbers.

Call :func:`~dcnr.adapters.torch.environment.prepare` first; the number of threads is part of the class.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dcnr.adapters.torch import optimizers
from dcnr.adapters.torch.backend import view
from dcnr.adapters.torch.words import normal
from dcnr.ids import VNodeId

_ROWS, _LENGTH, _DIM, _HEADS, _CLASSES = 2, 128, 256, 4, 512
"""Large enough that kernels take the blocked and vectorised paths that training takes, small enough for a second."""

_GFLOPS_SIZE = 512
_GFLOPS_ROUNDS = 32


def measure(threads: int) -> tuple[str, tuple[str, ...], float]:
    """The class's sha256, the facts that it was hashed from (``name=value``), and measured GFLOP/s in float32.

    About a second. Speed is no part of the class.
    """
    assert torch.get_num_threads() == threads, "prepare() was called with another number of threads"
    facts = (
        f"torch={torch.__version__}",
        f"numpy={np.__version__}",
        f"libc={'-'.join(platform.libc_ver())}",
        f"machine={platform.machine()}",
        f"cpu_vendor={_cpu_vendor()}",
        f"cpu_capability={torch.backends.cpu.get_cpu_capability()}",
        f"threads={threads}",
        f"kernels={_kernels_digest()}",
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest(), facts, _gflops()


def _cpu_vendor() -> str:
    """As the kernel names it: libraries choose code paths by vendor too."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _kernels_digest() -> str:
    digest = hashlib.sha256()
    for tensor in _results():
        digest.update(view(tensor.detach().contiguous()))
    return digest.hexdigest()


def _results() -> Iterator[Tensor]:
    """Outputs and gradients of what training is made of, on fixed inputs."""
    for dtype in (torch.float32, torch.float64):
        yield from _block(dtype)
        yield from _adamw_step(dtype)
    # Its optimizer computes in float32.
    yield from _block(torch.bfloat16)
    left, right = _fixed("left", (_DIM, _DIM), torch.float32), _fixed("right", (_DIM, _DIM), torch.float32)
    # Muon orthogonalises in bf16.
    yield left.bfloat16() @ right.bfloat16()
    yield torch.addmm(left.bfloat16(), left.bfloat16(), right.bfloat16().T, beta=0.5, alpha=2.0)


def _fixed(name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return normal(seed=0, vnode=VNodeId("numeric class"), parameter=name, shape=shape, std=std, dtype=dtype)


def _block(dtype: torch.dtype) -> Iterator[Tensor]:
    """One layer of everything, forward and backward."""

    def fixed(name: str, *shape: int, std: float = 0.05) -> Tensor:
        return _fixed(name, shape, dtype, std).requires_grad_()

    source = fixed("source", _ROWS, _LENGTH, _DIM, std=1.0)
    gain, shift = fixed("gain", _DIM), fixed("shift", _DIM)
    q, k, v = (fixed(name, _DIM, _DIM) for name in "qkv")
    up, bias, down = fixed("up", 2 * _DIM, _DIM), fixed("bias", 2 * _DIM), fixed("down", _CLASSES, 2 * _DIM)
    normed = functional.layer_norm(source, (_DIM,), gain, shift)
    query, key, value = (
        functional.linear(normed, weight).view(_ROWS, _LENGTH, _HEADS, _DIM // _HEADS).transpose(1, 2)
        for weight in (q, k, v)
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    hidden = functional.gelu(functional.linear(mixed.reshape(_ROWS, _LENGTH, _DIM), up, bias))
    logits = functional.linear(hidden, down).view(-1, _CLASSES)
    targets = torch.arange(logits.shape[0]) % _CLASSES
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    yield from (normed, mixed, hidden, logits, loss)
    yield from torch.autograd.grad(loss, (source, gain, shift, q, k, v, up, bias, down))


def _adamw_step(dtype: torch.dtype) -> Iterator[Tensor]:
    parameter = _fixed("parameter", (_DIM, _DIM), dtype)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    for turn in range(2):
        parameter.grad = _fixed(f"gradient{turn}", (_DIM, _DIM), dtype)
        optimizers.step(optimizer)
    yield parameter


def _gflops() -> float:
    """Best of many short float32 products: what else the machine does at the moment must not count, and PNodes that
    start together on few cores must not look unequal."""
    left, right = (_fixed(name, (_GFLOPS_SIZE, _GFLOPS_SIZE), torch.float32) for name in ("left", "right"))

    def seconds() -> float:
        begun = time.perf_counter()
        left @ right
        return time.perf_counter() - begun

    return 2 * _GFLOPS_SIZE**3 / min(seconds() for _ in range(_GFLOPS_ROUNDS)) / 1e9
