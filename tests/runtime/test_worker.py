import asyncio
import threading
from typing import Any

import pytest

from dcnr.errors import ComputeError
from dcnr.machine import Computed, ComputeFailed, Event
from dcnr.runtime.worker import ThreadWorker


class Gate:
    """An executor whose first task waits until the test opens it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.began = threading.Event()

    def execute(self, task: Any) -> Any:
        if task == "wait":
            self.began.set()
            assert self.opened.wait(20)
        if isinstance(task, Exception):
            raise task
        return f"{task} done"


async def outcomes(gate: Gate, tasks: list[Any], cancel: int | None = None) -> list[Event]:
    queue: asyncio.Queue[Event] = asyncio.Queue()
    worker = ThreadWorker(gate)
    worker.start(asyncio.get_running_loop(), queue.put_nowait)
    for number, task in enumerate(tasks):
        worker.submit(number, task)
    if cancel is not None:
        await asyncio.to_thread(gate.began.wait, 20)
        worker.cancel(cancel)
    gate.opened.set()
    result = [await asyncio.wait_for(queue.get(), 20) for _ in tasks]
    assert worker.stop(20)
    return result


def test_tasks_run_in_order_and_each_has_one_outcome() -> None:
    got = asyncio.run(outcomes(Gate(), ["wait", "a", "b"]))
    assert got == [Computed(task=n, result=f"{t} done") for n, t in enumerate(["wait", "a", "b"])]


def test_a_queued_task_can_be_cancelled_and_a_running_one_cannot() -> None:
    got = asyncio.run(outcomes(Gate(), ["wait", "a", "b"], cancel=1))
    assert got[0] == ComputeFailed(task=1, reason="cancelled")
    assert [e.task for e in got[1:] if isinstance(e, Computed)] == [0, 2]
    assert [type(e) for e in asyncio.run(outcomes(Gate(), ["wait"], cancel=0))] == [Computed]


def test_failures_become_events(caplog: pytest.LogCaptureFixture) -> None:
    got = asyncio.run(outcomes(Gate(), [ComputeError("bad state"), RuntimeError("from torch"), KeyError("x")]))
    assert [e.reason for e in got if isinstance(e, ComputeFailed)] == ["bad state", "from torch", "KeyError: 'x'"]
    named = asyncio.run(outcomes(Gate(), [ComputeError("VNode a: no", "a"), ComputeError("no")]))
    assert [e.vnode for e in named if isinstance(e, ComputeFailed)] == ["a", None]
    assert [r.exc_info is not None for r in caplog.records] == [True], (
        "only the unexpected one is logged, with traceback"
    )
