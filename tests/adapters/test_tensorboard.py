"""Event files as TensorBoard reads them: framing by the letter, content by protobuf's own parser."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dcnr.adapters.tensorboard import EventFile, crc32c, scalars_event
from tests.adapters.event_files import Point, parse_event, points, records


@pytest.mark.parametrize(
    ("data", "expected"),
    # The check value of CRC-32C's definition, and two of the examples of RFC 3720, appendix B.4.
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
    ids=["digits", "zeros", "ones"],
)
def test_checksums_are_crc_32c(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def test_a_file_read_back_has_what_was_added(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 1_700_000_000.5)
    file.add(1_700_000_001.25, 1, {"train/loss": 2.5, "train/grad_scale": 1.0})
    file.add(1_700_000_002.0, 300, {"validation/loss": 0.125})
    file.close()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.1700000000.")
    first, *_ = records(path.read_bytes())
    assert parse_event(first).file_version == "brain.Event:2"
    assert parse_event(first).wall_time == 1_700_000_000.5
    assert points(tmp_path) == [
        Point("train/loss", 1, 2.5, 1_700_000_001.25),
        Point("train/grad_scale", 1, 1.0, 1_700_000_001.25),
        Point("validation/loss", 300, 0.125, 1_700_000_002.0),
    ]


def test_what_was_added_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 5.0)
    file.add(6.0, 1, {"a": 1.0})
    assert [p.step for p in points(tmp_path)] == [1]
    file.close()


def test_files_of_one_second_are_kept_apart_and_in_order(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        file = EventFile(tmp_path, 7.0)
        file.add(7.0, step, {"a": float(step)})
        file.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert [p.step for p in points(tmp_path)] == [1, 2, 3]


def test_a_step_of_more_than_32_bits_and_a_tag_of_more_than_127_bytes() -> None:
    event = parse_event(scalars_event(1.0, 1 << 40, {"x" * 300: 1.0}))
    assert event.step == 1 << 40
    assert event.summary.value[0].tag == "x" * 300


@pytest.mark.parametrize(("value", "read"), [(1e300, math.inf), (-1e300, -math.inf), (math.inf, math.inf)])
def test_what_float32_cannot_hold_is_infinite(value: float, read: float) -> None:
    assert parse_event(scalars_event(1.0, 1, {"a": value})).summary.value[0].simple_value == read


def test_the_reader_of_these_tests_notices_a_changed_bit(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 5.0)
    file.add(6.0, 1, {"a": 1.0})
    file.close()
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for place in (1, 9, 20, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        with pytest.raises(AssertionError):
            list(records(bytes(bad)))
