"""The compute thread: one queue, one task at a time, results posted to the loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from dcnr.errors import ComputeError
from dcnr.ids import VNodeId
from dcnr.machine import Computed, ComputeFailed, Event
from dcnr.runtime.ports import Executor

logger = logging.getLogger(__name__)


class ThreadWorker:
    """Runs tasks in the order given on a daemon thread of its own.

    A daemon, because a kernel that hangs must not keep a process alive that was told to end. The queue holds
    at most what the machine hands over (``Limits.compute_queue``), so it needs no bound of its own.
    """

    def __init__(self, executor: Executor, name: str = "compute-0") -> None:
        self._executor = executor
        self._name = name
        self._order: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._waiting: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, post: Callable[[Event], None]) -> None:
        """``post`` is called on the loop's thread with each outcome."""
        self._loop = loop
        self._post = post
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def submit(self, task: int, what: Any) -> None:
        self._waiting[task] = what
        self._order.put(task)

    def cancel(self, task: int) -> None:
        """Drop a task that has not begun; one that runs or is done is left alone."""
        # dict.pop is atomic: of this call and the thread's own pop exactly one gets the task.
        if self._waiting.pop(task, None) is not None:
            self._post(ComputeFailed(task=task, reason="cancelled"))

    def stop(self, timeout_s: float) -> bool:
        """Let the running task end, drop the rest; False where it did not end in time."""
        self._waiting.clear()
        self._order.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        while (task := self._order.get()) is not None:
            what = self._waiting.pop(task, None)
            if what is None:
                continue
            outcome = self._execute(task, what)
            # Both may hold tensors; while the thread waits for its next task they must not.
            del what
            try:
                self._loop.call_soon_threadsafe(self._post, outcome)
            except RuntimeError:  # The loop is closed: nobody is left who would want the outcome.
                return
            del outcome

    def _execute(self, task: int, what: Any) -> Event:
        try:
            return Computed(task=task, result=self._executor.execute(what))
        except ComputeError as error:
            return ComputeFailed(task=task, reason=str(error), vnode=VNodeId(error.vnode) if error.vnode else None)
        except RuntimeError as error:  # What torch raises.
            return ComputeFailed(task=task, reason=str(error) or type(error).__name__)
        except Exception as error:
            # The border of the compute thread: the machine decides what a failed task means.
            logger.exception("compute task %d (%s) failed unexpectedly", task, type(what).__name__)
            return ComputeFailed(task=task, reason=f"{type(error).__name__}: {error}")
