import threading

import numpy as np
import pytest

from dcnr.runtime.tensors import CountedTable, NumpyBackend, as_array


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


def test_bytes_of_bfloat16_become_float32_of_the_same_values() -> None:
    # Sign, eight bits of exponent, seven of fraction.
    known = {0x0000: 0.0, 0x3F80: 1.0, 0xBFC0: -1.5, 0x4049: 3.140625, 0x7F80: np.inf, 0x0001: 2.0**-133}
    data = np.array(list(known), "<u2").tobytes()
    found = as_array(data, "bfloat16", (2, 3))
    assert found.dtype == np.float32
    assert found.reshape(-1).tolist() == list(known.values())
    assert as_array(bytes(8), "int64", ()).dtype == np.int64
    with pytest.raises(ValueError, match="reshape"):
        as_array(data, "bfloat16", (2, 2))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("int64", 8), ("bool", 1), ("bfloat16", 2)])
def test_the_view_is_the_tensors_own_bytes(shape: tuple[int, ...], dtype: str, size: int) -> None:
    backend = NumpyBackend()
    tensor = backend.empty(shape, dtype)
    view = backend.view(tensor)
    assert view.nbytes == size * int(np.prod(shape))
    view[:] = bytes(view.nbytes)
    assert not tensor.any()
