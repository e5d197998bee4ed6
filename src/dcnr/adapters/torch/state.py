"""A VNode's state: weights, running gradient sums, optimizer; and the bytes of a state object.

A state object is a safetensors file of tensors alone, ``param.<name>`` and ``optim.<name>.<slot>``, in the order of
their names and without metadata: equal states have equal bytes. It is written here because the library orders
metadata at random, and read here because the library's buffers are not aligned as torch's are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dcnr.adapters.torch import optimizers
from dcnr.adapters.torch.backend import DTYPES, sum_of_squares, view
from dcnr.adapters.torch.words import initial
from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, ParameterSpec, VNodeInfo
from dcnr.network.types import orthogonalised
from dcnr.session.recipe import Optimizer, Recipe

TensorLayout = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape by key, in the order of a state object."""

MUON_MOMENTUM = 0.95
"""Of a node that chooses muon in a session that does not: the session's momentum belongs to another rule."""

_SAFETENSORS = {"float32": "F32", "float64": "F64", "int64": "I64", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """How one parameter is updated."""

    algorithm: str
    weight_decay: float
    lr_scale: float

    def slots(self, spec: ParameterSpec, recipe: Recipe) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensors that the optimizer keeps, dtype and shape by name."""
        match self.algorithm:
            case "adam" | "adamw":
                # Fused kernels count steps in float32, whatever the parameter's dtype.
                return {
                    "exp_avg": (spec.wide_dtype, spec.shape),
                    "exp_avg_sq": (spec.wide_dtype, spec.shape),
                    "step": ("float32", ()),
                }
            case "sgd" if _sgd_momentum(recipe.optimizer) == 0.0:
                return {}
            case _:
                return {"momentum_buffer": (spec.wide_dtype, spec.shape)}


def _rule(info: VNodeInfo, spec: ParameterSpec, recipe: Recipe) -> _Rule:
    """The node's own optimizer and weight decay beat the session's; decay is for two or more dimensions alone."""
    settings = info.settings
    algorithm, decay, lr_scale = settings["optimizer"], settings["weight_decay"], settings["lr_scale"]
    algorithm = recipe.optimizer.kind if algorithm is None else algorithm
    decay = recipe.optimizer.weight_decay if decay is None else decay
    assert isinstance(algorithm, str)
    assert isinstance(decay, float)
    assert isinstance(lr_scale, float)
    if algorithm == "muon" and not orthogonalised(info.node.type, spec):
        algorithm = "adamw"
    return _Rule(algorithm=algorithm, weight_decay=decay if len(spec.shape) >= 2 else 0.0, lr_scale=lr_scale)


def _sgd_momentum(chosen: Optimizer) -> float:
    """The session's momentum belongs to its own optimizer; a node that chooses sgd beside it has another."""
    return chosen.momentum if chosen.kind == "sgd" else chosen.sgd_momentum


def _optimizer(algorithm: str, groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    chosen = recipe.optimizer
    which: dict[str, Any] = {
        "fused": chosen.implementation == "fused",
        "foreach": chosen.implementation == "foreach",
    }
    match algorithm:
        case "adam":
            return torch.optim.Adam(groups, betas=chosen.betas, eps=chosen.eps, **which)
        case "adamw":
            return torch.optim.AdamW(groups, betas=chosen.betas, eps=chosen.eps, **which)
        case "sgd":
            return torch.optim.SGD(groups, momentum=_sgd_momentum(chosen), **which)
        case "muon":
            momentum = chosen.momentum if chosen.kind == "muon" else MUON_MOMENTUM
            return torch.optim.Muon(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        case _:
            raise AssertionError(algorithm)


def layout(network: Network, recipe: Recipe, vnode: VNodeId) -> TensorLayout:
    """Every tensor of the VNode's state object, in its order."""
    info = network.vnodes[vnode]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in info.parameters:
        found[f"param.{spec.name}"] = (spec.dtype, spec.shape)
        if info.trainable:
            for slot, kind in _rule(info, spec, recipe).slots(spec, recipe).items():
                found[f"optim.{spec.name}.{slot}"] = kind
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What an update left. ``metrics``: (name, value) of the metrics of weights that the network names here.

    NaN where a metric has no value: the ratio of an update to weights that were all zero.
    """

    finite: bool
    """Whether every new weight is."""
    metrics: tuple[tuple[str, float], ...]


class VNodeState:
    """Weights of one VNode and, in training, its optimizer. Not thread-safe: one worker owns it."""

    def __init__(self, network: Network, recipe: Recipe, vnode: VNodeId, tensors: Mapping[str, Tensor]) -> None:
        """``tensors`` by key of :func:`layout`, owned from now on; without the ``optim`` keys it is for reading only."""
        info = network.vnodes[vnode]
        self.vnode = vnode
        self.parameters = {spec.name: tensors[f"param.{spec.name}"] for spec in info.parameters}
        self._tensors = dict(tensors)
        self._cast: dict[tuple[str, torch.dtype], Tensor] = {}
        # What the optimizer writes: the parameter itself, or what stands for it in float32 during an update.
        self._updated = {
            spec.name: self.parameters[spec.name]
            if spec.wide_dtype == spec.dtype
            # Empty between updates, but of as many axes: Muon looks at them.
            else torch.empty((0,) * len(spec.shape), dtype=DTYPES[spec.wide_dtype])
            for spec in info.parameters
        }
        self._uses = network.uses(vnode)
        self._sums: dict[int, dict[VNodeId, dict[str, Tensor]]] = {}
        self._folded: dict[int, dict[str, Tensor]] = {}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._metrics = tuple(metric for metric in network.metrics.get(vnode, ()) if metric.type != "activation_rms")
        if not info.trainable or len(tensors) < len(layout(network, recipe, vnode)):
            return
        groups: dict[str, list[dict[str, Any]]] = {}
        for spec in info.parameters:
            rule = _rule(info, spec, recipe)
            parameter = self._updated[spec.name]
            groups.setdefault(rule.algorithm, []).append(
                {"params": [parameter], "lr": 0.0, "weight_decay": rule.weight_decay, "lr_scale": rule.lr_scale}
            )
        for algorithm, members in groups.items():
            optimizer = _optimizer(algorithm, members, recipe)
            for spec in info.parameters:
                rule = _rule(info, spec, recipe)
                if rule.algorithm == algorithm:
                    # Zeros are what torch itself begins with; made here, version 0 has the tensors of every other.
                    optimizer.state[self._updated[spec.name]] = {
                        slot: tensors[f"optim.{spec.name}.{slot}"] for slot in rule.slots(spec, recipe)
                    }
            self._optimizers.append(optimizer)

    @staticmethod
    def initial(network: Network, recipe: Recipe, vnode: VNodeId, *, training: bool) -> VNodeState:
        """Version 0: a function of the seed, the VNode's id and the parameters' names."""
        tensors: dict[str, Tensor] = {}
        specs = {f"param.{spec.name}": spec for spec in network.vnodes[vnode].parameters}
        for key, (dtype, shape) in layout(network, recipe, vnode).items():
            if key in specs:
                tensors[key] = _first(specs[key], network.heads.get(vnode, ()) or (vnode,), recipe.seed)
            elif training:
                tensors[key] = torch.zeros(shape, dtype=DTYPES[dtype])
        return VNodeState(network, recipe, vnode, tensors)

    @staticmethod
    def begin(
        network: Network, recipe: Recipe, vnode: VNodeId, source: bytes | memoryview, *, training: bool
    ) -> VNodeState:
        """Version 0 with the weights of another session's state object, whatever optimizer that session had.

        Raises :class:`ComputeError` naming the VNode and the tensor unless it holds the network's weights."""
        whole = layout(network, recipe, vnode)
        try:
            tensors = _read_weights(source, {key: kind for key, kind in whole.items() if key.startswith("param.")})
        except (ValueError, RecursionError) as error:
            raise ComputeError(f"VNode {vnode}: state object refused: {error}", vnode) from error
        if training:
            for key, (dtype, shape) in whole.items():
                if key not in tensors:
                    tensors[key] = torch.zeros(shape, dtype=DTYPES[dtype])
        return VNodeState(network, recipe, vnode, tensors)

    @staticmethod
    def load(
        network: Network, recipe: Recipe, vnode: VNodeId, source: bytes | memoryview, *, training: bool
    ) -> VNodeState:
        """From a state object. Raises :class:`ComputeError` naming the VNode and the tensor unless it holds exactly
        the tensors that the network and the recipe call for."""
        try:
            tensors = _read(source, layout(network, recipe, vnode), with_optimizer=training)
        except (ValueError, RecursionError) as error:
            raise ComputeError(f"VNode {vnode}: state object refused: {error}", vnode) from error
        return VNodeState(network, recipe, vnode, tensors)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as a kernel takes it. Cast once per update, whatever the microbatches and nodes that read it."""
        parameter = self.parameters[name]
        if parameter.dtype == dtype:
            return parameter
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = parameter.to(dtype)
        return self._cast[name, dtype]

    def sums(self, step: int) -> dict[VNodeId, dict[str, Tensor]]:
        """The running gradient sums of a step, by using VNode and parameter name: backward writes them."""
        return self._sums.setdefault(step, {})

    def _fold(self, step: int) -> dict[str, Tensor]:
        """Left fold of the uses in the order of ``nodes``, once per step."""
        if step not in self._folded:
            sums, total = self._sums.pop(step, {}), dict[str, Tensor]()
            for use in self._uses:
                for name, value in sums.get(use, {}).items():
                    total[name] = total[name].add_(value) if name in total else value
            self._folded[step] = {name: total[name] for name in self.parameters if name in total}
        return self._folded[step]

    def grad_square(self, step: int) -> float:
        """Sum of squares of the folded gradient, in float64, parameters in their declared order."""
        return sum_of_squares(self._fold(step).values())

    def update(self, *, step: int, learning_rate: float, grad_scale: float) -> Applied:
        """Apply the optimizer to the folded gradient times ``grad_scale``."""
        gradients = self._fold(step)
        wanted = {metric.type for metric in self._metrics}
        measured: dict[str, float] = {}
        # Before the factor is multiplied in: the norm is of the gradient as it was found.
        if "grad_norm" in wanted:
            measured["grad_norm"] = math.sqrt(sum_of_squares(gradients.values()))
        before = {}
        if "update_ratio" in wanted:
            before = {name: parameter.clone() for name, parameter in self.parameters.items()}
        del self._folded[step]
        for name, gradient in gradients.items():
            if grad_scale != 1.0:
                gradient.mul_(grad_scale)
            updated = self._updated[name]
            if updated is not self.parameters[name]:
                updated.data = self.parameters[name].to(updated.dtype)
            updated.grad = gradient
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            optimizers.step(optimizer)
        for name in gradients:
            updated = self._updated[name]
            updated.grad = None
            if updated is not self.parameters[name]:
                # Rounded once, to nearest: the step was computed in float32.
                self.parameters[name].copy_(updated)
                updated.data = updated.new_empty((0,) * updated.dim())
        self._cast.clear()
        if "learning_rate" in wanted:
            measured["learning_rate"] = self._optimizers[0].param_groups[0]["lr"]
        if "weight_norm" in wanted:
            measured["weight_norm"] = math.sqrt(sum_of_squares(self.parameters.values()))
        if "update_ratio" in wanted:
            norm = math.sqrt(sum_of_squares(before.values()))
            for name, tensor in before.items():
                tensor.sub_(self.parameters[name])
            measured["update_ratio"] = math.sqrt(sum_of_squares(before.values())) / norm if norm else math.nan
        return Applied(
            # A sum is finite only if every term is; it needs one pass and no memory.
            finite=all(math.isfinite(parameter.sum().item()) for parameter in self.parameters.values()),
            metrics=tuple((metric.name, measured[metric.type]) for metric in self._metrics),
        )

    def copy(self) -> StateCopy:
        """A deep copy of weights and optimizer state, as they are now."""
        return StateCopy(
            tensors={
                key: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
                for key, tensor in self._tensors.items()
            }
        )

    def to_bytes(self) -> bytes:
        """The state object of the present state."""
        return serialise_snapshot(StateCopy(tensors=self._tensors))


def _first(spec: ParameterSpec, owners: Sequence[VNodeId], seed: int) -> Tensor:
    """A parameter at version 0; of an attention that stands for separate heads, theirs one below another."""
    part = replace(spec, shape=(spec.shape[0] // len(owners), *spec.shape[1:]))
    parts = [initial(part, seed=seed, vnode=owner, dtype=DTYPES[spec.dtype]) for owner in owners]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCopy:
    """A snapshot in memory."""

    tensors: Mapping[str, Tensor] = field(repr=False)


def serialise_snapshot(copy: StateCopy) -> bytes:
    """The bytes of a state object; safe on any thread, since nobody writes to a copy."""
    header: dict[str, Any] = {}
    parts: list[bytes | memoryview] = []
    end = 0
    names = {dtype: _SAFETENSORS[name] for name, dtype in DTYPES.items() if name in _SAFETENSORS}
    for key, tensor in sorted(copy.tensors.items()):
        data = view(tensor)
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _opened(source: bytes | memoryview) -> tuple[memoryview, dict[str, Any], int]:
    """The bytes, the header, and where the tensors begin. Raises ``ValueError``."""
    data = memoryview(source).cast("B")
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are no state object")
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("truncated header")
    header = json.loads(bytes(data[8:start]))
    if not isinstance(header, dict):
        raise ValueError("malformed header")
    return data, header, start


def _read_weights(source: bytes | memoryview, expected: TensorLayout) -> dict[str, Tensor]:
    """As :func:`_read`, but of an object whose optimizer is another's: its tensors are passed over."""
    data, header, start = _opened(source)
    for key in sorted({key for key in header if key.startswith("param.")} ^ expected.keys()):
        raise ValueError(f"tensor {key!r} is {'not expected' if key in header else 'missing'}")
    tensors: dict[str, Tensor] = {}
    for key, (dtype, shape) in expected.items():
        match header[key]:
            case {"dtype": found, "shape": sizes, "data_offsets": [int(first), int(last)]} if (
                found == _SAFETENSORS[dtype]
                and sizes == list(shape)
                and 0 <= first <= last <= len(data) - start
                and last - first == math.prod(shape) * DTYPES[dtype].itemsize
            ):
                tensors[key] = torch.empty(shape, dtype=DTYPES[dtype])
                view(tensors[key])[:] = data[start + first : start + last]
            case other:
                raise ValueError(f"tensor {key!r} is {other}, expected {_SAFETENSORS[dtype]} {list(shape)}")
    return tensors


def _read(source: bytes | memoryview, expected: TensorLayout, *, with_optimizer: bool) -> dict[str, Tensor]:
    """Tensors of a state object in memory that torch allocated. Raises ``ValueError`` saying which tensor is wrong."""
    data, header, start = _opened(source)
    for key in sorted(header.keys() ^ expected.keys()):
        raise ValueError(f"tensor {key!r} is {'not expected' if key in header else 'missing'}")
    tensors: dict[str, Tensor] = {}
    end = 0
    for key, (dtype, shape) in expected.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        wanted = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        if header[key] != wanted:
            raise ValueError(f"tensor {key!r} is {header[key]}, expected {wanted}")
        if with_optimizer or key.startswith("param."):
            tensors[key] = torch.empty(shape, dtype=DTYPES[dtype])
            chunk = data[start + end : start + end + size]
            if len(chunk) != size:
                raise ValueError(f"tensor {key!r} is truncated")
            view(tensors[key])[:] = chunk
        end += size
    if start + end != len(data):
        raise ValueError(f"{len(data)} bytes, expected {start + end}")
    return tensors
