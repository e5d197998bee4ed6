import threading

import numpy as np
import pytest

from dcnr.runtime.tensors import CountedTable, NumpyBackend


def test_a_value_lives_until_its_last_count_is_given_back() -> None:
    table = CountedTable(NumpyBackend())
    handle = table.put("value")
    table.hold(handle)
    table.release(handle)
    assert table.get(handle) == "value"
    table.release(handle)
    assert table.live() == 0
    with pytest.raises(KeyError):
        table.get(handle)
    with pytest.raises(KeyError):
        table.release(handle)


def test_counts_are_right_when_threads_share_a_handle() -> None:
    table = CountedTable(NumpyBackend())
    handle = table.put("value")

    def hold_and_release() -> None:
        for _ in range(2000):
            table.hold(handle)
            table.release(handle)

    threads = [threading.Thread(target=hold_and_release) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table.release(handle)
    assert table.live() == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("int64", 8), ("bool", 1), ("bfloat16", 2)])
def test_the_view_is_the_tensors_own_bytes(shape: tuple[int, ...], dtype: str, size: int) -> None:
    backend = NumpyBackend()
    tensor = backend.empty(shape, dtype)
    view = backend.view(tensor)
    assert view.nbytes == size * int(np.prod(shape))
    view[:] = bytes(view.nbytes)
    assert not tensor.any()
