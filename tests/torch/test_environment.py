"""What is settled before torch is imported; in processes of their own, since it can be settled only once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dcnr.adapters.torch.environment import prepare
from dcnr.errors import UsageError


def _python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_are_fixed_before_torch_is_imported() -> None:
    found = _python(
        "import os, sys\n"
        "import dcnr.adapters.torch.environment as environment\n"
        "assert 'torch' not in sys.modules\n"
        "environment.prepare(1)\n"
        "import torch\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'], os.environ['MKL_DYNAMIC'],"
        " torch.get_num_threads(), torch.get_num_interop_threads(), torch.are_deterministic_algorithms_enabled(),"
        " torch.utils.deterministic.fill_uninitialized_memory)\n"
        "environment.prepare(1)\n"
    )
    assert found.split() == ["1", "1", "FALSE", "1", "1", "True", "False"]


def test_another_number_of_threads_is_refused() -> None:
    with pytest.raises(UsageError, match="1 threads, 3 are asked for"):
        prepare(3)
    with pytest.raises(UsageError, match="at least 1"):
        prepare(0)
