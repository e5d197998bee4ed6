"""Units for people."""

from __future__ import annotations

import pytest

from dcnr.cli.output import duration, number, size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0"),
        (number(999), "999"),
        (number(12_345), "12.3 k"),
        (number(4_560_000), "4.56 M"),
        (number(7e9), "7 G"),
        (number(7e12), "7 T"),
        (size(1023), "1023 B"),
        (size(5 << 20), "5.0 MiB"),
        (duration(0.4), "0 s"),
        (duration(59), "59 s"),
        (duration(61), "1 min 1 s"),
        (duration(3600), "1 h 0 min"),
        (duration(200_000), "2 d 7 h"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected
