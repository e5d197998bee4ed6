"""A forward pass of explicit tensors: what fits, how rows are cut into batches, how outputs are put together."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dcnr.config import Limits
from dcnr.errors import InvalidData, InvalidNetwork, NoCapacity, ProtocolError, UsageError
from dcnr.network.analysis import TensorSpec, analyse
from dcnr.network.graph import Definition, InputSpec
from dcnr.network.node_type import DTYPE_BYTES
from dcnr.network.types import nearest
from dcnr.protocol.messages import Forward, Forwarded, InlineTensor
from dcnr.runtime.tensors import as_array

if TYPE_CHECKING:
    from dcnr.client.connect import AsyncClient

Array = np.ndarray[Any, Any]


class Outputs(dict[str, Array]):
    """Output name to array [rows, ...]; what the network gives in bfloat16, which numpy lacks, is float32. ``session`` and ``step`` say whose weights were used; step 0 = initial weights."""

    session: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Tensors that have been checked against a network."""

    tensors: Mapping[str, Array]
    """By input name, [rows, ...], contiguous and little endian."""
    outputs: Mapping[str, TensorSpec]
    """Without the rows, for sequences of the length given."""
    rows: int
    batch: int
    """Most rows of a batch."""

    def cut(self, first: int, count: int) -> tuple[InlineTensor, ...]:
        parts = {name: tensor[first : first + count] for name, tensor in self.tensors.items()}
        return tuple(
            InlineTensor(column=name, shape=part.shape, dtype=part.dtype.name, data=part.tobytes())
            for name, part in parts.items()
        )


def check(definition: Definition, given: Mapping[str, Any], limits: Limits) -> Batches:
    """Fit ``given`` (input name to array [rows, ...]) to a network. A sequence may be shorter than declared.

    Raises :class:`UsageError` for a network without outputs and :class:`InvalidData` with everything that does not fit.
    """
    network = analyse(definition)
    if not network.results:
        raise UsageError(f"network {definition.name!r} has neither an output nor a cost: a forward pass needs one")
    needed = network.upstream(result.node_id for result in network.results)
    entries = {entry.name: entry for entry in definition.inputs if entry.node_id in needed}
    known = {entry.name for entry in definition.inputs}
    arrays = {name: _array(value) for name, value in given.items()}
    problems = [
        f"input {name!r}: found no such input in network {definition.name!r}, expected {nearest(name, sorted(known))}"
        for name in arrays
        if name not in known
    ]
    for name, entry in entries.items():
        problem = _problem(entry, arrays.get(name))
        if problem:
            problems.append(f"input {name!r}: {problem}")
    if problems:
        raise InvalidData("\n".join(problems))
    fitting = {name: array for name, array in arrays.items() if name in entries and not isinstance(array, str)}
    tensors = {name: np.ascontiguousarray(fitting[name], fitting[name].dtype.newbyteorder("<")) for name in entries}
    first = next(iter(tensors))
    rows = len(tensors[first])
    for name, tensor in tensors.items():
        if len(tensor) != rows:
            problems.append(f"input {name!r}: found {len(tensor)} rows, expected {rows} as in input {first!r}")
    vocabularies = {n.id: n.config["vocab_size"] for n in definition.nodes if n.type == "embedder"}
    for entry in entries.values():
        size = vocabularies.get(entry.node_id)
        tensor = tensors[entry.name]
        if isinstance(size, int) and (tensor.min() < 0 or tensor.max() >= size):
            found = int(tensor.min()) if tensor.min() < 0 else int(tensor.max())
            problems.append(f"input {entry.name!r}: found token {found}, expected 0 to {size - 1}")
    if problems:
        raise InvalidData("\n".join(problems))
    outputs = _outputs(definition, tensors)
    row_bytes = sum(tensor.nbytes // rows for tensor in tensors.values())
    if row_bytes > limits.forward_input_bytes:
        raise InvalidData(f"found {row_bytes} bytes of inputs in a row, expected at most {limits.forward_input_bytes}")
    result_bytes = sum(spec.bytes for spec in outputs.values())
    if result_bytes > limits.forward_row_bytes:
        raise InvalidData(f"a row has {result_bytes} bytes of outputs, at most {limits.forward_row_bytes} are possible")
    batch = min(rows, limits.forward_input_bytes // row_bytes, max(1, limits.forward_output_bytes // result_bytes))
    return Batches(tensors=tensors, outputs=outputs, rows=rows, batch=batch)


def _array(given: Any) -> Array | str:
    """The array, or what is there instead."""
    try:
        return np.asarray(given)
    except ValueError:
        return "rows of different shapes"


def _problem(entry: InputSpec, found: Array | str | None) -> str:
    shape = ["rows", *entry.shape]
    expected = f"expected {entry.dtype} [{', '.join(map(str, shape))}]"
    if found is None or isinstance(found, str):
        return f"found {found or 'nothing'}, {expected}"
    fits = found.ndim == len(shape) and found.size > 0 and found.shape[2:] == entry.shape[1:]
    # The first axis may be a sequence; whether a shorter one is legal there, the network's own shape rules say.
    if found.dtype.name == entry.dtype and fits and (not entry.shape or found.shape[1] <= entry.shape[0]):
        return ""
    return f"found {found.dtype.name} {list(found.shape)}, {expected}"


def _outputs(definition: Definition, tensors: Mapping[str, Array]) -> dict[str, TensorSpec]:
    """Shapes of the outputs for tensors that may be shorter than declared."""
    inputs = tuple(
        replace(entry, shape=tensors[entry.name].shape[1:]) if entry.name in tensors else entry
        for entry in definition.inputs
    )
    if inputs != definition.inputs:
        nodes = tuple(replace(node, input_shapes=None, output_shapes=None) for node in definition.nodes)
        try:
            shorter = analyse(replace(definition, inputs=inputs, nodes=nodes))
        except InvalidNetwork as error:
            shapes = ", ".join(f"{name!r} {list(tensor.shape)}" for name, tensor in tensors.items())
            reason = error.problems[0]
            raise InvalidData(f"inputs {shapes}: shorter than declared, which does not fit here ({reason})") from error
    else:
        shorter = analyse(definition)
    return {o.name: shorter.vnodes[o.node_id].outputs[o.slot_id] for o in shorter.results}


async def run(client: AsyncClient, target: str, batches: Batches) -> Outputs:
    """Send batch after batch; where one needs more memory than there is, smaller ones are tried."""
    parts: dict[str, list[Array]] = {name: [] for name in batches.outputs}
    outputs = Outputs()
    outputs.step = -1
    first, batch = 0, batches.batch
    while first < batches.rows:
        count = min(batch, batches.rows - first)
        request = Forward(
            target=outputs.session or target,
            inputs=batches.cut(first, count),
            rows=batch,
            step=outputs.step,
            last=first + count == batches.rows,
        )
        try:
            answer = await _batch(client.stream(request), batches.outputs, count, outputs)
        except NoCapacity:
            if batch == 1:
                raise
            batch = (batch + 1) // 2
            continue
        for name, array in answer.items():
            parts[name].append(array)
        first += count
    outputs.update({name: np.concatenate(arrays) for name, arrays in parts.items()})
    return outputs


async def _batch(
    replies: AsyncIterator[Any], specs: Mapping[str, TensorSpec], rows: int, outputs: Outputs
) -> dict[str, Array]:
    """The outputs of one batch, every byte of them. ``outputs`` learns session and step."""
    data: dict[str, bytearray] = {name: bytearray() for name in specs}
    async for reply in replies:
        assert isinstance(reply, Forwarded)
        outputs.session, outputs.step = reply.session, reply.step
        spec = specs.get(reply.output)
        if spec is None:
            continue
        if reply.shape != (rows, *spec.shape) or reply.dtype != spec.dtype:
            found = f"found {reply.dtype} {list(reply.shape)}"
            raise ProtocolError(f"output {reply.output!r}: {found}, expected {spec.dtype} {[rows, *spec.shape]}")
        data[reply.output] += reply.data
    made: dict[str, Array] = {}
    for name, spec in specs.items():
        shape = (rows, *spec.shape)
        if len(data[name]) != math.prod(shape) * DTYPE_BYTES[spec.dtype]:
            raise ProtocolError(
                f"output {name!r} came with {len(data[name])} bytes, expected {list(shape)} {spec.dtype}"
            )
        made[name] = as_array(data[name], spec.dtype, shape)
    return made
