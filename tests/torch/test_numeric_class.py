from __future__ import annotations

import subprocess
import sys

import pytest

from dcnr.adapters.torch import numeric_class


def test_the_same_machine_is_the_same_class_in_every_process() -> None:
    name, facts, gflops = numeric_class.measure(1)
    program = (
        "from dcnr.adapters.torch.environment import prepare\n"
        "prepare(1)\n"
        "from dcnr.adapters.torch.numeric_class import measure\n"
        "print(measure(1)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == name
    assert len(name) == 64
    assert {fact.partition("=")[0] for fact in facts} == {
        "torch",
        "numpy",
        "libc",
        "machine",
        "cpu_vendor",
        "cpu_capability",
        "threads",
        "kernels",
    }
    assert gflops > 0


def test_another_bit_of_a_kernel_is_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = numeric_class.measure(1)[0]
    fixed = numeric_class._fixed

    def shifted(name, *arguments, **named):  # type: ignore[no-untyped-def]
        value = fixed(name, *arguments, **named)
        return value.nextafter(value + 1) if name == "shift" else value

    monkeypatch.setattr(numeric_class, "_fixed", shifted)
    assert numeric_class.measure(1)[0] != before
