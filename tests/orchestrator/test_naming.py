"""What people call things by."""

from __future__ import annotations

import pytest

from dcnr.errors import UnknownName
from dcnr.orchestrator.naming import begun

KNOWN = ["aaaa1111", "aaaa2222", "bbbb3333", "cc"]


@pytest.mark.parametrize(("name", "found"), [("bbbb", "bbbb3333"), ("aaaa1", "aaaa1111"), ("cc", "cc")])
def test_a_whole_id_or_its_only_beginning_is_enough(name: str, found: str) -> None:
    assert begun(name, KNOWN, "session", "dcnr session list") == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bbb", "no session 'bbb': a beginning has 4 characters at least; see `dcnr session list`"),
        ("", "no session '': a beginning has 4 characters at least; see `dcnr session list`"),
        ("aaaa", "more than one session 'aaaa': see `dcnr session list`"),
        ("dddd", "no session 'dddd': see `dcnr session list`"),
    ],
)
def test_what_is_wrong_is_said(name: str, said: str) -> None:
    with pytest.raises(UnknownName) as caught:
        begun(name, KNOWN, "session", "dcnr session list")
    assert str(caught.value) == said
