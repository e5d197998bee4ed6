"""TensorBoard's event files: named numbers by step, each record with its length and two checksums.

A record is its length (8 bytes), a checksum of these 8, the bytes of one ``Event`` message, a checksum of them. Of that
message we write four fields: 1 wall time (double), 2 step (int64), 3 file version (text, in the first record alone) and
5 summary, which holds values of a tag (1) and a float32 (2).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

FILE_VERSION = b"brain.Event:2"
"""What readers expect in the first record."""
POLYNOMIAL = 0x82F63B78
"""Of CRC-32C, bits reversed."""
MASK = 0xA282EAD8
"""Added to a rotated checksum, so that the checksum of bytes that hold checksums says something."""
LENGTH_DELIMITED, FIXED64, FIXED32, VARINT = 2, 1, 5, 0
"""Wire types of protobuf."""


def _table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of ``data``; slow, but a record has some hundred bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """A checksum as records hold it."""
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def framed(event: bytes) -> bytes:
    """One record of an event file."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", masked(crc32c(length))) + event + struct.pack("<I", masked(crc32c(event)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | LENGTH_DELIMITED]) + _varint(len(data)) + data


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        # A loss of a float64 network may be beyond float32: then it is as infinite there as it looks in a chart.
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _event(unix_s: float, rest: bytes) -> bytes:
    return bytes([1 << 3 | FIXED64]) + struct.pack("<d", unix_s) + rest


def scalars_event(unix_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """The ``Event`` with these values (tag to number) at ``step``."""
    summary = b"".join(
        _bytes_field(1, _bytes_field(1, tag.encode()) + bytes([2 << 3 | FIXED32]) + _float32(value))
        for tag, value in values.items()
    )
    return _event(unix_s, bytes([2 << 3 | VARINT]) + _varint(step) + _bytes_field(5, summary))


class EventFile:
    """A new event file in ``folder``. TensorBoard reads the files of a folder by name, so a later one continues."""

    def __init__(self, folder: Path, unix_s: float) -> None:
        """Raises :class:`OSError` where the file cannot be created."""
        self._file = self._created(folder, int(unix_s))
        self._append(_event(unix_s, _bytes_field(3, FILE_VERSION)))

    @staticmethod
    def _created(folder: Path, second: int) -> BinaryIO:
        number = 0
        while True:
            # The number keeps two files of one second apart, and in their order.
            path = folder / f"events.out.tfevents.{second:010d}.{number:03d}.{socket.gethostname()}"
            try:
                return path.open("xb")
            except FileExistsError:
                number += 1

    def add(self, unix_s: float, step: int, values: Mapping[str, float]) -> None:
        """Append values (tag to number) of ``step``; readers see them at once."""
        self._append(scalars_event(unix_s, step, values))

    def _append(self, event: bytes) -> None:
        self._file.write(framed(event))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
