"""One thread, as a PNode runs by default."""

from __future__ import annotations

import sys

from dcnr.adapters.torch.environment import prepare


def one_thread() -> None:
    """Also where another test of this process has imported torch before with all cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    prepare(1)


one_thread()
