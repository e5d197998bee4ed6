"""Which row of the dataset is row r of step t: a pure function, so nothing is stored and nothing is loaded.

Each data epoch is a pseudo-random permutation of 0..N-1: a four-round Feistel network over the next even
power of two, walked until it falls inside (Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib


def permuted(index: int, total: int, seed: int, data_epoch: int) -> int:
    """Image of ``index`` (0 <= index < total) under the epoch's permutation."""
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for turn in range(4):
            word = hashlib.blake2b(f"{seed}/{data_epoch}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & mask)
        value = (left << half_bits) | right
        if value < total:
            return value


def dataset_row(position: int, total: int, seed: int) -> int:
    """Row of the dataset at ``position`` = (step - 1) * batch_size + row, counted through all data epochs."""
    data_epoch, index = divmod(position, total)
    return permuted(index, total, seed, data_epoch)


def microbatch_rows(
    *, step: int, microbatch: int, batch_size: int, rows: int, total: int, seed: int
) -> tuple[int, ...]:
    """Rows of one microbatch, in their order in the batch."""
    first = (step - 1) * batch_size + microbatch * rows
    return tuple(dataset_row(first + r, total, seed) for r in range(rows))
