"""An orchestrator's compute tasks: draw a token from logits, read a result. NumPy, for an orchestrator has no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnr.errors import ComputeError
from dcnr.orchestrator.serving import Read, Sample
from dcnr.runtime.ports import TensorTable
from dcnr.runtime.tensors import as_array


class SamplingExecutor:
    """Implements :class:`~dcnr.runtime.ports.Executor` for the tasks of :mod:`dcnr.orchestrator.serving`."""

    def __init__(self, table: TensorTable) -> None:
        self._table = table

    def execute(self, task: Any) -> int | bytes:
        """The token's id, or the bytes. Raises :class:`ComputeError` on logits that are not finite."""
        if isinstance(task, Read):
            content = self._table.backend.view(self._table.get(task.tensor.handle))
            return bytes(content[task.first : task.first + task.count])
        assert isinstance(task, Sample)
        held = self._table.backend.view(self._table.get(task.logits.handle))
        logits = as_array(held, task.logits.dtype, (-1,)).astype(np.float64)
        if not np.isfinite(logits).all():
            raise ComputeError("the logits are not finite: the checkpoint is of no use")
        return draw(logits, task)


def draw(logits: np.ndarray, task: Sample) -> int:
    """``logits`` [vocabulary], float64. Softmax at the temperature, nucleus of ``top_p``, inverse transform."""
    if task.temperature <= 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / task.temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order])
    probabilities /= probabilities.sum()
    cumulative = np.cumsum(probabilities)
    kept = min(int(np.searchsorted(cumulative, task.top_p)) + 1, len(order))
    word = np.random.Philox(key=np.array([task.seed & (2**64 - 1), task.position], dtype=np.uint64)).random_raw()
    point = (int(word) >> 11) / 2**53 * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative, point, side="right")), kept - 1)])
