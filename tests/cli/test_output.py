"""What commands print is what they were told, whatever it holds."""

from __future__ import annotations

import pytest

from dcnr.cli.output import print_table


def test_text_from_the_network_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "reason"), [("[/tmp/x]", "float32 [rows, 128], expected")])
    shown = capsys.readouterr().out
    assert "[/tmp/x]" in shown
    assert "float32 [rows, 128], expected" in shown
