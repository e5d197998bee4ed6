"""The blocking client's loop in a thread: it can be closed twice, left in the middle, and collected anywhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from dcnr.client.blocking import LoopThread
from dcnr.errors import UsageError


async def numbers() -> AsyncIterator[int]:
    for number in range(3):
        yield number


async def one() -> int:
    return 1


def test_a_closed_loop_says_so_and_closes_again() -> None:
    loop = LoopThread()
    assert loop.run(one()) == 1
    assert list(loop.iterate(numbers())) == [0, 1, 2]
    loop.stop()
    loop.stop()
    with pytest.raises(UsageError, match="this client is closed"):
        loop.run(one())


def test_an_iterator_that_is_collected_on_the_loops_thread_does_not_wait_for_itself() -> None:
    loop = LoopThread()
    reading = loop.iterate(numbers())
    assert next(reading) == 0
    closed = threading.Event()

    async def collect() -> None:
        reading.close()
        closed.set()

    loop.run(collect())
    assert closed.is_set()
    loop.stop()


def test_a_program_that_ends_with_a_half_read_iterator_ends() -> None:
    script = (
        "from tests.client.test_blocking import numbers\n"
        "from dcnr.client.blocking import LoopThread\n"
        "reading = LoopThread().iterate(numbers())\n"
        "print(next(reading))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
