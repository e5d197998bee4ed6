"""A reader of TensorBoard's event files that shares nothing with the writer: bitwise checksums, protobuf's own parser."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Field = descriptor_pb2.FieldDescriptorProto


def _event_class() -> Any:
    """The class of ``Event``, as far as scalars need it."""
    file = descriptor_pb2.FileDescriptorProto(name="event_of_tests.proto", package="of_tests", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any, str, bool]) -> None:
        added = file.message_type.add(name=name)
        for field, number, kind, of, many in fields:
            label = Field.LABEL_REPEATED if many else Field.LABEL_OPTIONAL
            made = added.field.add(name=field, number=number, type=kind, label=label)
            if of:
                made.type_name = f".of_tests.{of}"

    message("Value", ("tag", 1, Field.TYPE_STRING, "", False), ("simple_value", 2, Field.TYPE_FLOAT, "", False))
    message("Summary", ("value", 1, Field.TYPE_MESSAGE, "Value", True))
    message(
        "Event",
        ("wall_time", 1, Field.TYPE_DOUBLE, "", False),
        ("step", 2, Field.TYPE_INT64, "", False),
        ("file_version", 3, Field.TYPE_STRING, "", False),
        ("summary", 5, Field.TYPE_MESSAGE, "Summary", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("of_tests.Event"))


EVENT = _event_class()


@dataclass(frozen=True, slots=True)
class Point:
    tag: str
    step: int
    value: float
    unix_s: float


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 * (crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15) + (crc << 17) % (1 << 32) + 0xA282EAD8) % (1 << 32)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file; fails where a checksum or a length is wrong."""
    at = 0
    while at < len(data):
        assert _masked_crc(data[at : at + 8]) == struct.unpack_from("<I", data, at + 8)[0], "checksum of a length"
        (length,) = struct.unpack_from("<Q", data, at)
        record = data[at + 12 : at + 12 + length]
        assert _masked_crc(record) == struct.unpack_from("<I", data, at + 12 + length)[0], "checksum of a record"
        yield record
        at += 16 + length


def parse_event(record: bytes) -> Any:
    return EVENT.FromString(record)


def points(folder: Path) -> list[Point]:
    """Every scalar in the event files of a folder, in the order in which TensorBoard reads them."""
    return [
        Point(value.tag, event.step, value.simple_value, event.wall_time)
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in map(parse_event, records(path.read_bytes()))
        for value in event.summary.value
    ]
