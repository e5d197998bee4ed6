"""torch's optimizers without torch's compilers.

Both importing what compiles and asking it about an optimizer cost a PNode more than a second of a core at its start and
70 MB for good, and nothing here is ever compiled. torch asks in decorators alone, so what they wrap is called. For the
whole process: a program that compiles optimizers itself loses nothing but a hint to the compiler.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer

# Where torch decorates it no more, this is the method itself.
Optimizer.add_param_group = inspect.unwrap(Optimizer.add_param_group)  # type: ignore[method-assign]


def step(optimizer: Optimizer) -> None:
    """``optimizer.step()``, without hooks."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
