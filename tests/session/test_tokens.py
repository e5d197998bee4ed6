"""Data tokens: what was minted is taken, anything else is refused in one way, whatever its bytes."""

from __future__ import annotations

import pytest

from dcnr.errors import Refused
from dcnr.session.tokens import check, mint

SECRET = b"s" * 32


def test_a_token_holds_for_its_scope_until_it_expires() -> None:
    token = mint(SECRET, "rows/d", 100.0)
    check(SECRET, token, "rows/d", 99.0)
    for scope, now_s, other in (("rows/e", 99.0, "not for"), ("rows/d", 101.0, "expired")):
        with pytest.raises(Refused, match=other):
            check(SECRET, token, scope, now_s)
    with pytest.raises(Refused, match="was not issued by this process"):
        check(b"t" * 32, token, "rows/d", 99.0)


@pytest.mark.parametrize("token", ["", "a|b", "a|1|ü", "a|²|b", f"a|{'9' * 5000}|b", "a|-1|b", "a|1|b|c", "\0|1|\0"])
def test_hostile_tokens_are_refused(token: str) -> None:
    with pytest.raises(Refused):
        check(SECRET, token, "a", 0.0)
