"""What must be settled before torch is imported, because it reaches bits or speed.

The number of threads decides how sums are split, so it belongs to the numeric class; OpenMP and MKL read it once, at
import. This module therefore imports torch only inside :func:`prepare`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from dcnr.errors import UsageError

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def prepare(threads: int) -> None:
    """Fix the threads of every kernel of this process and import torch.

    Call it once, before anything else imports torch; a second call must ask for the same number. Raises
    :class:`~dcnr.errors.UsageError` if torch already runs with another number of threads.
    """
    if threads < 1:
        raise UsageError(f"threads must be at least 1, found {threads}")
    imported = "torch" in sys.modules
    if not imported:
        os.environ["MKL_DYNAMIC"] = "FALSE"
        os.environ["OMP_DYNAMIC"] = "FALSE"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    if imported and torch.get_num_threads() != threads:
        raise UsageError(
            f"torch was imported before with {torch.get_num_threads()} threads, {threads} are asked for: "
            "the number of threads reaches bits and cannot change in a process"
        )
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    # The same switch as torch.use_deterministic_algorithms, which imports the compilers as well (see optimizers.py).
    torch.set_deterministic_debug_mode("error")
    # Deterministic mode would otherwise fill every fresh tensor, which costs a pass over memory and adds nothing:
    # no kernel here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc reuse freed tensors instead of returning them to the kernel (measured: page faults cost up to a tenth).

    Other C libraries are left as they are. This cannot reach a bit.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 16 << 20)


def return_freed_memory() -> None:
    """Give back to the kernel what a session left behind: an idle PNode must not hold its owner's memory (glibc only)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
