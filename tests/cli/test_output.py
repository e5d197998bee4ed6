"""Units for people."""

from __future__ import annotations

import pytest

from dcnr.cli.output import duration, number, print_table, size


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


def test_text_from_the_network_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "reason"), [("[/tmp/x]", "float32 [rows, 128], expected")])
    shown = capsys.readouterr().out
    assert "[/tmp/x]" in shown
    assert "float32 [rows, 128], expected" in shown
