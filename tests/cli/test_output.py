"""Units for people."""

from __future__ import annotations

import pytest

from dcnr.cli.output import FOLDED_MOST, duration, number, print_table, size


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


LONG = "n" * 300


def test_what_is_no_terminal_gets_a_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    """However long it is, whatever it holds, and columns stand below each other."""
    print_table(("id", "what"), [(LONG, "first"), ("多", "a\nb\u2028\x1b[2J"), ("", 3)])
    lines = capsys.readouterr().out.split("\n")
    assert lines == [
        "id" + " " * 300 + "what",
        LONG + "  first",
        "多" + " " * 300 + r"a\nb\u2028\x1b[2J",
        " " * 302 + "3",
        "",
    ]


def test_a_terminal_gets_a_table_as_wide_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    print_table(("id", "what"), [(LONG, "first")])
    folded = capsys.readouterr().out
    # The first line is the header, in bold.
    assert max(map(len, folded.splitlines()[1:])) <= 60
    assert folded.count("n") == 300, "nothing is cut"
    # What nobody reads whole is not folded: that takes seconds.
    print_table(("id", "what"), [(LONG, "first")] * (FOLDED_MOST + 1))
    assert capsys.readouterr().out.count("\n") == FOLDED_MOST + 2
