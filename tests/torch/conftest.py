"""One thread, as a PNode runs by default."""

from tests.numerics.conftest import one_thread

one_thread()
